import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.layers.experts import Experts, mixture
from gating_jax.ops.macs import executed_macs

X = np.random.default_rng(0).normal(0, 1, (8, 5)).astype(np.float32)
SCORES = np.random.default_rng(1).normal(0, 2, (8, 4)).astype(np.float32)


class Expert(nn.Module):
  hidden: int = 0

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(3, name="out")(nn.Dense(self.hidden)(x) if self.hidden else x)


def experts(top_k=None, count=4):
  return Experts(tuple(Expert() for _ in range(count)), top_k)


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_the_answer_is_the_weighted_sum_of_those_that_count(top_k):
  net = experts(top_k)
  variables = jax.jit(net.init)(jax.random.key(0), X)
  y, (record,) = jax.jit(net.apply)(variables, X)
  np.testing.assert_allclose(record.probs.sum(-1), 1, rtol=1e-6)
  kept = np.argsort(-record.probs, axis=-1)[:, :top_k]
  mask = np.zeros(record.probs.shape, np.float32)
  np.put_along_axis(mask, kept, 1, axis=-1)
  np.testing.assert_array_equal(record.gates, mask * record.probs)
  each = [
    X @ np.asarray(p["out"]["kernel"])
    for p in (variables["params"][f"experts_{e}"] for e in range(4))
  ]
  np.testing.assert_allclose(y, np.einsum("ne,enc->nc", record.gates, each), rtol=1e-5, atol=1e-6)
  assert record.macs_per_unit == 15
  np.testing.assert_array_equal(executed_macs((record,)), 15 * (top_k or 4))
  assert not np.allclose(record.probs[0], record.probs[1])  # the choice depends on the input


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_are_above_zero_for_exactly_those_that_count(top_k):
  logits, gates = jax.jit(mixture, static_argnums=1)(SCORES, top_k)
  np.testing.assert_array_equal(logits > 0, gates > 0)
  assert (np.sum(gates > 0, axis=1) == top_k).all()
  np.testing.assert_allclose(np.diff(logits, axis=1), np.diff(SCORES, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 4])
def test_where_all_count_logits_are_log_odds_of_the_weights(top_k):
  logits, gates = mixture(SCORES, top_k)
  np.testing.assert_allclose(gates, special.softmax(SCORES.astype(np.float64), axis=1), rtol=1e-5)
  np.testing.assert_allclose(special.expit(logits), gates, rtol=1e-5)
  logits, gates = mixture(jnp.array([[110, -110]], jnp.float32), top_k if top_k is None else 2)
  assert np.isfinite(logits).all()
  assert gates.tolist() == [[1, 0]]


def test_of_equal_scores_the_first_count():
  assert (np.asarray(mixture(jnp.zeros((1, 3)), 2)[1]) > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("top_k", [None, 1])
def test_gate_and_the_experts_that_count_have_gradients(top_k):
  net = experts(top_k)
  variables = jax.jit(net.init)(jax.random.key(0), X)
  loss = lambda p: jnp.sum(jnp.square(net.apply({**variables, "params": p}, X)[0]))
  grads = jax.jit(jax.grad(loss))(variables["params"])
  chosen = np.asarray(jax.jit(net.apply)(variables, X)[1][0].gates > 0).any(axis=0)
  assert top_k is None or not chosen.all()
  assert np.abs(grads["gate"]["logits"]["kernel"]).max() > 0
  assert [
    bool(np.abs(grads[f"experts_{e}"]["out"]["kernel"]).max() > 0) for e in range(4)
  ] == chosen.tolist()


def test_wrong_experts_are_refused():
  with pytest.raises(
    ValueError, match="top_k must be None or in 1 .. 4, the number of experts; got 5"
  ):
    experts(5).init(jax.random.key(0), X)
  with pytest.raises(
    ValueError, match=r"experts must all have the same number of MACs; got \[15, 16\]"
  ):
    Experts((Expert(), Expert(hidden=2))).init(jax.random.key(0), X)
