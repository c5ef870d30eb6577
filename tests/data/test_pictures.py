import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gating_jax.data import pictures
from tests.helpers.made_tables import refused
from tests.helpers.made_tfds import encoded

RAMP = np.linspace(0, 1, 4 * 4 * 3).reshape(4, 4, 3)  # from black to white
BYTES = np.round(RAMP * 255).astype(np.uint8)
DEEP = np.round(RAMP * 65535).astype(np.uint16)


@pytest.mark.parametrize(
  ("dtype", "white"),
  [
    ("uint8", 255),
    ("uint16", 65535),
    (">u2", 65535),
    ("float16", 1),
    ("float32", 1),
    ("float64", 1),
    ("int16", 255),
    ("int32", 255),
    ("uint32", 255),
    ("int64", 255),
    ("uint64", 255),
  ],
)
def test_black_to_white_of_every_type_is_0_to_255(dtype, white):
  scaled = RAMP * white
  pixels = (np.round(scaled) if white > 1 else scaled).astype(dtype)
  read = pictures.to_uint8(pixels)
  assert (read.dtype, read.shape) == (np.uint8, RAMP.shape)
  assert np.abs(read - RAMP * 255).max() <= 1
  assert (read.min(), read.max()) == (0, 255)


def test_bools_are_black_and_white():
  assert pictures.to_uint8(np.array([False, True])).tolist() == [0, 255]


def test_uint8_stays_as_it_is():
  assert pictures.to_uint8(BYTES) is BYTES


def test_floats_that_round_to_a_level_are_read():
  assert pictures.to_uint8(np.array([-1e-6, 1 + 1e-6, 1 / 255])).tolist() == [0, 255, 1]


@pytest.mark.parametrize(
  ("pixels", "message"),
  [
    (
      np.array([0.0, 255.0], np.float32),
      "image of float32 must be in [0, 1], from black to white; got values from 0 to 255",
    ),
    (
      np.array([-1.0, 1.0]),
      "image of float64 must be in [0, 1], from black to white; got values from -1 to 1",
    ),
    (np.array([0.0, 1e300]), "got values from 0 to 1e+300"),
    (np.array([0.5, np.nan]), "got values that are not finite"),
    (np.array([0.5, np.inf], np.float16), "got values that are not finite"),
    (
      np.array([0, 256], np.int32),
      "image of int32 must be in [0, 255], from black to white; got values from 0 to 256",
    ),
    (np.array([-1, 7], np.int64), "got values from -1 to 7"),
    (np.array([2**40], np.uint64), "got values from 1.09951e+12 to 1.09951e+12"),
    (np.array([1j]), "image must be bool, whole numbers or floats; got complex128"),
    (np.array(["a"]), "image must be bool, whole numbers or floats; got <U1"),
  ],
)
def test_what_has_no_scale_is_refused_with_type_and_range(pixels, message):
  with refused(message):
    pictures.to_uint8(pixels, "image")


def decoded(picture, channels, kind="PNG", **options):
  file = encoded(picture, kind, **options).getvalue()
  return pictures.decode(file, channels)


GREY = np.asarray(Image.fromarray(BYTES).convert("L"))[..., None]


@pytest.mark.parametrize(
  ("picture", "channels", "expected"),
  [
    (BYTES, 3, BYTES),
    (BYTES, 1, GREY),
    (BYTES[..., 0], 1, BYTES[..., :1]),
    (BYTES[..., 0], 3, BYTES[..., :1].repeat(3, axis=-1)),
    (np.dstack([BYTES, BYTES[..., 0]]), 4, np.dstack([BYTES, BYTES[..., 0]])),
    (np.dstack([BYTES, BYTES[..., 0]]), 3, BYTES),
    (np.dstack([BYTES[..., 0], BYTES[..., 1]]), 1, BYTES[..., :1]),
    (BYTES[..., 0] > 127, 1, 255 * (BYTES[..., :1] > 127)),
    (Image.fromarray(BYTES).quantize(), 3, BYTES),
  ],
  ids=[
    "RGB",
    "RGB to grey",
    "grey",
    "grey to RGB",
    "RGBA",
    "RGBA to RGB",
    "grey with alpha",
    "1 bit",
    "palette",
  ],
)
def test_files_of_every_mode_are_read_as_they_look(picture, channels, expected):
  np.testing.assert_array_equal(decoded(picture, channels), expected)


def test_a_palette_with_transparency_is_read_without_a_warning():
  np.testing.assert_array_equal(
    decoded(Image.fromarray(BYTES).quantize(), 3, transparency=b"\x00\x50"), BYTES
  )


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
def test_other_kinds_of_files_are_read(kind):
  even = np.full((4, 4, 3), 90, np.uint8)
  np.testing.assert_array_equal(decoded(even, 3, kind), even)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_16_bits_keep_them(kind, channels):
  read = decoded(DEEP[..., 0], channels, kind)
  np.testing.assert_array_equal(read, DEEP[..., :1].repeat(channels, axis=-1))
  assert read.dtype == np.uint16


def deep_colours(levels, size=None):
  """Makes a 16-bit RGB PNG, which Pillow does not write; its header may claim another size."""
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
  height, width = size or levels.shape[:2]
  chunk = lambda name, body: (
    struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
  )
  header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


def test_colours_of_16_bits_are_of_the_same_scale():
  read = pictures.decode(deep_colours(DEEP), 3)
  assert read.dtype == np.uint16
  assert np.abs(pictures.to_uint8(read) - RAMP * 255).max() <= 1


def test_classes_of_a_palette_are_its_places():
  picture = Image.fromarray(np.array([[3, 0], [1, 2]], np.uint8), "L").convert("P")
  picture.putpalette(bytes(range(12, 24)))
  assert pictures.decode_numbers(encoded(picture).getvalue())[..., 0].tolist() == [[3, 0], [1, 2]]


def test_a_file_that_would_start_a_program_is_not_read():
  file = io.BytesIO()
  Image.fromarray(BYTES).save(file, "EPS")  # which Ghostscript reads
  with pytest.raises(Image.UnidentifiedImageError):
    pictures.decode(file.getvalue(), 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
  ("size", "got"),
  [
    ((8193, 8192), "got 8192 x 8193"),
    ((10_000, 10_000), "got 10000 x 10000"),
    ((20_000, 20_000), "Image size (400000000 pixels)"),
  ],
)
def test_a_file_of_too_many_pixels_is_refused_before_memory_is_taken(size, got):
  with refused(f"a picture must have at most 67108864 pixels; {got}"):
    pictures.decode(deep_colours(DEEP, size), 3)
