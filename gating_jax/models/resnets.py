"""Residual networks, gated or not, for small images (CIFAR), large ones (ImageNet) and clips.

Axes: N examples, F frames, H and W pixels, D channels.
Reference: He et al., 2016, sections 4.1 and 4.2; Hara et al., "Can spatiotemporal 3D CNNs retrace
the history of 2D CNNs and ImageNet?", 2018; Tran et al., 2018; Yu et al., "Dilated residual
networks", 2017 (output stride).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.checks import one_of
from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.context import NOTHING_SHARED, Shared, shared_context
from gating_jax.layers.conv import CONVOLUTIONS, scaled
from gating_jax.layers.gate import GateSettings, check_gate_settings
from gating_jax.ops import arguments
from gating_jax.types import Apply, Array, Records


class NamedResNet(NamedTuple):
  """Fields of `ResNet` that make a named network."""

  stem: str
  block: type[nn.Module]
  blocks: tuple[int, ...]
  features: int
  shortcut: str


class StemPlan(NamedTuple):
  """The first layers of a `ResNet`: a convolution and, with `imagenet`, a max pool.

  Attributes:
    window, stride: over frames, height and width, of which images use the last two.
    pool: `(window, stride, padding)` of the max pool, the same on every axis; None without.
  """

  window: tuple[int, int, int]
  stride: tuple[int, int, int]
  pool: tuple[int, int, int] | None = None


# Small images keep their resolution in the stem; large ones are reduced at once, to save MACs.
STEMS = {
  "cifar": StemPlan((3, 3, 3), (1, 1, 1)),
  "small": StemPlan((3, 3, 3), (1, 2, 2)),
  "clip": StemPlan((3, 7, 7), (1, 2, 2)),
  # A border of 1 on each side, so that the pool halves even sides.
  "imagenet": StemPlan((7, 7, 7), (1, 2, 2), pool=(3, 2, 1)),
}
# ResNet-(6n + 2) has n blocks of two convolutions in each of three stages, a stem and a classifier.
_CIFAR = {
  f"resnet{6 * n + 2}": NamedResNet(
    stem="cifar", block=BasicBlock, blocks=(n, n, n), features=16, shortcut="A"
  )
  for n in (1, 2, 3, 5, 7, 9, 18)
}
_of_imagenet = functools.partial(NamedResNet, stem="imagenet", features=64, shortcut="B")
_IMAGENET = {
  "resnet18": _of_imagenet(block=BasicBlock, blocks=(2, 2, 2, 2)),
  "resnet34": _of_imagenet(block=BasicBlock, blocks=(3, 4, 6, 3)),
  "resnet50": _of_imagenet(block=Bottleneck, blocks=(3, 4, 6, 3)),
  "resnet101": _of_imagenet(block=Bottleneck, blocks=(3, 4, 23, 3)),
  "resnet152": _of_imagenet(block=Bottleneck, blocks=(3, 8, 36, 3)),
}
RESNETS = {**_CIFAR, **_IMAGENET}


class BlockPlan(NamedTuple):
  """The place of a block in a `ResNet`.

  Attributes:
    name: of the module.
    is_first: whether it reads the stem.
    width: its channels are those of the first stage times this.
    stride, dilations: as in the block.
  """

  name: str
  is_first: bool
  width: int
  stride: int
  dilations: tuple[int, int]


class StagePlan(NamedTuple):
  """A stage of a `ResNet`: its number, from 1, and its blocks."""

  number: int
  blocks: tuple[BlockPlan, ...]


class ResNet(nn.Module):
  """Residual network for images or clips, with gates or without.

  `[N, H, W, D]` images or `[N, F, H, W, D]` clips of any size to
  `([N, classes] float32 logits, records)`.

  Attributes:
    classes: number of outputs; None for the pooled features in place of logits.
    pool: False for the last feature map, `[N, h, w, D']` in `dtype`, in place of either.
    output_stride: largest number of image pixels, along a side, to one of the last feature map:
      stages beyond it keep the resolution and dilate their windows instead. None for the named
      network's own; images only.
    blocks: residual blocks per stage; each stage after the first halves the resolution and doubles
      the channels.
    block: `BasicBlock` or `Bottleneck`.
    features: channels of the first stage, before `width`.
    width: multiplies every channel count; each is rounded to the nearest integer, at least 1.
    inner_width: multiplies the channels between the convolutions of a block once more; gates choose
      among these.
    stem: `cifar`, a 3x3 convolution; `small`, the same with stride 2; `clip`, 7x7 with stride 2;
      `imagenet`, 7x7 with stride 2 and a max pool. Over a clip's frames the windows are 3, 3, 3 and
      7 without a stride, and the max pool has stride 2.
    convolution: `full`, or for clips `factorised`: every window over space, then over time,
      (2+1)-D.
    gating: `none`; `channel`, the channels between the convolutions of a block; `all_channels`,
      those of its output too; `layer`, a whole block at a time, where its shortcut is the identity;
      `bias`, no gates, but a bias for each source and channel; `kernels`, no gates, but several
      kernels that each image mixes.
    shortcut: `A` (zero padding, no parameters) or `B` (1x1 convolution).
    gate: settings of the gates.
    dtype: of the computation, float32 or bfloat16; parameters, BatchNorm statistics, gates and
      logits are float32.
    group_norm: GroupNorm in place of BatchNorm, except in gates; every example is then normalised
      alone.
    backward_share: with `layer` gating and `group_norm`, the largest fraction of the examples for
      which a block's gate may be open in training; its backward pass runs on no more. With more
      open examples gradients are NaN, see `open_backward`.
    axis_name: mapped device axis over which BatchNorm takes its statistics and examples are
      numbered.
    sources: S, where the images come from several sources and the last of their channels holds the
      number of theirs, 0 to S - 1, at every pixel (or 0 at some, as crops leave it). The network
      takes it off: only gates with `told` or `assigned` for a context read it, and biases. 0: all
      channels are the image's.
    kernels: number of kernels of a convolution in the blocks, for `gating="kernels"`.
  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> model, x = ResNet(classes=10, blocks=(1, 1, 1), gating="channel"), jnp.zeros((2, 16, 16, 3))
  >>> (logits, records), _ = jax.eval_shape(
  ...   lambda: model.init_with_output(jax.random.key(0), x)
  ... )
  >>> logits.shape, [record.gates.shape for record in records]
  ((2, 10), [(2, 16), (2, 32), (2, 64)])
  """

  if TYPE_CHECKING:
    apply: ClassVar[Apply[Array]]

  classes: int | None
  blocks: tuple[int, ...]
  block: type[nn.Module] = BasicBlock
  features: int = 16
  width: float = 1.0
  stem: str = "cifar"
  convolution: str = "full"
  gating: str = "none"
  shortcut: str = "A"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  pool: bool = True
  output_stride: int | None = None
  group_norm: bool = False
  backward_share: float = 1.0
  inner_width: float = 1.0
  sources: int = 0
  kernels: int = 4

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    self._check(x)
    x, shared = self._shared(x, train)
    x, records = self._stem(x, train), ()
    for stage in self.plan(x):
      x, new = self._stage(x, train, stage, shared=shared)
      records += new
    return (self._head(x) if self.pool else x), records

  def _check(self, x: Array):
    """Raises a TypeError or ValueError that names a wrong input or setting."""
    arguments.real_array("x", x)
    check_gate_settings("gate", self.gate)
    if self.classes is not None:
      arguments.whole_number("classes", self.classes)
    for count in arguments.items("blocks", self.blocks, "numbers of blocks per stage"):
      arguments.whole_number("each of blocks", count, 0)
    arguments.whole_number("features", self.features)
    arguments.number("width", self.width, "> 0", holds=lambda v: v > 0)
    arguments.number("inner_width", self.inner_width, "> 0", holds=lambda v: v > 0)
    arguments.whole_number("sources", self.sources, 0)

  def _shared(self, x: Array, train: bool) -> tuple[Array, Shared]:
    """Returns the images without their sources, and what gates read of the whole image."""
    source = None
    if self.sources:
      # The same number at every pixel, but where crops and cutting out have put zeros.
      number = jnp.max(x[..., -1], axis=tuple(range(1, x.ndim - 1)))
      # It has been through the normalisation of images, hence the rounding.
      source = jnp.round(number).astype(jnp.int32)
      x = x[..., :-1]
    parts = {"none": (), "bias": ("told",)}.get(self.gating, self.gate.shared_parts)
    shared = shared_context(
      parts, x, train, source=source, sources=self.sources, axis_name=self.axis_name
    )
    return x, shared

  def _stage(
    self, x: Array, train: bool, stage: StagePlan, shared: Shared = NOTHING_SHARED
  ) -> tuple[Array, Records]:
    """Runs the blocks of a stage."""
    records: Records = ()
    for block in stage.blocks:
      x, new = self._block(block)(x, train, shared=shared)
      records += new
    return x, records

  def _block(self, plan: BlockPlan, **where) -> nn.Module:
    """Builds a block; `where` sets the parent of one outside this network."""
    return self.block(
      features=self._channels(plan.width),
      stride=plan.stride,
      dilations=plan.dilations,
      gating=self.gating,
      # The stem's channels have no gates.
      gated_input=self.gating == "all_channels" and not plan.is_first,
      shortcut=self.shortcut,
      convolution=self.convolution,
      group_norm=self.group_norm,
      backward_share=self.backward_share,
      inner_width=self.inner_width,
      kernels=self.kernels,
      gate=self.gate,
      dtype=self.dtype,
      axis_name=self.axis_name,
      **{"name": plan.name, **where},
    )

  def _head(self, x: Array) -> Array:
    """Computes logits from the last feature map, or its pooled features."""
    # In float32, since a mean over many pixels in bfloat16 would lose precision.
    x = jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1)))
    return x if self.classes is None else nn.Dense(self.classes, name="classifier")(x)

  def _channels(self, multiple: int) -> int:
    """Returns a multiple of the features, scaled by the width."""
    return scaled(self.features * multiple, self.width)

  @property
  def stem_plan(self) -> StemPlan:
    """Returns the plan of the layers before the first stage.

    Raises:
      ValueError: an unknown stem.
    """
    one_of("stem", self.stem, STEMS)
    return STEMS[self.stem]

  def plan(self, x: Array | jax.ShapeDtypeStruct) -> tuple[StagePlan, ...]:
    """Returns the stages and their blocks, for inputs of x's rank.

    Raises:
      ValueError: an `output_stride` for clips, or one below the stem's.
    """
    strides, dilations = self._resolution(x)
    stages = []
    for stage, count in enumerate(self.blocks):
      blocks = []
      for i in range(count):
        # A removed stride acted in the first convolution of the stage, so this one still has the
        # dilation of the stage before; its successors have the stage's own.
        first_dilation = dilations[stage] if i else max(1, dilations[stage] // 2)
        block = BlockPlan(
          name=f"stage{stage + 1}_block{i + 1}",
          is_first=stage + i == 0,
          width=2**stage,
          stride=1 if i else strides[stage],
          dilations=(first_dilation, dilations[stage]),
        )
        blocks.append(block)
      stages.append(StagePlan(stage + 1, tuple(blocks)))
    return tuple(stages)

  def _resolution(self, x: Array | jax.ShapeDtypeStruct) -> tuple[list[int], list[int]]:
    """Returns the stride and the dilation of each stage; a dilation acts after a removed stride."""
    strides = [1 if stage == 0 else 2 for stage in range(len(self.blocks))]
    if self.output_stride is None:
      return strides, [1] * len(strides)
    stem = self.stem_plan
    # Pixels of the image, along a side, to one of the feature map so far.
    coarse = stem.stride[-1] * (stem.pool[1] if stem.pool else 1)
    if x.ndim != 4 or self.output_stride < coarse:
      raise ValueError(
        f"output_stride must be None or, for images, at least the stem's {coarse}; "
        f"got {self.output_stride}"
      )
    dilations = []
    for stage, stride in enumerate(strides):
      if coarse * stride > self.output_stride:
        strides[stage] = 1
      coarse *= strides[stage]
      # A removed stride of 2 doubles the dilation: windows still cover the same part of the image.
      dilations.append((dilations or [1])[-1] * stride // strides[stage])
    return strides, dilations

  def _stem(self, x: Array, train: bool) -> Array:
    """Applies the layers before the first stage."""
    if x.ndim not in (4, 5):
      raise ValueError(
        f"images must be [N, H, W, D], or clips [N, F, H, W, D]; got shape {x.shape}"
      )
    x = x.astype(self.dtype)
    stem = self.stem_plan
    one_of("convolution", self.convolution, CONVOLUTIONS)
    axes = x.ndim - 2
    # Images use the last two of three axes.
    conv = CONVOLUTIONS[self.convolution](
      features=self._channels(1),
      window=stem.window[-axes:],
      stride=stem.stride[-axes:],
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="stem",
      group_norm=self.group_norm,
    )
    x = nn.relu(conv(x, train))
    if stem.pool is None:
      return x
    window, stride, pad = stem.pool
    # As `nn.max_pool`, whose padding checkers take for a text.
    return nn.pool(x, -jnp.inf, lax.max, (window,) * axes, (stride,) * axes, ((pad, pad),) * axes)


Net = TypeVar("Net", bound=ResNet)


@overload
def resnet(name: str, classes: int | None, *, kind: type[Net], **settings: Any) -> Net: ...


@overload
def resnet(name: str, classes: int | None, **settings: Any) -> ResNet: ...


def resnet(
  name: str, classes: int | None, *, kind: type[ResNet] = ResNet, **settings: Any
) -> ResNet:
  """Builds a named network: resnet8, 14, 20, 32, 44, 56, 110 (CIFAR), 18 to 152 (ImageNet).

  Args:
    name: one of `RESNETS`.
    classes: number of outputs, or None; see `ResNet`.
    kind: `ResNet` or a subclass, such as `EarlyExitNet`.
    **settings: other fields of `kind`; they replace the named network's own.
  Returns:
    A module of `kind`.
  Raises:
    ValueError: no such name, or a width or inner width that is not positive.
    TypeError: classes, a width or gate settings of another kind.

  >>> resnet("resnet20", classes=10, gating="channel").blocks
  (3, 3, 3)
  """
  one_of("model name", name, RESNETS)
  if classes is not None:
    arguments.whole_number("classes", classes)
  # Checked here too, since a module checks its fields only when it is called.
  for field in ("width", "inner_width"):
    arguments.number(field, settings.get(field, 1), "> 0", holds=lambda v: v > 0)
  check_gate_settings("gate", settings.get("gate", GateSettings()))
  return kind(classes=classes, **{**RESNETS[name]._asdict(), **settings})
