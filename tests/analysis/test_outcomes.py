import jax
import numpy as np
import pytest
from scipy import special
from sklearn.metrics import mutual_info_score

from gating_jax.analysis import outcomes
from gating_jax.analysis.outcomes import OUTCOMES
from gating_jax.ops.relaxations import straight_through_gate

N = 4000
RANDOM = np.random.default_rng(0)
LABELS = np.arange(N) % 4
SIGN = RANDOM.choice([-1.0, 1.0], N)  # something of the image that has nothing to do with its class


def found_of(logits, labels=LABELS, noise_scale=1.0, classes=4):
  logits = np.stack(logits, axis=1).astype(np.float32)
  probs = outcomes.open_probs(logits, noise_scale=noise_scale)
  return outcomes.diagnose(outcomes.tally(logits > 0, probs, labels, classes=classes))


def names(found):
  return [OUTCOMES[i] for i in found.outcomes]


MADE = {
  "open": (np.full(N, 5.0), "always_open"),
  "closed": (np.full(N, -5.0), "always_closed"),
  "coin": (np.zeros(N), "random_dropout"),
  "coin that evaluation holds open": (np.full(N, 0.1), "random_dropout"),
  "coin whose small logit has the class's sign": (
    np.where(LABELS < 2, 0.1, -0.1),
    "random_dropout",
  ),
  "coin as gates start": (np.full(N, np.log(0.85 / 0.15)), "random_dropout"),
  "of the class": (np.where(LABELS < 2, 4.0, -4.0), "conditional"),
  "of the image": (4 * SIGN, "conditional"),
  "noisy, of the image": (1.5 * SIGN, "conditional"),
  "now and then": (np.where(np.arange(N) % 50, -6.0, 6.0), "conditional"),
  "open but once in 200": (np.where(np.arange(N) % 200, 6.0, -6.0), "always_open"),
}


def test_gates_made_by_hand_are_told_apart():
  found = found_of([logits for logits, _ in MADE.values()])
  assert dict(zip(MADE, names(found), strict=True)) == {
    name: outcome for name, (_, outcome) in MADE.items()
  }


def test_what_is_measured_of_gates_made_by_hand():
  found = found_of([logits for logits, _ in MADE.values()])
  of = lambda measure: dict(zip(MADE, getattr(found, measure), strict=True))
  p = special.expit(4.0)
  decided = 1 + p * np.log2(p) + (1 - p) * np.log2(1 - p)
  assert of("disagreement")["coin"] == pytest.approx(0.5)
  assert of("disagreement")["coin as gates start"] == pytest.approx(2 * 0.85 * 0.15)
  assert of("disagreement")["of the class"] == pytest.approx(2 * p * (1 - p))
  assert of("input_information")["of the class"] == pytest.approx(decided)
  # As many signs of either kind.
  assert of("input_information")["of the image"] == pytest.approx(decided, abs=2e-3)
  for name in ("open", "closed", "coin", "coin as gates start"):
    assert of("input_information")[name] == pytest.approx(0, abs=1e-12)
    assert of("class_information")[name] == 0
  assert of("open_rates")["now and then"] == pytest.approx(0.02)


def test_without_noise_a_gate_tells_all_that_it_does():
  found = found_of([4 * SIGN, 0.01 * SIGN, np.full(N, 0.01)], noise_scale=0.0)
  assert names(found) == ["conditional", "conditional", "always_open"]
  np.testing.assert_array_equal(found.disagreement, 0)
  np.testing.assert_allclose(found.input_information, [1, 1, 0], atol=1e-3)


@pytest.mark.parametrize("noise_scale", [1.0, 0.25])
def test_the_disagreement_is_that_of_two_draws(noise_scale):
  logits = RANDOM.normal(0.3, 1, (N, 3)).astype(np.float32)
  one, two = (
    straight_through_gate(jax.random.key(i), logits, noise_scale=noise_scale) for i in (0, 1)
  )
  observed = np.mean(np.asarray(one) != np.asarray(two), axis=0)
  found = found_of(logits.T, noise_scale=noise_scale)
  np.testing.assert_allclose(found.disagreement, observed, atol=0.025)  # 3 deviations of N draws
  assert found.disagreement.min() > 0.1


def test_a_gate_that_is_one_of_two_classes_has_1_bit():
  opened, examples = np.array([[5000], [0]]), np.array([5000, 5000])
  assert outcomes.class_information(opened, examples)[0] == pytest.approx(
    1 - 1 / (2e4 * np.log(2)), rel=1e-9
  )
  quarter = np.array([[500], [0], [0], [0]])  # H(1/4)
  information = outcomes.class_information(quarter, np.full(4, 500))[0]
  assert information == pytest.approx(0.811278 - 3 / (4000 * np.log(2)), abs=1e-6)


def test_the_information_is_that_of_an_independent_count_less_the_floor():
  labels = RANDOM.choice(4, N, p=[0.1, 0.2, 0.3, 0.4])
  gates = (
    RANDOM.random((N, 3))
    < np.array([[0.2, 0.5, 0.9], [0.4, 0.5, 0.1], [0.6, 0.5, 0.5], [0.8, 0.5, 0.2]])[labels]
  )
  sums = outcomes.tally(gates, gates.astype(np.float64), labels, classes=4)
  found = outcomes.diagnose(sums)
  expected = [mutual_info_score(labels, gate) / np.log(2) for gate in gates.T]
  assert found.floor == pytest.approx(3 / (2 * N * np.log(2)))
  np.testing.assert_allclose(
    found.class_information, np.maximum(np.array(expected) - found.floor, 0), rtol=1e-9
  )
  assert found.class_information[1] < 3 * found.floor < 0.01 < found.class_information[0]


def test_the_floor_is_what_shuffled_labels_give():
  gates = RANDOM.random((200, 300)) < 0.4
  labels = np.arange(200) % 4
  shuffled = [mutual_info_score(RANDOM.permutation(labels), gate) / np.log(2) for gate in gates.T]
  assert np.mean(shuffled) == pytest.approx(outcomes.information_floor(np.full(4, 50)), rel=0.1)


def test_classes_that_do_not_occur_raise_no_floor():
  assert (
    outcomes.information_floor(np.array([50, 0, 50, 0]))
    == outcomes.information_floor(np.array([50, 50]))
    > 0
  )
  found = found_of([4 * SIGN], labels=np.zeros(N, int))
  assert (found.floor, found.class_information[0], names(found)) == (0, 0, ["conditional"])


def test_batches_add_up_to_the_whole():
  logits = RANDOM.normal(size=(N, 5)).astype(np.float32)
  part = lambda rows: outcomes.tally(
    logits[rows] > 0, outcomes.open_probs(logits[rows], noise_scale=1.0), LABELS[rows], classes=4
  )
  whole, joined = part(slice(None)), part(slice(0, 7)) + part(slice(7, 1000)) + part(slice(1000, N))
  np.testing.assert_array_equal(joined.opened, whole.opened)
  np.testing.assert_array_equal(joined.examples, [1000] * 4)
  for name in ("probs", "entropies", "disagreements"):
    np.testing.assert_allclose(getattr(joined, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize(
  ("rate", "disagreement", "information", "outcome"),
  [
    (0.9901, 0.0, 0.0, "always_open"),
    (0.99, 0.0, 0.05, "conditional"),
    (0.99, 0.0, 0.0499, "random_dropout"),
    (0.0099, 0.0, 0.0, "always_closed"),
    (0.01, 0.0, 0.05, "conditional"),
    (0.01, 0.0, 0.0499, "random_dropout"),
    (0.5, 0.2, 0.0499, "random_dropout"),
    (0.99, 0.2, 0.05, "conditional"),
    (1.0, 0.1999, 0.0, "always_open"),
    (1.0, 0.5, 0.05, "always_open"),
    (0.0, 0.5, 0.0, "random_dropout"),
  ],
)
def test_an_outcome_begins_at_its_limit(rate, disagreement, information, outcome):
  assert (
    OUTCOMES[outcomes.outcomes(*(np.array([x]) for x in (rate, disagreement, information)))[0]]
    == outcome
  )


def test_layers_are_counted_apart():
  found = found_of([logits for logits, _ in MADE.values()])
  first, second = outcomes.by_layer(found, [("a", 3), ("b", len(MADE) - 3)])
  assert (first["layer"], first["gates"], second["gates"]) == ("a", 3, len(MADE) - 3)
  assert [first[name] for name in OUTCOMES] == [1, 1, 1, 0]
  assert [second[name] for name in OUTCOMES] == [1, 0, 3, 4]
  assert first["mean_open"] == pytest.approx(1 / 3)
  assert first["disagreement"] == pytest.approx(
    (2 * 2 * special.expit(5) * special.expit(-5) + 0.5) / 3
  )
