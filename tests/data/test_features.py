import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gating_jax.data import features, streaming
from gating_jax.data import tfds as tfds_sets
from gating_jax.data.tfds import DatasetNotPreparedError
from tests.helpers import made_tfds
from tests.helpers.made_tables import refused
from tests.helpers.made_tfds import encoded

TYPES = tfds.features
RAMP = np.linspace(0, 1, 4 * 4 * 4 * 3).reshape(4, 4, 4, 3)  # four images, of brightness 0 to 1
LOADERS = {"resident": tfds_sets.load, "streaming": streaming.open_stream}
SETS = iter(range(100))


def tensor(dtype, shape=(4, 4, 3)):
  return TYPES.Tensor(shape=shape, dtype=np.dtype(dtype))


PIXEL, LABELS = tensor("uint8", (1, 1, 1)), TYPES.ClassLabel(num_classes=2)


def made(folder, image, label, examples, **splits):
  """Prepares a set of `(image, label)` and returns its name."""
  name = f"features_set{next(SETS)}"
  as_dicts = lambda pairs: [{"image": image, "label": label} for image, label in pairs]
  made_tfds.write_splits(
    folder,
    {"image": image, "label": label},
    {split: as_dicts(pairs) for split, pairs in ({"train": examples} | splits).items()},
    name=name,
  )
  return name


def labelled(labels):
  """Makes examples whose image determines their label."""
  return [(np.full((1, 1, 1), 100 + i, np.uint8), label) for i, label in enumerate(labels)]


def read(images):
  """Returns pixels and labels in the order in which they were written: by brightness."""
  pixels, labels = images.read(np.arange(len(images)))
  order = np.argsort(pixels.mean(axis=(1, 2, 3)))
  return pixels[order], labels[order].tolist()


@pytest.fixture(params=sorted(LOADERS))
def loader(request):
  return LOADERS[request.param]


def scaled(dtype, white):
  return tensor(dtype), [(image * white).astype(dtype) for image in RAMP]


def test_arrays_of_floats_of_16_bits_and_of_bools_keep_their_brightness(tmp_path, loader):
  for feature, images in (
    scaled("float32", 1),
    scaled("float16", 1),
    scaled("uint16", 65535),
    scaled("int64", 255.01),
  ):
    name = made(tmp_path, feature, LABELS, [(image, 0) for image in images])
    pixels, _ = read(loader(name, "train", tmp_path))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - 255 * RAMP).max() <= 1
  name = made(tmp_path, tensor("bool"), LABELS, [(image > 0.4, 0) for image in RAMP])
  pixels, _ = read(loader(name, "train", tmp_path))
  np.testing.assert_array_equal(pixels, 255 * (RAMP > 0.4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_files_of_16_bits_keep_their_brightness_whatever_the_feature_says(tmp_path, loader, dtype):
  deep = np.round(RAMP[..., 0] * 65535).astype(np.uint16)
  feature = TYPES.Image(shape=(4, 4, 1), dtype=np.dtype(dtype))
  name = made(tmp_path, feature, LABELS, [(encoded(image), 0) for image in deep])
  pixels, _ = read(loader(name, "train", tmp_path))
  assert np.abs(pixels - 255 * RAMP[..., :1]).max() <= 1


def test_floats_in_a_file_are_read_from_its_four_channels():
  values = RAMP[0, ..., :1].astype(np.float32)
  picture = features.Picture(TYPES.Image(shape=(4, 4, 1), dtype=np.float32), "image")
  decoded = picture.decode(encoded(values.view(np.uint8)).getvalue())
  np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize(
  ("dtype", "white", "message"),
  [
    (
      "float32",
      255,
      "feature 'image' of {} of float32 must be in [0, 1], from black to white; got values from 0 "
      "to 255",
    ),
    (
      "int16",
      32767,
      "feature 'image' of {} of int16 must be in [0, 255], from black to white; got values from 0 "
      "to 32767",
    ),
    (
      "uint16",
      4095,
      "feature 'image' of {} of uint16 must reach the upper half of its scale, in which 65535 is "
      "white; got values from 0 to 4095 in 4 images, which would be too dark.",
    ),
    (
      "uint8",
      16,
      "feature 'image' of {} of uint8 must reach more than a sixteenth of its scale, in which 255 "
      "is white; got values from 0 to 16 in 4 images, which would be too dark.",
    ),
    (
      "float32",
      1 / 255,
      "feature 'image' of {} of float32 must reach more than a sixteenth of its scale, in which 1 "
      "is white; got values from 0 to 0.00392157 in 4 images, which would be too dark.",
    ),
    (
      "int64",
      1,
      "feature 'image' of {} of int64 must reach the upper half of its scale, in which 255 is "
      "white; got values from 0 to 1 in 4 images, which would be too dark.",
    ),
  ],
)
def test_images_of_another_scale_are_refused_before_training(
  tmp_path, loader, dtype, white, message
):
  feature, images = scaled(dtype, white)
  name = made(tmp_path, feature, LABELS, [(image, 0) for image in images])
  with refused(message.format(name)) as caught:
    loader(name, "train", tmp_path)
  assert len(str(caught.value).splitlines()) == 1


def test_files_of_pictures_whose_white_is_1_are_refused(tmp_path, loader):
  masks = [encoded((image[..., 0] > 0.4).astype(np.uint8)) for image in RAMP]
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 1)), LABELS, [(mask, 0) for mask in masks])
  with refused(
    "of uint8 must reach more than a sixteenth of its scale, in which 255 is white; got values "
    "from 0 to 1"
  ):
    loader(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("dtype", "white"), [("uint8", 17), ("uint16", 32896), ("uint8", 0), ("uint16", 0)]
)
def test_dark_images_of_the_scale_and_black_ones_are_taken(dtype, white):
  feature, images = scaled(dtype, white)
  features.Picture(feature, "image").check_scale(images)


def test_one_image_outside_the_scale_is_named(tmp_path):
  images = np.zeros((40, 1, 1, 1), np.float32)
  images[2] = 1.5  # not among those that the scale is checked on
  name = made(tmp_path, tensor("float32", (1, 1, 1)), LABELS, [(image, 0) for image in images])
  with pytest.raises(
    ValueError, match=r"example \d+ of split 'train' of .*: feature 'image' of .* must be in \[0, 1"
  ):
    tfds_sets.load(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("feature", "said"),
  [
    (tensor("uint8", (4, 4)), "Tensor of uint8, shape (4, 4)"),
    (tensor("uint8", (2, 4, 4, 3)), "Tensor of uint8, shape (2, 4, 4, 3)"),
    (TYPES.Text(), "Text"),
    (TYPES.Sequence(TYPES.Image(shape=(4, 4, 3))), "Sequence of Image of uint8, shape (4, 4, 3)"),
    (
      TYPES.FeaturesDict({"left": TYPES.Image(), "right": TYPES.Image()}),
      "FeaturesDict of left, right",
    ),
  ],
)
def test_what_is_no_picture_is_refused_by_its_type(feature, said):
  with refused(
    "feature 'image' of a_set must be an Image of 1, 3 or 4 channels, or a Tensor of numbers with "
    f"shape (H, W, channels); it is {said}. data.image_feature chooses another"
  ):
    features.Picture(feature, "feature 'image' of a_set")


def test_a_picture_of_another_size_than_its_feature_is_named(tmp_path, loader):
  image = encoded(np.zeros((4, 5, 3), np.uint8))
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 3)), LABELS, [(image, 0)])
  with pytest.raises(ValueError, match=r"must have shape \(4, 4, 3\); got \(4, 5, 3\)"):
    loader(name, "train", tmp_path).read(np.arange(1))


def test_a_damaged_picture_is_named_with_its_example(tmp_path, loader):
  image = encoded(np.zeros((4, 4, 3), np.uint8))
  image.truncate(40)
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 3)), LABELS, [(image, 0)])
  with pytest.raises(
    DatasetNotPreparedError, match="example 0 of split 'train' of .* cannot be read"
  ) as caught:
    loader(name, "train", tmp_path).read(np.arange(1))
  assert len(str(caught.value).splitlines()) == 1


def test_a_picture_of_too_many_pixels_is_named_with_what_to_do(tmp_path):
  image = encoded(Image.new("1", (8193, 8193)))
  name = made(tmp_path, TYPES.Image(shape=(None, None, 1)), LABELS, [(image, 0)])
  with refused(
    f"example 0 of split 'train' of {name} in {tmp_path}: a picture must have at most 67108864 "
    "pixels; got 8193 x 8193. Prepare the data set with a smaller image, or "
    "use a split without it"
  ):
    tfds_sets.load(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("feature", "labels", "classes", "names"),
  [
    (TYPES.ClassLabel(names=["a", "b", "c"]), [2, 0, 1], [2, 0, 1], ("a", "b", "c")),
    (TYPES.Scalar(dtype=np.int64), [2, 0, 1], [2, 0, 1], ("0", "1", "2")),
    (TYPES.Tensor(shape=(), dtype=np.uint8), [2, 0, 1], [2, 0, 1], ("0", "1", "2")),
    (TYPES.Scalar(dtype=np.bool_), [True, False], [1, 0], ("0", "1")),
    (TYPES.Text(), ["dog", "cat", "dog", "\u00e9"], [1, 0, 1, 2], ("cat", "dog", "\u00e9")),
    (TYPES.Scalar(dtype=np.object_), [b"\xff", b"a"], [1, 0], ("a", "\\xff")),
  ],
  ids=["ClassLabel", "Scalar", "Tensor", "bool", "Text", "bytes"],
)
def test_whole_numbers_and_texts_are_classes(tmp_path, loader, feature, labels, classes, names):
  images = loader(made(tmp_path, PIXEL, feature, labelled(labels)), "train", tmp_path)
  assert read(images)[1] == classes
  assert images.class_names == names


def test_all_splits_agree_on_the_classes(tmp_path, loader):
  name = made(tmp_path, PIXEL, TYPES.Text(), labelled(["b", "c"]), test=labelled(["a", "c"]))
  train, test = (loader(name, split, tmp_path) for split in ("train", "test"))
  assert train.class_names == test.class_names == ("a", "b", "c")
  assert (read(train)[1], read(test)[1]) == ([1, 2], [0, 2])


def test_labels_are_counted_once_for_all_splits(tmp_path, monkeypatch):
  name = made(tmp_path, PIXEL, TYPES.Text(), labelled(["b", "c"]), test=labelled(["a", "c"]))
  counted = []
  monkeypatch.setattr(
    tfds_sets.Examples,
    "_labels",
    lambda self, split, _: counted.append(split) or [b"a", b"b", b"c"],
  )
  for split in ("train", "test", "train"):
    tfds_sets.load(name, split, tmp_path)
  assert sorted(counted) == ["test", "train"]


def test_classes_that_are_counted_and_gaps_between_them_are_said(tmp_path, caplog):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled([0, 2, 5]))
  images = tfds_sets.load(name, "train", tmp_path)
  assert (read(images)[1], len(images.class_names)) == ([0, 2, 5], 6)
  said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
  assert f"feature 'label' of {name}: no image has class 1, 3, 4, of 6" in said
  assert (
    f"feature 'label' of {name} is Scalar of int64, read as 6 classes: 0, 1, 2, 3, 4, 5" in said
  )


@pytest.mark.parametrize(
  ("feature", "labels", "got", "said"),
  [
    (TYPES.Scalar(dtype=np.int64), [-1, 1], "got -1", "a negative number or none"),
    (TYPES.Text(), ["", "cat"], "got b''", "an empty text or none"),
    (
      TYPES.Scalar(dtype=np.int64, optional=True),
      [None, 1],
      "got None",
      "a negative number or none",
    ),
  ],
)
def test_images_without_a_class_are_refused_and_said(
  tmp_path, loader, caplog, feature, labels, got, said
):
  name = made(tmp_path, PIXEL, feature, labelled(labels), test=labelled(labels[1:]))
  with pytest.raises(ValueError, match="so the image has no class. Use another split") as caught:
    loader(name, "train", tmp_path).read(np.arange(2))
  assert got in str(caught.value)
  assert f"1 images of split 'train' have no class ({said})" in caplog.text
  assert len(loader(name, "test", tmp_path)) == 1


@pytest.mark.parametrize("labels", [[0, 10**9], [2000, 2001]])
def test_numbers_that_count_no_classes_are_refused(tmp_path, loader, labels):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled(labels))
  with refused(
    "must number classes from 0 with at most 1000 gaps, or be a ClassLabel or a text; it is "
    f"Scalar of int64, 2 numbers from {labels[0]} to {labels[1]}. data.label_feature chooses "
    "another"
  ):
    loader(name, "train", tmp_path)


def test_a_set_without_any_label_is_refused(tmp_path, loader):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled([-1, -1]))
  with refused("must hold a class per image; it is Scalar of int64, and all are negative or none"):
    loader(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("feature", "said"),
  [
    (TYPES.Scalar(dtype=np.float32), "Scalar of float32"),
    (tensor("float32", (3,)), "Tensor of float32, shape (3,)"),
    (tensor("int64", (1,)), "Tensor of int64, shape (1,)"),
    (TYPES.Sequence(TYPES.ClassLabel(names=["a", "b"])), "Sequence of ClassLabel of int64"),
    (TYPES.Sequence({"a": TYPES.Text()}), "Sequence of FeaturesDict of a"),
    (TYPES.FeaturesDict({"a": TYPES.Text()}), "FeaturesDict of a"),
    (TYPES.Image(), "Image of uint8, shape (None, None, 3)"),
    (TYPES.BBoxFeature(), "BBoxFeature of float32, shape (4,)"),
  ],
)
def test_what_is_no_single_class_is_refused_by_its_type(feature, said):
  with refused(
    "feature 'label' of a_set must hold one class per image, as a ClassLabel, a whole number or a "
    f"text; it is {said}. data.label_feature chooses another"
  ):
    features.ImageClass(feature, "feature 'label' of a_set")


def test_other_features_are_chosen_by_name(tmp_path, loader):
  of = {"picture": PIXEL, "kind": TYPES.Text(), "other": TYPES.Text()}
  examples = [
    {"picture": image, "kind": kind, "other": "x"} for image, kind in labelled(["cat", "dog"])
  ]
  name = f"features_set{next(SETS)}"
  made_tfds.write_splits(tmp_path, of, {"train": examples}, name=name)
  images = loader(name, "train", tmp_path, image="picture", label="kind")
  assert (read(images)[1], images.class_names) == ([0, 1], ("cat", "dog"))
  assert tfds_sets.size(name, "train", tmp_path, image="picture", label="kind") == 2
  with pytest.raises(
    ValueError,
    match=rf"a data set with image and label; {name} has no \['image', 'label'\]. "
    "data.image_feature and data.label_feature choose from kind, other, picture",
  ):
    loader(name, "train", tmp_path)


def test_classes_of_pixels_stay_as_they_are():
  numbers = np.array([[[7], [33]], [[0], [255]]], np.int64)
  array = features.PixelClasses(tensor("int64", (2, 2, 1)), "classes")
  np.testing.assert_array_equal(array.convert(array.decode(numbers)), numbers)
  file = features.PixelClasses(TYPES.Image(shape=(2, 2, 1)), "classes")
  read = file.convert(file.decode(encoded(numbers[..., 0].astype(np.uint8)).getvalue()))
  assert read.dtype == np.uint8
  np.testing.assert_array_equal(read, numbers)


def test_classes_of_pixels_that_are_none_are_refused():
  array = features.PixelClasses(tensor("int64", (2, 2, 1)), "classes")
  with pytest.raises(
    ValueError, match=r"classes must hold classes in 0 .. 255; got values from -1 to 3"
  ):
    array.convert(np.array([[[-1]], [[3]]]))
  file = features.PixelClasses(TYPES.Image(shape=(2, 2, 1)), "classes")
  with pytest.raises(ValueError, match=r"classes must have one channel; got shape \(2, 2, 3\)"):
    file.convert(file.decode(encoded(np.zeros((2, 2, 3), np.uint8)).getvalue()))
  with pytest.raises(
    ValueError, match=r"with shape \(H, W, 1\); it is Image of uint8, shape \(None, None, 3\)"
  ):
    features.PixelClasses(TYPES.Image(), "classes")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "features.json is nested more deeply than TFDS writes it"),
    ("3", "cannot be opened: TypeError: argument of type 'int'"),
  ],
)
def test_a_damaged_description_of_a_set_is_named_on_one_line(tmp_path, text, message):
  name = made(tmp_path, PIXEL, LABELS, labelled([0, 1]))
  (file,) = tmp_path.rglob("features.json")
  copy = tmp_path / name / "1.0.0"
  copy.rename(tmp_path / "moved")
  (tmp_path / f"{name}_copy").mkdir()
  (tmp_path / "moved").rename(tmp_path / f"{name}_copy" / "1.0.0")  # TFDS knows only its files
  (tmp_path / f"{name}_copy" / "1.0.0" / file.name).write_text(text)
  with pytest.raises(DatasetNotPreparedError, match=message) as caught:
    tfds_sets.load(f"{name}_copy", "train", tmp_path)
  assert len(str(caught.value).splitlines()) == 1
