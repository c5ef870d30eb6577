"""Networks with random variables, for tests of what they compute."""

import flax
import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(net, shape, *, deviation):
  """Makes random variables by path, kernels of this deviation and norms alive."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    if path[-1] == "kernel":
      values = rng.normal(0, deviation, leaf.shape)
    else:
      values = rng.uniform(0.5, 1.0, leaf.shape)
    return jnp.asarray(values, jnp.float32)

  shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
  return flax.traverse_util.unflatten_dict(
    {path: fill(path, leaf) for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
  )
