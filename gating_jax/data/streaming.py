"""Images read from disk during training, with grain: for sets that do not fit on the device.

`data/image_sets.py` sets the order, a function of (seed, step) alone. So a restart needs no state
and may use another number of workers. `prefetch` reads ahead of the consumer, in threads or
processes, here and for videos.

Axes: M images in the set, b images of this process per step, K steps per call, H and W pixels, D
channels.

Reference: grain, https://google-grain.readthedocs.io.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from gating_jax.data import folders, image_sets, tfds
from gating_jax.data.checked_files import FaultNotes

# Fraction of the shorter side that the central crop keeps: 224 of 256, as is usual on ImageNet.
EVAL_FRACTION = 0.875
# Pools of workers that read ahead at present.
_POOLS: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Stream:
  """Split of a set of images on disk.

  Attributes:
    source: random access to examples; by default, `image` is uint8 `[h, w, D]` and `label` an int.
    class_names: one per class.
    shape: `(H, W, D)` that every image is brought to.
    seed: of the order and of random crops.
    crop_area: in training, smallest fraction of an image's area that a random resized crop keeps;
      None for no crop.
    workers: number of processes that decode; 0 for threads of this process.
    image, label: names of the features that hold them.
    shares: as in `image_sets.Images`.
    central_fraction: fraction of the shorter side that the central crop keeps; 0 for no crop.
    notes: files of a folder that cannot be read.
  """

  source: Sequence[dict[str, Any]]
  class_names: tuple[str, ...]
  shape: tuple[int, int, int]
  seed: int = 0
  crop_area: float | None = None
  workers: int = 0
  image: str = tfds.IMAGE
  label: str = tfds.LABEL
  shares: image_sets.EqualShares | None = None
  central_fraction: float = EVAL_FRACTION
  notes: FaultNotes = dataclasses.field(
    default_factory=lambda: FaultNotes({}), compare=False, repr=False
  )

  def __len__(self) -> int:
    return len(self.source)

  @property
  def unreadable(self) -> Mapping[str, str]:
    """Returns the reason for each file that could not be read so far, by its path."""
    return self.notes.checked | self.notes.later

  @property
  def file_names(self) -> tuple[str, ...]:
    """Returns the name of each image's file; none where images have no file of their own."""
    return getattr(self.source, "file_names", ())

  @property
  def in_epoch(self) -> int:
    """Returns the number of images of an epoch of training."""
    return self.shares.per_epoch if self.shares else len(self)

  def batches(
    self,
    batch_size: int,
    first_step: int,
    k: int,
    total_steps: int,
    process: tuple[int, int] = (0, 1),
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `(pixels [b, K, H, W, D] uint8, labels [b, K] int32)` for every `k` steps.

    Args:
      batch_size, k, process: as in `image_sets.process_indices`.
      first_step, total_steps: steps from `first_step` to before `total_steps`.
    """

    def read(step):
      """Returns `(pixels [b, K, H, W, D], labels [b, K, ...])` of the K steps from `step`."""
      source = self.shares or len(self)
      index = image_sets.process_indices(
        self.seed, step, k, batch_size=batch_size, examples=source, process=process
      )
      # A crop is seeded by the step and the image's row in the whole batch: it is the same on any
      # number of processes.
      first_row = process[0] * len(index)
      examples = []
      for (row, column), number in np.ndenumerate(index):
        examples.append(self.read_one(number, (self.seed, step + column, first_row + row)))
      pixels, labels = _stack(examples)
      # From one axis of examples to [b, K].
      return (
        pixels.reshape(*index.shape, *self.shape),
        labels.reshape(*index.shape, *labels.shape[1:]),
      )

    return self.map(read, range(first_step, total_steps, k))

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images at `index` without augmentation: `(pixels [n, H, W, D], labels [n])`."""
    return _stack([self.read_one(number, None) for number in index])

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order and ahead of the consumer, by threads or processes."""
    return prefetch_noting(fn, list(items), self.workers, notes=self.notes)

  def read_one(
    self, index: int, seed: tuple[int, ...] | None
  ) -> tuple[np.ndarray, np.ndarray | np.int32]:
    """Returns image and label number `index`, at the size that all images have.

    Args:
      index: from 0.
      seed: of the augmentation; None for evaluation, without augmentation.
    Raises:
      ValueError: the image has no label.
    """
    example = folders.read_or_replace(self.source, int(index), self.notes)
    if not 0 <= example[self.label] < len(self.class_names):
      raise ValueError(
        "the data split has images without a label; use another, such as 'validation'"
      )
    image, size = example[self.image], self.shape[:2]
    if seed is not None and self.crop_area is not None:
      rng = np.random.default_rng(seed)
      image = random_resized_crop(image, size, smallest_area=self.crop_area, rng=rng)
    # Without a crop, images of the right size are not resampled.
    elif image.shape[:2] != size:
      image = central_crop(image, size, self.central_fraction)
    return image, np.int32(example[self.label])


def _stack(
  examples: Sequence[tuple[np.ndarray, np.ndarray | np.int32]],
) -> tuple[np.ndarray, np.ndarray]:
  """Joins pairs of image and label: `(pixels [n, H, W, D], labels [n, ...])`."""
  pixels, labels = zip(*examples, strict=True)
  return np.stack(pixels), np.stack(labels)


def open_stream(
  source: image_sets.SetSource,
  *,
  image_size: int = 0,
  seed: int = 0,
  crop_area: float | None = None,
  test_crop: float | None = None,
  workers: int = 0,
) -> Stream:
  """Opens an image-classification set on disk; errors are as in `image_sets.load`.

  Args:
    source: the split; the digits need no stream.
    image_size: side in pixels that images are brought to; 0 for sets whose images all have one
      size.
    seed, crop_area, workers: see `Stream`.
    test_crop: the `central_fraction` of `Stream`; None for that of the set.
  Raises:
    ValueError: the digits, a crop out of range, or images of unknown size and no `image_size`.
  """
  if source.name == image_sets.DIGITS:
    raise ValueError(
      "data.loader must be 'resident' for digits: they are not on disk; got 'streaming'"
    )
  if crop_area is not None and not 0 < crop_area <= 1:
    raise ValueError(f"data.crop_area must be in (0, 1]; got {crop_area}")
  if test_crop is not None and not 0 <= test_crop <= 1:
    raise ValueError(f"data.test_crop must be in [0, 1]; got {test_crop}")
  opened = image_sets.open_images(source)
  height, width, depth = opened.shape
  if image_size:
    height = width = image_size
  if height is None or width is None:
    raise ValueError(
      f"data.image_size must be set to stream {source.name}, whose images may differ in size; "
      f"got {image_size}"
    )
  return Stream(
    opened,
    opened.class_names,
    (height, width, depth),
    seed=seed,
    crop_area=crop_area,
    workers=workers,
    image=source.image,
    label=source.label,
    central_fraction=central_fraction(source.name) if test_crop is None else test_crop,
    notes=FaultNotes(getattr(opened, "unreadable", {})),
  )


def central_fraction(name: str) -> float:
  """Returns the fraction of its largest middle part that a test image of a set keeps."""
  # Imported at its first use, since one of its sets imports this module.
  from gating_jax.data import unions

  # The rule of pictures of unions: the largest square in the middle.
  return 1.0 if unions.is_union(name) else EVAL_FRACTION


def random_resized_crop(
  image: np.ndarray, size: tuple[int, int], smallest_area: float, rng: np.random.Generator
) -> np.ndarray:
  """Resizes a random part of an image to `size`.

  The part has at least the fraction `smallest_area` of the image's area, and an aspect ratio of 3/4
  to 4/3.

  Reference: Szegedy et al., 2015.
  """
  height, width = image.shape[:2]
  # A part that does not fit is drawn again; after ten draws the central crop must do.
  for _ in range(10):
    area = height * width * rng.uniform(smallest_area, 1)
    # Uniform in the logarithm: 3/4 is as likely as 4/3.
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = round(float(np.sqrt(area * aspect)))
    h = round(float(np.sqrt(area / aspect)))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return image_sets.resize(image, size, (left, top, left + w, top + h))
  return central_crop(image, size)


def central_crop(
  image: np.ndarray, size: tuple[int, int], fraction: float = EVAL_FRACTION
) -> np.ndarray:
  """Resizes the middle of an image to `size`.

  The middle has `size`'s aspect, and `fraction` of the sides of the largest such part. With 0 the
  whole image is resized.
  """
  if not fraction:
    return image_sets.resize(image, size)
  height, width = image.shape[:2]
  # The side that limits the part is not divided: with rounding, the part could leave the image.
  if height * size[1] <= width * size[0]:
    h, w = float(height), height * size[1] / size[0]
  else:
    h, w = width * size[0] / size[1], float(width)
  # Fractions of a pixel are kept: Pillow resizes any box.
  h, w = fraction * h, fraction * w
  left, top = (width - w) / 2, (height - h) / 2
  return image_sets.resize(image, size, (left, top, left + w, top + h))


def prefetch(
  fn: Callable[[Any], Any], items: Sequence[Any], workers: int, *, buffer_size: int = 8
) -> Iterator[Any]:
  """Computes `fn` of each item, in order, a bounded number of items ahead of the consumer.

  Args:
    fn: a function of one item; with workers, it and its result must be picklable.
    items: anything with a length and an index, such as a range; it is not copied.
    workers: number of worker processes; 0 for threads of this process.
    buffer_size: number of threads, and of results that they may hold ready. Each worker process
      holds up to two.
  Returns:
    An iterator of the results. Its workers end, and their shared memory is freed, with it: at its
    end, by its `close`, or by `close_pools`.

  >>> list(prefetch(lambda n: n * n, range(4), workers=0))
  [0, 1, 4, 9]
  """
  dataset = grain.MapDataset.source(items).map(fn)
  if not workers:
    threads = grain.ReadOptions(num_threads=buffer_size, prefetch_buffer_size=buffer_size)
    return _closing(dataset.to_iter_dataset(threads), ())
  # grain passes absl's flags on to the workers; outside absl programs nobody has parsed them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  # Otherwise it would start with the first worker, and unblock what `_closing` blocks.
  resource_tracker.ensure_running()
  # Few results per worker, since each may be a whole batch of images or videos.
  processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  one_by_one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  # A terminal sends Ctrl-C to worker processes too, but what becomes of it is for this one to
  # decide.
  return _closing(dataset.to_iter_dataset(one_by_one).mp_prefetch(processes), {signal.SIGINT})


def prefetch_noting(
  fn: Callable[[Any], Any],
  items: Sequence[Any],
  workers: int,
  *,
  notes: FaultNotes,
  buffer_size: int = 8,
) -> Iterator[Any]:
  """Works as `prefetch`; notes here also the files that worker processes could not read.

  Args:
    fn, items, workers, buffer_size: as for `prefetch`.
    notes: those of the set that `fn` reads.
  """

  def read(item):
    """Returns a result with the worker's notes, which are in its own copy of the set."""
    return fn(item), dict(notes.later)

  for result, unreadable in prefetch(read, items, workers, buffer_size=buffer_size):
    notes.note(unreadable)
    yield result


def _closing(dataset: Iterable[Any], blocked: Collection[int]) -> Iterator[Any]:
  """Yields the results of a pool of workers, and closes it at the end, whatever that is.

  Args:
    dataset: starts the workers at its first result.
    blocked: signals that the workers never see.
  """
  pool: Any = None
  # They start before the first result, and inherit what is blocked then.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
  try:
    try:
      pool = iter(dataset)
      _POOLS.append(pool)
      first = list(itertools.islice(pool, 1))
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from first
    yield from pool
  finally:
    # Also where the consumer stops early, or fails.
    _close(pool)


def _close(pool: Any) -> None:
  """Ends the workers of a pool; a second call does nothing."""
  if pool in _POOLS:
    _POOLS.remove(pool)
    pool.close()


def close_pools() -> None:
  """Ends all workers that read ahead, before a process that cannot end in order."""
  for pool in list(_POOLS):
    _close(pool)
