import numpy as np
import pytest

from gating_jax.data import image_sets, scenes, tfds
from gating_jax.data.image_sets import Images, SetSource
from gating_jax.data.scenes import IGNORED, make_scenes, open_scenes
from gating_jax.data.tfds import DatasetNotPreparedError


@pytest.fixture
def blocks(monkeypatch):
  """Makes digits that are whole squares, brighter for higher classes, without noise."""
  brightness = np.repeat(20 * np.arange(10) + 64, 64).reshape(10, 8, 8, 1).astype(np.uint8)
  made = Images(brightness, np.arange(10, dtype=np.int32), tuple("0123456789"))
  monkeypatch.setattr(image_sets, "load", lambda *_: made)
  monkeypatch.setattr(scenes, "_NOISE", 0)


def test_a_scene_is_digits_apart_from_each_other_and_labelled_as_they_are(blocks):
  made = make_scenes("train", scenes=200, size=(20, 28), most=4)
  np.testing.assert_array_equal(
    made.labels, np.where(made.pixels > 0, (made.pixels - 44) // 20, 0)[..., 0]
  )
  areas = (made.labels > 0).sum(axis=(1, 2))
  assert sorted(set(areas)) == [64, 128, 192, 256]
  windows = np.lib.stride_tricks.sliding_window_view(made.labels, (8, 8), axis=(1, 2))
  whole = (windows > 0).all(axis=(3, 4)) & (windows.min(axis=(3, 4)) == windows.max(axis=(3, 4)))
  assert np.all(whole.sum(axis=(1, 2)) * 64 >= areas), "each digit is whole"
  assert set(np.unique(made.labels)) == set(range(11))
  places = np.argwhere(whole[areas == 64])[:, 1:]
  assert places.min(axis=0).tolist() == [0, 0]
  assert places.max(axis=0).tolist() == [12, 20]


def test_a_digit_without_room_is_left_out(blocks):
  made = make_scenes("train", scenes=30, size=(9, 9), most=5)
  np.testing.assert_array_equal((made.labels > 0).sum(axis=(1, 2)), np.full(30, 64))


def test_scenes_depend_on_the_seed_alone_and_splits_share_no_digit(monkeypatch):
  monkeypatch.setattr(scenes, "_NOISE", 0)
  make = lambda split, **seed: make_scenes(split, scenes=300, size=(8, 8), most=1, **seed)
  train, again, other, test = make("train"), make("train"), make("train", seed=1), make("test")
  np.testing.assert_array_equal(train.pixels, again.pixels)
  np.testing.assert_array_equal(train.labels, again.labels)
  assert np.mean(train.pixels != other.pixels) > 0.1
  images = {
    split: {image.tobytes() for image in image_sets.load(SetSource("digits", split)).pixels}
    for split in ("train", "test")
  }
  seen = lambda made: {image.tobytes() for image in made.pixels}
  assert seen(train) <= images["train"]
  assert seen(test) <= images["test"]
  assert not images["train"] & images["test"]
  assert train.class_names == ("background", *"0123456789")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(scenes=0), "scenes must be >= 1; got 0"),
    (dict(size=(32, 7)), "size must be >= 8; got 7"),
    (dict(most=0), "most must be >= 1; got 0"),
  ],
)
def test_scenes_that_cannot_be_made_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    make_scenes("train", **dict(scenes=1, size=(8, 8), most=1) | arguments)


def street(count, size=(32, 48)):
  """The used part of Cityscapes in TFDS; every pixel's brightness is its label, and all differ."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 40, (count, *size, 1), np.uint8)
  return [
    {"image_left": np.repeat(label, 3, axis=-1), "segmentation_label": label} for label in labels
  ]


@pytest.fixture
def opened(monkeypatch):
  made = street(7)
  monkeypatch.setattr(tfds, "open_tfds", lambda *_, **__: made)
  return made, lambda **settings: open_scenes(
    "cityscapes", "train", **dict(size=(32, 48)) | settings
  )


def test_cityscapes_own_numbers_become_train_classes(opened):
  made, scenes_of = opened
  read = scenes_of()
  images, labels = read.read(np.array([3, 1]))
  np.testing.assert_array_equal(images[0], made[3]["image_left"])
  own = made[3]["segmentation_label"][..., 0]
  assert set(labels[0][own == 7]) == {0}
  assert set(labels[0][own == 26]) == {read.class_names.index("car")} == {13}
  assert set(labels[0][own == 33]) == {18}
  assert set(labels[0][(own < 7) | (own == 9) | (own == 29) | (own > 33)]) == {IGNORED}
  assert len(read.class_names) == len(set(np.unique(labels)) - {IGNORED}) == 19


def test_training_sees_random_parts_half_of_them_mirrored_with_their_labels(opened):
  made, scenes_of = opened
  stream = scenes_of(crop=(8, 16), flip=True, seed=3)
  assert stream.shape == (8, 16, 3)
  steps = list(stream.batches(7, 0, 1, 12))
  mirrored = []
  for step, (images, labels) in enumerate(steps):
    assert (images.shape, labels.shape) == ((7, 1, 8, 16, 3), (7, 1, 8, 16))
    np.testing.assert_array_equal(labels, scenes.train_classes(images[..., 0]))
    for image, number in zip(
      images[:, 0, ..., 0], image_sets.batch_indices(3, step, 7, 7), strict=True
    ):
      whole = made[number]["segmentation_label"][..., 0]
      parts = np.lib.stride_tricks.sliding_window_view(whole, (8, 16))
      found = [(parts == part).all(axis=(2, 3)) for part in (image, image[:, ::-1])]
      assert sum(f.sum() for f in found) == 1
      mirrored.append(bool(found[1].any()))
  assert 0.3 < np.mean(mirrored) < 0.7
  for (images, labels), (again, labels_again) in zip(
    steps[5:], stream.batches(7, 5, 1, 12), strict=True
  ):
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)


def test_scenes_are_resized_without_mixing_labels(opened):
  made, scenes_of = opened
  images, labels = scenes_of(size=(16, 24)).read(np.arange(7))
  assert (images.shape, labels.shape) == ((7, 16, 24, 3), (7, 16, 24))
  for example, label in zip(made, labels, strict=True):
    blocks = scenes.train_classes(example["segmentation_label"][..., 0]).reshape(16, 2, 24, 2)
    assert np.all((blocks == label[:, None, :, None]).any(axis=(1, 3))), (
      "one of the four pixels that it stands for"
    )


def test_what_must_be_downloaded_by_hand_is_said(tmp_path):
  with pytest.raises(DatasetNotPreparedError) as caught:
    open_scenes("cityscapes", "train", str(tmp_path), size=(32, 48))
  message = str(caught.value)
  assert f"data set 'cityscapes' is not prepared in {tmp_path}" in message
  assert f"First put them into {tmp_path}/downloads/manual:" in message
  assert "'leftImg8bit_trainvaltest.zip' and 'gtFine_trainvaltest.zip'" in message
  assert "https://www.cityscapes-dataset.com/login/" in message


def test_a_set_of_classified_images_has_no_scenes(tmp_path):
  from tests.helpers import made_tfds

  images = list(zip(*made_tfds.images(3, (8, 8, 3)), strict=True))
  made_tfds.write(tmp_path, images, images, shape=(8, 8, 3), name="no_scenes")
  with pytest.raises(
    ValueError, match="a data set with image_left and segmentation_label; no_scenes has no"
  ):
    open_scenes("no_scenes", "train", str(tmp_path), size=(8, 8))
