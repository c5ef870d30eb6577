"""Tests of the state with the best validation score."""

import jax.numpy as jnp
import numpy as np

from gating_jax.training import best_state


def test_only_a_higher_score_replaces_the_best_state_also_after_a_restart(tmp_path):
  state = lambda value: {"w": jnp.full(2, value, jnp.float32)}
  with best_state.BestState(tmp_path) as best:
    for step, score in ((1, 0.5), (2, 0.75), (3, 0.75), (4, float("nan"))):
      best.offer(step, state(step), score)
  with best_state.BestState(tmp_path) as best:
    assert best.score == 0.75
    best.offer(5, state(5), 0.7)
  found = best_state.restore_best(tmp_path, state(0))
  assert found.step == 2
  assert np.asarray(found.state["w"]).tolist() == [2, 2]
  best_state.forget_best(tmp_path)
  assert not tmp_path.exists()
