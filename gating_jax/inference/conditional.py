"""A trained gated network as one compiled program that skips closed units, chosen by timing.

Axes: N images of H x W pixels and D channels, U gates of a group.
Reference: Verelst and Tuytelaars, 2020; Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.inference import folded
from gating_jax.inference.compiled import (
  AUTO,
  GAIN,
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
from gating_jax.inference.computed import Account, account
from gating_jax.inference.folded import FoldedNet, Gates, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.kernel_strategies import STRATEGIES, why_not, worth_trying
from gating_jax.inference.quantise import check_float
from gating_jax.inference.strategies import CompiledPart, Setting, settings_of
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.timing import CHOSEN, MASKED, UNGATED, race
from gating_jax.types import Array

# The settings of a block without gates.
_NO_GATES = {"layer_gate": False, "output_gate": False}


class CompiledConditional:
  """A compiled gated network, made by `compile_conditional`.

  It maps `[N, H, W, D]` images, any N, to `(outputs, tuple of [N, U] gate logits)`.

  Attributes:
    strategies: the name of each part's strategy.
    input_shape: `(H, W, D)` of an image.
    batch_size: number of images that the program takes.
    weights, program: the call is `program(weights, images)`.
  """

  def __init__(
    self,
    net: FoldedNet,
    input_shape: tuple[int, int, int],
    batch_size: int,
    names: Sequence[str],
    settings: Sequence[Setting],
    timings: Sequence[Timing] = (),
  ):
    # The shapes stay, so that `load` can compare another network with the compiled one.
    self.strategies, self._settings, self._timings = tuple(names), tuple(settings), tuple(timings)
    self.input_shape, self.batch_size, self._shapes = input_shape, batch_size, folded.shapes_of(net)
    made = _made(net, names, settings)
    self.weights, self.program = _with_parts(net, made), program(made)

  def __call__(self, x: Array) -> tuple[Array, Gates]:
    """Runs the program on any number of images.

    A gated network that pools returns NaN outputs for an image that is not finite.

    Raises:
      ValueError: images of another shape, or in integers.
    """
    x = check_images("images", x, self.input_shape)
    return in_batches(functools.partial(self.program, self.weights), x, self.batch_size)

  def load(self, net: FoldedNet) -> None:
    """Takes the weights of another network, without compiling or timing again.

    Skipping may then save another amount than was measured.

    Raises:
      ValueError: a network of other shapes or groups of gates.
    """
    folded.check_alike(net, self._shapes)
    self.weights = _with_parts(net, _made(net, self.strategies, self._settings))

  def report(self) -> tuple[Timing, ...]:
    """Returns the timings of each part, then of the whole network.

    They are empty unless the strategy was `auto`.
    """
    return self._timings


def compile_conditional(
  model: Any,
  variables: Mapping[str, Any] | None = None,
  *,
  input_shape: tuple[int, int, int],
  batch_size: int,
  strategy: str = AUTO,
  buckets: int = 4,
  calibration: Any = None,
  repeats: int = 20,
  candidates: Collection[str] | None = None,
  max_slowdown_all_open: float = MAX_SLOWDOWN_ALL_OPEN,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> CompiledConditional:
  """Compiles a gated network into a program that skips closed units.

  The outputs equal those of computing everything. `auto` times every strategy of every part on this
  machine, takes the fastest of each, and then compares the whole program with that of each strategy
  alone. It computes everything where skipping is slower, or costs too much with every unit open.

  Args:
    model, variables: what `fold` takes; or a `FoldedNet` network alone.
    input_shape: `(H, W, D)` of an image.
    batch_size: number of images of the program; other numbers are cut and padded to it.
    strategy: `auto`, or one of `STRATEGIES`, for each part that it fits; other parts compute
      everything.
    buckets: largest number of programs for different numbers of open units.
    calibration: `[M, H, W, D]`, M >= 1, images like those to come. `auto` needs them: it fits to
      every second image, and times on four batches of the others, or on as many batches as hold 16
      images.
    repeats: number of timed calls of each program.
    candidates: strategies that `auto` may take in addition to `masked`, such as `EXPORTABLE`; None
      for all that run here.
    max_slowdown_all_open: largest slowdown with every unit open: the time of a call of the program that `auto`
      takes, divided by that of computing everything, with gates or without. Where `masked` itself
      is slower, its slowdown is the limit; see `Timing.open_ratio`.
    progress: called with the number of programs that `auto` has compiled, and the number it
      compiles.
  Returns:
    A `CompiledConditional`.
  Raises:
    ValueError: an unknown strategy, a network without the gates it takes, or values out of range.
  """
  one_of("strategy", strategy, (AUTO, *STRATEGIES))
  for name in candidates or ():
    one_of("candidates", name, STRATEGIES)
  input_shape = check_image_shape(input_shape)
  calibration = check_arguments(
    strategy, input_shape, batch_size, buckets, calibration, repeats, max_slowdown_all_open
  )
  if reason := why_not(strategy):
    raise ValueError(f"strategy {strategy!r} cannot run here: {reason}")
  net = model if isinstance(model, FoldedNet) else fold(model, variables)
  check_float(net)
  folded.check_channels(net, input_shape[2])
  # Strategies are fitted to every second image and timed on the others, if there are two or more.
  fitted = judged = calibration
  if strategy == AUTO and len(calibration) > 1:
    fitted, judged = calibration[::2], calibration[1::2]
  settings = settings_of(net, buckets, () if fitted is None else _gates_of(net, fitted))
  # `masked` is always among them: parts that no other strategy fits run by it.
  tried = {
    name: make
    for name, make in STRATEGIES.items()
    if name in (MASKED, strategy)
    or (strategy == AUTO and worth_trying(name) and (candidates is None or name in candidates))
  }
  options = [
    {name: made for name, make in tried.items() if (made := make(part, setting))}
    for part, setting in zip(net.parts, settings, strict=True)
  ]
  if strategy != AUTO:
    if not any(strategy in known for known in options):
      raise ValueError(
        f"strategy must fit a part of the network; {strategy!r} fits none, or needs calibration"
      )
    names = [strategy if strategy in known else MASKED for known in options]
    return CompiledConditional(net, input_shape, batch_size, names, settings)
  batches = spread_batches(judged, batch_size)
  macs = account(
    net, options, settings, input_shape, [_gates_of(net, x) for x in batches], batch_size
  )
  # Programs to compile: one for each choice of a part; two for each mixture of the whole network,
  # of which one has every unit open; and the ungated network.
  of_parts = sum(len(known) for known in options if len(known) > 1)
  of_nets = 2 * (1 + len({name for known in options for name in known})) + 1
  done = itertools.count(1)
  compiled = lambda: progress(next(done), of_parts + of_nets)
  timings = _time_parts(net, options, batches, macs, repeats, compiled)
  names, of_whole = _choose(
    net, options, timings, batches, macs, repeats, max_slowdown_all_open, compiled
  )
  # Only the comparison of whole programs says which strategy each part runs by.
  timings = [dataclasses.replace(t, chosen=t.strategy == names[t.part]) for t in timings]
  return CompiledConditional(net, input_shape, batch_size, names, settings, [*timings, *of_whole])


def program(
  made: Sequence[CompiledPart] | None = None,
) -> Callable[[FoldedNet, Array], tuple[Array, Gates]]:
  """Compiles the network with a runner for each part; every part is `masked` for None.

  Pooled outputs are NaN where a logit is: such gates are closed, and whether a closed unit is
  computed depends on the strategy.

  Returns:
    A function `(net, [N, H, W, D]) -> (outputs, tuple of [N, U] logits)`.
  """
  runners = None if made is None else [runner for _, runner in made]

  def run(net: FoldedNet, x: Array) -> tuple[Array, Gates]:
    """Returns the outputs and the gate logits `[N, U]` for x `[N, H, W, D]`."""
    y, logits = folded.run(net, x, runners)
    # A NaN logit closes its gate, which may hide that the input was not finite.
    if net.pooled and logits:
      lost = functools.reduce(
        jnp.logical_or, (jnp.any(jnp.isnan(z), axis=1, keepdims=True) for z in logits)
      )
      y = jnp.where(lost, jnp.nan, y)
    return y, logits

  return jax.jit(run)


def ungated(net: FoldedNet) -> FoldedNet:
  """Returns the network without its gate networks: every unit is open."""
  return dataclasses.replace(
    net,
    parts=tuple(
      dataclasses.replace(part, head=None, **({} if isinstance(part, Layer) else _NO_GATES))
      for part in net.parts
    ),
  )


def opened(net: FoldedNet) -> FoldedNet:
  """Returns the network with gate networks that open every unit that any image can open."""

  def always(head: folded.Head) -> folded.Head:
    """Returns a gate network whose logits are 1, or -1 for units that never open."""
    # Such a unit has no weights and a bias of at most 0: its logit is never above 0.
    shut = ~jnp.any(head.logits, axis=0) & (head.logits_bias <= 0)
    bias = jnp.where(shut, -1, jnp.ones_like(head.logits_bias))
    return dataclasses.replace(head, logits=jnp.zeros_like(head.logits), logits_bias=bias)

  return dataclasses.replace(
    net,
    parts=tuple(
      part if part.head is None else dataclasses.replace(part, head=always(part.head))
      for part in net.parts
    ),
  )


def _gates_of(net: FoldedNet, images: Any) -> tuple[np.ndarray, ...]:
  run = program()
  # In pieces, so that memory does not grow with the calibration set.
  found = [run(net, jnp.asarray(images[i : i + 256]))[1] for i in range(0, len(images), 256)]
  return tuple(
    np.concatenate([np.asarray(threshold_gate(z)) for z in logits])
    for logits in zip(*found, strict=True)
  )


def _made(net: FoldedNet, names: Sequence[str], settings: Sequence[Setting]) -> list[CompiledPart]:
  return [
    STRATEGIES[name](part, setting)
    for part, name, setting in zip(net.parts, names, settings, strict=True)
  ]


def _with_parts(net: FoldedNet, made: Sequence[CompiledPart]) -> FoldedNet:
  return dataclasses.replace(net, parts=tuple(part for part, _ in made))


def _pick(
  options: Sequence[Mapping[str, CompiledPart]], names: Sequence[str]
) -> list[CompiledPart]:
  return [known[name] for known, name in zip(options, names, strict=True)]


def _time_parts(
  net: FoldedNet,
  options: Sequence[Mapping[str, CompiledPart]],
  batches: Sequence[Array],
  macs: Account,
  repeats: int,
  compiled: Callable[[], None],
) -> list[Timing]:
  """Times every strategy of every part that has a choice, on the part's inputs for the batches."""
  seen = [_seen(net, x) for x in batches]
  timings = []
  for i, known in enumerate(options):
    # Nothing to choose: `masked` alone fits.
    if len(known) == 1:
      continue
    contenders = {
      name: functools.partial(
        run_over, jax.jit(runner), [(part, *of_batch[i]) for of_batch in seen]
      )
      for name, (part, runner) in known.items()
    }
    times = race(contenders, repeats, on_start=compiled)
    seconds = {name: statistics.median(spent) / len(batches) for name, spent in times.items()}
    timings += rows(i, seconds, *macs.of_part(i))
  return timings


@jax.jit
def _seen(net: FoldedNet, x: Array) -> list[tuple[Array, Gates, Gates]]:
  """Returns `(x, gates, gates of x)` of every part."""
  seen = []

  def spy(part, x, gates, before):
    """Computes a part by masking, and notes its input and gates."""
    seen.append((x, gates, before))
    return folded.masked(part, x, gates, before)

  folded.run(net, x, spy)
  return seen


def _choose(
  net: FoldedNet,
  options: Sequence[Mapping[str, CompiledPart]],
  timings: Sequence[Timing],
  batches: Sequence[Array],
  macs: Account,
  repeats: int,
  max_slowdown_all_open: float,
  compiled: Callable[[], None],
) -> tuple[list[str], list[Timing]]:
  """Returns each part's strategy in the fastest whole program, and whole programs' timings."""
  # The mixture of the parts' fastest strategies; a part changes only for a clear gain.
  of_parts = [MASKED] * len(net.parts)
  for i in range(len(net.parts)):
    of_part = [t for t in timings if t.part == i]
    if of_part and (best := min(of_part, key=lambda t: t.seconds)).time_ratio < GAIN:
      of_parts[i] = best.strategy
  # Compared with each strategy alone: parts in one program take other times than alone.
  mixtures = {MASKED: [MASKED] * len(net.parts)}
  for name in STRATEGIES:
    if any(name in known for known in options):
      mixtures[name] = [name if name in known else MASKED for known in options]
  if of_parts not in mixtures.values():
    mixtures[CHOSEN] = of_parts
  made = {name: _pick(options, names) for name, names in mixtures.items()}
  runs = {}
  for name, parts in made.items():
    # A strategy may hold its weights in another form, so each mixture has its own.
    run, own = program(parts), _with_parts(net, parts)
    # `max_slowdown_all_open` needs each program with every unit open, too.
    for wide, weights in ((False, own), (True, opened(own))):
      runs[name, wide] = functools.partial(run_over, run, [(weights, x) for x in batches])
  runs[UNGATED, False] = functools.partial(
    run_over, program(), [(ungated(net), x) for x in batches]
  )
  best, seconds, open_ratios = fastest(
    race(runs, repeats, on_start=compiled), len(batches), max_slowdown_all_open
  )
  return mixtures[best], rows(None, seconds, *macs.of_net(mixtures), best, open_ratios)
