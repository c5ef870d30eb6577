import importlib
import os
import types
from pathlib import Path

import numpy as np
import pytest

from gating_jax.data import image_sets, tfds
from gating_jax.data.image_sets import SetSource
from gating_jax.data.tfds import DatasetNotPreparedError

DATA_DIR = os.environ.get("GATING_JAX_DATA_DIR")


def real_cifar10(test):
  missing = not DATA_DIR or not (Path(DATA_DIR) / "cifar10").is_dir()
  reason = "GATING_JAX_DATA_DIR names no folder with a prepared cifar10"
  return pytest.mark.real_data(pytest.mark.skipif(missing, reason=reason)(test))


def test_a_half_prepared_set_has_no_warning_before_its_error(tmp_path, capfd):
  (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
  with pytest.raises(DatasetNotPreparedError):
    image_sets.load(SetSource("cifar10", "train", str(tmp_path)))
  assert "Variant folder" not in capfd.readouterr().err


def test_a_known_set_that_is_not_prepared_is_named_with_what_to_do(tmp_path):
  with pytest.raises(DatasetNotPreparedError) as caught:
    image_sets.load(SetSource("cifar10", "train", str(tmp_path)))
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
    image_sets.load(SetSource("cifar11", "train", str(tmp_path)))
  message = str(caught.value)
  assert "data.name must be 'digits' or a TFDS data set; got 'cifar11'" in message
  assert str(tmp_path) in message
  assert "Did you mean: cifar11 -> cifar10" in message


def test_an_empty_split_is_named(monkeypatch):
  class Empty(list):
    dataset_info = types.SimpleNamespace(features={"image": None})

  monkeypatch.setattr(tfds, "_open_source", lambda *_: Empty())
  readers = {"image": lambda feature, name: None}
  with pytest.raises(ValueError, match="split 'test' of made must hold at least one .* is empty"):
    tfds.open_tfds("made", "test", readers=readers)


def test_foreign_features_are_found_behind_files_that_are_damaged_or_name_none(tmp_path):
  (tmp_path / "1.0.0").mkdir()
  (tmp_path / "features.json").write_text("{")
  (tmp_path / "metadata.json").write_text('{"default_config_name": "plain"}')
  # Damaged files are TFDS's to report.
  tfds._check_features(tmp_path)
  (tmp_path / "1.0.0" / "features.json").write_text('{"pythonClassName": "evil.Feature"}')
  with pytest.raises(DatasetNotPreparedError, match="only features of .*; got 'evil.Feature'"):
    tfds._check_features(tmp_path)


@pytest.fixture(scope="module")
def cifar10():
  return {
    split: image_sets.load(SetSource("cifar10", split, DATA_DIR)) for split in ("train", "test")
  }


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
  part = image_sets.load(SetSource("cifar10", "train[:100]", DATA_DIR))
  assert part.pixels.shape == (100, 32, 32, 3)


@real_cifar10
def test_an_unknown_split_of_cifar10_is_named():
  with pytest.raises(ValueError, match="data split 'validation' of cifar10 cannot be read"):
    image_sets.load(SetSource("cifar10", "validation", DATA_DIR))
