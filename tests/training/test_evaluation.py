import numpy as np
import pytest

from gating_jax.data import batches
from gating_jax.data.sources import Images
from gating_jax.models.counts import ModelCounts
from gating_jax.training import evaluation
from gating_jax.training.evaluation import GateCounts, gate_counts

COUNTS = ModelCounts(params=100, gate_params=10, gates=3, macs=1000, gate_macs=50, gated=600)
M = 37
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(M, 3)).astype(np.float32)
CORRECT = RANDOM.random(M) < 0.6


def images():
  """Each image's only pixel is its number."""
  return Images(np.arange(M, dtype=np.uint8).reshape(M, 1, 1, 1), np.zeros(M, np.int32), ("a",))


def run(pixels, _, gated=True):
  at = pixels.ravel()
  results = {"correct": CORRECT[at], "cross_entropy": at.astype(np.float32)}
  if gated:
    results |= {"gates": LOGITS[at] > 0, "gate_logits": LOGITS[at], "macs": 200.0 * (LOGITS[at] > 0).sum(axis=1)}
  return results


@pytest.mark.parametrize("batch_size", [1, 2, 7, 36, 37, 38, 1000])
def test_every_image_counts_once(batch_size):
  result, behaviour = evaluation.evaluate(run, batches.cover(images(), batch_size), COUNTS)
  rates = (LOGITS > 0).mean(axis=0)
  assert 0 < CORRECT.mean() < 1
  assert np.all((rates > 0.01) & (rates < 0.99))
  macs = 1000 - 600 + 50 + 200 * 3 * rates.mean()
  assert result == pytest.approx({
      "accuracy": CORRECT.mean(), "cross_entropy": 18, "images": 37, "params": 100, "gate_params": 10,
      "ungated_macs": 1000, "macs": macs, "mac_ratio": macs / 1000, "gates": 3, "mean_open": rates.mean(),
      "always_open": 0, "always_closed": 0, "conditional": 3}, rel=1e-12)
  np.testing.assert_allclose(behaviour.open_rates, rates, rtol=1e-12)
  np.testing.assert_array_equal(behaviour.logits, LOGITS)


def test_an_ungated_net_spends_all_its_macs():
  result, behaviour = evaluation.evaluate(
      lambda pixels, labels: run(pixels, labels, gated=False), batches.cover(images(), 8), COUNTS)
  assert behaviour is None
  assert (result["macs"], result["mac_ratio"]) == (1000, 1.0)
  assert "gates" not in result
  assert result["accuracy"] == pytest.approx(CORRECT.mean())


def test_results_are_plain_numbers():
  result, _ = evaluation.evaluate(run, batches.cover(images(), 8), COUNTS)
  assert {type(value) for value in result.values()} == {int, float}


def test_gate_logits_are_kept_of_the_first_images(monkeypatch):
  monkeypatch.setattr(evaluation, "_KEPT_EXAMPLES", 20)
  _, behaviour = evaluation.evaluate(run, batches.cover(images(), 8), COUNTS)
  np.testing.assert_array_equal(behaviour.logits, LOGITS[:20])
  np.testing.assert_allclose(behaviour.open_rates, (LOGITS > 0).mean(axis=0))


@pytest.mark.parametrize(
    ("rates", "counts"),
    [
        ([1.0, 1.0], (2, 0, 0)),
        ([0.0], (0, 1, 0)),
        ([0.99, 0.01], (0, 0, 2)),
        ([0.9901, 0.0099, 0.5], (1, 1, 1)),
        ([], (0, 0, 0)),
    ],
)
def test_gates_are_sorted_by_their_open_rate(rates, counts):
  assert gate_counts(np.array(rates)) == GateCounts(*counts)
