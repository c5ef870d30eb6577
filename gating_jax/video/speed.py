"""Time saved by skipping segments: the speed in a run's result, and `--mode=compile`.

Axes: B videos, T segments.
Reference: Hussein et al., 2020.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gating_jax.inference.compiled import (
  AUTO,
  Timing,
  baseline_programs,
  runs_over,
  spread_indices,
)
from gating_jax.inference.segments import CompiledSegments, compile_segments, dense_program
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops import compaction
from gating_jax.reports import conclusion, measured_times, timings
from gating_jax.terminal import say
from gating_jax.timing import SEGMENTS, race
from gating_jax.training import rundir
from gating_jax.video import sets
from gating_jax.video.build import VideoExperiment

# Numbers of videos that the tables are measured for, and timed calls of each program.
_BATCHES, _REPEATS = (1, 8), 20
# Measurements of the speed, before it is given up as wrong.
_TRIALS = 3


def compile_run(
  experiment: VideoExperiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Times the ways to run on test videos, and writes the tables.

  Raises:
    RunDirError: the tables exist, or another process writes them.
    ValueError: as in `check_compilable`.
  """
  check_compilable(experiment)
  tables = timings.write_times(run_dir, step, _tables(experiment, variables))
  conclusion.conclude_times(run_dir, step, tables)


def check_compilable(experiment: VideoExperiment) -> None:
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

  More time cannot be saved than MACs, so that a measurement that says so is repeated, and given up
  after three times.

  Args:
    experiment: of the run.
    variables: of the whole network.
    videos: number of test videos in a batch, spread over the test set.
    repeats: number of timed calls of each program.
  Returns:
    `videos_per_second`, `all_segments_videos_per_second`, `timed_videos` and `timed_share`, the
    fraction of their segments that is chosen; or nothing.
  """
  if not skips(experiment):
    return {}
  inputs, network = _read(experiment, videos), _compile(experiment, variables)
  dense = dense_program(_model(experiment), experiment.prepare)
  baselines = runs_over(baseline_programs(dense, network.weights, [inputs]), [inputs])
  runs = {SEGMENTS: lambda: network(inputs).outputs, **baselines}
  (record, *channels) = network(inputs).records
  gates, valid = np.asarray(record.gates), np.asarray(inputs["valid"])
  heavy_macs = experiment.counts.heavy.per_example(tuple(channels), gates.shape)
  macs = experiment.counts.per_video(gates, valid, np.asarray(heavy_macs)).mean()
  # The baseline computes the padding of shorter videos, too.
  mac_ratio = float(macs) / experiment.reference.all_segments
  for _ in range(_TRIALS):
    times = race(runs, repeats)
    skipping = statistics.median(times.pop(SEGMENTS))
    everything = min(map(statistics.median, times.values()))
    efficiency = timings.efficiency_of(mac_ratio, skipping / everything)
    if efficiency <= timings.MAX_EFFICIENCY:
      return {
        "videos_per_second": len(valid) / skipping,
        "all_segments_videos_per_second": len(valid) / everything,
        "timed_videos": len(valid),
        "timed_share": float(np.mean(np.sum((gates > 0) & valid, axis=1) / valid.sum(axis=1))),
      }
  say(
    f"the speed is not reported: {_TRIALS} measurements saved more time than MACs (efficiency "
    f"{efficiency:.2f}, at most {timings.MAX_EFFICIENCY}), perhaps since other jobs run"
  )
  return {}


def _tables(experiment: VideoExperiment, variables: Any) -> Iterator[tuple[str, Sequence[Timing]]]:
  """Yields title and rows, for each number of videos."""
  for count in _BATCHES:
    inputs = _read(experiment, count)
    title = measured_times.timing_title(len(inputs["valid"]), "video")
    with timings.announce_timing(title) as progress:
      network = _compile(
        experiment,
        variables,
        strategy=AUTO,
        calibration=inputs,
        counts=experiment.counts,
        repeats=_REPEATS,
        progress=progress,
      )
    yield title, network.report()


def _model(experiment: VideoExperiment) -> SegmentNet:
  """Returns the network on one device, without the axis of devices."""
  return experiment.model.clone(axis_name=None)


def _compile(experiment: VideoExperiment, variables: Any, **how: Any) -> CompiledSegments:
  """Compiles the network of a run for one device; `how` has keywords of `compile_segments`."""
  # Variables are loaded from the host: in training every device has them.
  return compile_segments(
    _model(experiment),
    jax.device_get(variables),
    capacities=_capacities(experiment),
    prepare=experiment.prepare,
    **how,
  )


def skips(experiment: VideoExperiment) -> bool:
  """Tests whether segments of a heavy net are skipped in batches."""
  # In the heavy net's place, the light net sees every segment.
  may_skip = experiment.config.model.selection != "prefix" and experiment.heavy_from == "heavy"
  return may_skip and bool(experiment.counts.heavy.params)


def _read(experiment: VideoExperiment, videos: int) -> dict[str, Any]:
  """Reads test videos, spread over the set: a table may be sorted by class."""
  batch = experiment.test.read(spread_indices(len(experiment.test), videos))
  return {name: batch[name] for name in batch if name in sets.INPUTS}


def _capacities(experiment: VideoExperiment) -> Sequence[int]:
  # One video's segments at most: larger batches call the largest K several times.
  return compaction.bucket_sizes(
    experiment.counts.segments, buckets=min(8, experiment.counts.segments)
  )
