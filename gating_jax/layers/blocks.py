"""Residual blocks, gated or not. Every block returns `(y, records)`.

Axes: N examples, F frames, H and W pixels, channels last. Every block takes images or clips of
frames.
Reference: He et al., 2016; Hara et al., 2018; Bejnordi et al., 2020, section 3; Abati et al., 2020,
  section 3; Veit and Belongie, "Convolutional networks with adaptive inference graphs", 2018,
  section 3.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import CONVOLUTIONS, ConvNorm, FactorisedConvNorm, check_maps, scaled
from gating_jax.layers.gate import GATE_NAME, ChannelGate, GatedChannels, GateSettings, apply_gates
from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_backward
from gating_jax.types import Array, Records

GATINGS = ("none", "channel", "all_channels", "layer")
SHORTCUTS = ("A", "B")


class _ResidualBlock(nn.Module):
  """The fields, the gate and the shortcut that both blocks share.

  With `gating="channel"` the channels between the convolutions are gated. With `"all_channels"`
  those of the output are gated as well. With `"layer"` one gate switches all convolutions

      y = ReLU(g * branch(x) + x),   g = gate(x) in {0, 1}

  of a block that keeps the shape of x; blocks that change the shape always run.

  Attributes:
    features: output channels; a quarter of them for `Bottleneck`.
    stride: of the first 3x3 convolution and of the shortcut.
    gating: one of `GATINGS`.
    shortcut: `"A"` or `"B"`; see `_shortcut`.
    convolution: `"full"` or `"factorised"`, for windows larger than 1.
    gate: settings of the gate.
    dtype: type in which the convolutions compute.
    axis_name: mapped device axis of the batch.
    gated_input: whether the block before this one gates its output channels (`"all_channels"`).
    dilations: for images only: of the convolution with the stride, and of the one after it.
    group_norm: whether GroupNorm replaces BatchNorm.
    backward_share: fraction of examples, in (0, 1], that the branch's backward pass has room for in
      training; for `gating="layer"`, see `open_backward`. Below 1 it needs `group_norm`.
    inner_width: multiplies the channels between the convolutions.
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
    # `FactorisedConvNorm` has no such field.
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
    """Returns the first convolution's input: x, and channels that the shortcut does not see."""
    if beside is None:
      return x
    if self.gating != "none":
      raise ValueError(f"extra input channels (beside) need gating 'none'; got {self.gating!r}")
    arguments.real_array("beside", beside)
    if jnp.shape(beside)[:-1] != x.shape[:-1]:
      raise ValueError(
        f"beside must have the examples and pixels of x, {x.shape[:-1]}; got shape "
        f"{jnp.shape(beside)}"
      )
    return jnp.concatenate([x, beside], axis=-1)

  def _records(
    self,
    x: Array,
    train: bool,
    inner: tuple[GatedChannels, ...],
    outer: GatedChannels,
    convs: Sequence,
  ) -> Records:
    """Returns the records of the block's gate; none if it has no gate.

    `convs` are the convolutions of the branch, each with the shape of its input.
    """
    # Each kind of gating with the groups of channels that one gate module decides on.
    groups = {
      "none": (),
      "channel": inner,
      "all_channels": (*inner, outer),
      "layer": self._layer(x, outer, convs),
    }
    if not groups[self.gating]:
      return ()
    return ChannelGate(groups[self.gating], self.gate, self.axis_name, name=GATE_NAME)(x, train)

  def _layer(self, x: Array, outer: GatedChannels, convs: Sequence) -> tuple[GatedChannels, ...]:
    """Returns the whole branch as one unit, where the block can be skipped."""
    # Only the identity can replace a closed branch.
    if self.stride != 1 or x.shape[-1] != outer.channels:
      return ()
    # With all of its channels open, a convolution costs i per_input + o per_output + i o per_pair.
    macs = 0
    for conv, shape in convs:
      m = conv.macs(shape)
      macs += shape[-1] * m.per_input + conv.features * (m.per_output + shape[-1] * m.per_pair)
    return (GatedChannels(1, macs),)

  def _switch(self, h: Array, records: Records, group: int) -> Array:
    """Multiplies features between the convolutions by the gates of their channels."""
    return apply_gates(h, records[group].gates) if self.gating in ("channel", "all_channels") else h

  def _skips(self, records: Records, train: bool) -> bool:
    """Returns whether the branch's backward pass leaves out the examples whose gate is closed."""
    return (
      self.gating == "layer"
      and bool(records)
      and train
      and self.backward_share < 1
      # `open_backward` needs variables, which do not exist before.
      and not self.is_initializing()
    )

  def _with_open_backward(self, convs: Sequence[nn.Module], x: Array, records: Records) -> Array:
    """Computes the branch, with a backward pass on the open examples only."""
    if not self.group_norm:
      raise ValueError(
        "backward_share must be 1 without group_norm, since BatchNorm couples the gradients of "
        f"examples; got {self.backward_share}"
      )
    # Free of this module's scope, the copies can run inside the custom backward pass.
    alone = [conv.clone(parent=None, name=None) for conv in convs]

    def branch(variables, x):
      """Applies the convolutions, with ReLU between them: `[N, H, W, D] -> [N, H', W', C]`."""
      for i, (conv, own) in enumerate(zip(alone, variables, strict=True)):
        x = conv.apply(own, nn.relu(x) if i else x, True)
      return x

    return open_backward(
      branch,
      [conv.variables for conv in convs],
      x,
      records[0].gates[:, 0],
      # Its size must be static, so it cannot be the number of open examples itself.
      capacity=math.ceil(self.backward_share * len(x)),
    )

  # The block's end: y = ReLU(g * branch(x) + shortcut), then the gates of the output channels.
  def _join(self, branch: Array, shortcut: Array, records: Records) -> tuple[Array, Records]:
    if self.gating == "layer" and records:
      branch = apply_gates(branch, records[0].gates)
    y = nn.relu(branch + shortcut)
    return (apply_gates(y, records[-1].gates) if self.gating == "all_channels" else y), records

  def _macs_into(self, conv: ConvNorm, x: Array) -> tuple[int, int]:
    """Returns the MACs of one output channel of the first convolution.

    The first number is what it costs alone, the second what it costs with one open channel of the
    gates before the block.
    """
    macs = conv.macs(x.shape)
    # Only open inputs are read, so the cost is per pair; otherwise every input channel counts.
    if self.gated_input:
      return macs.per_output, macs.per_pair
    return macs.per_output + x.shape[-1] * macs.per_pair, 0

  def _outer(
    self, conv: ConvNorm, h_shape: Sequence[int], project: ConvNorm | None, x: Array
  ) -> GatedChannels:
    """Describes the output channels: those of the last convolution and of the projection."""
    macs = conv.macs(h_shape)
    # The projection is not gated on its input side: it reads every channel.
    shortcut = project.macs(x.shape).per_pair * x.shape[-1] if project else 0
    writers = (conv.writer, project.writer) if project else (conv.writer,)
    return GatedChannels(conv.features, macs.per_output + shortcut, macs.per_pair, writers)

  def _project(self, x: Array, features: int) -> ConvNorm | None:
    """Returns the convolution of the shortcut, where it needs one."""
    if self.shortcut == "A" or (self.stride == 1 and x.shape[-1] == features):
      return None
    return self._conv(features, 1, self.stride, "project")

  def _shortcut(self, x: Array, features: int, project: ConvNorm | None, train: bool) -> Array:
    """Returns the identity where shapes agree, else the shortcut of kind A or B.

    A subsamples and pads with zero channels; B is a 1x1 convolution.
    """
    if project:
      return project(x, train)
    missing = features - x.shape[-1]
    if missing < 0:
      raise ValueError(
        f"shortcut A cannot drop channels; got {x.shape[-1]} in, {features} out; use shortcut B"
      )
    every = slice(None, None, self.stride)
    x = x[:, *[every] * (x.ndim - 2)]
    # Half of the zero channels come before, half after.
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(missing // 2, missing - missing // 2)])


class BasicBlock(_ResidualBlock):
  """Two 3x3(x3) convolutions; the gate switches the output channels of the first, per example.

      y = ReLU(BN2(conv2(g * ReLU(BN1(conv1 x)))) + shortcut(x)),
      g = gate(x) in {0, 1}^(inner_width features)

  With `gating="all_channels"` it switches those of y too. `[N, H, W, D]` to `([N, H', W',
  features], records)`, or the same with frames. `beside`, `[N, H, W, E]`, are more channels for
  conv1 only, in a block without gates.
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
    # A hidden channel costs its output in conv1 and its input in conv2. Where the other side is
    # gated too, the cost is per pair and belongs to the later record.
    (alone, with_input), after = self._macs_into(conv1, x), conv2.macs(h.shape)
    alone += after.per_input + (
      self.features * after.per_pair if self.gating != "all_channels" else 0
    )
    inner = GatedChannels(width, alone, with_input, (conv1.writer,), (conv2.reader,))
    outer = self._outer(conv2, h.shape, project, x)
    records = self._records(x, train, (inner,), outer, ((conv1, x.shape), (conv2, h.shape)))
    if self._skips(records, train):
      branch = self._with_open_backward((conv1, conv2), x, records)
    else:
      # conv2(g * ReLU(BN1(conv1 x))) of the equation.
      branch = conv2(self._switch(h, records, 0), train)
    return self._join(branch, self._shortcut(x, self.features, project, train), records)


class Bottleneck(_ResidualBlock):
  """1x1, 3x3 and 1x1 convolutions; gates of one shared hidden layer switch the first two's outputs.

  The 3x3 convolution has the stride. With `gating="all_channels"` the gates switch the block's
  outputs too. `[N, H, W, D]` to `([N, H', W', 4 * features], records)`, or the same with frames.
  `beside` is as in `BasicBlock`.
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
    # The output's shape of conv2, known before it runs: the gates decide first.
    shape2 = (x.shape[0], *(-(-size // self.stride) for size in x.shape[1:-1]), width)
    (alone, with_input), middle, last = (
      self._macs_into(conv1, x),
      conv2.macs(h1.shape),
      conv3.macs(shape2),
    )
    # The second group costs per pair with the first, conv2 being gated on both sides.
    into_last = last.per_input + (out * last.per_pair if self.gating != "all_channels" else 0)
    groups = (
      GatedChannels(width, alone + middle.per_input, with_input, (conv1.writer,), (conv2.reader,)),
      GatedChannels(
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
