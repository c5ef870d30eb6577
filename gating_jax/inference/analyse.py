"""Gate statistics of a trained network on calibration images, and the cost of each way to skip.

Axes: M images, N of a batch, U units of a group.
Reference: Bejnordi et al., 2020, section 5; Herrmann et al., 2020 (blocks of channels).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gating_jax.inference import folded
from gating_jax.inference.folded import AllGates, FoldedNet, Group, Shape
from gating_jax.inference.folding import fold
from gating_jax.inference.gate_statistics import GroupStatistics, NetCounter, observed, places
from gating_jax.inference.pruning import apply_pruning, find_static_units
from gating_jax.inference.quantise import check_float
from gating_jax.inference.strategies import account, contexts_of, switch
from gating_jax.ops import arguments
from gating_jax.timing import MASKED, UNGATED

UNION, BLOCKS = 8, (16, 32, 64)
# Keys of `Analysis.macs`, where a pruned network is called slimmed.
EXECUTED, PRUNED = "executed", "slimmed"


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Gate statistics and multiply-accumulates of a network on calibration images.

  Attributes:
    net: the network, BatchNorm folded.
    input_shape: `(H, W, D)` of an image.
    images: M.
    gate_statistics: of each group of units.
    macs: multiply-accumulates per image of each way to run the network, gate networks included; see
      `analyse`.
  """

  net: FoldedNet
  input_shape: Shape
  images: int
  gate_statistics: tuple[GroupStatistics, ...]
  macs: Mapping[str, float]

  @property
  def openings(self) -> tuple[GroupStatistics, ...]:
    """Returns the `gate_statistics`, by their former name."""
    warnings.warn("openings is now called gate_statistics", DeprecationWarning, stacklevel=2)
    return self.gate_statistics

  def rows(self) -> list[dict[str, Any]]:
    """Returns a table row for each group of units.

    `correlation` is the mean absolute correlation between two different units.
    """
    return list(map(_row, self.gate_statistics))

  def mac_rows(self) -> list[dict[str, Any]]:
    """Returns MACs per image of each way to run, and their ratio to the network without gates."""
    rows, ungated = [], self.macs[UNGATED]
    for name, value in self.macs.items():
      rows.append({"strategy": name, "macs": value, "ratio": value / ungated})
    return rows


def analyse(
  model: Any, variables: Mapping[str, Any] | None, calibration: Any, *, buckets: int = 4
) -> Analysis:
  """Counts what the gates of a network open on calibration images.

  `Analysis.macs` holds the mean over images of these ways to run the network:

      ungated       every convolution whole, no gate networks
      masked        every convolution whole, and the gate networks
      executed      open units alone
      slimmed       as masked, after `prune`
      switch        each image alone: the open channels of a layer or block are gathered and padded
                    to one of `buckets` sizes, multiples of 16; branches of one gate run or not
      union of 8    channels open for any of 8 images in their order
      blocks of B   as executed, but B adjacent channels run where any of them is open

  Args:
    model: a `ResNet` or `VGG` that `fold` takes, or a network that is folded already.
    variables: its trained values; None for a folded network.
    calibration: `[M, H, W, D]` float32 network inputs, or an iterable of such batches; read once,
      not kept.
    buckets: number of sizes of `switch`.
  Returns:
    An `Analysis`.
  Raises:
    ValueError: no images, images of unlike shapes or not finite, or a model that cannot be folded.
  """
  net = model if isinstance(model, FoldedNet) else fold(model, variables)
  check_float(net)
  arguments.whole_number("buckets", buckets)
  arguments.instance(
    "calibration", calibration, Iterable, "images, or an iterable of batches of them"
  )
  switched, ways = f"switch of {buckets}", _ways(net)
  # Sums of integers over images; divided once, below.
  counter, images = NetCounter(net), 0
  totals = dict.fromkeys((EXECUTED, switched, *ways), 0)
  for x, _, logits in observed(net, calibration):
    shape, images = x.shape[1:], images + len(x)
    counter.add(logits, len(x))
    gates = [z > 0 for z in logits]
    for name, way in ways.items():
      # A count that does not depend on the image is one number, and each image adds it.
      totals[name] += np.broadcast_to(folded.macs(net, shape, way(gates)), len(x)).sum()
    # `switch` pads each image to a size of its own, so its count needs the gates of a batch.
    totals[switched] += len(x) * _switched(net, buckets, shape, gates, len(x))
  gate_statistics = counter.result()
  per_image = {name: float(total) / images for name, total in totals.items()}
  # Gate networks cost the same for every image.
  heads = sum(map(folded.head_macs, net.parts))
  whole = folded.macs(net, shape)
  # Pruned by these very statistics, with the default settings of `prune`.
  small = apply_pruning(net, find_static_units(net, gate_statistics))
  macs = {
    UNGATED: float(whole - heads),
    MASKED: float(whole),
    EXECUTED: per_image.pop(EXECUTED),
    PRUNED: float(folded.macs(small, shape)),
    **per_image,
  }
  return Analysis(net, shape, images, gate_statistics, macs)


def prune(
  analysis: Analysis, *, multiple: int = 16, confidence: float | None = None, max_rate: float = 0.01
) -> FoldedNet:
  """Prunes the static units of an analysed network.

  It is `apply_pruning(net, find_static_units(net, gate_statistics, ...))` of the analysis. Channels
  without a gate come first in their layer. A block without any gate left has no gate network.

  Args:
    analysis: of `analyse`, which holds the network.
    multiple, confidence, max_rate: as in `find_static_units`.
  Returns:
    The smaller network.
  Raises:
    ValueError, TypeError: as `find_static_units`; or no analysis.
  """
  rule = "an Analysis, as returned by analyse(model, variables, images)"
  arguments.instance("analysis", analysis, Analysis, rule)
  static = find_static_units(
    analysis.net,
    analysis.gate_statistics,
    multiple=multiple,
    confidence=confidence,
    max_rate=max_rate,
  )
  return apply_pruning(analysis.net, static)


def _ways(net: FoldedNet) -> dict[str, Callable[[AllGates], AllGates]]:
  """Maps the name of each way to skip to its rule, from the gates to the units it computes."""

  def in_unions(gates: AllGates) -> AllGates:
    """Opens what is open for any of `UNION` images in their order."""
    return list(map(_union, gates))

  def in_blocks(gates: AllGates, size: int) -> AllGates:
    """Opens blocks of adjacent channels where any of them is open."""
    found = []
    for g, (_, _, group, layer_gate) in zip(gates, places(net), strict=True):
      # A branch with one gate has no channels to gather into blocks: its gate stays as it is.
      found.append(g if layer_gate else _in_blocks(g, group, size))
    return found

  ways = {EXECUTED: list, f"union of {UNION}": in_unions}
  for size in BLOCKS:
    ways[f"blocks of {size}"] = functools.partial(in_blocks, size=size)
  return ways


def _switched(net: FoldedNet, buckets: int, shape: Shape, gates: AllGates, count: int) -> float:
  """Computes MACs per image by `switch` where it fits.

  Elsewhere `native`, which computes what is open, stands for a branch that runs or not.
  """
  contexts = contexts_of(net, buckets)
  names = []
  for part, context in zip(net.parts, contexts, strict=True):
    if switch(part, context) is not None:
      names.append("switch")
    else:
      # Parts that no strategy of the two fits are computed whole.
      names.append("native" if part.layer_gate else MASKED)
  strategies = [[name] for name in names]
  found = account(net, shape, [gates], strategies=strategies, contexts=contexts, size=count)
  return found.of_program(names)


def _union(gates: np.ndarray) -> np.ndarray:
  """Opens the units, `[N, U]`, that are open for any of `UNION` images in their order."""
  # `reduceat` also takes a shorter last set, but no empty axis.
  starts = np.arange(0, len(gates), UNION)
  opened = np.logical_or.reduceat(gates, starts, axis=0) if gates.size else gates[starts]
  return np.repeat(opened, UNION, axis=0)[: len(gates)]


def _in_blocks(gates: np.ndarray, group: Group, size: int) -> np.ndarray:
  """Opens the units, `[N, U]`, of each block of `size` channels of which any is open."""
  # Whole gates only: a block holds at least one gate's channels.
  units = max(1, size // group.channels)
  # The last block is filled up with closed units, which are cut off again.
  spare = -gates.shape[1] % units
  blocks = np.pad(gates, ((0, 0), (0, spare))).reshape(len(gates), -1, units).any(axis=2)
  return np.repeat(blocks, units, axis=1)[:, : gates.shape[1]]


def _row(counted: GroupStatistics) -> dict[str, Any]:
  units = counted.group.gates
  # The diagonal is left out: a unit's correlation with itself is 1.
  others = ~np.eye(units, dtype=bool)
  return {
    "part": counted.part,
    "group": counted.index,
    "units": units,
    "channels": counted.group.channels,
    "open": float(counted.open_rates.mean()) if units else 0.0,
    "always_open": int(counted.always_open.sum()),
    "always_closed": int(counted.always_closed.sum()),
    "conditional": int(counted.varies.sum()),
    "open_on_all": int((counted.opened == counted.images).sum()),
    "closed_on_all": int((counted.opened == 0).sum()),
    "correlation": float(np.abs(counted.correlation[others]).mean()) if units > 1 else 0.0,
  }
