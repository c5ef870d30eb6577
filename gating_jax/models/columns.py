"""Columns for progressive networks: nets that look at what other columns made of the same images.

In a chain of convolutions every layer after the first does, and the dense layer at the end:

    h_i = f(W h_{i-1} + U ReLU(V [alpha_j h_{i-1}^j]_j)),   f = max pool (where there is one), ReLU, BatchNorm

with j over the columns before. In a residual net the layers that do are the first convolution of every block, where the
h are the blocks' inputs, and the dense layer; shortcuts carry the column's own h alone. U and W are one convolution
over both inputs, V is 1x1. A column before which there is none has zeros in their place, and so no use of its adapters.

Axes: J columns before, N examples, H and W pixels, D channels, F features.
Reference: Rusu et al., "Progressive neural networks", 2016.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import scaled
from gating_jax.layers.gate import GateSettings
from gating_jax.layers.mac_trace import kernel_calls
from gating_jax.models.resnet import RESNETS, ResNet, resnet
from gating_jax.models.vgg import POOL, VGGS, VGGLayer
from gating_jax.types import Array


class ColumnMacs(NamedTuple):
  """Multiply-accumulates per image of one column: of its layers, and of its dense layer."""

  layers: int
  head: int


class ChainColumn(nn.Module):
  """`[N, H, W, D]` images, and the layers' outputs of J columns, to logits and this column's.

  Called with `(x, before)`, `before` a tuple of `[J, N, H_i, W_i, D_i]`, zeros where there is no column, or empty for a
  net without adapters; returns `([N, classes] float32, tuple of [N, H_i, W_i, D_i])`.

  Attributes:
    classes: number of outputs.
    chain, width, norm, dtype, axis_name: as in `VGG`.
    alpha: what each alpha_j starts from.
  """

  classes: int
  chain: tuple[int | str, ...]
  width: float = 1.0
  norm: bool = True
  alpha: float = 0.1
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(
    self, x: Array, before: Sequence[Array], train: bool = False
  ) -> tuple[Array, tuple[Array, ...]]:
    h, outputs = x.astype(self.dtype), []
    convs = [i for i, channels in enumerate(self.chain) if channels != POOL]
    for number, i in enumerate(convs, start=1):
      if outputs and before:
        beside = Adapter(self.alpha, name=f"adapter{number}")(before[number - 2])
        h = jnp.concatenate([h, beside], axis=-1)
      h, _ = VGGLayer(
        features=scaled(self.chain[i], self.width),
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
  """As `ChainColumn`, of a residual net without gates; the outputs are the stem's and every block's.

  Attributes:
    alpha: what each alpha_j starts from; the others are those of `ResNet`.
  """

  alpha: float = 0.1

  @nn.compact
  def __call__(
    self, x: Array, before: Sequence[Array], train: bool = False
  ) -> tuple[Array, tuple[Array, ...]]:
    h = self._stem(x, train)
    outputs = [h]
    for stage, (stride, dilation) in enumerate(zip(*self.resolution(x), strict=True)):
      for number in range(self.blocks[stage]):
        block = self._block(stage, number, stride, dilation)
        beside = (
          Adapter(self.alpha, name=f"{block.name}_adapter")(before[len(outputs) - 1])
          if before
          else None
        )
        h, _ = block(h, train, beside)
        outputs.append(h)
    return _logits(self, h, before), tuple(outputs)


Column = ChainColumn | ResNetColumn


class Adapter(nn.Module):
  """`ReLU(V [alpha_j h^j]_j)`, V without a bias: `[J, ..., D]` to `[..., D]`, in the features' dtype."""

  alpha: float

  @nn.compact
  def __call__(self, before: Array) -> Array:
    columns, channels = before.shape[0], before.shape[-1]
    alpha = self.param("alpha", nn.initializers.constant(self.alpha), (columns,), jnp.float32)
    kernel = self.param(
      "kernel", nn.initializers.he_normal(batch_axis=0), (columns, channels, channels), jnp.float32
    )
    return nn.relu(
      jnp.einsum("j...d,jde->...e", before, (alpha[:, None, None] * kernel).astype(before.dtype))
    )


def column(name: str, classes: int, **settings) -> Column:
  """One of a named chain of `VGGS` or residual net of `RESNETS`; `settings` are other fields of either.

  Raises:
    ValueError: any other name.
  """
  one_of("model name of columns", name, {**VGGS, **RESNETS})
  if name in VGGS:
    return ChainColumn(classes=classes, chain=VGGS[name], **settings)
  return resnet(name, classes, kind=ResNetColumn, **settings)


@functools.cache
def output_shapes(column: Column, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
  """`(H_i, W_i, D_i)` of each output of a column for an image of this shape."""
  _, outputs = _trace(column, shape, ())
  return tuple(h.shape[1:] for h in outputs)


@functools.cache
def column_macs(column: Column, shape: tuple[int, int, int], columns_before: int) -> ColumnMacs:
  """Of a column with so many before it, on an image of this shape; what is known to be 0 is not counted."""
  shapes, j = output_shapes(column, shape), columns_before
  with kernel_calls() as calls:
    _trace(column, shape, [(j, 1, *h) for h in shapes] if j else ())
  head = sum(call.macs for call in calls if call.path == ("classifier",))
  adapters = [j * math.prod(h) * h[-1] for h in shapes[:-1]]
  return ColumnMacs(
    sum(call.macs for call in calls) - head + sum(adapters), head + j * shapes[-1][-1] ** 2
  )


def _trace(
  column: Column, shape: Sequence[int], before: Sequence[Sequence[int]]
) -> tuple[Array, tuple[Array, ...]]:
  """What a new column returns, as shapes."""
  image, *before = (jax.ShapeDtypeStruct(s, column.dtype) for s in ((1, *shape), *before))
  return jax.eval_shape(
    lambda x, b: column.init_with_output(jax.random.key(0), x, b)[0], image, before
  )


def _logits(column: Column, h: Array, before: Sequence[Array]) -> Array:
  """The dense layer of a column, within its call, on the last features and those of the columns before."""
  pooled = jnp.mean(h.astype(jnp.float32), axis=(1, 2))
  if before:
    pooled_before = jnp.mean(before[-1].astype(jnp.float32), axis=(2, 3))
    pooled = jnp.concatenate(
      [pooled, Adapter(column.alpha, name="classifier_adapter")(pooled_before)], axis=-1
    )
  return nn.Dense(column.classes, name="classifier")(pooled)
