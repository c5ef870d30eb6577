"""A trained gated network as one compiled program that skips what its gates close, chosen by timing.

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
from gating_jax.inference import folded, inputs
from gating_jax.inference.computed import Account, account
from gating_jax.inference.folded import Folded, Gates, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.kernel_strategies import STRATEGIES, why_not, worth_trying
from gating_jax.inference.quantise import check_float
from gating_jax.inference.strategies import Made, Setting, settings_of
from gating_jax.inference.timings import (
  GAIN,
  OPEN_LIMIT,
  Timing,
  fastest,
  rows,
  run_over,
  spread_batches,
)
from gating_jax.ops import arguments
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.timing import CHOSEN, MASKED, UNGATED, race
from gating_jax.types import Array

AUTO = "auto"
_NO_GATES = {"layer_gate": False, "output_gate": False}  # of a block


class Conditional:
  """`[N, H, W, D]` images, any N, to `(outputs, tuple of [N, U] gate logits)`; made by `compile_conditional`.

  Attributes:
    strategies: of each part, by name.
    input_shape: `(H, W, D)` of an image.
    batch_size: images that the program takes.
    weights, program: what is called, `program(weights, images)`.
  """

  def __init__(
    self,
    net: Folded,
    input_shape: tuple[int, int, int],
    batch_size: int,
    names: Sequence[str],
    settings: Sequence[Setting],
    timings: Sequence[Timing] = (),
  ):
    self.strategies, self._settings, self._timings = tuple(names), tuple(settings), tuple(timings)
    self.input_shape, self.batch_size, self._shapes = input_shape, batch_size, folded.shapes_of(net)
    made = _made(net, names, settings)
    self.weights, self.program = _with_parts(net, made), program(made)

  def __call__(self, x: Array) -> tuple[Array, Gates]:
    """Of a gated network that pools, an image that is not finite has NaN for outputs.

    Raises:
      ValueError: images of another shape, or in integers.
    """
    x = inputs.images("images", x, self.input_shape)
    return in_batches(functools.partial(self.program, self.weights), x, self.batch_size)

  def load(self, net: Folded) -> None:
    """Takes the weights of another network, without compiling or timing again: what skipping saves may be another then.

    Raises:
      ValueError: a network of other shapes or groups of gates.
    """
    folded.check_alike(net, self._shapes)
    self.weights = _with_parts(net, _made(net, self.strategies, self._settings))

  def report(self) -> tuple[Timing, ...]:
    """What was measured when the program was made: of each part, then of the whole network; empty but for `auto`."""
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
  open_limit: float = OPEN_LIMIT,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conditional:
  """A program of a gated network that skips what is closed, and equals computing everything.

  `auto` times every strategy of every part on this machine, takes the fastest, and then compares the whole program with
  that of each strategy alone: where skipping loses, or costs too much with everything open, it computes everything.

  Args:
    model, variables: what `fold` takes; or a `Folded` network alone.
    input_shape: `(H, W, D)` of an image.
    batch_size: of the program; other numbers of images are cut and padded to it.
    strategy: `auto`, or one of `STRATEGIES`, for each part that it knows; others compute everything.
    buckets: programs at most for different numbers of what is open.
    calibration: `[M, H, W, D]`, M >= 1, images like those to come. `auto` needs them: what is fitted to images is to
      every second, and what is timed is four batches, or as many as hold 16 images, of the others.
    repeats: calls of each program that are timed.
    candidates: strategies that `auto` may take beside `masked`, such as `EXPORTABLE`; None for all that run here.
    open_limit: how many times as long as computing everything, gates or none, a call of what `auto` takes may be with
      every unit open, unless `masked` itself is longer; see `Timing.open_ratio`.
    progress: called with how many programs `auto` has compiled, and how many it compiles.
  Raises:
    ValueError: an unknown strategy, a network without the gates it takes, or values out of range.
  """
  one_of("strategy", strategy, (AUTO, *STRATEGIES))
  for name in candidates or ():
    one_of("candidates", name, STRATEGIES)
  input_shape = inputs.image_shape(input_shape)
  calibration = check_arguments(
    strategy, input_shape, batch_size, buckets, calibration, repeats, open_limit
  )
  if reason := why_not(strategy):
    raise ValueError(f"strategy {strategy!r} cannot run here: {reason}")
  net = model if isinstance(model, Folded) else fold(model, variables)
  check_float(net)
  folded.check_channels(net, input_shape[2])
  # What is fitted to some images is judged on others, where there are more than one.
  fitted = judged = calibration
  if strategy == AUTO and len(calibration) > 1:
    fitted, judged = calibration[::2], calibration[1::2]
  settings = settings_of(net, buckets, () if fitted is None else _gates_of(net, fitted))
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
        f"strategy must fit a part of the network; {strategy!r} fits none of it, or needs calibration"
      )
    names = [strategy if strategy in known else MASKED for known in options]
    return Conditional(net, input_shape, batch_size, names, settings)
  batches = spread_batches(judged, batch_size)
  macs = account(
    net, options, settings, input_shape, [_gates_of(net, x) for x in batches], batch_size
  )
  # A program for each choice of a part; for each of the whole network two, one with all open; and the ungated network.
  of_parts = sum(len(known) for known in options if len(known) > 1)
  of_nets = 2 * (1 + len({name for known in options for name in known})) + 1
  done = itertools.count(1)
  compiled = lambda: progress(next(done), of_parts + of_nets)
  timings = _time_parts(net, options, batches, macs, repeats, compiled)
  names, of_whole = _choose(net, options, timings, batches, macs, repeats, open_limit, compiled)
  timings = [dataclasses.replace(t, chosen=t.strategy == names[t.part]) for t in timings]
  return Conditional(net, input_shape, batch_size, names, settings, [*timings, *of_whole])


def check_arguments(
  strategy: str,
  input_shape: tuple[int, int, int],
  batch_size: int,
  buckets: int,
  calibration: Any,
  repeats: int,
  open_limit: float,
) -> np.ndarray | None:
  """The calibration images. Raises TypeError or ValueError naming the first argument that is wrong, or missing."""
  for name, value in (("batch_size", batch_size), ("buckets", buckets), ("repeats", repeats)):
    arguments.whole_number(name, value)
  arguments.number("open_limit", open_limit, "> 0", lambda v: v > 0)
  if calibration is None:
    if strategy == AUTO:
      raise ValueError(f"calibration must be given for strategy {strategy!r}; got None")
    return None
  calibration = inputs.finite("calibration", inputs.images("calibration", calibration, input_shape))
  if not len(calibration):
    raise ValueError("calibration must hold at least one image; got none")
  return calibration


def program(made: Sequence[Made] | None = None) -> Callable[[Folded, Array], tuple[Array, Gates]]:
  """The network compiled, with what was made of each part; `masked` for None.

  Pooled outputs are NaN where a logit is: gates are closed there, and what is closed may or may not be computed.
  """
  runners = None if made is None else [runner for _, runner in made]

  def run(net: Folded, x: Array) -> tuple[Array, Gates]:
    y, logits = folded.run(net, x, runners)
    if net.pooled and logits:
      lost = functools.reduce(
        jnp.logical_or, (jnp.any(jnp.isnan(z), axis=1, keepdims=True) for z in logits)
      )
      y = jnp.where(lost, jnp.nan, y)
    return y, logits

  return jax.jit(run)


def ungated(net: Folded) -> Folded:
  """The network with its gate networks left out: every unit open."""
  return dataclasses.replace(
    net,
    parts=tuple(
      dataclasses.replace(part, head=None, **({} if isinstance(part, Layer) else _NO_GATES))
      for part in net.parts
    ),
  )


def opened(net: Folded) -> Folded:
  """The network with gate networks that open every unit for every image, but for those that no image can open."""

  def always(head: folded.Head) -> folded.Head:
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


def in_batches(run: Callable[[Array], Any], x: Array, size: int) -> Any:
  """What `run`, which takes `size` examples, makes of any number of them."""
  if len(x) == size:
    return run(x)
  parts = [run(_padded(x[i : i + size], size)) for i in range(0, max(1, len(x)), size)]
  return jax.tree.map(lambda *pieces: jnp.concatenate(pieces)[: len(x)], *parts)


def _padded(x: Array, count: int) -> Array:
  missing = count - len(x)
  return jnp.pad(jnp.asarray(x), [(0, missing), *[(0, 0)] * 3]) if missing else x


def _gates_of(net: Folded, images: Any) -> tuple[np.ndarray, ...]:
  run = program()
  found = [run(net, jnp.asarray(images[i : i + 256]))[1] for i in range(0, len(images), 256)]
  return tuple(
    np.concatenate([np.asarray(threshold_gate(z)) for z in logits])
    for logits in zip(*found, strict=True)
  )


def _made(net: Folded, names: Sequence[str], settings: Sequence[Setting]) -> list[Made]:
  return [
    STRATEGIES[name](part, setting)
    for part, name, setting in zip(net.parts, names, settings, strict=True)
  ]


def _with_parts(net: Folded, made: Sequence[Made]) -> Folded:
  return dataclasses.replace(net, parts=tuple(part for part, _ in made))


def _pick(options: Sequence[Mapping[str, Made]], names: Sequence[str]) -> list[Made]:
  return [known[name] for known, name in zip(options, names, strict=True)]


def _time_parts(
  net: Folded,
  options: Sequence[Mapping[str, Made]],
  batches: Sequence[Array],
  macs: Account,
  repeats: int,
  compiled: Callable[[], None],
) -> list[Timing]:
  """Every strategy of every part that has a choice, on what the part sees of the batches."""
  seen = [_seen(net, x) for x in batches]
  timings = []
  for i, known in enumerate(options):
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
def _seen(net: Folded, x: Array) -> list[tuple[Array, Gates, Gates]]:
  """`(x, gates, gates of x)` of every part."""
  seen = []

  def spy(part, x, gates, before):
    seen.append((x, gates, before))
    return folded.masked(part, x, gates, before)

  folded.run(net, x, spy)
  return seen


def _choose(
  net: Folded,
  options: Sequence[Mapping[str, Made]],
  timings: Sequence[Timing],
  batches: Sequence[Array],
  macs: Account,
  repeats: int,
  open_limit: float,
  compiled: Callable[[], None],
) -> tuple[list[str], list[Timing]]:
  """Each part's strategy in the fastest whole program, and what whole programs took."""
  of_parts = [MASKED] * len(net.parts)
  for i in range(len(net.parts)):
    of_part = [t for t in timings if t.part == i]
    if of_part and (best := min(of_part, key=lambda t: t.seconds)).time_ratio < GAIN:
      of_parts[i] = best.strategy
  mixtures = {MASKED: [MASKED] * len(net.parts)}
  for name in STRATEGIES:
    if any(name in known for known in options):
      mixtures[name] = [name if name in known else MASKED for known in options]
  if of_parts not in mixtures.values():
    mixtures[CHOSEN] = of_parts
  made = {name: _pick(options, names) for name, names in mixtures.items()}
  runs = {}
  for name, parts in made.items():
    run, own = program(parts), _with_parts(net, parts)
    for wide, weights in ((False, own), (True, opened(own))):
      runs[name, wide] = functools.partial(run_over, run, [(weights, x) for x in batches])
  runs[UNGATED, False] = functools.partial(
    run_over, program(), [(ungated(net), x) for x in batches]
  )
  best, seconds, open_ratios = fastest(
    race(runs, repeats, on_start=compiled), len(batches), open_limit
  )
  return mixtures[best], rows(None, seconds, *macs.of_net(mixtures), best, open_ratios)
