"""Residual blocks, gated or not. Every block returns `(y, records)`.

Axes: N examples, F frames, H and W pixels, channels last. Every block takes images or clips of
frames.
Reference: He et al., 2016; Hara et al., 2018; Bejnordi et al., 2020, section 3; Abati et al., 2020,
  section 3; Veit and Belongie, "Convolutional networks with adaptive inference graphs", 2018,
  section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.context import NOTHING_SHARED, Shared, shared_part
from gating_jax.layers.conv import (
  CONVOLUTIONS,
  ConvNorm,
  FactorisedConvNorm,
  MixedConvNorm,
  check_maps,
  scaled,
)
from gating_jax.layers.gate import (
  GATE_NAME,
  ChannelGate,
  GatedChannels,
  GateSettings,
  KernelWeights,
  apply_gates,
  decisions,
)
from gating_jax.names import former_keyword
from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_backward
from gating_jax.ops.macs import ConvMacs, channel_macs
from gating_jax.types import Array, Records

# Gating of an ungated network that knows the source of each image.
BIAS = "bias"
# Gating of an ungated network whose convolutions mix several kernels for each image.
KERNELS = "kernels"
GATINGS = ("none", "channel", "all_channels", "layer", BIAS, KERNELS)
SHORTCUTS = ("A", "B")
# Standard deviation of initial biases, within a source and between sources.
_BIAS_DEVIATION = 0.5

Conv = ConvNorm | FactorisedConvNorm


class _ResidualBlock(nn.Module):
  """The fields, the gate and the shortcut that both blocks share.

  With `gating="channel"` the channels between the convolutions are gated. With `"all_channels"`
  those of the output are gated as well. With `"layer"` one gate switches all convolutions

      y = ReLU(g * branch(x) + x),   g = gate(x) in {0, 1}

  of a block that keeps the shape of x; blocks that change the shape always run. With `"bias"` there
  are no gates: the network knows the source of each image, and each source has its own bias for
  every channel between the convolutions, before the ReLU. With `"kernels"` there are none either:
  every convolution with a window has several kernels, and each image mixes them by its own weights,
  from a network like that of gates. Gates may read parts of a context that the network computes
  once; it passes them as `shared`.

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
    kernels: number of kernels of a convolution, for `gating="kernels"`.
  """

  features: int
  stride: int = 1
  gating: str = "none"
  shortcut: str = "B"
  convolution: str = "full"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  gated_input: bool = False
  dilations: tuple[int, int] = (1, 1)
  group_norm: bool = False
  backward_share: float = 1.0
  inner_width: float = 1.0
  kernels: int = 4

  def _check(self, x: Array) -> None:
    check_maps(x)
    one_of("gating", self.gating, GATINGS)
    one_of("shortcut", self.shortcut, SHORTCUTS)
    one_of("convolution", self.convolution, CONVOLUTIONS)
    arguments.whole_number("features", self.features)
    arguments.whole_number("stride", self.stride)
    arguments.number("inner_width", self.inner_width, "> 0", holds=lambda v: 0 < v < math.inf)
    arguments.number("backward_share", self.backward_share, "in (0, 1]", holds=lambda v: 0 < v <= 1)

  def _conv(
    self, name: str, *, features: int, window: int, stride: int = 1, dilation: int = 1
  ) -> Conv:
    conv = CONVOLUTIONS[self.convolution] if window > 1 else ConvNorm
    if window > 1 and self.gating == KERNELS:
      if self.convolution != "full":
        raise ValueError(f"convolution must be full for mixed kernels; got {self.convolution!r}")
      conv = functools.partial(MixedConvNorm, kernels=self.kernels)
    # `FactorisedConvNorm` has no such field.
    spread: dict[str, Any] = {} if dilation == 1 else {"dilation": dilation}
    return conv(
      features=features,
      window=window,
      stride=stride,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name=name,
      group_norm=self.group_norm,
      **spread,
    )

  def _mixes(
    self, x: Array, train: bool, shared: Shared, *, convs: Sequence[Conv]
  ) -> list[tuple[Array, ...]]:
    """Returns the further arguments of each convolution: its weights, where kernels are mixed."""
    mixed = [isinstance(conv, MixedConvNorm) for conv in convs]
    if not any(mixed):
      return [()] * len(convs)
    weigh = KernelWeights(
      sum(mixed), self.kernels, self.gate, axis_name=self.axis_name, name=GATE_NAME
    )
    weights = iter(weigh(x, train, shared))
    return [(next(weights),) if is_mixed else () for is_mixed in mixed]

  def _joined(self, x: Array, extra: Array | None) -> Array:
    """Returns the first convolution's input: x, and channels that the shortcut does not see."""
    if extra is None:
      return x
    if self.gating != "none":
      raise ValueError(f"extra input channels need gating 'none'; got {self.gating!r}")
    arguments.real_array("extra", extra)
    if jnp.shape(extra)[:-1] != x.shape[:-1]:
      raise ValueError(
        f"extra must have the examples and pixels of x, {x.shape[:-1]}; got shape "
        f"{jnp.shape(extra)}"
      )
    return jnp.concatenate([x, extra], axis=-1)

  def _records(
    self,
    x: Array,
    train: bool,
    shared: Shared,
    *,
    convs: Sequence[Conv],
    project: Conv | None,
  ) -> Records:
    """Returns the records of the block's gate, or scales; none if it has no gate."""
    groups = self._groups(x.shape, convs, project)
    if not groups:
      return ()
    return ChannelGate(groups, self.gate, self.axis_name, name=GATE_NAME)(x, train, shared)

  def _add_source_bias(self, name: str, h: Array, shared: Shared) -> Array:
    """Adds the bias of each example's source to features between the convolutions."""
    if self.gating != BIAS:
      return h
    return SourceBias(name=name)(h, shared)

  def _groups(
    self, x_shape: Sequence[int], convs: Sequence[Conv], project: Conv | None
  ) -> tuple[GatedChannels, ...]:
    """Describes the groups of channels that the block's gate decides on."""
    if self.gating in ("none", BIAS, KERNELS):
      return ()
    calls = _calls(convs, x_shape)
    if self.gating == "layer":
      # Only the identity can replace a closed branch.
      keeps_shape = self.stride == 1 and x_shape[-1] == convs[-1].features
      return (_whole_branch(calls),) if keeps_shape else ()
    if self.gating not in ("channel", "all_channels"):
      # Groups that nothing multiplies would count as gated without an effect.
      raise ValueError(f"gating {self.gating!r} is in GATINGS, but _groups does not describe it")
    gated_output = self.gating == "all_channels"
    hidden = _hidden_groups(calls, gated_input=self.gated_input, gated_output=gated_output)
    return (*hidden, _output_group(calls[-1], project, x_shape)) if gated_output else hidden

  def _gated(self, h: Array, records: Records, group: int) -> Array:
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

    def branch(variables: Any, x: Any) -> Any:
      """Applies the convolutions, with ReLU between them: `[N, H, W, D] -> [N, H', W', C]`."""
      for i, conv in enumerate(alone):
        x = conv.apply(variables[i], nn.relu(x) if i else x, True)
      return x

    return open_backward(
      branch,
      [conv.variables for conv in convs],
      x,
      gates=records[0].gates[:, 0],
      # Its size must be static, so it cannot be the number of open examples itself.
      capacity=math.ceil(self.backward_share * len(x)),
    )

  def _join(self, branch: Array, shortcut: Array, records: Records) -> tuple[Array, Records]:
    """Ends the block: y = ReLU(g * branch(x) + shortcut), then the gates of the output channels."""
    if self.gating == "layer" and records:
      branch = apply_gates(branch, records[0].gates)
    y = nn.relu(branch + shortcut)
    if self.gating == "all_channels":
      y = apply_gates(y, records[-1].gates)
    return y, decisions(records, self.gate)

  def _project(self, x: Array, features: int) -> Conv | None:
    """Returns the convolution of the shortcut, where it needs one."""
    if self.shortcut == "A" or (self.stride == 1 and x.shape[-1] == features):
      return None
    return self._conv("project", features=features, window=1, stride=self.stride)

  def _shortcut(self, x: Array, train: bool, *, features: int, project: Conv | None) -> Array:
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
    padding = [(0, 0)] * (x.ndim - 1) + [(missing // 2, missing - missing // 2)]
    return jnp.pad(x, padding)


class BasicBlock(_ResidualBlock):
  """Two 3x3(x3) convolutions; the gate switches the output channels of the first, per example.

      y = ReLU(BN2(conv2(g * ReLU(BN1(conv1 x)))) + shortcut(x)),
      g = gate(x) in {0, 1}^(inner_width features)

  With `gating="all_channels"` it switches those of y too. `[N, H, W, D]` to `([N, H', W',
  features], records)`, or the same with frames. `extra`, `[N, H, W, E]`, are more channels for
  conv1 only, in a block without gates.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> import jax
  >>> block, x = BasicBlock(features=8, gating="channel"), jnp.zeros((2, 4, 4, 8))
  >>> (y, (record,)), _ = jax.eval_shape(lambda: block.init_with_output(jax.random.key(0), x))
  >>> y.shape, record.gates.shape
  ((2, 4, 4, 8), (2, 8))
  """

  expansion = 1

  @former_keyword("beside", "extra")
  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    extra: Array | None = None,
    shared: Shared = NOTHING_SHARED,
  ) -> tuple[Array, Records]:
    self._check(x)
    width = scaled(self.features, self.inner_width)
    first, second = self.dilations
    conv1 = self._conv("conv1", features=width, window=3, stride=self.stride, dilation=first)
    conv2 = self._conv("conv2", features=self.features, window=3, dilation=second)
    project = self._project(x, self.features)
    convs = (conv1, conv2)
    first_mix, second_mix = self._mixes(x, train, shared, convs=convs)
    h = nn.relu(
      self._add_source_bias("bias1", conv1(self._joined(x, extra), train, *first_mix), shared)
    )
    records = self._records(x, train, shared, convs=convs, project=project)
    if self._skips(records, train):
      branch = self._with_open_backward(convs, x, records)
    else:
      # conv2(g * ReLU(BN1(conv1 x))) of the equation.
      branch = conv2(self._gated(h, records, 0), train, *second_mix)
    shortcut = self._shortcut(x, train, features=self.features, project=project)
    return self._join(branch, shortcut, records)


class Bottleneck(_ResidualBlock):
  """1x1, 3x3 and 1x1 convolutions; gates of one shared hidden layer switch the first two's outputs.

  The 3x3 convolution has the stride. With `gating="all_channels"` the gates switch the block's
  outputs too. `[N, H, W, D]` to `([N, H', W', 4 * features], records)`, or the same with frames.
  `extra` is as in `BasicBlock`.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> import jax
  >>> block, x = Bottleneck(features=2, gating="channel"), jnp.zeros((2, 4, 4, 8))
  >>> (y, records), _ = jax.eval_shape(lambda: block.init_with_output(jax.random.key(0), x))
  >>> y.shape, [record.gates.shape for record in records]
  ((2, 4, 4, 8), [(2, 2), (2, 2)])
  """

  expansion = 4

  @former_keyword("beside", "extra")
  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool = False,
    extra: Array | None = None,
    shared: Shared = NOTHING_SHARED,
  ) -> tuple[Array, Records]:
    self._check(x)
    out = self.expansion * self.features
    width = scaled(self.features, self.inner_width)
    conv1 = self._conv("conv1", features=width, window=1)
    conv2 = self._conv(
      "conv2", features=width, window=3, stride=self.stride, dilation=self.dilations[0]
    )
    conv3 = self._conv("conv3", features=out, window=1)
    convs = (conv1, conv2, conv3)
    project = self._project(x, out)
    # The 1x1 convolutions have one kernel.
    _, mix, _ = self._mixes(x, train, shared, convs=convs)
    h1 = nn.relu(self._add_source_bias("bias1", conv1(self._joined(x, extra), train), shared))
    records = self._records(x, train, shared, convs=convs, project=project)
    if self._skips(records, train):
      branch = self._with_open_backward(convs, x, records)
    else:
      h2 = nn.relu(
        self._add_source_bias("bias2", conv2(self._gated(h1, records, 0), train, *mix), shared)
      )
      branch = conv3(self._gated(h2, records, 1), train)
    shortcut = self._shortcut(x, train, features=out, project=project)
    return self._join(branch, shortcut, records)


class SourceBias(nn.Module):
  """Adds a bias for each source of images and channel, `[N, ..., C]` to the same.

  An ungated network can use the number of an image's source in this way, at no cost. It is the
  baseline for gates that know the source, too.
  """

  @nn.compact
  def __call__(self, h: Array, shared: Shared) -> Array:
    told = shared_part(shared, "told")
    shape = (told.shape[-1], h.shape[-1])
    table = self.param("table", nn.initializers.normal(_BIAS_DEVIATION), shape, jnp.float32)
    bias = table[jnp.argmax(told, axis=-1)]
    return h + bias.reshape(h.shape[0], *[1] * (h.ndim - 2), h.shape[-1]).astype(h.dtype)


# The cost of a block follows from the description of its branch.


class _Call(NamedTuple):
  """One convolution of a branch, and the shape of its input."""

  conv: Conv
  shape: Sequence[int]

  @property
  def macs(self) -> ConvMacs:
    """Returns the MACs of the convolution's channels."""
    return self.conv.macs(self.shape)


def _calls(convs: Sequence[Conv], x_shape: Sequence[int]) -> list[_Call]:
  """Returns the convolutions of a branch on an input of this shape, one after the other."""
  calls, shape = [], x_shape
  for conv in convs:
    calls.append(_Call(conv, shape))
    shape = conv.output_shape(shape)
  return calls


def _whole_branch(calls: Sequence[_Call]) -> GatedChannels:
  """Describes the branch as one unit, with all of its channels open."""
  macs = 0
  for call in calls:
    macs += call.macs.total(inputs=call.shape[-1], outputs=call.conv.features)
  return GatedChannels(channels=1, macs_per_channel=macs)


def _hidden_groups(
  calls: Sequence[_Call], *, gated_input: bool, gated_output: bool
) -> tuple[GatedChannels, ...]:
  """Describes the channels between the convolutions of a branch, group by group.

  A channel is an output of one convolution and an input of the next.

  Args:
    calls: the convolutions.
    gated_input: whether the channels that the first one reads have gates.
    gated_output: whether the channels that the last one makes have gates.
  """
  groups = []
  for i, before in enumerate(calls[:-1]):
    after = calls[i + 1]
    # Without gates, all channels of the block's input are read, and all of its output made.
    reads_all = i == 0 and not gated_input
    makes_all = after is calls[-1] and not gated_output
    cost = channel_macs(
      before.macs,
      inputs=before.shape[-1] if reads_all else None,
      read=after.macs,
      outputs=after.conv.features if makes_all else None,
    )
    groups.append(
      GatedChannels(
        channels=before.conv.features,
        macs_per_channel=cost.alone,
        macs_per_pair=cost.per_pair,
        writers=(before.conv.writer,),
        readers=(after.conv.reader,),
      )
    )
  return tuple(groups)


def _output_group(last: _Call, project: Conv | None, x_shape: Sequence[int]) -> GatedChannels:
  """Describes the output channels: those of the last convolution and of the projection.

  No reader is named, since the output also bypasses the next block's branch.
  """
  cost, writers = channel_macs(last.macs), (last.conv.writer,)
  if project:
    # The projection is not gated on its input side: it reads every channel.
    cost = cost.plus(channel_macs(project.macs(x_shape), inputs=x_shape[-1]).alone)
    writers += (project.writer,)
  return GatedChannels(
    channels=last.conv.features,
    macs_per_channel=cost.alone,
    macs_per_pair=cost.per_pair,
    writers=writers,
  )
