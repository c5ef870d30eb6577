import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.data.augment import (
  augment_videos,
  crop_and_flip,
  cut_out,
  jitter_colour,
  normalise,
)
from gating_jax.ops.collectives import example_keys

PAD, SIZE, BATCH = 2, (5, 4, 3), 400


def images(n=BATCH, size=SIZE):
  """Makes pixels from 1, so that zeros from padding are recognised."""
  return np.random.default_rng(0).integers(1, 256, (n, *size), dtype=np.uint8)


def candidates(image, pad):
  """Returns every crop of the padded image, by (top, left, mirrored)."""
  h, w, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  shifts = range(2 * pad + 1)
  crops = {(top, left): padded[top : top + h, left : left + w] for top in shifts for left in shifts}
  return {
    (*shift, m): crop[:, ::-1] if m else crop
    for shift, crop in crops.items()
    for m in (False, True)
  }


def what_was_done(pixels, result, pad):
  """Finds (top, left, mirrored) of each image by comparing it with every possible result."""
  found = []
  for image, changed in zip(pixels, np.asarray(result), strict=True):
    matches = [
      which for which, crop in candidates(image, pad).items() if np.array_equal(crop, changed)
    ]
    assert len(matches) == 1
    found.append(matches[0])
  return np.array(found)


@pytest.mark.parametrize(("pad", "flip"), [(PAD, True), (PAD, False), (0, True)])
def test_every_result_is_a_crop_of_the_padded_image_and_all_crops_occur(pad, flip):
  pixels = images()
  result = jax.jit(lambda key, x: crop_and_flip(key, x, pad=pad, flip=flip))(
    jax.random.key(0), pixels
  )
  assert result.dtype == jnp.uint8
  top, left, mirrored = what_was_done(pixels, result, pad).T
  rate = 1 / (2 * pad + 1)
  for shift in (top, left):
    counts = np.bincount(shift, minlength=2 * pad + 1)
    assert (np.abs(counts / BATCH - rate) <= 5 * np.sqrt(rate * (1 - rate) / BATCH)).all()
  assert abs(mirrored.mean() - flip / 2) <= flip * 5 * 0.5 / np.sqrt(BATCH)
  if pad:
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.25
  if pad and flip:
    assert abs(np.corrcoef(top, mirrored)[0, 1]) < 0.25


def test_equal_images_are_augmented_independently_and_by_the_key():
  pixels = np.repeat(images(1), 20, 0)
  first, second = (
    crop_and_flip(jax.random.key(seed), pixels, pad=PAD, flip=True) for seed in (0, 1)
  )
  assert len(np.unique(first, axis=0)) > 10
  assert np.mean(np.any(first != second, (1, 2, 3))) > 0.5


def test_nothing_is_done_without_pad_and_flip():
  pixels = images()
  assert np.any(crop_and_flip(jax.random.key(0), pixels, pad=0, flip=True) != pixels)
  np.testing.assert_array_equal(crop_and_flip(jax.random.key(0), pixels, pad=0, flip=False), pixels)


def test_the_draw_does_not_depend_on_the_number_of_devices():
  pixels, key = images(16), jax.random.key(3)
  alone = jax.jit(lambda x: crop_and_flip(key, x, pad=PAD, flip=True))(pixels)
  assert np.any(alone != pixels)
  spread = lambda axis_name: jax.pmap(
    lambda x: crop_and_flip(key, x, pad=PAD, flip=True, axis_name=axis_name), axis_name="d"
  )(pixels.reshape(8, 2, *SIZE)).reshape(pixels.shape)
  np.testing.assert_array_equal(spread("d"), alone)
  assert np.any(spread(None) != alone)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_square_around_any_pixel_is_cut_out(size):
  x = images().astype(np.float32)
  result = np.asarray(jax.jit(lambda key, x: cut_out(key, x, size=size))(jax.random.key(0), x))
  h, w, _ = SIZE
  at = lambda centre, length: np.isin(np.arange(length), centre - size // 2 + np.arange(size))
  squares = {
    tuple((at(row, h)[:, None] & at(column, w)).ravel()) for row in range(h) for column in range(w)
  }
  gone = result == 0
  assert (gone == gone[..., :1]).all()
  assert {tuple(mask.ravel()) for mask in gone[..., 0]} == squares  # each of them, and nothing else
  np.testing.assert_array_equal(result[~gone], x[~gone])


def test_size_0_cuts_nothing_out_and_draws_do_not_depend_on_devices():
  x = images(16).astype(np.float32)
  assert cut_out(jax.random.key(0), x, size=0) is x
  cut = lambda key, x, axis_name=None: cut_out(key, x, size=2, axis_name=axis_name)
  several = jax.pmap(lambda key, x: cut(key, x, "devices"), "devices", in_axes=(None, 0))
  np.testing.assert_array_equal(
    several(jax.random.key(0), x.reshape(8, 2, *SIZE)).reshape(x.shape), cut(jax.random.key(0), x)
  )


def test_normalise_by_hand():
  pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
  out = normalise(pixels, (0.5, 0.2, 0.4), (0.25, 0.5, 0.2))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out.ravel(), [-2, 0, 3], atol=1e-6)
  np.testing.assert_allclose(normalise(pixels, (0.2,), (0.4,)).ravel(), [-0.5, 0, 2], atol=1e-6)
  np.testing.assert_allclose(
    jax.jit(lambda x: normalise(x, (0.2,), (0.4,)))(pixels).ravel(), [-0.5, 0, 2], atol=1e-6
  )


@pytest.mark.parametrize(
  ("mean", "std", "name", "value"),
  [
    ((0.5, 0.5), (1.0,), "mean", (0.5, 0.5)),
    ((0.5,), (1.0, 1.0, 1.0, 1.0), "std", (1.0, 1.0, 1.0, 1.0)),
    ((), (1.0,), "mean", ()),
  ],
)
def test_another_number_of_channels_is_an_error(mean, std, name, value):
  message = f"{name} must hold 1 or 3 numbers, one per channel; got {value}"
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    normalise(np.zeros((1, 2, 2, 3), np.uint8), mean, std)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32, bool])
def test_pixels_of_another_type_than_uint8_are_refused(dtype):
  with pytest.raises(
    ValueError, match=f"pixels must be uint8, as .*to_uint8; got {np.dtype(dtype)}"
  ):
    jax.eval_shape(
      lambda x: normalise(x, (0.5,), (0.5,)), jax.ShapeDtypeStruct((1, 2, 2, 3), dtype)
    )


VIDEOS = (6, 3, 2, 5, 4, 1)


def test_all_frames_of_a_video_are_moved_alike():
  videos = np.random.default_rng(0).integers(1, 256, VIDEOS, dtype=np.uint8)
  # Every frame of a video is the same picture, so that one answer fits all frames.
  videos[:] = videos[:, :1, :1]
  result = np.asarray(augment_videos(jax.random.key(1), videos, pad=PAD, flip=True, colour=0.0))
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(result, np.broadcast_to(result[:, :1, :1], result.shape))
  found = what_was_done(videos[:, 0, 0], result[:, 0, 0], PAD)
  assert len({tuple(which) for which in found.tolist()}) > 2


def test_videos_without_augmentation_stay_as_they_are():
  videos = np.random.default_rng(0).integers(0, 256, VIDEOS, dtype=np.uint8)
  result = augment_videos(jax.random.key(1), videos, pad=0, flip=False, colour=0.0)
  np.testing.assert_array_equal(result, videos)


@pytest.mark.parametrize("depth", [1, 3])
def test_colours_change_by_the_same_factors_in_all_of_a_video(depth):
  pixels = np.random.default_rng(0).integers(60, 120, (4, 2, 5, depth), dtype=np.uint8)
  key, strength = jax.random.key(0), 0.3
  result = jitter_colour(key, pixels, strength=strength)
  assert result.dtype == jnp.uint8
  weights = np.array([0.299, 0.587, 0.114]) if depth == 3 else np.ones(1)
  grey = lambda x: (x * weights).sum(-1, keepdims=True)
  keys = example_keys(key, 4, None)
  for own, video, changed in zip(keys, pixels, np.asarray(result), strict=True):
    b, c, s = np.asarray(jax.random.uniform(own, (3,), jnp.float32, 1 - strength, 1 + strength))
    assert all(0.7 <= factor <= 1.3 for factor in (b, c, s))
    x = (b * video.astype(np.float64)).clip(0, 255)
    mean = grey(x).mean()
    x = (mean + c * (x - mean)).clip(0, 255)
    if depth == 3:
      x = (grey(x) + s * (x - grey(x))).clip(0, 255)
    # Rounding may go either way at a half.
    assert np.abs(changed - x).max() <= 0.51
  assert not np.array_equal(result[0], result[1])


def test_videos_are_augmented_alike_on_any_number_of_devices():
  videos = np.random.default_rng(0).integers(0, 256, (8, *VIDEOS[1:]), dtype=np.uint8)
  change = lambda videos, axis_name=None: augment_videos(
    jax.random.key(2), videos, pad=PAD, flip=True, colour=0.3, axis_name=axis_name
  )
  spread = jax.pmap(lambda part: change(part, "devices"), axis_name="devices")(videos[:, None])
  # Two programs may round a colour to either side.
  gap = np.asarray(spread[:, 0], int) - np.asarray(jax.jit(change)(videos), int)
  assert np.abs(gap).max() <= 1
