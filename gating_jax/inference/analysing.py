"""Measurements of a trained network on images: gate statistics, costs, effects of pruning.

`analyse` counts what the gates open on calibration images, and what each way to skip closed units
would cost. `pruning_error` tests on new images whether units are as static as the calibration has
shown them.

Axes: M images, N of a batch, U units of a group, G groups of the network in the order of its gates.
Reference: Bejnordi et al., 2020, section 5 (always open, always closed, conditional); Herrmann et
al., 2020 (blocks of channels).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.analysis.statistics import GateCounter
from gating_jax.inference import costs, folded
from gating_jax.inference.compiled import check_finite, check_images
from gating_jax.inference.folded import AllGates, FoldedNet, Group, Shape, group_places
from gating_jax.inference.folding import fold
from gating_jax.inference.pruning import (
  GroupStatistics,
  PruneMask,
  apply_pruning,
  find_static_units,
)
from gating_jax.inference.quantising import check_float
from gating_jax.inference.strategies import account, contexts_of, switch
from gating_jax.ops import arguments
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.timing import MASKED, UNGATED

# Images that a network takes at a time.
BATCH_SIZE = 128
# Images of a union, and channels of a block, whose units run together.
UNION, BLOCKS = 8, (16, 32, 64)
# Keys of `Analysis.macs`, which tables show.
EXECUTED, PRUNED = "executed", "pruned"


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

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> analysis = analyse(model, model.init(jax.random.key(0), x), x)
  >>> analysis.macs["ungated"], analysis.rows()[0]["always_open"], analysis.mac_rows()[1]["macs"]
  (1308.0, 4, 1388.0)
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

    `correlation` is the mean absolute correlation between two different units. `conditional` is the
    former name of `varies` and has the same number.
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
      pruned        as masked, after `prune`
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

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> analysis = analyse(model, model.init(jax.random.key(0), x), x)
  >>> analysis.images, len(analysis.gate_statistics)
  (2, 1)
  """
  net = model if isinstance(model, FoldedNet) else fold(model, variables)
  check_float(net)
  arguments.whole_number("buckets", buckets)
  arguments.instance(
    "calibration", calibration, Iterable, rule="images, or an iterable of batches of them"
  )
  switched, ways = f"switch of {buckets}", _ways(net)
  # Sums of integers over images; divided once, below.
  counter, images = NetCounter(net), 0
  totals: dict[str, float] = dict.fromkeys((EXECUTED, switched, *ways), 0)
  for x, _, logits in observe(net, calibration):
    shape, images = x.shape[1:], images + len(x)
    counter.add(logits, len(x))
    gates = [z > 0 for z in logits]
    for name, way in ways.items():
      # A count that does not depend on the image is one number, and each image adds it.
      totals[name] += np.broadcast_to(costs.macs(net, shape, way(gates)), len(x)).sum()
    # `switch` pads each image to a size of its own, so its count needs the gates of a batch.
    totals[switched] += len(x) * _switched(net, gates, buckets=buckets, shape=shape, count=len(x))
  gate_statistics = counter.result()
  per_image = {name: float(total) / images for name, total in totals.items()}
  # Gate networks cost the same for every image.
  heads = costs.gate_network_macs(net)
  whole = costs.macs(net, shape)
  # Pruned by these very statistics, with the default settings of `prune`.
  small = apply_pruning(net, find_static_units(net, gate_statistics))
  macs = {
    UNGATED: float(whole - heads),
    MASKED: float(whole),
    EXECUTED: per_image.pop(EXECUTED),
    PRUNED: float(costs.macs(small, shape)),
    **per_image,
  }
  return Analysis(
    net=net, input_shape=shape, images=images, gate_statistics=gate_statistics, macs=macs
  )


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

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> small = prune(analyse(model, model.init(jax.random.key(0), x), x))
  >>> # The parts stay; their channels may be fewer.
  >>> len(small.parts)
  1
  """
  rule = "an Analysis, as returned by analyse(model, variables, images)"
  arguments.instance("analysis", analysis, Analysis, rule=rule)
  static = find_static_units(
    analysis.net,
    analysis.gate_statistics,
    multiple=multiple,
    confidence=confidence,
    max_rate=max_rate,
  )
  return apply_pruning(analysis.net, static)


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
    changed: fraction of images for which another output is the largest. Of a `GatedModel` that is
      the largest of the last axis, whatever it means, and at any place where there are several. 0
      for a `ResNet` or a `VGG` without a classifier, and for one number per image.
  """

  images: int
  affected: float
  opened: np.ndarray
  closed: np.ndarray
  difference: tuple[float, float]
  changed: float

  def rows(self, gate_statistics: Sequence[GroupStatistics]) -> list[Mapping[str, Any]]:
    """Returns a table row for each group."""
    rows = []
    for i, counted in enumerate(gate_statistics):
      rows.append(
        {
          "part": counted.part,
          "group": counted.index,
          "would open": float(self.opened[i]),
          "would close": float(self.closed[i]),
        }
      )
    return rows


def pruning_error(net: FoldedNet, choices: Sequence[PruneMask], images: Any) -> PruningEffect:
  """Measures how often new data would have opened a pruned unit or closed an ungated one.

  Args:
    net: the network before pruning.
    choices: the argument of `apply_pruning`.
    images: `[M, H, W, D]` network inputs, or an iterable of batches.
  Returns:
    A `PruningEffect`: fractions of the images, in [0, 1], and differences of their outputs.
  Raises:
    ValueError: no images.

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> analysis = analyse(model, model.init(jax.random.key(0), x), x)
  >>> static = find_static_units(analysis.net, analysis.gate_statistics)
  >>> # The images of the calibration itself move nothing.
  >>> pruning_error(analysis.net, static, x).affected
  0.0
  """
  small = apply_pruning(net, choices)
  total, affected, changed, gap_affected, gap_others = 0, 0, 0, 0.0, 0.0
  opened, closed = np.zeros((2, len(choices)), np.int64)
  for x, before, logits in observe(net, images):
    # One batch in, one out: `x` is a batch of `observe` itself.
    ((_, after, _),) = observe(small, [x])
    # Images for which some pruned unit would have opened, or some ungated one closed.
    moved = np.zeros(len(x), bool)
    for i, (z, choice) in enumerate(zip(logits, choices, strict=True)):
      would_open = ((z > 0) & choice.removed).any(axis=1)
      would_close = ((z <= 0) & choice.ungated).any(axis=1)
      opened[i] += would_open.sum()
      closed[i] += would_close.sum()
      moved |= would_open | would_close
    gap = np.abs(before - after).reshape(len(x), -1).max(axis=1, initial=0.0)
    gap_affected = max(gap_affected, float(gap[moved].max(initial=0.0)))
    gap_others = max(gap_others, float(gap[~moved].max(initial=0.0)))
    total, affected = total + len(x), affected + int(moved.sum())
    if net.has_classes and before.ndim > 1:
      # A user's model may have outputs at each of several places.
      other = before.argmax(-1) != after.argmax(-1)
      changed += int(other.reshape(len(x), -1).any(axis=1).sum())
  if not total:
    raise ValueError("images must be at least one; got none")
  return PruningEffect(
    images=total,
    affected=affected / total,
    opened=opened / total,
    closed=closed / total,
    difference=(gap_affected, gap_others),
    changed=changed / total,
  )


class Observation(NamedTuple):
  """A batch of images, and what a network made of it.

  Attributes:
    images: `[N, H, W, D]`.
    outputs: `[N, ...]`.
    logits: `[N, U]` of each group.
  """

  images: np.ndarray
  outputs: np.ndarray
  logits: tuple[np.ndarray, ...]


# One compiled function for all calls: networks of the same shapes share a program.
_run = jax.jit(folded.run_net)


def observe(net: FoldedNet, images: Any) -> Iterator[Observation]:
  """Yields batches of images, with the network's outputs and the logits of all groups.

  Args:
    net: the network.
    images: `[M, H, W, D]` float32 network inputs, or an iterable of such batches.
  Yields:
    an `Observation` of `BATCH_SIZE` images, last one of the rest.
  Raises:
    ValueError: no images, or images of another rank, of unlike shapes, in integers, or not finite.
  """
  for x in _batches(images):
    net.check_channels(x.shape[3])
    # A last batch that is nearly full is padded, so that it runs in the same program.
    spare = -len(x) % BATCH_SIZE if len(x) > BATCH_SIZE // 2 else 0
    padded = np.pad(x, [(0, spare), (0, 0), (0, 0), (0, 0)])
    outputs, logits = jax.device_get(_run(net, jnp.asarray(padded)))
    yield Observation(x, outputs[: len(x)], tuple(z[: len(x)] for z in logits))


def gates_of(net: FoldedNet, images: Any) -> tuple[np.ndarray, ...]:
  """Computes the gates of every group on images, `[M, U]` of 0 and 1; arguments as `observe`."""
  # Logits only: outputs of all images could fill the memory.
  pieces = [observation.logits for observation in observe(net, images)]
  logits = folded.join_batches(pieces)
  return tuple(np.asarray(threshold_gate(of_group)) for of_group in logits)


def _batches(images: Any) -> Iterator[np.ndarray]:
  """Yields `BATCH_SIZE` images at a time, then the rest, whatever the batches of an iterable."""
  pieces, waiting = _pieces(images), None
  for x in pieces:
    x = check_finite("images", check_images("images", x))
    if waiting is not None and x.shape[1:] != waiting.shape[1:]:
      raise ValueError(f"images must be of one shape, {waiting.shape[1:]}; got {x.shape[1:]}")
    if not len(x):
      raise ValueError("images must be at least one image; got none")
    # Batches are made up across pieces, so that all but the last have one shape and program.
    waiting = x if waiting is None or not len(waiting) else np.concatenate([waiting, x])
    while len(waiting) >= BATCH_SIZE:
      yield waiting[:BATCH_SIZE]
      waiting = waiting[BATCH_SIZE:]
  if waiting is not None and len(waiting):
    yield waiting


def _pieces(images: Any) -> Iterator[Any]:
  """Iterates over the batches of an iterable, or over parts of an array."""
  if not hasattr(images, "shape"):
    yield from images
    return
  # At least one piece, so that an empty array is found to be empty.
  for start in range(0, max(len(images), 1), BATCH_SIZE):
    yield images[start : start + BATCH_SIZE]


class NetCounter:
  """Sums over batches for the `GroupStatistics` of all groups of a network."""

  def __init__(self, net: FoldedNet):
    self._counters = {place: GateCounter(place.group.gates) for place in group_places(net)}
    self._images = 0

  def add(self, logits: tuple[np.ndarray, ...], images: int) -> None:
    """Adds the logits of a batch of N images, `[N, U]` for each group."""
    self._images += images
    for counter, of_group in zip(self._counters.values(), logits, strict=True):
      counter.add(of_group)

  def result(self) -> tuple[GroupStatistics, ...]:
    """Returns the statistics of each group.

    Raises:
      ValueError: nothing was added.
    """
    # A network without gates has no counter that knows.
    if not self._images:
      raise ValueError("calibration must have at least one image; got none")
    found = []
    for place, counter in self._counters.items():
      found.append(GroupStatistics(**vars(counter.result()), **place._asdict()))
    return tuple(found)


def _ways(net: FoldedNet) -> dict[str, Callable[[AllGates], AllGates]]:
  """Maps the name of each way to skip to its rule, from the gates to the units it computes."""

  def in_unions(gates: AllGates) -> AllGates:
    """Opens what is open for any of `UNION` images in their order."""
    return list(map(_union, gates))

  def in_blocks(gates: AllGates, size: int) -> AllGates:
    """Opens blocks of adjacent channels where any of them is open."""
    found = []
    for g, (_, _, group, layer_gate) in zip(gates, group_places(net), strict=True):
      # A branch with one gate has no channels to gather into blocks: its gate stays as it is.
      found.append(g if layer_gate else _in_blocks(g, group, size))
    return found

  ways = {EXECUTED: list, f"union of {UNION}": in_unions}
  for size in BLOCKS:
    ways[f"blocks of {size}"] = functools.partial(in_blocks, size=size)
  return ways


def _switched(net: FoldedNet, gates: AllGates, *, buckets: int, shape: Shape, count: int) -> float:
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
  return found.program_macs(names)


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
  """Returns the table row of a group of units."""
  units = counted.group.gates
  # The diagonal is left out: a unit's correlation with itself is 1.
  others = ~np.eye(units, dtype=bool)
  varying = int(counted.varies.sum())
  return {
    "part": counted.part,
    "group": counted.index,
    "units": units,
    "channels": counted.group.channels,
    "open": float(counted.open_rates.mean()) if units else 0.0,
    "always_open": int(counted.always_open.sum()),
    "always_closed": int(counted.always_closed.sum()),
    "varies": varying,
    # Readers of rows know it by this name.
    "conditional": varying,
    "open_on_all": int((counted.opened == counted.images).sum()),
    "closed_on_all": int((counted.opened == 0).sum()),
    "correlation": float(np.abs(counted.correlation[others]).mean()) if units > 1 else 0.0,
  }
