"""Sets of labelled images in memory, and batches of any set.

A split is scikit-learn's handwritten digits, made images of worlds, that of a folder of images,
that of any TFDS classification set, or a union of several of these. Pixels are uint8 until the
training step.

A set has a length, reads a batch by index and maps a function over items, as `Images` does. In
training the host sends indices, and the step gathers and augments the images. A batch depends on
(seed, step) alone, so a restart needs no state. Sets of videos are read in the same order.

Axes: M images in a split, H and W pixels, D channels, T arrays to interleave, B images in the
global batch, S sets of a union.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gating_jax.data import folders, tfds
from gating_jax.data.checked_files import FaultNotes
from gating_jax.terminal import progress_bar

DIGITS = "digits"
# Sets that need no files.
MADE = (DIGITS, "worlds", "worlds_told")

_DIGITS_TEST_FRACTION = 0.2
# Of the container of this process, on Linux.
_CGROUP = "/sys/fs/cgroup"


class SetSource(NamedTuple):
  """A split of a set of images, and where its files are.

  Attributes:
    name: `digits` (1,797 images of 8 x 8, needs no files), `worlds` or `worlds_told` (made, of 16 x
      16, see `data.worlds`), `folder` (images in `data_dir`), a TFDS name such as `cifar10`, or a
      union of these such as `union(mnist,cifar10)`, see `data.unions`.
    split: `train` or `test` for digits, where the test split is a fixed, class-balanced fifth; for
      worlds also a part such as `train[:50000]`; for TFDS any split expression.
    data_dir: the TFDS folder; None for TFDS's default, `~/tensorflow_datasets`. Of `folder`, the
      folder of classes or a table; see `data/folders.py`.
    image, label: names of the features with the image and the label, in a TFDS set and in examples.
    in_use: of a folder, the splits that agree on the classes, which are those of their images; None
      for all.
  """

  name: str
  split: str
  data_dir: str | None = None
  image: str = tfds.IMAGE
  label: str = tfds.LABEL
  in_use: Sequence[str] | None = None


class EqualShares(NamedTuple):
  """A union's way into batches: equal numbers of images of each set, whatever its size.

  Attributes:
    sizes: images of each of S sets, which lie one after the other.
    per_set: images of each set in an epoch, which is a number of steps and nothing else: a set
      begins a fresh permutation of its own whenever it is through.
  """

  sizes: tuple[int, ...]
  per_set: int

  @property
  def per_epoch(self) -> int:
    """Returns the number of images in an epoch."""
    return len(self.sizes) * self.per_set


@dataclasses.dataclass(frozen=True)
class Images:
  """Split of labelled images, whole, on the host.

  Attributes:
    pixels: `[M, H, W, D]` uint8.
    labels: `[M]` int32; or `[M, H, W]` uint8, a class for every pixel.
    class_names: one per class.
    shares: of a union to train on, how its sets come into batches; None for permutations of all
      images.
    unreadable: the reason for each file of a folder that could not be read, by its path.
    file_names: M names of files; none where images have no file of their own.
  """

  pixels: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  shares: EqualShares | None = None
  unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
  file_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def in_epoch(self) -> int:
    """Returns the number of images of an epoch of training."""
    return self.shares.per_epoch if self.shares else len(self)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Returns `(H, W, D)` of an image."""
    return self.pixels.shape[1:]

  def read(self, index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images at `index`: `(pixels [n, H, W, D], labels [n])`."""
    return self.pixels[index], self.labels[index]

  def take(self, index: np.ndarray) -> Images:
    """Returns the set of the images at `index`, with the same classes."""
    pixels, labels = self.read(index)
    names = tuple(self.file_names[i] for i in index) if self.file_names else ()
    return dataclasses.replace(self, pixels=pixels, labels=labels, shares=None, file_names=names)

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order."""
    return map(fn, items)


def load(source: SetSource, image_size: int = 0) -> Images:
  """Reads a whole split into memory.

  Pictures of other types become uint8 by the rule of `data/features.py: to_uint8`.

  Args:
    source: the split.
    image_size: side in pixels that images are resized to; 0 leaves them. Of a `folder` or a union,
      the largest square in the middle of each image is resized.
  Raises:
    DatasetNotPreparedError: the set is not in `data_dir`; the message holds the command that
      prepares it.
    ValueError: an unknown split, a set without these features or with ones that hold no picture or
      no single class per image, pictures outside the scale of their type, images of different
      sizes, or more of them than fit in memory.
  """

  def fit(pixels):
    """Resizes `[H, W, D]` if a size is asked for."""
    if not image_size:
      return pixels
    box = _central_square(pixels) if keeps_proportions(source.name) else None
    return resize(pixels, (image_size, image_size), box)

  name, split = source.name, source.split
  if name in MADE:
    made = _digits(split) if name == DIGITS else _worlds().open_worlds(name, split)
    if not image_size:
      return made
    return dataclasses.replace(made, pixels=np.stack([fit(pixels) for pixels in made.pixels]))
  opened = open_images(source)
  notes = FaultNotes(getattr(opened, "unreadable", {}))
  # The first image has the shape that all must have; the array is then filled in place.
  first = fit(folders.read_or_replace(opened, 0, notes)[source.image])
  _check_fits(len(opened), first.shape, f"data split {split!r} of {name}")
  pixels = np.empty((len(opened), *first.shape), np.uint8)
  labels = np.empty(len(opened), np.int32)
  for i in progress_bar(
    range(len(opened)), desc=f"reading {name} {split}", unit="image", leave=False
  ):
    example = folders.read_or_replace(opened, i, notes)
    pixel = fit(example[source.image])
    if pixel.shape != first.shape:
      raise ValueError(
        f"{name} has images of different sizes ({first.shape} and {pixel.shape}); set "
        "data.image_size"
      )
    if not 0 <= example[source.label] < len(opened.class_names):
      raise ValueError(
        f"data split {split!r} of {name} has images without a label; use another, such as "
        "'validation'"
      )
    pixels[i], labels[i] = pixel, example[source.label]
  return Images(
    pixels,
    labels,
    opened.class_names,
    unreadable=notes.checked | notes.later,
    file_names=getattr(opened, "file_names", ()),
  )


def open_images(source: SetSource) -> Any:
  """Opens a split of images with random access; errors are as in `load`.

  Returns:
    A sequence of examples, mappings with an image and a label, with `class_names` and `shape`.
  """
  if _unions().is_union(source.name):
    return _unions().open_union(source)
  image, label = source.image, source.label
  if source.name == folders.FOLDER:
    return folders.open_folder(
      source.data_dir, source.split, image=image, label=label, in_use=source.in_use
    )
  readers = tfds.class_readers(image, label)
  return tfds.open_tfds(source.name, source.split, source.data_dir, readers=readers)


def _check_fits(count: int, shape: Sequence[int], name: str) -> None:
  """Raises a ValueError where so many images of this shape do not fit in memory."""
  needed, available = count * math.prod(shape), available_memory()
  if needed > available:
    size = "x".join(map(str, shape))
    raise ValueError(
      f"{name} must fit in memory: its {count:,} images of {size} are {needed / 1e9:,.1f} GB, of "
      f"{available / 1e9:,.1f} GB that are available. Set data.loader=streaming where the config "
      "has it, or a smaller data.image_size"
    )


def available_memory() -> int:
  """Returns the bytes of memory that this process may still take; all of it where none says so."""
  # With what the cache of files would give back, unlike the pages that `sysconf` calls available.
  host = _read_sizes("/proc/meminfo")
  if "MemAvailable:" in host:
    free = 1024 * host["MemAvailable:"]
  else:
    # Only Linux has it.
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  # A container may take less than its host has. There, too, the cache of files is given back.
  most = _read_sizes(f"{_CGROUP}/memory.max")
  taken = _read_sizes(f"{_CGROUP}/memory.current")
  if most and taken:
    parts = _read_sizes(f"{_CGROUP}/memory.stat")
    cached = parts.get("active_file", 0) + parts.get("inactive_file", 0)
    free = min(free, max(0, most[""] - taken[""] + cached))
  return free


def _read_sizes(file: str) -> dict[str, int]:
  """Returns the number in each line of a file of the system, by the word before it, if any.

  Lines without a number, such as `max`, are left out. Without the file there is none.
  """
  try:
    lines = Path(file).read_text().splitlines()
  except OSError:
    return {}
  sizes = {}
  for line in lines:
    *name, size = line.split()[:2]
    if size.isdigit():
      sizes["".join(name)] = int(size)
  return sizes


def decoded_bytes(source: SetSource, image_size: int = 0, channels: int | None = None) -> int:
  """Returns the bytes that the images of a split take in memory; at most one of them is read.

  Errors are as in `load`. Made images, which are in memory in any case, count as 0.

  Args:
    source, image_size: as in `load`.
    channels: of an image; None for those of the set.
  """
  if _unions().is_union(source.name):
    parts = _unions().part_sources(source)
    # Grey becomes colours, and an image may have the number of its set.
    return sum(decoded_bytes(part, image_size, _unions().COLOURS + 1) for part in parts)
  if source.name in (*MADE, *_unions().MADE):
    return 0
  if source.name == folders.FOLDER:
    opened = open_images(source)
    shape = opened.shape
    if not image_size:
      # All must have one size.
      shape = folders.read_or_replace(opened, 0)[source.image].shape
  else:
    opened = tfds.open_tfds(source.name, source.split, source.data_dir, readers={})
    own = opened.dataset_info.features
    shape = own[source.image].shape if source.image in own else ()
  height, width, depth = shape if len(shape) == 3 else (0, 0, 0)
  if image_size:
    height = width = image_size
  # What is no picture, or of unknown size, is refused when it is loaded.
  return len(opened) * (height or 0) * (width or 0) * (channels or depth or 0)


def has_folder(name: str) -> bool:
  """Returns whether a set is a folder of images, or a union with one.

  >>> has_folder("folder"), has_folder("union(mnist,folder:/data/a)"), has_folder("mnist")
  (True, True, False)
  """
  if _unions().is_union(name):
    return any(part.startswith(f"{folders.FOLDER}:") for part in _unions().parts_of(name))
  return name == folders.FOLDER


def keeps_proportions(name: str) -> bool:
  """Returns whether images of a set are cut to a square before `load` resizes them.

  Those of a folder or a union have any shape.

  >>> keeps_proportions("folder"), keeps_proportions("cifar10")
  (True, False)
  """
  return name == folders.FOLDER or _unions().is_union(name)


def _central_square(pixels: np.ndarray) -> tuple[float, float, float, float]:
  """Returns the largest square in the middle of an image, as `(left, top, right, bottom)`."""
  height, width = pixels.shape[:2]
  side = min(height, width)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def resize(
  image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
  """Resizes `[H, W, D]` uint8, or a part of it, to height and width `size`: bilinear, antialiased.

  Args:
    image: `[H, W, D]` uint8.
    size: height and width.
    box: the part `(left, top, right, bottom)`, in pixels; None for the whole image.
  """

  def fit(pixels):
    """Resizes what Pillow takes for a picture: `[H, W]` or `[H, W, 3]`."""
    # Pillow's size is width and height.
    width_height = size[1], size[0]
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize(width_height, Image.Resampling.BILINEAR, box=box))

  if image.shape[-1] == 3:
    return fit(image)
  # Channel by channel: Pillow takes the last of four for transparency and weights the others by it.
  return np.stack([fit(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)


def count_images(source: SetSource) -> int:
  """Counts the images of a split without reading them; errors are as in `load`."""
  if source.name == DIGITS:
    return len(_digits(source.split))
  if source.name in MADE:
    return _worlds().count_worlds(source.split)
  return len(open_images(source))


def join(sets: Sequence[Images]) -> Images:
  """Joins the images of several sets of the same classes, one set after the other."""
  pixels = np.concatenate([each.pixels for each in sets])
  labels = np.concatenate([each.labels for each in sets])
  return Images(pixels, labels, sets[0].class_names)


def interleave(sets: Sequence[np.ndarray]) -> np.ndarray:
  """Interleaves T sets: the first of each, then the second of each, and so on.

  T of `[N, ...]` to `[N T, ...]`.

  >>> interleave([np.array([0, 1, 2]), np.array([10, 11, 12])])
  array([ 0, 10,  1, 11,  2, 12])
  """
  return np.stack(sets, axis=1).reshape(-1, *sets[0].shape[1:])


def batch_indices(seed: int, step: int, batch_size: int, examples: int | EqualShares) -> np.ndarray:
  """Returns the indices of the images of step `step`.

  Epochs are fresh permutations; the incomplete last batch of each is left out. In a union, sets
  take turns, so that a batch has as many images of one as of another, give or take one; each set
  is read in fresh permutations of its own, and none of its images is left out.

  Args:
    seed: of the order.
    step: from 0.
    batch_size: B, at most the images of an epoch.
    examples: M; or the shares of a union.
  Returns:
    `[B]` int32.
  Raises:
    ValueError: the batch is larger than the set.

  >>> batch_indices(0, 0, 4, EqualShares(sizes=(2, 100), per_set=100)) < 2
  array([ True, False,  True, False])
  """
  in_epoch = examples.per_epoch if isinstance(examples, EqualShares) else examples
  if not 0 < batch_size <= in_epoch:
    raise ValueError(
      f"batch_size must be in [1, {in_epoch}], the number of training images; got {batch_size}"
    )
  if isinstance(examples, EqualShares):
    return _shared_indices(seed, first=step * batch_size, count=batch_size, sizes=examples.sizes)
  epoch, position = divmod(step, examples // batch_size)
  order = _order_of((seed, epoch), examples)
  return order[position * batch_size : (position + 1) * batch_size]


def _shared_indices(seed: int, first: int, count: int, *, sizes: Sequence[int]) -> np.ndarray:
  """Returns the images at places `first` and after it of the endless turns of sets, `[count]`."""
  starts = np.cumsum([0, *sizes[:-1]])
  found = np.empty(count, np.int32)
  for i, place in enumerate(range(first, first + count)):
    draw, source = divmod(place, len(sizes))
    epoch, position = divmod(draw, sizes[source])
    found[i] = starts[source] + _order_of((seed, epoch, source), sizes[source])[position]
  return found


# Several sets may be read in turns, each in an epoch of its own.
@functools.lru_cache(maxsize=64)
def _order_of(key: tuple[int, ...], examples: int) -> np.ndarray:
  """Returns the order of the examples in an epoch, `[examples]`; keys have orders of their own."""
  order = np.random.default_rng(key).permutation(examples).astype(np.int32)
  # The cached array is shared by all callers.
  order.flags.writeable = False
  return order


def process_indices(
  seed: int,
  step: int,
  k: int,
  batch_size: int,
  examples: int | EqualShares,
  process: tuple[int, int] = (0, 1),
) -> np.ndarray:
  """Returns the indices that a process sees in `k` steps from `step` on.

  Args:
    seed, step, batch_size, examples: as in `batch_indices`.
    k: number of steps.
    process: index of the process and number of processes, which divides `batch_size`.
  Returns:
    `[batch_size / count, k]` int32.
  """
  by_step = []
  for at in range(step, step + k):
    by_step.append(batch_indices(seed, at, batch_size=batch_size, examples=examples))
  whole = np.stack(by_step, axis=1)
  # A process has the same rows of the batch in every step.
  return np.split(whole, process[1])[process[0]]


def padded_batches(examples: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
  """Yields batches that cover a set once, each with its number of valid examples, in order.

  The last batch is padded with its own first example. Every example is among the valid entries of
  exactly one batch, whatever the sizes.

  Args:
    examples: a set with `len`, `read(index)`, which returns the batch, and `map(fn, items)`.
    batch_size: number of examples of every batch.
  """

  def read(start):
    """Returns the batch of examples from `start` and how many of them are not padding."""
    index = np.arange(start, min(start + batch_size, len(examples)))
    # All batches have one size, so that a compiled step is compiled once.
    filled = np.concatenate([index, np.full(batch_size - len(index), start)])
    return examples.read(filled), len(index)

  return examples.map(read, range(0, len(examples), batch_size))


def _worlds() -> types.ModuleType:
  """Returns the module of worlds, whose digits are this module's."""
  # Imported at its first use, since it imports this one.
  from gating_jax.data import worlds

  return worlds


def _unions() -> types.ModuleType:
  """Returns the module of unions, whose sets this module loads."""
  # Imported at its first use, since it imports this one.
  from gating_jax.data import unions

  return unions


def _digits(split: str) -> Images:
  """Returns scikit-learn's handwritten digits, 1,797 images of 8 x 8."""
  from sklearn import datasets, model_selection

  if split not in ("train", "test"):
    raise ValueError(f"data split of digits must be 'train' or 'test'; got {split!r}")
  digits: Any = datasets.load_digits()
  # Stratified, with a fixed seed: the split is the same in every run.
  train, test = model_selection.train_test_split(
    np.arange(len(digits.target)),
    test_size=_DIGITS_TEST_FRACTION,
    random_state=0,
    stratify=digits.target,
  )
  index = train if split == "train" else test
  # scikit-learn's pixels are 0 to 16.
  pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target[index].astype(np.int32)
  return Images(pixels, labels, tuple(str(name) for name in digits.target_names))
