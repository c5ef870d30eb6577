"""`--mode=curve`: accuracy against MACs of one trained network, by moving its gates' thresholds.

A network whose gates open by quantiles has one threshold for each layer. Moving all of them by the
same amount opens or closes units everywhere: one network serves several budgets, without training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gating_jax.data import image_sets
from gating_jax.images.build import Experiment
from gating_jax.images.compile import check_compilable
from gating_jax.layers.gate import shift_thresholds
from gating_jax.reports import conclusion
from gating_jax.terminal import say, working
from gating_jax.training import evaluation, rundir, steps
from gating_jax.training.journal import write_json

FILE = "curve.json"
# In units of the logits; 0 is the network as it was trained.
SHIFTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


class CurvePoint(NamedTuple):
  """A network at one shift of its thresholds.

  Attributes:
    shift: of the thresholds.
    accuracy: on the test set, as a fraction.
    macs: mean MACs of an image, gate networks included.
    mac_ratio: the same as a fraction of those with every gate open, without gate networks.
  """

  shift: float
  accuracy: float
  macs: float
  mac_ratio: float


def trace_curve(
  experiment: Experiment, variables: Mapping[str, Any], shifts: Sequence[float] = SHIFTS
) -> Iterator[CurvePoint]:
  """Tests a trained classifier at each shift of its thresholds.

  Args:
    experiment: its experiment.
    variables: its `params` and `batch_stats`.
    shifts: of all thresholds, see `layers.gate.shift_thresholds`.
  Raises:
    ValueError: its gates have no thresholds.
  """

  # Outside of a mapping over devices: evaluation needs no statistics of a batch.
  def scores(logits, labels):
    """Returns the results of each image among the classes that compete."""
    return steps.image_scores(experiment.competing(logits, labels), labels)

  run = jax.jit(steps.make_eval_step(experiment.model, experiment.normalise, scores))
  for shift in shifts:
    moved = shift_thresholds(variables, shift=shift)
    state = steps.TrainState(
      step=jnp.zeros((), jnp.int32),
      params=moved.get("params", {}),
      batch_stats=moved["batch_stats"],
      opt_state=(),
    )
    result = evaluation.evaluate(
      lambda *batch, state=state: run(state, *batch),
      image_sets.padded_batches(experiment.test, experiment.config.optim.batch_size),
      experiment.counts,
      classes=len(experiment.test.class_names),
      # Evaluation draws nothing.
      noise_scale=0.0,
    ).result
    yield CurvePoint(
      shift, accuracy=result["accuracy"], macs=result["macs"], mac_ratio=result["mac_ratio"]
    )


def curve_run(
  experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]
) -> None:
  """Writes `curve.json` with the points of the curve, and prints them.

  Args:
    experiment: the experiment of the run.
    run_dir: the run directory.
    step: the step of the checkpoint.
    variables: its parameters and statistics.
  Raises:
    ValueError: as in `trace_curve`.
  """
  # Refused before the network is tested.
  shift_thresholds(variables, shift=0.0)
  with working(f"testing at {len(SHIFTS)} thresholds", "the time of as many tests"):
    points = list(trace_curve(experiment, variables))
  file = run_dir.path / FILE
  write_json(file, {"step": step, "points": [point._asdict() for point in points]})
  rows = []
  for point in points:
    value = f"{100 * point.accuracy:.2f} %, {point.macs:,.0f} MACs ({100 * point.mac_ratio:.1f} %)"
    rows.append((f"thresholds {point.shift:+.1f}", value))
  done = f"Traced accuracy against MACs of the checkpoint of step {step:,}, in {file}."
  # Both fold the network, which not all can be.
  refused = conclusion.refusal(check_compilable, experiment.model)
  commands = conclusion.next_commands(run_dir.path, () if refused else ("compile", "export"))
  say(conclusion.closing_text(done, rows, commands))
