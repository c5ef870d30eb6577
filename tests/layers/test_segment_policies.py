import functools
import re

import jax
import numpy as np
import pytest

from gating_jax.layers.gate import GATE_RNG
from gating_jax.layers.segment_gate import POLICIES, Policy
from gating_jax.ops.selection import frame_exit_order

AXIS = "devices"
T = 9


def padded(*lengths):
  return np.arange(T) < np.array(lengths)[:, None]


def choose(policy, valid, *, share=0.5, seed=None, relevant=None, axis_name=None):
  return _choose(Policy(policy, share, 10, axis_name), valid, relevant, seed)


@functools.partial(jax.jit, static_argnums=0)
def _choose(module, valid, relevant, seed):
  rngs = {} if seed is None else {GATE_RNG: jax.random.key(seed)}
  return module.apply({}, valid, relevant, seed is not None, rngs=rngs)


def test_policies_by_hand():
  valid, relevant = padded(9, 4), np.zeros((2, T), bool)
  relevant[:, [2, 3, 6]] = True
  places = lambda *args, **options: [
    np.flatnonzero(row).tolist()
    for row in choose(*args, share=0.25, relevant=relevant, **options).gates
  ]
  for seed in (None, 0):
    assert places("all", valid, seed=seed) == [[*range(9)], [*range(4)]]
    assert places("uniform", valid, seed=seed) == [[1, 4, 7], [2]]
    assert places("oracle", valid, seed=seed) == [[2, 3, 6], [2]]
  assert places("prefix", valid) == [[0, 4, 8], [2]]
  assert [len(row) for row in places("random", valid)] == [3, 1]


def test_the_record_of_a_policy_is_certain():
  record = choose("uniform", padded(4))
  np.testing.assert_array_equal(record.gates, [[0, 1, 0, 1, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(record.probs, record.gates)
  np.testing.assert_array_equal(record.logits, np.where(record.gates > 0, np.inf, -np.inf))
  assert record.macs_per_unit == 10


def test_random_segments_change_with_the_key_in_training_and_not_in_evaluation():
  valid = padded(*[9] * 16)
  drawn = [np.asarray(choose("random", valid, seed=seed).gates) for seed in (1, 2)]
  assert (drawn[0] != drawn[1]).any()
  np.testing.assert_array_equal(choose("random", valid).gates, choose("random", valid).gates)
  assert len(np.unique(choose("random", valid).gates, axis=0)) > 8


def test_prefixes_of_training_are_of_any_length_alike():
  videos = 3000
  gates = np.asarray(choose("prefix", padded(*[4] * videos), seed=0).gates)
  prefixes = [np.isin(np.arange(T), frame_exit_order(4)[:n]) for n in range(1, 5)]
  counts = [(gates == prefix).all(1).sum() for prefix in prefixes]
  assert sum(counts) == videos
  np.testing.assert_array_less(np.abs(np.array(counts) - videos / 4), 5 * np.sqrt(videos * 3 / 16))


@pytest.mark.parametrize("policy", ["random", "prefix"])
def test_a_drawn_policy_does_not_depend_on_the_number_of_devices(policy):
  valid = padded(*[9] * 16)
  alone = np.asarray(choose(policy, valid, seed=3).gates)
  spread = jax.pmap(
    lambda valid: choose(policy, valid, seed=3, axis_name=AXIS).gates, axis_name=AXIS
  )(valid.reshape(8, 2, T))
  np.testing.assert_array_equal(spread.reshape(16, T), alone)
  assert len(np.unique(alone, axis=0)) > 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: choose("most", padded(3)),
      f"policy must be one of {', '.join(sorted(POLICIES))}; got 'most'",
    ),
    (
      lambda: choose("oracle", padded(3)),
      "relevant must be given for the oracle, which chooses by it; got None",
    ),
    (
      lambda: choose("uniform", padded(3), share=1.5),
      "share must be in (0, 1], or an int number of segments; got 1.5",
    ),
  ],
)
def test_bad_settings_are_named(call, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    call()
