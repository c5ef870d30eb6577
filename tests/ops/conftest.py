"""Shared fixtures of the tests of pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def central_differences(x64):
  """`(f, x, step) -> df/dx` of a scalar function, in float64, without its gradient rules."""

  def differentiate(f, x, step=1e-6):
    shifts = step * jnp.eye(x.size, dtype=jnp.float64).reshape(x.size, *x.shape)
    values = jax.jit(lambda x: jax.vmap(f)(x[None] + jnp.concatenate([shifts, -shifts])))(
      jnp.asarray(x, jnp.float64)
    )
    return np.subtract(*np.split(values, 2)).reshape(x.shape) / (2 * step)

  return differentiate
