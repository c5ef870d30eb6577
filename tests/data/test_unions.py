"""Sets of several sets: their names, classes and colours, and how they come into batches."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gating_jax.data import folders, image_sets, scenes, streaming, unions
from gating_jax.data.image_sets import (
  EqualShares,
  Images,
  SetSource,
  batch_indices,
  process_indices,
)
from tests.helpers import made_tfds

MADE = "union(digits,turned_digits)"
SHARES = EqualShares(sizes=(3, 10), per_set=10)


def test_a_union_of_made_sets_has_the_classes_of_each_in_three_colours():
  made = image_sets.load(SetSource(MADE, "test"))
  digits = image_sets.load(SetSource("digits", "test"))
  assert made.class_names[:2] == ("digits/0", "digits/1")
  assert made.class_names[10:12] == ("turned_digits/0", "turned_digits/1")
  count = len(digits)
  np.testing.assert_array_equal(made.labels, np.concatenate([digits.labels, digits.labels + 10]))
  np.testing.assert_array_equal(made.pixels[:count], np.repeat(digits.pixels, 3, axis=-1))
  # Turned left: the first row is the last column.
  np.testing.assert_array_equal(made.pixels[count:, 0, :, 0], 255 - digits.pixels[:, :, -1, 0])
  sources = unions.class_sources(MADE, made.class_names)
  np.testing.assert_array_equal(sources, np.repeat([0, 1], 10))


def test_the_number_of_a_set_is_a_fourth_channel_that_resizing_keeps():
  told = image_sets.load(SetSource("union_told(digits,turned_digits)", "test"), image_size=11)
  assert told.shape == (11, 11, 4)
  same = np.broadcast_to((told.labels >= 10)[:, None, None], told.pixels.shape[:3])
  np.testing.assert_array_equal(told.pixels[..., 3], same)


def test_scenes_of_digits_have_the_highest_of_these_for_a_class():
  shown = unions.open_union(SetSource("union(digit_scenes)", "test"))
  assert shown.shape == (24, 24, 3)
  made = scenes.make_scenes("test", scenes=1000, size=(24, 24), most=3)
  for i in range(0, 1000, 300):
    assert shown[i]["label"] == made.labels[i].max() - 1
    np.testing.assert_array_equal(shown[i]["image"][..., 2:], made.pixels[i])


def test_sets_take_turns_and_are_read_to_their_ends_whatever_their_sizes():
  steps = [batch_indices(0, step, 5, SHARES) for step in range(12)]
  drawn = np.concatenate(steps)
  np.testing.assert_array_equal(drawn >= 3, np.arange(60) % 2 == 1)
  small, large = drawn[::2], drawn[1::2] - 3
  # Fresh permutations, one after the other, over the ends of epochs and batches.
  for draws, size in ((small, 3), (large, 10)):
    for part in draws.reshape(-1, size):
      assert sorted(part) == list(range(size))
    assert not all((part == draws[:size]).all() for part in draws.reshape(-1, size))
  # Any step alone, as after a restart.
  np.testing.assert_array_equal(batch_indices(0, 7, 5, SHARES), steps[7])
  assert (np.concatenate([batch_indices(1, step, 5, SHARES) for step in range(12)]) != drawn).any()


def test_processes_share_the_batches_of_a_union():
  whole = process_indices(0, 2, 3, 6, SHARES)
  parts = [process_indices(0, 2, 3, 6, SHARES, process=(i, 2)) for i in range(2)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  with pytest.raises(ValueError, match=r"batch_size must be in \[1, 20\], .*; got 21"):
    batch_indices(0, 0, 21, SHARES)


def test_an_epoch_of_a_union_has_as_many_images_of_each_set():
  images = Images(np.zeros((13, 2, 2, 3), np.uint8), np.zeros(13, np.int32), ("a",), SHARES)
  assert (len(images), images.in_epoch, dataclasses.replace(images, shares=None).in_epoch) == (
    13,
    20,
    13,
  )
  assert unions.shares_of((3, 10)) == SHARES
  assert unions.shares_of((3, 10), 4).per_epoch == 8


@pytest.fixture
def files(tmp_path):
  """A grey TFDS set of 6 x 6 pixels, and a folder of coloured pictures of another shape."""
  folders._list_images.cache_clear()
  pixels, labels = made_tfds.images(5, (6, 6, 1))
  examples = list(zip(pixels[..., 0], labels, strict=True))
  made_tfds.write(tmp_path / "tfds", examples, examples[:2], shape=(6, 6, 1))
  for split, count in (("train", 3), ("test", 2)):
    for i in range(count):
      place = tmp_path / "flowers" / split / "rose"
      place.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8, 5), (200, 10 * i, 0)).save(place / f"{i}.png")
  yield tmp_path
  folders._list_images.cache_clear()


def test_sets_of_tfds_and_folders_are_brought_to_one_size(files):
  name = f"union(made_set,folder:{files / 'flowers'},digits)"
  assert unions.source_names(name) == ("made_set", "flowers", "digits")
  with pytest.raises(ValueError, match=r"has images of different sizes .*; set data\.image_size"):
    image_sets.load(SetSource(name, "test", str(files / "tfds")))
  images = image_sets.load(SetSource(name, "train;test;test", str(files / "tfds")), image_size=4)
  assert images.shape == (4, 4, 3)
  assert images.class_names[:4] == ("made_set/dark", "made_set/light", "flowers/rose", "digits/0")
  # TFDS has an order of its own.
  assert sorted(images.labels[:7]) == [0, 0, 0, 1, 1, 2, 2]
  assert (
    image_sets.count_images(SetSource(name, "train;test;test", str(files / "tfds"))) == 5 + 2 + 360
  )
  np.testing.assert_array_equal(images.pixels[6], np.full((4, 4, 3), (200, 10, 0)))
  stream = streaming.open_stream(
    SetSource(name, "train;test;test", str(files / "tfds")), image_size=4
  )
  assert stream.shape == (4, 4, 3)
  assert stream.read(np.array([5, 6]))[1].tolist() == [2, 2]
  # Both loaders keep the largest square in the middle.
  pixels, labels = stream.read(np.arange(len(images)))
  np.testing.assert_array_equal(pixels, images.pixels)
  np.testing.assert_array_equal(labels, images.labels)
  # Where images have files, by these; by their numbers otherwise.
  names = ("made_set/4", "flowers/test/rose/0.png", "flowers/test/rose/1.png", "digits/0")
  assert images.file_names[4:8] == stream.file_names[4:8] == names
  assert len(images.file_names) == len(images)


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("union()", "train", r"must be a union of sets, such as .*; got 'union\(\)'"),
    ("union(digits,union(worlds))", "train", "must be a union of sets"),
    ("union(union_told(digits,worlds),digits)", "train", "must be a union of sets"),
    ("union(digits,digits)", "train", "different names; got 'digits' and 'digits'"),
    (MADE, "train;test;train", "must be one, or one for each of its 2 sets, .*'train;test;train'"),
    (MADE, "all", "data split of digits must be 'train' or 'test'; got 'all'"),
    ("union(digit_scenes)", "all", "data split of digit_scenes must be"),
  ],
)
def test_a_wrong_union_is_named(name, split, message):
  with pytest.raises(ValueError, match=message):
    image_sets.load(SetSource(name, split))


class Opened(list):
  """One image of a set of two classes."""

  class_names = ("a", "b")

  def __init__(self, label, depth=1):
    self.shape = (2, 2, depth)
    super().__init__([{"image": np.zeros(self.shape, np.uint8), "label": label}])


def test_images_without_a_class_are_of_no_other_set():
  source = SetSource("union(x,y)", "train")
  union = unions.UnionExamples(source, [Opened(5), Opened(1)])
  assert [union[i]["label"] for i in range(2)] == [-1, 3]
  with pytest.raises(IndexError, match="one of 2 examples; got 2"):
    union[2]
  with pytest.raises(ValueError, match="sets of a union must have 1 or 3 channels; y has 4"):
    unions.UnionExamples(source, [Opened(0), Opened(0, depth=4)])


def test_the_path_of_a_folder_in_a_union_may_have_commas(tmp_path):
  for name in ("red, green,blue", "red"):
    file = tmp_path / name / "train" / "rose" / "a.png"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), (200, 0, 0)).save(file)
  name = f"union(digits,folder:{tmp_path}/red, green,blue, folder:{tmp_path}/red,worlds)"
  assert unions.source_names(name) == ("digits", "red, green,blue", "red", "worlds")
  folders._list_images.cache_clear()
  part = f"union(folder:{tmp_path}/red, green,blue)"
  assert unions.open_union(SetSource(part, "train")).class_names == ("red, green,blue/rose",)
  with pytest.raises(ValueError, match="has none for 'red,blue/rose'"):
    unions.class_sources("union(folder:/missing/red,blue)", ["red,blue/rose"])


def test_the_classes_of_a_folder_in_a_union_are_those_of_the_splits_in_use(files):
  place = files / "flowers" / "extra" / "lily"
  place.mkdir(parents=True)
  Image.new("RGB", (4, 4), (200, 0, 0)).save(place / "a.png")
  name, splits = f"union(digits,folder:{files / 'flowers'})", ("train", "test;test")
  union = unions.open_union(SetSource(name, "train", in_use=splits))
  assert union.class_names[10:] == ("flowers/rose",)
