import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gating_jax.data import features, image_sets, streaming
from gating_jax.data import tfds as tfds_sets
from gating_jax.data.image_sets import SetSource
from gating_jax.data.tfds import DatasetNotPreparedError
from tests.helpers import made_tfds
from tests.helpers.made_tables import refused
from tests.helpers.made_tfds import encoded

TYPES = tfds.features
RAMP = np.linspace(0, 1, 4 * 4 * 4 * 3).reshape(4, 4, 4, 3)  # four images, of brightness 0 to 1
LOADERS = {"resident": image_sets.load, "streaming": streaming.open_stream}
SETS = iter(range(100))
LEVELS = np.linspace(0, 1, 4 * 4 * 3).reshape(4, 4, 3)  # from black to white
BYTES = np.round(LEVELS * 255).astype(np.uint8)
DEEP = np.round(LEVELS * 65535).astype(np.uint16)


def tensor(dtype, shape=(4, 4, 3)):
  return TYPES.Tensor(shape=shape, dtype=np.dtype(dtype))


PIXEL, LABELS = tensor("uint8", (1, 1, 1)), TYPES.ClassLabel(num_classes=2)


def made(folder, image, label, examples, **splits):
  """Prepares a set of `(image, label)` and returns its name."""
  name = f"features_set{next(SETS)}"
  as_dicts = lambda pairs: [{"image": image, "label": label} for image, label in pairs]
  made_tfds.write_splits(
    folder,
    {"image": image, "label": label},
    {split: as_dicts(pairs) for split, pairs in ({"train": examples} | splits).items()},
    name=name,
  )
  return name


def labelled(labels):
  """Makes examples whose image determines their label."""
  return [(np.full((1, 1, 1), 100 + i, np.uint8), label) for i, label in enumerate(labels)]


def read(images):
  """Returns pixels and labels in the order in which they were written: by brightness."""
  pixels, labels = images.read(np.arange(len(images)))
  order = np.argsort(pixels.mean(axis=(1, 2, 3)))
  return pixels[order], labels[order].tolist()


@pytest.fixture(params=sorted(LOADERS))
def loader(request):
  return lambda *fields, **names: LOADERS[request.param](SetSource(*fields, **names))


def scaled(dtype, white):
  return tensor(dtype), [(image * white).astype(dtype) for image in RAMP]


def test_arrays_of_floats_of_16_bits_and_of_bools_keep_their_brightness(tmp_path, loader):
  for feature, images in (
    scaled("float32", 1),
    scaled("float16", 1),
    scaled("uint16", 65535),
    scaled("int64", 255.01),
  ):
    name = made(tmp_path, feature, LABELS, [(image, 0) for image in images])
    pixels, _ = read(loader(name, "train", tmp_path))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - 255 * RAMP).max() <= 1
  name = made(tmp_path, tensor("bool"), LABELS, [(image > 0.4, 0) for image in RAMP])
  pixels, _ = read(loader(name, "train", tmp_path))
  np.testing.assert_array_equal(pixels, 255 * (RAMP > 0.4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_files_of_16_bits_keep_their_brightness_whatever_the_feature_says(tmp_path, loader, dtype):
  deep = np.round(RAMP[..., 0] * 65535).astype(np.uint16)
  feature = TYPES.Image(shape=(4, 4, 1), dtype=np.dtype(dtype))
  name = made(tmp_path, feature, LABELS, [(encoded(image), 0) for image in deep])
  pixels, _ = read(loader(name, "train", tmp_path))
  assert np.abs(pixels - 255 * RAMP[..., :1]).max() <= 1


def test_floats_in_a_file_are_read_from_its_four_channels():
  values = RAMP[0, ..., :1].astype(np.float32)
  picture = features.Picture(TYPES.Image(shape=(4, 4, 1), dtype=np.float32), "image")
  decoded = picture.decode(encoded(values.view(np.uint8)).getvalue())
  np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize(
  ("dtype", "white", "message"),
  [
    (
      "float32",
      255,
      "feature 'image' of {} of float32 must be in [0, 1], from black to white; got values from 0 "
      "to 255",
    ),
    (
      "int16",
      32767,
      "feature 'image' of {} of int16 must be in [0, 255], from black to white; got values from 0 "
      "to 32767",
    ),
    (
      "uint16",
      4095,
      "feature 'image' of {} of uint16 must reach the upper half of its scale, in which 65535 is "
      "white; got values from 0 to 4095 in 4 images, which would be too dark.",
    ),
    (
      "uint8",
      16,
      "feature 'image' of {} of uint8 must reach more than a sixteenth of its scale, in which 255 "
      "is white; got values from 0 to 16 in 4 images, which would be too dark.",
    ),
    (
      "float32",
      1 / 255,
      "feature 'image' of {} of float32 must reach more than a sixteenth of its scale, in which 1 "
      "is white; got values from 0 to 0.00392157 in 4 images, which would be too dark.",
    ),
    (
      "int64",
      1,
      "feature 'image' of {} of int64 must reach the upper half of its scale, in which 255 is "
      "white; got values from 0 to 1 in 4 images, which would be too dark.",
    ),
  ],
)
def test_images_of_another_scale_are_refused_before_training(
  tmp_path, loader, dtype, white, message
):
  feature, images = scaled(dtype, white)
  name = made(tmp_path, feature, LABELS, [(image, 0) for image in images])
  with refused(message.format(name)) as caught:
    loader(name, "train", tmp_path)
  assert len(str(caught.value).splitlines()) == 1


def test_files_of_pictures_whose_white_is_1_are_refused(tmp_path, loader):
  masks = [encoded((image[..., 0] > 0.4).astype(np.uint8)) for image in RAMP]
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 1)), LABELS, [(mask, 0) for mask in masks])
  with refused(
    "of uint8 must reach more than a sixteenth of its scale, in which 255 is white; got values "
    "from 0 to 1"
  ):
    loader(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("dtype", "white"), [("uint8", 17), ("uint16", 32896), ("uint8", 0), ("uint16", 0)]
)
def test_dark_images_of_the_scale_and_black_ones_are_taken(dtype, white):
  feature, images = scaled(dtype, white)
  features.Picture(feature, "image").check_scale(images)


def test_one_image_outside_the_scale_is_named(tmp_path):
  images = np.zeros((40, 1, 1, 1), np.float32)
  images[2] = 1.5  # not among those that the scale is checked on
  name = made(tmp_path, tensor("float32", (1, 1, 1)), LABELS, [(image, 0) for image in images])
  with pytest.raises(
    ValueError, match=r"example \d+ of split 'train' of .*: feature 'image' of .* must be in \[0, 1"
  ):
    image_sets.load(SetSource(name, "train", tmp_path))


@pytest.mark.parametrize(
  ("feature", "said"),
  [
    (tensor("uint8", (4, 4)), "Tensor of uint8, shape (4, 4)"),
    (tensor("uint8", (2, 4, 4, 3)), "Tensor of uint8, shape (2, 4, 4, 3)"),
    (TYPES.Text(), "Text"),
    (TYPES.Sequence(TYPES.Image(shape=(4, 4, 3))), "Sequence of Image of uint8, shape (4, 4, 3)"),
    (
      TYPES.FeaturesDict({"left": TYPES.Image(), "right": TYPES.Image()}),
      "FeaturesDict of left, right",
    ),
  ],
)
def test_what_is_no_picture_is_refused_by_its_type(feature, said):
  with refused(
    "feature 'image' of a_set must be an Image of 1, 3 or 4 channels, or a Tensor of numbers with "
    f"shape (H, W, channels); it is {said}. data.image_feature chooses another"
  ):
    features.Picture(feature, "feature 'image' of a_set")


def test_a_picture_of_another_size_than_its_feature_is_named(tmp_path, loader):
  image = encoded(np.zeros((4, 5, 3), np.uint8))
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 3)), LABELS, [(image, 0)])
  with pytest.raises(ValueError, match=r"must have shape \(4, 4, 3\); got \(4, 5, 3\)"):
    loader(name, "train", tmp_path).read(np.arange(1))


def test_a_damaged_picture_is_named_with_its_example(tmp_path, loader):
  image = encoded(np.zeros((4, 4, 3), np.uint8))
  image.truncate(40)
  name = made(tmp_path, TYPES.Image(shape=(4, 4, 3)), LABELS, [(image, 0)])
  with pytest.raises(
    DatasetNotPreparedError, match="example 0 of split 'train' of .* cannot be read"
  ) as caught:
    loader(name, "train", tmp_path).read(np.arange(1))
  assert len(str(caught.value).splitlines()) == 1


def test_a_picture_of_too_many_pixels_is_named_with_what_to_do(tmp_path):
  image = encoded(Image.new("1", (8193, 8193)))
  name = made(tmp_path, TYPES.Image(shape=(None, None, 1)), LABELS, [(image, 0)])
  with refused(
    f"example 0 of split 'train' of {name} in {tmp_path}: a picture must have at most 67108864 "
    "pixels; got 8193 x 8193. Prepare the data set with a smaller image, or "
    "use a split without it"
  ):
    image_sets.load(SetSource(name, "train", tmp_path))


@pytest.mark.parametrize(
  ("feature", "labels", "classes", "names"),
  [
    (TYPES.ClassLabel(names=["a", "b", "c"]), [2, 0, 1], [2, 0, 1], ("a", "b", "c")),
    (TYPES.Scalar(dtype=np.int64), [2, 0, 1], [2, 0, 1], ("0", "1", "2")),
    (TYPES.Tensor(shape=(), dtype=np.uint8), [2, 0, 1], [2, 0, 1], ("0", "1", "2")),
    (TYPES.Scalar(dtype=np.bool_), [True, False], [1, 0], ("0", "1")),
    (TYPES.Text(), ["dog", "cat", "dog", "\u00e9"], [1, 0, 1, 2], ("cat", "dog", "\u00e9")),
    (TYPES.Scalar(dtype=np.object_), [b"\xff", b"a"], [1, 0], ("a", "\\xff")),
  ],
  ids=["ClassLabel", "Scalar", "Tensor", "bool", "Text", "bytes"],
)
def test_whole_numbers_and_texts_are_classes(tmp_path, loader, feature, labels, classes, names):
  images = loader(made(tmp_path, PIXEL, feature, labelled(labels)), "train", tmp_path)
  assert read(images)[1] == classes
  assert images.class_names == names


def test_all_splits_agree_on_the_classes(tmp_path, loader):
  name = made(tmp_path, PIXEL, TYPES.Text(), labelled(["b", "c"]), test=labelled(["a", "c"]))
  train, test = (loader(name, split, tmp_path) for split in ("train", "test"))
  assert train.class_names == test.class_names == ("a", "b", "c")
  assert (read(train)[1], read(test)[1]) == ([1, 2], [0, 2])


def test_labels_are_counted_once_for_all_splits(tmp_path, monkeypatch):
  name = made(tmp_path, PIXEL, TYPES.Text(), labelled(["b", "c"]), test=labelled(["a", "c"]))
  counted = []
  monkeypatch.setattr(
    tfds_sets.Examples,
    "_labels",
    lambda self, split, _: counted.append(split) or [b"a", b"b", b"c"],
  )
  for split in ("train", "test", "train"):
    image_sets.load(SetSource(name, split, tmp_path))
  assert sorted(counted) == ["test", "train"]


def test_classes_that_are_counted_and_gaps_between_them_are_said(tmp_path, caplog):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled([0, 2, 5]))
  images = image_sets.load(SetSource(name, "train", tmp_path))
  assert (read(images)[1], len(images.class_names)) == ([0, 2, 5], 6)
  said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
  assert f"feature 'label' of {name}: no image has class 1, 3, 4, of 6" in said
  assert (
    f"feature 'label' of {name} is Scalar of int64, read as 6 classes: 0, 1, 2, 3, 4, 5" in said
  )


@pytest.mark.parametrize(
  ("feature", "labels", "got", "said"),
  [
    (TYPES.Scalar(dtype=np.int64), [-1, 1], "got -1", "a negative number or none"),
    (TYPES.Text(), ["", "cat"], "got b''", "an empty text or none"),
    (
      TYPES.Scalar(dtype=np.int64, optional=True),
      [None, 1],
      "got None",
      "a negative number or none",
    ),
  ],
)
def test_images_without_a_class_are_refused_and_said(
  tmp_path, loader, caplog, feature, labels, got, said
):
  name = made(tmp_path, PIXEL, feature, labelled(labels), test=labelled(labels[1:]))
  with pytest.raises(ValueError, match="so the image has no class. Use another split") as caught:
    loader(name, "train", tmp_path).read(np.arange(2))
  assert got in str(caught.value)
  assert f"1 images of split 'train' have no class ({said})" in caplog.text
  assert len(loader(name, "test", tmp_path)) == 1


@pytest.mark.parametrize("labels", [[0, 10**9], [2000, 2001]])
def test_numbers_that_count_no_classes_are_refused(tmp_path, loader, labels):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled(labels))
  with refused(
    "must number classes from 0 with at most 1000 gaps, or be a ClassLabel or a text; it is "
    f"Scalar of int64, 2 numbers from {labels[0]} to {labels[1]}. data.label_feature chooses "
    "another"
  ):
    loader(name, "train", tmp_path)


def test_a_set_without_any_label_is_refused(tmp_path, loader):
  name = made(tmp_path, PIXEL, TYPES.Scalar(dtype=np.int64), labelled([-1, -1]))
  with refused("must hold a class per image; it is Scalar of int64, and all are negative or none"):
    loader(name, "train", tmp_path)


@pytest.mark.parametrize(
  ("feature", "said"),
  [
    (TYPES.Scalar(dtype=np.float32), "Scalar of float32"),
    (tensor("float32", (3,)), "Tensor of float32, shape (3,)"),
    (tensor("int64", (1,)), "Tensor of int64, shape (1,)"),
    (TYPES.Sequence(TYPES.ClassLabel(names=["a", "b"])), "Sequence of ClassLabel of int64"),
    (TYPES.Sequence({"a": TYPES.Text()}), "Sequence of FeaturesDict of a"),
    (TYPES.FeaturesDict({"a": TYPES.Text()}), "FeaturesDict of a"),
    (TYPES.Image(), "Image of uint8, shape (None, None, 3)"),
    (TYPES.BBoxFeature(), "BBoxFeature of float32, shape (4,)"),
  ],
)
def test_what_is_no_single_class_is_refused_by_its_type(feature, said):
  with refused(
    "feature 'label' of a_set must hold one class per image, as a ClassLabel, a whole number or a "
    f"text; it is {said}. data.label_feature chooses another"
  ):
    features.ImageClass(feature, "feature 'label' of a_set")


def test_other_features_are_chosen_by_name(tmp_path, loader):
  of = {"picture": PIXEL, "kind": TYPES.Text(), "other": TYPES.Text()}
  examples = [
    {"picture": image, "kind": kind, "other": "x"} for image, kind in labelled(["cat", "dog"])
  ]
  name = f"features_set{next(SETS)}"
  made_tfds.write_splits(tmp_path, of, {"train": examples}, name=name)
  images = loader(name, "train", tmp_path, image="picture", label="kind")
  assert (read(images)[1], images.class_names) == ([0, 1], ("cat", "dog"))
  assert (
    image_sets.count_images(SetSource(name, "train", tmp_path, image="picture", label="kind")) == 2
  )
  with pytest.raises(
    ValueError,
    match=rf"a data set with image and label; {name} has no \['image', 'label'\]. "
    "data.image_feature and data.label_feature choose from kind, other, picture",
  ):
    loader(name, "train", tmp_path)


def test_classes_of_pixels_stay_as_they_are():
  numbers = np.array([[[7], [33]], [[0], [255]]], np.int64)
  array = features.PixelClasses(tensor("int64", (2, 2, 1)), "classes")
  np.testing.assert_array_equal(array.convert(array.decode(numbers)), numbers)
  file = features.PixelClasses(TYPES.Image(shape=(2, 2, 1)), "classes")
  read = file.convert(file.decode(encoded(numbers[..., 0].astype(np.uint8)).getvalue()))
  assert read.dtype == np.uint8
  np.testing.assert_array_equal(read, numbers)


def test_classes_of_pixels_that_are_none_are_refused():
  array = features.PixelClasses(tensor("int64", (2, 2, 1)), "classes")
  with pytest.raises(
    ValueError, match=r"classes must hold classes in 0 .. 255; got values from -1 to 3"
  ):
    array.convert(np.array([[[-1]], [[3]]]))
  file = features.PixelClasses(TYPES.Image(shape=(2, 2, 1)), "classes")
  with pytest.raises(ValueError, match=r"classes must have one channel; got shape \(2, 2, 3\)"):
    file.convert(file.decode(encoded(np.zeros((2, 2, 3), np.uint8)).getvalue()))
  with pytest.raises(
    ValueError, match=r"with shape \(H, W, 1\); it is Image of uint8, shape \(None, None, 3\)"
  ):
    features.PixelClasses(TYPES.Image(), "classes")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "features.json is nested more deeply than TFDS writes it"),
    ("3", "cannot be opened: TypeError: argument of type 'int'"),
  ],
)
def test_a_damaged_description_of_a_set_is_named_on_one_line(tmp_path, text, message):
  name = made(tmp_path, PIXEL, LABELS, labelled([0, 1]))
  (file,) = tmp_path.rglob("features.json")
  copy = tmp_path / name / "1.0.0"
  copy.rename(tmp_path / "moved")
  (tmp_path / f"{name}_copy").mkdir()
  (tmp_path / "moved").rename(tmp_path / f"{name}_copy" / "1.0.0")  # TFDS knows only its files
  (tmp_path / f"{name}_copy" / "1.0.0" / file.name).write_text(text)
  with pytest.raises(DatasetNotPreparedError, match=message) as caught:
    image_sets.load(SetSource(f"{name}_copy", "train", tmp_path))
  assert len(str(caught.value).splitlines()) == 1


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
  scaled = LEVELS * white
  pixels = (np.round(scaled) if white > 1 else scaled).astype(dtype)
  read = features.to_uint8(pixels)
  assert (read.dtype, read.shape) == (np.uint8, LEVELS.shape)
  assert np.abs(read - LEVELS * 255).max() <= 1
  assert (read.min(), read.max()) == (0, 255)


def test_bools_are_black_and_white():
  assert features.to_uint8(np.array([False, True])).tolist() == [0, 255]


def test_uint8_stays_as_it_is():
  assert features.to_uint8(BYTES) is BYTES


def test_floats_that_round_to_a_level_are_read():
  assert features.to_uint8(np.array([-1e-6, 1 + 1e-6, 1 / 255])).tolist() == [0, 255, 1]


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
    features.to_uint8(pixels, "image")


def decoded(picture, channels, kind="PNG", **options):
  file = encoded(picture, kind, **options).getvalue()
  return features.decode_picture(file, channels)


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
  read = features.decode_picture(deep_colours(DEEP), 3)
  assert read.dtype == np.uint16
  assert np.abs(features.to_uint8(read) - LEVELS * 255).max() <= 1


def test_classes_of_a_palette_are_its_places():
  picture = Image.fromarray(np.array([[3, 0], [1, 2]], np.uint8), "L").convert("P")
  picture.putpalette(bytes(range(12, 24)))
  assert features.decode_numbers(encoded(picture).getvalue())[..., 0].tolist() == [[3, 0], [1, 2]]


def test_a_file_that_would_start_a_program_is_not_read():
  file = io.BytesIO()
  Image.fromarray(BYTES).save(file, "EPS")  # which Ghostscript reads
  with pytest.raises(Image.UnidentifiedImageError):
    features.decode_picture(file.getvalue(), 3)


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
    features.decode_picture(deep_colours(DEEP, size), 3)
