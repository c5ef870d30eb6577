"""Labelled images as arrays: scikit-learn's handwritten digits, or any TFDS image-classification set.

Axes: M images in a split, H and W pixels, D channels. Pixels are uint8 until the training step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

DIGITS = "digits"
_DIGITS_TEST_SHARE = 0.2
_NAME = re.compile(r"\w+(/[\w+-][\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)  # name/config:version


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


def load(name: str, split: str, data_dir: str | None = None, image_size: int = 0) -> Images:
  """Reads a whole split into memory.

  Args:
    name: `digits` (1,797 images of 8 x 8, needs no files) or a TFDS name such as `cifar10`.
    split: `train` or `test` for digits, a fixed, class-balanced fifth being the latter; for TFDS any split expression.
    data_dir: the TFDS folder; None for TFDS's default, `~/tensorflow_datasets`.
    image_size: images are resized to so many pixels each way; 0 leaves them.
  Raises:
    DatasetNotPreparedError: the set is not in `data_dir`; the message holds the command that prepares it.
    ValueError: an unknown split, a set without `image` and `label`, or images of different sizes.
  """
  fit = lambda image: resize(image, (image_size, image_size)) if image_size else image
  if name == DIGITS:
    digits = _digits(split)
    return dataclasses.replace(digits, pixels=np.stack(list(map(fit, digits.pixels)))) if image_size else digits
  source = open_tfds(name, split, data_dir)
  first = fit(source[0]["image"])
  pixels = np.empty((len(source), *first.shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for i in tqdm(range(len(source)), desc=f"reading {name} {split}", unit="image", disable=None, leave=False):
    example = source[i]
    image = fit(example["image"])
    if image.shape != first.shape:
      raise ValueError(f"{name} has images of different sizes ({first.shape} and {image.shape}); set data.image_size")
    pixels[i], labels[i] = image, example["label"]
  if labels.min() < 0 or labels.max() >= len(class_names(source)):
    raise ValueError(f"data split {split!r} of {name} has images without a label; use another, such as 'validation'")
  return Images(pixels, labels, class_names(source))


def resize(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
  """`[H, W, D]` uint8, D 1, 3 or 4, or its part `(left, top, right, bottom)`, to height and width `size`: bilinear,
  antialiased."""
  grey = image.shape[-1] == 1
  picture = Image.fromarray(image[..., 0] if grey else image)
  resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box))
  return resized[..., None] if grey else resized


def size(name: str, split: str, data_dir: str | None = None) -> int:
  """Number of images of a split, without reading them; errors are as in `load`."""
  return len(_digits(split) if name == DIGITS else open_tfds(name, split, data_dir))


def open_tfds(
    name: str, split: str, data_dir: str | None = None, features: Sequence[str] = ("image", "label")
) -> Sequence[dict]:
  """A random-access TFDS source of examples with these features; nothing is downloaded, TensorFlow is not used.

  Errors are as in `load`. For a set that TFDS cannot download by itself, the message has TFDS's own instructions.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(f"data.name must be 'digits' or the name of a TFDS data set, such as cifar10, name/config or "
                     f"name/config:1.0.0; got {name!r}. The folder that it is in is data.data_dir")
  import tensorflow_datasets as tfds  # slow to import, and not needed for digits

  folder = os.path.expanduser(data_dir or os.path.join("~", "tensorflow_datasets"))
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
    program = (f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, data_dir={json.dumps(folder)}, "
               'file_format="array_record").download_and_prepare()')
    raise DatasetNotPreparedError(
        f"data set {name!r} is not prepared in {folder} (as array_record). To download and prepare it:\n"
        f"  python -c {shlex.quote(program)}\n"
        f"{_by_hand(name, folder)}"
        "or name the folder it is in: --config.data.data_dir=FOLDER"
    ) from error
  missing = set(features) - set(source.dataset_info.features)
  if missing:
    raise ValueError(f"data.name must be a set of {' and '.join(features)}; {name} has no {sorted(missing)}")
  if not len(source):
    raise ValueError(f"data split {split!r} of {name} must hold at least one image; it is empty")
  return _Examples(source, f"split {split!r} of {name} in {folder}")


class _Examples(Sequence):
  """A TFDS source that says which example of what it cannot read."""

  def __init__(self, source: Sequence[dict], name: str):
    self._source, self._name, self.dataset_info = source, name, source.dataset_info

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      return self._source[index]
    except IndexError:
      raise
    except Exception as error:  # whatever array_record and the decoders raise for damaged bytes
      raise DatasetNotPreparedError(f"example {index} of {self._name} cannot be read ({error}): remove the set from "
                                    "there and prepare it again") from error


def _check_features(folder: Path) -> None:
  """Refuses sets whose features are of other packages, whose modules TFDS would import and so run; and those whose
  default config would be read elsewhere."""
  for file in _files(folder, ("features.json", "metadata.json")):
    try:
      content = json.loads(file.read_text())
    except ValueError:  # which TFDS says in its own words
      continue
    if file.name == "metadata.json":
      if isinstance(content, dict) and "/" in str(content.get("default_config_name")):
        raise DatasetNotPreparedError(f"default_config_name in {file} must be the name of a folder beside it; got "
                                      f"{content['default_config_name']!r}")
      continue
    if other := sorted(name for name in _class_names(content) if not name.startswith("tensorflow_datasets.")):
      raise DatasetNotPreparedError(
          f"{file} must name features of tensorflow_datasets alone, as reading them runs their modules; got "
          f"{', '.join(map(repr, other))}")


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
    yield from (tree[key] for key in ("pythonClassName", "python_class_name", "type")
                if isinstance(tree.get(key), str) and "." in tree[key])
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


def class_names(source) -> tuple[str, ...]:
  """The class names of a TFDS source."""
  return tuple(source.dataset_info.features["label"].names)


def _digits(split: str) -> Images:
  from sklearn import datasets, model_selection

  if split not in ("train", "test"):
    raise ValueError(f"data split of digits must be 'train' or 'test'; got {split!r}")
  digits = datasets.load_digits()
  train, test = model_selection.train_test_split(
      np.arange(len(digits.target)), test_size=_DIGITS_TEST_SHARE, random_state=0, stratify=digits.target)
  index = train if split == "train" else test
  pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)[..., None]
  return Images(pixels, digits.target[index].astype(np.int32), tuple(str(name) for name in digits.target_names))
