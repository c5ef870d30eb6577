"""Training and evaluation of a network that chooses segments of long videos, in a run directory.

Two trainings follow each other: in the folder `pretrain`, both nets as classifiers of single
segments; then, in the run directory itself, the gate and the classifier.

Reference: Hussein et al., 2020 (TimeGate).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from gating_jax.data import batches
from gating_jax.data.videos import VideoArrays
from gating_jax.reports import conclusion, failing, tables
from gating_jax.terminal import Pace, lasting, say, working
from gating_jax.training import closed_gates, devices, hosts, loop, rundir, steps
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal, numbers
from gating_jax.training.steps import map_steps
from gating_jax.video import evaluate as video_evaluation
from gating_jax.video import nets as video_nets
from gating_jax.video import report, sets, speed
from gating_jax.video.build import Phase, VideoExperiment, build


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """Runs one mode on a run directory.

  Args:
    config: of the run.
    workdir: the run directory.
    mode: `train` resumes and trains to completion; `evaluate` tests the newest checkpoint; `report`
      writes the page; `compile` times the ways to run with segments skipped.
  """
  with working("opening the data", "minutes for large sets"):
    experiment = build(config)
  failing.run_mode(
    workdir,
    config,
    mode,
    render=functools.partial(_render_finished, experiment, workdir),
    train=functools.partial(_train, experiment),
    evaluate=functools.partial(_evaluate, experiment),
    report=functools.partial(_report, experiment),
    compile=functools.partial(_compile, experiment),
  )


def _evaluate(experiment: VideoExperiment, run_dir: rundir.RunDir) -> None:
  step, result, _ = _test_newest(experiment, run_dir)
  say(f"checkpoint of step {step}")
  say(tables.render_video(result))
  say(_conclude(experiment, run_dir.path, result, f"Tested the checkpoint of step {step:,} of"))


def _render_finished(experiment: VideoExperiment, path: Path, result: Mapping[str, Any]) -> str:
  return (
    f"{tables.render_video(result)}\n{_conclude(experiment, path, result, 'A finished run of')}"
  )


def _conclude(experiment: VideoExperiment, path: Path, result: Mapping[str, Any], done: str) -> str:
  """Returns the last text of a mode that tests the network."""
  ratio = f"{100 * result['mac_ratio']:.1f} %"
  rows = [
    tables.video_rows(result)[0],
    ("MACs per video", f"{result['macs']:,.0f}, {ratio} of the heavy net on all segments"),
    ("segments chosen", f"{100 * result['share']:.1f} %"),
  ]
  if "videos_per_second" in result:
    rows.append(
      (
        "videos per second",
        f"{result['videos_per_second']:.1f}; the heavy net on all segments: "
        f"{result['all_segments_videos_per_second']:.1f}",
      )
    )
  rows.append(("run directory:", str(path)))
  if (path / rundir.REPORT_FILE).exists():
    rows.append(("page", f"{path / rundir.REPORT_FILE}, for a browser"))
  modes = ["compile"] if speed.skips(experiment) else []
  return conclusion.text(f"{done} {_title(experiment)}.", rows, conclusion.following(path, modes))


def _title(experiment: VideoExperiment) -> str:
  return (
    f"segments of {experiment.config.data.name} videos, "
    f"chosen by {experiment.config.model.selection}"
  )


def _report(experiment: VideoExperiment, run_dir: rundir.RunDir, notice: str = "") -> None:
  step, result, behaviour = _test_newest(experiment, run_dir)
  with working("drawing the report", "up to a minute"):
    report.write(experiment, result, behaviour, run_dir, step, notice)
  say(f"report of the checkpoint of step {step}: {run_dir.report}")
  say(
    _conclude(
      experiment, run_dir.path, result, f"Wrote the page of the checkpoint of step {step:,} of"
    )
  )


def _compile(experiment: VideoExperiment, run_dir: rundir.RunDir) -> None:
  step, variables = newest(experiment, run_dir)
  # One process times and writes; the others wait for it.
  hosts.on_writer(lambda: speed.run(experiment, run_dir, step, variables))


def _test_newest(
  experiment: VideoExperiment, run_dir: rundir.RunDir
) -> tuple[int, dict[str, Any], video_evaluation.Arrays]:
  """Tests the newest checkpoint: its step, its result, and arrays of each test video."""
  step, variables = newest(experiment, run_dir)
  result, behaviour = _test(experiment, variables)
  return step, result | _speed(experiment, variables), behaviour


def _test(
  experiment: VideoExperiment, variables: Any, tell: Callable[[str], None] = say
) -> tuple[dict[str, Any], video_evaluation.Arrays]:
  about = "programs are compiled first, up to a minute"
  with working(f"testing on {len(experiment.test):,} videos", about, tell):
    return video_evaluation.test(experiment, variables)


def _speed(experiment: VideoExperiment, variables: Any) -> dict[str, float]:
  with working("timing runs that skip segments", "up to a minute"):
    return speed.speed(experiment, variables)


def newest(experiment: VideoExperiment, run_dir: rundir.RunDir) -> tuple[int, Any]:
  """Loads the newest checkpoint's step and the variables of the whole network.

  Raises:
    RunDirError: there is no checkpoint.
  """
  path = run_dir.path
  two_stage = experiment.config.training == "two_stage"
  with working("loading the newest checkpoint"):
    nets = (
      # `end_to_end` has the nets in its own checkpoint; `two_stage` has them in that of the
      # pretraining.
      video_nets.trained_nets(experiment, path) if two_stage and experiment.pretraining else None
    )
    step, state = video_nets.restore(
      experiment.training, path, experiment.config.seed, read_only=True
    )
  if not step:
    raise rundir.RunDirError(f"no checkpoint in {path / rundir.CHECKPOINT_DIR} yet")
  return step, video_nets.whole(experiment, state, nets)


def _train(experiment: VideoExperiment, run_dir: rundir.RunDir) -> None:
  started, config, phase = time.monotonic(), experiment.config, experiment.training
  # Lets the model of this run be loaded without the data.
  rundir.write_outlines(run_dir.path, [experiment.train, experiment.test])
  nets = None
  if config.pretrained:
    with working("loading the trained nets"):
      nets = video_nets.trained_nets(experiment, run_dir.path)
  elif experiment.pretraining:
    folder = run_dir.path / video_nets.PRETRAIN_DIR
    state, finished = _run_phase(experiment, experiment.pretraining, folder, experiment.train)
    # Asked to stop: the next start resumes here.
    if not finished:
      return
    nets = video_nets.of_state(state)
  train = experiment.train
  first_step, state = _restore(phase, run_dir.path, config.seed)
  if config.training == "two_stage":
    with working(
      f"computing the features of {len(train):,} training videos", "minutes for large sets"
    ):
      train = video_evaluation.extract_features(experiment, video_nets.nets_of(experiment, nets))
  # The checkpoint of a resumed run already holds the concepts.
  if not first_step:
    with working("finding the initial concepts of the gates", "up to a minute"):
      state = video_nets.begin(experiment, state, nets, train)
  test = lambda state, tell=say: _test(experiment, video_nets.whole(experiment, state, nets), tell)
  state, finished = _run_phase(
    experiment, phase, run_dir.path, train, start=(first_step, state), test=test
  )
  if not finished:
    return
  result, behaviour = test(state)
  # Timed once, at the end: a test during training is not slowed down by it.
  result |= _speed(experiment, video_nets.whole(experiment, state, nets))
  total = phase.settings.total_steps
  with working("drawing the report", "up to a minute"):
    # The phase has closed its journal, and the final test belongs to its last step.
    journal = Journal(run_dir.path, total, total)
    try:
      _note(experiment, journal, total, result, behaviour)
      hosts.on_writer(lambda: report.draw(experiment, behaviour, run_dir, journal, total))
    finally:
      journal.close()
    hosts.on_writer(lambda: report.write(experiment, result, behaviour, run_dir, total))
  result |= {"step": total, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  run_dir.finish(result)
  say(tables.render_video(result))
  say(
    _conclude(
      experiment, run_dir.path, result, f"Trained for {lasting(time.monotonic() - started)}:"
    )
  )


def _restore(phase: Phase, path: Path, seed: int) -> tuple[int, Any]:
  """Returns the step and the state from which a phase resumes."""
  with working("making the networks", "up to half a minute"):
    return video_nets.restore(phase, path, seed)


def _run_phase(
  experiment: VideoExperiment,
  phase: Phase,
  path: Path,
  train: Any,
  *,
  start: Any = None,
  test: Any = None,
) -> tuple[Any, bool]:
  """Trains a phase to its end, or until it is asked to stop.

  Args:
    experiment: of the run.
    phase: the phase.
    path: its directory.
    train: its training set.
    start: `(first_step, state)`; by default those of the newest checkpoint in `path`.
    test: evaluates a state; None without tests.
  Returns:
    `(state, finished)`.
  """
  config, total = experiment.config, phase.settings.total_steps
  first_step, state = start or _restore(phase, path, config.seed)
  if first_step > total:
    raise rundir.RunDirError(
      f"{path} holds a checkpoint of step {first_step}, beyond the {total} of this config"
    )
  # A finished phase is not entered again: no journal, no compilation.
  if first_step == total:
    return state, True
  if first_step:
    say(f"resuming from the checkpoint of step {first_step} in {path}")
  path.mkdir(exist_ok=True)
  checkpoints, journal = Checkpoints(path / rundir.CHECKPOINT_DIR), Journal(path, first_step, total)
  pace = Pace(journal.say, total)
  journal.say(
    first_step, _title(experiment) if test else "training both nets on single segments first"
  )

  def evaluate(state, step):
    """Tests the state on the test videos and notes the result in the journal."""
    result, behaviour = test(state, functools.partial(journal.say, step))
    _note(experiment, journal, step, result, behaviour)
    journal.say(step, tables.video_headline(result))

  try:
    state, step = loop.train(
      state,
      first_step,
      pace(_make_advance(experiment, phase, train, first_step)),
      settings=phase.settings,
      checkpoints=checkpoints,
      journal=journal,
      evaluate=evaluate if test else None,
      watch=closed_gates.watch_videos(config),
    )
    # The loop ends early only where it was asked to, and has saved a checkpoint.
    if step < total:
      journal.say(step, "stopped as asked; a checkpoint is saved, run the same command to resume")
  finally:
    journal.close()
    checkpoints.close()
  return state, step == total


def _make_advance(experiment: VideoExperiment, phase: Phase, train: Any, first_step: int) -> Any:
  """Builds `(state, step) -> (state, metrics)` over all devices."""
  config, k = experiment.config, phase.settings.steps_per_dispatch
  process = (jax.process_index(), jax.process_count())
  make_step = lambda model: steps.make_train_step(
    model, phase.optimiser, phase.objective, phase.prepare, seed=config.seed, axis_name=devices.AXIS
  )
  # Also with `phase.full`, for steps that choose more segments than the model's capacity.
  mapped = lambda several, args: map_steps(
    lambda model: several(make_step(model)),
    phase.model,
    phase.full,
    args=args,
    backend=config.devices.backend,
  )
  if isinstance(train, VideoArrays):
    # Arrays in memory: the whole set lies on every device, and steps take only indices.
    arrays = devices.replicate(sets.examples(train.arrays))
    run = mapped(steps.resident_steps, (devices.REPLICATED, devices.REPLICATED, devices.BATCH))
    indices = lambda at: batches.indices(config.seed, at, k, phase.batch_size, len(train), process)
    return lambda state, at: run(state, arrays, indices(at))
  # Videos on disk: batches come from worker threads, from the first step on.
  stream = train.batches(phase.batch_size, first_step, k, phase.settings.total_steps, process)
  run = mapped(steps.streamed_steps, (devices.REPLICATED, devices.BATCH))
  # The stream keeps its own place, so the step is not needed.
  return lambda state, _: run(state, sets.examples(next(stream)))


def _note(
  experiment: VideoExperiment,
  journal: Journal,
  step: int,
  result: Mapping[str, Any],
  behaviour: video_evaluation.Arrays,
) -> None:
  """Writes a test's numbers and histograms."""
  journal.write(step, "test", numbers(result))
  journal.write_histograms(step, "test", report.histograms(experiment, behaviour))
