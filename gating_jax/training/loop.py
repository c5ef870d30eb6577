"""The training loop: dispatch, check, log, checkpoint, stop. It knows nothing of models or data."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np

from gating_jax.training import hosts
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal
from gating_jax.training.wording import headline


class NonFiniteError(Exception):
  """A loss term or gradient became NaN or infinite; the message names step and term."""


class StopRequest:
  """Turns SIGTERM and Ctrl-C, within a `with` block, into a flag that the loop looks at.

  A second Ctrl-C interrupts at once. Python handles signals on the main thread alone: on another one, as in a server,
  whoever started that thread handles them, and nothing is changed here.
  """

  def __init__(self):
    self.requested = False
    self._previous = {}

  def __enter__(self) -> StopRequest:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        # A handler that was not set from Python is seen as None, and could not be put back.
        if signal.getsignal(number) is not None:
          self._previous[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _request(self, number: int, _frame: FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """How often what happens, in steps.

  Attributes:
    total_steps: a multiple of `steps_per_dispatch`.
    steps_per_dispatch: steps that one call of `advance` takes.
    log_every, checkpoint_every: at least every so many steps, at the end of a call; >= 1.
    eval_every: likewise; 0 for never.
  """

  total_steps: int
  steps_per_dispatch: int = 1
  log_every: int = 50
  checkpoint_every: int = 1000
  eval_every: int = 0

  def __post_init__(self):
    for name in ("total_steps", "steps_per_dispatch", "log_every", "checkpoint_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
    if self.eval_every < 0:
      raise ValueError(f"eval_every must be >= 0; got {self.eval_every}")
    if self.total_steps % self.steps_per_dispatch:
      raise ValueError(
        f"total_steps must be a multiple of steps_per_dispatch; got {self.total_steps} "
        f"and {self.steps_per_dispatch}"
      )


def train(
  state: Any,
  first_step: int,
  advance: Callable[[Any, int], tuple[Any, Mapping[str, jax.Array]]],
  *,
  settings: LoopSettings,
  checkpoints: Checkpoints,
  journal: Journal,
  evaluate: Callable[[Any, int], None] | None = None,
  watch: Callable[[int, Mapping[str, float]], Sequence[str]] = lambda step, means: (),
) -> tuple[Any, int]:
  """Trains from `first_step` to the end, or to a SIGTERM or Ctrl-C; a checkpoint is on disk for where it stopped.

  Args:
    state: as of `first_step`.
    first_step: steps already taken.
    advance: `(state, step) -> (state, metrics)`, takes `steps_per_dispatch` steps from `step`; metrics are `[K]`.
    settings: see there.
    checkpoints: where states go.
    journal: where metrics go: the mean over the steps since the last line.
    evaluate: `(state, step)`, called every `eval_every` steps but not at the end.
    watch: `(step, means)`, what the log says after the line of these means, such as warnings. It is first called with
      the lines that the journal has of a run that is resumed, of which nothing is said again.
  Returns:
    `(state, step)`; `step < settings.total_steps` if it was asked to stop.
  Raises:
    NonFiniteError: in which case nothing that followed the last finite step was saved.
  """
  k, step = settings.steps_per_dispatch, first_step
  pending, since_log = None, []
  for earlier, means in journal.past:
    watch(earlier, means)

  def settle():
    """Checks the metrics of the call before this one, so that the device is never waited for needlessly."""
    nonlocal pending
    if pending is not None:
      at, values = pending[0], jax.device_get(pending[1])
      _check_finite(at, values)
      since_log.append(values)
      pending = None

  with StopRequest() as stop:
    while step < settings.total_steps:
      # Several processes must stop at the same step.
      if (jax.process_count() == 1 or _due(step, k, settings.log_every)) and hosts.any_of(
        stop.requested
      ):
        break
      state, metrics = advance(state, step)
      settle()
      pending = (step, metrics)
      step += k
      journal.progress(step)
      if _due(step, k, settings.log_every) or step == settings.total_steps:
        settle()
        means = {name: float(np.mean([v[name] for v in since_log])) for name in since_log[0]}
        since_log.clear()
        journal.write(step, "train", means)
        journal.say(step, headline(means))
        for warning in watch(step, means):
          journal.say(step, warning)
      if (
        evaluate
        and settings.eval_every
        and _due(step, k, settings.eval_every)
        and step < settings.total_steps
      ):
        evaluate(
          state, step
        )  # before the checkpoint: a restart from there does not come back to it
      if _due(step, k, settings.checkpoint_every) and step < settings.total_steps:
        settle()
        checkpoints.save(step, state)
    settle()
    if step > first_step:
      checkpoints.save(step, state)
    checkpoints.wait()
  return state, step


def _due(step: int, k: int, every: int) -> bool:
  """Whether the last k steps reached a multiple of `every`."""
  return step // every > (step - k) // every


def _check_finite(step: int, values: Mapping[str, np.ndarray]) -> None:
  for offset in range(len(next(iter(values.values())))):
    bad = [
      name for name, value in values.items() if "/" not in name and not math.isfinite(value[offset])
    ]
    if bad:
      # The terms say more than their total.
      name = next((b for b in bad if b not in ("loss", "gradient_norm", "state_norm")), bad[0])
      raise NonFiniteError(
        f"{name} is {values[name][offset]} at step {step + offset + 1} (not finite: {', '.join(bad)}); nothing of "
        "that step or later was saved. A lower optim.learning_rate may help."
      )
