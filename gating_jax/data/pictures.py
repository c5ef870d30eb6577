"""Conversion of pictures of any type to uint8, by one rule.

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

import numpy as np
from PIL import Image

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

# Index of the byte of a PNG file that holds its bit depth.
_PNG_BIT_DEPTH = 24
_WHITE = 255


class TooLargeError(ValueError):
  """Error for a picture of more pixels than are read, such as one made to fill the memory."""


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
  """Converts pictures to uint8 by the rule of this module.

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


def decode(encoded: bytes, channels: int) -> np.ndarray:
  """Decodes a picture's file to `channels` channels.

  Palettes become colours, two-coloured pictures black and white. Colours become grey by their
  luminance, grey becomes equal colours; transparency is dropped where there are fewer than four
  channels.

  Args:
    encoded: a file of one of `FORMATS`; of several frames the first is read.
    channels: D: 1, 3 or 4.
  Returns:
    `[H, W, D]` uint8, or the file's own type if it is deeper, such as uint16.
  Raises:
    TooLargeError: more than `MOST_PIXELS`; only the header is read then.
    Exception: any error of Pillow for damaged files.
  """
  with _opened(encoded) as picture:
    deep = _is_deep(picture, encoded)
    # Modes I and F have one channel, of 16 or 32 bits.
    if picture.mode[0] in "IF":
      grey = np.asarray(picture)
      # Some versions of Pillow give the uint16 of these formats as int32.
      if deep and grey.dtype != np.uint16 and picture.format in ("PNG", "PPM"):
        grey = grey.astype(np.uint16)
      return np.repeat(grey[..., None], channels, axis=-1)
    if "transparency" in picture.info:
      picture = picture.convert("RGBA")
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


# Whether a channel has more than 8 bits. Pillow shows 16-bit colours of a PNG as 8-bit ones.
def _is_deep(picture: Image.Image, encoded: bytes) -> bool:
  return picture.mode[0] in "IF" or (picture.format == "PNG" and encoded[_PNG_BIT_DEPTH] == 16)
