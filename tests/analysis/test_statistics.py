"""Sums over batches, correlations and spreads of MACs, on arrays made by hand."""

import numpy as np
import pytest

from gating_jax.analysis import statistics


def test_sums_over_batches_are_those_of_all_images():
  logits = np.random.default_rng(0).normal(0.5, 1, (50, 4)).astype(np.float32)
  logits[:, 3] = 1
  counter = statistics.GateCounter(4)
  for batch in np.split(logits, [7, 30]):
    counter.add(batch)
  found, gates = counter.result(), logits > 0
  assert found.images == 50
  np.testing.assert_array_equal(found.opened, gates.sum(axis=0))
  np.testing.assert_array_equal(found.together, gates.T.astype(int) @ gates)
  np.testing.assert_array_equal(found.highest, logits.max(axis=0))
  np.testing.assert_array_equal(found.lowest, logits.min(axis=0))
  np.testing.assert_array_equal(found.always_open, [False, False, False, True])
  np.testing.assert_array_equal(found.varies, [True, True, True, False])
  np.testing.assert_allclose(found.correlation[:3, :3], np.corrcoef(gates[:, :3].T), atol=1e-12)
  assert not found.correlation[3].any()


def test_histograms_are_of_open_probabilities_and_of_open_rates():
  logits = [np.array([[-9.0, 9.0], [9.0, 9.0]]), np.array([[0.0]])]
  found = statistics.layer_histograms(["a", "b"], logits, [np.array([0.5, 1.0]), np.array([1.0])])
  assert list(found) == [
    "gates/a/probs",
    "gates/a/open_rates",
    "gates/b/probs",
    "gates/b/open_rates",
  ]
  assert found["gates/a/probs"][[0, -1]].tolist() == [1, 3]
  assert np.flatnonzero(found["gates/b/probs"]).tolist() == [statistics.BINS // 2]


def test_hard_images_are_those_of_large_loss():
  losses = np.array([0.1, 4.0, 0.3, 2.0, 0.2, 3.0, 0.4, 1.0])
  macs = np.where(losses >= 1, 900.0, 100.0) + 10 * losses
  spread = statistics.mac_spread(macs, losses)
  assert [spread[f"macs_of_quarter{i}"] for i in (1, 2, 3, 4)] == pytest.approx(
    [101.5, 103.5, 915, 935]
  )
  assert (spread["macs_min"], spread["macs_max"]) == (101, 940)
  backwards = statistics.mac_spread(macs, -losses)
  assert backwards["macs_of_quarter1"] == pytest.approx(935)
  assert backwards["macs_p50"] == spread["macs_p50"] == pytest.approx((104 + 910) / 2)
