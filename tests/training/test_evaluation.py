import dataclasses

import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import mutual_info_score

from gating_jax.analysis import statistics
from gating_jax.data.image_sets import Images, padded_batches
from gating_jax.models.summary import ModelCounts
from gating_jax.training import evaluation

COUNTS = ModelCounts(params=100, gate_params=10, gates=3, macs=1000, gate_macs=50, gated=600)
UNGATED = dataclasses.replace(COUNTS, gate_macs=0)
GATES = dict(classes=2, noise_scale=0.5)
M = 37
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(M, 3)).astype(np.float32)
CORRECT = RANDOM.random(M) < 0.6


def images():
  """Makes images whose only pixel is their number."""
  return Images(
    np.arange(M, dtype=np.uint8).reshape(M, 1, 1, 1), np.arange(M, dtype=np.int32) % 2, ("a", "b")
  )


def run(pixels, _, gated=True):
  at = pixels.ravel()
  results = {
    "correct": CORRECT[at],
    "predicted": np.where(CORRECT[at], at % 2, 1 - at % 2),
    "cross_entropy": at.astype(np.float32),
  }
  if gated:
    results |= {
      "gates": LOGITS[at] > 0,
      "gate_logits": LOGITS[at],
      "macs": 200.0 * (LOGITS[at] > 0).sum(axis=1),
    }
  return results


@pytest.mark.parametrize("batch_size", [1, 2, 7, 36, 37, 38, 1000])
def test_every_image_counts_once(batch_size):
  result, _, behaviour = evaluation.evaluate(
    run, padded_batches(images(), batch_size), COUNTS, **GATES
  )
  rates = (LOGITS > 0).mean(axis=0)
  assert 0 < CORRECT.mean() < 1
  assert np.all((rates > 0.01) & (rates < 0.99))
  probs = special.expit(2 * LOGITS.astype(np.float64))
  entropy = lambda p: stats.entropy([p, 1 - p], base=2)
  macs = 1000 - 600 + 50 + 200 * (LOGITS > 0).sum(axis=1)
  quarters = np.array_split(macs, 4)  # the loss is the image's number
  classes = [
    mutual_info_score(np.arange(M) % 2, gate) / np.log(2) - 1 / (2 * M * np.log(2))
    for gate in LOGITS.T > 0
  ]
  assert result == pytest.approx(
    {
      "accuracy": CORRECT.mean(),
      "cross_entropy": 18,
      "images": 37,
      "params": 100,
      "gate_params": 10,
      "ungated_macs": 1000,
      "macs": macs.mean(),
      "mac_ratio": macs.mean() / 1000,
      "macs_std": macs.std(),
      "macs_min": macs.min(),
      "macs_max": macs.max(),
      **{f"macs_p{p}": np.quantile(macs, p / 100) for p in (10, 20, 30, 40, 50, 60, 70, 80, 90)},
      **{f"macs_of_quarter{i + 1}": quarters[i].mean() for i in range(4)},
      "gates": 3,
      "mean_open": rates.mean(),
      "always_open": 0,
      "always_closed": 0,
      "random_dropout": 0,
      "conditional": 3,
      "disagreement": np.mean(2 * probs * (1 - probs)),
      "input_information": np.mean(entropy(probs.mean(axis=0)) - entropy(probs).mean(axis=0)),
      "class_information": np.mean(np.maximum(classes, 0)),
      "class_information_floor": 1 / (2 * M * np.log(2)),
    },
    rel=1e-9,
  )
  assert len({np.mean(q) for q in quarters}) == 4
  np.testing.assert_allclose(behaviour.diagnosis.open_rates, rates, rtol=1e-12)
  np.testing.assert_array_equal(behaviour.logits, LOGITS)


def test_an_ungated_net_spends_all_its_macs():
  result, _, behaviour = evaluation.evaluate(
    lambda pixels, labels: run(pixels, labels, gated=False),
    padded_batches(images(), 8),
    UNGATED,
    **GATES,
  )
  assert behaviour is None
  assert (result["macs"], result["mac_ratio"]) == (1000, 1.0)
  assert not any(name.startswith(("gates", "macs_")) for name in result)
  assert result["accuracy"] == pytest.approx(CORRECT.mean())


def test_the_networks_of_scales_are_part_of_the_macs_of_an_ungated_net():
  result, kept, behaviour = evaluation.evaluate(
    lambda pixels, labels: run(pixels, labels, gated=False),
    padded_batches(images(), 8),
    COUNTS,
    **GATES,
  )
  assert behaviour is None
  assert (result["macs"], result["mac_ratio"]) == (1050, 1.05)
  np.testing.assert_array_equal(kept.macs, np.full(M, 1050))


def test_results_are_plain_numbers():
  result, *_ = evaluation.evaluate(run, padded_batches(images(), 8), COUNTS, **GATES)
  assert {type(value) for value in result.values()} == {int, float}


def test_gate_logits_are_kept_of_the_first_images(monkeypatch):
  monkeypatch.setattr(evaluation, "_KEPT_EXAMPLES", 20)
  _, _, behaviour = evaluation.evaluate(run, padded_batches(images(), 8), COUNTS, **GATES)
  np.testing.assert_array_equal(behaviour.logits, LOGITS[:20])
  np.testing.assert_allclose(behaviour.diagnosis.open_rates, (LOGITS > 0).mean(axis=0))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("classes", [2, None])
def test_what_is_kept_of_each_image(batch_size, classes):
  _, kept, gates = evaluation.evaluate(
    run, padded_batches(images(), batch_size), COUNTS, classes=classes, noise_scale=1
  )
  np.testing.assert_array_equal(kept.macs, 1000 - 600 + 50 + 200 * (LOGITS > 0).sum(axis=1))
  np.testing.assert_array_equal(kept.losses, np.arange(M))
  np.testing.assert_array_equal(kept.correct, CORRECT)
  np.testing.assert_array_equal(kept.predicted % 2 == np.arange(M) % 2, CORRECT)
  if classes is None:
    assert kept.labels is gates.class_rates is None
    return
  np.testing.assert_array_equal(kept.labels, np.arange(M) % 2)
  np.testing.assert_allclose(gates.class_rates, [(LOGITS[k::2] > 0).mean(axis=0) for k in (0, 1)])


def test_macs_of_an_ungated_net_are_those_of_the_net():
  _, kept, _ = evaluation.evaluate(
    lambda pixels, labels: run(pixels, labels, gated=False),
    padded_batches(images(), 8),
    UNGATED,
    **GATES,
  )
  np.testing.assert_array_equal(kept.macs, np.full(M, 1000))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_images_that_fire_a_gate_are_those_of_its_largest_logits(monkeypatch, batch_size):
  logits = LOGITS.copy()
  logits[:, 0] = -1
  logits[[30, 4, 11], 0] = 3, 5, 3
  monkeypatch.setitem(globals(), "LOGITS", logits)
  *_, gates = evaluation.evaluate(run, padded_batches(images(), batch_size), COUNTS, **GATES)
  assert gates.most_open_images[:, 0].tolist() == [4, 11, 30, -1, -1, -1, -1, -1]
  for gate in (1, 2):
    assert (
      gates.most_open_images[:, gate].tolist()
      == sorted(range(M), key=lambda i: -logits[i, gate])[:8]
    )


def test_a_gate_fires_where_it_is_open_whatever_its_logit():
  def shifted(pixels, labels):
    return {**(found := run(pixels, labels)), "gate_logits": found["gate_logits"] - 100}

  *_, gates = evaluation.evaluate(shifted, padded_batches(images(), 8), COUNTS, **GATES)
  for gate in range(3):
    opened = np.flatnonzero(LOGITS[:, gate] > 0)
    assert (
      gates.most_open_images[:, gate].tolist() == sorted(opened, key=lambda i: -LOGITS[i, gate])[:8]
    )


def test_gates_without_an_image_have_no_behaviour():
  _, _, gates = evaluation.evaluate(run, padded_batches(images(), 8), COUNTS, **GATES)
  assert gates is not None
  with pytest.raises(ValueError, match="no image was added"):
    evaluation._GateResults(classes=2, noise_scale=0.5).behaviour()


def test_a_class_without_images_has_no_rate():
  *_, gates = evaluation.evaluate(
    run, padded_batches(images(), 8), COUNTS, classes=3, noise_scale=1
  )
  assert np.isnan(gates.class_rates[2]).all()
  assert not np.isnan(gates.class_rates[:2]).any()


def test_histograms_of_each_layer():
  *_, gates = evaluation.evaluate(run, padded_batches(images(), 8), COUNTS, **GATES)
  found = evaluation.histograms(gates, (("a", 1), ("b", 1), ("c", 1)))
  assert list(found) == [
    f"gates/{layer}/{name}" for layer in "abc" for name in ("probs", "open_rates")
  ]
  assert {len(counts) for counts in found.values()} == {statistics.BINS}
  assert [int(counts.sum()) for counts in found.values()] == [M, 1] * 3
  is_open = LOGITS > 0
  assert len(set(is_open.sum(axis=0))) == 3
  for i, layer in enumerate("abc"):
    assert found[f"gates/{layer}/probs"][statistics.BINS // 2 :].sum() == is_open[:, i].sum()
    assert found[f"gates/{layer}/open_rates"][int(is_open[:, i].mean() * statistics.BINS)] == 1
