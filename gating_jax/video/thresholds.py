"""Thresholds that meet a budget on videos held out of training, and the state that they choose.

A gate that meets its budget on training videos misses it on others, since it is surer of what it
has seen. So the threshold that a segment must pass is set on the split `validation`, and so is the
epoch where a run tests during training. `chosen.json` of a run directory keeps both.

Axes: M videos, T segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import is_number
from gating_jax.config_files import Config
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.timegate import THRESHOLDS
from gating_jax.ops import confidence
from gating_jax.training import devices, hosts, rundir
from gating_jax.training.journal import read_json, write_json
from gating_jax.video import evaluate
from gating_jax.video.build import VideoExperiment
from gating_jax.video.objectives import SET

CHOSEN_FILE = "chosen.json"
# Selections with a threshold in their variables.
_GATE, _CONFIDENCE = "gate", "confidence"


class Chosen(NamedTuple):
  """The state that a finished training ends with.

  Attributes:
    step: the number of steps that were taken to reach it.
    is_best: whether it is the one in `best_state.BEST_DIR`, and not the last.
    thresholds: by the selection's name; empty where nothing has a threshold.
  """

  step: int
  is_best: bool
  thresholds: Mapping[str, float]


def find_thresholds(experiment: VideoExperiment, variables: Any) -> dict[str, float]:
  """Finds the threshold at which the validation videos meet the budget.

  Returns:
    The threshold by the name of the selection. Empty where no videos are held out, or where the
    selection has no threshold or no budget to meet.
  Raises:
    ValueError: no validation video could be read.
  """
  name, videos = _has_threshold(experiment.config), experiment.validation
  if name is None or videos is None:
    return {}

  def score(variables, batch):
    """Returns the score `[B, T]` by which segments are chosen."""
    # The heavy net is left out: it does not choose.
    results: Any = experiment.model.apply(variables, experiment.prepare(batch), method="choose")
    record, outputs = results
    if name == _GATE:
      return {"score": record.logits}
    return {"score": jnp.max(jax.nn.softmax(outputs["light_logits"]), axis=-1)}

  found = evaluate.compute_over(experiment, score, variables, videos=videos, program="score")
  read = found["weight"] > 0
  if not read.any():
    raise ValueError(f"data.validation: none of {len(read)} validation videos could be read")
  scores, valid = found["score"][read], found["valid"][read]
  # No budget is below one segment of every video.
  one_each = float(np.mean(1 / valid.sum(axis=1)))
  share = max(_budget(experiment.config), one_each)
  return {name: confidence.open_threshold_for_budget(scores, valid, share=share)}


def _has_threshold(config: Config) -> str | None:
  """Returns the selection whose threshold is set on validation videos, or None."""
  selection = config.model.selection
  # A gate that is trained to no fraction has no budget.
  if selection == _GATE and config.loss.sparsity.kind == "target":
    return _GATE
  # Otherwise every video has the same fraction of its segments chosen.
  if selection == _CONFIDENCE and config.budget.scope == SET:
    return _CONFIDENCE
  return None


def _budget(config: Config) -> float:
  """Returns the fraction of segments that a run may choose."""
  if config.model.selection == _GATE:
    return config.loss.sparsity.target
  return config.model.segment_fraction


def apply_thresholds(variables: Mapping[str, Any], thresholds: Mapping[str, float]) -> Any:
  """Returns the variables of a whole network with these thresholds in place of its own.

  A gate opens above log-odds of 0, so its threshold is taken off the bias; its probabilities are
  then those of passing the threshold.
  """
  if _GATE in thresholds:
    gate = variables["params"][GATE_NAME]
    bias = gate["logits"]["bias"] - np.float32(thresholds[_GATE])
    gate = {**gate, "logits": {**gate["logits"], "bias": bias}}
    variables = {**variables, "params": {**variables["params"], GATE_NAME: gate}}
  if _CONFIDENCE in thresholds:
    least = devices.replicate(np.asarray(thresholds[_CONFIDENCE], np.float32))
    variables = {**variables, THRESHOLDS: {_CONFIDENCE: least}}
  return variables


def store(folder: Path, chosen: Chosen) -> None:
  """Keeps the chosen state in a run directory."""
  hosts.on_writer(write_json, folder / CHOSEN_FILE, chosen._asdict())


def load(folder: Path) -> Chosen | None:
  """Returns the chosen state of a run directory; None where the training has not ended.

  Raises:
    RunDirError: the file is damaged.
  """
  file = folder / CHOSEN_FILE
  if not file.exists():
    return None
  found = read_json(file)
  thresholds = found.get("thresholds") if isinstance(found, dict) else None
  known = (_GATE, _CONFIDENCE)
  if not (
    isinstance(thresholds, dict)
    and type(found.get("step")) is int
    and type(found.get("is_best")) is bool
    and all(name in known and is_number(value) for name, value in thresholds.items())
  ):
    raise rundir.RunDirError(
      f"{file} is damaged: it must hold step, is_best and thresholds of {' or '.join(known)}"
    )
  return Chosen(found["step"], found["is_best"], thresholds)


def score_of(result: Mapping[str, Any]) -> float:
  """Returns the score of a result by which states are compared."""
  # Videos with several labels have no accuracy.
  return result["accuracy"] if "accuracy" in result else result["mean_average_precision"]
