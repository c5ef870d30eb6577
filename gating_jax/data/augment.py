"""Augmentation inside the training step: of uint8 images, and of videos as a whole.

Axes: B images or videos, T segments of F frames, H and W pixels, D channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.ops.collectives import example_keys
from gating_jax.types import Array


def normalise(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
  """Normalises uint8 pixels to float32: `(pixels / 255 - mean) / std`, per channel.

  Args:
    pixels: `[B, H, W, D]`.
    mean, std: D numbers, or one for all channels, in units of the full scale.
  Returns:
    `[B, H, W, D]` float32.
  Raises:
    ValueError: pixels that are not uint8, or another number of channels.
  """
  if pixels.dtype != jnp.uint8:
    raise ValueError(
      f"pixels must be uint8, as returned by gating_jax.data.features.to_uint8; got {pixels.dtype}"
    )
  for name, value in (("mean", mean), ("std", std)):
    if len(value) not in (1, pixels.shape[-1]):
      raise ValueError(
        f"{name} must hold 1 or {pixels.shape[-1]} numbers, one per channel; got {tuple(value)}"
      )
  means, stds = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return (pixels.astype(jnp.float32) / 255 - means) / stds


def crop_and_flip(
  key: Array, pixels: Array, *, pad: int, flip: bool, axis_name: Hashable | None = None
) -> Array:
  """Shifts each image by up to `pad` pixels and mirrors it with probability 1/2.

  Zeros come in at the sides. An image's draw depends on its index in the whole batch, not on the
  device it is on.

  Args:
    key: a PRNG key, the same on every device.
    pixels: `[B, H, W, D]`, any dtype.
    pad: largest shift in pixels; 0 for none.
    flip: whether to mirror left-right.
    axis_name: mapped device axis over which the batch is spread.
  Returns:
    Pixels of the same shape and dtype.
  """
  if not pad and not flip:
    return pixels
  size = pixels.shape[1:]
  # A crop of the padded image at a random place is a shift by -pad to pad.
  padded = jnp.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

  def one(key, image):
    """Shifts and mirrors one image `[H, W, D]` at random."""
    where, mirror = jax.random.split(key)
    top, left = jax.random.randint(where, (2,), 0, 2 * pad + 1)
    image = lax.dynamic_slice(image, (top, left, 0), size)
    # Crop and flip have keys of their own: the shifts are the same with and without `flip`.
    return jnp.where(flip & jax.random.bernoulli(mirror), image[:, ::-1], image)

  # One key per example of the whole batch, so that results do not depend on the number of devices.
  return jax.vmap(one)(example_keys(key, pixels.shape[0], axis_name), padded)


def augment_videos(
  key: Array,
  videos: Array,
  *,
  pad: int,
  flip: bool,
  colour: float,
  axis_name: Hashable | None = None,
) -> Array:
  """Shifts, mirrors and recolours each video, the same way in all of its frames.

  Motion and the order of segments stay as they are. A video's draw depends on its index in the
  whole batch, not on the device it is on.

  Args:
    key, axis_name: as in `crop_and_flip`.
    videos: `[B, T, F, H, W, D]` uint8: T segments of F frames.
    pad, flip: as in `crop_and_flip`.
    colour: as `strength` in `jitter_colour`.
  Returns:
    Videos of the same shape and dtype.
  """
  where, shade = jax.random.split(key)
  # All frames of a video as the channels of one image, so that one draw moves them.
  stacked = jnp.moveaxis(videos, (1, 2), (3, 4))
  images = stacked.reshape(*stacked.shape[:3], -1)
  moved = crop_and_flip(where, images, pad=pad, flip=flip, axis_name=axis_name)
  moved = jnp.moveaxis(moved.reshape(stacked.shape), (3, 4), (1, 2))
  return jitter_colour(shade, moved, strength=colour, axis_name=axis_name)


def jitter_colour(
  key: Array, videos: Array, *, strength: float, axis_name: Hashable | None = None
) -> Array:
  """Changes brightness, contrast and, of three channels, saturation of each video at random.

      x -> b x;   x -> m + c (x - m), m the mean grey of the video;   x -> g + s (x - g), g its grey

  The factors b, c and s are uniform in `1 - strength` to `1 + strength`.

  Args:
    key, axis_name: as in `crop_and_flip`.
    videos: `[B, ..., D]` uint8, RGB where D is 3.
    strength: in [0, 1); 0 for no change.
  Returns:
    Videos of the same shape and dtype.

  Reference: the colour jitter of torchvision, here in this order.
  """
  if not strength:
    return videos

  def one(key, video):
    """Changes the colours of one video `[..., D]`."""
    low, high = jnp.float32(1 - strength), jnp.float32(1 + strength)
    brightness, contrast, saturation = jax.random.uniform(key, (3,), jnp.float32, low, high)
    x = jnp.clip(video.astype(jnp.float32) * brightness, 0, 255)
    mean = jnp.mean(_grey(x))
    x = jnp.clip(mean + contrast * (x - mean), 0, 255)
    if video.shape[-1] == 3:
      grey = _grey(x)
      x = jnp.clip(grey + saturation * (x - grey), 0, 255)
    return jnp.round(x).astype(jnp.uint8)

  return jax.vmap(one)(example_keys(key, videos.shape[0], axis_name), videos)


def _grey(x: Array) -> Array:
  """Returns the luma `[..., 1]` of RGB colours `[..., 3]` (ITU-R BT.601); else their mean."""
  if x.shape[-1] != 3:
    return jnp.mean(x, axis=-1, keepdims=True)
  return jnp.sum(x * jnp.array([0.299, 0.587, 0.114], x.dtype), axis=-1, keepdims=True)


def cut_out(key: Array, x: Array, *, size: int, axis_name: Hashable | None = None) -> Array:
  """Sets a square of each image to 0, the mean of normalised pixels.

  The centre of the square may lie anywhere in the image; what lies outside is lost.

  Args:
    key, axis_name: as in `crop_and_flip`.
    x: `[B, H, W, D]`.
    size: width of the square in pixels; 0 for none.
  Returns:
    `[B, H, W, D]`.

  Reference: DeVries and Taylor, "Improved regularization of convolutional neural networks with
  cutout", 2017.
  """
  if not size:
    return x
  height, width = x.shape[1:3]

  def one(key, image):
    """Sets a random square of one image `[H, W, D]` to 0."""
    # The centre is uniform over the image; the square may begin before 0.
    top, left = jax.random.randint(key, (2,), 0, jnp.array([height, width])) - size // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (top <= rows) & (rows < top + size)
    in_columns = (left <= columns) & (columns < left + size)
    square = in_rows[:, None] & in_columns
    return jnp.where(square[..., None], 0, image)

  return jax.vmap(one)(example_keys(key, x.shape[0], axis_name), x)
