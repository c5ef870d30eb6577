"""From uint8 pixels to network input, inside the step: crop, flip, normalise, cut out.

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
  """uint8 pixels to float32: `(pixels / 255 - mean) / std`, per channel.

  Args:
    pixels: `[B, H, W, D]`.
    mean, std: D numbers, or one for all channels, in units of the full scale.
  Raises:
    ValueError: pixels of another type, which would be scaled as if they were of this; another number of channels.
  """
  if pixels.dtype != jnp.uint8:
    raise ValueError(
      f"pixels must be uint8, as gating_jax.data.pictures.to_uint8 makes them; got {pixels.dtype}"
    )
  for name, value in (("mean", mean), ("std", std)):
    if len(value) not in (1, pixels.shape[-1]):
      raise ValueError(
        f"{name} must hold 1 or {pixels.shape[-1]} numbers, one per channel; got {tuple(value)}"
      )
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return (pixels.astype(jnp.float32) / 255 - mean) / std


def crop_and_flip(
  key: Array, pixels: Array, *, pad: int, flip: bool, axis_name: Hashable | None = None
) -> Array:
  """Shifts each image by up to `pad` pixels (zeros come in), and mirrors it with probability 1/2.

  An image's draw depends on its place in the whole batch, not on the device it is on.

  Args:
    key: a PRNG key, the same on every device.
    pixels: `[B, H, W, D]`, any dtype.
    pad: largest shift; 0 for none.
    flip: whether to mirror left-right.
    axis_name: the mapped device axis over which the batch is spread.
  """
  if not pad and not flip:
    return pixels
  size = pixels.shape[1:]
  padded = jnp.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

  def one(key, image):
    where, mirror = jax.random.split(key)
    top, left = jax.random.randint(where, (2,), 0, 2 * pad + 1)
    image = lax.dynamic_slice(image, (top, left, 0), size)
    return jnp.where(flip & jax.random.bernoulli(mirror), image[:, ::-1], image)

  return jax.vmap(one)(example_keys(key, pixels.shape[0], axis_name), padded)


def cut_out(key: Array, x: Array, *, size: int, axis_name: Hashable | None = None) -> Array:
  """Sets a square of each image to 0, the mean of normalised pixels; its centre may lie anywhere in the image.

  Args:
    key, axis_name: as in `crop_and_flip`.
    x: `[B, H, W, D]`.
    size: width of the square in pixels, of which what lies outside is lost; 0 for none.

  Reference: DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.
  """
  if not size:
    return x
  shape = jnp.array(x.shape[1:3])

  def one(key, image):
    first = jax.random.randint(key, (2,), 0, shape) - size // 2
    rows, columns = (
      (first[i] <= at) & (at < first[i] + size)
      for i, at in enumerate(map(jnp.arange, image.shape[:2]))
    )
    return jnp.where((rows[:, None] & columns)[..., None], 0, image)

  return jax.vmap(one)(example_keys(key, x.shape[0], axis_name), x)
