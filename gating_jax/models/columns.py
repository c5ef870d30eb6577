"""Columns for progressive networks: chains of convolutions that look at what other columns made of the same images.

    h_i = f(W h_{i-1} + U ReLU(V [alpha_j h_{i-1}^j]_j)),   f = max pool (where there is one), ReLU, BatchNorm

with j over the columns before, and the same for the dense layer at the end. U and W are one convolution over both
inputs, V is 1x1. A column before which there is none has zeros in their place, and so no use of its adapters.

Axes: J columns before, N examples, H and W pixels, D channels, F features.
Reference: Rusu et al., "Progressive neural networks", 2016.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import scaled
from gating_jax.layers.gate import GateSettings
from gating_jax.models.vgg import POOL, VGGS, VGGLayer
from gating_jax.types import Array


class ColumnMacs(NamedTuple):
  """Multiply-accumulates per image of one column: of its layers, and of its dense layer."""

  layers: int
  head: int


class Column(nn.Module):
  """`[N, H, W, D]` images, and the layers' outputs of J columns, to logits and this column's.

  Called with `(x, before)`, `before` a tuple of `[J, N, H_i, W_i, D_i]`, zeros where there is no column; returns
  `([N, classes] float32, tuple of [N, H_i, W_i, D_i])`.

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
  def __call__(self, x: Array, before: Sequence[Array], train: bool = False) -> tuple[Array, tuple[Array, ...]]:
    h, outputs = x.astype(self.dtype), []
    convs = [i for i, channels in enumerate(self.chain) if channels != POOL]
    for number, i in enumerate(convs, start=1):
      if outputs:
        h = self._with_adapter(h, before[number - 2], f"adapter{number}")
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
    pooled, before = (jnp.mean(a.astype(jnp.float32), axis=(-3, -2)) for a in (h, before[-1]))
    logits = nn.Dense(self.classes, name="classifier")(self._with_adapter(pooled, before, "classifier_adapter"))
    return logits, tuple(outputs)

  def _with_adapter(self, h: Array, before: Array, name: str) -> Array:
    return jnp.concatenate([h, Adapter(self.alpha, name=name)(before)], axis=-1)

  def output_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """`(H_i, W_i, D_i)` of each layer's output for an image of this shape."""
    height, width, _ = shape
    shapes = []
    for channels in self.chain:
      if channels == POOL:
        height, width = height // 2, width // 2
        shapes[-1] = (height, width, shapes[-1][2])
      else:
        shapes.append((height, width, scaled(channels, self.width)))
    return tuple(shapes)

  def macs(self, shape: Sequence[int], columns_before: int) -> ColumnMacs:
    """Of a column with so many before it, on an image of this shape; what is known to be 0 is not counted."""
    shapes, j = (tuple(shape), *self.output_shapes(shape)), columns_before
    layers = 0
    for number, ((height, width, d), (*_, features)) in enumerate(zip(shapes, shapes[1:], strict=False)):
      inputs = d if number == 0 or j == 0 else 2 * d
      adapter = 0 if number == 0 else j * d * d
      layers += height * width * (9 * inputs * features + adapter)
    d = shapes[-1][2]
    return ColumnMacs(layers, j * d * d + d * self.classes * (1 if j == 0 else 2))


class Adapter(nn.Module):
  """`ReLU(V [alpha_j h^j]_j)`, V without a bias: `[J, ..., D]` to `[..., D]`, in the features' dtype."""

  alpha: float

  @nn.compact
  def __call__(self, before: Array) -> Array:
    columns, channels = before.shape[0], before.shape[-1]
    alpha = self.param("alpha", nn.initializers.constant(self.alpha), (columns,))
    kernel = self.param("kernel", nn.initializers.he_normal(batch_axis=0), (columns, channels, channels))
    return nn.relu(jnp.einsum("j...d,jde->...e", before, (alpha[:, None, None] * kernel).astype(before.dtype)))


def column(name: str, classes: int, **settings) -> Column:
  """One of a named chain of `VGGS`.

  Raises:
    ValueError: any other name; residual nets too, for the columns' layers need a place each to look at one another.
  """
  one_of("model name of columns", name, VGGS)
  return Column(classes=classes, chain=VGGS[name], **settings)
