"""A trained gated network as one compiled program that skips closed units, chosen by timing.

Axes: N images of H x W pixels and D channels, U gates of a group.
Reference: Verelst and Tuytelaars, 2020; Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.inference import folded
from gating_jax.inference.analysing import gates_of
from gating_jax.inference.compiled import (
  AUTO,
  GAIN,
  MAX_SLOWDOWN_ALL_OPEN,
  Choice,
  CompiledImages,
  Options,
  TimedProgram,
  Timing,
  baseline_programs,
  check_options,
  count_pieces,
  list_timings,
  run_over,
  spread_batches,
  time_programs,
)
from gating_jax.inference.folded import FoldedNet, Gates, Head, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.quantising import check_float
from gating_jax.inference.strategies import (
  EXPORTABLE,
  STRATEGIES,
  Account,
  CompiledPart,
  PartContext,
  account,
  contexts_of,
  why_not,
  worth_trying,
)
from gating_jax.names import former_keyword
from gating_jax.timing import CHOSEN, MASKED, ReportProgress, race
from gating_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Candidates:
  """The strategies that fit each part of a network.

  Attributes:
    net: the network.
    contexts: the context of each part.
    parts: for each part, what each strategy that fits makes of it, by name; `masked` always fits.
  """

  net: FoldedNet
  contexts: Sequence[PartContext]
  parts: Sequence[Mapping[str, CompiledPart]]

  def alone(self, name: str) -> list[str]:
    """Returns the strategy of each part if one runs wherever it fits, and `masked` elsewhere."""
    return [name if name in fitting else MASKED for fitting in self.parts]

  def fitting(self) -> list[str]:
    """Returns the strategies that fit a part, in the order of `STRATEGIES`."""
    names = []
    for name in STRATEGIES:
      if any(name in fitting for fitting in self.parts):
        names.append(name)
    return names

  def take(self, names: Sequence[str]) -> list[CompiledPart]:
    """Returns each part as made by the named strategy."""
    return [fitting[name] for fitting, name in zip(self.parts, names, strict=True)]


class CompiledConditional(CompiledImages):
  """A compiled gated network, made by `compile_conditional`.

  It maps `[N, H, W, D]` images, any N, to `(outputs, tuple of [N, U] gate logits)`. A gated network
  that pools returns NaN outputs for an image that is not finite.

  Args:
    candidates: the network and what strategies make of its parts.
    names: strategy of each part.
    options, timings: as in `CompiledImages`.

  Attributes:
    strategies: the name of each part's strategy.

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((5, 6, 6, 1))
  >>> variables = model.init(jax.random.key(0), x)
  >>> program = compile_conditional(
  ...   model, variables, input_shape=(6, 6, 1), batch_size=2, strategy="masked"
  ... )
  >>> program.strategies, program.batch_size, program(x)[0].shape
  (('masked',), 2, (5, 3))
  """

  def __init__(
    self,
    candidates: Candidates,
    names: Sequence[str],
    *,
    options: Options,
    timings: Sequence[Timing] = (),
  ):
    self.strategies, self._contexts = tuple(names), candidates.contexts
    self.device_bound = tuple(sorted(set(names) - set(EXPORTABLE)))
    # Parts as the candidates made them: making them again would search for clusters again.
    made = candidates.take(names)
    super().__init__(
      candidates.net,
      _with_parts(candidates.net, made),
      options=options,
      program=make_program(made),
      timings=timings,
    )

  def _weights_of(self, net: FoldedNet) -> FoldedNet:
    """Returns the network with its parts made again, by the same strategies."""
    made = []
    for part, name, context in zip(net.parts, self.strategies, self._contexts, strict=True):
      made.append(STRATEGIES[name].make(part, context))
    return _with_parts(net, made)


@former_keyword("open_limit", "max_slowdown_all_open")
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
  progress: ReportProgress | None = None,
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
    max_slowdown_all_open: largest slowdown with every unit open: the time of the program that
      `auto` takes, over the time of computing everything, with gates or without. Where `masked`
      itself is slower, its slowdown is the limit; see `Timing.open_ratio`.
    progress: called with the pieces of work that `auto` has done, and all of them: a piece is a
      program compiled, or each program of the whole network timed once.
  Returns:
    A `CompiledConditional`.
  Raises:
    ValueError: an unknown strategy, a network without the gates it takes, or values out of range.

  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> variables = model.init(jax.random.key(0), x)
  >>> program = compile_conditional(
  ...   model, variables, input_shape=(6, 6, 1), batch_size=2, strategy="masked"
  ... )
  >>> outputs, gate_logits = program(x)
  >>> outputs.shape, gate_logits[0].shape
  ((2, 3), (2, 4))
  """
  one_of("strategy", strategy, (AUTO, *STRATEGIES))
  for name in candidates or ():
    one_of("candidates", name, STRATEGIES)
  options = check_options(
    strategy=strategy,
    input_shape=input_shape,
    batch_size=batch_size,
    buckets=buckets,
    calibration=calibration,
    repeats=repeats,
    max_slowdown_all_open=max_slowdown_all_open,
  )
  if reason := why_not(strategy):
    raise ValueError(f"strategy {strategy!r} cannot run here: {reason}")
  images = jax.ShapeDtypeStruct((1, *options.input_shape), jnp.float32)
  net = model if isinstance(model, FoldedNet) else fold(model, variables, images)
  check_float(net)
  net.check_channels(options.input_shape[2])
  # Strategies are fitted to every second image and timed on the others, if there are two or more.
  fitted = timed = options.calibration
  if strategy == AUTO and fitted is not None and len(fitted) > 1:
    fitted, timed = fitted[::2], fitted[1::2]
  gates = () if fitted is None else gates_of(net, fitted)
  tried = _names_to_try(strategy, candidates)
  found = _find_candidates(net, contexts_of(net, buckets, gates), tried)
  if strategy == AUTO:
    batches = spread_batches(timed, batch_size)
    names, timings = _choose_by_timing(found, batches, options=options, progress=progress)
    return CompiledConditional(found, names, options=options, timings=timings)
  names = found.alone(strategy)
  if strategy not in names:
    raise ValueError(
      f"strategy must fit a part of the network; {strategy!r} fits none, or needs calibration"
    )
  return CompiledConditional(found, names, options=options)


def _names_to_try(strategy: str, candidates: Collection[str] | None) -> list[str]:
  """Returns the strategies to try for each part, in the order of `STRATEGIES`."""
  tried = []
  for name in STRATEGIES:
    by_timing = strategy == AUTO and worth_trying(name)
    is_candidate = candidates is None or name in candidates
    # `masked` is always among them: parts that no other strategy fits run by it.
    if name in (MASKED, strategy) or (by_timing and is_candidate):
      tried.append(name)
  return tried


def _find_candidates(
  net: FoldedNet, contexts: Sequence[PartContext], tried: Sequence[str]
) -> Candidates:
  """Makes each part by each of the strategies that fit it."""
  parts = []
  for part, context in zip(net.parts, contexts, strict=True):
    fitting = {}
    for name in tried:
      made = STRATEGIES[name].make(part, context)
      if made is not None:
        fitting[name] = made
    parts.append(fitting)
  return Candidates(net, contexts, parts)


def make_program(
  made: Sequence[CompiledPart] | None = None,
) -> Callable[[FoldedNet, Array], tuple[Array, Gates]]:
  """Compiles the network with a runner for each part; every part is `masked` for None.

  Pooled outputs are NaN where a logit is: such gates are closed, and whether a closed unit is
  computed depends on the strategy.

  Returns:
    A function `(net, [N, H, W, D]) -> (outputs, tuple of [N, U] logits)`.
  """
  runners = None if made is None else [each.run for each in made]

  def run(net: FoldedNet, x: Array) -> tuple[Array, Gates]:
    """Returns the outputs and the gate logits `[N, U]` for x `[N, H, W, D]`."""
    y, logits = folded.run_net(net, x, runners)
    # A NaN logit closes its gate, which may hide that the input was not finite.
    if net.pooled and logits:
      lost = [jnp.any(jnp.isnan(z), axis=1, keepdims=True) for z in logits]
      y = jnp.where(functools.reduce(jnp.logical_or, lost), jnp.nan, y)
    return y, logits

  return jax.jit(run)


def ungated(net: FoldedNet) -> FoldedNet:
  """Returns the network without its gate networks: every unit is open, and counts once."""
  parts = []
  for part in net.parts:
    # Only blocks have gates of their branch or their output.
    gates = {} if isinstance(part, Layer) else {"layer_gate": False, "output_gate": False}
    parts.append(dataclasses.replace(part, head=None, **gates))
  return dataclasses.replace(net, parts=tuple(parts), glance=None)


def opened(net: FoldedNet) -> FoldedNet:
  """Returns the network with gate networks that open every unit that any image can open."""
  parts = []
  for part in net.parts:
    if part.head is not None:
      part = dataclasses.replace(part, head=_opened_head(part.head))
    parts.append(part)
  return dataclasses.replace(net, parts=tuple(parts))


def _opened_head(head: Head) -> Head:
  """Returns a gate network whose logits are 1, or -1 for units that never open."""
  # Such a unit has no weights and a bias of at most 0: its logit is never above 0.
  shut = ~jnp.any(head.logits, axis=0) & (head.logits_bias <= 0)
  bias = jnp.where(shut, -1, jnp.ones_like(head.logits_bias))
  return dataclasses.replace(head, logits=jnp.zeros_like(head.logits), logits_bias=bias)


def _with_parts(net: FoldedNet, made: Sequence[CompiledPart]) -> FoldedNet:
  """Returns the network with its parts as strategies have made them."""
  return dataclasses.replace(net, parts=tuple(each.part for each in made))


@dataclasses.dataclass(frozen=True)
class _Trial:
  """Timings of the candidates on batches of images.

  Attributes:
    candidates: what is timed.
    batches: `[N, H, W, D]` each.
    macs: multiply-accumulates on these batches.
    options: of the compilation.
    advance: to call after each piece of work.
  """

  candidates: Candidates
  batches: Sequence[Array]
  macs: Account
  options: Options
  advance: Callable[[], None]

  def time_parts(self) -> dict[int, list[Timing]]:
    """Times every strategy of every part that has a choice, on the part's own inputs.

    Returns:
      The timings, by index of the part.
    """
    # The gates and inputs that the whole network gives each part: times depend on what is open.
    seen = [part_inputs(self.candidates.net, x) for x in self.batches]
    timings = {}
    for i, fitting in enumerate(self.candidates.parts):
      # Nothing to choose: `masked` alone fits.
      if len(fitting) == 1:
        continue
      contenders = {}
      for name, (part, runner) in fitting.items():
        calls = [(part, *inputs[i]) for inputs in seen]
        contenders[name] = functools.partial(run_over, jax.jit(runner), calls)
      times = race(contenders, self.options.repeats, on_start=self.advance)
      seconds = {}
      for name, run_times in times.items():
        seconds[name] = statistics.median(run_times) / len(self.batches)
      timings[i] = list_timings(seconds, self.macs.part_ratios(i), part=i)
    return timings

  def time_nets(self, mixtures: Mapping[str, Sequence[str]]) -> Choice:
    """Times whole programs, and chooses one.

    Args:
      mixtures: strategies of the parts, by name of the program.
    """
    net, programs = self.candidates.net, {}
    for name, names in mixtures.items():
      # A strategy may hold its weights in another form, so each mixture has its own.
      made = self.candidates.take(names)
      weights = _with_parts(net, made)
      programs[name] = TimedProgram(make_program(made), weights, open_weights=opened(weights))
    programs |= baseline_programs(make_program(), ungated(net), self.batches)
    return time_programs(
      programs,
      self.batches,
      repeats=self.options.repeats,
      max_slowdown_all_open=self.options.max_slowdown_all_open,
      advance=self.advance,
    )


def _choose_by_timing(
  candidates: Candidates,
  batches: Sequence[Array],
  *,
  options: Options,
  progress: ReportProgress | None,
) -> tuple[list[str], list[Timing]]:
  """Returns each part's strategy in the fastest whole program, and all timings."""
  macs = account(
    candidates.net,
    options.input_shape,
    [gates_of(candidates.net, x) for x in batches],
    strategies=candidates.parts,
    contexts=candidates.contexts,
    size=options.batch_size,
  )
  # Programs to compile: one for each choice of a part.
  of_parts = 0
  for fitting in candidates.parts:
    of_parts += len(fitting) if len(fitting) > 1 else 0
  # Two for each mixture of the whole network, of which one has every unit open; and the ungated
  # network, on a batch and on single images. Then whole networks are timed in turns.
  of_nets = 2 * (1 + len(candidates.fitting())) + (2 if options.batch_size > 1 else 1)
  advance = count_pieces(progress, of_parts + of_nets + options.repeats)
  trial = _Trial(candidates, batches, macs=macs, options=options, advance=advance)
  # Parts first: their fastest strategies make up one of the whole programs.
  part_timings = trial.time_parts()
  mixtures = _mixtures(candidates, part_timings)
  choice = trial.time_nets(mixtures)
  names, timings = mixtures[choice.strategy], []
  for i, of_part in part_timings.items():
    for timing in of_part:
      # Only the comparison of whole programs says which strategy each part runs by.
      timings.append(dataclasses.replace(timing, chosen=timing.strategy == names[i]))
  return names, timings + choice.timings(macs.net_ratios(mixtures))


def _mixtures(
  candidates: Candidates, timings: Mapping[int, Sequence[Timing]]
) -> dict[str, list[str]]:
  """Returns the strategies of the parts in each whole program to time, by its name.

  There is each strategy wherever it fits, since parts in one program take other times than alone;
  and the mixture of the parts' fastest.

  Args:
    candidates: the strategies that fit each part.
    timings: of parts, by their index.
  """
  mixtures = {}
  for name in candidates.fitting():
    mixtures[name] = candidates.alone(name)
  fastest = candidates.alone(MASKED)
  for i, of_part in timings.items():
    best = min(of_part, key=lambda timing: timing.seconds)
    # A part changes only for a clear gain.
    if best.time_ratio < GAIN:
      fastest[i] = best.strategy
  # It may be one of the others; the same program is not timed twice.
  if fastest not in mixtures.values():
    mixtures[CHOSEN] = fastest
  return mixtures


class PartInputs(NamedTuple):
  """Arguments of a part's runner: its input, its gates and those of its input's channels."""

  x: Array
  gates: Gates
  before: Gates


@jax.jit
def part_inputs(net: FoldedNet, x: Array) -> list[PartInputs]:
  """Computes the inputs of every part for images `[N, H, W, D]`."""
  seen = []

  def spy(part, x, gates, before):
    """Computes a part by masking, and notes its inputs."""
    seen.append(PartInputs(x, gates, before))
    return folded.masked(part, x, gates, before=before)

  folded.run_net(net, x, spy)
  return seen
