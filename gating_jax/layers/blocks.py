"""Residual blocks, gated or not. Every block returns `(y, records)`.

Axes: N examples, F frames, H and W pixels, channels last. Every block takes images or clips of frames.
Reference: He et al., 2016; Hara et al., 2018; Bejnordi et al., 2020, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import CONVOLUTIONS, ConvNorm, FactorisedConvNorm
from gating_jax.layers.gate import GATE_NAME, ChannelGate, GateSettings, apply_gates
from gating_jax.types import Array, Records

GATINGS = ("none", "channel")
SHORTCUTS = ("A", "B")


class _ResidualBlock(nn.Module):
  """What both blocks share: their fields, the gate and the shortcut."""

  features: int
  stride: int = 1
  gating: str = "none"
  shortcut: str = "B"
  convolution: str = "full"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  def _conv(self, features: int, window: int, stride: int, name: str) -> ConvNorm | FactorisedConvNorm:
    one_of("convolution", self.convolution, CONVOLUTIONS)
    conv = CONVOLUTIONS[self.convolution] if window > 1 else ConvNorm
    return conv(features, window, stride, self.dtype, self.axis_name, name=name)

  def _records(self, x: Array, train: bool, units, macs_per_unit, macs_per_pair) -> Records:
    one_of("gating", self.gating, GATINGS)
    if self.gating == "none":
      return ()
    gate = ChannelGate(units, macs_per_unit, macs_per_pair, self.gate, self.axis_name, name=GATE_NAME)
    return gate(x, train)

  def _shortcut(self, x: Array, features: int, train: bool) -> Array:
    """Identity where shapes agree; else A: subsample and pad with zero channels, B: 1x1 convolution."""
    one_of("shortcut", self.shortcut, SHORTCUTS)
    if self.stride == 1 and x.shape[-1] == features:
      return x
    if self.shortcut == "B":
      return self._conv(features, 1, self.stride, "project")(x, train)
    missing = features - x.shape[-1]
    if missing < 0:
      raise ValueError(f"shortcut A cannot drop channels; got {x.shape[-1]} in, {features} out; use shortcut B")
    every = slice(None, None, self.stride)
    x = x[:, *[every] * (x.ndim - 2)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(missing // 2, missing - missing // 2)])


class BasicBlock(_ResidualBlock):
  """Two 3x3(x3) convolutions; the gate switches the output channels of the first, per example.

      y = ReLU(BN2(conv2(g * ReLU(BN1(conv1 x)))) + shortcut(x)),   g = gate(x) in {0, 1}^features

  `[N, H, W, D]` to `([N, H', W', features], records)`, or the same with frames.
  """

  expansion = 1

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    conv1 = self._conv(self.features, 3, self.stride, "conv1")
    conv2 = self._conv(self.features, 3, 1, "conv2")
    h = nn.relu(conv1(x, train))
    into, out_of = conv1.macs(x.shape), conv2.macs(h.shape)
    per_unit = into.per_output + x.shape[-1] * into.per_pair + out_of.per_input + self.features * out_of.per_pair
    records = self._records(x, train, (self.features,), (per_unit,), (0,))
    for record in records:
      h = apply_gates(h, record.gates)
    h = conv2(h, train)
    return nn.relu(h + self._shortcut(x, self.features, train)), records


class Bottleneck(_ResidualBlock):
  """1x1, 3x3 (with the stride), 1x1; gates switch the outputs of the first two, from one shared hidden layer.

  `[N, H, W, D]` to `([N, H', W', 4 * features], records)`, or the same with frames.
  """

  expansion = 4

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    out = self.expansion * self.features
    conv1 = self._conv(self.features, 1, 1, "conv1")
    conv2 = self._conv(self.features, 3, self.stride, "conv2")
    h1 = nn.relu(conv1(x, train))
    macs1, macs2 = conv1.macs(x.shape), conv2.macs(h1.shape)
    pixels_out = math.prod(-(-size // self.stride) for size in x.shape[1:-1])
    per_unit = (x.shape[-1] * macs1.per_pair + macs2.per_input, macs2.per_output + pixels_out * out)
    records = self._records(x, train, (self.features, self.features), per_unit, (macs2.per_pair, 0))
    if records:
      h1 = apply_gates(h1, records[0].gates)
    h2 = nn.relu(conv2(h1, train))
    if records:
      h2 = apply_gates(h2, records[1].gates)
    h3 = self._conv(out, 1, 1, "conv3")(h2, train)
    return nn.relu(h3 + self._shortcut(x, out, train)), records
