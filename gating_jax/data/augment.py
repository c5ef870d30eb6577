"""Augmentation inside the training step: crop, flip, normalise and cut out uint8 images.

Axes: B images, H and W pixels, D channels.
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
