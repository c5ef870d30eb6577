"""Unions: one set of the images of several sets, brought to one size and to three colours.

    union(mnist,cifar10)                          TFDS sets, in one `data_dir`
    union(mnist,folder:/data/flowers)             and images in folders of their classes
    union(digits,digit_scenes,turned_digits)      made sets, which need no files
    union_told(...)                               with the number of its set as a fourth channel

Classes stay apart: those of all sets lie one after the other, `mnist/0` to `mnist/9` and then
`cifar10/airplane` and so on, so that one head serves them all. Training draws from all sets alike
(`image_sets.EqualShares`); a test has every image of every set once.

One network for inputs of several kinds is where conditional computation should pay: what a filter
does for one kind is of little use to another.

The rule of pictures: the largest square in the middle, resized to `data.image_size` pixels
(bilinear, antialiased); grey becomes red, green and blue alike.

Axes: M images, S sets, H and W pixels, D channels.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gating_jax.checks import user_path
from gating_jax.data import folders, image_sets, scenes
from gating_jax.data.image_sets import EqualShares, Images, SetSource

# Names of unions, without and with the number of the set as the last channel.
NAME, TOLD = NAMES = ("union", "union_told")
COLOURS = 3
# Between the name of a set and that of its class.
_JOINT = "/"
# Between the splits of sets that differ in them.
_BETWEEN_SPLITS = ";"
_FOLDER = f"{folders.FOLDER}:"
_UNION = re.compile(r"(union|union_told)\((.*)\)", re.DOTALL)
# A union within another, cut at its commas, begins so.
_NESTED = tuple(f"{name}(" for name in NAMES)
# Scenes of a split, their sides in pixels, and the most digits of one.
_SCENES, _SCENE, _DIGITS = {"train": 5_000, "test": 1_000}, 24, 3


def is_union(name: str) -> bool:
  """Returns whether a data set is a union of others, by its name.

  >>> is_union("union(mnist,cifar10)"), is_union("mnist")
  (True, False)
  """
  return _UNION.fullmatch(name) is not None


def is_told(name: str) -> bool:
  """Returns whether images of a union have the number of their set as the last channel."""
  return name.startswith(f"{TOLD}(")


def parts_of(name: str) -> tuple[str, ...]:
  """Returns the sets of a union as its name lists them.

  The path of a folder may have commas, if that folder exists.

  Raises:
    ValueError: no set, or a union within it.

  >>> parts_of("union(mnist,folder:/data/flowers)")
  ('mnist', 'folder:/data/flowers')
  """
  found = _UNION.fullmatch(name)
  parts = _split_at_commas(found[2]) if found else []
  if not parts or not all(parts) or any(part.startswith(_NESTED) for part in parts):
    raise ValueError(
      f"data.name must be a union of sets, such as union(mnist,cifar10); got {name!r}"
    )
  return tuple(parts)


def _split_at_commas(text: str) -> list[str]:
  """Returns the texts between commas; a folder takes as many as make a path that exists."""
  parts, pieces = [], text.split(",")
  while pieces:
    taken = 1
    if pieces[0].strip().startswith(_FOLDER):
      for count in range(2, len(pieces) + 1):
        if os.path.exists(_path_of(",".join(pieces[:count]).strip())):
          taken = count
    parts.append(",".join(pieces[:taken]).strip())
    del pieces[:taken]
  return parts


def _path_of(part: str) -> Path:
  """Returns the path of a folder that is part of a union."""
  return user_path(part.removeprefix(_FOLDER))


def source_names(name: str) -> tuple[str, ...]:
  """Returns the names of a union's sets, as results and classes have them; see `parts_of`.

  A folder has its last part for a name.

  Raises:
    ValueError: as in `parts_of`; names that are equal, or of which one begins another.

  >>> source_names("union(mnist,folder:/data/flowers)")
  ('mnist', 'flowers')
  """
  names = []
  for part in parts_of(name):
    names.append(Path(part).name if part.startswith(_FOLDER) else part)
  for i, one in enumerate(names):
    for j, other in enumerate(names):
      if i != j and f"{other}{_JOINT}".startswith(f"{one}{_JOINT}"):
        raise ValueError(
          f"data.name must be a union of sets of different names; got {one!r} and {other!r}"
        )
  return tuple(names)


def class_sources(name: str, class_names: Sequence[str]) -> np.ndarray:
  """Returns the number of the set of each class of a union, `[K]` int32.

  Args:
    name: of the union.
    class_names: K names, as an opened union has them.
  Raises:
    ValueError: a class is of none of the sets.

  >>> class_sources("union(mnist,cifar10)", ("mnist/0", "mnist/1", "cifar10/cat"))
  array([0, 0, 1], dtype=int32)
  """
  sources = source_names(name)
  found = []
  for class_name in class_names:
    of_set = [class_name.startswith(f"{source}{_JOINT}") for source in sources]
    if True not in of_set:
      raise ValueError(
        f"data.name must name the sets of all classes; {name} has none for {class_name!r}. A "
        "folder whose path has a comma must be there, or be renamed"
      )
    found.append(of_set.index(True))
  return np.array(found, np.int32)


def open_union(source: SetSource) -> UnionExamples:
  """Opens a split of every set of a union, with random access.

  Args:
    source: the union. Its split is that of all sets, or those of each, joined by `;`; made sets
      have `train` and `test`. Its `data_dir` is that of TFDS sets, and not of `folder:` sets.
  Raises:
    ValueError, DatasetNotPreparedError: as in `image_sets.load`; also a number of splits that is
      not that of the sets, and pictures of other than one or three channels.
  """
  return UnionExamples(source, [_open_part(part) for part in part_sources(source)])


def part_sources(source: SetSource) -> list[SetSource]:
  """Returns the split of each set of a union, a folder's with its own `data_dir`.

  Raises:
    ValueError: as in `parts_of` and `splits_of`.

  >>> for part in part_sources(SetSource("union(mnist,folder:/data/a)", "train;test")):
  ...   print(part.name, part.split, part.data_dir)
  mnist train None
  folder test /data/a
  """
  name, in_use, found = source.name, source.in_use, []
  parts, splits = parts_of(name), splits_of(name, source.split)
  for i, (part, split) in enumerate(zip(parts, splits, strict=True)):
    own = source._replace(name=part, split=split, in_use=None)
    if part.startswith(_FOLDER):
      used = None if in_use is None else [splits_of(name, each)[i] for each in in_use]
      own = own._replace(name=folders.FOLDER, data_dir=str(_path_of(part)), in_use=used)
    found.append(own)
  return found


def splits_of(name: str, split: str) -> list[str]:
  """Returns the split of each set of a union; one split is that of all.

  Raises:
    ValueError: neither one split nor as many as there are sets.

  >>> splits_of("union(mnist,cifar10)", "train;train[:1000]")
  ['train', 'train[:1000]']
  """
  sets = len(parts_of(name))
  splits = split.split(_BETWEEN_SPLITS)
  if len(splits) == 1:
    splits *= sets
  if len(splits) != sets:
    raise ValueError(
      f"data split of a union must be one, or one for each of its {sets} sets, joined by ';'; got "
      f"{split!r}"
    )
  return splits


def join_splits(splits: Sequence[str]) -> str:
  """Returns the splits of the sets of a union as one text; see `splits_of`."""
  return _BETWEEN_SPLITS.join(splits)


def shares_of(sizes: Sequence[int], per_set: int | None = None) -> EqualShares:
  """Returns how the sets of a union come into batches.

  Args:
    sizes: images of each set.
    per_set: images of each in an epoch; None for as many as the largest set has.

  >>> shares_of((10, 30)).per_epoch
  60
  """
  return EqualShares(tuple(sizes), per_set or max(sizes))


class UnionExamples(Sequence):
  """The examples of all sets of a union, one set after the other.

  An example has a picture `[H, W, 3]` uint8, or `[H, W, 4]` where the set is known, of the size
  that it has in its set, and the number of its class among all.

  Args:
    source: the union.
    sets: the opened split of each set.

  Attributes:
    class_names: the name of the set, a slash and that of the class.
    file_names: the name of the set, a slash and the image's file or number.
    sizes: images of each set.
    shape: `(H, W, D)`; None for a size that differs between images.
    unreadable: as in `folders.FolderImages`, of all folders.
  """

  def __init__(self, source: SetSource, sets: Sequence[Any]):
    self.unreadable: dict[str, str] = {}
    for each in sets:
      self.unreadable |= getattr(each, "unreadable", {})
    self._sets, self._image, self._label = sets, source.image, source.label
    self._told = is_told(source.name)
    self.sizes = tuple(len(each) for each in sets)
    self._ends = np.cumsum(self.sizes)
    self._names = source_names(source.name)
    names, self._first = [], []
    for name, each in zip(self._names, sets, strict=True):
      if each.shape[-1] not in (1, COLOURS):
        raise ValueError(
          f"sets of a union must have 1 or {COLOURS} channels; {name} has {each.shape[-1]}"
        )
      self._first.append(len(names))
      names += [f"{name}{_JOINT}{class_name}" for class_name in each.class_names]
    self.class_names = tuple(names)
    sides = {each.shape[:2] for each in sets}
    height, width = sides.pop() if len(sides) == 1 else (None, None)
    self.shape = (height, width, COLOURS + self._told)

  def __len__(self) -> int:
    return sum(self.sizes)

  @property
  def file_names(self) -> tuple[str, ...]:
    """Returns the set of each image, and its file or number there."""
    found = []
    for name, each in zip(self._names, self._sets, strict=True):
      own = getattr(each, "file_names", ()) or range(len(each))
      found += [f"{name}{_JOINT}{of_image}" for of_image in own]
    return tuple(found)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"index must be that of one of {len(self)} examples; got {index}")
    source = int(np.searchsorted(self._ends, index, side="right"))
    of_source = self._sets[source]
    example = of_source[int(index - self._ends[source] + self.sizes[source])]
    label = example[self._label]
    # A number outside of its set's classes is no class of another set.
    known = 0 <= label < len(of_source.class_names)
    return {
      self._image: self._coloured(example[self._image], source),
      self._label: self._first[source] + label if known else -1,
    }

  def _coloured(self, pixels: np.ndarray, source: int) -> np.ndarray:
    """Returns a picture in three colours, with the number of its set where that is known."""
    if pixels.shape[-1] == 1:
      pixels = np.repeat(pixels, COLOURS, axis=-1)
    if self._told:
      number = np.full((*pixels.shape[:2], 1), source, np.uint8)
      pixels = np.concatenate([pixels, number], axis=-1)
    return pixels


class _Made(Sequence):
  """Images in memory as a sequence of examples."""

  def __init__(self, images: Images, image: str, label: str):
    self._images, self._image, self._label = images, image, label
    self.class_names, self.shape = images.class_names, images.shape

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {self._image: self._images.pixels[index], self._label: self._images.labels[index]}


def _open_part(source: SetSource) -> Any:
  """Opens a split of one set of a union."""
  if source.name in MADE:
    return _Made(MADE[source.name](source.split), source.image, source.label)
  return image_sets.open_images(source)


def _turned_digits(split: str) -> Images:
  """Returns the digits of a split as negatives, turned left by a quarter."""
  digits = image_sets.load(SetSource(image_sets.DIGITS, split))
  turned = np.rot90(255 - digits.pixels, axes=(1, 2))
  return Images(np.ascontiguousarray(turned), digits.labels, digits.class_names)


# The sets of a run are opened several times, and scenes take a second or two.
@functools.cache
def _digit_scenes(split: str) -> Images:
  """Returns scenes of one to three digits in noise; their class is the highest of these digits."""
  if split not in _SCENES:
    raise ValueError(f"data split of digit_scenes must be 'train' or 'test'; got {split!r}")
  made = scenes.make_scenes(split, scenes=_SCENES[split], size=(_SCENE, _SCENE), most=_DIGITS)
  # The first class of a pixel is the background.
  highest = made.labels.reshape(len(made), -1).max(axis=1).astype(np.int32) - 1
  return Images(made.pixels, highest, made.class_names[1:])


# Sets that need no files, by name.
MADE: dict[str, Callable[[str], Images]] = {
  image_sets.DIGITS: lambda split: image_sets.load(SetSource(image_sets.DIGITS, split)),
  scenes.MADE: _digit_scenes,
  "turned_digits": _turned_digits,
  "worlds": lambda split: image_sets.load(SetSource("worlds", split)),
}
