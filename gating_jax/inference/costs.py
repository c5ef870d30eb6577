"""Multiply-accumulates (MACs) of folded networks: of all units, of open ones, and of programs.

`macs` counts what a network needs, `exit_macs` that of one with early exits. An `Account` and
`exit_dispatch_macs` count what programs compute, padding included; the strategies say how many
examples and channels they take.

Axes: N examples, H and W pixels, D input channels, U gates of a group, X exits before the last.
Reference: Bejnordi et al., 2020, sections 3 and 4 (MACs of gated layers).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.inference.folded import (
  Block,
  Conv,
  ExitNet,
  FoldedNet,
  Group,
  Layer,
  Part,
  Shape,
  run_net,
  walk,
)
from gating_jax.layers.context import THUMBNAIL
from gating_jax.ops.compaction import example_sizes
from gating_jax.ops.macs import conv_macs, dense_layer_macs
from gating_jax.timing import EXIT_DISPATCH, MASKED


class Cost(NamedTuple):
  """The cost of a part for one example.

  Attributes:
    shape: `(H', W', D')` of the part's output.
    macs: multiply-accumulates: one number, or `[N]` where they depend on the example.
  """

  shape: Shape
  macs: Any


def macs(net: FoldedNet, input_shape: Shape, gates: Sequence[Any] = ()) -> Any:
  """Computes the multiply-accumulates per example, gate networks included.

  Args:
    net: the network.
    input_shape: `(H, W, D)` of an image.
    gates: `[N, U]` of every group in order, above 0 where open; empty if every gate is open.
  Returns:
    `[N]` numbers, or one number without `gates`.
  """
  always = glance_macs(net) + net.outer_macs()
  return sum(macs_by_part(net, input_shape, gates)) + always


def macs_by_part(net: FoldedNet, input_shape: Shape, gates: Sequence[Any] = ()) -> list[Any]:
  """Computes `macs` of each part; what is in no part is left out: the glance, the classifier."""
  opened = []
  for part, own, _ in walk(net, gates):
    opened += opened_of(part, own) if gates else []
  starts, shape, found = net.starts(input_shape), input_shape, []
  # The next part multiplies only by the channels that the gates before leave.
  for i, (part, own, before) in enumerate(walk(net, opened)):
    shape, part_cost = part_macs(part, starts.get(i, shape), *before, opened=own)
    found.append(head_macs(part) + part_cost)
  return found


def exit_macs(net: ExitNet, input_shape: Shape, stay: Any = None) -> Any:
  """Computes the multiply-accumulates of each image from `[N, X]` `stay` of `exits.run_exits`.

  Without `stay`: of one image that no exit lets leave.
  """
  goes_on, total = 1, 0
  for i, stage_cost in enumerate(stage_macs(net, input_shape)):
    total = total + goes_on * stage_cost
    if stay is not None and i < len(net.exits):
      # The stage after an exit costs nothing for images that left there or before.
      goes_on = goes_on * (np.asarray(stay)[:, i] > 0)
  return total


def stage_macs(net: ExitNet, input_shape: Shape) -> list[int]:
  """Returns the multiply-accumulates of each stage with the exit that follows it."""
  shape, found = (1, *input_shape), []
  for i, stage in enumerate(net.stages):
    stage_cost = int(macs(stage, shape[1:]))
    if i < len(net.exits):
      # The shape of the feature map, which the exit and the next stage take, is traced, not
      # computed.
      shape = jax.eval_shape(run_net, stage, jax.ShapeDtypeStruct(shape, jnp.float32))[0].shape
      stage_cost += int(macs(net.exits[i], shape[1:]))
    found.append(stage_cost)
  return found


def glance_macs(net: FoldedNet) -> int:
  """Returns the multiply-accumulates of the glance for one example; 0 without one."""
  if net.glance is None:
    return 0
  conv = net.glance.conv
  return int(_conv_macs(conv, (THUMBNAIL, THUMBNAIL, conv.kernel.shape[2])).macs)


def head_macs(part: Part) -> int:
  """Returns the multiply-accumulates of a part's gate network for one example; 0 without one."""
  if part.head is None:
    return 0
  return dense_layer_macs(part.head.hidden.shape, part.head.logits.shape)


def gate_network_macs(net: FoldedNet) -> int:
  """Returns the multiply-accumulates of all gate networks for one example, the glance included."""
  return sum(map(head_macs, net.parts)) + glance_macs(net)


def macs_over_examples(per_example: Any, count: int) -> float:
  """Returns the multiply-accumulates of `count` examples, from `[N]` or from one for each.

  >>> macs_over_examples(np.array([2, 3]), 2), macs_over_examples(2, 3)
  (5.0, 6.0)
  """
  return float(np.sum(per_example) if np.ndim(per_example) else count * per_example)


def opened_of(part: Part, gates: Sequence[Any]) -> list[Any]:
  """Computes what a part's `[N, U]` gates open, for each of its groups.

  Returns:
    `[N]` numbers of open channels, or, for a branch with one gate, whether it runs.
  """
  if part.layer_gate:
    return [g[:, 0] > 0 for g in gates]
  return open_channels(part.groups, gates)


def open_channels(groups: Sequence[Group], gates: Sequence[Any]) -> list[Any]:
  """Counts the open channels of each group, `[N]`, from its `[N, U]` gates."""
  counts = []
  for group, g in zip(groups, gates, strict=True):
    counts.append(group.always + group.channels * (g > 0).sum(-1))
  return counts


def part_macs(part: Part, shape: Shape, inputs: Any = None, *, opened: Sequence[Any] = ()) -> Cost:
  """Computes the output shape of a part and its multiply-accumulates, the gate network left out.

  Args:
    part: the part.
    shape: `(H, W, D)` of its input.
    inputs: number of input channels that are computed with, `[N]` or one; None for all.
    opened: as `opened_of` returns them; for a branch also the fraction of the examples that run it.
      Empty: all.
  """
  if isinstance(part, Layer):
    return _layer_macs(part, shape, inputs, opened=opened)
  shortcut = shortcut_macs(part, shape, outputs=opened[-1] if opened and part.output_gate else None)
  return Cost(shortcut.shape, shortcut.macs + branch_macs(part, shape, inputs, opened=opened))


def computed_macs(
  part: Part, shape: Shape, inputs: Any = None, *, opened: Sequence[Any] = ()
) -> Any:
  """Computes the MACs of a program for a part: those of `part_macs`, but a shortcut is whole."""
  if isinstance(part, Layer):
    return part_macs(part, shape, inputs, opened=opened).macs
  return shortcut_macs(part, shape).macs + branch_macs(part, shape, inputs, opened=opened)


def _layer_macs(layer: Layer, shape: Shape, inputs: Any, *, opened: Sequence[Any]) -> Cost:
  """Computes the cost of a layer, with the arguments of `part_macs`."""
  conv = _conv_macs(layer.conv, shape, inputs=inputs, outputs=opened[0] if opened else None)
  if layer.pool is None:
    return conv
  window, stride, pad = layer.pool
  height, width, channels = conv.shape
  height = (height + 2 * pad - window) // stride + 1
  width = (width + 2 * pad - window) // stride + 1
  return Cost((height, width, channels), conv.macs)


def branch_macs(
  block: Block, shape: Shape, inputs: Any = None, *, opened: Sequence[Any] = ()
) -> Any:
  """Computes the multiply-accumulates of a block's branch, with the arguments of `part_macs`."""
  # A gate of the whole branch scales its cost; gates of channels scale each convolution's.
  fraction = 1
  if opened and block.layer_gate:
    (fraction,), opened = opened, ()
  total = 0
  for i, conv in enumerate(block.convs):
    outputs = opened[i] if i < len(opened) else None
    shape, conv_cost = _conv_macs(conv, shape, inputs=inputs, outputs=outputs)
    # Channels closed by a gate are no input of the next convolution.
    total, inputs = total + conv_cost, outputs
  return fraction * total


def shortcut_macs(block: Block, shape: Shape, outputs: Any = None) -> Cost:
  """Computes the cost of a block's shortcut.

  Args:
    block: the block.
    shape: `(H, W, D)` of its input.
    outputs: number of output channels that a projection computes, `[N]` or one; None for all.
  """
  if block.project is not None:
    # All inputs count, as in the records of the model.
    return _conv_macs(block.project, shape, inputs=None, outputs=outputs)
  # Without a projection the shortcut costs nothing; strides round up.
  stride, before, after = block.pad
  height, width, channels = shape
  return Cost((-(-height // stride), -(-width // stride), before + channels + after), 0)


def _conv_macs(conv: Conv, shape: Shape, inputs: Any = None, *, outputs: Any = None) -> Cost:
  """Computes the cost of a convolution; `inputs` and `outputs` are numbers of channels, or None."""
  # Padding is symmetric, so a stride divides the size, rounded up.
  height, width = -(-shape[0] // conv.stride), -(-shape[1] // conv.stride)
  window_height, window_width, all_inputs, all_outputs = conv.kernel.shape
  # Over the channels that are computed with.
  inputs = all_inputs if inputs is None else inputs
  outputs = all_outputs if outputs is None else outputs
  shape = (height, width, all_outputs)
  per_pair = conv_macs((window_height, window_width, 1, 1), (1, *shape))
  return Cost(shape, per_pair * inputs * outputs)


class MacRatios(NamedTuple):
  """Multiply-accumulates of the timed examples, relative to those of every unit without gates.

  Attributes:
    opened: those that the examples leave open.
    computed: those that each strategy computes, by name, padding included; 1 by default.
  """

  opened: float
  computed: Mapping[str, float]

  @classmethod
  def relative_to(cls, dense: float, *, opened: float, computed: Mapping[str, float]) -> MacRatios:
    """Divides MACs by those of every unit without gates."""
    return cls(opened / dense, {name: macs / dense for name, macs in computed.items()})


@dataclasses.dataclass(frozen=True)
class Account:
  """Multiply-accumulates per image of a network by each strategy, on calibration data.

  Attributes:
    dense: of each part without gates.
    opened: of each part, those of open units.
    computed: of each part, those that each strategy computes, by name.
    heads: of each part's gate network.
    outer: of what is in no part: of the classifier.
    glance: of the look at the whole image that gate networks read.
  """

  dense: Sequence[float]
  opened: Sequence[float]
  computed: Sequence[Mapping[str, float]]
  heads: Sequence[int]
  outer: int
  glance: int = 0

  def part_ratios(self, part: int) -> MacRatios:
    """Returns the ratios of a part, without its gate network; 1 for a part without any MACs."""
    dense = self.dense[part]
    if not dense:
      return MacRatios(1.0, dict.fromkeys(self.computed[part], 1.0))
    return MacRatios.relative_to(dense, opened=self.opened[part], computed=self.computed[part])

  def net_ratios(self, programs: Mapping[str, Sequence[str]]) -> MacRatios:
    """Returns the ratios of whole programs, with gate networks and what is in no part.

    `programs` maps a name to the strategies of its parts.
    """
    dense = sum(self.dense) + self.outer
    opened = sum(self.opened) + sum(self.heads) + self.glance + self.outer
    computed = {name: self.program_macs(names) for name, names in programs.items()}
    return MacRatios.relative_to(dense, opened=opened, computed=computed)

  def program_macs(self, names: Sequence[str]) -> float:
    """Returns the MACs that a whole program computes, from the strategies of its parts."""
    of_parts = sum(self.computed[part][name] for part, name in enumerate(names))
    return of_parts + sum(self.heads) + self.glance + self.outer


def exit_dispatch_macs(
  net: ExitNet, input_shape: Shape, stay: np.ndarray, *, buckets: int
) -> float:
  """Computes the MACs of `exit_dispatch` per image of a batch, padding included.

  Args:
    net: the network.
    input_shape: `(H, W, D)` of an image.
    stay: `[N, X]` of `exits.run_exits`, for this batch.
    buckets: as in `exits.run_exits`.
  """
  taken, goes_on, total = len(stay), np.ones(len(stay), bool), 0
  for i, stage_cost in enumerate(stage_macs(net, input_shape)):
    total += taken * stage_cost
    if i < len(net.exits):
      goes_on &= stay[:, i] > 0
      # Sizes count from the images of the stage before, as its program is compiled for these.
      sizes = example_sizes(taken, buckets) if taken else (0,)
      taken = sizes[np.searchsorted(sizes, goes_on.sum())]
  return total / len(stay)


def exit_ratios(
  net: ExitNet,
  without_exits: FoldedNet,
  input_shape: Shape,
  *,
  stays: Sequence[np.ndarray],
  buckets: int,
) -> MacRatios:
  """Computes the ratios of multiply-accumulates to those of the network without exits.

  Args:
    net: the network.
    without_exits: the network that every image passes through.
    input_shape: `(H, W, D)` of an image.
    stays: `[N, X]` of `exits.run_exits`, for each batch.
    buckets: as in `exits.run_exits`.
  """
  # Padding depends on the images that share a batch, so MACs are counted batch by batch.
  gathered = [exit_dispatch_macs(net, input_shape, stay, buckets=buckets) for stay in stays]
  return MacRatios.relative_to(
    int(macs(without_exits, input_shape)),
    opened=float(np.mean(exit_macs(net, input_shape, np.concatenate(stays)))),
    computed={MASKED: exit_macs(net, input_shape), EXIT_DISPATCH: statistics.mean(gathered)},
  )
