"""Arguments: checks with one-line errors, and types and ranks that do not depend on JAX's settings.

Errors name the argument, the rule and the value.

Types and ranks of JAX's own promotion depend on its settings. With `jax_enable_x64` a NumPy float64
number turns float32 into float64. With `jax_numpy_dtype_promotion='strict'` an operation on two
types is an error, as is one on two ranks with `jax_numpy_rank_promotion='raise'`.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gating_jax.checks import is_array, shown
from gating_jax.types import AnyArray, Array, GateRecord

# NumPy's kinds of types that hold no real number: objects, texts, bytes, complex numbers, times.
_NO_NUMBERS = "OSUcmM"


def instance(name: str, value: object, kind: type | tuple[type, ...], *, rule: str) -> None:
  """Raises a TypeError unless `value` is an instance of `kind`.

  >>> instance("settings", {"hidden": 4}, int, rule="a whole number")
  Traceback (most recent call last):
  TypeError: settings must be a whole number; got {'hidden': 4}
  """
  if not isinstance(value, kind):
    raise TypeError(f"{name} must be {rule}; got {shown(value)}")


def function(name: str, value: object, rule: str = "a function") -> None:
  """Raises a TypeError unless `value` can be called."""
  if not callable(value):
    raise TypeError(f"{name} must be {rule}; got {shown(value)}")


def number(name: str, value: Any, rule: str, *, holds: Callable[[Any], bool]) -> None:
  """Raises an error unless `value` is a real number that fulfils the rule.

  Numbers computed from unknown sizes, as in `jax.export`, are accepted.

  Args:
    name: of the argument.
    value: the number.
    rule: in words.
    holds: returns whether a number fulfils the rule.
  Raises:
    TypeError: `value` is no real number, or is traced.
    ValueError: it breaks the rule.
  """
  if jax.export.is_symbolic_dim(value):
    return
  # Python's truth values are integers too, but a mistake where a number is expected.
  if not isinstance(value, numbers.Real) or isinstance(value, bool):
    raise TypeError(f"{name} must be a number {rule}; got {shown(value)}")
  if not holds(value):
    raise ValueError(f"{name} must be {rule}; got {value}")


def whole_number(name: str, value: Any, least: int = 1) -> None:
  """Raises an error unless `value` is a whole number of at least `least`.

  A size that is not known yet, as in `jax.export`, is accepted.

  Raises:
    TypeError: `value` is no whole number.
    ValueError: it is below `least`.
  """
  if jax.export.is_symbolic_dim(value):
    return
  try:
    # Accepts the integers of NumPy as well, and no float.
    known = operator.index(value)
  except TypeError:
    raise TypeError(f"{name} must be a whole number >= {least}; got {shown(value)}") from None
  if isinstance(value, bool):
    raise TypeError(f"{name} must be a whole number >= {least}; got {value}")
  if known < least:
    raise ValueError(f"{name} must be >= {least}; got {value}")


def parameter(name: str, value: Any, rule: str, *, holds: Callable[[Any], Any]) -> Any:
  """Returns `value` as a number or an array, checked as far as it is known.

  Args:
    name: of the argument.
    value: a real number, a list of them, or an array, which may be traced.
    rule: in words.
    holds: maps float64 values to whether each fulfils the rule.
  Raises:
    TypeError: `value` holds no real numbers.
    ValueError: it is known and breaks the rule.
  """
  # A tracer has no value to check.
  if isinstance(value, Tracer):
    return value
  try:
    known = np.asarray(value)
  # Such as rows of unequal lengths.
  except (TypeError, ValueError):
    known = np.asarray(None)
  if known.dtype.kind in _NO_NUMBERS:
    raise TypeError(f"{name} must be {rule}; got {shown(value)}")
  if not np.all(holds(known.astype(np.float64))):
    raise ValueError(f"{name} must be {rule}; got {shown(value)}")
  # A Python number has no fixed type, so it takes part in float32 and float64 alike.
  return float(value) if isinstance(value, numbers.Real) else jnp.asarray(value)


def real_array(name: str, value: Any, axes: str = "") -> None:
  """Raises an error unless `value` is a real number or an array of them.

  Args:
    name: of the argument.
    value: anything; a list of numbers counts as an array.
    axes: such as `[N, C]`, for the message and for the number of axes; empty for any.
  Raises:
    TypeError: another kind of value.
    ValueError: another number of axes.
  """
  what = f"an {axes} array of real numbers" if axes else "an array of real numbers"
  if not _holds_real_numbers(value):
    raise TypeError(f"{name} must be {what}; got {shown(value)}")
  if axes and np.ndim(value) != axes.count(",") + 1:
    raise ValueError(f"{name} must be {axes}; got shape {np.shape(value)}")


def _holds_real_numbers(value: Any) -> bool:
  """Returns whether a value is a real number, an array of them, or a list of them."""
  if isinstance(value, (list, tuple)):
    return all(_is_scalar(v) for v in value)
  return is_array(value) and _is_real(value.dtype) or _is_scalar(value)


def one_shape(axes: str, **arrays: Any) -> tuple[Array, ...]:
  """Returns arrays of real numbers, which must have the given axes and one shape.

  >>> one_shape("[B, T]", gates=np.ones((2, 3)), valid=np.ones((2, 4)))
  Traceback (most recent call last):
  ValueError: gates, valid must be [B, T] of one shape; got (2, 3), (2, 4)
  """
  for name, value in arrays.items():
    real_array(name, value, axes)
  shapes = [np.shape(value) for value in arrays.values()]
  if len(set(shapes)) > 1:
    raise ValueError(
      f"{', '.join(arrays)} must be {axes} of one shape; got {', '.join(map(str, shapes))}"
    )
  return tuple(map(jnp.asarray, arrays.values()))


def items(name: str, values: Any, what: str) -> tuple[Any, ...]:
  """Returns the values of an iterable as a tuple.

  An array, a mapping and a text raise a TypeError, as does anything that is no iterable.

  >>> items("probs", np.zeros((6, 4)), "one [N, C] array per layer")
  Traceback (most recent call last):
  TypeError: probs must be a list of one [N, C] array per layer; got float64[6,4]
  """
  if (
    is_array(values)
    or _is_text(values)
    or isinstance(values, Mapping)
    or not isinstance(values, Iterable)
  ):
    raise TypeError(f"{name} must be a list of {what}; got {shown(values)}")
  return tuple(values)


def of_record(value: AnyArray | GateRecord, field: str) -> AnyArray:
  """Returns a field of a `GateRecord`; any other value as it is.

  >>> of_record(GateRecord(logits=1.0, probs=0.7, gates=1.0), "probs"), of_record(0.5, "probs")
  (0.7, 0.5)
  """
  return getattr(value, field) if isinstance(value, GateRecord) else value


def within_reach(name: str, shape: tuple[int, ...]) -> None:
  """Raises a ValueError if an array has 2**31 elements or more, beyond 32-bit indices.

  A shape with a size that is not known yet, as in `jax.export`, is accepted.
  """
  if all(isinstance(size, int) for size in shape) and math.prod(shape) >= 2**31:
    raise ValueError(
      f"{name} must have fewer than 2**31 elements, the limit of 32-bit indices; got shape {shape}"
    )


def prng_key(name: str, key: Any) -> None:
  """Raises a TypeError unless `key` is a PRNG key of `jax.random`."""
  dtype = getattr(key, "dtype", None)
  # JAX has typed keys, and raw ones of uint32.
  if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
    raise TypeError(f"{name} must be a PRNG key, such as jax.random.key(0); got {shown(key)}")


def as_float(x: AnyArray) -> Array:
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


def float_dtype(x: AnyArray) -> np.dtype:
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
  if isinstance(number, float) or not jax.export.is_symbolic_dim(number):
    number = float(number)
  return jnp.asarray(number, float_dtype(like))


def same_rank(*arrays: Array) -> tuple[Array, ...]:
  """Returns the arrays at the largest of their ranks, with axes of length 1 added in front.

  >>> [x.shape for x in same_rank(jnp.ones((2, 3)), jnp.ones(3), 0.5)]
  [(2, 3), (1, 3), (1, 1)]
  """
  rank = max(map(jnp.ndim, arrays))
  return tuple(_at_rank(x, rank) for x in arrays)


def aligned(x: Array, *parameters: Any) -> tuple[Any, ...]:
  """Returns `x` and its parameters, ready for elementwise operations.

  Numbers stay numbers, since they take part in any type. Arrays get x's type, and all get one rank.
  """
  rank = max(map(jnp.ndim, (x, *parameters)))
  result: list[Any] = [_at_rank(x, rank)]
  for parameter in parameters:
    if _is_scalar(parameter):
      result.append(float(parameter))
    else:
      result.append(_at_rank(jnp.asarray(parameter, x.dtype), rank))
  return tuple(result)


def one_dtype(*arrays: AnyArray) -> tuple[Any, ...]:
  """Returns floating-point arrays in the widest of their types.

  Sums of both then have that type in every mode of JAX. Arrays of NumPy alone stay as they are.

  >>> [x.dtype for x in one_dtype(jnp.ones(2), jnp.ones(2, jnp.bfloat16))]
  [dtype('float32'), dtype('float32')]
  """
  dtypes = {np.dtype(x.dtype) for x in arrays}
  if len(dtypes) == 1 or all(isinstance(x, np.ndarray) for x in arrays):
    return arrays
  dtype = functools.reduce(np.promote_types, dtypes)
  # Without `jax_enable_x64`, float64 of NumPy becomes float32.
  return tuple(jnp.asarray(x, jax.dtypes.canonicalize_dtype(dtype)) for x in arrays)


def _at_rank(x: Array, rank: int) -> Array:
  """Returns x with axes of length 1 added in front."""
  return jnp.reshape(x, (1,) * (rank - jnp.ndim(x)) + jnp.shape(x))


def _is_real(dtype: Any) -> bool:
  try:
    is_number = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return is_number or jnp.issubdtype(dtype, jnp.bool_)
  # A type of another library, unknown to JAX.
  except TypeError:
    return False


def _is_scalar(value: object) -> bool:
  return isinstance(value, numbers.Real)


def _is_text(value: object) -> bool:
  return isinstance(value, (str, bytes))
