"""Time saved by skipping segments: the speed in a run's result, and `--mode=compile`.

Axes: B videos, T segments.
Reference: Hussein et al., 2020.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gating_jax.inference.compiled import (
  MAX_SLOWDOWN_ALL_OPEN,
  MacRatios,
  Timing,
  Way,
  choose_fastest,
  count_pieces,
)
from gating_jax.inference.segments import compile_segments, fitting_capacities
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.timegate import Inputs, SegmentNet
from gating_jax.ops import compaction
from gating_jax.reports import compile_report
from gating_jax.reports.timings import timing_title
from gating_jax.timing import MASKED, SEGMENTS, UNGATED, ReportProgress, race
from gating_jax.training import rundir
from gating_jax.video import evaluate, sets
from gating_jax.video.build import LIGHT, VideoExperiment

# Added to a gate's log-odds, it opens every segment.
_ALWAYS = 1e4
# Numbers of videos that the tables are measured for, and timed calls of each program.
_BATCHES, _REPEATS = (1, 8), 20
# Runs a network on a batch.
Run = Callable[[], Any]


def run(
  experiment: VideoExperiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Times the ways to run on test videos, and writes the tables.

  Raises:
    RunDirError: the tables exist, or another process writes them.
    ValueError: as in `check`.
  """
  check(experiment)
  compile_report.write_times(run_dir, step, _tables(experiment, variables))


def check(experiment: VideoExperiment) -> None:
  """Raises ValueError for a run that skips no segments of a heavy net in batches."""
  if not skips(experiment):
    raise ValueError(
      "model must have a heavy net and choose segments before running it; got "
      f"model.heavy.name {experiment.config.model.heavy.name!r}, model.selection "
      f"{experiment.config.model.selection!r}"
    )


def speed(
  experiment: VideoExperiment, variables: Any, *, videos: int = 8, repeats: int = 5
) -> dict[str, float]:
  """Measures videos per second on one device, from medians of interleaved repeats.

  One number is with closed segments skipped, light net and gate included. The other is of the heavy
  net on all segments: all videos at once or one after the other, whichever is faster. Early exits,
  which are not batched, and runs without a heavy net give nothing.

  Args:
    experiment: of the run.
    variables: of the whole network.
    videos: number of test videos in a batch.
    repeats: number of timed calls of each program.
  Returns:
    `videos_per_second` and `all_segments_videos_per_second`, or nothing.
  """
  if not skips(experiment):
    return {}
  trial = _make_trial(experiment, variables, _read(experiment, videos))
  times = race({SEGMENTS: trial.chosen_segments(), **trial.all_segments()}, repeats)
  skipping = statistics.median(times.pop(SEGMENTS))
  everything = min(map(statistics.median, times.values()))
  return {
    "videos_per_second": trial.videos / skipping,
    "all_segments_videos_per_second": trial.videos / everything,
  }


def _tables(experiment: VideoExperiment, variables: Any) -> Iterator[tuple[str, Sequence[Timing]]]:
  """Yields title and rows, for each number of videos."""
  for count in _BATCHES:
    inputs = _read(experiment, count)
    title = timing_title(len(inputs["valid"]), "video")
    with compile_report.announce_timing(title) as progress:
      rows = timings(experiment, variables, inputs, repeats=_REPEATS, progress=progress)
    yield title, rows


def timings(
  experiment: VideoExperiment,
  variables: Any,
  inputs: Inputs,
  *,
  repeats: int,
  progress: ReportProgress | None = None,
) -> list[Timing]:
  """Times the ways to run a batch.

  They are `segments`, which skips; `masked`, the same with the heavy net on all segments; and
  `ungated`, the heavy net alone.

  Args:
    experiment: of the run.
    variables: of the whole network.
    inputs: arrays `[B, T, ...]`.
    repeats: number of timed calls of each program.
    progress: called with the pieces of work done, and all of them: a piece is a program compiled,
      or all of them timed once.
  Returns:
    A `Timing` for each.
  """
  trial, runs = _make_trial(experiment, variables, inputs), {}
  # The largest slowdown needs each way with every segment chosen, too.
  for all_open, of_case in ((False, trial), (True, trial.opened())):
    runs[Way(SEGMENTS, all_open)] = of_case.chosen_segments()
    runs[Way(MASKED, all_open)] = of_case.masked()
  whole = trial.all_segments()
  advance = count_pieces(progress, len(runs) + len(whole) + repeats)
  times = race(runs | whole, repeats, on_start=advance, on_turn=advance)
  # The baseline is the faster of both ways to run the heavy net on all segments.
  of_whole = [times.pop(name) for name in whole]
  times[Way(UNGATED, all_open=False)] = min(of_whole, key=statistics.median)
  choice = choose_fastest(times, 1, MAX_SLOWDOWN_ALL_OPEN)
  return choice.timings(trial.mac_ratios())


def skips(experiment: VideoExperiment) -> bool:
  """Tests whether segments of a heavy net are skipped in batches."""
  return experiment.config.model.selection not in ("prefix", LIGHT) and bool(
    experiment.counts.heavy.params
  )


def _read(experiment: VideoExperiment, videos: int) -> Inputs:
  """Reads the first test videos."""
  batch = experiment.test.read(np.arange(min(videos, len(experiment.test))))
  return {name: batch[name] for name in batch if name in sets.INPUTS}


def _take_video(inputs: Inputs, index: int) -> Inputs:
  """Returns a batch of one of the videos."""
  return jax.tree.map(lambda x: x[index : index + 1], inputs)


def _capacities(experiment: VideoExperiment) -> Sequence[int]:
  # One video's segments at most: larger batches call the largest K several times.
  return compaction.bucket_sizes(experiment.counts.segments, min(8, experiment.counts.segments))


def _make_trial(experiment: VideoExperiment, variables: Any, inputs: Inputs) -> _Trial:
  """Returns the network of a run on one device, with a batch of videos."""
  # One device: the axis of devices goes, and variables are loaded from the host.
  model = experiment.model.clone(axis_name=None)
  return _Trial(experiment, model, variables=jax.device_get(variables), inputs=inputs)


@dataclasses.dataclass(frozen=True)
class _Trial:
  """A network, and a batch of videos that it is timed on.

  Attributes:
    experiment: of the run.
    model, variables: the network, on one device.
    inputs: arrays `[B, T, ...]`.
  """

  experiment: VideoExperiment
  model: SegmentNet
  variables: Any
  inputs: Inputs

  @property
  def videos(self) -> int:
    """Returns the number of videos, B."""
    return len(self.inputs["valid"])

  def opened(self) -> _Trial:
    """Returns the same with every segment chosen."""
    return dataclasses.replace(
      self,
      model=self.model.clone(share=1.0),
      variables=_opened(self.model, self.variables),
    )

  def chosen_segments(self) -> Run:
    """Compiles the network with its heavy net on chosen segments only."""
    network = compile_segments(
      self.model,
      self.variables,
      capacities=_capacities(self.experiment),
      prepare=self.experiment.prepare,
    )
    return lambda: network(self.inputs).outputs

  def masked(self) -> Run:
    """Compiles the network with its heavy net on all segments."""
    network = self._compile(self.model)
    return lambda: network(self.inputs)

  def all_segments(self) -> dict[str, Run]:
    """Compiles the heavy net on all segments, without light net and gate.

    It takes all videos at once, or one after the other.
    """
    network = self._compile(self.model.clone(selection="all", light=None, light_head=False))
    one_by_one = [_take_video(self.inputs, i) for i in range(self.videos)]
    return {
      "at once": lambda: network(self.inputs),
      "one by one": lambda: [network(video) for video in one_by_one],
    }

  def _compile(self, model: SegmentNet) -> Callable[[Inputs], Any]:
    """Compiles a network that computes every segment, as a function of a batch."""
    # On the device once, so that no call times a copy.
    prepare, variables = self.experiment.prepare, jax.device_put(self.variables)
    whole = jax.jit(lambda variables, inputs: model.apply(variables, prepare(inputs))[0])
    return lambda inputs: whole(variables, inputs)

  def mac_ratios(self) -> MacRatios:
    """Computes the ratios of multiply-accumulates to those of the baseline.

    The baseline is the heavy net on all segments and the classifier. What is computed includes the
    heavy net on padding and on segments that are not chosen.
    """
    of_model = dataclasses.replace(self.experiment, model=self.model)
    outcome = jax.jit(lambda variables, inputs: evaluate.outcome(of_model, variables, inputs))
    done = jax.device_get(outcome(self.variables, self.inputs))
    counts, reference = self.experiment.counts, self.experiment.reference
    valid = self.inputs["valid"]
    videos, segments = valid.shape
    # Padding of shorter videos costs nothing in the baseline.
    dense = reference.all_valid(valid)
    opened = counts.per_video(done["gates"], valid, done["heavy_macs"]).mean()
    # `masked` computes the heavy net on every segment, with all channels and their gate networks.
    heavy = float(counts.heavy.macs + counts.heavy.gate_macs)
    every = np.ones(valid.shape)
    masked = float(counts.per_video(every, valid, heavy * every).mean())
    # Segments per video that `chosen_segments` computes, padding included.
    chosen = int(np.sum(done["gates"] > 0))
    sizes = fitting_capacities(_capacities(self.experiment), valid.size)
    taken = sum(compaction.pieces_for(chosen, sizes)) / videos
    ungated = reference.classifier + segments * reference.heavy.macs
    return MacRatios(
      opened=float(opened) / dense,
      computed={
        MASKED: masked / dense,
        SEGMENTS: (masked - (segments - taken) * heavy) / dense,
        UNGATED: ungated / dense,
      },
    )


def _opened(model: SegmentNet, variables: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the variables with a bias of a learned gate at which every segment is chosen."""
  # Fixed selections take every segment with `share` 1, and have no gate.
  if model.selection != "gate":
    return variables
  gate = variables["params"][GATE_NAME]
  bias = gate["logits"]["bias"] + _ALWAYS
  gate = {**gate, "logits": {**gate["logits"], "bias": bias}}
  return {**variables, "params": {**variables["params"], GATE_NAME: gate}}
