"""Types and ranks that do not depend on JAX's settings.

Those of JAX's own promotion do. With `jax_enable_x64` a NumPy float64 number turns float32 into
float64. With `jax_numpy_dtype_promotion='strict'` an operation on two types is an error, as is one
on two ranks with `jax_numpy_rank_promotion='raise'`.
"""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from gating_jax.types import Array


def as_float(x: Array) -> Array:
  """Returns `x` in floating point of at least 32 bits, in which priors and losses compute.

  bfloat16, float16, integers, truth values and Python's numbers become float32; float64 stays.

  >>> as_float(jnp.arange(2)).dtype, as_float(jnp.ones(2, jnp.bfloat16)).dtype
  (dtype('float32'), dtype('float32'))
  """
  x = jnp.asarray(x)
  # A weak type is that of a Python number, whose float64 nobody chose. Complex numbers stay as they
  # are.
  if jnp.issubdtype(x.dtype, jnp.complexfloating) or (x.dtype == jnp.float64 and not x.weak_type):
    return x
  return x.astype(jnp.float32)


def float_dtype(x: Array) -> np.dtype:
  """Returns the type of `x` if it is a floating one, else float32.

  Integers and truth values count as float32.

  >>> float_dtype(jnp.ones(2, jnp.bfloat16)), float_dtype(jnp.arange(2))
  (dtype(bfloat16), dtype('float32'))
  """
  return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else np.dtype(np.float32)


def number_as(number: int | float, like: Array) -> Array:
  """Returns a number in the floating type of an array.

  The number may be computed from sizes that are not known yet, as in `jax.export`.

  >>> number_as(2**40, like=jnp.ones(2, jnp.float32))
  Array(1.0995116e+12, dtype=float32)
  """
  # A size that is not known yet has no value that `float` could take.
  known = number if jax.export.is_symbolic_dim(number) else float(number)
  return jnp.asarray(known, float_dtype(like))


def same_rank(*arrays: Array) -> tuple[Array, ...]:
  """Returns the arrays at the largest of their ranks, with axes of length 1 added in front.

  >>> [x.shape for x in same_rank(jnp.ones((2, 3)), jnp.ones(3), 0.5)]
  [(2, 3), (1, 3), (1, 1)]
  """
  rank = max(jnp.ndim(x) for x in arrays)
  return tuple(jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x)) for x in arrays)
