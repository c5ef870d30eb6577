"""Shared checks of images and sizes, with the same messages wherever they come in.

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
  """Checks `[N, H, W, D]` network inputs of any floating-point type, and returns them in float32.

  Args:
    name: of the argument.
    x: the array.
    shape: `(H, W, D)`; None for any.
  Raises:
    ValueError: another rank, shape or type, such as pixels in uint8 that are not normalised.
  """
  # jax arrays stay on their device.
  x = x if hasattr(x, "dtype") else np.asarray(x)
  if x.ndim != 4 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
    wanted = "N, H, W, D" if shape is None else ", ".join(map(str, ("N", *shape)))
    raise ValueError(f"{name} must be [{wanted}]; got shape {tuple(x.shape)}")
  # uint8 pixels would be cast without an error, and give wrong outputs.
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be network inputs in floating point, normalised as in training; got {x.dtype}"
    )
  return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def finite(name: str, x: Any) -> np.ndarray:
  """Returns the images in host memory.

  Raises:
    ValueError: an image has NaN or infinity.
  """
  x = np.asarray(x)
  good = np.isfinite(x).all(axis=(1, 2, 3))
  if not good.all():
    raise ValueError(f"{name} must be finite; index {int(np.argmin(good))} of {len(x)} is not")
  return x


def image_shape(shape: Any) -> tuple[int, int, int]:
  """Returns `(H, W, D)` as a tuple.

  Raises:
    ValueError: it is not three whole numbers >= 1.
  """
  try:
    # `index` takes numpy's whole numbers as well, and no floats.
    sizes = tuple(operator.index(size) for size in shape)
  except TypeError:
    sizes = ()
  if len(sizes) != 3 or min(sizes) < 1:
    raise ValueError(f"input_shape must be (H, W, D), whole numbers >= 1; got {shape!r}")
  return sizes


def spread(count: int, most: int) -> np.ndarray:
  """Returns the indices of at most `most` of `count` images, evenly over all."""
  return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
