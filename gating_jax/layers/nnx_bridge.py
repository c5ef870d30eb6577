"""Flax NNX models as Linen models, so that they can be gated, counted and folded as these are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn

from gating_jax.ops import arguments

if TYPE_CHECKING:
  from flax import nnx


def from_nnx(model: nnx.Module) -> nn.Module:
  """Returns a Linen model that computes what a Flax NNX model does, bit for bit.

      linen = from_nnx(model)
      variables = linen.init(key, x)
      y = linen.apply(variables, x)
      gated = GatedModel(linen, find_pairs(linen, x).pairs)

  `init` returns the model's values as they are now, whatever the key. They have the model's names:
  `nnx.Param`s in the collection `params`, `nnx.BatchStat`s in `batch_stats`, others in that of
  their type. Layers in a list have its indices, as in `"blocks/0/conv"`. The model stays as it is.
  A layer that shares a variable with another, or has a kernel of another type than `nnx.Param`,
  runs as in the model, but cannot be gated.

  Called with `train=True`, it runs as after `model.train()`, otherwise as after `model.eval()`.
  Its random numbers come from the stream `dropout` in training.

  Args:
    model: called as `model(x)`, perhaps with an argument that says the mode, and with others.
  Returns:
    A Linen module, called as `linen(x, train=False, **others)`.
  Raises:
    TypeError: `model` is no NNX module; a class, for example.

  >>> import jax, jax.numpy as jnp
  >>> from flax import nnx
  >>> class Net(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
  ...   def __call__(self, x):
  ...     return self.last(nnx.relu(self.first(x)))
  >>> model, x = Net(nnx.Rngs(0)), jnp.ones((5, 3))
  >>> linen = from_nnx(model)
  >>> variables = linen.init(jax.random.key(0), x)
  >>> variables["params"]["first"]["kernel"].shape
  (3, 8)
  >>> bool((linen.apply(variables, x) == model(x)).all())
  True
  """
  # Imported here: `from gating_jax import *` would otherwise load NNX.
  from flax import nnx

  from gating_jax.layers.nnx_model import FromNNX, Source

  arguments.instance("model", model, nnx.Module, rule="an instance of a Flax NNX module")
  # A copy, so that later training of the model changes nothing here.
  graph, state = nnx.split(nnx.clone(model))
  return FromNNX(Source(graph, state))
