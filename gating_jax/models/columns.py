"""Columns of progressive networks, which also read the features of the columns before them.

In a chain of convolutions, every layer after the first and the dense layer at the end compute

    h_i = f(W h_{i-1} + U ReLU(V [alpha_j h_{i-1}^j]_j)),
    f = max pool (where there is one), ReLU, BatchNorm

with j over the columns before. In a residual net, the first convolution of every block (where the
h are the blocks' inputs) and the dense layer do so; shortcuts carry the column's own h only. U and
W are one convolution over both inputs; V is 1x1. The first column sees zeros in place of the
missing features, so its adapters are inert.

Axes: J columns before, N examples, H and W pixels, D channels, F features.
Reference: Rusu et al., "Progressive neural networks", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import scaled
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import RESNETS, ResNet, resnet
from gating_jax.models.vggs import POOL, VGGS, Chain, VGGLayer
from gating_jax.names import lazy_names
from gating_jax.types import Array, cached


class ChainColumn(nn.Module):
  """Column that is a chain of convolutions.

  Called with `(x, before)`: images `[N, H, W, D]` and a tuple of the earlier columns' layer
  outputs, `[J, N, H_i, W_i, D_i]` each. These are zeros where there is no column; an empty tuple
  gives a net without adapters. Returns
  `([N, classes] float32 logits, tuple of [N, H_i, W_i, D_i])`, where the tuple holds the outputs of
  this column's layers.

  Attributes:
    classes: number of outputs.
    chain, width, norm, dtype, axis_name: as in `VGG`.
    alpha: initial value of each alpha_j.
  """

  classes: int
  chain: Chain
  width: float = 1.0
  norm: bool = True
  alpha: float = 0.1
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, x: Array, before: Sequence[Array], train: bool = False
  ) -> tuple[Array, tuple[Array, ...]]:
    h, outputs = x.astype(self.dtype), []
    # `chain` mixes convolutions with pools; layers are numbered by their convolutions alone.
    convs = [(i, channels) for i, channels in enumerate(self.chain) if channels != POOL]
    for number, (i, channels) in enumerate(convs, start=1):
      if outputs and before:
        # W and U of the module's equation are one convolution over both inputs, side by side.
        # Layer `number` reads the output of layer `number - 1`, whose index is `number - 2`.
        extra = Adapter(self.alpha, name=f"adapter{number}")(before[number - 2])
        h = jnp.concatenate([h, extra], axis=-1)
      h, _ = VGGLayer(
        features=scaled(channels, self.width),
        pool=POOL in self.chain[i + 1 : i + 2],
        norm=self.norm,
        gating="none",
        gated_input=False,
        readers=(),
        gate=GateSettings(),
        dtype=self.dtype,
        axis_name=self.axis_name,
        name=f"layer{number}",
      )(h, train)
      outputs.append(h)
    return _logits(self, h, before), tuple(outputs)


class ResNetColumn(ResNet):
  """Column that is a residual net without gates.

  Called as `ChainColumn`; its outputs are those of the stem and of every block.

  Attributes:
    alpha: initial value of each alpha_j; the other fields are those of `ResNet`.
  """

  classes: int
  alpha: float = 0.1

  @nn.compact
  def __call__(
    self, x: Array, before: Sequence[Array], train: bool = False
  ) -> tuple[Array, tuple[Array, ...]]:
    h = self._stem(x, train)
    outputs = [h]
    for stage in self.plan(x):
      for plan in stage.blocks:
        block, extra = self._block(plan), None
        if before:
          # A block reads the earlier columns' features at its own input, the last output so far.
          adapter = Adapter(self.alpha, name=f"{plan.name}_adapter")
          extra = adapter(before[len(outputs) - 1])
        h, _ = block(h, train, extra)
        outputs.append(h)
    return _logits(self, h, before), tuple(outputs)


Column = ChainColumn | ResNetColumn


class Adapter(nn.Module):
  """Adapter from the features of J columns to one map: `ReLU(V [alpha_j h^j]_j)`, V without bias.

  `[J, ..., D]` to `[..., D]`, in the dtype of the features.
  """

  alpha: float

  @nn.compact
  def __call__(self, before: Array) -> Array:
    columns, channels = before.shape[0], before.shape[-1]
    alpha = self.param("alpha", nn.initializers.constant(self.alpha), (columns,), jnp.float32)
    # V is one [D, D] kernel per column: together a 1x1 convolution of all their channels.
    kernel = self.param(
      "kernel", nn.initializers.he_normal(batch_axis=0), (columns, channels, channels), jnp.float32
    )
    # alpha scales the kernels, which are smaller than the features.
    scaled_kernel = (alpha[:, None, None] * kernel).astype(before.dtype)
    return nn.relu(jnp.einsum("j...d,jde->...e", before, scaled_kernel))


def column(name: str, classes: int, **settings) -> Column:
  """Builds a column from a named chain of `VGGS` or residual net of `RESNETS`.

  Args:
    name: key of `VGGS` or `RESNETS`.
    classes: number of outputs.
    **settings: other fields of `ChainColumn` or `ResNetColumn`.

  Raises:
    ValueError: any other name.
  """
  one_of("model name of columns", name, {**VGGS, **RESNETS})
  if name in VGGS:
    return ChainColumn(classes=classes, chain=VGGS[name], **settings)
  return resnet(name, classes, kind=ResNetColumn, **settings)


@cached
def output_shapes(column: Column, shape: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
  """Returns `(H_i, W_i, D_i)` of each output of a column for an image of this shape."""
  _, outputs = trace_column(column, shape, ())
  return tuple(h.shape[1:] for h in outputs)


def trace_column(
  column: Column, shape: Sequence[int], before: Sequence[Sequence[int]]
) -> tuple[Array, tuple[Array, ...]]:
  """Returns the logits and outputs of a new column, as shapes."""
  image = jax.ShapeDtypeStruct((1, *shape), column.dtype)
  features = [jax.ShapeDtypeStruct(s, column.dtype) for s in before]
  outputs, _ = jax.eval_shape(column.init_with_output, jax.random.key(0), image, features)
  return outputs


def _logits(column: Column, h: Array, before: Sequence[Array]) -> Array:
  """Computes a column's logits from the last features, its own and those of the columns before.

  Called inside the column's `__call__`, so that the parameters belong to the column.
  """
  # The mean and the logits are float32, whatever the column computes in.
  pooled = jnp.mean(h.astype(jnp.float32), axis=(1, 2))
  if before:
    pooled_before = jnp.mean(before[-1].astype(jnp.float32), axis=(2, 3))
    pooled = jnp.concatenate(
      [pooled, Adapter(column.alpha, name="classifier_adapter")(pooled_before)], axis=-1
    )
  return nn.Dense(column.classes, name="classifier")(pooled)


if not TYPE_CHECKING:
  # Counts of columns were here before.
  __getattr__, __dir__ = lazy_names(
    __name__, {"gating_jax.models.summary": ("ColumnMacs", "column_macs")}
  )
