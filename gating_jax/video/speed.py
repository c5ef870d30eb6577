"""Time saved by skipping segments: the speed in a run's result, and `--mode=compile`.

Axes: B videos, T segments.
Reference: Hussein et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gating_jax.inference.compiled import OPEN_LIMIT, Timing, fastest, rows
from gating_jax.inference.segments import Skipping
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.timegate import Inputs, SegmentNet
from gating_jax.ops import compaction
from gating_jax.reports import compile_report
from gating_jax.reports.timings import timing_title
from gating_jax.terminal import Advance, working
from gating_jax.timing import MASKED, SEGMENTS, UNGATED, race
from gating_jax.training import rundir
from gating_jax.video import evaluate, sets
from gating_jax.video.build import LIGHT, VideoExperiment

# Added to a gate's log-odds, it opens every segment.
_ALWAYS = 1e4
# Numbers of videos that the tables are measured for, and timed calls of each program.
_BATCHES, _REPEATS = (1, 8), 20
Run = Callable[[], Any]


def run(
  experiment: VideoExperiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Times the ways to run on test videos, and writes the tables.

  Raises:
    RunDirError: the tables exist, or another process writes them.
    ValueError: as of `check`.
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
  inputs = _read(experiment, videos)
  # One device: the axis of devices goes, and variables are loaded from the host.
  count, nets = (
    len(inputs["valid"]),
    (experiment.model.clone(axis_name=None), jax.device_get(variables)),
  )
  times = race(
    {SEGMENTS: _skipping(experiment, *nets, inputs), **_all_segments(experiment, *nets, inputs)},
    repeats,
  )
  # `race` keeps the order of its contenders.
  skipped, *everything = (count / statistics.median(seconds) for seconds in times.values())
  return {"videos_per_second": skipped, "all_segments_videos_per_second": max(everything)}


def _tables(experiment: VideoExperiment, variables: Any) -> Iterator[tuple[str, Sequence[Timing]]]:
  for count in _BATCHES:
    inputs = _read(experiment, count)
    name = timing_title(len(inputs["valid"]), "video")
    with working(f"compiling and timing each way to run {name}", "up to a few minutes") as progress:
      rows = timings(experiment, variables, inputs, repeats=_REPEATS, progress=progress)
    yield name, rows


def timings(
  experiment: VideoExperiment,
  variables: Any,
  inputs: Inputs,
  *,
  repeats: int,
  progress: Advance = lambda done, total: None,
) -> list[Timing]:
  """Times the ways to run a batch.

  They are `segments`, which skips; `masked`, the same with the heavy net on all segments; and
  `ungated`, the heavy net alone.

  Args:
    experiment: of the run.
    variables: of the whole network.
    inputs: arrays `[B, T, ...]`.
    repeats: number of timed calls of each program.
    progress: called with the number of programs compiled, and that of all.
  Returns:
    A `Timing` for each.
  """
  model, variables = experiment.model.clone(axis_name=None), jax.device_get(variables)
  runs = {}
  # `open_ratio` needs each way with every segment chosen, too.
  for opened, net in (
    (False, (model, variables)),
    (True, (model.clone(share=1.0), _opened(model, variables))),
  ):
    runs[SEGMENTS, opened] = _skipping(experiment, *net, inputs)
    runs[MASKED, opened] = functools.partial(_masked(experiment, *net), inputs)
  everything = _all_segments(experiment, model, variables, inputs)
  contenders, done = (
    runs | {(name, False): of_all for name, of_all in everything.items()},
    itertools.count(1),
  )
  times = race(contenders, repeats, on_start=lambda: progress(next(done), len(contenders)))
  # The baseline is the faster of both ways to run the heavy net on all segments.
  quickest = min(everything, key=lambda name: statistics.median(times[name, False]))
  times = {name: times[name] for name in runs} | {(UNGATED, False): times[quickest, False]}
  best, seconds, open_ratios = fastest(times, 1, OPEN_LIMIT)
  return rows(None, seconds, *_mac_ratios(experiment, model, variables, inputs), best, open_ratios)


def skips(experiment: VideoExperiment) -> bool:
  """Tests whether segments of a heavy net are skipped in batches."""
  return experiment.config.model.selection not in ("prefix", LIGHT) and bool(
    experiment.counts.heavy.params
  )


def _read(experiment: VideoExperiment, videos: int) -> Inputs:
  """Reads the first test videos."""
  batch = experiment.test.read(np.arange(min(videos, len(experiment.test))))
  return {name: values for name, values in batch.items() if name in sets.INPUTS}


def _skipping(
  experiment: VideoExperiment, model: SegmentNet, variables: Any, inputs: Inputs
) -> Run:
  skipping = Skipping(
    model, variables, capacities=_capacities(experiment), prepare=experiment.prepare
  )
  return lambda: skipping(inputs).outputs


def _capacities(experiment: VideoExperiment) -> Sequence[int]:
  # One video's segments at most: larger batches call the largest K several times.
  return compaction.bucket_sizes(experiment.counts.segments, min(8, experiment.counts.segments))


def _masked(
  experiment: VideoExperiment, model: SegmentNet, variables: Any
) -> Callable[[Inputs], Any]:
  whole = jax.jit(lambda variables, inputs: model.apply(variables, experiment.prepare(inputs))[0])
  return functools.partial(whole, jax.device_put(variables))


def _all_segments(
  experiment: VideoExperiment, model: SegmentNet, variables: Any, inputs: Inputs
) -> dict[str, Run]:
  """Builds the runs of the heavy net on all segments, without light net and gate.

  They take all videos at once, or one after the other.
  """
  whole = _masked(experiment, model.clone(selection="all", light=None, light_head=False), variables)
  one_by_one = [
    {name: x[i : i + 1] for name, x in inputs.items()} for i in range(len(inputs["valid"]))
  ]
  return {
    "at once": lambda: whole(inputs),
    "one by one": lambda: [whole(one) for one in one_by_one],
  }


def _opened(model: SegmentNet, variables: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the variables with a bias of a learned gate at which every segment is chosen."""
  # Fixed selections take every segment with `share` 1, and have no gate.
  if model.selection != "gate":
    return variables
  gate = variables["params"][GATE_NAME]
  bias = gate["logits"]["bias"] + _ALWAYS
  gate = {**gate, "logits": {**gate["logits"], "bias": bias}}
  return {**variables, "params": {**variables["params"], GATE_NAME: gate}}


def _mac_ratios(
  experiment: VideoExperiment, model: SegmentNet, variables: Any, inputs: Inputs
) -> tuple[float, dict[str, float]]:
  """Computes the ratios of open and of computed MACs to the baseline.

  The baseline is the heavy net on all segments and the classifier.

  Returns:
    The ratio of light net, gate, chosen segments and classifier; and by way to run, the ratio of
    what is computed, which includes the heavy net on padding and on segments that are not chosen.
  """
  outcome = jax.jit(
    lambda variables, inputs: evaluate.outcome(
      dataclasses.replace(experiment, model=model), variables, inputs
    )
  )
  done = jax.device_get(outcome(variables, inputs))
  counts, reference, shape = experiment.counts, experiment.reference, inputs["valid"].shape
  spent = lambda gates, heavy: float(counts.per_video(gates, inputs["valid"], heavy).mean())
  dense, heavy = (
    reference.all_valid(inputs["valid"]),
    float(counts.heavy.macs + counts.heavy.gate_macs),
  )
  # `masked` computes the heavy net on every segment, with all channels and their gate networks.
  masked = spent(np.ones(shape), np.full(shape, heavy))
  sizes = tuple(sorted({min(size, done["gates"].size) for size in _capacities(experiment)}))
  # Segments per video that `Skipping` computes, padding included.
  taken = sum(compaction.pieces_for(int(np.sum(done["gates"] > 0)), sizes)) / shape[0]
  return (
    spent(done["gates"], done["heavy_macs"]) / dense,
    {
      MASKED: masked / dense,
      SEGMENTS: (masked - (shape[1] - taken) * heavy) / dense,
      UNGATED: (reference.classifier + shape[1] * reference.heavy.macs) / dense,
    },
  )
