"""What is asked of images and sizes, in the same words wherever they come in.

Axes: N images, H and W pixels, D input channels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
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
    raise ValueError(f"{name} must be network inputs in floating point, normalised as in training; got {x.dtype}")
  return x if x.dtype == jnp.float32 else x.astype(jnp.float32)  # which would copy float32 as well


def finite(name: str, x: Any) -> np.ndarray:
  """The images in host memory. Raises ValueError where one has NaN or infinity."""
  x = np.asarray(x)
  good = np.isfinite(x).all(axis=(1, 2, 3))
  if not good.all():
    raise ValueError(f"{name} must be finite; image {int(np.argmin(good))} is not")
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


def at_least_one(**values: Any) -> None:
  """Raises ValueError naming the first that is no whole number from 1 on."""
  for name, value in values.items():
    if not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(f"{name} must be >= 1, a whole number; got {value!r}")


def alike(name: str, tree: Any, like: Any) -> None:
  """Raises ValueError unless a network has the parts, groups of gates and shapes of another, of `shapes_of`."""
  shapes = shapes_of(tree)
  if jax.tree.structure(shapes) != jax.tree.structure(like):
    raise ValueError(f"{name} must have the parts and groups of gates of the network that was compiled; got others")
  for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(like), strict=True):
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
      where = jax.tree_util.keystr(path, simple=True, separator=".")
      raise ValueError(f"{name} must have the shapes of the network that was compiled, at {where} {wanted.dtype} "
                       f"{wanted.shape}; got {found.dtype} {found.shape}")


def shapes_of(tree: Any) -> Any:
  """The same tree of `jax.ShapeDtypeStruct`."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)
