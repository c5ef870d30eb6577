"""Modes of JAX in which a function must give the same as without: values, types and shapes.

Projects turn them on for other reasons: an optimiser needs float64, or they look for mistakes of
their own.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np


@contextlib.contextmanager
def every_mode():
  """Turns all modes on at once.

  That finds what each of them would: a number that float64 makes wider shows in the result, or
  meets a float32, which strict promotion refuses.
  """
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield


def together(calls):
  """Returns one function that gives the results of several, by name."""
  return lambda *args: {name: call(*args) for name, call in calls.items()}


def computed(calls, *args):
  """Returns the values that functions have, by name."""
  return jax.tree.map(np.asarray, jax.jit(together(calls))(*args))


def traced(calls, *args):
  """Returns the shapes and types that functions have, by name; a mode that refuses does so here."""
  return jax.eval_shape(together(calls), *args)


def _size(values):
  """Returns the largest finite number of an array; 0 where it has none."""
  values = np.asarray(values).astype(np.float64)
  return np.max(np.abs(values), initial=0, where=np.isfinite(values))


def assert_same(found, usual, *, sized_by_call=False):
  """Asserts that results have the same types, shapes and, up to rounding, values, if any.

  Rounding is relative to the largest number of an array. With `sized_by_call` it is relative to the
  largest of all that one call returns: a gradient may be the small sum of large terms that cancel,
  as that of a scale before a norm.
  """
  assert jax.tree.structure(found) == jax.tree.structure(usual)
  pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(usual), strict=True)
  for (path, leaf), wanted in pairs:
    name = jax.tree_util.keystr(path)
    assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape), name
    if isinstance(leaf, jax.ShapeDtypeStruct):
      continue
    if not jnp.issubdtype(wanted.dtype, jnp.floating):
      np.testing.assert_array_equal(leaf, wanted, name)
      continue
    rounding = 4 * float(jnp.finfo(wanted.dtype).eps) + 1e-6
    leaf, wanted = leaf.astype(np.float64), wanted.astype(np.float64)
    size = (
      max(_size(each) for each in jax.tree.leaves(usual[path[0].key]))
      if sized_by_call
      else _size(wanted)
    )
    np.testing.assert_allclose(leaf, wanted, rtol=rounding, atol=rounding * size, err_msg=name)
