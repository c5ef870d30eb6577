import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual.method import Batch
from gating_jax.continual.methods.ewc import weighted_distance
from gating_jax.continual.methods.fine_tuning import fine_tuning
from gating_jax.continual.methods.si import SiMemory, si
from tests.helpers import conflicting

NET = conflicting.network()


def make(strength=1.0, damping=0.1):
  return si(NET, strength=strength, damping=damping)


def learner(method):
  return conflicting.learner(method, optax.sgd(0.1))


def whole_batch(task):
  data = conflicting.task(task)
  return Batch(
    NET.problem.normalise(data.pixels),
    jnp.asarray(data.labels),
    jax.random.key(0),
    jnp.asarray(0.0),
  )


def total(tree):
  return float(optax.tree.sum(tree))


def test_path_integral_on_a_quadratic_is_the_drop_of_its_loss_for_every_parameter():
  """In L = sum_i a_i theta_i^2 / 2, omega_i is the drop of the i-th term: they do not interact."""
  method, rate = make(), 0.002
  state = learner(method)
  curvature = jax.tree.map(
    lambda x: 1 + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) / x.size, state.params
  )
  start = state.params

  @jax.jit
  def step(state):
    grads = jax.tree.map(jnp.multiply, curvature, state.params)
    updates, memory = method.update(jax.tree.map(lambda g: -rate * g, grads), grads, state)
    return state.replace(params=optax.apply_updates(state.params, updates), memory=memory)

  for _ in range(400):
    state = step(state)
  drop = jax.tree.map(lambda a, p, q: a * (p**2 - q**2) / 2, curvature, start, state.params)
  assert total(drop) > 0.3 * total(jax.tree.map(lambda a, p: a * p**2 / 2, curvature, start))
  jax.tree.map(
    lambda path, d: np.testing.assert_allclose(path, d, rtol=5e-3, atol=1e-7),
    state.memory.path,
    drop,
  )


def test_path_integral_leaves_out_the_penalty():
  """In the second task it is the drop of the cross-entropy, without the penalty."""
  method, optimiser = make(strength=0.5), optax.sgd(0.02)
  state = learner(method).replace(task=jnp.asarray(1))
  important = jax.tree.map(jnp.ones_like, state.params)
  state = state.replace(memory=state.memory.replace(importance=important))
  step, data = jax.jit(conflicting.step(method, NET, optimiser)), conflicting.task(1)
  at = lambda s: (
    float(NET.loss(s.params, s, whole_batch(1))[0]),
    float(method.loss(s.params, s, whole_batch(1))[0]),
  )
  before = at(state)
  for _ in range(100):
    state, _ = step(state, data.pixels, data.labels, 0.0)
  (cross_entropy, whole), path = np.subtract(before, at(state)), total(state.memory.path)
  assert abs(cross_entropy - whole) > 0.1 * cross_entropy > 0
  assert path == pytest.approx(cross_entropy, rel=0.03)


def test_importance_by_hand_and_never_below_zero():
  method = make(damping=0.5)
  state = learner(method)
  path = jax.tree.map(
    lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2, 3.0, -3.0), state.params
  )
  old = jax.tree.map(lambda x: jnp.full_like(x, 0.25), state.params)
  anchor = jax.tree.map(lambda x: x - 1.0, state.params)
  after = method.end_task(
    state.replace(memory=SiMemory(path=path, importance=old, anchor=anchor)),
    conflicting.task(0),
    jax.random.key(0),
  )
  jax.tree.map(
    lambda found, p: np.testing.assert_allclose(
      found, np.where(p > 0, 0.25 + 3 / 1.5, 0.25), rtol=1e-5
    ),
    after.memory.importance,
    path,
  )
  jax.tree.map(np.testing.assert_array_equal, after.memory.anchor, state.params)
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(after.memory.path))


def test_penalty_by_hand():
  method = make(strength=0.7)
  state = learner(method)
  memory = state.memory.replace(
    importance=jax.tree.map(lambda x: jnp.full_like(x, 2.0), state.params),
    anchor=jax.tree.map(lambda x: x - 0.5, state.params),
  )
  state, count = state.replace(memory=memory), sum(x.size for x in jax.tree.leaves(state.params))
  held = lambda p: method.loss(p, state, whole_batch(0))[1][0]["penalty"]
  np.testing.assert_allclose(held(state.params), 0.7 * 2.0 * 0.25 * count, rtol=1e-5)
  for g in jax.tree.leaves(jax.grad(held)(state.params)):
    np.testing.assert_allclose(g, 2 * 0.7 * 2.0 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(
    weighted_distance(state.params, memory.anchor, memory.importance), 0.5 * count, rtol=1e-5
  )


@pytest.mark.slow
def test_forgets_less_than_fine_tuning_and_keeps_its_shapes():
  method = make()
  _, free = conflicting.learn(fine_tuning(NET), NET)
  states, held = conflicting.learn(method, NET)
  assert free[0, 0] - free[1, 0] > 0.1
  assert held[0, 0] - held[1, 0] < 0.7 * (free[0, 0] - free[1, 0])
  assert held[1, 1] > 0.8
  shapes = [jax.tree.map(jnp.shape, s.memory) for s in (learner(method), *states)]
  assert shapes[0] == shapes[1] == shapes[2]
  for leaf in jax.tree.leaves(states[1].memory.importance):
    assert (np.asarray(leaf) >= 0).all()


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("strength", -1.0, "strength must be >= 0; got -1.0"),
    ("damping", 0.0, "damping must be > 0; got 0.0"),
  ],
)
def test_bad_settings(setting, value, message):
  with pytest.raises(ValueError, match=message):
    make(**{setting: value})
