"""Scores, cost and gates of each source, by hand."""

import numpy as np
import pytest

from gating_jax.analysis.sources import ImageOutcomes, open_overlap, score_sources

# Three classes of two sources, and a third source whose class has no image.
SOURCES = np.array([0, 0, 1, 2])
LABELS = np.array([0, 0, 1, 2, 2])
PREDICTED = np.array([0, 2, 0, 2, 2])
MACS = np.array([10.0, 20.0, 30.0, 50.0, 70.0])
# Gate 0 is open for class 0, gate 1 for half of it and for class 2.
RATES = np.array([[1.0, 0.5], [0.0, 0.0], [0.0, 1.0], [np.nan, np.nan]])


def score(known=False, **changes):
  outcomes = ImageOutcomes(LABELS, PREDICTED, MACS, **changes)
  return score_sources(outcomes, ["a", "b", "c"], SOURCES, ungated_macs=100, known=known)


def test_each_source_has_the_score_and_cost_of_its_own_images():
  found = score()
  assert list(found["sets"]) == ["a", "b"]
  a, b = found["sets"]["a"], found["sets"]["b"]
  assert (a["images"], a["accuracy"], a["recognised"], a["macs"]) == (3, 1 / 3, 2 / 3, 20)
  assert (b["images"], b["accuracy"], b["recognised"], b["mac_ratio"]) == (2, 1, 1, 0.6)
  assert a["accuracy_low"] < 1 / 3 < a["accuracy_high"]
  assert found["mean_set_accuracy"] == pytest.approx(2 / 3)
  assert found["mean_set_macs"] == 40
  assert "set_overlap" not in found
  # A known source is not recognised.
  assert "recognised" not in score(known=True)["sets"]["a"]


def test_gates_of_sources_are_those_of_their_images():
  found = score(class_rates=RATES)
  # Of three images of the first source, two open gate 0 and one gate 1.
  assert found["sets"]["a"]["mean_open"] == pytest.approx((2 / 3 + 1 / 3) / 2)
  assert found["sets"]["b"]["mean_open"] == 0.5
  overlap = (0 + 1 / 3) / (2 / 3 + 1)
  np.testing.assert_allclose(
    found["set_overlap"], [[1, overlap, 0], [overlap, 1, 0], [0, 0, 1]], rtol=1e-12
  )
  # The source without an image is left out.
  assert found["mean_set_overlap"] == pytest.approx(overlap)


def test_gates_that_follow_the_source_have_its_information():
  labels = np.repeat([0, 1], 500)
  rates = np.array([[1.0, 0.5], [0.0, 0.5]])
  outcomes = ImageOutcomes(labels, labels, np.ones(1000), rates)
  found = score_sources(outcomes, ["a", "b"], np.array([0, 1]), ungated_macs=1)
  assert found["source_information"] == pytest.approx(0.5, abs=1e-3)


def test_overlap_is_one_for_equal_rates_and_zero_for_closed_gates():
  assert open_overlap(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == 1
  assert open_overlap(np.zeros(2), np.zeros(2)) == 0
