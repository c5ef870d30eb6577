"""Backward pass on open examples only.

An example that a closed gate multiplies by 0 gets no gradient, so none has to be computed.

Axes: N examples (or segments), K = `capacity`, on which the backward pass runs.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Chen et al., "Training deep nets
  with sublinear memory cost", 2016 (the forward pass again, in the backward pass).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_indices, scatter_back
from gating_jax.ops.precision import as_float
from gating_jax.types import Array


def open_backward(
  f: Callable[[Any, Array], Array], variables: Any, x: Array, gates: Array, *, capacity: int
) -> Array:
  """Computes `f(variables, x)`, with a backward pass on the open examples only.

  The value is that of all examples, since a gate's straight-through gradient needs the output that
  a closed example would have had. The gradients of `variables` and `x` are those of `f` where

      f treats every example independently (GroupNorm, or BatchNorm with running statistics), and
      the loss has no derivative in the output of a closed example, as when gates multiply it.

  With F the cost of a forward pass and 2F that of a backward pass, s N = `capacity` of N examples
  cost F (1 + 3 s) in place of 3F, since the backward pass computes the forward pass of the open
  ones again: a gain below s = 2/3.

  Args:
    f: `(variables, x [K, ...]) -> [K, ...]`, for any K.
    variables: a tree of floating-point arrays.
    x: `[N, ...]`.
    gates: `[N]`; an example is open where its gate is above 0. Their gradient here is 0.
    capacity: K, from 1 to N, not below the number of open examples, such as `capacity_for(count,
      sizes)`. A traced program cannot raise: if more examples are open, all gradients are NaN,
      never silently wrong.
  Returns:
    `[N, ...]`.
  Raises:
    ValueError: gates that do not fit x, or a capacity out of range.
    TypeError: an argument of another kind.

  >>> half = lambda w: jnp.sum(jnp.array([1.0, 0.0]) * open_backward(
  ...     lambda w, x: jnp.sin(w * x), w, jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]), capacity=1))
  >>> jax.grad(half)(0.0)
  Array(1., dtype=float32, weak_type=True)
  """
  arguments.function("f", f)
  arguments.real_array("x", x)
  arguments.real_array("gates", gates)
  arguments.whole_number("capacity", capacity, 0)
  if jnp.ndim(x) < 1 or jnp.shape(gates) != jnp.shape(x)[:1]:
    raise ValueError(
      f"gates must be [N] for x's N examples; got gates {jnp.shape(gates)}, x {jnp.shape(x)}"
    )
  if not 1 <= capacity <= len(x):
    raise ValueError(f"capacity must be from 1 to the {len(x)} examples of x; got {capacity}")
  return _open_backward(f, capacity, variables, jnp.asarray(x), jnp.asarray(gates))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _open_backward(f, capacity, variables, x, gates):
  return f(variables, x)


def _open_backward_fwd(f, capacity, variables, x, gates):
  return f(variables, x), (variables, x, gates)


# With y_n = f(v, x_n) and dL/dy_n = 0 for closed n: dL/dx_n = 0 for these, and dL/dv = sum over
# open n of dL/dy_n dy_n/dv.
def _open_backward_bwd(f, capacity, residuals, ct):
  variables, x, gates = residuals
  index, taken = open_indices(gates, capacity)
  # The forward pass of the open examples again: nothing of it was kept.
  _, pull = jax.vjp(f, variables, x[index])
  # Padding repeats example 0, whose cotangent must not count twice.
  of_variables, of_x = pull(jnp.where(taken.reshape(-1, *[1] * (ct.ndim - 1)), ct[index], 0))
  # Gradients of examples left out would be silently missing, so they become NaN.
  fits = jnp.sum(as_float(gates) > 0) <= capacity
  checked = lambda tree: jax.tree.map(lambda g: jnp.where(fits, g, jnp.nan), tree)
  return checked(of_variables), checked(scatter_back(of_x, index, taken, len(x))), jnp.zeros_like(gates)


_open_backward.defvjp(_open_backward_fwd, _open_backward_bwd)
