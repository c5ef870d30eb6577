"""Sets of labelled images in memory, tasks made from them, and batches of any set.

A split is scikit-learn's handwritten digits, that of a folder of images, or that of any TFDS
classification set. Pixels are uint8 until the training step.

Labels of a task are indices into the order of classes: with C classes a task, those of task t are
t C, ..., t C + C - 1.

A set has a length, reads a batch by index and maps a function over items, as `Images` does. In
training the host sends indices, and the step gathers and augments the images. A batch depends on
(seed, step) alone, so a restart needs no state. Sets of videos are read in the same order.

Axes: M images in a split, H and W pixels, D channels, T tasks, C classes of a task, B images in the
global batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from gating_jax.data import folders, tfds
from gating_jax.terminal import progress_bar

DIGITS = "digits"

_DIGITS_TEST_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Images:
  """Split of labelled images, whole, on the host.

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
    """Returns `(H, W, D)` of an image."""
    return self.pixels.shape[1:]

  def read(self, index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images at `index`: `(pixels [n, H, W, D], labels [n])`."""
    return self.pixels[index], self.labels[index]

  def take(self, index: np.ndarray) -> Images:
    """Returns the set of the images at `index`, with the same classes."""
    return Images(self.pixels[index], self.labels[index], self.class_names)

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order."""
    return map(fn, items)


def load(
  name: str,
  split: str,
  data_dir: str | None = None,
  image_size: int = 0,
  image: str = tfds.IMAGE,
  label: str = tfds.LABEL,
) -> Images:
  """Reads a whole split into memory.

  Pictures of other types become uint8 by the rule of `data/features.py: to_uint8`.

  Args:
    name: `digits` (1,797 images of 8 x 8, needs no files), `folder` (images in `data_dir`) or a
      TFDS name such as `cifar10`.
    split: `train` or `test` for digits, where the test split is a fixed, class-balanced fifth; for
      TFDS any split expression.
    data_dir: the TFDS folder; None for TFDS's default, `~/tensorflow_datasets`. Of `folder`, the
      folder of classes or a table; see `data/folders.py`.
    image_size: side in pixels that images are resized to; 0 leaves them. Of a `folder`, the
      largest square in the middle of each image is resized.
    image, label: names of the features that hold them in a TFDS set.
  Raises:
    DatasetNotPreparedError: the set is not in `data_dir`; the message holds the command that
      prepares it.
    ValueError: an unknown split, a set without these features or with ones that hold no picture or
      no single class per image, pictures outside the scale of their type, or images of different
      sizes.
  """

  def fit(pixels):
    """Resizes `[H, W, D]` if a size is asked for."""
    if not image_size:
      return pixels
    # Images of a folder have any shape, and keep their proportions.
    box = _central_square(pixels) if name == folders.FOLDER else None
    return resize(pixels, (image_size, image_size), box)

  if name == DIGITS:
    digits = _digits(split)
    return dataclasses.replace(digits, pixels=np.stack([fit(pixels) for pixels in digits.pixels]))
  source = open_images(name, split, data_dir, image, label)
  # The first image has the shape that all must have; the array is then filled in place.
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
        f"{name} has images of different sizes ({first.shape} and {pixel.shape}); set "
        "data.image_size"
      )
    if not 0 <= example[label] < len(source.class_names):
      raise ValueError(
        f"data split {split!r} of {name} has images without a label; use another, such as "
        "'validation'"
      )
    pixels[i], labels[i] = pixel, example[label]
  return Images(pixels, labels, source.class_names)


def open_images(
  name: str, split: str, data_dir: str | None, image: str, label: str
) -> folders.FolderImages | tfds.Examples:
  """Opens a split of images on disk, with random access; arguments and errors are as in `load`."""
  if name == folders.FOLDER:
    return folders.open_folder(data_dir, split, image, label)
  return tfds.open_tfds(name, split, data_dir, tfds.class_readers(image, label))


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


def count_images(
  name: str,
  split: str,
  data_dir: str | None = None,
  image: str = tfds.IMAGE,
  label: str = tfds.LABEL,
) -> int:
  """Counts the images of a split without reading them; arguments and errors are as in `load`."""
  if name == DIGITS:
    return len(_digits(split))
  return len(open_images(name, split, data_dir, image, label))


@dataclasses.dataclass(frozen=True)
class Task:
  """Images of one task."""

  train: Images
  validation: Images
  test: Images


def make_tasks(
  train: Images,
  test: Images,
  *,
  classes_per_task: int,
  count: int = 0,
  order_seed: int | None = None,
  validation: float = 0.1,
  seed: int = 0,
) -> tuple[Task, ...]:
  """Splits a set into tasks of `classes_per_task` classes each.

  Args:
    train, test: images of the same classes.
    classes_per_task: C.
    count: number of tasks; 0 for as many as there are.
    order_seed: of the order in which classes come; None for their own.
    validation: fraction of each class's training images that are held out, in (0, 1).
    seed: of that choice.
  Returns:
    The tasks, in order.
  Raises:
    ValueError: naming the argument; also a class with fewer than two training images, or none in
      the test set.
  """
  classes = len(train.class_names)
  if not (1 <= classes_per_task <= classes and classes % classes_per_task == 0):
    raise ValueError(f"classes_per_task must divide the {classes} classes; got {classes_per_task}")
  tasks = classes // classes_per_task
  if not 0 <= count <= tasks:
    raise ValueError(
      f"count must be at most {tasks}, the tasks of {classes_per_task} classes, or 0; got {count}"
    )
  if not 0 < validation < 1:
    raise ValueError(f"validation must be a fraction in (0, 1); got {validation}")
  order = np.arange(classes)
  if order_seed is not None:
    order = np.random.default_rng(order_seed).permutation(classes)
  train, test = _reordered(train, order), _reordered(test, order)
  # Two training images of a class: one to train on and one to hold out.
  for name, images, least in (("train", train, 2), ("test", test, 1)):
    counts = np.bincount(images.labels, minlength=classes)
    if counts.min() < least:
      raise ValueError(
        f"{name} must hold at least {least} images of every class; got {counts.min()} of class "
        f"{images.class_names[counts.argmin()]!r}"
      )
  sequence = []
  for first in range(0, (count or tasks) * classes_per_task, classes_per_task):
    of_task = range(first, first + classes_per_task)
    # Seeded by the task's first class, so that a task's choice does not depend on tasks before it.
    rng = np.random.default_rng((seed, first))
    sequence.append(_make_task(train, test, of_task, validation=validation, rng=rng))
  return tuple(sequence)


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


def batch_indices(seed: int, step: int, batch_size: int, examples: int) -> np.ndarray:
  """Returns the indices of the images of step `step`.

  Epochs are fresh permutations; the incomplete last batch of each is left out.

  Args:
    seed: of the order.
    step: from 0.
    batch_size: B, at most `examples`.
    examples: M.
  Returns:
    `[B]` int32.
  Raises:
    ValueError: the batch is larger than the set.
  """
  if not 0 < batch_size <= examples:
    raise ValueError(
      f"batch_size must be in [1, {examples}], the number of training images; got {batch_size}"
    )
  epoch, position = divmod(step, examples // batch_size)
  return _epoch_order(seed, epoch, examples)[position * batch_size : (position + 1) * batch_size]


# Several sets may be read in turns, each in an epoch of its own.
@functools.lru_cache(maxsize=16)
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
  """Returns the order of the examples in an epoch, `[examples]`."""
  order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
  # The cached array is shared by all callers.
  order.flags.writeable = False
  return order


def process_indices(
  seed: int, step: int, k: int, batch_size: int, examples: int, process: tuple[int, int] = (0, 1)
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


def _make_task(
  train: Images, test: Images, classes: range, *, validation: float, rng: np.random.Generator
) -> Task:
  """Makes the task of these classes; the generator chooses the images that are held out."""
  held = []
  # Class by class, so that each keeps its fraction and at least one image on either side.
  for c in classes:
    own = np.flatnonzero(train.labels == c)
    count = np.clip(round(validation * len(own)), 1, len(own) - 1)
    held.append(rng.permutation(own)[:count])
  held = np.sort(np.concatenate(held))
  of_train = np.flatnonzero(np.isin(train.labels, classes))
  of_test = np.flatnonzero(np.isin(test.labels, classes))
  return Task(
    train=train.take(np.setdiff1d(of_train, held)),
    validation=train.take(held),
    test=test.take(of_test),
  )


def _reordered(images: Images, order: np.ndarray) -> Images:
  """Relabels the classes by their place in the order."""
  # argsort inverts a permutation.
  place = np.argsort(order).astype(np.int32)
  return Images(images.pixels, place[images.labels], tuple(images.class_names[c] for c in order))


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
