"""What is asked of images and sizes, in the same words wherever they come in.

Axes: N images, H and W pixels, D input channels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gating_jax.types import Array


def images(name: str, x: Any, shape: Sequence[int] | None = None) -> Array:
  """`[N, H, W, D]` float32 network inputs, of an array of any floating-point type.

  Args:
    name: of the argument.
    x: the array.
    shape: `(H, W, D)`; None for any.
  Raises:
    ValueError: another rank, shape or type, such as pixels in uint8 that nobody has normalised.
  """
  x = x if hasattr(x, "dtype") else np.asarray(x)
  if x.ndim != 4 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
    wanted = "N, H, W, D" if shape is None else ", ".join(map(str, ("N", *shape)))
    raise ValueError(f"{name} must be [{wanted}]; got shape {tuple(x.shape)}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be network inputs in floating point, normalised as in training; got {x.dtype}"
    )
  return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def finite(name: str, x: Any) -> np.ndarray:
  """The images in host memory. Raises ValueError where one has NaN or infinity."""
  x = np.asarray(x)
  good = np.isfinite(x).all(axis=(1, 2, 3))
  if not good.all():
    raise ValueError(
      f"{name} must be finite; number {int(np.argmin(good))} of these {len(x)} is not"
    )
  return x


def image_shape(shape: Any) -> tuple[int, int, int]:
  """`(H, W, D)`. Raises ValueError unless it is three whole numbers from 1 on."""
  try:
    sizes = tuple(operator.index(size) for size in shape)
  except TypeError:
    sizes = ()
  if len(sizes) != 3 or min(sizes) < 1:
    raise ValueError(f"input_shape must be (H, W, D), whole numbers >= 1; got {shape!r}")
  return sizes


def spread(count: int, most: int) -> np.ndarray:
  """Indices of at most so many of `count` images, evenly over all."""
  return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
