"""Pruning of the static units of a gated network.

Units that never open are pruned, and units that always open lose their gate.

    pruned(x) = net(x)    where no pruned unit would have opened
                          and no ungated one closed

Axes: M images of the calibration, U units of a group.
Reference: Bejnordi et al., 2020, section 5 (static units); Clopper and Pearson, 1934 (the bound on
a rate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from gating_jax.inference.folded import (
  Block,
  Conv,
  FoldedNet,
  Group,
  Head,
  Layer,
  gates_output,
  groups_of,
)
from gating_jax.inference.gate_statistics import GroupStatistics, observed, places
from gating_jax.inference.quantise import check_folded
from gating_jax.ops import arguments


class PruneMask(NamedTuple):
  """The static units of one group: `[U]` bool, pruned units and units that lose their gate."""

  removed: np.ndarray
  ungated: np.ndarray


def find_static_units(
  net: FoldedNet,
  gate_statistics: Sequence[GroupStatistics],
  *,
  multiple: int = 16,
  confidence: float | None = None,
  max_rate: float = 0.01,
) -> tuple[PruneMask, ...]:
  """Finds the static units, one `PruneMask` a group.

  Units open on no image of the calibration are pruned; those open on every image lose their gate.
  Of the pruned units, those with logits nearest to 0 are kept until the number of channels left is
  a multiple of `multiple`.

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
  """
  _check(net, gate_statistics, multiple, confidence, max_rate)
  # The bound for no event in M images is the same for every unit, so all units pass or none.
  certain = confidence is None or (
    bool(gate_statistics) and rate_bound(gate_statistics[0].images, confidence) <= max_rate
  )
  choices = [
    _choice(o, net.parts[o.part], multiple)
    if certain
    else PruneMask(*np.zeros((2, o.group.gates), bool))
    for o in gate_statistics
  ]
  last = len(net.parts) - 1
  for i, o in enumerate(gate_statistics):
    part = net.parts[o.part]
    # Shortcuts need all channels of a block's output, in their order.
    if gates_output(part) and o.index == len(part.head.groups) - 1:
      choices[i] = PruneMask(*np.zeros((2, o.group.gates), bool))
    # So does a layer whose channels go to something that cannot do with fewer.
    if isinstance(part, Layer) and _reader(net, o.part) is None:
      # The last feature map loses its gate only as a whole, which leaves the order of its channels.
      whole = o.part == last and bool(choices[i].ungated.all())
      choices[i] = PruneMask(np.zeros(o.group.gates, bool), np.full(o.group.gates, whole))
  return tuple(choices)


def rate_bound(images: int, confidence: float, *, events: int = 0) -> float:
  """Computes the Clopper-Pearson upper bound on the rate of an event.

  The event happened `events` times in `images` independent images.

      1 - (1 - confidence)^(1/images)   for no event, about 3 / images at 95 %

  >>> round(rate_bound(299, 0.95), 5), round(rate_bound(2000, 0.95), 5)
  (0.00997, 0.0015)
  """
  return float(stats.beta.ppf(confidence, events + 1, images - events)) if events < images else 1.0


def apply_pruning(net: FoldedNet, choices: Sequence[PruneMask]) -> FoldedNet:
  """Prunes what `find_static_units` chose.

  The outputs are equal wherever no pruned unit would have opened and no ungated unit would have
  closed.

  Args:
    net: the network.
    choices: one `PruneMask` a group.
  Raises:
    ValueError, TypeError: choices that are not those of the network's groups, or a network that is
      not folded.
  """
  check_folded(net)
  choices = arguments.items(
    "choices", choices, "one PruneMask per group, as from find_static_units"
  )
  for i, choice in enumerate(choices):
    arguments.instance(f"choices[{i}]", choice, PruneMask, "a PruneMask, as from find_static_units")
  if [len(c.removed) for c in choices] != [group.gates for _, _, group, _ in places(net)]:
    raise ValueError(
      "choices must be one for each group of the network, [U]; got "
      f"{[len(c.removed) for c in choices]}"
    )
  # `kept`: the channels left of a layer, which the next one, or the classifier, reads.
  parts, kept, left = [], None, list(choices)
  for part in net.parts:
    groups = part.head.groups if part.head is not None else ()
    own, left = left[: len(groups)], left[len(groups) :]
    if isinstance(part, Layer):
      part, kept = _slim_layer(part, own, kept)
    else:
      part = _slim_block(part, own)
    parts.append(part)
  classifier = net.classifier
  if classifier is not None and kept is not None:
    classifier = (classifier[0][kept], classifier[1])
  return dataclasses.replace(net, parts=tuple(parts), classifier=classifier)


class PruningEffect(NamedTuple):
  """The effect of new images on units that a calibration found static.

  Attributes:
    images: number of images.
    affected: fraction of images with any pruned unit that would have opened, or any ungated unit
      that would have closed.
    opened, closed: `[G]` fraction of images for which some pruned unit of a group would have
      opened, and some ungated one closed.
    difference: largest absolute difference of outputs on affected images, and on all others, where
      it is rounding.
    changed: fraction of images for which another output is the largest.
  """

  images: int
  affected: float
  opened: np.ndarray
  closed: np.ndarray
  difference: tuple[float, float]
  changed: float

  def rows(self, gate_statistics: Sequence[GroupStatistics]) -> list[Mapping[str, Any]]:
    """Returns a table row for each group."""
    return [
      {"part": o.part, "group": o.index, "would open": opened, "would close": closed}
      for o, opened, closed in zip(
        gate_statistics, self.opened.tolist(), self.closed.tolist(), strict=True
      )
    ]


def pruning_error(net: FoldedNet, choices: Sequence[PruneMask], images: Any) -> PruningEffect:
  """Measures how often new data would have opened a pruned unit or closed an ungated one.

  Args:
    net: the network before pruning.
    choices: the argument of `apply_pruning`.
    images: `[M, H, W, D]` network inputs, or an iterable of batches.
  Raises:
    ValueError: no images.
  """
  small = apply_pruning(net, choices)
  total, affected, changed, largest = 0, 0, 0, [0.0, 0.0]
  sums = np.zeros((2, len(choices)), np.int64)
  for x, before, logits in observed(net, images):
    # `[G, 2, N]`: some pruned unit of the group would have opened, some ungated one closed.
    wrong = np.array(
      [
        [((z > 0) & c.removed).any(1), ((z <= 0) & c.ungated).any(1)]
        for z, c in zip(logits, choices, strict=True)
      ]
    ).reshape(len(choices), 2, len(x))
    # One batch in, one out: `x` is a batch of `observed` itself.
    ((_, after, _),) = observed(small, [x])
    hit, gap = (
      wrong.any((0, 1)),
      np.abs(before - after).reshape(len(x), -1).max(axis=1, initial=0.0),
    )
    largest = [
      max(a, float(gap[at].max(initial=0.0))) for a, at in zip(largest, (hit, ~hit), strict=True)
    ]
    total, affected, sums = total + len(x), affected + int(hit.sum()), sums + wrong.sum(2).T
    changed += int((before.argmax(1) != after.argmax(1)).sum()) if net.classifier is not None else 0
  if not total:
    raise ValueError("images must be at least one; got none")
  return PruningEffect(
    total, affected / total, *(sums / total), (largest[0], largest[1]), changed / total
  )


def _check(net, gate_statistics, multiple, confidence, max_rate) -> None:
  check_folded(net)
  arguments.whole_number("multiple", multiple)
  if confidence is not None:
    arguments.number("confidence", confidence, "above 0 and below 1, or None", lambda v: 0 < v < 1)
  arguments.number("max_rate", max_rate, "above 0 and at most 1", lambda v: 0 < v <= 1)
  for i, opening in enumerate(
    arguments.items("gate_statistics", gate_statistics, "one GroupStatistics per group, as from analyse")
  ):
    arguments.instance(f"gate_statistics[{i}]", opening, GroupStatistics, "GroupStatistics, as from analyse")
  if [(o.part, o.index, o.group, o.layer_gate) for o in gate_statistics] != places(net):
    raise ValueError(
      f"gate_statistics must be those of the network's {len(places(net))} groups; got {len(gate_statistics)}"
    )


def _choice(o: GroupStatistics, part: Layer | Block, multiple: int) -> PruneMask:
  never, ungated = o.opened == 0, o.opened == o.images
  if o.layer_gate:
    return PruneMask(never, ungated)
  if (
    isinstance(part, Block)
    and o.index == len(groups_of(part)) - 1
    and never.all()
    and not o.group.always
  ):
    # The last convolution sees only zeros: the whole branch is a constant.
    return PruneMask(never, ungated)
  size, always = o.group.channels, o.group.always
  needed = always + int((~never).sum()) * size
  # Rounded up to a multiple, at least one multiple, at most all channels.
  channels = min(max(1, -(-needed // multiple)) * multiple, o.group.width)
  spare = -(-(channels - always) // size) - int((~never).sum())
  # Units that came nearest to opening are kept, as they are the likeliest to open on other images.
  nearest = np.argsort(np.where(never, -o.highest, np.inf), kind="stable")[: max(spare, 0)]
  removed = never.copy()
  removed[nearest] = False
  return PruneMask(removed, ungated)


def _reader(net: FoldedNet, part: int) -> Layer | tuple | None:
  """Returns what reads the channels of a layer and can do with fewer."""
  if part + 1 < len(net.parts):
    following = net.parts[part + 1]
    return following if isinstance(following, Layer) else None
  return net.classifier


def _channels(group: Group, choice: PruneMask) -> tuple[np.ndarray, Group]:
  """Returns the indices of the channels left, those without gates first, and their group."""
  gated = ~(choice.removed | choice.ungated)
  each = lambda units: (
    group.always + np.flatnonzero(units)[:, None] * group.channels + np.arange(group.channels)
  ).reshape(-1)
  kept = np.concatenate([np.arange(group.always), each(choice.ungated), each(gated)]).astype(
    np.int64
  )
  return kept, Group(
    int(gated.sum()), group.channels, group.always + int(choice.ungated.sum()) * group.channels
  )


def _outputs(conv: Conv, kept: np.ndarray) -> Conv:
  return dataclasses.replace(conv, kernel=conv.kernel[..., kept], bias=conv.bias[kept])


def _inputs(conv: Conv, kept: np.ndarray) -> Conv:
  return dataclasses.replace(conv, kernel=conv.kernel[:, :, kept])


def _slim_head(head: Head, choices: Sequence[PruneMask], groups: Sequence[Group]) -> Head | None:
  gated = np.concatenate([~(c.removed | c.ungated) for c in choices])
  if not gated.any():
    return None
  return dataclasses.replace(
    head, logits=head.logits[:, gated], logits_bias=head.logits_bias[gated], groups=tuple(groups)
  )


def _slim_layer(
  layer: Layer, own: Sequence[PruneMask], before: np.ndarray | None
) -> tuple[Layer, np.ndarray | None]:
  """Prunes a layer.

  Returns:
    The layer, and which of its channels are left, in their new order; None: all, as they were.
  """
  conv, head, kept = layer.conv, layer.head, None
  if before is not None:
    conv = _inputs(conv, before)
    # The gate network looks at the same channels as the convolution.
    head = head if head is None else dataclasses.replace(head, hidden=head.hidden[before])
  if own:
    kept, group = _channels(head.groups[0], own[0])
    conv, head = _outputs(conv, kept), _slim_head(head, own, (group,))
    # Even if no channel is pruned, ungated ones may have moved to the front.
    kept = None if np.array_equal(kept, np.arange(layer.conv.bias.size)) else kept
  return dataclasses.replace(layer, conv=conv, head=head), kept


def _slim_block(block: Block, own: Sequence[PruneMask]) -> Block:
  if not own:
    return block
  if block.layer_gate:
    # A branch that never runs is the shortcut alone.
    if own[0].removed.all():
      return dataclasses.replace(block, convs=(), head=None, layer_gate=False)
    return (
      dataclasses.replace(block, head=None, layer_gate=False) if own[0].ungated.all() else block
    )
  # The groups inside the branch, and that of the block's output.
  own, outer = own[: len(groups_of(block))], own[len(groups_of(block)) :]
  if any(choice.removed.any() or choice.ungated.any() for choice in outer):
    raise ValueError("choices must not change the gates of a block's output; got one that does")
  channels = [_channels(group, choice) for group, choice in zip(groups_of(block), own, strict=True)]
  # No channel is left before the last convolution: the branch is its bias.
  if not channels[-1][0].size:
    channels = [(kept[:0], Group(0, group.channels)) for kept, group in channels]
    own = [PruneMask(np.ones_like(c.removed), np.zeros_like(c.ungated)) for c in own]
  convs = list(block.convs)
  for i, (kept, _) in enumerate(channels):
    convs[i], convs[i + 1] = _outputs(convs[i], kept), _inputs(convs[i + 1], kept)
  outer_groups = block.head.groups[len(own) :]
  head = _slim_head(block.head, [*own, *outer], [*(group for _, group in channels), *outer_groups])
  return dataclasses.replace(block, convs=tuple(convs), head=head)
