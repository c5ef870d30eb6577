"""Images with a class for every pixel: scenes of handwritten digits, or Cityscapes through TFDS.

The digits are scikit-learn's. Labels are uint8, `IGNORED` where a pixel does not count.

Axes: M scenes, H and W pixels, D channels.
Reference: Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", 2016.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from gating_jax.data import features, image_sets, streaming, tfds
from gating_jax.data.image_sets import Images

MADE, CITYSCAPES = "digit_scenes", "cityscapes"
NAMES = (MADE, CITYSCAPES)
IGNORED = 255

# Names of TFDS's features.
_IMAGE, _LABEL = "image_left", "segmentation_label"
# Lowest brightness of a digit's pixel, and standard deviation of the noise on all pixels.
_INK = 64
_NOISE = 16
# name: Cityscapes' own number of the class; these 19 are scored in its benchmark
_STREET = {
  "road": 7,
  "sidewalk": 8,
  "building": 11,
  "wall": 12,
  "fence": 13,
  "pole": 17,
  "traffic light": 19,
  "traffic sign": 20,
  "vegetation": 21,
  "terrain": 22,
  "sky": 23,
  "person": 24,
  "rider": 25,
  "car": 26,
  "truck": 27,
  "bus": 28,
  "train": 31,
  "motorcycle": 32,
  "bicycle": 33,
}


def make_scenes(
  split: str, *, scenes: int, size: tuple[int, int], most: int, seed: int = 0
) -> Images:
  """Makes a split of scenes: digits of 8 x 8 pixels at random places in noise, none overlapping.

  The same arguments make the same scenes. Splits share no digit image.

  Args:
    split: `train` or `test`.
    scenes: M.
    size: H and W, each at least 8.
    most: largest number of digits of a scene, drawn from 1 to this; fewer where there is no room
      left.
    seed: of everything random.
  Returns:
    Images with labels `[M, H, W]`: 1 + the digit's class where it has ink, 0 for the background.
  Raises:
    ValueError: scenes, size or most below its least value.

  >>> made = make_scenes("test", scenes=2, size=(24, 32), most=3)
  >>> made.pixels.shape, made.labels.shape, made.class_names[:3]
  ((2, 24, 32, 1), (2, 24, 32), ('background', '0', '1'))
  """
  digits = image_sets.load(image_sets.SetSource(image_sets.DIGITS, split))
  side = digits.shape[0]
  for name, value, least in (("scenes", scenes, 1), ("size", min(size), side), ("most", most, 1)):
    if value < least:
      raise ValueError(f"{name} must be >= {least}; got {value}")
  rng = np.random.default_rng((seed, split == "test"))
  ink = np.zeros((scenes, *size))
  labels = np.zeros((scenes, *size), np.uint8)
  for scene in range(scenes):
    # Top left corners that a digit can still have.
    free = np.ones((size[0] - side + 1, size[1] - side + 1), bool)
    for shown in rng.integers(len(digits), size=rng.integers(1, most + 1)):
      if not free.any():
        break
      top, left = rng.choice(np.argwhere(free))
      place = (scene, slice(top, top + side), slice(left, left + side))
      ink[place] = digits.pixels[shown, ..., 0]
      # The dark pixels around a digit's strokes are background.
      labels[place] = np.where(ink[place] >= _INK, digits.labels[shown] + 1, 0)
      # Corners nearer than a side in both directions would overlap with this digit.
      first_row, first_column = max(0, top - side + 1), max(0, left - side + 1)
      free[first_row : top + side, first_column : left + side] = False
  pixels = (ink + _NOISE * rng.standard_normal(ink.shape)).round().clip(0, 255).astype(np.uint8)
  return Images(pixels[..., None], labels, ("background", *digits.class_names))


@dataclasses.dataclass(frozen=True)
class Scenes(streaming.Stream):
  """Split of Cityscapes on disk, loaded as a `Stream`.

  Attributes:
    size: H and W that every scene is resized to, images bilinearly, labels to the nearest pixel.
    flip: whether to mirror half of the scenes in training. Training sees a random crop of `shape`
      of each scene.
  """

  size: tuple[int, int] = dataclasses.field(kw_only=True)
  flip: bool = False

  def read_one(self, index: int, seed: tuple[int, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns a scene `[H, W, D]` and its classes `[H, W]`, cropped and mirrored by the seed."""
    example = self.source[int(index)]
    image = _resize(example[_IMAGE], self.size, Image.Resampling.BILINEAR)
    classes = train_classes(_resize(example[_LABEL][..., 0], self.size, Image.Resampling.NEAREST))
    if seed is not None:
      rng = np.random.default_rng(seed)
      height, width = self.shape[:2]
      top = rng.integers(self.size[0] - height + 1)
      left = rng.integers(self.size[1] - width + 1)
      step = -1 if self.flip and rng.random() < 0.5 else 1
      # Image and classes are cropped and mirrored alike.
      part = (slice(top, top + height), slice(left, left + width))
      image, classes = image[part][:, ::step], classes[part][:, ::step]
    # Mirrored and cropped arrays are views with strides.
    return np.ascontiguousarray(image), np.ascontiguousarray(classes)


def open_scenes(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  size: tuple[int, int],
  seed: int = 0,
  workers: int = 0,
  crop: tuple[int, int] | None = None,
  flip: bool = False,
) -> Scenes:
  """Opens `cityscapes` as TFDS prepared it.

  Errors are as in `image_sets.load`. The message for a set that is not prepared has TFDS's own
  instructions on what to download by hand.

  Args:
    name, split, data_dir: as in `image_sets.SetSource`; the labelled split for tests is
      `validation`.
    crop: H and W of the random parts seen in training; None for the whole scene.
    size, flip, seed, workers: see `Scenes` and `Stream`.
  """
  readers = {_IMAGE: features.Picture, _LABEL: features.PixelClasses}
  source = tfds.open_tfds(name, split, data_dir, readers=readers)
  shape = (*(crop or size), 3)
  return Scenes(source, tuple(_STREET), shape, seed=seed, workers=workers, size=size, flip=flip)


def train_classes(labels: np.ndarray) -> np.ndarray:
  """Maps Cityscapes' own numbers to the 19 trained and scored classes, others to `IGNORED`.

  >>> train_classes(np.array([7, 33, 0, 255], np.uint8)).tolist()
  [0, 18, 255, 255]
  """
  # A table of all uint8 values: one look-up per pixel.
  table = np.full(256, IGNORED, np.uint8)
  table[list(_STREET.values())] = np.arange(len(_STREET))
  return table[labels]


def _resize(x: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
  """Resizes `[H, W, ...]` to `size`, height and width; not resampled where it has this size."""
  if x.shape[:2] == size:
    return x
  return np.asarray(Image.fromarray(x).resize((size[1], size[0]), how))
