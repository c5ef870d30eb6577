"""Labelled images as arrays: scikit-learn's handwritten digits, or any TFDS image-classification set.

Axes: M images in a split, H and W pixels, D channels. Pixels are uint8 until the training step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from gating_jax.data import features as tfds_features
from gating_jax.data import pictures
from gating_jax.paths import is_text, user_path
from gating_jax.terminal import progress_bar

DIGITS = "digits"
IMAGE, LABEL = "image", "label"  # features of TFDS's own sets
FEATURES = {IMAGE: tfds_features.Picture, LABEL: tfds_features.ImageClass}
Reader = Callable[[Any, str], Any]

_LEARNT: dict[tuple, tfds_features.ImageClass] = {}  # by set, as its splits are opened one by one
_DIGITS_TEST_SHARE = 0.2
_MOST_SAID = 300  # letters of another library's message
_NAME = re.compile(
  r"\w+(/[\w+-][\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII
)  # name/config:version


class DatasetNotPreparedError(Exception):
  """A data set is not where it was looked for, or is damaged there; the message says how to put it there."""


@dataclasses.dataclass(frozen=True)
class Images:
  """One split, whole, on the host.

  Attributes:
    pixels: `[M, H, W, D]` uint8.
    labels: `[M]` int32; or `[M, H, W]` uint8, a class for every pixel.
    class_names: one per class.
  """

  pixels: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def shape(self) -> tuple[int, int, int]:
    """`(H, W, D)` of an image."""
    return self.pixels.shape[1:]

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images at `index`: `(pixels [n, H, W, D], labels [n])`."""
    return self.pixels[index], self.labels[index]

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`fn` of each item, in order."""
    return map(fn, items)


def load(
  name: str,
  split: str,
  data_dir: str | None = None,
  image_size: int = 0,
  image: str = IMAGE,
  label: str = LABEL,
) -> Images:
  """Reads a whole split into memory. Pictures of other types become uint8 as `data/pictures.py` says.

  Args:
    name: `digits` (1,797 images of 8 x 8, needs no files) or a TFDS name such as `cifar10`.
    split: `train` or `test` for digits, a fixed, class-balanced fifth being the latter; for TFDS any split expression.
    data_dir: the TFDS folder; None for TFDS's default, `~/tensorflow_datasets`.
    image_size: images are resized to so many pixels each way; 0 leaves them.
    image, label: names of the features that hold them in a TFDS set.
  Raises:
    DatasetNotPreparedError: the set is not in `data_dir`; the message holds the command that prepares it.
    ValueError: an unknown split, a set without these features or with ones that hold no picture or no single class
      per image, pictures outside the scale of their type, or images of different sizes.
  """
  fit = lambda image: resize(image, (image_size, image_size)) if image_size else image
  if name == DIGITS:
    digits = _digits(split)
    return (
      dataclasses.replace(digits, pixels=np.stack(list(map(fit, digits.pixels))))
      if image_size
      else digits
    )
  source = open_tfds(
    name, split, data_dir, {image: tfds_features.Picture, label: tfds_features.ImageClass}
  )
  first = fit(source[0][image])
  pixels = np.empty((len(source), *first.shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for i in progress_bar(
    range(len(source)), desc=f"reading {name} {split}", unit="image", leave=False
  ):
    example = source[i]
    pixel = fit(example[image])
    if pixel.shape != first.shape:
      raise ValueError(
        f"{name} has images of different sizes ({first.shape} and {pixel.shape}); set data.image_size"
      )
    if not 0 <= example[label] < len(source.class_names):
      raise ValueError(
        f"data split {split!r} of {name} has images without a label; use another, such as 'validation'"
      )
    pixels[i], labels[i] = pixel, example[label]
  return Images(pixels, labels, source.class_names)


def resize(
  image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
  """`[H, W, D]` uint8, or its part `(left, top, right, bottom)`, to height and width `size`: bilinear, antialiased."""
  fit = lambda pixels: np.asarray(
    Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=box)
  )
  if image.shape[-1] == 3:
    return fit(image)
  # Of four channels, Pillow would take the last for transparency, and weight the others with it.
  return np.stack([fit(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)


def size(
  name: str, split: str, data_dir: str | None = None, image: str = IMAGE, label: str = LABEL
) -> int:
  """Number of images of a split, without reading them; arguments and errors are as in `load`."""
  features = {image: tfds_features.Picture, label: tfds_features.ImageClass}
  return len(_digits(split) if name == DIGITS else open_tfds(name, split, data_dir, features))


def open_tfds(
  name: str,
  split: str,
  data_dir: str | None = None,
  features: Mapping[str, Reader] = MappingProxyType(FEATURES),
) -> Examples:
  """Opens a random-access TFDS source; nothing is downloaded, TensorFlow is not used.

  Errors are as in `load`. For a set that TFDS cannot download by itself, the message has TFDS's own instructions.

  Args:
    name, split, data_dir: as in `load`.
    features: how to read each of them, by name: a class of `data/features.py`.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"data.name must be 'digits' or the name of a TFDS data set, such as cifar10, name/config or "
      f"name/config:1.0.0; got {name!r}. The folder that it is in is data.data_dir"
    )
  import tensorflow_datasets as tfds  # slow to import, and not needed for digits

  folder = str(user_path(data_dir or "~/tensorflow_datasets"))
  if not is_text(folder):
    raise ValueError(
      f"data.data_dir must be UTF-8 text, since array_record opens no other path; got {folder!r}"
    )
  _check_features(Path(folder, tfds.core.naming.camelcase_to_snakecase(re.split("[/:]", name)[0])))
  try:
    source = tfds.data_source(name, split=split, data_dir=folder, download=False)
  except tfds.core.DatasetNotFoundError as error:
    near = [line for line in str(error).splitlines() if "Did you mean" in line]
    raise DatasetNotPreparedError(
      f"data.name must be 'digits' or a TFDS data set; got {name!r}, which TFDS does not know and which is not in "
      f"{folder}. {' '.join(near)}".rstrip()
    ) from None
  except (NotImplementedError, AssertionError, FileNotFoundError, ValueError) as error:
    if isinstance(error, ValueError) and "split" in str(error).lower():
      raise ValueError(f"data split {split!r} of {name} cannot be read: {error}") from None
    program = (
      f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, data_dir={json.dumps(folder)}, "
      'file_format="array_record").download_and_prepare()'
    )
    raise DatasetNotPreparedError(
      f"data set {name!r} is not prepared in {folder} (as array_record). To download and prepare it:\n"
      f"  python -c {shlex.quote(program)}\n"
      f"{_by_hand(name, folder)}"
      "or name the folder it is in: --config.data.data_dir=FOLDER"
    ) from error
  except (
    Exception
  ) as error:  # whatever TFDS raises for damaged files, and for features that need TensorFlow
    raise DatasetNotPreparedError(
      f"data set {name!r} in {folder} cannot be opened: {_said(error)}"
    ) from error
  own = source.dataset_info.features
  missing = set(features) - set(own)
  if missing:
    chosen = tfds_features.ImageClass in features.values()
    choice = (
      f". data.image_feature and data.label_feature choose from {', '.join(sorted(own))}"
      if chosen
      else ""
    )
    raise ValueError(
      f"data.name must be a set of {' and '.join(features)}; {name} has no {sorted(missing)}{choice}"
    )
  readers = {
    feature: read(own[feature], f"feature {feature!r} of {name}")
    for feature, read in features.items()
  }
  if not len(source):
    raise ValueError(f"data split {split!r} of {name} must hold at least one image; it is empty")
  return Examples(source, f"{name} in {folder}", readers)


class Examples(Sequence):
  """A TFDS source of pictures as uint8 and labels as numbers, which names the example that it cannot read.

  Attributes:
    dataset_info: TFDS's own.
    class_names: one per class of an image. Where the set does not name them, the labels of all its splits are read.
  """

  def __init__(self, source: Any, name: str, readers: Mapping[str, Any]):
    self._source, self._name, self._readers, self.dataset_info = (
      source,
      name,
      dict(readers),
      source.dataset_info,
    )
    self._source.decoders = _without_decoding(readers)
    self.class_names: tuple[str, ...] = ()
    for feature, reader in readers.items():
      if isinstance(reader, tfds_features.Picture):
        reader.check_scale(self._some_decoded(feature, reader))
      if isinstance(reader, tfds_features.ImageClass):
        self.class_names = self._learn_classes(feature, reader)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not -len(self) <= index < len(self):
      raise IndexError(f"index must be of one of {len(self)} examples; got {index}")
    with self._reading(self._source.split, index):
      example = self._source[index]
      decoded = {
        feature: reader.decode(example[feature]) for feature, reader in self._readers.items()
      }
    try:
      return {
        feature: reader.convert(decoded[feature]) for feature, reader in self._readers.items()
      }
    except ValueError as error:
      raise ValueError(
        f"example {index} of split {self._source.split!r} of {self._name}: {error}"
      ) from None

  @property
  def shape(self) -> tuple[int | None, int | None, int]:
    """`(H, W, D)` of the pictures, None for a size that differs between them."""
    return next(r.shape for r in self._readers.values() if isinstance(r, tfds_features.Picture))

  @contextlib.contextmanager
  def _reading(self, split: str, index: int) -> Iterator[None]:
    try:
      yield
    except pictures.TooLargeError as error:
      raise ValueError(
        f"example {index} of split {split!r} of {self._name}: {error}. Prepare the set with a smaller "
        "one, or use a split without it"
      ) from None
    except Exception as error:  # whatever array_record and the decoders raise for damaged bytes
      raise DatasetNotPreparedError(
        f"example {index} of split {split!r} of {self._name} cannot be read ({_said(error)}): remove the set from "
        "there and prepare it again"
      ) from error

  def _some_decoded(self, feature: str, reader: tfds_features.Picture) -> Iterator[np.ndarray]:
    for index in np.unique(np.linspace(0, len(self) - 1, tfds_features.SAMPLE, dtype=int)):
      with self._reading(self._source.split, index):
        pixels = reader.decode(self._source[index][feature])
      yield pixels

  def _learn_classes(self, feature: str, reader: tfds_features.ImageClass) -> tuple[str, ...]:
    if reader.class_names is None:
      folder = str(self.dataset_info.data_dir)
      key = feature, folder, os.stat(folder).st_mtime_ns
      if key not in _LEARNT:
        reader.learn({split: self._labels(split, feature) for split in self.dataset_info.splits})
        _LEARNT[key] = reader
      self._readers[feature] = reader = _LEARNT[key]
    return reader.class_names

  def _labels(self, split: str, feature: str) -> Iterator[Any]:
    source = dataclasses.replace(self._source, split=split)
    for i in progress_bar(
      range(len(source)), desc=f"counting classes of {split}", unit="image", leave=False
    ):
      with self._reading(split, i):
        label = source[i][feature]
      yield label


def _said(error: Exception) -> str:
  """Returns an error's type and text on one line, not longer than a message can be."""
  return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MOST_SAID]


def _without_decoding(readers: Mapping[str, Any]) -> dict[str, Any]:
  """Decoders for TFDS that leave the files of pictures to their readers."""
  import tensorflow_datasets as tfds

  return {
    feature: tfds.decode.SkipDecoding() for feature, reader in readers.items() if reader.encoded
  }


def _check_features(folder: Path) -> None:
  """Refuses sets whose features are of other packages, whose modules TFDS would import and so run; and those whose
  default config would be read elsewhere."""
  for file in _files(folder, ("features.json", "metadata.json")):
    try:
      content = json.loads(file.read_text())
    except ValueError:  # which TFDS says in its own words
      continue
    except RecursionError:
      raise DatasetNotPreparedError(
        f"{file} must be nested less deeply, as TFDS writes it"
      ) from None
    if file.name == "metadata.json":
      if isinstance(content, dict) and "/" in str(content.get("default_config_name")):
        raise DatasetNotPreparedError(
          f"default_config_name in {file} must be the name of a folder beside it; got "
          f"{content['default_config_name']!r}"
        )
      continue
    if other := sorted(
      name for name in _class_names(content) if not name.startswith("tensorflow_datasets.")
    ):
      raise DatasetNotPreparedError(
        f"{file} must name features of tensorflow_datasets alone, as reading them runs their modules; got "
        f"{', '.join(map(repr, other))}"
      )


def _files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
  """Of these names below a folder, through links too, each of which is followed once."""
  seen = {folder.resolve()}
  for place, below, files in os.walk(folder, followlinks=True):
    yield from (Path(place, name) for name in names if name in files)
    resolved = {name: Path(place, name).resolve() for name in below}
    below[:] = [name for name in below if resolved[name] not in seen]
    seen.update(resolved.values())


def _class_names(tree: Any) -> Iterator[str]:
  """Of the classes in a features.json, old or new."""
  if isinstance(tree, dict):
    yield from (
      tree[key]
      for key in ("pythonClassName", "python_class_name", "type")
      if isinstance(tree.get(key), str) and "." in tree[key]
    )
  for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
    yield from _class_names(part)


def _by_hand(name: str, folder: str) -> str:
  """What TFDS says of files that must be there before, empty where it downloads them itself."""
  import tensorflow_datasets as tfds  # as above

  try:
    instructions = tfds.builder_cls(re.split("[/:]", name)[0]).MANUAL_DOWNLOAD_INSTRUCTIONS
  except tfds.core.DatasetNotFoundError:  # known by its folder alone
    instructions = None
  if not instructions:
    return ""
  lines = "\n".join(f"  {line.strip()}" for line in instructions.strip().splitlines())
  return f"TFDS does not download all of its files. Put them into {folder}/downloads/manual before:\n{lines}\n"


def _digits(split: str) -> Images:
  from sklearn import datasets, model_selection

  if split not in ("train", "test"):
    raise ValueError(f"data split of digits must be 'train' or 'test'; got {split!r}")
  digits = datasets.load_digits()
  train, test = model_selection.train_test_split(
    np.arange(len(digits.target)),
    test_size=_DIGITS_TEST_SHARE,
    random_state=0,
    stratify=digits.target,
  )
  index = train if split == "train" else test
  pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)[..., None]
  return Images(
    pixels, digits.target[index].astype(np.int32), tuple(str(name) for name in digits.target_names)
  )
