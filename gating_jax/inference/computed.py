"""How many multiply-accumulates each strategy spends on a batch, what it pads and computes in vain included.

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
  Folded,
  Layer,
  Part,
  gates_output,
  groups_of,
  handed_on,
)
from gating_jax.inference.folded_macs import (
  head_macs,
  macs_by_part,
  open_channels,
  opened_of,
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
    opened: of each part, what is left open.
    computed: of each part and strategy, what is computed.
    heads: of each part's gate network.
    classifier: of the classifier.
  """

  dense: Sequence[float]
  opened: Sequence[float]
  computed: Sequence[Mapping[str, float]]
  heads: Sequence[int]
  classifier: int

  def of_part(self, part: int) -> tuple[float, dict[str, float]]:
    """What is left open and what each strategy computes, of all MACs of the part, its gate network left out; 1 for a
    part without any."""
    dense = self.dense[part]
    return (
      self.opened[part] / dense if dense else 1.0,
      {name: spent / dense if dense else 1.0 for name, spent in self.computed[part].items()},
    )

  def of_net(self, programs: Mapping[str, Sequence[str]]) -> tuple[float, dict[str, float]]:
    """The same of whole programs, by name, from the strategies of their parts; with gate networks."""
    dense = sum(self.dense) + self.classifier
    return (
      (sum(self.opened) + sum(self.heads) + self.classifier) / dense,
      {name: self.of_program(names) / dense for name, names in programs.items()},
    )

  def of_program(self, names: Sequence[str]) -> float:
    """What a whole program computes, from the strategies of its parts."""
    of_parts = sum(known[name] for known, name in zip(self.computed, names, strict=True))
    return of_parts + sum(self.heads) + self.classifier


def account(
  net: Folded,
  known: Sequence[Sequence[str]],
  settings: Sequence[Setting],
  shape: Shape,
  batches: Sequence[Gates],
  size: int,
) -> Account:
  """Of the network on some batches of images.

  Args:
    net: the network.
    known: the strategies of each part.
    settings: of each part.
    shape: `(H, W, D)` of an image.
    batches: of each batch, `[N, U]` of every group of the network in order.
    size: N.
  """
  heads = [head_macs(part) for part in net.parts]
  gates = [np.concatenate(of_group) for of_group in zip(*batches, strict=True)]
  opened = [
    float(np.mean(macs)) - head
    for macs, head in zip(macs_by_part(net, shape, gates), heads, strict=True)
  ]
  dense, computed = [], []
  left, before = (
    list(batches),
    [()] * len(batches),
  )  # of each batch: gates from this part on, and of its input
  for part, names, setting in zip(net.parts, known, settings, strict=True):
    count = len(part.head.groups) if part.head is not None else 0
    own, left = [gates[:count] for gates in left], [gates[count:] for gates in left]
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
    before = [handed_on(part, gates) for gates in own]
  return Account(
    dense, opened, computed, heads, net.classifier[0].size if net.classifier is not None else 0
  )


def spent(
  strategy: str, part: Part, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  """MACs of one batch, gate networks left out.

  Args:
    strategy: one that knows the part.
    part: the part.
    setting: with which it was made.
    shape: `(H, W, D)` of its input.
    gates: `[N, U]` of each of its groups.
    before: `[N, U]` of `setting.groups_before`.
    count: N.
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
  program = np.max(
    [np.searchsorted(size, channels) for size, channels in zip(sizes, opened, strict=True)], axis=0
  )
  chosen = [
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
  return count * part_macs(part, shape, opened=[_padded(gates[0][:, 0], setting) / count])[1]


def _block_dispatch(
  part: Block, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  (group,) = groups_of(part)
  channels = group.always + group.channels * sum(_padded(g, setting) for g in gates[0].T) / count
  return count * part_macs(part, shape, opened=_and_output(part, [channels]))[1]


def _cluster(
  part: Block, setting: Setting, shape: Shape, gates: Gates, before: Gates, count: int
) -> float:
  groups = groups_of(part)
  masks = [np.asarray(group.expand(g)) for group, g in zip(groups, gates, strict=False)]
  whole = [np.arange(group.width) for group in groups]
  shortcut = part_macs(dataclasses.replace(part, convs=()), shape)[1]
  total, waiting = count * shortcut, np.ones(count, bool)
  for kept in [*unions(groups, setting.gates[: len(groups)], setting.buckets - 1), whole]:
    taken = waiting & np.asarray(covered(masks, kept))
    branch = (
      part_macs(part, shape, opened=_and_output(part, [len(index) for index in kept]))[1] - shortcut
    )
    total, waiting = total + _padded(taken, setting) * branch, waiting & ~taken
  return total


def _and_output(part: Part, opened: list[Any]) -> list[Any]:
  """With all channels of a block's output, where these have gates."""
  return [*opened, part.head.groups[-1].width] if gates_output(part) else opened


def _padded(is_open: np.ndarray, setting: Setting) -> int:
  """Examples that a program takes for those open, `[N]`."""
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
