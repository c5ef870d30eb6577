import json
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest

from gating_jax.models.timegate import THRESHOLDS
from gating_jax.training.rundir import RunDirError
from gating_jax.video import thresholds
from gating_jax.video.thresholds import Chosen

VARIABLES = {
  "params": {
    "gate": {"logits": {"kernel": np.ones((2, 1)), "bias": np.array([0.5], np.float32)}},
    "heavy": {"w": np.ones(3)},
  },
  "batch_stats": {},
}


def test_the_threshold_of_a_gate_is_taken_off_its_bias_and_nothing_else_changes():
  moved = thresholds.apply_thresholds(VARIABLES, {"gate": 2.0})
  assert moved["params"]["gate"]["logits"]["bias"].tolist() == [-1.5]
  assert (
    moved["params"]["gate"]["logits"]["kernel"] is VARIABLES["params"]["gate"]["logits"]["kernel"]
  )
  assert moved["params"]["heavy"] is VARIABLES["params"]["heavy"]
  assert VARIABLES["params"]["gate"]["logits"]["bias"].tolist() == [0.5]


def test_the_threshold_of_a_confidence_is_a_variable_of_its_own():
  moved = thresholds.apply_thresholds(VARIABLES, {"confidence": 0.75})
  assert float(moved[THRESHOLDS]["confidence"]) == 0.75
  assert moved["params"] is VARIABLES["params"]
  assert thresholds.apply_thresholds(VARIABLES, {}) is VARIABLES


def test_a_chosen_state_is_read_as_it_was_kept(tmp_path):
  assert thresholds.load(tmp_path) is None
  chosen = Chosen(7, True, {"gate": -0.25})
  thresholds.store(tmp_path, chosen)
  assert thresholds.load(tmp_path) == chosen


@pytest.mark.parametrize(
  "content",
  [
    [],
    {"step": 1, "is_best": True},
    {"step": True, "is_best": True, "thresholds": {}},
    {"step": 1, "is_best": 0, "thresholds": {}},
    {"step": 1, "is_best": True, "thresholds": {"gates": 1.0}},
    {"step": 1, "is_best": True, "thresholds": {"gate": "1"}},
  ],
)
def test_a_damaged_file_of_the_chosen_state_is_named(tmp_path, content):
  (tmp_path / "chosen.json").write_text(json.dumps(content))
  with pytest.raises(RunDirError, match=r"chosen.json is damaged: it must hold step, is_best and"):
    thresholds.load(tmp_path)


def test_scores_are_compared_by_accuracy_or_else_by_mean_average_precision():
  assert thresholds.score_of({"accuracy": 0.5, "share": 1.0}) == 0.5
  assert thresholds.score_of({"mean_average_precision": 0.25}) == 0.25


def test_a_threshold_needs_videos_that_can_be_read(monkeypatch):
  config = ml_collections.ConfigDict(
    {"model": {"selection": "gate"}, "loss": {"sparsity": {"kind": "target", "target": 0.5}}}
  )
  found = {
    "weight": np.array([0.0, 1.0]),
    "score": np.array([[9.0, 9.0], [1.0, 3.0]]),
    "valid": np.ones((2, 2), bool),
  }
  monkeypatch.setattr(thresholds.evaluate, "compute_over", lambda *_, **__: found)
  experiment = SimpleNamespace(config=config, validation="films")
  # Of the one that can be read, half of the segments pass.
  assert 1 <= thresholds.find_thresholds(experiment, {})["gate"] < 3
  found["weight"][:] = 0
  with pytest.raises(ValueError, match="data.validation: none of 2 validation videos could be re"):
    thresholds.find_thresholds(experiment, {})
