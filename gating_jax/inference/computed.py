"""Multiply-accumulates that each strategy computes on a batch, including padding and wasted work.

Axes: N examples of a batch, U gates of a group.
Reference: Verelst and Tuytelaars, 2020 (what of the MACs saved is saved in practice).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gating_jax.inference.clusters import covered, unions
from gating_jax.inference.folded import (
  Block,
  FoldedNet,
  Layer,
  Part,
  gates_output,
  groups_of,
  head_macs,
  macs_by_part,
  open_channels,
  opened_of,
  output_groups,
  part_macs,
)
from gating_jax.inference.strategies import Setting, capacities, example_sizes

Shape = tuple[int, int, int]
Gates = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Account:
  """MACs per image, on calibration data.

  Attributes:
    dense: of each part without gates.
    opened: of each part, those of open units.
    computed: of each part, those that each strategy computes, by name.
    heads: of each part's gate network.
    classifier: of the classifier.
  """

  dense: Sequence[float]
  opened: Sequence[float]
  computed: Sequence[Mapping[str, float]]
  heads: Sequence[int]
  classifier: int

  def of_part(self, part: int) -> tuple[float, dict[str, float]]:
    """Returns the ratio of open MACs of a part, and of those that each strategy computes.

    Both are relative to all MACs of the part, without its gate network; 1 for a part without any
    MACs.
    """
    dense = self.dense[part]
    return (
      self.opened[part] / dense if dense else 1.0,
      {name: spent / dense if dense else 1.0 for name, spent in self.computed[part].items()},
    )

  def of_net(self, programs: Mapping[str, Sequence[str]]) -> tuple[float, dict[str, float]]:
    """Returns the same ratios for whole programs, with gate networks and the classifier.

    `programs` maps a name to the strategies of its parts.
    """
    dense = sum(self.dense) + self.classifier
    return (
      (sum(self.opened) + sum(self.heads) + self.classifier) / dense,
      {name: self.of_program(names) / dense for name, names in programs.items()},
    )

  def of_program(self, names: Sequence[str]) -> float:
    """Returns the MACs that a whole program computes, from the strategies of its parts."""
    of_parts = sum(known[name] for known, name in zip(self.computed, names, strict=True))
    return of_parts + sum(self.heads) + self.classifier


def account(
  net: FoldedNet,
  known: Sequence[Sequence[str]],
  settings: Sequence[Setting],
  shape: Shape,
  batches: Sequence[Gates],
  size: int,
) -> Account:
  """Counts the MACs of a network on some batches of images.

  Args:
    net: the network.
    known: the strategies of each part.
    settings: the setting of each part.
    shape: `(H, W, D)` of an image.
    batches: for each batch, `[N, U]` gates of every group of the network in order.
    size: N.
  Returns:
    An `Account`, per image.
  """
  heads = [head_macs(part) for part in net.parts]
  gates = [np.concatenate(of_group) for of_group in zip(*batches, strict=True)]
  opened = [
    # Gate networks are a field of their own.
    float(np.mean(macs)) - head
    for macs, head in zip(macs_by_part(net, shape, gates), heads, strict=True)
  ]
  dense, computed = [], []
  # `left`: the gates of each batch from this part on; `before`: those of this part's input.
  left, before = list(batches), [()] * len(batches)
  for part, names, setting in zip(net.parts, known, settings, strict=True):
    count = len(part.head.groups) if part.head is not None else 0
    own, left = [gates[:count] for gates in left], [gates[count:] for gates in left]
    # Counted batch by batch: padding depends on how many examples of a batch are open.
    computed.append(
      {
        name: sum(
          spent(name, part, setting, shape, *of_batch, size)
          for of_batch in zip(own, before, strict=True)
        )
        / (size * len(batches))
        for name in names
      }
    )
    shape, macs = part_macs(part, shape)
    dense.append(macs)
    before = [output_groups(part, gates) for gates in own]
  return Account(
    dense, opened, computed, heads, net.classifier[0].size if net.classifier is not None else 0
  )


def spent(
  strategy: str, part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  """Computes the MACs of one batch by a strategy, gate networks left out.

  Args:
    strategy: one that fits the part.
    part: the part.
    setting: the setting that the strategy was made with.
    shape: `(H, W, D)` of the part's input.
    gates: `[N, U]` of each of its groups.
    before: `[N, U]` of each of `setting.groups_before`.
    count: N.
  Returns:
    The sum over the N examples.
  """
  return float(_SPENT[strategy](part, setting, shape, gates, before, count))


def _masked(
  part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  return count * part_macs(part, shape)[1]


def _native(
  part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  opened = opened_of(part, gates)
  inputs = [open_channels(group, g) for group, g in zip(setting.groups_before, before, strict=True)]
  if isinstance(part, Layer):
    return np.sum(np.broadcast_to(part_macs(part, shape, *inputs, opened=opened)[1], count))
  # The projection is computed whole, and so is the input of a branch of one gate.
  branch = dataclasses.replace(part, project=None)
  spent = part_macs(branch, shape, *([] if part.layer_gate else inputs), opened=opened)[1]
  return (
    np.sum(np.broadcast_to(spent, count))
    + count * part_macs(dataclasses.replace(part, convs=()), shape)[1]
  )


def _pallas(
  part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  # Blocks of closed channels are skipped inside the kernel: no padding.
  opened = [open_channels(group, g) for group, g in zip(groups_of(part), gates, strict=False)]
  return np.sum(part_macs(part, shape, opened=_and_output(part, opened))[1])


def _switch(
  part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  inputs = setting.groups_before if isinstance(part, Layer) else ()
  groups = (*inputs, *groups_of(part))
  opened = [
    open_channels(group, g)
    for group, g in zip(groups, (*before[: len(inputs)], *gates), strict=False)
  ]
  sizes = capacities(groups, setting.buckets)
  # One program serves all groups of a part: the smallest that holds the open channels of each.
  program = np.max(
    [np.searchsorted(size, channels) for size, channels in zip(sizes, opened, strict=True)], axis=0
  )
  chosen = [
    # Sizes are multiples of 16, which may exceed the channels there are.
    np.minimum(np.array(size)[program], group.width)
    for size, group in zip(sizes, groups, strict=True)
  ]
  opened = _and_output(part, chosen[len(inputs) :])
  return np.sum(
    np.broadcast_to(part_macs(part, shape, *chosen[: len(inputs)], opened=opened)[1], count)
  )


def _layer_dispatch(
  part: Block, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  # The branch runs for the examples gathered, as a fraction of all N.
  return count * part_macs(part, shape, opened=[_padded(gates[0][:, 0], setting) / count])[1]


def _block_dispatch(
  part: Block, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  (group,) = groups_of(part)
  # Each gate gathers its own examples; on average, this many channels run for an example.
  channels = group.always + group.channels * sum(_padded(g, setting) for g in gates[0].T) / count
  return count * part_macs(part, shape, opened=_and_output(part, [channels]))[1]


def _cluster(
  part: Block, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  groups = groups_of(part)
  masks = [np.asarray(group.expand(g)) for group, g in zip(groups, gates, strict=False)]
  whole = [np.arange(group.width) for group in groups]
  shortcut = part_macs(dataclasses.replace(part, convs=()), shape)[1]
  # The shortcut runs for all; an example waits until a set covers what it opens.
  total, waiting = count * shortcut, np.ones(count, bool)
  # The same sets as `cluster` finds from the same calibration gates; all channels come last.
  for kept in [*unions(groups, setting.gates[: len(groups)], setting.buckets - 1), whole]:
    taken = waiting & np.asarray(covered(masks, kept))
    branch = (
      part_macs(part, shape, opened=_and_output(part, [len(index) for index in kept]))[1] - shortcut
    )
    total, waiting = total + _padded(taken, setting) * branch, waiting & ~taken
  return total


def _and_output(part: Part, opened: list[Any]) -> list[Any]:
  """Adds all channels of a block's output, if these have gates: no strategy skips them."""
  return [*opened, part.head.groups[-1].width] if gates_output(part) else opened


def _padded(is_open: np.ndarray, setting: Setting) -> int:
  """Returns the number of examples that a program takes for the open ones of `[N]`."""
  sizes = example_sizes(len(is_open), setting.buckets)
  return sizes[np.searchsorted(sizes, np.sum(is_open > 0))]


_SPENT: Mapping[str, Callable[..., float]] = {
  "masked": _masked,
  "switch": _switch,
  "block_dispatch": _block_dispatch,
  "layer_dispatch": _layer_dispatch,
  "cluster": _cluster,
  "native": _native,
  "pallas": _pallas,
}
