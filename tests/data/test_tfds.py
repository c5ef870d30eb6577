import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gating_jax.data import tfds
from gating_jax.data.tfds import DatasetNotPreparedError, Images

DATA_DIR = os.environ.get("GATING_JAX_DATA_DIR")


def real_cifar10(test):
  missing = not DATA_DIR or not (Path(DATA_DIR) / "cifar10").is_dir()
  reason = "GATING_JAX_DATA_DIR names no folder with a prepared cifar10"
  return pytest.mark.real_data(pytest.mark.skipif(missing, reason=reason)(test))


@pytest.fixture(scope="module")
def digits():
  return tfds.load("digits", "train"), tfds.load("digits", "test")


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
    images = tfds.load("digits", split)
    places.append(images.pixels[:, 0, 0, 0].astype(int) * 255 + images.pixels[:, 0, 1, 0])
    np.testing.assert_array_equal(images.labels, real.labels)
  assert sorted(np.concatenate(places)) == list(range(1797))


def test_digits_are_the_same_each_time(digits):
  np.testing.assert_array_equal(tfds.load("digits", "test").pixels, digits[1].pixels)


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
    tfds.load("digits", "validation")


def test_images_are_read_by_index():
  images = Images(
    np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5, dtype=np.int32) * 2, ("a",)
  )
  pixels, labels = images.read(np.array([3, 0, 3]))
  assert pixels.ravel().tolist() == [3, 0, 3]
  assert labels.tolist() == [6, 0, 6]
  assert list(images.map(lambda i: i + 1, [1, 2])) == [2, 3]


def test_the_size_of_a_split_is_known_without_reading_it():
  assert (tfds.size("digits", "train"), tfds.size("digits", "test")) == (1437, 360)


class MadeSource(list):
  """The part of a source of examples that `load` uses."""

  class_names = ("cat", "dog")


@pytest.mark.parametrize("bad", [-1, 2])
def test_a_split_without_labels_is_refused(monkeypatch, bad):
  image = np.full((2, 2, 1), 7, np.uint8)
  made = MadeSource({"image": image, "label": label} for label in (0, 1, 1))
  monkeypatch.setattr(tfds, "open_tfds", lambda *_: made)
  read = tfds.load("made", "train")
  assert read.labels.tolist() == [0, 1, 1]
  assert read.class_names == ("cat", "dog")
  made.append({"image": image, "label": bad})
  with pytest.raises(ValueError, match="data split 'train' of made has images without a label"):
    tfds.load("made", "train")


def test_a_known_set_that_is_not_prepared_is_named_with_what_to_do(tmp_path):
  with pytest.raises(DatasetNotPreparedError) as caught:
    tfds.load("cifar10", "train", str(tmp_path))
  message = str(caught.value)
  assert f"data set 'cifar10' is not prepared in {tmp_path}" in message
  assert (
    'python -c \'import tensorflow_datasets as tfds; tfds.builder("cifar10", '
    f'data_dir="{tmp_path}", file_format="array_record").download_and_prepare()\'\n'
  ) in message
  assert "--config.data.data_dir=FOLDER" in message
  assert list(tmp_path.iterdir()) == []


def test_an_unknown_set_is_named_with_the_nearest_known_one(tmp_path):
  with pytest.raises(DatasetNotPreparedError) as caught:
    tfds.load("cifar11", "train", str(tmp_path))
  message = str(caught.value)
  assert "data.name must be 'digits' or a TFDS data set; got 'cifar11'" in message
  assert str(tmp_path) in message
  assert "Did you mean: cifar11 -> cifar10" in message


@pytest.fixture(scope="module")
def cifar10():
  return {split: tfds.load("cifar10", split, DATA_DIR) for split in ("train", "test")}


@real_cifar10
@pytest.mark.parametrize(("split", "count"), [("train", 50_000), ("test", 10_000)])
def test_cifar10_has_its_sizes_and_balance(cifar10, split, count):
  images = cifar10[split]
  assert (images.pixels.shape, images.pixels.dtype) == ((count, 32, 32, 3), np.uint8)
  np.testing.assert_array_equal(np.bincount(images.labels), np.full(10, count // 10))
  assert images.class_names[:3] == ("airplane", "automobile", "bird")


@real_cifar10
def test_channel_means_of_cifar10_are_those_of_the_config(cifar10):
  config = importlib.import_module("configs.cifar10_resnet20").get_config().data
  mean = cifar10["train"].pixels.mean(axis=(0, 1, 2), dtype=np.float64) / 255
  np.testing.assert_allclose(mean, config.mean, atol=1e-4)


@real_cifar10
def test_a_part_of_a_split_is_read():
  part = tfds.load("cifar10", "train[:100]", DATA_DIR)
  assert part.pixels.shape == (100, 32, 32, 3)


@real_cifar10
def test_an_unknown_split_of_cifar10_is_named():
  with pytest.raises(ValueError, match="data split 'validation' of cifar10 cannot be read"):
    tfds.load("cifar10", "validation", DATA_DIR)
