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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.inference import folded
from gating_jax.inference.compiled import (
  AUTO,
  MAX_SLOWDOWN_ALL_OPEN,
  CompiledImages,
  Options,
  TimedProgram,
  Timing,
  baseline_programs,
  check_options,
  count_pieces,
  count_runs,
  spread_batches,
  time_programs,
)
from gating_jax.inference.costs import exit_ratios
from gating_jax.inference.folded import ExitNet, FoldedNet, Layer
from gating_jax.inference.folding import check_foldable, fold_conv, fold_stages
from gating_jax.inference.strategies import for_open
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.names import former_keyword
from gating_jax.ops import confidence
from gating_jax.timing import EXIT_DISPATCH, MASKED, ReportProgress
from gating_jax.types import Array

# A threshold below every entropy: no image leaves.
_NEVER = 1e-12


class CompiledExits(CompiledImages):
  """A compiled network with early exits, made by `compile_exits`.

  It maps `[N, H, W, D]` images, any N, to `(logits, stay)`, as in `run_exits`.

  Args:
    net: the network.
    strategy: `exit_dispatch`, or `masked`.
    options, timings: as in `CompiledImages`.

  Attributes:
    strategy: `exit_dispatch`, or `masked` where everything is computed for all images.

  >>> first = FoldedNet((Layer(folded.Conv(jnp.ones((1, 1, 3, 3)), jnp.zeros(3))),), pooled=False)
  >>> last = FoldedNet(parts=(), classifier=(jnp.ones((3, 2)), jnp.zeros(2)))
  >>> net = ExitNet((first, last), exits=(last,), threshold=0.3)
  >>> program = compile_exits(net, input_shape=(4, 4, 3), batch_size=2, strategy="exit_dispatch")
  >>> logits, stay = program(jnp.ones((5, 4, 4, 3)))
  >>> program.strategy, logits.shape, stay.shape
  ('exit_dispatch', (5, 2), (5, 1))
  """

  def __init__(
    self, net: ExitNet, strategy: str, *, options: Options, timings: Sequence[Timing] = ()
  ):
    self.strategy = strategy
    run_as = make_program(options.buckets if strategy == EXIT_DISPATCH else None)
    super().__init__(net, net, options=options, program=run_as, timings=timings)


def fold_exits(model: nn.Module, variables: Mapping[str, Any] | None) -> ExitNet:
  """Folds the BatchNorm of a network with exits, in evaluation and in float32.

  Args:
    model: an `EarlyExitNet`.
    variables: its trained values, `params` and `batch_stats`.
  Returns:
    An `ExitNet`.
  Raises:
    ValueError: another model, or one with something that cannot be folded.

  >>> from gating_jax.models.resnets import resnet
  >>> model, x = resnet("resnet8", 3, width=0.25, kind=EarlyExitNet), jnp.ones((2, 8, 8, 1))
  >>> shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  >>> net = fold_exits(model, jax.tree.map(lambda array: np.ones(array.shape), shapes))
  >>> len(net.stages), len(net.exits), net.stages[2].classifier[0].shape
  (3, 2, (16, 3))
  """
  check_foldable(model, (EarlyExitNet,))
  assert isinstance(model, EarlyExitNet)  # which has been checked
  parts, flat = fold_stages(model, variables)

  def classifier(*path: str) -> tuple[Array, Array]:
    """Returns the kernel and the bias of a Dense layer."""
    kernel, bias = flat["params", *path, "kernel"], flat["params", *path, "bias"]
    return jnp.asarray(kernel), jnp.asarray(bias)

  stages, exits = [], []
  for i, of_stage in enumerate(parts[:-1], start=1):
    stages.append(FoldedNet(of_stage, pooled=False))
    conv = fold_conv(flat, (f"exit{i}", "conv"), stride=2)
    exits.append(FoldedNet((Layer(conv),), classifier(f"exit{i}", "classifier")))
  stages.append(FoldedNet(parts[-1], classifier("classifier")))
  return ExitNet(stages=tuple(stages), exits=tuple(exits), threshold=model.threshold)


def run_exits(net: ExitNet, x: Array, buckets: int | None = None) -> tuple[Array, Array]:
  """Returns the logits of the exit at which each image leaves, and how unsure every exit was.

  Args:
    net: the network.
    x: `[N, H, W, D]` images.
    buckets: largest number of programs after each exit, one for each number of images; each of them
      has as many again after the next exit. None: everything is computed for all images.
  Returns:
    `[N, K]` logits, and `[N, X]` as in `ops.confidence.stay_logits`, above 0 where an image stays.
    The exit at which an image leaves stands for the later ones.
  """
  least = jnp.full(len(x), jnp.inf, jnp.float32)
  logits, stay = _run_from(0, net, x, least=least, buckets=buckets)
  return logits, jnp.stack(stay, axis=1)


def make_program(buckets: int | None = None) -> Callable[[ExitNet, Array], tuple[Array, Array]]:
  """Compiles `run_exits`."""
  return jax.jit(functools.partial(run_exits, buckets=buckets))


def _run_from(
  stage: int, net: ExitNet, x: Array, *, least: Array, buckets: int | None
) -> tuple[Array, list[Array]]:
  """Runs the network from a stage on.

  Args:
    stage: index of the stage.
    net: the network.
    x: `[n, H, W, D]` input of the stage.
    least: `[n]` the lowest value of `stay` at the exits so far.
    buckets: as in `run_exits`.
  Returns:
    `[n, K]` logits, and for each exit to come `[n]` how unsure it is, at most `least`.
  """
  x, _ = folded.run_net(net.stages[stage], x)
  if stage == len(net.exits):
    return x, []
  answer, _ = folded.run_net(net.exits[stage], x)
  # An image that left stays out: how unsure an exit is never grows again.
  stay = jnp.minimum(least, confidence.stay_logits(answer[:, None], threshold=net.threshold)[:, 0])
  goes_on = stay > 0
  # Where an image leaves here, this exit stands for all later ones.
  left = answer, [stay] * (len(net.exits) - stage - 1)

  def rest(x: Array, stay: Array) -> tuple[Array, list[Array]]:
    """Runs the later stages."""
    return _run_from(stage + 1, net, x, least=stay, buckets=buckets)

  def choose(there: Array | float, here: Array) -> Array:
    """Takes the values of images that continue from `there`, and those of others from `here`."""
    return jnp.where(jnp.expand_dims(goes_on, range(1, here.ndim)), there, here)

  # Everything for all images, and `where` picks the exit.
  if buckets is None:
    logits, later = jax.tree.map(choose, rest(x, stay), left)
  else:
    # `for_open` adds to y, so y is 0 where an image stays.
    y = jax.tree.map(functools.partial(choose, 0.0), left)
    logits, later = for_open(goes_on, (x, stay), rest, y=y, buckets=buckets)
  return logits, [stay, *later]


@former_keyword("open_limit", "max_slowdown_all_open")
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
  progress: ReportProgress | None = None,
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
    max_slowdown_all_open, progress: as in `compile_conditional`.
  Returns:
    A `CompiledExits`.
  Raises:
    ValueError: another model, an unknown strategy, or values out of range.

  >>> first = FoldedNet((Layer(folded.Conv(jnp.ones((1, 1, 3, 3)), jnp.zeros(3))),), pooled=False)
  >>> last = FoldedNet(parts=(), classifier=(jnp.ones((3, 2)), jnp.zeros(2)))
  >>> net = ExitNet((first, last), exits=(last,), threshold=0.3)
  >>> program = compile_exits(net, input_shape=(4, 4, 3), batch_size=2, strategy="masked")
  >>> logits, stay = program(jnp.ones((5, 4, 4, 3)))
  >>> logits[0].tolist(), (stay[0] > 0).tolist()
  ([9.0, 9.0], [True])
  """
  one_of("strategy", strategy, (AUTO, MASKED, EXIT_DISPATCH))
  options = check_options(
    strategy=strategy,
    input_shape=input_shape,
    batch_size=batch_size,
    buckets=buckets,
    calibration=calibration,
    repeats=repeats,
    max_slowdown_all_open=max_slowdown_all_open,
  )
  net = model if isinstance(model, ExitNet) else fold_exits(model, variables)
  # Exits and later stages take feature maps; only the first stage sees the images.
  net.stages[0].check_channels(options.input_shape[2])
  if strategy != AUTO:
    return CompiledExits(net, strategy, options=options)
  batches = spread_batches(options.calibration, batch_size)
  programs = {MASKED: make_program(), EXIT_DISPATCH: make_program(buckets)}
  # The worst case: no image leaves.
  staying = dataclasses.replace(net, threshold=_NEVER)
  ways = {
    MASKED: TimedProgram(programs[MASKED], net, open_weights=staying),
    EXIT_DISPATCH: TimedProgram(programs[EXIT_DISPATCH], net, open_weights=staying),
    **baseline_programs(jax.jit(folded.run_net), without_exits(net), batches),
  }
  # A piece of work is a program compiled, or all of them timed once.
  choice = time_programs(
    ways,
    batches,
    repeats=repeats,
    max_slowdown_all_open=max_slowdown_all_open,
    advance=count_pieces(progress, count_runs(ways) + repeats),
  )
  # Both programs let the same images leave, so the MACs of one are those of both.
  stays = [np.asarray(programs[MASKED](net, x)[1]) for x in batches]
  ratios = exit_ratios(
    net, without_exits(net), options.input_shape, stays=stays, buckets=options.buckets
  )
  timings = choice.timings(ratios)
  return CompiledExits(net, choice.strategy, options=options, timings=timings)


def without_exits(net: ExitNet) -> FoldedNet:
  """Returns the network that every image passes through, without its exits."""
  parts = ()
  for stage in net.stages:
    parts += stage.parts
  return FoldedNet(parts, net.stages[-1].classifier)
