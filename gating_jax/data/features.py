"""Readers of the features of a TFDS set: pictures, classes of images, classes of pixels.

A reader is built from a feature, and refuses one that it cannot read before any example is read.
Its `decode` turns what is stored into numbers and fails only on damaged files. Its `convert` turns
these into training data, and refuses values that break a rule. Messages are one line: the feature,
its type, what is accepted, and the setting that chooses another feature.

Pictures of any type become uint8 by one rule, in `to_uint8`:

| type | black | white |
|---|---|---|
| uint8 | 0 | 255 |
| bool | False | True |
| uint16, and files of 16 bits a channel | 0 | 65535 |
| other whole numbers | 0 | 255 |
| floats | 0 | 1 |

Values between are scaled and rounded; values outside, NaN and other types are refused. The range of
a single picture never decides its scale, since a dark picture would be read as a bright one.

Axes: H and W pixels, D channels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from gating_jax.checks import few
from gating_jax.terminal import warn

# To read other formats, Pillow may start programs.
FORMATS = (
  "PNG",
  "JPEG",
  "BMP",
  "GIF",
  "PPM",
  "TIFF",
  "WEBP",
)
# Pillow's modes, by the number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Limit for a file: 8,192 x 8,192.
MOST_PIXELS = 1 << 26

# Parts of a JPEG in which a camera may note how it was held.
_ORIENTED = frozenset(("exif", "xmp"))
# Index of the byte of a PNG file that holds its bit depth.
_PNG_BIT_DEPTH = 24
_WHITE = 255

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
      _element_type(feature) if self.encoded or isinstance(feature, types.Tensor) else None
    )
    numbers = self._dtype is not None and self._dtype.kind in "biuf"
    channels = self.shape[-1] if numbers and len(self.shape) == 3 else None
    # A file is decoded to as many channels as the feature has.
    if not channels or (self.encoded and channels not in MODES):
      raise ValueError(
        f"{name} must be an Image of 1, 3 or 4 channels, or a Tensor of numbers with shape (H, W, "
        f"channels); it is {describe(feature)}. data.image_feature chooses another"
      )

  def decode(self, value: Any) -> np.ndarray:
    """Decodes a file; returns an array as it is."""
    if not self.encoded:
      return np.asarray(value)
    if self._dtype != np.float32:
      return decode_picture(value, self.shape[-1])
    # TFDS stores the four bytes of a float as the four channels of a PNG.
    return np.ascontiguousarray(decode_picture(value, 4)).view(np.float32)

  def convert(self, pixels: np.ndarray) -> np.ndarray:
    """Converts a decoded picture to uint8, by the rule of `to_uint8`."""
    for own, wanted in zip(pixels.shape, self.shape, strict=True):
      if wanted not in (None, own):
        raise ValueError(f"{self._name} must have shape {self.shape}; got {pixels.shape}")
    return to_uint8(pixels, self._name)

  def check_scale(self, decoded: Iterable[np.ndarray]) -> None:
    """Refuses pictures that do not use the scale of their type and would be almost black.

    Examples are 12 bits in a uint16, and uint8 in which 1 or 16 is white. All-black pictures fit
    any scale.

    Args:
      decoded: some pictures of the set, enough that not all are dark.
    Raises:
      ValueError: as in `check_scale`.
    """
    ranges = []
    for pixels in decoded:
      if pixels.size:
        ranges.append(np.array([pixels.min(), pixels.max()], pixels.dtype))
    check_scale(
      ranges,
      self._name,
      "Prepare the data set with uint8 images (255 is white), or set another feature in "
      "data.image_feature",
    )


class PixelClasses:
  """Reader of a class for every pixel as uint8 `[H, W, 1]`; the numbers stay as they are.

  Raises:
    ValueError: a feature that does not hold whole numbers of shape `(H, W, 1)`.
  """

  def __init__(self, feature: Any, name: str):
    from tensorflow_datasets import features as types

    self._name, shape = name, feature.shape
    self.encoded = isinstance(feature, types.Image)
    known = self.encoded or isinstance(feature, types.Tensor)
    one_channel = known and len(shape) == 3 and shape[-1] == 1
    if not one_channel or _element_type(feature).kind not in "biu":
      raise ValueError(
        f"{name} must be an Image or a Tensor of whole numbers with shape (H, W, 1); it is "
        f"{describe(feature)}"
      )

  def decode(self, value: Any) -> np.ndarray:
    """Decodes a file; returns an array as it is."""
    return decode_numbers(value) if self.encoded else np.asarray(value)

  def convert(self, classes: np.ndarray) -> np.ndarray:
    """Checks decoded classes and returns them as uint8."""
    if classes.shape[-1] != 1:
      raise ValueError(f"{self._name} must have one channel; got shape {classes.shape}")
    if classes.size and not 0 <= classes.min() <= classes.max() <= 255:
      raise ValueError(f"{self._name} must hold classes in 0 .. 255; got {span(classes)}")
    return classes.astype(np.uint8)


class ImageClass:
  """Reader of an image's class: an int, `UNLABELLED` where there is none.

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
    kind = _element_type(feature).kind if single else ""
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
    if not self._learnt and self.class_names is not None:
      return int(value) if 0 <= value < len(self.class_names) else UNLABELLED
    label = self._label(value)
    if label is None:
      raise ValueError(
        f"{self._name} must be a whole number from 0 or a text; got {value!r}, so the image has no "
        "class. Use another split, or choose another feature by data.label_feature"
      )
    return self._places[label] if isinstance(label, bytes) else label

  def learn(self, labels: Mapping[str, Iterable[Any]]) -> None:
    """Counts and names the classes, and logs them.

    Args:
      labels: the values of all images, by split, so that all splits agree.
    Raises:
      ValueError: there are none, or the numbers are not class numbers.
    """
    # Over all splits, so that a class has the same number in each.
    found = set()
    for split, values in labels.items():
      of_split, without = self._count(values)
      found |= of_split
      if without:
        warn(
          "%s: %d images of split %r have no class (%s)",
          self._name,
          without,
          split,
          "an empty text or none" if self._texts else "a negative number or none",
        )
    seen = sorted(found)
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

  def _check_gaps(self, seen: Sequence[int]) -> None:
    """Refuses identifiers, such as file numbers: whole numbers that leave many gaps."""
    gaps = seen[-1] + 1 - len(seen)
    if gaps > _MOST_GAPS:
      raise ValueError(
        f"{self._name} must number classes from 0 with at most {_MOST_GAPS} gaps, or be a "
        f"ClassLabel or a text; it is {self._type}, {len(seen)} numbers from {seen[0]} to "
        f"{seen[-1]}. data.label_feature chooses another"
      )
    if gaps:
      missing = [str(number) for number in sorted(set(range(seen[-1])) - set(seen))]
      warn("%s: no image has class %s, of %d", self._name, few(missing), seen[-1] + 1)


class TooLargeError(ValueError):
  """Error for a picture of more pixels than are read, such as one made to fill the memory."""


def check_scale(ranges: Iterable[np.ndarray], name: str, advice: str) -> None:
  """Refuses pictures that do not use the scale of their type and would be almost black.

  All-black pictures fit any scale.

  Args:
    ranges: the smallest and the largest value of each picture, `[2]` of its type.
    name: of the pictures, for the message.
    advice: the end of the message.
  Raises:
    ValueError: values are outside their scale; or none reaches half of white where they are whole
      numbers other than uint8, or more than a sixteenth where they are of another type.

  >>> check_scale([np.array([0, 4095], np.uint16)], "pictures", "Scale them")
  Traceback (most recent call last):
  ValueError: pictures of uint16 must reach the upper half of its scale, in which 65535 is white; \
  got values from 0 to 4095 in 1 images, which would be too dark. Scale them
  """
  # By type: a set may mix files of 8 and of 16 bits, each with a scale of its own.
  of_type: dict[np.dtype, list] = {}
  for extremes in ranges:
    of_type.setdefault(extremes.dtype, []).append(extremes)
  for found in of_type.values():
    seen = np.array(found)
    # The extremes show whether the scale is used; they are converted as the pictures will be.
    brightest = to_uint8(seen, name).max()
    wide = seen.dtype.kind in "iu" and seen.dtype != np.uint8
    if seen.any() and brightest <= (_HALF if wide else _DARK):
      part = "the upper half of its scale" if wide else "more than a sixteenth of its scale"
      raise ValueError(
        f"{name} of {seen.dtype} must reach {part}, in which {white(seen.dtype)} is white; "
        f"got {span(seen)} in {len(seen)} images, which would be too dark. {advice}"
      )


def white(dtype: np.dtype) -> int:
  """Returns the value of this type that becomes 255.

  Args:
    dtype: type of the pixels.

  >>> white(np.dtype("uint16")), white(np.dtype("int64")), white(np.dtype("float32"))
  (65535, 255, 1)
  """
  # By size and not by equality: big-endian uint16 is another dtype.
  if dtype.kind == "u" and dtype.itemsize == 2:
    return 65535
  return 1 if dtype.kind in "bf" else _WHITE


def to_uint8(pixels: np.ndarray, name: str = "pixels") -> np.ndarray:
  """Converts pictures to uint8 by the rule of this module's table.

  Args:
    pixels: any shape.
    name: of the argument, for the message.
  Returns:
    uint8 of the same shape.
  Raises:
    ValueError: a type without a rule, or values outside its scale; the message has both, and the
      range seen.

  >>> to_uint8(np.array([0.0, 0.5, 1.0])), to_uint8(np.array([0, 257, 65535], np.uint16))
  (array([  0, 128, 255], dtype=uint8), array([  0,   1, 255], dtype=uint8))
  """
  if pixels.dtype == np.uint8:
    return pixels
  if pixels.dtype.kind not in "biuf":
    raise ValueError(f"{name} must be bool, whole numbers or floats; got {pixels.dtype}")
  top = white(pixels.dtype)
  # Values too large for float32 become infinite, which is outside the scale; NaN is never inside.
  with np.errstate(over="ignore"):
    levels = np.round(pixels.astype(np.float32) * (_WHITE / top))
  inside = (levels >= 0) & (levels <= _WHITE)
  if not inside.all():
    raise ValueError(
      f"{name} of {pixels.dtype} must be in [0, {top}], from black to white; got {span(pixels)}"
    )
  return levels.astype(np.uint8)


def span(pixels: np.ndarray) -> str:
  """Describes the range of values, for messages.

  >>> span(np.array([0.5, -1.0]))
  'values from -1 to 0.5'
  """
  if not np.isfinite(pixels).all():
    return "values that are not finite"
  return f"values from {pixels.min():.6g} to {pixels.max():.6g}"


def decode_picture(
  encoded: bytes, channels: int, *, upright: bool = False, on_white: bool = False
) -> np.ndarray:
  """Decodes a picture's file to `channels` channels.

  Palettes become colours, two-coloured pictures black and white. Colours become grey by their
  luminance, grey becomes equal colours; transparency is dropped where there are fewer than four
  channels, unless the picture is laid on white.

  Args:
    encoded: a file of one of `FORMATS`; of several frames the first is read.
    channels: D: 1, 3 or 4.
    upright: whether a picture is turned as its camera noted (EXIF).
    on_white: whether white shows through what is transparent, in any mode that a file has.
  Returns:
    `[H, W, D]` uint8, or the file's own type if it is deeper, such as uint16.
  Raises:
    TooLargeError: more than `MOST_PIXELS`; only the header is read then.
    Exception: any error of Pillow for damaged files.
  """
  with _opened(encoded) as picture:
    # Most photographs need nothing of what follows, which takes a seventh of their time.
    if channels == 3 and picture.mode == "RGB" and _is_plain_jpeg(picture):
      return np.asarray(picture)
    deep = _is_deep(picture, encoded)
    if upright:
      # Without a note nothing is copied.
      ImageOps.exif_transpose(picture, in_place=True)
    # Modes I and F have one channel, of 16 or 32 bits.
    if picture.mode[0] in "IF":
      grey = np.asarray(picture)
      # Some versions of Pillow give the uint16 of these formats as int32.
      if deep and grey.dtype != np.uint16 and picture.format in ("PNG", "PPM"):
        grey = grey.astype(np.uint16)
      if on_white and "transparency" in picture.info:
        grey = np.where(grey == picture.info["transparency"], white(grey.dtype), grey)
      return np.repeat(grey[..., None], channels, axis=-1)
    if "transparency" in picture.info or (on_white and picture.has_transparency_data):
      picture = picture.convert("RGBA")
    if on_white and picture.mode == "RGBA":
      picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    pixels = np.asarray(picture.convert(MODES[channels]))
  pixels = pixels.reshape(*pixels.shape[:2], channels)
  # Pillow keeps only the upper byte of 16-bit colours; times 257, 0xFF becomes 0xFFFF.
  return pixels.astype(np.uint16) * 257 if deep else pixels


def decode_numbers(encoded: bytes) -> np.ndarray:
  """Decodes a file whose numbers are no brightness, such as classes, to `[H, W, D]`.

  Indices into a palette stay as they are.
  """
  with _opened(encoded) as picture:
    numbers = np.asarray(picture)
  return numbers.reshape(*numbers.shape[:2], -1)


def _opened(encoded: bytes) -> Image.Image:
  """Opens a picture and reads its header only, which may claim more pixels than fit in memory."""
  rule = f"a picture must have at most {MOST_PIXELS} pixels"
  try:
    picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
  # Pillow's own limit is higher; its message holds the number of pixels.
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise TooLargeError(f"{rule}; {error}") from None
  if picture.width * picture.height > MOST_PIXELS:
    raise TooLargeError(f"{rule}; got {picture.width} x {picture.height}")
  return picture


def _is_plain_jpeg(picture: Image.Image) -> bool:
  """Returns whether a picture is a JPEG without a note by which it might have to be turned."""
  return picture.format == "JPEG" and _ORIENTED.isdisjoint(picture.info)


def _is_deep(picture: Image.Image, encoded: bytes) -> bool:
  """Returns whether a channel has more than 8 bits."""
  # Pillow shows 16-bit colours of a PNG as 8-bit ones.
  return picture.mode[0] in "IF" or (picture.format == "PNG" and encoded[_PNG_BIT_DEPTH] == 16)


def _element_type(feature: Any) -> np.dtype:
  """Returns the type of the numbers of an `Image` or a `Tensor`."""
  return np.dtype(feature.np_dtype)
