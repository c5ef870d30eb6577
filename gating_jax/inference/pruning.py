"""Pruning of the static units of a gated network.

Units that never open are pruned, and units that always open lose their gate. Weighted gates stay,
since the weight of a unit that is always open differs from image to image.

    pruned(x) = net(x)    where no pruned unit would have opened
                          and no ungated one closed

Axes: M images of the calibration, U units of a group.
Reference: Bejnordi et al., 2020, section 5 (static units); Clopper and Pearson, 1934 (the bound on
a rate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.analysis.statistics import GateStatistics
from gating_jax.inference.folded import (
  Block,
  FoldedNet,
  Group,
  Head,
  Layer,
  Part,
  group_places,
  walk,
)
from gating_jax.inference.quantising import check_folded
from gating_jax.names import former_keyword
from gating_jax.ops import arguments


@dataclasses.dataclass(frozen=True)
class GroupStatistics(GateStatistics):
  """Opening statistics of one group of a network's units.

  Attributes:
    part, index, group, layer_gate: the group's place in the network, as in `folded.GroupPlace`.
  """

  part: int
  index: int
  group: Group
  layer_gate: bool


class PruneMask(NamedTuple):
  """The static units of one group: `[U]` bool, pruned units and units that lose their gate.

  >>> PruneMask(removed=np.array([True, False]), ungated=np.array([False, False])).gated
  array([False,  True])
  """

  removed: np.ndarray
  ungated: np.ndarray

  @classmethod
  def nothing(cls, units: int) -> PruneMask:
    """Returns the mask of a group without static units."""
    return cls(np.zeros(units, bool), np.zeros(units, bool))

  @property
  def gated(self) -> np.ndarray:
    """Marks the units that keep their gate, `[U]`."""
    return ~(self.removed | self.ungated)


@former_keyword("openings", "gate_statistics")
def find_static_units(
  net: FoldedNet,
  gate_statistics: Sequence[GroupStatistics],
  *,
  multiple: int = 16,
  confidence: float | None = None,
  max_rate: float = 0.01,
) -> tuple[PruneMask, ...]:
  """Finds the static units, one `PruneMask` a group.

  Units open on no image of the calibration are pruned; those open on every image lose their gate,
  unless it is weighted. Of the pruned units, those with logits nearest to 0 are kept until the
  number of channels left is a multiple of `multiple`.

  Args:
    net: the network.
    gate_statistics: of its groups.
    multiple: of channels; a layer keeps at least as many, unless its block's branch becomes a
      constant.
    confidence: take only units which open, or close, on at most `max_rate` of all images with this
      confidence, each on its own. There are none if the calibration has too few images; see
      `rate_bound`.
    max_rate: used with `confidence` only.
  Returns:
    One `PruneMask` for each group, in the order of `gate_statistics`.
  Raises:
    ValueError: a setting out of range, or statistics of another network.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from gating_jax.inference.analysing import analyse
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> analysis = analyse(model, model.init(jax.random.key(0), x), x)
  >>> (mask,) = find_static_units(analysis.net, analysis.gate_statistics)
  >>> mask.removed.shape, mask.ungated.shape
  ((4,), (4,))
  """
  _check_arguments(
    net, gate_statistics, multiple=multiple, confidence=confidence, max_rate=max_rate
  )
  found = []
  for counted in gate_statistics:
    # Prune only if enough images were seen to bound the rate.
    if confidence is None or rate_bound(counted.images, confidence) <= max_rate:
      found.append(_mask_of(net, counted, multiple))
    else:
      found.append(PruneMask.nothing(counted.group.gates))
  return tuple(found)


def rate_bound(images: int, confidence: float, *, events: int = 0) -> float:
  """Computes the Clopper-Pearson upper bound on the rate of an event.

  The event happened `events` times in `images` independent images.

      1 - (1 - confidence)^(1/images)   for no event, about 3 / images at 95 %

  >>> round(rate_bound(299, 0.95), 5), round(rate_bound(2000, 0.95), 5)
  (0.00997, 0.0015)
  """
  # Imported here: `import gating_jax` does without SciPy, which takes a while to load.
  from scipy import stats

  return float(stats.beta.ppf(confidence, events + 1, images - events)) if events < images else 1.0


def apply_pruning(net: FoldedNet, choices: Sequence[PruneMask]) -> FoldedNet:
  """Prunes what `find_static_units` chose.

  The outputs are equal wherever no pruned unit would have opened and no ungated unit would have
  closed.

  Args:
    net: the network.
    choices: one `PruneMask` a group.
  Returns:
    The smaller `FoldedNet`.
  Raises:
    ValueError, TypeError: choices that are not those of the network's groups, or a network that is
      not folded.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> len(apply_pruning(net, [PruneMask.nothing(4)]).parts)
  1
  """
  check_folded(net)
  rule = "one PruneMask per group, as from find_static_units"
  choices = arguments.items("choices", choices, rule)
  for i, choice in enumerate(choices):
    arguments.instance(
      f"choices[{i}]", choice, PruneMask, rule="a PruneMask, as from find_static_units"
    )
  units = [len(choice.removed) for choice in choices]
  if units != [group.gates for _, _, group, _ in group_places(net)]:
    raise ValueError(f"choices must be one for each group of the network, [U]; got {units}")
  # `kept`: the channels left of a layer, which the next one, or the classifier, reads.
  parts, kept = [], None
  for part, own, _ in walk(net, choices):
    if part.weighted and any(choice.ungated.any() for choice in own):
      raise ValueError("choices must leave weighted units their gate; got one that is ungated")
    if isinstance(part, Layer):
      part, kept = _prune_layer(part, own, kept)
    else:
      part = _prune_block(part, own)
    parts.append(part)
  if net.classifier is not None and kept is not None:
    net = net.select_features(kept)
  # Without a gate network that reads it, the glance is not computed.
  heads = [part.head for part in parts if part.head is not None]
  glance = net.glance if any("glance" in head.context for head in heads) else None
  return dataclasses.replace(net, parts=tuple(parts), glance=glance)


def _check_arguments(
  net: Any, gate_statistics: Any, *, multiple: Any, confidence: Any, max_rate: Any
) -> None:
  """Checks the arguments of `find_static_units`; raises an error for the first that is wrong."""
  check_folded(net)
  arguments.whole_number("multiple", multiple)
  if confidence is not None:
    arguments.number(
      "confidence", confidence, "above 0 and below 1, or None", holds=lambda v: 0 < v < 1
    )
  arguments.number("max_rate", max_rate, "above 0 and at most 1", holds=lambda v: 0 < v <= 1)
  gate_statistics = arguments.items(
    "gate_statistics", gate_statistics, "one GroupStatistics per group, as from analyse"
  )
  for i, counted in enumerate(gate_statistics):
    rule = "GroupStatistics, as from analyse"
    arguments.instance(f"gate_statistics[{i}]", counted, GroupStatistics, rule=rule)
  wanted = group_places(net)
  if [(c.part, c.index, c.group, c.layer_gate) for c in gate_statistics] != wanted:
    raise ValueError(
      f"gate_statistics must be those of the network's {len(wanted)} groups; "
      f"got {len(gate_statistics)}"
    )


def _mask_of(net: FoldedNet, counted: GroupStatistics, multiple: int) -> PruneMask:
  """Returns the static units of a group, as far as they can be pruned."""
  part, units = net.parts[counted.part], counted.group.gates
  never, always = counted.opened == 0, counted.opened == counted.images
  if part.weighted:
    # Its weight is not the same for all images.
    always = np.zeros(units, bool)
  # Shortcuts need all channels of a block's output, in their order.
  if part.output_gate and counted.index == len(part.groups) - 1:
    return PruneMask.nothing(units)
  # The same holds for a layer whose reader needs all its channels.
  if isinstance(part, Layer) and _reader(net, counted.part) is None:
    # The last feature map loses its gate only as a whole, which leaves the order of its channels.
    whole = counted.part == len(net.parts) - 1 and bool(always.all())
    return PruneMask(np.zeros(units, bool), np.full(units, whole))
  if counted.layer_gate or _is_constant(part, counted):
    return PruneMask(never, always)
  return PruneMask(_removed(counted, multiple), always)


def _is_constant(part: Part, counted: GroupStatistics) -> bool:
  """Tests whether a block's last convolution sees zeros alone: its branch is then a constant."""
  last = isinstance(part, Block) and counted.index == len(part.inner_groups) - 1
  return last and not counted.opened.any() and not counted.group.always


def _removed(counted: GroupStatistics, multiple: int) -> np.ndarray:
  """Returns the units to prune, `[U]`, such that a multiple of this many channels is left."""
  group, never = counted.group, counted.opened == 0
  open_units = int((~never).sum())
  needed = group.always + open_units * group.channels
  # Rounded up to a multiple, at least one multiple, at most all channels.
  channels = min(max(1, -(-needed // multiple)) * multiple, group.width)
  spare = -(-(channels - group.always) // group.channels) - open_units
  # Units that came nearest to opening are kept, as they are the likeliest to open on other images.
  nearest = np.argsort(np.where(never, -counted.highest, np.inf), kind="stable")
  removed = never.copy()
  removed[nearest[: max(spare, 0)]] = False
  return removed


def _reader(net: FoldedNet, part: int) -> Layer | tuple | None:
  """Returns what reads the channels of a layer and can do with fewer."""
  if part + 1 < len(net.parts):
    following = net.parts[part + 1]
    return following if isinstance(following, Layer) else None
  return net.classifier


class _Left(NamedTuple):
  """The channels left of a group: `[K]` indices, those without gates first, and their group."""

  index: np.ndarray
  group: Group


def _left(group: Group, choice: PruneMask) -> _Left:
  """Returns the channels that pruning leaves."""
  ungated, gated = _channels(group, choice.ungated), _channels(group, choice.gated)
  without_gate = [np.arange(group.always), ungated]
  index = np.concatenate([*without_gate, gated]).astype(np.int64)
  always = group.always + ungated.size
  return _Left(index, Group(int(choice.gated.sum()), group.channels, always))


def _channels(group: Group, units: np.ndarray) -> np.ndarray:
  """Returns the indices of the channels of some units, `[U]` bool."""
  first = group.always + np.flatnonzero(units) * group.channels
  return (first[:, None] + np.arange(group.channels)).reshape(-1)


def _prune_head(
  head: Head | None, choices: Sequence[PruneMask], groups: Sequence[Group]
) -> Head | None:
  """Restricts a gate network to the units that keep their gate; None if there are none."""
  gated = np.concatenate([choice.gated for choice in choices])
  if head is None or not gated.any():
    return None
  shift = head.shift
  # A shift of each gate goes with its gate.
  if shift is not None and shift.ndim:
    shift = shift[gated]
  return dataclasses.replace(
    head,
    logits=head.logits[:, gated],
    logits_bias=head.logits_bias[gated],
    groups=tuple(groups),
    shift=shift,
  )


def _prune_layer(
  layer: Layer, own: Sequence[PruneMask], before: np.ndarray | None
) -> tuple[Layer, np.ndarray | None]:
  """Prunes a layer.

  Returns:
    The layer, and which of its channels are left, in their new order; None: all, as they were.
  """
  conv, head, kept = layer.conv, layer.head, None
  if before is not None:
    conv = conv.select(inputs=before)
    # The gate network looks at the same channels as the convolution.
    if head is not None:
      head = head.select_inputs(before, channels=layer.conv.kernel.shape[2])
  if own:
    kept, group = _left(layer.groups[0], own[0])
    conv, head = conv.select(outputs=kept), _prune_head(head, own, (group,))
    # Even if no channel is pruned, ungated ones may have moved to the front.
    if np.array_equal(kept, np.arange(layer.conv.bias.size)):
      kept = None
  return dataclasses.replace(layer, conv=conv, head=head), kept


def _prune_block(block: Block, own: Sequence[PruneMask]) -> Block:
  """Prunes the channels between the convolutions of a block."""
  if not own:
    return block
  if block.layer_gate:
    return _prune_branch(block, own[0])
  groups = block.inner_groups
  inner, outer = own[: len(groups)], own[len(groups) :]
  if any(not choice.gated.all() for choice in outer):
    raise ValueError("choices must not change the gates of a block's output; got one that does")
  left = [_left(group, choice) for group, choice in zip(groups, inner, strict=True)]
  # No channel is left before the last convolution: the branch is its bias.
  if not left[-1].index.size:
    left = [_Left(np.arange(0), Group(0, group.channels)) for group in groups]
    inner = [PruneMask(np.ones(group.gates, bool), np.zeros(group.gates, bool)) for group in groups]
  convs, groups_left = list(block.convs), []
  for i, channels in enumerate(left):
    convs[i] = convs[i].select(outputs=channels.index)
    convs[i + 1] = convs[i + 1].select(inputs=channels.index)
    groups_left.append(channels.group)
  if block.outer_group is not None:
    groups_left.append(block.outer_group)
  head = _prune_head(block.head, [*inner, *outer], groups_left)
  return dataclasses.replace(block, convs=tuple(convs), head=head)


def _prune_branch(block: Block, choice: PruneMask) -> Block:
  """Prunes the one gate of a branch."""
  # A branch that never runs is the shortcut alone.
  if choice.removed.all():
    return dataclasses.replace(block, convs=(), head=None, layer_gate=False)
  if choice.ungated.all():
    return dataclasses.replace(block, head=None, layer_gate=False)
  return block
