"""Training and evaluation of a network that chooses segments of long videos, in a run directory.

Two trainings follow each other: in the folder `pretrain`, both nets as classifiers of single
segments; then, in the run directory itself, the gate and the classifier.

Reference: Hussein et al., 2020 (TimeGate).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax

from gating_jax import runner
from gating_jax.config_files import Config
from gating_jax.data.checked_files import write_unreadable
from gating_jax.data.image_sets import process_indices
from gating_jax.data.shared_videos import check_apart
from gating_jax.data.videos import VideoArrays
from gating_jax.reports import tables
from gating_jax.reports.text import format_percent
from gating_jax.terminal import say, working
from gating_jax.training import devices, hosts, outlines, steps
from gating_jax.training.best_state import BEST_DIR, BestState, restore_best
from gating_jax.training.checkpoints import Checkpoint
from gating_jax.training.closed_gates import (
  CLOSED,
  MOST_CLOSED,
  SEGMENTS_CLOSED,
  ClosingWatch,
  Limit,
  accepted_fraction,
  advise_lower,
  advise_on_loss,
)
from gating_jax.training.journal import numbers
from gating_jax.training.rundir import RunDir
from gating_jax.training.steps import Advance, MappedSteps, TrainState
from gating_jax.video import evaluate as video_evaluation
from gating_jax.video import nets as video_nets
from gating_jax.video import report, sets, speed, thresholds
from gating_jax.video.build import Phase, VideoExperiment, build


def run(config: Config, workdir: Path, mode: str) -> None:
  """Runs one mode on a run directory.

  Args:
    config: of the run.
    workdir: the run directory.
    mode: one of those of `runner.run`; `compile` times the ways to run with segments skipped.
  Raises:
    ValueError: in training, a video is in two splits; the first five are named.
  """
  if mode == "train" and config.pretrained:
    video_nets.check_pretrained(config.pretrained)
  with runner.opening_data(LongVideo, config, workdir, mode=mode):
    experiment = build(config)
    # A run may be tested on its own training videos; one that is trained says something else.
    if mode == "train":
      check_apart(training=experiment.train, validation=experiment.validation, test=experiment.test)
      if advice := sets.advise_segments(experiment.train, config.data):
        say(advice)
  runner.run(LongVideo(experiment), workdir, mode)


@dataclasses.dataclass(frozen=True)
class LongVideo(runner.Programme):
  """The choice of segments of long videos: pretraining of the nets, then of gate and classifier."""

  experiment: VideoExperiment
  modes: ClassVar[Mapping[str, Callable[..., None]]] = {"compile": speed.compile_run}

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the classes."""
    return tuple(self.experiment.train.class_names)

  @property
  def title(self) -> str:
    """Describes the data set and the way that segments are chosen."""
    name, selection = self.config.data.name, self.config.model.selection
    videos = "videos" if name == "videos" else f"{name} videos"
    return f"segments of {videos}, chosen by {selection}"

  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    return tables.render_video(result)

  def main_numbers(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the score, MACs, the fraction of segments and, where it was timed, the speed."""
    ratio = format_percent(result["mac_ratio"], 1)
    found = [
      tables.video_rows(result)[0],
      ("MACs per video", f"{result['macs']:,.0f}, {ratio} of the heavy net on all segments"),
      ("segments chosen", format_percent(result["share"], 1)),
    ]
    if "videos_per_second" in result:
      baseline = f"the heavy net on all segments: {result['all_segments_videos_per_second']:.1f}"
      found.append(("videos per second", f"{result['videos_per_second']:.1f}; {baseline}"))
    return found

  def next_modes(self) -> list[str]:
    """Returns `compile` where segments of a heavy net are skipped."""
    return ["compile"] if speed.skips(self.experiment) else []

  def fresh(self) -> TrainState:
    """Initialises the state with which the training of gate and classifier begins."""
    return video_nets.initial_state(self.experiment.training, self.config.seed)

  def restore(self, run_dir: RunDir) -> Checkpoint | None:
    """Restores the variables of the whole network, from its newest checkpoint."""
    experiment, nets = self.experiment, None
    # `end_to_end` has the nets in its own checkpoint; `two_stage` has them in that of the
    # pretraining.
    if self.config.training == "two_stage" and experiment.pretraining:
      nets = video_nets.trained_nets(experiment, run_dir.path)
    chosen = thresholds.load(run_dir.path)
    if chosen is not None and chosen.is_best:
      found = restore_best(run_dir.path / BEST_DIR, self.fresh())
    else:
      found = super().restore(run_dir)
    if found is None:
      return None
    variables = video_nets.whole_network(experiment, found.state, nets)
    # Those of another step are of an earlier ending; without the data there are none to find.
    if chosen is not None and chosen.step == found.step:
      own = chosen.thresholds
    else:
      own = thresholds.find_thresholds(experiment, variables)
    return Checkpoint(found.step, thresholds.apply_thresholds(variables, own))

  def train(self, run_dir: RunDir) -> dict[str, Any] | None:
    """Trains the nets, then gate and classifier; returns the result, or None where it stopped."""
    experiment, phase = self.experiment, self.experiment.training
    # Both trainings count their seconds from here.
    started = time.monotonic()
    # Lets the model of this run be loaded without the data.
    outlines.write_outlines(run_dir.path, [experiment.train, experiment.test])
    nets = None
    if self.config.pretrained:
      with working("loading the trained nets", "up to half a minute"):
        nets = video_nets.trained_nets(experiment, run_dir.path)
    elif experiment.pretraining:
      nets = self.pretrain(run_dir, started)
      # Asked to stop: the next start resumes here.
      if nets is None:
        return None
    with contextlib.ExitStack() as opened:
      training = opened.enter_context(self._open(phase, run_dir.path, started))
      train = self._training_set(nets)
      # The checkpoint of a resumed run already holds the concepts.
      if not training.step:
        with working("finding the initial concepts of the gates", "up to a minute"):
          training.state = video_nets.begin_training(experiment, training.state, nets, train=train)
      training.begin(self.title)
      # Without a test on the way there is nothing to choose from.
      best = None
      if experiment.validation is not None and phase.settings.eval_every:
        best = opened.enter_context(BestState(run_dir.path / BEST_DIR))
      evaluate = functools.partial(self._evaluate, training, nets, best)
      try:
        ended = self._run(training, phase, train, evaluate=evaluate)
      finally:
        # Also of a training that was stopped or failed, in which no process may wait for others.
        if hosts.is_writer():
          write_unreadable(run_dir.path, self._unreadable())
      if not ended:
        return None
      step, variables = self._choose_state(training, run_dir.path, nets, best=best)
      result, behaviour = self._test(variables, training.say)
      if experiment.validation is not None:
        about = "minutes for large sets"
        with working("testing on training and validation videos", about, training.say):
          splits = video_evaluation.compare_splits(experiment, variables, result)
        result |= {"splits": splits, "last_step": training.step}
      # Only here: the other modes do not read these videos.
      result |= video_evaluation.count_unread(experiment.train, video_evaluation.TRAINING)
      validation = experiment.validation
      result |= video_evaluation.count_unread(validation, video_evaluation.VALIDATION)
      result |= video_evaluation.count_copies(experiment.train, validation, experiment.test)
      hosts.on_writer(write_unreadable, run_dir.path, self._unreadable())
      # Timed once, at the end: a test during training is not slowed down by it.
      result |= self._speed(variables)
      with working("drawing the report", "up to a minute"):
        self._note(training, result, behaviour)
        journal = training.journal
        hosts.on_writer(report.write_pictures, experiment, behaviour, run_dir, journal, step)
        hosts.on_writer(report.write_report, experiment, result, behaviour, run_dir, step)
      # The checkpoint of gate and classifier has no nets.
      if self.config.pretrained and self.config.training == "two_stage":
        hosts.on_writer(video_nets.keep_nets, self.config.pretrained, run_dir.path)
    return result | {"step": step}

  def _unreadable(self) -> dict[str, str]:
    """Returns the reason for each video of any split that could not be read, by its name."""
    found, experiment = {}, self.experiment
    for videos in (experiment.train, experiment.validation, experiment.test):
      found |= getattr(videos, "unreadable", {})
    return found

  def pretrain(self, run_dir: RunDir, started: float | None = None) -> dict[str, Any] | None:
    """Trains both nets on single segments; returns their variables, or None where it stopped.

    Args:
      run_dir: the run directory.
      started: as for `runner.Training`.
    """
    phase = self.experiment.pretraining
    if phase is None:
      raise ValueError("the config has no pretraining")
    with self._open(phase, run_dir.path / video_nets.PRETRAIN_DIR, started) as training:
      # A phase that has ended is not entered again: no journal, no compilation.
      if training.step < training.total_steps:
        training.begin("training both nets on single segments first")
        if not self._run(training, phase, self.experiment.train):
          return None
      return video_nets.variables_of(training.state)

  def test(self, step: int, variables: Any) -> dict[str, Any]:
    """Tests the whole network; returns its result, with its speed."""
    result, _ = self._test(variables, say)
    return result | self._speed(variables)

  def report(self, run_dir: RunDir, step: int, variables: Any, *, notice: str) -> dict[str, Any]:
    """Tests the whole network, and writes its page; returns the result."""
    result, behaviour = self._test(variables, say)
    result |= self._speed(variables)
    # Measured when the training ended; nothing here changes it.
    kept = run_dir.result() or {}
    if kept.get("step") == step:
      result |= {name: kept[name] for name in ("splits", "last_step") if name in kept}
    with working("drawing the report", "up to a minute"):
      hosts.on_writer(
        report.write_report, self.experiment, result, behaviour, run_dir, step, notice
      )
    return result

  def make_advance(self, phase: Phase, train: Any, first_step: int) -> Advance:
    """Builds `(state, step) -> (state, metrics)` of a phase, over all devices.

    Args:
      phase: the phase.
      train: its training set.
      first_step: the step from which training continues.
    """
    config = self.config
    k, batch = phase.settings.steps_per_dispatch, phase.batch_size
    process = (jax.process_index(), jax.process_count())

    def make_step(model):
      """Makes the training step of a model."""
      return steps.make_train_step(
        model,
        phase.optimiser,
        phase.objective,
        prepare=phase.prepare,
        seed=config.seed,
        axis_name=devices.AXIS,
      )

    def indices(step):
      """Returns the videos of the steps of one call, from its first step."""
      return process_indices(
        config.seed, step, k, batch_size=batch, examples=len(train), process=process
      )

    # Also with `phase.full`, for steps that choose more segments than the model's capacity.
    mapped = MappedSteps(make_step, phase.model, full=phase.full, backend=config.devices.backend)
    if isinstance(train, VideoArrays):
      # Arrays in memory: the whole set lies on every device, and steps take only indices.
      return mapped.on_resident(sets.examples(train.arrays), indices)
    # Videos on disk: batches come from worker threads, from the first step on.
    total = phase.settings.total_steps
    stream = train.batches(batch, first_step, k, total_steps=total, process=process)
    return mapped.on_stream(map(sets.examples, stream))

  def _open(self, phase: Phase, folder: Path, started: float | None) -> runner.Training:
    """Opens the training of a phase in its folder, with a clock that has `started`."""
    with working("making the networks", "up to half a minute"):
      fresh = video_nets.initial_state(phase, self.config.seed)
      return runner.Training(folder, fresh, phase.settings.total_steps, started=started)

  def _run(
    self,
    training: runner.Training,
    phase: Phase,
    train: Any,
    evaluate: Callable[[], None] | None = None,
  ) -> bool:
    """Takes the steps that are left of a phase; returns False where it was asked to stop."""
    return training.run(
      self.make_advance(phase, train, training.step),
      phase.settings,
      evaluate=evaluate,
      watch=watch_videos(self.config),
    )

  def _training_set(self, nets: Any) -> Any:
    """Returns the training set of gate and classifier: in `two_stage`, features of the nets."""
    train = self.experiment.train
    if self.config.training != "two_stage":
      return train
    with working(
      f"computing the features of {len(train):,} training videos", "minutes for large sets"
    ):
      variables = video_nets.placed_nets(self.experiment, nets)
      return video_evaluation.extract_features(self.experiment, variables)

  def _choose_state(
    self,
    training: runner.Training,
    folder: Path,
    nets: Any,
    *,
    best: BestState | None,
  ) -> tuple[int, Any]:
    """Returns `(step, variables)` of the state that a training ends with, and keeps which it is.

    It is the last one, or the one with the highest validation score where some were tested on the
    way.
    """
    step, state, is_best = training.step, training.state, False
    variables, own = self._with_thresholds(training, state, nets)
    if best is not None:
      score = self._validate(training, variables)
      found = None
      if best.score > score:
        found = restore_best(folder / BEST_DIR, self.fresh())
      if found is not None:
        step, state, is_best = found.step, found.state, True
        variables, own = self._with_thresholds(training, state, nets)
        training.say(
          f"taking the state of step {step}, with the best validation score: "
          f"{format_percent(best.score, 2)}, {format_percent(score, 2)} at the end"
        )
    # Without validation there is nothing to choose, and the last state is taken as it is.
    if self.experiment.validation is not None:
      thresholds.store(folder, thresholds.Chosen(step, is_best, own))
    return step, variables

  def _with_thresholds(
    self, training: runner.Training, state: TrainState, nets: Any
  ) -> tuple[Any, dict[str, float]]:
    """Returns the variables of the whole network at its thresholds, and these."""
    variables = video_nets.whole_network(self.experiment, state, nets)
    if self.experiment.validation is None:
      return variables, {}
    about = "programs are compiled first, up to a minute"
    with working("setting thresholds on validation videos", about, training.say):
      own = thresholds.find_thresholds(self.experiment, variables)
    return thresholds.apply_thresholds(variables, own), own

  def _validate(self, training: runner.Training, variables: Any) -> float:
    """Tests on the validation videos, notes the result in the journal, and returns the score."""
    with working("testing on validation videos", "up to a minute", training.say):
      result, _ = video_evaluation.test_network(
        self.experiment, variables, video_evaluation.VALIDATION
      )
    training.journal.write(training.step, video_evaluation.VALIDATION, numbers(result))
    return thresholds.score_of(result)

  def _evaluate(self, training: runner.Training, nets: Any, best: BestState | None) -> None:
    """Tests the state of a training, notes the result in the journal, and keeps the best state."""
    variables, _ = self._with_thresholds(training, training.state, nets)
    if best is not None:
      best.offer(training.step, training.state, self._validate(training, variables))
    result, behaviour = self._test(variables, training.say)
    self._note(training, result, behaviour)
    training.say(tables.video_headline(result))

  def _test(
    self, variables: Any, tell: Callable[[str], None]
  ) -> tuple[dict[str, Any], video_evaluation.Arrays]:
    """Tests the whole network on every test video, as `video.evaluate.test_network` does."""
    about = "programs are compiled first, up to a minute"
    with working(f"testing on {len(self.experiment.test):,} videos", about, tell):
      return video_evaluation.test_network(self.experiment, variables, video_evaluation.TEST)

  def _speed(self, variables: Any) -> dict[str, float]:
    """Times the whole network, as `video.speed.speed` does, unless the config says not to."""
    if self.config.speed is False:
      return {}
    with working("timing runs that skip segments", "up to a minute"):
      return speed.speed(self.experiment, variables)

  def _note(
    self, training: runner.Training, result: Mapping[str, Any], behaviour: video_evaluation.Arrays
  ) -> None:
    """Writes a test's numbers and histograms to the journal."""
    training.journal.write(training.step, "test", numbers(result))
    histograms = report.count_histograms(self.experiment, behaviour)
    training.journal.write_histograms(training.step, "test", histograms)


def watch_videos(config: Config) -> ClosingWatch:
  """Returns the watch over the gate of segments and the channel gates of the heavy net."""
  limits, loss = [], config.loss
  if config.model.selection == "gate":
    advice = (
      f"{advise_lower('loss', loss.sparsity)} or loss.sparsity.kind=target, or raise "
      f"loss.batch_shaping.coefficient (now {loss.batch_shaping.coefficient:g})"
    )
    limits.append(Limit(SEGMENTS_CLOSED, MOST_CLOSED, advice, subject="segments"))
  if config.model.heavy.gating != "none":
    advice = advise_on_loss("loss.channels", loss.channels, shaped=True)
    most, subject = accepted_fraction(loss.channels.sparsity), "heavy net's channel gates"
    limits.append(Limit(f"channels_{CLOSED}", most, advice, subject=subject))
  return ClosingWatch(limits)
