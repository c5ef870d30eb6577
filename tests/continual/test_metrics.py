import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.continual import metrics

NAN = np.nan
LEARNT = np.array([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.75, 0.5, 1.0]])
FULL = np.array([[0.9, 0.6, 0.2], [0.7, 0.8, 0.5], [0.75, 0.5, 1.0]])


def random_accuracies(tasks, seed):
  return np.random.default_rng(seed).integers(0, 11, (tasks, tasks)) / 10


def test_summary_by_hand():
  assert metrics.summarise(LEARNT) == metrics.Summary(
    average_accuracy=0.75,
    average_after=(0.9, 0.75, 0.75),
    forgetting=pytest.approx((0.15 + 0.3) / 2),
    backward_transfer=pytest.approx((-0.15 - 0.3) / 2),
    reasons={},
  )


def test_forgetting_is_of_the_best_accuracy_and_backward_transfer_of_the_first():
  gained_then_lost = np.array([[0.5, 0, 0], [0.9, 0.6, 0], [0.8, 0.7, 0.4]])
  summary = metrics.summarise(gained_then_lost)
  assert summary.forgetting == pytest.approx((0.1 - 0.1) / 2)
  assert summary.backward_transfer == pytest.approx((0.3 + 0.1) / 2)


def test_what_was_kept_bit_for_bit_is_forgotten_by_exactly_zero():
  kept = np.where(np.tri(7, dtype=bool), np.random.default_rng(0).random(7), NAN)
  summary = metrics.summarise(kept)
  assert summary.forgetting == summary.backward_transfer == 0


def test_one_task_has_an_average_only():
  reason = "there is only one task"
  assert metrics.summarise(np.array([[0.5]])) == metrics.Summary(
    average_accuracy=0.5,
    average_after=(0.5,),
    forgetting=None,
    backward_transfer=None,
    reasons=dict.fromkeys(("forgetting", "backward_transfer"), reason),
  )


def test_tasks_learnt_together_have_accuracies_at_the_end_only():
  together = np.where(np.arange(3)[:, None] == 2, FULL, NAN)
  reason = "all tasks are learnt together"
  assert metrics.summarise(together) == metrics.Summary(
    average_accuracy=0.75,
    average_after=(None, None, 0.75),
    forgetting=None,
    backward_transfer=None,
    reasons=dict.fromkeys(("forgetting", "backward_transfer"), reason),
  )
  together[2, 1] = NAN
  with pytest.raises(ValueError, match="known on every learnt task .*; got nan in row 2, column 1"):
    metrics.summarise(together)


@given(st.integers(2, 8), st.integers(0, 10**6))
def test_a_summary_agrees_with_loops_over_tasks(tasks, seed):
  r = random_accuracies(tasks, seed)
  summary, last = metrics.summarise(r), tasks - 1
  lost = [max(r[i, j] for i in range(last)) - r[last, j] for j in range(last)]
  assert summary.forgetting == pytest.approx(sum(lost) / last)
  assert summary.backward_transfer == pytest.approx(
    sum(r[last, j] - r[j, j] for j in range(last)) / last
  )
  assert (
    summary.average_after[-1] == summary.average_accuracy == pytest.approx(sum(r[last]) / tasks)
  )
  assert summary.average_after[0] == r[0, 0]


@given(st.integers(2, 8), st.integers(0, 10**6))
def test_at_least_what_backward_transfer_lost_is_forgotten(tasks, seed):
  r = np.where(np.tri(tasks, dtype=bool), random_accuracies(tasks, seed), NAN)
  summary = metrics.summarise(r)
  assert summary.forgetting >= -summary.backward_transfer - 1e-12
  json.dumps(vars(summary), allow_nan=False)


@pytest.mark.parametrize(
  ("accuracies", "message"),
  [
    (np.zeros((2, 3)), r"accuracies must be \[T, T\], T >= 1; got \(2, 3\)"),
    (np.zeros(4), r"accuracies must be \[T, T\], T >= 1; got \(4,\)"),
    (np.zeros((0, 0)), r"accuracies must be \[T, T\], T >= 1; got \(0, 0\)"),
    (
      np.array([[0.5, 0], [NAN, 0.5]]),
      r"accuracies must be known on every learnt task \(row i, columns up to i\); got nan in row "
      r"1, column 0",
    ),
    (np.array([[NAN]]), r"accuracies must be known on .*; got nan in row 0, column 0"),
    (
      np.array([[0.5, NAN], [0.5, 97.5]]),
      r"accuracies must be in \[0, 1\]; got 97.5 in row 1, column 1",
    ),
    (
      np.array([[0.5, -0.1], [0.5, 0.5]]),
      r"accuracies must be in \[0, 1\]; got -0.1 in row 0, column 1",
    ),
    (
      np.array([[0.5, np.inf], [0.5, 0.5]]),
      r"accuracies must be in \[0, 1\]; got inf in row 0, column 1",
    ),
  ],
)
def test_what_is_no_accuracy_matrix_is_named(accuracies, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    metrics.summarise(accuracies)


USED = np.array(
  [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool
)


def test_gate_overlap_by_hand():
  np.testing.assert_allclose(
    metrics.gate_overlap(USED),
    [
      [1, 1 / 3, 0, 1 / 2, 0],
      [1 / 3, 1, 0, 1 / 2, 0],
      [0, 0, 1, 0, 1],
      [1 / 2, 1 / 2, 0, 1, 0],
      [0, 0, 1, 0, 1],
    ],
    rtol=1e-15,
  )


def test_mean_overlap_is_of_pairs_of_tasks():
  assert metrics.mean_overlap(metrics.gate_overlap(USED)) == pytest.approx(
    (1 / 3 + 1 / 2 + 1 / 2 + 1) / 10
  )
  assert metrics.mean_overlap(np.ones((1, 1))) is None


def test_filter_use_by_hand():
  new, reused, free = metrics.filter_use(USED)
  assert new.tolist() == [2, 1, 0, 1, 0]
  assert reused.tolist() == [0, 1, 0, 3, 0]
  assert free.tolist() == [3, 2, 2, 1, 1]


@given(st.integers(1, 9), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10**6))
def test_overlap_is_symmetric_and_of_sets(tasks, units, rate, seed):
  used = np.random.default_rng(seed).random((tasks, units)) < rate
  overlap = metrics.gate_overlap(used)
  np.testing.assert_array_equal(overlap, overlap.T)
  for i, one in enumerate(used):
    for j, other in enumerate(used):
      one_set, other_set = set(np.flatnonzero(one)), set(np.flatnonzero(other))
      expected = len(one_set & other_set) / len(one_set | other_set) if one_set | other_set else 1
      assert overlap[i, j] == expected


@given(st.integers(1, 9), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10**6))
def test_counts_of_filters_add_up_to_the_units(tasks, units, rate, seed):
  relevant = np.random.default_rng(seed).random((tasks, units)) < rate
  new, reused, free = metrics.filter_use(relevant)
  np.testing.assert_array_equal(new + reused, relevant.sum(axis=1))
  np.testing.assert_array_equal(np.cumsum(new) + free, np.full(tasks, units))
  assert reused[0] == 0


@pytest.mark.parametrize("function", [metrics.gate_overlap, metrics.filter_use])
@pytest.mark.parametrize(
  "units", [np.zeros((2, 3)), np.zeros(3, bool), np.zeros((0, 3), bool), np.zeros((3, 0), bool)]
)
def test_what_is_no_table_of_units_is_named(function, units):
  name = {"gate_overlap": "is_open", "filter_use": "relevant"}[function.__name__]
  with pytest.raises(
    ValueError, match=rf"^{name} must be bool \[T, U\], T and U >= 1; got (bool|float64) \("
  ):
    function(units)
