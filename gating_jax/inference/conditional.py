"""A trained gated network as one compiled program that skips what its gates close, chosen by timing.

Axes: N images of H x W pixels and D channels, U gates of a group.
Reference: Verelst and Tuytelaars, 2020; Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.inference import folded
from gating_jax.inference.folded import Folded, Gates, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.kernel_strategies import STRATEGIES, why_not, worth_trying
from gating_jax.inference.strategies import Made, Setting, groups_of
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.timing import race
from gating_jax.types import Array

AUTO = "auto"
GAIN = 0.97  # of the time of the program it replaces: what a strategy must stay under to be taken
_SAMPLES = 4  # batches of calibration data that are timed


@dataclasses.dataclass(frozen=True)
class Timing:
  """Of a part, or of the whole network (`part` None), by one strategy.

  Attributes:
    strategy: its name; of the network also `chosen`, the mixture of the parts' fastest, and `ungated`; of one with
      early exits `masked`, `exit_dispatch` and `ungated`.
    mac_ratio: MACs that calibration data leave open, of all.
    seconds: of a call.
    time_ratio: `seconds` of those of `masked`.
    efficiency: `mac_ratio / time_ratio`; 1 where all MACs that were saved have saved time.
    chosen: whether it is what runs.
  """

  part: int | None
  strategy: str
  mac_ratio: float
  seconds: float
  time_ratio: float
  efficiency: float
  chosen: bool


class Conditional:
  """`[N, H, W, D]` images, any N, to `(outputs, tuple of [N, U] gate logits)`; made by `compile_conditional`.

  Attributes:
    strategies: of each part, by name.
    batch_size: images that the program takes.
    weights, program: what is called, `program(weights, images)`.
  """

  def __init__(self, net: Folded, names: Sequence[str], settings: Sequence[Setting], timings: Sequence[Timing] = ()):
    self.strategies, self._settings, self._timings = tuple(names), tuple(settings), tuple(timings)
    self.batch_size = settings[0].batch_size
    made = _made(net, names, settings)
    self.weights, self.program = _with_parts(net, made), program(made)

  def __call__(self, x: Array) -> tuple[Array, Gates]:
    return in_batches(functools.partial(self.program, self.weights), x, self.batch_size)

  def load(self, net: Folded) -> None:
    """Takes the weights of another network of the same shapes, without compiling again."""
    self.weights = _with_parts(net, _made(net, self.strategies, self._settings))

  def report(self) -> tuple[Timing, ...]:
    """What was measured when the program was made: of each part, then of the whole network; empty but for `auto`."""
    return self._timings


def compile_conditional(
    model: Any, variables: Mapping[str, Any] | None = None, *, input_shape: tuple[int, int, int], batch_size: int,
    strategy: str = AUTO, buckets: int = 4, calibration: Any = None, repeats: int = 20,
) -> Conditional:
  """A program of a gated network that skips what is closed, and equals computing everything.

  `auto` times every strategy of every part on this machine, takes the fastest, and then compares the whole program with
  that of each strategy alone: where skipping loses it computes everything.

  Args:
    model, variables: what `fold` takes; or a `Folded` network alone.
    input_shape: `(H, W, D)` of an image.
    batch_size: of the program; other numbers of images are cut and padded to it.
    strategy: `auto`, or one of `STRATEGIES`, for each part that it knows; others compute everything.
    buckets: programs at most for different numbers of what is open.
    calibration: `[M, H, W, D]`, M >= 1, images like those to come; `auto` needs them.
    repeats: calls of each program that are timed.
  Raises:
    ValueError: an unknown strategy, a network without the gates it takes, or values out of range.
  """
  one_of("strategy", strategy, (AUTO, *STRATEGIES))
  check_arguments(strategy, input_shape, batch_size, buckets, calibration, repeats)
  if reason := why_not(strategy):
    raise ValueError(f"strategy {strategy!r} cannot run here: {reason}")
  net = model if isinstance(model, Folded) else fold(model, variables)
  gates = () if calibration is None else _gates_of(net, calibration)
  settings = _settings(net, batch_size, buckets, gates)
  options = [{name: made for name, make in STRATEGIES.items() if (strategy == name or worth_trying(name))
              and (made := make(part, setting))} for part, setting in zip(net.parts, settings, strict=True)]
  if strategy != AUTO:
    if not any(strategy in known for known in options):
      raise ValueError(f"strategy must fit a part of the network; {strategy!r} fits none of it, or needs calibration")
    return Conditional(net, [strategy if strategy in known else "masked" for known in options], settings)
  ratios = _mac_ratios(net, input_shape, gates)
  batches = spread_batches(calibration, batch_size)
  timings = _time_parts(net, options, batches, ratios[:-1], repeats)
  names, of_whole = _choose(net, options, timings, batches, ratios[-1], repeats)
  timings = [dataclasses.replace(t, chosen=t.strategy == names[t.part]) for t in timings]
  return Conditional(net, names, settings, [*timings, *of_whole])


def check_arguments(strategy: str, input_shape: tuple[int, int, int], batch_size: int, buckets: int, calibration: Any,
                    repeats: int) -> None:
  """Raises ValueError naming the first that is out of range, or missing."""
  for name, value in (("batch_size", batch_size), ("buckets", buckets), ("repeats", repeats)):
    if value < 1:
      raise ValueError(f"{name} must be >= 1; got {value}")
  if calibration is None and strategy == AUTO:
    raise ValueError(f"calibration must be given for strategy {strategy!r}; got None")
  if calibration is not None and (np.shape(calibration)[1:] != tuple(input_shape) or not len(calibration)):
    raise ValueError(f"calibration must be [M, {', '.join(map(str, input_shape))}] with M >= 1; "
                     f"got shape {np.shape(calibration)}")


def program(made: Sequence[Made] | None = None) -> Callable[[Folded, Array], tuple[Array, Gates]]:
  """The network compiled, with what was made of each part; `masked` for None."""
  runners = None if made is None else [runner for _, runner in made]
  return jax.jit(lambda net, x: folded.run(net, x, runners))


def ungated(net: Folded) -> Folded:
  """The network with its gate networks left out: every unit open."""
  return dataclasses.replace(net, parts=tuple(
      dataclasses.replace(part, head=None, **({} if isinstance(part, Layer) else {"layer_gate": False}))
      for part in net.parts))


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
  return tuple(np.concatenate([np.asarray(threshold_gate(z)) for z in logits])
               for logits in zip(*found, strict=True))


def _settings(net: Folded, batch_size: int, buckets: int, gates: Sequence[np.ndarray]) -> list[Setting]:
  """Of each part."""
  settings, groups_before, gates = [], (), list(gates)
  for part in net.parts:
    own, gates = tuple(gates[: len(groups_of(part))]), gates[len(groups_of(part)):]
    settings.append(Setting(batch_size, buckets, own, groups_before))
    groups_before = groups_of(part) if isinstance(part, Layer) else ()
  return settings


def _made(net: Folded, names: Sequence[str], settings: Sequence[Setting]) -> list[Made]:
  return [STRATEGIES[name](part, setting) for part, name, setting in zip(net.parts, names, settings, strict=True)]


def _with_parts(net: Folded, made: Sequence[Made]) -> Folded:
  return dataclasses.replace(net, parts=tuple(part for part, _ in made))


def _pick(options: Sequence[Mapping[str, Made]], names: Sequence[str]) -> list[Made]:
  return [known[name] for known, name in zip(options, names, strict=True)]


def spread_batches(images: Any, batch_size: int) -> list[Array]:
  """A few batches that are spread over the images, which are repeated where they are too few."""
  count = min(_SAMPLES, -(-len(images) // batch_size))
  index = np.linspace(0, len(images), count * batch_size, endpoint=False).astype(int)
  return [jnp.asarray(images[part]) for part in index.reshape(batch_size, count).T]


def _mac_ratios(net: Folded, input_shape: tuple[int, int, int], gates: Sequence[np.ndarray]) -> list[float]:
  """MACs left open of all MACs: of each part and of the network, gate networks included in the former alone."""
  dense = ungated(net)
  of_parts = [float(np.mean(spent)) / whole for spent, whole in zip(
      folded.macs_by_part(net, input_shape, gates), folded.macs_by_part(dense, input_shape), strict=True)]
  return [*of_parts, float(np.mean(folded.macs(net, input_shape, gates))) / folded.macs(dense, input_shape)]


def rows(part: int | None, seconds: Mapping[str, float], mac_ratio: float, chosen: str = "") -> list[Timing]:
  """A `Timing` for each strategy, by name, `masked` among them."""
  return [Timing(part, name, mac_ratio, spent, spent / seconds["masked"], mac_ratio * seconds["masked"] / spent,
                 name == chosen) for name, spent in seconds.items()]


def _time_parts(net: Folded, options: Sequence[Mapping[str, Made]], batches: Sequence[Array],
                ratios: Sequence[float], repeats: int) -> list[Timing]:
  """Every strategy of every part that has a choice, on what the part sees of the batches."""
  seen = [_seen(net, x) for x in batches]
  timings = []
  for i, known in enumerate(options):
    if len(known) == 1:
      continue
    contenders = {name: functools.partial(run_over, jax.jit(runner), [(part, *inputs[i]) for inputs in seen])
                  for name, (part, runner) in known.items()}
    seconds = {name: statistics.median(spent) / len(batches) for name, spent in race(contenders, repeats).items()}
    timings += rows(i, seconds, ratios[i])
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


def run_over(run: Callable[..., Any], calls: Sequence[tuple]) -> None:
  """Calls, one after the other's end."""
  for args in calls:
    jax.block_until_ready(run(*args))


def _choose(net: Folded, options: Sequence[Mapping[str, Made]], timings: Sequence[Timing],
            batches: Sequence[Array], ratio: float, repeats: int) -> tuple[list[str], list[Timing]]:
  """Each part's strategy in the fastest whole program, and what whole programs took."""
  fastest = ["masked"] * len(net.parts)
  for i in range(len(net.parts)):
    of_part = [t for t in timings if t.part == i]
    if of_part and (best := min(of_part, key=lambda t: t.seconds)).time_ratio < GAIN:
      fastest[i] = best.strategy
  mixtures = {"masked": ["masked"] * len(net.parts)}
  for name in STRATEGIES:
    if any(name in known for known in options):
      mixtures[name] = [name if name in known else "masked" for known in options]
  if fastest not in mixtures.values():
    mixtures["chosen"] = fastest
  made = {name: _pick(options, names) for name, names in mixtures.items()}
  runs = {name: functools.partial(run_over, program(parts), [(_with_parts(net, parts), x) for x in batches])
          for name, parts in made.items()}
  runs["ungated"] = functools.partial(run_over, program(), [(ungated(net), x) for x in batches])
  seconds = {name: statistics.median(spent) / len(batches) for name, spent in race(runs, repeats).items()}
  best = min(mixtures, key=seconds.get)
  best = best if seconds[best] < GAIN * seconds["masked"] else "masked"
  return mixtures[best], rows(None, seconds, ratio, best)
