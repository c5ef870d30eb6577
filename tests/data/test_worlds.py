import numpy as np
import pytest

from gating_jax.data import image_sets, worlds
from gating_jax.data.image_sets import SetSource

TRAIN = worlds.make_worlds("train", 300)


def test_the_same_seed_makes_the_same_images_and_another_makes_others():
  for again in (worlds.make_worlds("train", 300), worlds.make_worlds("train", 200)):
    count = len(again.labels)
    for name in ("pixels", "labels", "worlds", "digits"):
      np.testing.assert_array_equal(getattr(again, name), getattr(TRAIN, name)[:count])
  other = worlds.make_worlds("train", 300, seed=1)
  assert np.mean(other.pixels != TRAIN.pixels) > 0.9


def test_any_images_are_made_without_those_before_them():
  # They lie on both sides of the end of a block.
  some = worlds.make_worlds("test", 30, first=1990)
  whole = worlds.make_worlds("test", 2020)
  np.testing.assert_array_equal(some.pixels, whole.pixels[1990:])
  np.testing.assert_array_equal(some.labels, whole.labels[1990:])


def test_images_have_types_and_sizes():
  assert (TRAIN.pixels.shape, TRAIN.pixels.dtype) == ((300, 16, 16, 3), np.uint8)
  for name, classes in (("labels", 10), ("worlds", 8), ("digits", 10)):
    values = getattr(TRAIN, name)
    assert (values.shape, values.dtype) == ((300,), np.int32)
    assert set(values) == set(range(classes))
  # Digits and textures use the range of pixels.
  assert TRAIN.pixels.std() > 30


def test_a_world_names_digits_by_a_permutation_of_its_own():
  rules = worlds.rules()
  np.testing.assert_array_equal(np.sort(rules.permutations), np.arange(10)[None].repeat(8, 0))
  assert len(np.unique(rules.permutations, axis=0)) == 8
  np.testing.assert_array_equal(TRAIN.labels, rules.permutations[TRAIN.worlds, TRAIN.digits])
  np.testing.assert_array_equal(np.sort(rules.places), np.arange(4)[None].repeat(8, 0))


def test_both_splits_have_the_same_worlds_and_no_digit_in_common():
  train, held_out = (
    {image.tobytes() for image in worlds._digits(split).pixels} for split in ("train", "test")
  )
  # scikit-learn has 1,797 digits, no two of them alike.
  assert len(train | held_out) == len(train) + len(held_out) == 1797
  test = worlds.make_worlds("test", 300)
  np.testing.assert_array_equal(test.labels, worlds.rules().permutations[test.worlds, test.digits])
  assert np.mean(test.pixels != TRAIN.pixels) > 0.9


def test_the_texture_tells_the_world():
  """The nearest mean spectrum, which does not depend on the waves' phases, finds the world."""
  made = worlds.make_worlds("train", 2000)
  grey = made.pixels.astype(np.float64).mean(-1)
  spectrum = np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))).reshape(len(grey), -1)
  half = 1000
  means = [spectrum[:half][made.worlds[:half] == w].mean(0) for w in range(8)]
  distance = [np.linalg.norm(spectrum[half:] - mean, axis=1) for mean in means]
  assert np.mean(np.argmin(distance, axis=0) == made.worlds[half:]) > 0.7


def test_quarters_are_moved_and_turned_and_nothing_is_lost():
  digits = np.random.default_rng(0).uniform(size=(8, 12, 12))
  moved = worlds._rearrange(digits, worlds.rules(), np.arange(8))
  for before, after in zip(digits, moved, strict=True):
    np.testing.assert_array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
    assert np.any(before != after)
  assert np.mean(digits != moved) > 0.5


def test_a_set_of_worlds_is_read_as_any_other():
  made = image_sets.load(SetSource("worlds", "train[100:300]"))
  np.testing.assert_array_equal(made.pixels, TRAIN.pixels[100:])
  np.testing.assert_array_equal(made.labels, TRAIN.labels[100:])
  assert made.class_names == tuple("0123456789")
  assert image_sets.count_images(SetSource("worlds", "train[100:300]")) == 200
  told = image_sets.load(SetSource("worlds_told", "train[:300]"))
  np.testing.assert_array_equal(told.pixels[..., :3], TRAIN.pixels)
  np.testing.assert_array_equal(
    told.pixels[..., 3], np.broadcast_to(TRAIN.worlds[:, None, None], (300, 16, 16))
  )
  assert image_sets.load(SetSource("worlds", "test[:2]"), image_size=8).shape == (8, 8, 3)


@pytest.mark.parametrize("split", ["validation", "train[5:5]", "train[:50%]", "train[-5:]"])
def test_an_unknown_split_is_named(split):
  with pytest.raises(ValueError, match="^data split of worlds must be 'train' or 'test', or a"):
    image_sets.load(SetSource("worlds", split))
