"""Readers of the features of a TFDS set: pictures, classes of images, classes of pixels.

A reader is built from a feature, and refuses one that it cannot read before any example is read.
Its `decode` turns what is stored into numbers and fails only on damaged files. Its `convert` turns
these into training data, and refuses values that break a rule. Messages are one line: the feature,
its type, what is accepted, and the setting that chooses another feature.

Axes: H and W pixels, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gating_jax.checks import few
from gating_jax.data import pictures
from gating_jax.terminal import warn

# Number of pictures of a split whose scale is checked.
SAMPLE = 16
UNLABELLED = -1

# Levels of uint8: half of white, and the brightest that looks black.
_HALF, _DARK = 127, 16
# Largest number of classes below the largest label that no image has; more are no class numbers.
_MOST_GAPS = 1000


def describe(feature: Any) -> str:
  """Describes a feature's type on one line.

  Examples are `Scalar of float32` and `Sequence of ClassLabel of int64`.
  """
  # Imported here and in the readers, since the import is slow.
  from tensorflow_datasets import features as types

  kind = type(feature).__name__
  if isinstance(feature, types.FeaturesDict):
    return f"{kind} of {', '.join(feature)}"
  if isinstance(feature, types.Sequence):
    return f"{kind} of {describe(feature.feature)}"
  if isinstance(feature, types.Text):
    return kind
  shape = f", shape {feature.shape}" if feature.shape else ""
  return f"{kind} of {np.dtype(feature.np_dtype).name}{shape}"


class Picture:
  """Reader of a picture as uint8 `[H, W, D]`.

  Attributes:
    shape: `(H, W, D)`; None for a size that differs between images.
    encoded: whether examples hold files.

  Raises:
    ValueError: a feature that holds no picture.
  """

  def __init__(self, feature: Any, name: str):
    from tensorflow_datasets import features as types

    self._name, self.shape = name, feature.shape
    self.encoded = isinstance(feature, types.Image)
    self._dtype = (
      np.dtype(feature.np_dtype) if self.encoded or isinstance(feature, types.Tensor) else None
    )
    known = (
      self._dtype is not None
      and self._dtype.kind in "biuf"
      and len(self.shape) == 3
      and self.shape[-1]
    )
    if not known or (self.encoded and self.shape[-1] not in pictures.MODES):
      raise ValueError(
        f"{name} must be an Image of 1, 3 or 4 channels, or a Tensor of numbers with shape (H, W, "
        f"channels); it is {describe(feature)}. data.image_feature chooses another"
      )

  def decode(self, value: Any) -> np.ndarray:
    """Decodes a file; returns an array as it is."""
    if not self.encoded:
      return np.asarray(value)
    if self._dtype != np.float32:
      return pictures.decode(value, self.shape[-1])
    # TFDS stores the four bytes of a float as the four channels of a PNG.
    return np.ascontiguousarray(pictures.decode(value, 4)).view(np.float32)

  def convert(self, pixels: np.ndarray) -> np.ndarray:
    """Converts a decoded picture to uint8, by the rule of `data/pictures.py`."""
    for own, wanted in zip(pixels.shape, self.shape, strict=True):
      if wanted not in (None, own):
        raise ValueError(f"{self._name} must have shape {self.shape}; got {pixels.shape}")
    return pictures.to_uint8(pixels, self._name)

  def check_scale(self, decoded: Iterable[np.ndarray]) -> None:
    """Refuses pictures that do not use the scale of their type and would be almost black.

    Examples are 12 bits in a uint16, and uint8 in which 1 or 16 is white. All-black pictures fit
    any scale.

    Args:
      decoded: some pictures of the set, enough that not all are dark.
    Raises:
      ValueError: values are outside their scale; or none reaches half of white where they are whole
        numbers other than uint8, or more than a sixteenth where they are of another type.
    """
    # By type: a set may mix files of 8 and of 16 bits, each with a scale of its own.
    ranges: dict[np.dtype, list] = {}
    for pixels in decoded:
      if pixels.size:
        ranges.setdefault(pixels.dtype, []).append([pixels.min(), pixels.max()])
    for found in ranges.values():
      seen = np.array(found)
      # The extremes show whether the scale is used; they are converted as the pictures will be.
      brightest = pictures.to_uint8(seen, self._name).max()
      wide = seen.dtype.kind in "iu" and seen.dtype != np.uint8
      if seen.any() and brightest <= (_HALF if wide else _DARK):
        part = "the upper half of its scale" if wide else "more than a sixteenth of its scale"
        raise ValueError(
          f"{self._name} of {seen.dtype} must reach {part}, in which {pictures.white(seen.dtype)} "
          "is white; got "
          f"{pictures.span(seen)} in {len(seen)} images, which would be too dark. Prepare the data "
          "set with uint8 images (255 is white), or set another feature in data.image_feature"
        )


class PixelClasses:
  """Reader of a class for every pixel as uint8 `[H, W, 1]`; the numbers stay as they are.

  Raises:
    ValueError: a feature that does not hold whole numbers of shape `(H, W, 1)`.
  """

  def __init__(self, feature: Any, name: str):
    from tensorflow_datasets import features as types

    self._name = name
    self.encoded = isinstance(feature, types.Image)
    known = self.encoded or isinstance(feature, types.Tensor)
    if (
      not known
      or len(feature.shape) != 3
      or feature.shape[-1] != 1
      or np.dtype(feature.np_dtype).kind not in "biu"
    ):
      raise ValueError(
        f"{name} must be an Image or a Tensor of whole numbers with shape (H, W, 1); it is "
        f"{describe(feature)}"
      )

  def decode(self, value: Any) -> np.ndarray:
    """Decodes a file; returns an array as it is."""
    return pictures.decode_numbers(value) if self.encoded else np.asarray(value)

  def convert(self, classes: np.ndarray) -> np.ndarray:
    """Checks decoded classes and returns them as uint8."""
    if classes.shape[-1] != 1:
      raise ValueError(f"{self._name} must have one channel; got shape {classes.shape}")
    if classes.size and not 0 <= classes.min() <= classes.max() <= 255:
      raise ValueError(f"{self._name} must hold classes in 0 .. 255; got {pictures.span(classes)}")
    return classes.astype(np.uint8)


class ImageClass:
  """Reader of the class of an image as an int, `UNLABELLED` where it has none.

  A ClassLabel has names, and -1 where there is no label. Whole numbers are classes from 0 to the
  largest, with the numbers as names. Texts are classes in their sorted order. Negative numbers and
  empty texts are no classes and are refused.

  Attributes:
    class_names: one per class; None until `learn` has seen the labels.

  Raises:
    ValueError: a feature that does not hold one class per image.
  """

  encoded = False

  def __init__(self, feature: Any, name: str):
    from tensorflow_datasets import features as types

    self._name, self._type = name, describe(feature)
    self.class_names: tuple[str, ...] | None = None
    # The class of each text.
    self._places: dict[bytes, int] = {}
    single = isinstance(feature, types.Tensor) and feature.shape == ()
    kind = np.dtype(feature.np_dtype).kind if single else ""
    self._texts = kind in "OSU" and single
    if isinstance(feature, types.ClassLabel) and feature.num_classes:
      self.class_names = tuple(feature.names)
    elif kind not in "biuOSU" or not single:
      raise ValueError(
        f"{name} must hold one class per image, as a ClassLabel, a whole number or a text; it is "
        f"{self._type}. data.label_feature chooses another"
      )
    # Without names the classes follow from the labels of all images.
    self._learnt = self.class_names is None

  def decode(self, value: Any) -> Any:
    """Returns a label as it is."""
    return value

  def convert(self, value: Any) -> int:
    """Returns the class of a label."""
    if not self._learnt:
      return int(value) if 0 <= value < len(self.class_names) else UNLABELLED
    label = self._label(value)
    if label is None:
      raise ValueError(
        f"{self._name} must be a whole number from 0 or a text; got {value!r}, so the image has no "
        "class. Use another split, or choose another feature by data.label_feature"
      )
    return self._places[label] if self._texts else label

  def learn(self, labels: Mapping[str, Iterable[Any]]) -> None:
    """Counts and names the classes, and logs them.

    Args:
      labels: the values of all images, by split, so that all splits agree.
    Raises:
      ValueError: there are none, or the numbers are not class numbers.
    """
    counted = {split: self._count(values) for split, values in labels.items()}
    for split, (_, without) in counted.items():
      if without:
        warn(
          "%s: %d images of split %r have no class (%s)",
          self._name,
          without,
          split,
          "an empty text or none" if self._texts else "a negative number or none",
        )
    # Over all splits, so that a class has the same number in each.
    seen = sorted({label for found, _ in counted.values() for label in found})
    if not seen:
      raise ValueError(
        f"{self._name} must hold a class per image; it is {self._type}, and all are "
        f"{'empty' if self._texts else 'negative'} or none. data.label_feature chooses another"
      )
    if self._texts:
      self._places = {label: i for i, label in enumerate(seen)}
      # Bytes that are not UTF-8 still give a printable name.
      self.class_names = tuple(label.decode("utf-8", "backslashreplace") for label in seen)
    else:
      self._check_gaps(seen)
      self.class_names = tuple(map(str, range(seen[-1] + 1)))
    warn(
      "%s is %s, read as %d classes: %s",
      self._name,
      self._type,
      len(self.class_names),
      few(self.class_names),
    )

  def _count(self, values: Iterable[Any]) -> tuple[set, int]:
    """Returns the set of classes among labels, and the number of labels that are no class."""
    found, without = set(), 0
    for label in map(self._label, values):
      if label is None:
        without += 1
      else:
        found.add(label)
    return found, without

  def _label(self, value: Any) -> bytes | int | None:
    """Returns the value as it is counted; None where it is no class."""
    if value is None:
      return None
    if self._texts:
      return (value.encode() if isinstance(value, str) else bytes(value)) or None
    return int(value) if value >= 0 else None

  # Identifiers, such as file numbers, are whole numbers too; they leave many gaps.
  def _check_gaps(self, seen: Sequence[int]) -> None:
    gaps = seen[-1] + 1 - len(seen)
    if gaps > _MOST_GAPS:
      raise ValueError(
        f"{self._name} must number classes from 0 with at most {_MOST_GAPS} gaps, or be a "
        "ClassLabel or a text; it "
        f"is {self._type}, {len(seen)} numbers from {seen[0]} to {seen[-1]}. data.label_feature "
        "chooses another"
      )
    if gaps:
      missing = [str(number) for number in sorted(set(range(seen[-1])) - set(seen))]
      warn("%s: no image has class %s, of %d", self._name, few(missing), seen[-1] + 1)
