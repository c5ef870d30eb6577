"""From uint8 pixels to network input, inside the step: crop, flip, normalise.

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
    ValueError: another number of channels.
  """
  for name, value in (("mean", mean), ("std", std)):
    if len(value) not in (1, pixels.shape[-1]):
      raise ValueError(f"{name} must hold 1 or {pixels.shape[-1]} numbers, one per channel; got {tuple(value)}")
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return (pixels.astype(jnp.float32) / 255 - mean) / std


def crop_and_flip(key: Array, pixels: Array, *, pad: int, flip: bool, axis_name: Hashable | None = None) -> Array:
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
