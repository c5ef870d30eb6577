import itertools
import signal

import numpy as np
import pytest

from gating_jax.data import image_sets, streaming, tfds
from gating_jax.data.image_sets import SetSource
from tests.helpers import made_tfds

SHAPE = (12, 10, 3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  train, test = made_tfds.images(22, SHAPE), made_tfds.images(7, SHAPE, seed=1)
  made_tfds.write(
    folder, list(zip(*train, strict=True)), list(zip(*test, strict=True)), shape=SHAPE
  )
  return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
  folder = tmp_path_factory.mktemp("uneven")
  sizes = [(20, 30, 3), (41, 17, 3), (9, 9, 3), (32, 32, 3)]
  examples = [(made_tfds.images(1, size, seed=i)[0][0], i % 2) for i, size in enumerate(sizes)]
  made_tfds.write(folder, examples, examples, shape=(None, None, 3), name="uneven_set")
  return folder


def test_resident_images_are_those_written(prepared):
  train = image_sets.load(SetSource("made_set", "train", str(prepared)))
  pixels, labels = made_tfds.images(22, SHAPE)
  order = [int(np.flatnonzero((pixels == image).all(axis=(1, 2, 3)))[0]) for image in train.pixels]
  assert sorted(order) == list(range(22))
  np.testing.assert_array_equal(train.labels, labels[order])
  assert train.class_names == ("dark", "light")


@pytest.mark.parametrize("first_step", [0, 3, 7])
def test_streamed_batches_are_those_of_the_resident_loader(prepared, first_step):
  train = image_sets.load(SetSource("made_set", "train", str(prepared)))
  stream = streaming.open_stream(SetSource("made_set", "train", str(prepared)), seed=5)
  got = list(stream.batches(4, first_step, 1, 12))
  assert len(got) == 12 - first_step
  for step, (pixels, labels) in enumerate(got, first_step):
    index = image_sets.batch_indices(5, step, 4, 22)
    np.testing.assert_array_equal(pixels[:, 0], train.pixels[index])
    np.testing.assert_array_equal(labels[:, 0], train.labels[index])


def test_several_steps_a_call_hold_the_same_images(prepared):
  stream = streaming.open_stream(SetSource("made_set", "train", str(prepared)), seed=5)
  single = [pixels[:, 0] for pixels, _ in stream.batches(4, 0, 1, 4)]
  (first, _), (second, _) = stream.batches(4, 0, 2, 4)
  assert first.shape == (4, 2, *SHAPE)
  np.testing.assert_array_equal(
    np.stack(single), np.concatenate([first, second], axis=1).swapaxes(0, 1)
  )


def test_processes_share_a_batch_between_them(prepared):
  stream = streaming.open_stream(SetSource("made_set", "train", str(prepared)), seed=5)
  whole, _ = next(stream.batches(6, 2, 1, 3))
  parts = [next(stream.batches(6, 2, 1, 3, process=(i, 3)))[0] for i in range(3)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(prepared):
  one = streaming.open_stream(SetSource("made_set", "train", str(prepared)), seed=5, crop_area=0.3)
  two = streaming.open_stream(
    SetSource("made_set", "train", str(prepared)), seed=5, crop_area=0.3, workers=2
  )
  for (a, b), (c, d) in zip(one.batches(4, 0, 1, 3), two.batches(4, 0, 1, 3), strict=True):
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)


def test_images_of_different_sizes_are_brought_to_one(uneven):
  train = streaming.open_stream(
    SetSource("uneven_set", "train", str(uneven)), image_size=8, crop_area=0.2
  )
  a, _ = next(train.batches(4, 0, 1, 2))
  b, _ = next(train.batches(4, 0, 1, 2))
  (_, _), (c, _) = train.batches(4, 0, 1, 2)
  assert a.shape == (4, 1, 8, 8, 3)
  np.testing.assert_array_equal(a, b)
  assert (np.sort(a.ravel()) != np.sort(c.ravel())).any(), "each epoch crops anew"


def test_resident_images_of_different_sizes_are_brought_to_one(uneven):
  train = SetSource("uneven_set", "train", str(uneven))
  read, source = image_sets.load(train, image_size=8), tfds.open_tfds(*train[:3])
  assert read.shape == (8, 8, 3)
  for pixels, example in zip(read.pixels, map(source.__getitem__, range(4)), strict=True):
    rows, columns = (np.array_split(np.arange(n), 2) for n in example["image"].shape[:2])
    parts = [[example["image"][np.ix_(i, j)].mean() for j in columns] for i in rows]
    np.testing.assert_allclose(pixels.reshape(2, 4, 2, 4, 3).mean(axis=(1, 3, 4)), parts, atol=8)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_resizing_halves_an_image_of_even_blocks_exactly(depth):
  small = np.arange(4 * 4 * depth, dtype=np.uint8).reshape(4, 4, depth)
  large = small.repeat(32, axis=0).repeat(32, axis=1)
  middle = np.s_[4:-4:8, 4:-4:8]  # away from the edges of blocks
  np.testing.assert_array_equal(
    image_sets.resize(large, (32, 32))[middle], small.repeat(8, 0).repeat(8, 1)[middle]
  )


def test_channels_are_resized_on_their_own():
  image = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
  image[..., 3] = 0  # no transparency, under which Pillow would make all black
  alone = [image_sets.resize(image[..., [channel]], (4, 4)) for channel in range(4)]
  np.testing.assert_array_equal(image_sets.resize(image, (4, 4)), np.concatenate(alone, axis=-1))


def test_embedded_digits_are_resized_as_well():
  assert image_sets.load(SetSource("digits", "test"), image_size=4).shape == (4, 4, 1)


def test_evaluation_covers_a_stream_exactly_once_without_cropping_at_random(uneven):
  stream = streaming.open_stream(SetSource("uneven_set", "test", str(uneven)), image_size=8)
  once = list(image_sets.padded_batches(stream, 3))
  assert [valid for _, valid in once] == [3, 1]
  again = list(image_sets.padded_batches(stream, 3))
  for ((pixels, _), _), ((repeated, _), _) in zip(once, again, strict=True):
    np.testing.assert_array_equal(pixels, repeated)


def test_central_crop_of_a_constant_image_is_constant():
  image = np.full((40, 60, 1), 7, np.uint8)
  np.testing.assert_array_equal(streaming.central_crop(image, (5, 4)), np.full((5, 4, 1), 7))


def test_central_crop_keeps_the_middle():
  image = np.zeros((100, 300, 3), np.uint8)
  image[:, 100:200] = 255
  np.testing.assert_array_equal(streaming.central_crop(image, (10, 10)), np.full((10, 10, 3), 255))


def test_random_crop_reaches_every_corner():
  image = np.zeros((32, 32, 1), np.uint8)
  for value, (i, j) in enumerate(itertools.product((0, 31), (0, 31)), 1):
    image[i, j] = value * 60
  rng = np.random.default_rng(0)
  crops = [streaming.random_resized_crop(image, (32, 32), 0.1, rng) for _ in range(200)]
  seen = {int(crop[i, j, 0]) for crop in crops for i in (0, 31) for j in (0, 31)}
  assert {60, 120, 180, 240} <= seen


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(), "data.image_size must be set to stream uneven_set, whose images may"),
    (dict(image_size=8, crop_area=1.5), r"data.crop_area must be in \(0, 1\]; got 1.5"),
  ],
)
def test_bad_settings_are_named(uneven, arguments, message):
  with pytest.raises(ValueError, match=message):
    streaming.open_stream(SetSource("uneven_set", "train", str(uneven)), **arguments)


def test_images_without_a_label_are_refused_when_they_are_read():
  example = {"image": np.zeros((2, 2, 1), np.uint8), "label": -1}
  stream = streaming.Stream([example], ("a", "b"), (2, 2, 1))
  with pytest.raises(ValueError, match="^the data split has images without a label; use another"):
    stream.read_one(0, None)


def test_an_unknown_split_of_a_prepared_set_is_named(prepared):
  with pytest.raises(ValueError, match="^data split 'validation' of made_set cannot be read: "):
    streaming.open_stream(SetSource("made_set", "validation", str(prepared)))


def test_a_part_of_a_split_without_examples_is_named(prepared):
  with pytest.raises(ValueError, match=r"^data split 'train\[:0\]' of made_set .* it is empty$"):
    image_sets.load(SetSource("made_set", "train[:0]", str(prepared)))


def test_uneven_images_are_refused_by_the_resident_loader(uneven):
  with pytest.raises(ValueError, match=r"\); set data.image_size$"):
    image_sets.load(SetSource("uneven_set", "train", str(uneven)))


def test_digits_have_no_stream():
  with pytest.raises(ValueError, match="data.loader must be 'resident' for digits"):
    streaming.open_stream(SetSource("digits", "train"))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_end_with_their_results_or_where_nobody_wants_them(workers):
  assert list(streaming.prefetch(abs, [-1, 2, -3], workers)) == [1, 2, 3]
  assert streaming._POOLS == []
  left_early = streaming.prefetch(abs, range(100), workers)
  assert next(left_early) == 0
  assert len(streaming._POOLS) == 1
  left_early.close()
  assert streaming._POOLS == []
  forgotten = streaming.prefetch(abs, range(100), workers)
  assert next(forgotten) == 0
  streaming.close_pools()
  assert streaming._POOLS == []


def test_ctrl_c_is_held_back_from_no_thread():
  blocked = lambda _: signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
  assert list(streaming.prefetch(blocked, [0], workers=0)) == [False]


@pytest.mark.parametrize("size", [7, 49, 224])
def test_the_largest_middle_part_is_that_of_images_in_memory(size):
  rng = np.random.default_rng(0)
  for height, width in rng.integers(1, 400, (20, 2)):
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    box = image_sets._central_square(image)
    expected = image_sets.resize(image, (size, size), box)
    np.testing.assert_array_equal(streaming.central_crop(image, (size, size), 1.0), expected)
