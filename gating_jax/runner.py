"""One runner for all programmes: their modes, resumed trainings, messages and closing lines.

A programme (classification, segmentation, continual learning, long videos) describes its experiment
as a `Programme`; everything that does not depend on the programme is here.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gating_jax import interrupts
from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.reports import conclusion
from gating_jax.terminal import TRAINING, Pace, lasting, say, working
from gating_jax.training import hosts, loop, outlines, provenance, rundir, stopping
from gating_jax.training.checkpoints import Checkpoint, Checkpoints, restore_newest
from gating_jax.training.journal import Journal
from gating_jax.training.rundir import RunDir, RunDirError
from gating_jax.training.steps import Advance


class Programme(abc.ABC):
  """An experiment as the runner needs it: how it trains, how it is tested, and what it reports.

  Attributes:
    experiment: the parts of the run, with its `config`.
    modes: further modes by name: functions `(experiment, run_dir, step, variables)` that write
      something of the newest checkpoint.
    untrained: the beginning of the error for a run that cannot be tested yet.
  """

  experiment: Any
  modes: Mapping[str, Callable[..., None]] = {}
  untrained: str = "no checkpoint"

  @property
  def config(self) -> Config:
    """Returns the config of the run."""
    return self.experiment.config

  @property
  def model(self) -> Any:
    """Returns what is trained, as `load_run` returns it."""
    return self.experiment.model

  @property
  def class_names(self) -> Sequence[str]:
    """Returns the names of the classes, which a run keeps from its beginning; empty for none."""
    return ()

  @abc.abstractmethod
  def fresh(self) -> Any:
    """Creates the state with which training begins."""

  @abc.abstractmethod
  def train(self, run_dir: RunDir) -> dict[str, Any] | None:
    """Trains to the end, from wherever the run stands, by `Training`s.

    Returns:
      the result, with the last `step`; None where the training was asked to stop.
    """

  @abc.abstractmethod
  def test(self, step: int, state: Any) -> dict[str, Any]:
    """Tests a state of `restore`; returns its result."""

  @abc.abstractmethod
  def report(self, run_dir: RunDir, step: int, state: Any, *, notice: str) -> dict[str, Any]:
    """Writes the page of a state of `restore`; returns its result.

    Args:
      run_dir: the run directory.
      step: the step of the state.
      state: a state of `restore`.
      notice: the first line of the page; empty for none.
    """

  @property
  @abc.abstractmethod
  def title(self) -> str:
    """Describes the network and the data, for a sentence about them."""

  @abc.abstractmethod
  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the whole result as text."""

  @abc.abstractmethod
  def main_numbers(self, result: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Returns names and values for the closing lines, the most important first."""

  @abc.abstractmethod
  def next_modes(self) -> Sequence[str]:
    """Returns the modes that may follow, among those that work on this network."""

  def describe(self, result: Mapping[str, Any]) -> str:
    """Describes the network that has this result; `title` where all results are of the same."""
    return self.title

  def restore(self, run_dir: RunDir) -> Checkpoint | None:
    """Restores the newest checkpoint of a run, which may be training; None where there is none."""
    return restore_newest(run_dir.checkpoints, self.fresh())

  def variables(self, state: Any) -> Any:
    """Returns what the trained network needs of a state of `restore`, on the host."""
    return jax.device_get(state)


@contextlib.contextmanager
def opening_data(
  programme: type[Programme], config: Config, workdir: Path, *, mode: str
) -> Iterator[None]:
  """Announces that the block opens the data of a run, which may take minutes.

  Whatever can be wrong without them is found before.

  Args:
    programme: the kind of programme.
    config, workdir, mode: as for its `run`.
  Raises:
    ValueError, RunDirError: as for `run`.
  """
  _check_mode(programme, mode)
  if mode == "train":
    rundir.check_usable(workdir, config)
  else:
    run_dir = rundir.existing_run(workdir, config, only_tested=mode == "evaluate")
    if not run_dir.has_checkpoint():
      raise RunDirError(_untrained(programme, run_dir))
  with working("opening the data", "minutes for large sets"):
    yield


def _check_mode(programme: Programme | type[Programme], mode: str) -> None:
  """Raises a ValueError unless a programme has the mode."""
  one_of("mode", mode, ("train", "evaluate", "report", *programme.modes))


def _untrained(programme: Programme | type[Programme], run_dir: RunDir) -> str:
  """Returns the error for a run that has no checkpoint to test."""
  return f"{programme.untrained} in {run_dir.checkpoints} yet"


def run(programme: Programme, workdir: Path, mode: str) -> None:
  """Runs a mode of a programme in a run directory.

  `train` trains to the end from wherever the run directory stands, and does nothing where the run
  is finished. The other modes read a run, which may be training: `evaluate` tests its newest
  checkpoint, `report` writes a page of it, and those of `programme.modes` write what they name.

  Args:
    programme: the programme with its experiment.
    workdir: the run directory.
    mode: one of these modes.
  Raises:
    ValueError: this programme does not have the mode.
    RunDirError: as for `rundir.open_run` and `rundir.existing_run`; or there is no checkpoint.
  """
  _check_mode(programme, mode)
  if mode == "train":
    with rundir.open_run(workdir, programme.config) as run_dir:
      _train(programme, run_dir)
    return
  run_dir = rundir.existing_run(workdir, programme.config, only_tested=mode == "evaluate")
  outlines.check_classes(run_dir.path, programme.class_names)
  if mode == "evaluate":
    _evaluate(programme, run_dir)
  elif mode == "report":
    _report(programme, run_dir, conclusion.failure_notice(run_dir))
  else:
    _make(programme, run_dir, programme.modes[mode])


def newest(programme: Programme, run_dir: RunDir, tell: Callable[[str], None] = say) -> Checkpoint:
  """Returns the newest checkpoint of a run; `tell` takes a line about it.

  Raises RunDirError where there is none to test.
  """
  with working("loading the newest checkpoint", "up to half a minute", tell):
    found = programme.restore(run_dir)
  if found is None:
    raise RunDirError(_untrained(programme, run_dir))
  return found


class Training:
  """A training in a folder, which resumes from its newest checkpoint.

  A context: at its end the journal and the checkpoints are closed.

  Attributes:
    folder: of the checkpoints' folder and the journal.
    state: the state that is reached.
    step: the steps that were taken to reach it.
    total_steps: all steps of the training.
    journal: its journal, from `begin` on.
  """

  def __init__(self, folder: Path, fresh: Any, total_steps: int, started: float | None = None):
    """Restores the newest checkpoint, or begins with a fresh state.

    Args:
      folder: of the checkpoints' folder and the journal.
      fresh: the state with which training begins.
      total_steps: all steps of the training.
      started: as for `Journal`: phases of one training share a clock.
    Raises:
      RunDirError: the newest checkpoint is of a later step.
      CheckpointError: there are checkpoints, and none can be read.
    """
    self.total_steps, self._started = total_steps, started
    self._journal: Journal | None = None
    self.folder = folder
    self._checkpoints = Checkpoints(folder / rundir.CHECKPOINT_DIR)
    self.step, self.state = self._checkpoints.resume(fresh)
    if self.step > total_steps:
      self._checkpoints.close()
      raise RunDirError(
        f"{folder} holds a checkpoint of step {self.step}, beyond the {total_steps} of this config"
      )

  def __enter__(self) -> Training:
    return self

  def __exit__(self, *_: object) -> None:
    if self._journal is not None:
      self._journal.close()
    self._checkpoints.close()

  def begin(self, title: str, others: Callable[[int], Mapping[str, int]] = lambda step: {}) -> None:
    """Opens the journal: from here on, a failure is one of the training and not of its settings.

    Args:
      title: the first line of the journal.
      others: the steps of other programs than the main one, as for `Pace`.
    """
    if self.step:
      say(f"resuming from the checkpoint of step {self.step} in {self.folder}")
    self._journal = Journal(self.folder, self.step, self.total_steps, started=self._started)
    self._pace = Pace(self.journal.say, self.total_steps, others)
    self.say(title)

  @property
  def journal(self) -> Journal:
    """Returns the journal, which `begin` opens."""
    if self._journal is None:
      raise ValueError("a training has no journal before it begins")
    return self._journal

  def say(self, text: str) -> None:
    """Prints a line, and keeps it in the journal, with the present step."""
    self.journal.say(self.step, text)

  def run(
    self,
    advance: Advance,
    settings: loop.LoopSettings,
    *,
    watch: Callable[[int, Mapping[str, float]], Sequence[str]],
    evaluate: Callable[[], Any] | None = None,
    program: str = TRAINING,
  ) -> bool:
    """Takes the steps that are left of a phase.

    Args:
      advance, watch: as for `loop.train`.
      settings: those of the loop; the phase ends with their `total_steps`.
      evaluate: tests the state reached, every `settings.eval_every` steps.
      program: the name of the program that `advance` runs.
    Returns:
      whether the phase has ended; False where the training was asked to stop, and said so.
    Raises:
      stopping.Interrupted: the same, where Ctrl-C asked.
    """
    stop = stopping.StopRequest()

    def evaluate_at(state, step):
      """Tests a state on the way."""
      self.state, self.step = state, step
      if evaluate is not None:
        evaluate()

    if self.step < settings.total_steps:
      self.state, self.step = loop.train(
        self.state,
        self.step,
        self._pace(advance, program),
        settings=settings,
        checkpoints=self._checkpoints,
        journal=self.journal,
        evaluate=evaluate_at if evaluate else None,
        watch=watch,
        stop=stop,
      )
    if self.step < settings.total_steps or stop.interrupted:
      self.say(f"stopped as asked; a checkpoint is saved, run {interrupts.same_command} to resume")
      # Whoever pressed Ctrl-C wants nothing that follows: no later cell, no next command.
      if stop.interrupted:
        raise stopping.Interrupted
      return False
    return True

  def save(self) -> None:
    """Saves the state and the step that were reached outside of `run`; then they are on disk."""
    self._checkpoints.save(self.step, self.state)
    self._checkpoints.wait()


def _train(programme: Programme, run_dir: RunDir) -> None:
  """Trains a run to its end, unless it is finished, and reports a training that fails."""
  if (result := run_dir.result()) is not None:
    with run_dir.reading_result():
      shown = programme.render(result)
      ended = closing_lines(programme, run_dir, result, done="A finished run of")
    say(
      f"{run_dir.path} holds a finished run of this config; nothing was trained or changed. "
      "Its result:"
    )
    say(shown)
    say(ended)
    return
  if run_dir.has_progress():
    outlines.check_classes(run_dir.path, programme.class_names)
  # Recorded under the lock, and only where training really starts.
  hosts.on_writer(provenance.record_start, run_dir.path)
  started = time.monotonic()
  report = functools.partial(_report, programme, run_dir)
  with conclusion.report_failures(run_dir, programme.config, report):
    result = programme.train(run_dir)
    # Asked to stop: the next start resumes the training.
    if result is None:
      return
    seconds = time.monotonic() - started
    result |= {"seconds_since_last_start": round(seconds, 1)}
    # The result marks the run as finished, so it is written after all other files.
    run_dir.finish(result)
    say(programme.render(result))
    done = f"Trained for {lasting(seconds)}"
    # A resumed run has trained for longer.
    if len(provenance.read_starts(run_dir.path)) > 1:
      done += " since the last start"
    say(closing_lines(programme, run_dir, result, done=f"{done}:"))


def _evaluate(programme: Programme, run_dir: RunDir) -> None:
  """Tests the newest checkpoint, and prints its result."""
  step, state = newest(programme, run_dir)
  say(f"checkpoint of step {step}")
  result = programme.test(step, state)
  say(programme.render(result))
  done = f"Tested the checkpoint of step {step:,} of"
  say(closing_lines(programme, run_dir, result, done=done))


def _report(programme: Programme, run_dir: RunDir, notice: str) -> None:
  """Writes the page of the newest checkpoint; `notice` is its first line."""
  step, state = newest(programme, run_dir)
  result = programme.report(run_dir, step, state, notice=notice)
  say(f"report of the checkpoint of step {step}: {run_dir.report}")
  done = f"Wrote the page of the checkpoint of step {step:,} of"
  say(closing_lines(programme, run_dir, result, done=done))


def _make(programme: Programme, run_dir: RunDir, make: Callable[..., None]) -> None:
  """Calls a mode's own function on the newest checkpoint, in one process."""
  step, state = newest(programme, run_dir)
  variables = programme.variables(state)
  # One process times and writes; the others wait for it.
  hosts.on_writer(make, programme.experiment, run_dir, step, variables)


def closing_lines(
  programme: Programme, run_dir: RunDir, result: Mapping[str, Any], *, done: str
) -> str:
  """Returns the last text of a mode: what was done, the main numbers, and the next command.

  Args:
    programme: the programme of the run.
    run_dir: the run directory.
    result: the result of a test.
    done: the beginning of a sentence about the network.
  """
  rows = [*programme.main_numbers(result), ("run directory:", str(run_dir.path))]
  # The page is written when a run ends, or by --mode=report.
  if run_dir.report.exists():
    rows.append(("page", f"{run_dir.report}, for a browser"))
  commands = conclusion.next_commands(run_dir.path, programme.next_modes())
  return conclusion.closing_text(f"{done} {programme.describe(result)}.", rows, commands)
