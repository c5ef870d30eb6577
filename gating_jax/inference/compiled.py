"""Interface of all compiled networks, and what their compilers share.

A compiler checks its arguments, times each way to run the network on batches of calibration images,
and chooses the fastest. The result maps inputs to outputs, takes the weights of another network of
the same shapes, and reports the timings.

Axes: N images of H x W pixels and D channels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.inference import folded
from gating_jax.inference.costs import MacRatios
from gating_jax.ops import arguments
from gating_jax.timing import MASKED, ONE_BY_ONE, UNGATED, ReportProgress, race
from gating_jax.types import Array

# The strategy that is chosen by timing.
AUTO = "auto"
# A strategy must take less than this fraction of the time of the program it replaces.
GAIN = 0.97
# Largest time with every unit open, relative to computing everything.
MAX_SLOWDOWN_ALL_OPEN = 1.05
# Calibration data for timing: 4 batches, or more of small batches until they hold 16 images.
_BATCHES, _IMAGES = 4, 16


class Compiled:
  """A compiled network: a function of its inputs that keeps its weights as arguments.

  Args:
    net: the network, or its variables.
    weights: the same in the form that the programs take.
    timings: rows of `report`.

  Attributes:
    weights: first argument of the programs.
  """

  def __init__(self, net: Any, weights: Any, timings: Sequence[Timing] = ()):
    # The shapes stay, so that `load` can compare another network with the compiled one.
    self._shapes, self._timings = folded.shapes_of(net), tuple(timings)
    self.weights = weights

  def __call__(self, inputs: Any) -> Any:
    """Runs the programs; subclasses say on what."""
    raise NotImplementedError

  def load(self, net: Any) -> None:
    """Takes the weights of another network, without compiling or timing again.

    What is skipped may then save another amount than was measured.

    Raises:
      ValueError: a network of other shapes, groups of gates or settings.
    """
    folded.check_alike(net, self._shapes)
    self.weights = self._weights_of(net)

  def report(self) -> tuple[Timing, ...]:
    """Returns the timings of each part, if any, then of the whole network.

    They are empty unless the strategy was `auto`.
    """
    return self._timings

  def _weights_of(self, net: Any) -> Any:
    """Returns a network's weights in the form that the programs take."""
    return net


class CompiledImages(Compiled):
  """A compiled network of images: one program, for a fixed number of them.

  Args:
    net, weights, timings: as in `Compiled`.
    options: of the compilation.
    program: `(weights, [batch_size, H, W, D]) -> outputs`, a tree of arrays `[batch_size, ...]`.

  Attributes:
    input_shape: `(H, W, D)` of an image.
    batch_size: number of images that the program takes.
    weights, program: the call is `program(weights, images)`.
    device_bound: strategies in it that run on one kind of device only.
  """

  # Programs of plain JAX run anywhere.
  device_bound: tuple[str, ...] = ()

  def __init__(
    self,
    net: Any,
    weights: Any,
    *,
    options: Options,
    program: Callable[[Any, Array], Any],
    timings: Sequence[Timing] = (),
  ):
    super().__init__(net, weights, timings)
    self.input_shape, self.batch_size = options.input_shape, options.batch_size
    self.program = program

  def __call__(self, x: Array) -> Any:
    """Runs the program on any number of images.

    Raises:
      ValueError: images of another shape, or in integers.
    """
    x = check_images("images", x, self.input_shape)
    return in_batches(lambda batch: self.program(self.weights, batch), x, self.batch_size)


class Options(NamedTuple):
  """Checked arguments of a compilation for images; see `conditional.compile_conditional`."""

  strategy: str
  input_shape: tuple[int, int, int]
  batch_size: int
  buckets: int
  calibration: np.ndarray | None
  repeats: int
  max_slowdown_all_open: float


def check_options(
  *,
  strategy: str,
  input_shape: Any,
  batch_size: int,
  buckets: int,
  calibration: Any,
  repeats: int,
  max_slowdown_all_open: float,
) -> Options:
  """Checks the arguments of a compilation, except its strategy.

  Raises:
    TypeError, ValueError: naming the first argument that is wrong, or missing.
  """
  input_shape = check_image_shape(input_shape)
  arguments.whole_number("batch_size", batch_size)
  arguments.whole_number("buckets", buckets)
  arguments.whole_number("repeats", repeats)
  arguments.number("max_slowdown_all_open", max_slowdown_all_open, "> 0", holds=lambda v: v > 0)
  if calibration is not None:
    calibration = check_images("calibration", calibration, input_shape)
    calibration = check_finite("calibration", calibration)
    if not len(calibration):
      raise ValueError("calibration must hold at least one image; got none")
  elif strategy == AUTO:
    raise ValueError(f"calibration must be given for strategy {strategy!r}; got None")
  return Options(
    strategy=strategy,
    input_shape=input_shape,
    batch_size=batch_size,
    buckets=buckets,
    calibration=calibration,
    repeats=repeats,
    max_slowdown_all_open=max_slowdown_all_open,
  )


def check_images(name: str, x: Any, shape: Sequence[int] | None = None) -> Array:
  """Checks `[N, H, W, D]` network inputs of any floating-point type, and returns them in float32.

  Args:
    name: of the argument.
    x: the array.
    shape: `(H, W, D)`; None for any.
  Raises:
    ValueError: another rank, shape or type, such as pixels in uint8 that are not normalised.
  """
  # jax arrays stay on their device.
  x = x if hasattr(x, "dtype") else np.asarray(x)
  if x.ndim != 4 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
    wanted = "N, H, W, D" if shape is None else ", ".join(map(str, ("N", *shape)))
    raise ValueError(f"{name} must be [{wanted}]; got shape {tuple(x.shape)}")
  # uint8 pixels would be cast without an error, and give wrong outputs.
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be network inputs in floating point, normalised as in training; got {x.dtype}"
    )
  return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def check_finite(name: str, x: Any) -> np.ndarray:
  """Returns the images in host memory.

  Raises:
    ValueError: an image has NaN or infinity.
  """
  x = np.asarray(x)
  good = np.isfinite(x).all(axis=(1, 2, 3))
  if not good.all():
    raise ValueError(f"{name} must be finite; index {int(np.argmin(good))} of {len(x)} is not")
  return x


def check_image_shape(shape: Any) -> tuple[int, int, int]:
  """Returns `(H, W, D)` as a tuple.

  Raises:
    ValueError: it is not three whole numbers >= 1.
  """
  try:
    # `index` takes numpy's whole numbers as well, and no floats.
    sizes = tuple(operator.index(size) for size in shape)
  except TypeError:
    sizes = ()
  if len(sizes) != 3 or min(sizes) < 1:
    raise ValueError(f"input_shape must be (H, W, D), whole numbers >= 1; got {shape!r}")
  return sizes


def in_batches(run: Callable[[Array], Any], x: Array, size: int) -> Any:
  """Applies `run`, which takes `size` examples, to any number of them."""
  if len(x) == size:
    return run(x)
  parts = []
  # At least one call, so that no images give empty outputs of the right shapes.
  for start in range(0, max(1, len(x)), size):
    piece = x[start : start + size]
    missing = size - len(piece)
    # Zeros are computed with the rest, and cut off below.
    if missing:
      piece = jnp.pad(jnp.asarray(piece), [(0, missing), *[(0, 0)] * (piece.ndim - 1)])
    parts.append(run(piece))
  return jax.tree.map(lambda *pieces: jnp.concatenate(pieces)[: len(x)], *parts)


def spread_indices(count: int, most: int) -> np.ndarray:
  """Returns the indices of at most `most` of `count` images, evenly over all."""
  return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def spread_batches(images: Any, batch_size: int) -> list[Array]:
  """Returns a few batches spread over the images, which are repeated if they are too few."""
  wanted = max(_BATCHES, -(-_IMAGES // batch_size))
  count = min(wanted, -(-len(images) // batch_size))
  index = np.linspace(0, len(images), count * batch_size, endpoint=False).astype(int)
  # Each batch has images from all over the set.
  return [jnp.asarray(images[of_batch]) for of_batch in index.reshape(batch_size, count).T]


def run_over(run: Callable[..., Any], calls: Sequence[tuple]) -> None:
  """Runs calls one after the other, each to its end."""
  for args in calls:
    # Calls return before their results are there; without waiting they would overlap.
    jax.block_until_ready(run(*args))


def count_pieces(progress: ReportProgress | None, total: int) -> Callable[[], None]:
  """Returns a function that reports one more piece of `total` to `progress` at each call."""
  done = itertools.count(1)

  def advance() -> None:
    """Tells of one more piece."""
    if progress is not None:
      progress(next(done), total)

  return advance


@dataclasses.dataclass(frozen=True)
class Timing:
  """The measured time of a part, or of the whole network (`part` None), by one strategy.

  Attributes:
    part: index of the part.
    strategy: its name. For the network also `chosen`, the mixture of the parts' fastest, and
      `ungated`; for one with early exits `masked`, `exit_dispatch` and `ungated`; for one that
      chooses segments `segments` in place of the second.
    mac_ratio: MACs that the timed examples leave open, relative to all; for the network with its
      gate networks; 1 for `ungated`.
    computed_ratio: MACs that the strategy computes for them, in the same way, padding included.
    seconds: of a call.
    time_ratio: `seconds` relative to those of the quickest way to compute everything: `masked`,
      `ungated` or, where it is quicker, any strategy with every unit open; for a part, relative to
      `masked`.
    efficiency: `mac_ratio / time_ratio`; 1 if all MACs that were saved have saved time.
    chosen: whether this strategy runs.
    open_ratio: for the network: seconds of a call with every unit open, or no image leaving at an
      exit, relative to the faster of `masked` in that case and `ungated`; None for a part.
  """

  part: int | None
  strategy: str
  mac_ratio: float
  computed_ratio: float
  seconds: float
  time_ratio: float
  efficiency: float
  chosen: bool
  open_ratio: float | None = None


class Way(NamedTuple):
  """A way to run a whole network that is timed.

  Attributes:
    strategy: its name; `ungated` is the baseline.
    all_open: whether every unit is open, or no image leaves at an exit: the worst case.
  """

  strategy: str
  all_open: bool


class TimedProgram(NamedTuple):
  """A program of a whole network, and the weights to time it with.

  Attributes:
    run: `(weights, inputs) -> outputs`, of a batch.
    weights: those of the network.
    open_weights: those with which every unit is open; None for a baseline, which has no gates.
    open_run: the program for `open_weights`, where it is not `run`.
  """

  run: Callable[[Any, Any], Any]
  weights: Any
  open_weights: Any = None
  open_run: Callable[[Any, Any], Any] | None = None


def runs_over(
  programs: Mapping[str, TimedProgram], batches: Sequence[Any]
) -> dict[Way, Callable[[], None]]:
  """Returns a function that runs over all batches, for each way to run the network."""
  runs = {}
  for name, program in programs.items():
    # One program serves for both cases where it can: its weights are arguments.
    calls = [(program.weights, x) for x in batches]
    runs[Way(name, all_open=False)] = functools.partial(run_over, program.run, calls)
    if program.open_weights is not None:
      calls = [(program.open_weights, x) for x in batches]
      run = program.open_run or program.run
      runs[Way(name, all_open=True)] = functools.partial(run_over, run, calls)
  return runs


def list_timings(
  seconds: Mapping[str, float],
  ratios: MacRatios,
  *,
  part: int | None = None,
  chosen: str = "",
  open_ratios: Mapping[str, float] = MappingProxyType({}),
  everything: float | None = None,
) -> list[Timing]:
  """Returns a `Timing` for each strategy, by name, `masked` among them.

  Args:
    seconds: of a call, by strategy.
    ratios: of multiply-accumulates.
    part: index of the part; None for the whole network.
    chosen: name of the strategy that runs.
    open_ratios: `Timing.open_ratio`, by strategy.
    everything: seconds of the quickest way to compute everything; None for those of `masked`.
  """
  timings, baseline = [], seconds[MASKED] if everything is None else everything
  for name, seconds_per_call in seconds.items():
    # `ungated` closes nothing, so all of its MACs are open.
    opened = 1.0 if name == UNGATED else ratios.opened
    time_ratio = seconds_per_call / baseline
    timings.append(
      Timing(
        part=part,
        strategy=name,
        mac_ratio=opened,
        computed_ratio=ratios.computed.get(name, 1.0),
        seconds=seconds_per_call,
        time_ratio=time_ratio,
        efficiency=opened / time_ratio,
        chosen=name == chosen,
        open_ratio=open_ratios.get(name),
      )
    )
  return timings


class Choice(NamedTuple):
  """The strategy chosen by timings of whole networks.

  Attributes:
    strategy: its name.
    seconds: of a call of each strategy, `ungated` included.
    open_ratios: `Timing.open_ratio` of each.
    everything: seconds of a call of the quickest way to compute everything.
  """

  strategy: str
  seconds: dict[str, float]
  open_ratios: dict[str, float]
  everything: float

  def timings(self, ratios: MacRatios) -> list[Timing]:
    """Returns a `Timing` for each strategy."""
    return list_timings(
      self.seconds,
      ratios,
      chosen=self.strategy,
      open_ratios=self.open_ratios,
      everything=self.everything,
    )


def choose_fastest(
  times: Mapping[Way, Sequence[float]], batches: int, max_slowdown_all_open: float
) -> Choice:
  """Chooses the fastest strategy that is not too slow with every unit open.

  Args:
    times: seconds of each run over all batches: of `ungated` once, of the others also with every
      unit open.
    batches: number of batches.
    max_slowdown_all_open: of `compile_conditional`.
  """
  seconds, open_seconds = {}, {}
  for (name, all_open), run_times in times.items():
    medians = open_seconds if all_open else seconds
    medians[name] = statistics.median(run_times) / batches
  # The worst case is compared with the faster way to compute everything.
  dense = min(open_seconds[MASKED], seconds[UNGATED])
  open_ratios = {name: slowest / dense for name, slowest in open_seconds.items()}
  open_ratios[UNGATED] = seconds[UNGATED] / dense
  # `masked` is the fallback, so its own ratio must be within the limit.
  limit = max(max_slowdown_all_open, open_ratios[MASKED])
  allowed = [name for name in open_seconds if open_ratios[name] <= limit]
  best = min(allowed, key=seconds.__getitem__)
  # A small gain may be noise, and computing everything has no bad case.
  if seconds[best] >= GAIN * seconds[MASKED]:
    best = MASKED
  # With every unit open, a strategy with a kernel of its own may be the quickest.
  everything = min(seconds[MASKED], seconds[UNGATED], *open_seconds.values())
  return Choice(best, seconds, open_ratios, everything=everything)


def baseline_programs(
  run: Callable[[Any, Any], Any], weights: Any, batches: Sequence[Any]
) -> dict[str, TimedProgram]:
  """Makes the programs of a network without gates, of which the quicker one is the baseline.

  They take all examples of a batch at once or, where there are several, one after the other, which
  may be quicker on a CPU.

  Args:
    run: `(weights, batch) -> outputs`, for any number of examples.
    weights: of the network.
    batches: the inputs that are timed: arrays `[N, ...]`, or trees of them.
  """
  programs = {UNGATED: TimedProgram(run, weights)}
  examples = len(jax.tree.leaves(batches[0])[0])
  if examples == 1:
    return programs
  # Taken apart beforehand, so that no call times that.
  singles = {}
  for batch in batches:
    singles[id(batch)] = [_take_example(batch, i) for i in range(examples)]

  def run_one_by_one(weights: Any, batch: Any) -> list[Any]:
    """Runs on the examples of one of the batches."""
    return [run(weights, single) for single in singles[id(batch)]]

  return programs | {ONE_BY_ONE: TimedProgram(run_one_by_one, weights)}


def _take_example(batch: Any, index: int) -> Any:
  """Returns a batch of one of the examples."""
  return jax.tree.map(lambda x: x[index : index + 1], batch)


def count_runs(programs: Mapping[str, TimedProgram]) -> int:
  """Returns the number of runs that `time_programs` compiles."""
  return sum(1 if program.open_weights is None else 2 for program in programs.values())


def time_programs(
  programs: Mapping[str, TimedProgram],
  batches: Sequence[Any],
  *,
  repeats: int,
  max_slowdown_all_open: float,
  advance: Callable[[], None],
) -> Choice:
  """Times programs of a whole network by turns, and chooses one.

  Args:
    programs: by name; of those without gates, the fastest counts as `ungated`.
    batches: inputs of each call.
    repeats: number of timed calls of each program.
    max_slowdown_all_open: of `compile_conditional`.
    advance: called `count_runs(programs) + repeats` times.
  """
  times = race(runs_over(programs, batches), repeats, on_start=advance, on_turn=advance)
  baselines = []
  for name, program in programs.items():
    if program.open_weights is None:
      baselines.append(times.pop(Way(name, all_open=False)))
  times[Way(UNGATED, all_open=False)] = min(baselines, key=statistics.median)
  return choose_fastest(times, len(batches), max_slowdown_all_open)
