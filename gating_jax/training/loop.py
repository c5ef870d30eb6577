"""The training loop: dispatch, check, log, checkpoint, stop; independent of models and data."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gating_jax.config_files import Config
from gating_jax.terminal import ticking
from gating_jax.training import hosts
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal, describe_metrics
from gating_jax.training.stopping import StopRequest

# Seconds without a line, after which the step reached is printed, and between looks at the clock.
# A little more than `terminal.working` leaves between its lines.
_SILENCE, _LOOK = 10.5, 1.0
# Metrics over all terms of the loss, or over all parameters.
_TOTALS = ("loss", "gradient_norm", "state_norm")


class NonFiniteError(Exception):
  """The error of a NaN or infinite loss term or gradient; its message names step and term."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
  """Settings of the loop, in steps.

  Attributes:
    total_steps: a multiple of `steps_per_dispatch`.
    steps_per_dispatch: steps that one call of `advance` takes.
    log_every, checkpoint_every: at least every so many steps, at the end of a call; >= 1.
    eval_every: in the same way; 0 for never.
    eval_from: the step from which `eval_every` counts.
  """

  total_steps: int
  steps_per_dispatch: int = 1
  log_every: int = 50
  checkpoint_every: int = 1000
  eval_every: int = 0
  eval_from: int = 0

  @classmethod
  def from_config(cls, config: Config, *, epochs: int, steps_per_epoch: int) -> LoopSettings:
    """Converts the epochs of a config to steps, rounded up to whole dispatches.

    Args:
      config: with `devices.steps_per_dispatch` and `log_every`, in steps; and `checkpoint_every`
        and `eval_every`, in epochs.
      epochs: epochs of the training.
      steps_per_epoch: steps of an epoch.
    """
    per_dispatch = config.devices.steps_per_dispatch
    # An interval that is shorter than a step is a step; evaluations alone may be turned off.
    return cls(
      total_steps=math.ceil(epochs * steps_per_epoch / per_dispatch) * per_dispatch,
      steps_per_dispatch=per_dispatch,
      log_every=config.log_every,
      checkpoint_every=max(1, round(config.checkpoint_every * steps_per_epoch)),
      eval_every=max(1, round(config.eval_every * steps_per_epoch)) if config.eval_every else 0,
    )

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
  stop: StopRequest | None = None,
) -> tuple[Any, int]:
  """Trains from `first_step` to the end, or until a SIGTERM or Ctrl-C.

  A checkpoint is on disk for the step where it stopped.

  Args:
    state: the state at `first_step`.
    first_step: steps already taken.
    advance: `(state, step) -> (state, metrics)`, takes `steps_per_dispatch` steps from `step`;
      metrics are `[K]`.
    settings: see there.
    checkpoints: receives the states.
    journal: receives the metrics: their mean over the steps since the last line.
    evaluate: `(state, step)`, called every `eval_every` steps but not at the end.
    watch: `(step, means)`, returns lines for the log after the line of these means, such as
      warnings. It is first called with the lines that the journal has of a run that is resumed;
      their results are dropped.
    stop: the request to heed, which then says who asked; None for one of its own.
  Returns:
    `(state, step)`; `step < settings.total_steps` if it was asked to stop.
  Raises:
    NonFiniteError: a metric is not finite; nothing that followed the last finite step was saved.
  """
  k, step = settings.steps_per_dispatch, first_step
  pending, since_log, doing = None, [], "training"
  for earlier, means in journal.past:
    watch(earlier, means)

  def settle():
    """Checks the metrics of the previous call: the device has computed them meanwhile."""
    nonlocal pending
    if pending is not None:
      at, values = pending[0], jax.device_get(pending[1])
      _check_finite(at, values)
      since_log.append(values)
      pending = None

  def break_silence():
    """Tells the step reached: the wait for slow steps must not be a long silence."""
    if journal.silence() > _SILENCE:
      journal.say(step, doing)

  with stop or StopRequest() as stop, ticking(break_silence, _LOOK):
    while step < settings.total_steps:
      # Several processes must stop at the same step.
      if (jax.process_count() == 1 or _due(step, k, settings.log_every)) and hosts.any_of(
        stop.requested
      ):
        stop.answer()
        break
      # Dispatched before the previous metrics are read: the device computes meanwhile.
      state, metrics = advance(state, step)
      settle()
      pending = (step, metrics)
      step += k
      journal.progress(step)
      if _due(step, k, settings.log_every) or step == settings.total_steps:
        settle()
        means = _means(since_log)
        since_log.clear()
        journal.write(step, "train", means)
        journal.say(step, describe_metrics(means))
        for warning in watch(step, means):
          journal.say(step, warning)
      if (
        evaluate
        and settings.eval_every
        and _due(step - settings.eval_from, k, settings.eval_every)
        and step < settings.total_steps
      ):
        # Before the checkpoint: a restart from there would skip this evaluation.
        doing = "testing"
        # A test may keep the state, which must then be finite.
        settle()
        evaluate(state, step)
        doing = "training"
      if _due(step, k, settings.checkpoint_every) and step < settings.total_steps:
        # No state is saved before its metrics are known to be finite.
        settle()
        checkpoints.save(step, state)
    settle()
    # Without a step, the checkpoint that training began from is the newest state.
    if step > first_step:
      checkpoints.save(step, state)
    checkpoints.wait()
  return state, step


def _due(step: int, k: int, every: int) -> bool:
  """Returns whether the last k steps reached a multiple of `every`."""
  return step // every > (step - k) // every


def _means(calls: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
  """Returns the means of metrics, `[K]` in each call, over all steps of the calls."""
  means = {}
  for name in calls[0]:
    means[name] = float(np.mean([metrics[name] for metrics in calls]))
  return means


def _check_finite(step: int, values: Mapping[str, np.ndarray]) -> None:
  """Raises a NonFiniteError for the first of these steps with a value that is not finite.

  Args:
    step: the steps before the first one.
    values: metrics `[K]`; those with a slash in their names, which describe gates, are not checked.
  """
  # By step, the metrics that are not finite.
  bad = collections.defaultdict(list)
  for name, value in values.items():
    if "/" not in name:
      for offset in np.flatnonzero(~np.isfinite(value)):
        bad[int(offset)].append(name)
  if not bad:
    return
  offset = min(bad)
  # A term says more than the total, so the error names a term where one is not finite.
  terms = [name for name in bad[offset] if name not in _TOTALS]
  name = (terms or bad[offset])[0]
  raise NonFiniteError(
    f"{name} is {values[name][offset]} at step {step + offset + 1} (not finite: "
    f"{', '.join(bad[offset])}); nothing from that step on was saved. A lower "
    "optim.learning_rate may help."
  )
