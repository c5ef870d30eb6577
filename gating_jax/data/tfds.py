"""Random access to the examples of prepared TFDS sets, without TensorFlow.

Reading a set downloads nothing, runs no code of others and does not leave the set's folder.

Axes: H and W pixels, D channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from gating_jax.checks import is_text, user_path
from gating_jax.data import features
from gating_jax.terminal import progress_bar

# Names of these features in TFDS's own sets.
IMAGE, LABEL = "image", "label"
# Makes the reader of a feature from it and its name: a class of `data/features.py`.
MakeReader = Callable[[Any, str], Any]

# By set: its splits are opened one by one, and counting the classes reads all labels.
_LEARNT: dict[tuple, features.ImageClass] = {}
# Largest number of characters quoted from another library's message.
_MOST_SAID = 300
# Keys of features.json that hold the name of a class, of the new format and the old.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# The beginning of the names of TFDS's own classes.
_TFDS = "tensorflow_datasets."
# name/config:version; anything else might be a path.
_NAME = re.compile(r"\w+(/[\w+-][\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)


class DatasetNotPreparedError(Exception):
  """Error for a data set that is missing or damaged; the message says how to prepare it."""


def class_readers(image: str = IMAGE, label: str = LABEL) -> dict[str, MakeReader]:
  """Returns the readers of images with one class each.

  Args:
    image, label: names of the features that hold them.
  """
  return {image: features.Picture, label: features.ImageClass}


def open_tfds(
  name: str,
  split: str,
  data_dir: str | None = None,
  readers: Mapping[str, MakeReader] | None = None,
) -> Examples:
  """Opens a random-access TFDS source.

  Errors are as in `image_sets.load`. For a set that TFDS cannot download, the message has TFDS's
  own instructions.

  Args:
    name, split, data_dir: as in `image_sets.SetSource`.
    readers: the features to read, by name; None for `class_readers()`.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"data.name must be 'digits' or the name of a TFDS data set, such as cifar10, name/config or "
      f"name/config:1.0.0; got {name!r}. data.data_dir is the folder that holds it"
    )
  folder = str(user_path(data_dir or "~/tensorflow_datasets"))
  if not is_text(folder):
    raise ValueError(
      f"data.data_dir must be UTF-8 text, since array_record cannot open others; got {folder!r}"
    )
  source = _open_source(name, split, folder)
  readers = class_readers() if readers is None else readers
  own = source.dataset_info.features
  missing = set(readers) - set(own)
  if missing:
    choice = ""
    # Only the features of a set of classes are chosen by the config.
    if features.ImageClass in readers.values():
      choice = f". data.image_feature and data.label_feature choose from {', '.join(sorted(own))}"
    raise ValueError(
      f"data.name must be a data set with {' and '.join(readers)}; {name} has no "
      f"{sorted(missing)}{choice}"
    )
  made = {}
  for feature, make in readers.items():
    made[feature] = make(own[feature], f"feature {feature!r} of {name}")
  if not len(source):
    raise ValueError(_empty(name, split))
  return Examples(source, f"{name} in {folder}", made)


def _open_source(name: str, split: str, folder: str) -> Any:
  """Opens a split with TFDS, whose errors become ours.

  Raises:
    DatasetNotPreparedError: the set is unknown, not prepared or damaged.
    ValueError: an unknown split.
  """
  # Imported here, since the import is slow and digits do not need it.
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import naming

  logging.get_absl_logger().addFilter(_is_not_about_folders)
  # Before TFDS opens the set, which would import what its files name.
  _check_features(Path(folder, naming.camelcase_to_snakecase(_plain(name))))
  try:
    return tfds.data_source(name, split=split, data_dir=folder, download=False)
  except tfds.core.DatasetNotFoundError as error:
    message = (
      f"data.name must be 'digits' or a TFDS data set; got {name!r}, which is unknown to TFDS "
      f"and not in {folder}."
    )
    # TFDS's message is long; one of its lines has the names that are near.
    for line in str(error).splitlines():
      if "Did you mean" in line:
        message += f" {line}"
    raise DatasetNotPreparedError(message) from None
  # TFDS raises these for a set that is not there, or is there in another file format.
  except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
    if isinstance(error, ValueError) and "split" in str(error).lower():
      raise ValueError(f"data split {split!r} of {name} cannot be read: {error}") from None
    # array_record's, of a split without files, such as train[:0].
    if "of 0 length" in str(error):
      raise ValueError(_empty(name, split)) from None
    raise DatasetNotPreparedError(
      f"data set {name!r} is not prepared in {folder} (as array_record). To download and prepare "
      f"it:\n{_how_to_prepare(name, folder)}"
    ) from error
  # TFDS raises errors of many types for damaged files, and for features that need TensorFlow.
  except Exception as error:
    raise DatasetNotPreparedError(
      f"data set {name!r} in {folder} cannot be opened: {_error_line(error)}"
    ) from error


def _empty(name: str, split: str) -> str:
  """Returns the error of a split without examples."""
  return f"data split {split!r} of {name} must hold at least one image; it is empty"


def _is_not_about_folders(record: Any) -> bool:
  """Returns whether a log record is not TFDS's warning of a set that is not prepared.

  The error that follows says so, and how to prepare it.
  """
  return not str(record.msg).startswith("Variant folder")


def _plain(name: str) -> str:
  """Returns the name of a set without its config and version."""
  return re.split("[/:]", name)[0]


def _how_to_prepare(name: str, folder: str) -> str:
  """Returns the command that prepares a set, and what to download by hand before."""
  program = (
    f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, "
    f"data_dir={json.dumps(folder)}, "
    'file_format="array_record").download_and_prepare()'
  )
  return (
    f"  python -c {shlex.quote(program)}\n"
    f"{_by_hand(name, folder)}"
    "or set the folder that holds it: --config.data.data_dir=FOLDER"
  )


def _by_hand(name: str, folder: str) -> str:
  """Returns TFDS's instructions on files to download by hand; empty where it downloads them all."""
  import tensorflow_datasets as tfds

  try:
    builder: Any = tfds.builder_cls(_plain(name))
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  # A set that is known only by its folder has no builder.
  except tfds.core.DatasetNotFoundError:
    instructions = None
  if not instructions:
    return ""
  text = f"TFDS cannot download all of its files. First put them into {folder}/downloads/manual:\n"
  for line in instructions.strip().splitlines():
    text += f"  {line.strip()}\n"
  return text


class Examples(Sequence):
  """TFDS source of pictures as uint8 and labels as numbers.

  Errors name the example that cannot be read.

  Attributes:
    dataset_info: TFDS's own.
    class_names: one per class of an image. Where the set does not name them, the labels of all its
      splits are read.
  """

  def __init__(self, source: Any, name: str, readers: Mapping[str, Any]):
    self._source, self._name, self._readers = source, name, dict(readers)
    self.dataset_info = source.dataset_info
    # The readers decode files: TFDS would need TensorFlow or convert pictures by another rule.
    self._source.decoders = _without_decoding(readers)
    self.class_names: tuple[str, ...] = ()
    for feature, reader in readers.items():
      if isinstance(reader, features.Picture):
        reader.check_scale(self._some_decoded(feature, reader))
      if isinstance(reader, features.ImageClass):
        self.class_names = self._learn_classes(feature, reader)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    # Only this IndexError may end a loop over the set; `_reading` converts those of decoders.
    if not -len(self) <= index < len(self):
      raise IndexError(f"index must be that of one of {len(self)} examples; got {index}")
    decoded, converted = {}, {}
    with self._reading(self._source.split, index):
      # Damaged bytes fail here, in reading or decoding; a value that breaks a rule fails below.
      example = self._source[index]
      for feature, reader in self._readers.items():
        decoded[feature] = reader.decode(example[feature])
    try:
      for feature, reader in self._readers.items():
        converted[feature] = reader.convert(decoded[feature])
      return converted
    except ValueError as error:
      raise ValueError(
        f"example {index} of split {self._source.split!r} of {self._name}: {error}"
      ) from None

  @property
  def shape(self) -> tuple[int | None, int | None, int]:
    """Returns `(H, W, D)` of the pictures; None for a size that differs between them."""
    return next(r.shape for r in self._readers.values() if isinstance(r, features.Picture))

  @contextlib.contextmanager
  def _reading(self, split: str, index: int) -> Iterator[None]:
    """Names the example in the errors of the block, which reads and decodes it."""
    try:
      yield
    except features.TooLargeError as error:
      raise ValueError(
        f"example {index} of split {split!r} of {self._name}: {error}. Prepare the data set "
        "with a smaller image, or use a split without it"
      ) from None
    # array_record and the decoders raise errors of many types for damaged bytes.
    except Exception as error:
      raise DatasetNotPreparedError(
        f"example {index} of split {split!r} of {self._name} cannot be read "
        f"({_error_line(error)}): delete the prepared data set and prepare it again"
      ) from error

  def _some_decoded(self, feature: str, reader: features.Picture) -> Iterator[np.ndarray]:
    """Yields pictures spread over the split, decoded but not converted."""
    for index in np.unique(np.linspace(0, len(self) - 1, features.SAMPLE, dtype=int)):
      with self._reading(self._source.split, index):
        pixels = reader.decode(self._source[index][feature])
      yield pixels

  def _learn_classes(self, feature: str, reader: features.ImageClass) -> tuple[str, ...]:
    """Returns the names of the classes; without names, those of the labels of all splits."""
    if reader.class_names is None:
      folder = str(self.dataset_info.data_dir)
      # With the time of its last change: a set that is prepared again may have other labels.
      key = feature, folder, os.stat(folder).st_mtime_ns
      if key not in _LEARNT:
        labels = {}
        for split in self.dataset_info.splits:
          labels[split] = self._labels(split, feature)
        reader.learn(labels)
        _LEARNT[key] = reader
      self._readers[feature] = reader = _LEARNT[key]
    assert reader.class_names is not None  # given or learnt
    return reader.class_names

  def _labels(self, split: str, feature: str) -> Iterator[Any]:
    """Yields the labels of a split as they are stored."""
    source = dataclasses.replace(self._source, split=split)
    for i in progress_bar(
      range(len(source)), desc=f"counting classes of {split}", unit="image", leave=False
    ):
      with self._reading(split, i):
        label = source[i][feature]
      yield label


def _error_line(error: Exception) -> str:
  """Returns an error's type and text on one line, cut to a readable length."""
  return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MOST_SAID]


def _without_decoding(readers: Mapping[str, Any]) -> dict[str, Any]:
  """Returns decoders for TFDS that leave the files of pictures to their readers."""
  import tensorflow_datasets as tfds

  skip = tfds.decode.SkipDecoding()
  return {feature: skip for feature, reader in readers.items() if reader.encoded}


# Checks of a set's files, before TFDS reads them.


def _check_features(folder: Path) -> None:
  """Refuses sets from which reading would run foreign code or leave the folder.

  TFDS imports, and so runs, the modules of the features that a set names: those of other packages
  are refused. So is a default config in another folder.
  """
  for file in _files(folder, ("features.json", "metadata.json")):
    try:
      content = json.loads(file.read_text())
    # TFDS reports a file that is not JSON in its own words.
    except ValueError:
      continue
    except RecursionError:
      raise DatasetNotPreparedError(f"{file} is nested more deeply than TFDS writes it") from None
    if file.name == "metadata.json":
      if isinstance(content, dict) and "/" in str(content.get("default_config_name")):
        raise DatasetNotPreparedError(
          f"default_config_name in {file} must be the name of a folder next to it; got "
          f"{content['default_config_name']!r}"
        )
      continue
    foreign = sorted(repr(name) for name in _class_names(content) if not name.startswith(_TFDS))
    if foreign:
      raise DatasetNotPreparedError(
        f"{file} must name only features of tensorflow_datasets, since reading a feature runs "
        f"its module; got {', '.join(foreign)}"
      )


def _files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
  """Yields the files of these names below a folder, and below links, each followed once."""
  seen = {folder.resolve()}
  for place, below, files in os.walk(folder, followlinks=True):
    for name in names:
      if name in files:
        yield Path(place, name)
    further = []
    for name in below:
      # Links may form circles.
      target = Path(place, name).resolve()
      if target not in seen:
        seen.add(target)
        further.append(name)
    # Assigned in place, which tells `os.walk` where to continue.
    below[:] = further


def _class_names(tree: Any) -> Iterator[str]:
  """Yields the names of the classes in a features.json, of the old format or the new."""
  parts = ()
  if isinstance(tree, list):
    parts = tree
  elif isinstance(tree, dict):
    parts = tree.values()
    for key in _CLASS_KEYS:
      name = tree.get(key)
      if isinstance(name, str) and "." in name:
        yield name
  for part in parts:
    yield from _class_names(part)
