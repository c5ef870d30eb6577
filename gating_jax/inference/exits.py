"""A network with early exits as one program that gathers the images that stay after each exit.

    stage 1 -> exit 1 -> those it is not sure of:
    stage 2 -> exit 2 -> those it is not sure of:
    stage 3 -> ..

After an exit the program takes the smallest of a few numbers of images that holds all that stay;
the largest is all.

Axes: N images, H and W pixels, D channels, X exits before the last, K classes.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from
deep neural networks", 2016.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.inference import folded
from gating_jax.inference.compiled import (
  AUTO,
  MAX_SLOWDOWN_ALL_OPEN,
  Timing,
  check_arguments,
  check_image_shape,
  check_images,
  fastest,
  in_batches,
  rows,
  run_over,
  spread_batches,
)
from gating_jax.inference.folded import FoldedNet, Layer
from gating_jax.inference.folding import check, fold_conv, fold_stages
from gating_jax.inference.strategies import example_sizes, for_open
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.ops import confidence
from gating_jax.timing import EXIT_DISPATCH, MASKED, UNGATED, race
from gating_jax.types import Array

# A threshold below every entropy: no image leaves.
_NEVER = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitNet:
  """Stages, and an exit after each but the last, which takes the stage's feature map.

  The last stage ends with logits, the others with a feature map.

  Attributes:
    stages: X + 1 networks.
    exits: X networks, each to `[N, K]` logits.
    threshold: fraction of the largest entropy; an image leaves at an exit of less entropy.
  """

  stages: tuple[FoldedNet, ...]
  exits: tuple[FoldedNet, ...]
  threshold: float = dataclasses.field(metadata={"static": True})


class CompiledExits:
  """A compiled network with early exits, made by `compile_exits`.

  It maps `[N, H, W, D]` images, any N, to `(logits, stay)` as of `run`.

  Attributes:
    strategy: `exit_dispatch`, or `masked` where everything is computed for all images.
    input_shape: `(H, W, D)` of an image.
    batch_size: number of images that the program takes.
    weights, program: the call is `program(weights, images)`.
  """

  def __init__(
    self,
    net: ExitNet,
    input_shape: tuple[int, int, int],
    batch_size: int,
    strategy: str,
    buckets: int,
    timings: Sequence[Timing] = (),
  ):
    self.input_shape, self.batch_size, self.strategy = input_shape, batch_size, strategy
    self.weights, self._shapes, self._timings = net, folded.shapes_of(net), tuple(timings)
    self.program = program(buckets if strategy == EXIT_DISPATCH else None)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Runs the program on any number of images.

    Raises:
      ValueError: images of another shape, or in integers.
    """
    x = check_images("images", x, self.input_shape)
    return in_batches(functools.partial(self.program, self.weights), x, self.batch_size)

  def load(self, net: ExitNet) -> None:
    """Takes the weights of another network, without compiling again.

    Raises:
      ValueError: a network of other shapes, parts or another threshold.
    """
    folded.check_alike(net, self._shapes)
    self.weights = net

  def report(self) -> tuple[Timing, ...]:
    """Returns the timings of the whole network, and of `ungated`, the network without exits.

    They are empty unless the strategy was `auto`.
    """
    return self._timings


def fold_exits(model: EarlyExitNet, variables: Mapping[str, Any]) -> ExitNet:
  """Folds the BatchNorm of a network with exits, in evaluation and in float32.

  Args:
    model: an `EarlyExitNet`.
    variables: its trained values, `params` and `batch_stats`.
  Returns:
    An `ExitNet`.
  Raises:
    ValueError: another model, or one with something that cannot be folded.
  """
  check(model, (EarlyExitNet,))
  stages, flat = fold_stages(model, variables)
  classifier = lambda *path: tuple(
    jnp.asarray(flat["params", *path, name]) for name in ("kernel", "bias")
  )
  return ExitNet(
    stages=(
      *(FoldedNet(parts, pooled=False) for parts in stages[:-1]),
      FoldedNet(stages[-1], classifier("classifier")),
    ),
    exits=tuple(
      FoldedNet((Layer(fold_conv(flat, (name, "conv"), stride=2)),), classifier(name, "classifier"))
      for name in (f"exit{i + 1}" for i in range(len(stages) - 1))
    ),
    threshold=model.threshold,
  )


def run(net: ExitNet, x: Array, buckets: int | None = None) -> tuple[Array, Array]:
  """Returns the logits of the exit at which each image leaves, and how unsure every exit was.

  Args:
    net: the network.
    x: `[N, H, W, D]` images.
    buckets: largest number of programs after each exit, one for each number of images; each of them
      has as many again after the next exit. None: everything is computed for all images.
  Returns:
    `[N, K]` logits, and `[N, X]` as of `ops.confidence.stay_logits`, above 0 where an image stays.
    The exit at which an image leaves stands for the later ones.
  """
  logits, stay = _from(net, 0, x, jnp.full(len(x), jnp.inf, jnp.float32), buckets)
  return logits, jnp.stack(stay, axis=1)


def program(buckets: int | None = None) -> Callable[[ExitNet, Array], tuple[Array, Array]]:
  """Compiles `run`."""
  return jax.jit(functools.partial(run, buckets=buckets))


def _from(
  net: ExitNet, stage: int, x: Array, least: Array, buckets: int | None
) -> tuple[Array, list[Array]]:
  """Runs the network from a stage on.

  Returns:
    `[n, K]` logits, and for each exit to come `[n]` how unsure it is, at most `least`.
  """
  # `least`: the lowest value of `stay` at the exits so far.
  x, _ = folded.run(net.stages[stage], x)
  if stage == len(net.exits):
    return x, []
  answer, _ = folded.run(net.exits[stage], x)
  # An image that left stays out: how unsure an exit is never grows again.
  stay = jnp.minimum(least, confidence.stay_logits(answer[:, None], net.threshold)[:, 0])
  goes_on = stay > 0
  # Where an image leaves here, this exit stands for all later ones.
  left = answer, [stay] * (len(net.exits) - stage - 1)
  rest = lambda x, stay: _from(net, stage + 1, x, stay, buckets)
  choose = lambda there, here: jnp.where(jnp.expand_dims(goes_on, range(1, here.ndim)), there, here)
  # Everything for all images, and `where` picks the exit.
  if buckets is None:
    logits, later = jax.tree.map(choose, rest(x, stay), left)
  else:
    # `for_open` adds to y, so y is 0 where an image stays.
    logits, later = for_open(
      goes_on, (x, stay), rest, jax.tree.map(functools.partial(choose, 0.0), left), buckets
    )
  return logits, [stay, *later]


def macs(net: ExitNet, input_shape: tuple[int, int, int], stay: Any = None) -> Any:
  """Computes the multiply-accumulates of each image from `[N, X]` `stay` of `run`.

  Without `stay`: of one image that no exit lets leave.
  """
  goes_on, total = 1, 0
  for i, spent in enumerate(_stage_macs(net, input_shape)):
    total = total + goes_on * spent
    if stay is not None and i < len(net.exits):
      # The stage after an exit costs nothing for images that left there or before.
      goes_on = goes_on * (np.asarray(stay)[:, i] > 0)
  return total


def gathered_macs(
  net: ExitNet, input_shape: tuple[int, int, int], stay: np.ndarray, buckets: int
) -> float:
  """Computes the MACs of `exit_dispatch` per image of a batch, padding included.

  Args:
    net: the network.
    input_shape: `(H, W, D)` of an image.
    stay: `[N, X]` of `run`, for this batch.
    buckets: as of `run`.
  """
  taken, goes_on, total = len(stay), np.ones(len(stay), bool), 0
  for i, spent in enumerate(_stage_macs(net, input_shape)):
    total += taken * spent
    if i < len(net.exits):
      goes_on &= stay[:, i] > 0
      # Sizes count from the images of the stage before, as its program is compiled for these.
      sizes = example_sizes(taken, buckets) if taken else (0,)
      taken = sizes[np.searchsorted(sizes, goes_on.sum())]
  return total / len(stay)


def _stage_macs(net: ExitNet, input_shape: tuple[int, int, int]) -> list[int]:
  """Returns the multiply-accumulates of each stage with the exit that follows it."""
  shape, found = (1, *input_shape), []
  for i, stage in enumerate(net.stages):
    spent = int(folded.macs(stage, shape[1:]))
    if i < len(net.exits):
      # The shape of the feature map, which the exit and the next stage take, is traced, not
      # computed.
      shape = jax.eval_shape(folded.run, stage, jax.ShapeDtypeStruct(shape, jnp.float32))[0].shape
      spent += int(folded.macs(net.exits[i], shape[1:]))
    found.append(spent)
  return found


def compile_exits(
  model: Any,
  variables: Mapping[str, Any] | None = None,
  *,
  input_shape: tuple[int, int, int],
  batch_size: int,
  strategy: str = AUTO,
  buckets: int = 4,
  calibration: Any = None,
  repeats: int = 20,
  max_slowdown_all_open: float = MAX_SLOWDOWN_ALL_OPEN,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> CompiledExits:
  """Compiles a program that gathers, after each exit, the images that stay.

  The outputs equal those of computing everything for all images. `auto` times both ways on this
  machine, and takes the faster, unless it is too slow when no image leaves.

  Args:
    model, variables: what `fold_exits` takes; or an `ExitNet` alone.
    input_shape: `(H, W, D)` of an image.
    batch_size: number of images of the program; other numbers are cut and padded to it.
    strategy: `auto`, `exit_dispatch` or `masked`.
    buckets: largest number of programs after each exit, one for each number of images.
    calibration: `[M, H, W, D]`, M >= 1, images like those to come; `auto` needs them.
    repeats: number of timed calls of each program.
    max_slowdown_all_open, progress: as of `compile_conditional`.
  Returns:
    A `CompiledExits`.
  Raises:
    ValueError: another model, an unknown strategy, or values out of range.
  """
  one_of("strategy", strategy, (AUTO, MASKED, EXIT_DISPATCH))
  input_shape = check_image_shape(input_shape)
  calibration = check_arguments(
    strategy, input_shape, batch_size, buckets, calibration, repeats, max_slowdown_all_open
  )
  net = model if isinstance(model, ExitNet) else fold_exits(model, variables)
  # Exits and later stages take feature maps; only the first stage sees the images.
  folded.check_channels(net.stages[0], input_shape[2])
  if strategy != AUTO:
    return CompiledExits(net, input_shape, batch_size, strategy, buckets)
  batches = spread_batches(calibration, batch_size)
  # The baseline has no exits; `staying` measures the worst case, in which no image leaves.
  plain, staying = without_exits(net), dataclasses.replace(net, threshold=_NEVER)
  ways = {MASKED: program(), EXIT_DISPATCH: program(buckets)}
  runs = {
    **{
      (name, all_stay): (way, staying if all_stay else net)
      for name, way in ways.items()
      for all_stay in (False, True)
    },
    (UNGATED, False): (jax.jit(folded.run), plain),
  }
  # `on_start` says that a program is compiled, but not which: count them.
  done = itertools.count(1)
  times = race(
    {
      name: functools.partial(run_over, way, [(of, x) for x in batches])
      for name, (way, of) in runs.items()
    },
    repeats,
    on_start=lambda: progress(next(done), len(runs)),
  )
  chosen, seconds, open_ratios = fastest(times, len(batches), max_slowdown_all_open)
  # Both ways let the same images leave, so one of them tells the MACs of both.
  stay = np.concatenate([np.asarray(ways[MASKED](net, x)[1]) for x in batches])
  dense = int(folded.macs(plain, input_shape))
  ratio = float(np.mean(macs(net, input_shape, stay))) / dense
  computed = {
    MASKED: macs(net, input_shape) / dense,
    EXIT_DISPATCH: statistics.mean(
      # Padding depends on the images that share a batch, so MACs are counted batch by batch.
      gathered_macs(net, input_shape, stay[i : i + batch_size], buckets)
      for i in range(0, len(stay), batch_size)
    )
    / dense,
  }
  return CompiledExits(
    net,
    input_shape,
    batch_size,
    chosen,
    buckets,
    rows(None, seconds, ratio, computed, chosen, open_ratios),
  )


def without_exits(net: ExitNet) -> FoldedNet:
  """Returns the network that every image passes through, without its exits."""
  return FoldedNet(sum((stage.parts for stage in net.stages), ()), net.stages[-1].classifier)
