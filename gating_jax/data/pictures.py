"""Pictures of any type as uint8, by one rule:

| type | black | white |
|---|---|---|
| uint8 | 0 | 255 |
| bool | False | True |
| uint16, and files of 16 bits a channel | 0 | 65535 |
| other whole numbers | 0 | 255 |
| floats | 0 | 1 |

Values between are scaled and rounded; values outside, NaN and other types are refused. Never does the range of a single
picture decide on its scale, since a dark picture would be read as a bright one.

Axes: H and W pixels, D channels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

FORMATS = (
  "PNG",
  "JPEG",
  "BMP",
  "GIF",
  "PPM",
  "TIFF",
  "WEBP",
)  # others may start programs to be read
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels

MOST_PIXELS = 1 << 26  # of a file; 8,192 x 8,192

_PNG_BIT_DEPTH = 24  # place of that byte in a file
_WHITE = 255


class TooLargeError(ValueError):
  """A picture has more pixels than are read, as one that was made to fill the memory has."""


def white(dtype: np.dtype) -> int:
  """Returns the value of this type that becomes 255.

  >>> white(np.dtype("uint16")), white(np.dtype("int64")), white(np.dtype("float32"))
  (65535, 255, 1)
  """
  if dtype.kind == "u" and dtype.itemsize == 2:  # of either byte order
    return 65535
  return 1 if dtype.kind in "bf" else _WHITE


def to_uint8(pixels: np.ndarray, name: str = "pixels") -> np.ndarray:
  """Converts pictures by the rule of this module.

  Args:
    pixels: any shape.
    name: of the argument, for the message.
  Returns:
    uint8 of the same shape.
  Raises:
    ValueError: a type without a rule, or values outside its scale; the message has both, and the range seen.

  >>> to_uint8(np.array([0.0, 0.5, 1.0])), to_uint8(np.array([0, 257, 65535], np.uint16))
  (array([  0, 128, 255], dtype=uint8), array([  0,   1, 255], dtype=uint8))
  """
  if pixels.dtype == np.uint8:
    return pixels
  if pixels.dtype.kind not in "biuf":
    raise ValueError(f"{name} must be bool, whole numbers or floats; got {pixels.dtype}")
  top = white(pixels.dtype)
  with np.errstate(over="ignore"):  # what is too large for float32 is outside
    levels = np.round(pixels.astype(np.float32) * (_WHITE / top))
  inside = (levels >= 0) & (levels <= _WHITE)  # not where it is NaN
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
  """Decodes a picture's file to so many channels.

  Palettes become colours, two-coloured pictures black and white. Colours become grey by their luminance, grey ones
  equal colours; transparency is dropped where there are fewer than four channels.

  Args:
    encoded: a file of one of `FORMATS`; of several frames the first is read.
    channels: D: 1, 3 or 4.
  Returns:
    `[H, W, D]` uint8, or the file's own type if it is deeper, such as uint16.
  Raises:
    TooLargeError: more than `MOST_PIXELS`; nothing but the header is read then.
    Exception: whatever Pillow raises for damaged files.
  """
  with _opened(encoded) as picture:
    deep = _is_deep(picture, encoded)
    if picture.mode[0] in "IF":  # one channel of 16 or 32 bits
      grey = np.asarray(picture)
      if deep and grey.dtype != np.uint16 and picture.format in ("PNG", "PPM"):
        grey = grey.astype(np.uint16)  # which some versions of Pillow give as int32
      return np.repeat(grey[..., None], channels, axis=-1)
    if "transparency" in picture.info:
      picture = picture.convert("RGBA")
    pixels = np.asarray(picture.convert(MODES[channels]))
  pixels = pixels.reshape(*pixels.shape[:2], channels)
  # Pillow keeps the upper byte of such colours: 0xFF stands for 0xFFFF.
  return pixels.astype(np.uint16) * 257 if deep else pixels


def decode_numbers(encoded: bytes) -> np.ndarray:
  """Decodes a file whose numbers are no brightness, such as classes: `[H, W, D]`, places in a palette as they are."""
  with _opened(encoded) as picture:
    numbers = np.asarray(picture)
  return numbers.reshape(*numbers.shape[:2], -1)


def _opened(encoded: bytes) -> Image.Image:
  """The picture, of which only the header is read; that may claim more pixels than there is memory for."""
  rule = f"a picture must have at most {MOST_PIXELS} pixels"
  try:
    picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
  except (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:  # of still more; it says how many
    raise TooLargeError(f"{rule}; {error}") from None
  if picture.width * picture.height > MOST_PIXELS:
    raise TooLargeError(f"{rule}; got {picture.width} x {picture.height}")
  return picture


def _is_deep(picture: Image.Image, encoded: bytes) -> bool:
  return picture.mode[0] in "IF" or (picture.format == "PNG" and encoded[_PNG_BIT_DEPTH] == 16)
