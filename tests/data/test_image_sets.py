import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from gating_jax.data import image_sets, tfds
from gating_jax.data.image_sets import (
  Images,
  SetSource,
  batch_indices,
  padded_batches,
  process_indices,
)


@pytest.fixture(scope="module")
def digits():
  train, test = SetSource("digits", "train"), SetSource("digits", "test")
  return image_sets.load(train), image_sets.load(test)


def test_digits_have_their_sizes_and_types(digits):
  for images, count in zip(digits, (1437, 360), strict=True):
    assert len(images) == count
    assert images.shape == (8, 8, 1)
    assert (images.pixels.shape, images.pixels.dtype) == ((count, 8, 8, 1), np.uint8)
    assert (images.labels.shape, images.labels.dtype) == ((count,), np.int32)
    assert images.class_names == tuple("0123456789")


def test_digits_use_the_whole_range_of_uint8(digits):
  for images in digits:
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)
    assert set(np.unique(images.pixels)) == {round(i * 255 / 16) for i in range(17)}


def test_digits_are_class_balanced(digits):
  whole = np.bincount(load_digits().target)
  train, test = (np.bincount(images.labels, minlength=10) for images in digits)
  np.testing.assert_array_equal(train + test, whole)
  assert np.all(np.abs(test - 0.2 * whole) <= 1)


def test_digits_splits_share_no_image(digits, monkeypatch):
  numbered = load_digits()
  numbered.images = np.zeros_like(numbered.images)
  numbered.images[:, 0, 0], numbered.images[:, 0, 1] = np.divmod(np.arange(1797), 255) * np.array(
    16 / 255
  )
  monkeypatch.setattr("sklearn.datasets.load_digits", lambda: numbered)
  places = []
  for split, real in zip(("train", "test"), digits, strict=True):
    images = image_sets.load(SetSource("digits", split))
    places.append(images.pixels[:, 0, 0, 0].astype(int) * 255 + images.pixels[:, 0, 1, 0])
    np.testing.assert_array_equal(images.labels, real.labels)
  assert sorted(np.concatenate(places)) == list(range(1797))


def test_digits_are_the_same_each_time(digits):
  np.testing.assert_array_equal(
    image_sets.load(SetSource("digits", "test")).pixels, digits[1].pixels
  )


def test_labels_belong_to_their_images(digits):
  mean = np.stack([digits[0].pixels[digits[0].labels == i].mean(axis=0) for i in range(10)])
  nearest = np.sum((digits[1].pixels[:, None].astype(float) - mean) ** 2, axis=(2, 3, 4)).argmin(
    axis=1
  )
  assert np.mean(nearest == digits[1].labels) > 0.85


def test_an_unknown_split_of_digits_is_refused():
  with pytest.raises(
    ValueError, match="data split of digits must be 'train' or 'test'; got 'validation'"
  ):
    image_sets.load(SetSource("digits", "validation"))


def test_images_are_read_by_index():
  images = Images(
    np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5, dtype=np.int32) * 2, ("a",)
  )
  pixels, labels = images.read(np.array([3, 0, 3]))
  assert pixels.ravel().tolist() == [3, 0, 3]
  assert labels.tolist() == [6, 0, 6]
  assert list(images.map(lambda i: i + 1, [1, 2])) == [2, 3]


def test_the_size_of_a_split_is_known_without_reading_it():
  sizes = [image_sets.count_images(SetSource("digits", split)) for split in ("train", "test")]
  assert sizes == [1437, 360]


class MadeSource(list):
  """The part of a source of examples that `load` uses."""

  class_names = ("cat", "dog")


@pytest.mark.parametrize("bad", [-1, 2])
def test_a_split_without_labels_is_refused(monkeypatch, bad):
  image = np.full((2, 2, 1), 7, np.uint8)
  made = MadeSource({"image": image, "label": label} for label in (0, 1, 1))
  monkeypatch.setattr(tfds, "open_tfds", lambda *_, **__: made)
  read = image_sets.load(SetSource("made", "train"))
  assert read.labels.tolist() == [0, 1, 1]
  assert read.class_names == ("cat", "dog")
  made.append({"image": image, "label": bad})
  with pytest.raises(ValueError, match="data split 'train' of made has images without a label"):
    image_sets.load(SetSource("made", "train"))


SIZES = st.integers(1, 60)


def epoch_of(seed, epoch, batch_size, examples):
  per_epoch = examples // batch_size
  return [
    batch_indices(seed, epoch * per_epoch + i, batch_size, examples) for i in range(per_epoch)
  ]


@given(examples=SIZES, batch_size=SIZES, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_repeats_no_image(examples, batch_size, seed, epoch):
  batch_size = min(batch_size, examples)
  seen = np.concatenate(epoch_of(seed, epoch, batch_size, examples))
  assert seen.dtype == np.int32
  assert len(seen) == examples // batch_size * batch_size
  assert len(np.unique(seen)) == len(seen)
  assert seen.min() >= 0
  assert seen.max() < examples


def test_an_epoch_whose_size_the_batch_divides_is_a_permutation():
  assert sorted(np.concatenate(epoch_of(0, 0, 8, 48))) == list(range(48))


def test_epochs_and_seeds_are_ordered_differently():
  orders = {
    tuple(np.concatenate(epoch_of(seed, epoch, 8, 48))) for seed in range(3) for epoch in range(3)
  }
  assert len(orders) == 9
  assert tuple(range(48)) not in orders


def test_every_image_is_left_out_of_some_epoch_only():
  seen = [set(np.concatenate(epoch_of(0, epoch, 8, 45))) for epoch in range(40)]
  assert all(len(images) == 40 for images in seen)
  assert set.union(*seen) == set(range(45))


def test_a_step_depends_on_seed_and_step_alone():
  forward = [batch_indices(3, step, 7, 40) for step in range(20)]
  for step in (19, 0, 11, 5):
    np.testing.assert_array_equal(batch_indices(3, step, 7, 40), forward[step])


def test_a_batch_cannot_be_changed_by_who_receives_it():
  first = batch_indices(0, 0, 4, 8).copy()
  with pytest.raises(ValueError, match="read-only"):
    batch_indices(0, 0, 4, 8)[0] = -1
  np.testing.assert_array_equal(batch_indices(0, 0, 4, 8), first)


@pytest.mark.parametrize("start", [0, 4, 9])
def test_columns_of_a_call_are_successive_steps(start):
  together = process_indices(1, start, 3, 6, 20)
  assert together.shape == (6, 3)
  for i in range(3):
    np.testing.assert_array_equal(together[:, i], batch_indices(1, start + i, 6, 20))


def test_processes_split_each_batch_in_order():
  parts = [process_indices(1, 5, 2, 6, 20, process=(i, 3)) for i in range(3)]
  assert [part.shape for part in parts] == [(2, 2)] * 3
  np.testing.assert_array_equal(np.concatenate(parts), process_indices(1, 5, 2, 6, 20))


@pytest.mark.parametrize("batch_size", [0, -1, 41])
def test_a_batch_larger_than_the_set_or_empty_is_refused(batch_size):
  with pytest.raises(ValueError, match=rf"batch_size must be in \[1, 40\], .*; got {batch_size}"):
    batch_indices(0, 0, batch_size, 40)


def test_a_batch_as_large_as_the_set_is_taken():
  assert sorted(batch_indices(0, 2, 40, 40)) == list(range(40))


def numbered(count):
  """Makes images of one pixel, their number, with twice that as labels."""
  return Images(
    np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1),
    2 * np.arange(count, dtype=np.int32),
    ("a",),
  )


@given(count=st.integers(1, 200), batch_size=st.integers(1, 250))
def test_every_image_stands_in_one_batch(count, batch_size):
  seen = []
  for (pixels, labels), valid in padded_batches(numbered(count), batch_size):
    assert pixels.shape == (batch_size, 1, 1, 1)
    assert labels.shape == (batch_size,)
    assert 1 <= valid <= batch_size
    np.testing.assert_array_equal(labels, 2 * pixels.ravel().astype(np.int32))
    seen.extend(pixels[:valid].ravel())
  assert seen == list(range(count))


@pytest.mark.parametrize(
  ("count", "batch_size", "valid"),
  [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2]), (5, 1, [1] * 5), (0, 4, [])],
)
def test_the_last_batch_tells_how_much_of_it_is_valid(count, batch_size, valid):
  assert [v for _, v in padded_batches(numbered(count), batch_size)] == valid


def test_the_last_batch_is_filled_with_its_own_first_image():
  *_, ((pixels, labels), valid) = padded_batches(numbered(7), 4)
  assert valid == 3
  assert pixels.ravel().tolist() == [4, 5, 6, 4]
  assert labels.tolist() == [8, 10, 12, 8]


def test_images_that_do_not_fit_in_memory_are_refused_before_they_are_read(monkeypatch):
  example = {"image": np.full((2, 2, 1), 7, np.uint8), "label": 0}
  monkeypatch.setattr(tfds, "open_tfds", lambda *_, **__: MadeSource([example] * 3))
  monkeypatch.setattr(image_sets, "available_memory", lambda: 12)
  assert len(image_sets.load(SetSource("made", "train"))) == 3
  monkeypatch.setattr(image_sets, "available_memory", lambda: 11)
  with pytest.raises(ValueError, match="its 3 images of 2x2x1 are .* Set data.loader=streaming"):
    image_sets.load(SetSource("made", "train"))


def test_without_a_file_that_says_so_all_memory_is_available(monkeypatch):
  def read_text(path):
    raise FileNotFoundError(path)

  # Only Linux has it.
  monkeypatch.setattr(image_sets.Path, "read_text", read_text)
  monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.get)
  assert image_sets.available_memory() == 7 * 4096


def test_the_memory_that_is_available_is_at_most_all_of_it():
  assert (
    0 < image_sets.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
  )


@pytest.mark.parametrize(
  ("most", "stat", "free"),
  [
    ("6000\n", "anon 1\nactive_file 40\ninactive_file 2\n", 1042),
    ("6000", None, 1000),
    ("max\n", "", 9 * 1024),
    ("1", "", 0),
    (None, None, 9 * 1024),
  ],
)
def test_a_container_may_take_less_memory_than_its_host_has(monkeypatch, most, stat, free):
  texts = {
    "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    9 kB\n",
    "/sys/fs/cgroup/memory.max": most,
    "/sys/fs/cgroup/memory.current": "5000\n",
    "/sys/fs/cgroup/memory.stat": stat,
  }

  def read_text(path):
    if texts.get(str(path)) is None:
      raise FileNotFoundError(path)
    return texts[str(path)]

  monkeypatch.setattr(image_sets.Path, "read_text", read_text)
  assert image_sets.available_memory() == free
