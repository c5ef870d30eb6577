"""Residual blocks, gated or not. Every block returns `(y, records)`.

Axes: N examples, F frames, H and W pixels, channels last. Every block takes images or clips of frames.
Reference: He et al., 2016; Hara et al., 2018; Bejnordi et al., 2020, section 3; Abati et al., 2020, section 3; Veit and
Belongie, "Convolutional networks with adaptive inference graphs", 2018, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import CONVOLUTIONS, ConvNorm, FactorisedConvNorm, check_maps, scaled
from gating_jax.layers.gate import GATE_NAME, ChannelGate, GateSettings, Switched, apply_gates
from gating_jax.ops import arguments
from gating_jax.ops.sparse_backward import open_backward
from gating_jax.types import Array, Records

GATINGS = ("none", "channel", "all_channels", "layer")
SHORTCUTS = ("A", "B")


class _ResidualBlock(nn.Module):
  """What both blocks share: their fields, the gate and the shortcut.

  With `gating="channel"` the channels between the convolutions are gated; with `"all_channels"` those of the output as
  well, and `gated_input` says whether the block before did so too. With `"layer"` one gate switches all convolutions,

      y = ReLU(g * branch(x) + x),   g = gate(x) in {0, 1}

  of a block that keeps the shape of x; the others always run. `inner_width` multiplies the channels between the
  convolutions. `dilations`, of images only, are those of the window that has the stride, and of windows after it.
  """

  features: int
  stride: int = 1
  gating: str = "none"
  shortcut: str = "B"
  convolution: str = "full"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None
  gated_input: bool = False
  dilations: tuple[int, int] = (1, 1)
  group_norm: bool = False
  backward_share: float = 1.0
  inner_width: float = 1.0

  def _check(self, x: Array) -> None:
    check_maps(x)
    one_of("gating", self.gating, GATINGS)
    one_of("shortcut", self.shortcut, SHORTCUTS)
    one_of("convolution", self.convolution, CONVOLUTIONS)
    arguments.whole_number("features", self.features)
    arguments.whole_number("stride", self.stride)
    arguments.number("inner_width", self.inner_width, "> 0", lambda v: 0 < v < math.inf)
    arguments.number("backward_share", self.backward_share, "in (0, 1]", lambda v: 0 < v <= 1)

  def _conv(
    self, features: int, window: int, stride: int, name: str, dilation: int = 1
  ) -> ConvNorm | FactorisedConvNorm:
    conv = CONVOLUTIONS[self.convolution] if window > 1 else ConvNorm
    spread = {} if dilation == 1 else {"dilation": dilation}
    return conv(
      features,
      window,
      stride,
      self.dtype,
      self.axis_name,
      name=name,
      group_norm=self.group_norm,
      **spread,
    )

  def _with(self, beside: Array | None, x: Array) -> Array:
    """What the first convolution takes: the block's input, and channels beside it that the shortcut does not see."""
    if beside is None:
      return x
    if self.gating != "none":
      raise ValueError(f"channels beside a block's input need gating 'none'; got {self.gating!r}")
    arguments.real_array("beside", beside)
    if jnp.shape(beside)[:-1] != x.shape[:-1]:
      raise ValueError(
        f"beside must be of x's examples and pixels, {x.shape[:-1]}; got shape {jnp.shape(beside)}"
      )
    return jnp.concatenate([x, beside], axis=-1)

  def _records(
    self, x: Array, train: bool, inner: tuple[Switched, ...], outer: Switched, convs: Sequence
  ) -> Records:
    """`convs` are the convolutions of the branch, each with the shape of its input."""
    groups = {
      "none": (),
      "channel": inner,
      "all_channels": (*inner, outer),
      "layer": self._layer(x, outer, convs),
    }
    if not groups[self.gating]:
      return ()
    return ChannelGate(groups[self.gating], self.gate, self.axis_name, name=GATE_NAME)(x, train)

  def _layer(self, x: Array, outer: Switched, convs: Sequence) -> tuple[Switched, ...]:
    """The block as a whole, where it can be skipped."""
    if self.stride != 1 or x.shape[-1] != outer.channels:
      return ()
    macs = 0
    for conv, shape in convs:
      m = conv.macs(shape)
      macs += shape[-1] * m.per_input + conv.features * (m.per_output + shape[-1] * m.per_pair)
    return (Switched(1, macs),)

  def _switch(self, h: Array, records: Records, group: int) -> Array:
    """Features between the convolutions, with the gates of their channels."""
    return apply_gates(h, records[group].gates) if self.gating in ("channel", "all_channels") else h

  def _skips(self, records: Records, train: bool) -> bool:
    """Whether the branch's backward leaves out the examples whose gate is closed."""
    return (
      self.gating == "layer"
      and bool(records)
      and train
      and self.backward_share < 1
      and not self.is_initializing()
    )

  def _with_open_backward(self, convs: Sequence[nn.Module], x: Array, records: Records) -> Array:
    """The branch, its convolutions with ReLU between, with the backward of open examples alone."""
    if not self.group_norm:
      raise ValueError(
        "backward_share must be 1 without group_norm, since BatchNorm carries gradients between "
        f"examples; got {self.backward_share}"
      )
    alone = [conv.clone(parent=None, name=None) for conv in convs]

    def branch(variables, x):
      for i, (conv, own) in enumerate(zip(alone, variables, strict=True)):
        x = conv.apply(own, nn.relu(x) if i else x, True)
      return x

    return open_backward(
      branch,
      [conv.variables for conv in convs],
      x,
      records[0].gates[:, 0],
      capacity=math.ceil(self.backward_share * len(x)),
    )

  def _join(self, branch: Array, shortcut: Array, records: Records) -> tuple[Array, Records]:
    if self.gating == "layer" and records:
      branch = apply_gates(branch, records[0].gates)
    y = nn.relu(branch + shortcut)
    return (apply_gates(y, records[-1].gates) if self.gating == "all_channels" else y), records

  def _macs_into(self, conv: ConvNorm, x: Array) -> tuple[int, int]:
    """Per output channel of the first convolution: alone, and with one channel of the gates before the block."""
    macs = conv.macs(x.shape)
    if self.gated_input:
      return macs.per_output, macs.per_pair
    return macs.per_output + x.shape[-1] * macs.per_pair, 0

  def _outer(
    self, conv: ConvNorm, h_shape: Sequence[int], project: ConvNorm | None, x: Array
  ) -> Switched:
    """The block's output channels: those of its last convolution, with their part of the projection."""
    macs = conv.macs(h_shape)
    shortcut = project.macs(x.shape).per_pair * x.shape[-1] if project else 0
    writers = (conv.writer, project.writer) if project else (conv.writer,)
    return Switched(conv.features, macs.per_output + shortcut, macs.per_pair, writers)

  def _project(self, x: Array, features: int) -> ConvNorm | None:
    """The convolution of the shortcut, where it needs one."""
    if self.shortcut == "A" or (self.stride == 1 and x.shape[-1] == features):
      return None
    return self._conv(features, 1, self.stride, "project")

  def _shortcut(self, x: Array, features: int, project: ConvNorm | None, train: bool) -> Array:
    """Identity where shapes agree; else A: subsample and pad with zero channels, B: 1x1 convolution."""
    if project:
      return project(x, train)
    missing = features - x.shape[-1]
    if missing < 0:
      raise ValueError(
        f"shortcut A cannot drop channels; got {x.shape[-1]} in, {features} out; use shortcut B"
      )
    every = slice(None, None, self.stride)
    x = x[:, *[every] * (x.ndim - 2)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(missing // 2, missing - missing // 2)])


class BasicBlock(_ResidualBlock):
  """Two 3x3(x3) convolutions; the gate switches the output channels of the first, per example.

      y = ReLU(BN2(conv2(g * ReLU(BN1(conv1 x)))) + shortcut(x)),   g = gate(x) in {0, 1}^(inner_width features)

  and with `gating="all_channels"` those of y too. `[N, H, W, D]` to `([N, H', W', features], records)`, or the same
  with frames. `beside`, `[N, H, W, E]`, are more channels for conv1 alone, of a block without gates.
  """

  expansion = 1

  @nn.compact
  def __call__(
    self, x: Array, train: bool = False, beside: Array | None = None
  ) -> tuple[Array, Records]:
    self._check(x)
    width = scaled(self.features, self.inner_width)
    conv1 = self._conv(width, 3, self.stride, "conv1", self.dilations[0])
    conv2 = self._conv(self.features, 3, 1, "conv2", self.dilations[1])
    project = self._project(x, self.features)
    h = nn.relu(conv1(self._with(beside, x), train))
    (alone, with_input), after = self._macs_into(conv1, x), conv2.macs(h.shape)
    alone += after.per_input + (
      self.features * after.per_pair if self.gating != "all_channels" else 0
    )
    inner = Switched(width, alone, with_input, (conv1.writer,), (conv2.reader,))
    outer = self._outer(conv2, h.shape, project, x)
    records = self._records(x, train, (inner,), outer, ((conv1, x.shape), (conv2, h.shape)))
    if self._skips(records, train):
      branch = self._with_open_backward((conv1, conv2), x, records)
    else:
      branch = conv2(self._switch(h, records, 0), train)
    return self._join(branch, self._shortcut(x, self.features, project, train), records)


class Bottleneck(_ResidualBlock):
  """1x1, 3x3 (with the stride), 1x1; gates switch the outputs of the first two, from one shared hidden layer.

  With `gating="all_channels"` those of the block too. `[N, H, W, D]` to `([N, H', W', 4 * features], records)`, or the
  same with frames. `beside` as of `BasicBlock`.
  """

  expansion = 4

  @nn.compact
  def __call__(
    self, x: Array, train: bool = False, beside: Array | None = None
  ) -> tuple[Array, Records]:
    self._check(x)
    out = self.expansion * self.features
    width = scaled(self.features, self.inner_width)
    conv1 = self._conv(width, 1, 1, "conv1")
    conv2 = self._conv(width, 3, self.stride, "conv2", self.dilations[0])
    conv3 = self._conv(out, 1, 1, "conv3")
    project = self._project(x, out)
    h1 = nn.relu(conv1(self._with(beside, x), train))
    shape2 = (x.shape[0], *(-(-size // self.stride) for size in x.shape[1:-1]), width)
    (alone, with_input), middle, last = (
      self._macs_into(conv1, x),
      conv2.macs(h1.shape),
      conv3.macs(shape2),
    )
    into_last = last.per_input + (out * last.per_pair if self.gating != "all_channels" else 0)
    groups = (
      Switched(width, alone + middle.per_input, with_input, (conv1.writer,), (conv2.reader,)),
      Switched(
        width, middle.per_output + into_last, middle.per_pair, (conv2.writer,), (conv3.reader,)
      ),
    )
    convs = ((conv1, x.shape), (conv2, h1.shape), (conv3, shape2))
    records = self._records(x, train, groups, self._outer(conv3, shape2, project, x), convs)
    if self._skips(records, train):
      branch = self._with_open_backward((conv1, conv2, conv3), x, records)
    else:
      h2 = nn.relu(conv2(self._switch(h1, records, 0), train))
      branch = conv3(self._switch(h2, records, 1), train)
    return self._join(branch, self._shortcut(x, out, project, train), records)
