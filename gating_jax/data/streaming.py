"""Images read from disk while training goes on, with grain: for sets that do not fit on the device.

Axes: M images in the set, b images of this process per step, K steps per call, H and W pixels, D channels.
The order is that of `data/images.py`, a function of (seed, step) alone, so a restart needs no state and may use
another number of workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gating_jax.data import features, images, tfds
from gating_jax.data.ahead import computed_ahead

_EVAL_SHARE = 0.875  # of the shorter side, kept by the central crop: 224 of 256


@dataclasses.dataclass(frozen=True)
class Stream:
  """One split, on disk.

  Attributes:
    source: random access to examples, of which `image` is uint8 `[h, w, D]` and `label` an int.
    class_names: one per class.
    shape: `(H, W, D)` that every image is brought to.
    seed: of the order and of random crops.
    crop_area: in training, smallest share of an image's area that a random resized crop keeps; None for no crop.
    workers: processes that decode; 0 for threads of this one.
    image, label: names of the features that hold them.
  """

  source: Sequence[dict[str, Any]]
  class_names: tuple[str, ...]
  shape: tuple[int, int, int]
  seed: int = 0
  crop_area: float | None = None
  workers: int = 0
  image: str = tfds.IMAGE
  label: str = tfds.LABEL

  def __len__(self) -> int:
    return len(self.source)

  def batches(
    self,
    batch_size: int,
    first_step: int,
    k: int,
    total_steps: int,
    process: tuple[int, int] = (0, 1),
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(pixels [b, K, H, W, D] uint8, labels [b, K] int32)` for each `k` steps; arguments as in `resident.indices`."""

    def read(step):
      index = images.indices(self.seed, step, k, batch_size, len(self), process)
      first = process[0] * len(index)
      flat = [
        self.read_one(
          i, (self.seed, step + place % k, first + place // k)
        )  # as on any number of processes
        for place, i in enumerate(index.ravel())
      ]
      pixels, labels = (np.stack(column) for column in zip(*flat, strict=True))
      return pixels.reshape(*index.shape, *self.shape), labels.reshape(
        *index.shape, *labels.shape[1:]
      )

    return self.map(read, range(first_step, total_steps, k))

  def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images at `index`, without augmentation: `(pixels [n, H, W, D], labels [n])`."""
    pixels, labels = zip(*(self.read_one(i, None) for i in index), strict=True)
    return np.stack(pixels), np.stack(labels)

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`fn` of each item, in order, computed ahead by threads or worker processes."""
    return computed_ahead(fn, list(items), self.workers)

  def read_one(
    self, index: int, seed: tuple[int, ...] | None
  ) -> tuple[np.ndarray, np.ndarray | np.int32]:
    """Image and label number `index`, of the sizes that all have: augmented by `seed`, or for evaluation as it is."""
    example = self.source[int(index)]
    if not 0 <= example[self.label] < len(self.class_names):
      raise ValueError(
        "the data split has images without a label; use another, such as 'validation'"
      )
    image, size = example[self.image], self.shape[:2]
    if seed is not None and self.crop_area is not None:
      image = random_resized_crop(image, size, self.crop_area, np.random.default_rng(seed))
    elif image.shape[:2] != size:
      image = central_crop(image, size)
    return image, np.int32(example[self.label])


def open_stream(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  image_size: int = 0,
  seed: int = 0,
  crop_area: float | None = None,
  workers: int = 0,
  image: str = tfds.IMAGE,
  label: str = tfds.LABEL,
) -> Stream:
  """Opens a TFDS image-classification set; errors are as in `sources.load`.

  Args:
    name, split, data_dir: as in `sources.load`; the digits need no stream.
    image_size: side that images are brought to; 0 for sets whose images are all of one size.
    seed, crop_area, workers, image, label: see `Stream`.
  Raises:
    ValueError: images of unknown size and no `image_size`.
  """
  if name == tfds.DIGITS:
    raise ValueError(
      "data.loader must be 'resident' for digits: they are not on disk; got 'streaming'"
    )
  if crop_area is not None and not 0 < crop_area <= 1:
    raise ValueError(f"data.crop_area must be in (0, 1]; got {crop_area}")
  source = tfds.open_tfds(
    name, split, data_dir, {image: features.Picture, label: features.ImageClass}
  )
  height, width, depth = source.shape
  if image_size:
    height = width = image_size
  if height is None or width is None:
    raise ValueError(
      f"data.image_size must be set: images of {name} differ in size; got {image_size}"
    )
  return Stream(
    source,
    source.class_names,
    (height, width, depth),
    seed,
    crop_area,
    workers,
    image=image,
    label=label,
  )


def random_resized_crop(
  image: np.ndarray, size: tuple[int, int], smallest_area: float, rng: np.random.Generator
) -> np.ndarray:
  """A random part of an image, of at least `smallest_area` of it and aspect 3/4 to 4/3, resized to `size`.

  Reference: Szegedy et al., 2015.
  """
  height, width = image.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(smallest_area, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return tfds.resize(image, size, (left, top, left + w, top + h))
  return central_crop(image, size)


def central_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The middle of an image, in `size`'s aspect, 7/8 of the largest such part, resized to `size`."""
  height, width = image.shape[:2]
  scale = min(height / size[0], width / size[1]) * _EVAL_SHARE
  h, w = scale * size[0], scale * size[1]
  left, top = (width - w) / 2, (height - h) / 2
  return tfds.resize(image, size, (left, top, left + w, top + h))
