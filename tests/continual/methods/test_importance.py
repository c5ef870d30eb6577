import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual.method import Batch
from gating_jax.continual.methods import importance
from gating_jax.continual.methods.lwf import fine_tuning
from gating_jax.training import devices
from tests.helpers import conflicting

NET = conflicting.network()
SETTINGS = dict(strength=10.0, examples=64)
BOTH = {
  "ewc": lambda net=NET, **changes: importance.ewc(net, **SETTINGS | changes),
  "online_ewc": lambda net=NET, **changes: importance.online_ewc(
    net, **{"decay": 1.0} | SETTINGS | changes
  ),
}
both = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def learner(method, task=0):
  return conflicting.learner(method, optax.sgd(0.1)).replace(task=jnp.asarray(task))


def batch(task=1):
  data = conflicting.task(task)
  return Batch(
    NET.problem.normalise(data.pixels),
    jnp.asarray(data.labels),
    jax.random.key(0),
    jnp.asarray(0.0),
  )


def test_fisher_of_softmax_regression_in_closed_form():
  """d log softmax(x W)_y / d W = x (onehot(y) - p)^T, squared before it is averaged."""
  random = np.random.default_rng(0)
  kernel, x, labels = (
    random.normal(size=(3, 4)),
    random.normal(size=(5, 3)),
    np.array([0, 3, 1, 1, 2]),
  )
  logits = x @ kernel
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  each = x[:, :, None] * (np.eye(4)[labels] - p)[:, None, :]
  found = importance.fisher_diagonal(
    lambda w, x, y: jax.nn.log_softmax(x @ w)[y],
    jnp.asarray(kernel, jnp.float32),
    jnp.asarray(x, jnp.float32),
    jnp.asarray(labels),
  )
  np.testing.assert_allclose(found, np.mean(each**2, axis=0), rtol=1e-5)
  assert np.abs(np.mean(each, axis=0) ** 2 / found).max() < 0.7


@both
def test_fisher_of_a_task_is_that_of_labels_drawn_from_its_own_head(make):
  """F = mean_n p_n (1 - p_n) of a two-class head's bias, for any labels; 0 for other heads."""
  method, data = make(examples=3000), conflicting.task(1, 3000)
  before = learner(method, task=1)
  logits = np.asarray(
    NET.logits(before.params, before.batch_stats, NET.problem.normalise(data.pixels)), np.float64
  )
  p = 1 / (1 + np.exp(logits[:, 2] - logits[:, 3]))
  fisher = method.end_task(
    before, data._replace(labels=np.full(3000, 2)), jax.random.key(0)
  ).memory.fisher
  heads = jax.tree.map(lambda x: np.asarray(x)[-1], fisher)["heads"]
  np.testing.assert_array_equal(heads["bias"][:2], 0)
  np.testing.assert_array_equal(heads["kernel"][:, :2], 0)
  np.testing.assert_allclose(heads["bias"][2:], np.mean(p * (1 - p)), rtol=0.03)
  assert np.abs(np.mean(p**2) / np.mean(p * (1 - p)) - 1) > 0.1  # by the labels given


@both
def test_fisher_is_a_mean_over_as_many_examples_as_asked_for(make):
  """One example's Fisher diagonal has its gradient's rank-one form, F_kernel = x^2 F_bias."""
  fisher = (
    make(examples=1).end_task(learner(make()), conflicting.task(0), jax.random.key(0)).memory.fisher
  )
  hidden = jax.tree.map(lambda x: np.asarray(x)[0], fisher)["hidden"]
  x = (conflicting.task(0).pixels.reshape(64, 4) / 127.5 - 1) ** 2
  ratio = (hidden["kernel"] / hidden["bias"])[:, 0]
  assert np.isclose(x, ratio, rtol=1e-3).all(axis=1).sum() == 1


def test_penalty_of_two_tasks_by_hand():
  method = BOTH["ewc"]()
  state = learner(method, task=1)
  fill = lambda tree, *values: jax.tree.map(
    lambda x: x.at[:].set(jnp.reshape(jnp.array(values), (-1,) + (1,) * (x.ndim - 1))), tree
  )
  state = state.replace(
    memory=state.memory.replace(
      fisher=fill(state.memory.fisher, 3.0, 0.5),
      anchor=fill(state.memory.anchor, 1.0, -1.0),
    )
  )
  params = jax.tree.map(lambda x: jnp.full_like(x, 2.0), state.params)
  count = sum(x.size for x in jax.tree.leaves(params))
  data = batch()
  held = lambda p: method.loss(p, state, data)[0] - NET.loss(p, state, data)[0]
  value, grads = jax.jit(jax.value_and_grad(held))(params)
  np.testing.assert_allclose(value, 10 / 2 * count * (3.0 * 1**2 + 0.5 * 3**2), rtol=1e-5)
  for g in jax.tree.leaves(grads):
    np.testing.assert_allclose(g, 10 * (3.0 * 1 + 0.5 * 3), rtol=1e-4)


@both
def test_nothing_holds_the_first_task(make):
  method = make(strength=1e6)
  state = learner(method)
  data = batch(0)
  both_losses = jax.jit(lambda p: (method.loss(p, state, data), NET.loss(p, state, data)[0]))
  (total, (terms, _)), alone = both_losses(state.params)
  assert float(terms["penalty"]) == 0
  np.testing.assert_array_equal(total, alone)


def test_ewc_keeps_a_fisher_and_an_anchor_for_every_task():
  method = BOTH["ewc"]()
  state = method.end_task(learner(method), conflicting.task(0), jax.random.key(0))
  first = jax.device_get(state.memory)
  later = state.replace(task=jnp.asarray(1), params=jax.tree.map(lambda x: x + 1, state.params))
  after = jax.device_get(method.end_task(later, conflicting.task(1), jax.random.key(1)).memory)
  for name, expected in (("anchor", later.params), ("fisher", None)):
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[0], b[0]),
      getattr(after, name),
      getattr(first, name),
    )
    if expected is not None:
      jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[1], b), getattr(after, name), expected
      )
  assert first.fisher["hidden"]["kernel"][0].max() > 0
  np.testing.assert_array_equal(first.fisher["hidden"]["kernel"][1], 0)
  assert not np.array_equal(*after.fisher["hidden"]["kernel"])


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_online_fisher_decays_and_its_anchor_is_the_latest(decay):
  method = BOTH["online_ewc"](decay=decay)
  second = lambda state: method.end_task(state, conflicting.task(1), jax.random.key(1)).memory
  state = method.end_task(learner(method), conflicting.task(0), jax.random.key(0))
  state = state.replace(task=jnp.asarray(1), params=jax.tree.map(lambda x: x + 1, state.params))
  forgotten = state.replace(memory=jax.tree.map(jnp.zeros_like, state.memory))
  new, alone = second(state), second(forgotten)
  jax.tree.map(
    lambda n, a, old: np.testing.assert_allclose(n, decay * old + a, rtol=1e-6),
    new.fisher,
    alone.fisher,
    state.memory.fisher,
  )
  jax.tree.map(lambda n, p: np.testing.assert_array_equal(n[0], p), new.anchor, state.params)


@pytest.mark.slow
@both
def test_forgets_less_than_fine_tuning_and_keeps_its_shapes(make):
  _, free = conflicting.learn(fine_tuning(NET), NET)
  states, held = conflicting.learn(make(), NET)
  assert free[0, 0] - free[1, 0] > 0.1
  assert held[0, 0] - held[1, 0] < 0.05
  assert held[1, 1] > 0.9
  shapes = [jax.tree.map(jnp.shape, s.memory) for s in (learner(make()), *states)]
  assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.slow
def test_two_devices_do_as_one():
  states = []
  for name, count in ((None, 1), (devices.AXIS, 2)):
    net = conflicting.network(norm=True, axis_name=name)
    method, optimiser = BOTH["ewc"](net), optax.sgd(0.1)
    state = method.end_task(
      conflicting.learner(method, optimiser), conflicting.task(0), jax.random.key(0)
    )
    state, data, run = (
      state.replace(task=jnp.asarray(1)),
      conflicting.task(1),
      conflicting.step(method, net, optimiser),
    )
    if count > 1:
      run = devices.map_over_devices(
        run,
        args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
        results=(devices.REPLICATED, devices.REPLICATED),
        devices=jax.devices()[:count],
      )
    for _ in range(3):
      state, metrics = run(state, data.pixels, data.labels, np.float32(0))
    states.append(jax.device_get((state.params, metrics["penalty"])))
  assert states[0][1] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


@pytest.mark.parametrize(
  ("name", "setting", "value", "message"),
  [
    ("ewc", "strength", -1.0, "strength must be >= 0; got -1.0"),
    ("ewc", "examples", 0, "examples must be >= 1; got 0"),
    ("online_ewc", "decay", 1.5, r"decay must be in \[0, 1\]; got 1.5"),
  ],
)
def test_settings_out_of_range_are_named(name, setting, value, message):
  with pytest.raises(ValueError, match=message):
    BOTH[name](**{setting: value})


def make_si(strength=1.0, damping=0.1):
  return importance.si(NET, strength=strength, damping=damping)


def total(tree):
  return float(optax.tree.sum(tree))


def test_path_integral_on_a_quadratic_is_the_drop_of_its_loss_for_every_parameter():
  """In L = sum_i a_i theta_i^2 / 2, omega_i is the drop of the i-th term: they do not interact."""
  method, rate = make_si(), 0.002
  state = learner(method)
  curvature = jax.tree.map(
    lambda x: 1 + np.arange(x.size, dtype=np.float32).reshape(x.shape) / np.float32(x.size),
    state.params,
  )
  start = state.params

  @jax.jit
  def step(state):
    grads = jax.tree.map(jnp.multiply, curvature, state.params)
    updates, memory = method.update(jax.tree.map(lambda g: -rate * g, grads), grads, state)
    return state.replace(params=optax.apply_updates(state.params, updates), memory=memory)

  for _ in range(400):
    state = step(state)
  start, ended = jax.device_get((start, state.params))
  drop = jax.tree.map(lambda a, p, q: a * (p**2 - q**2) / 2, curvature, start, ended)
  assert total(drop) > 0.3 * total(jax.tree.map(lambda a, p: a * p**2 / 2, curvature, start))
  jax.tree.map(
    lambda path, d: np.testing.assert_allclose(path, d, rtol=5e-3, atol=1e-7),
    state.memory.path,
    drop,
  )


def test_path_integral_leaves_out_the_penalty():
  """In the second task it is the drop of the cross-entropy, without the penalty."""
  method, optimiser = make_si(strength=0.5), optax.sgd(0.02)
  state = learner(method).replace(task=jnp.asarray(1))
  important = jax.tree.map(jnp.ones_like, state.params)
  state = state.replace(memory=state.memory.replace(importance=important))
  step, data = jax.jit(conflicting.step(method, NET, optimiser)), conflicting.task(1)
  at = lambda s: (
    float(NET.loss(s.params, s, batch(1))[0]),
    float(method.loss(s.params, s, batch(1))[0]),
  )
  before = at(state)
  for _ in range(100):
    state, _ = step(state, data.pixels, data.labels, 0.0)
  (cross_entropy, whole), path = np.subtract(before, at(state)), total(state.memory.path)
  assert abs(cross_entropy - whole) > 0.1 * cross_entropy > 0
  assert path == pytest.approx(cross_entropy, rel=0.03)


def test_importance_by_hand_and_never_below_zero():
  method = make_si(damping=0.5)
  state = learner(method)
  path = jax.tree.map(
    lambda x: np.where(np.arange(x.size).reshape(x.shape) % 2, 3.0, -3.0).astype(np.float32),
    state.params,
  )
  old = jax.tree.map(lambda x: np.full_like(x, 0.25), state.params)
  anchor = jax.tree.map(lambda x: np.asarray(x) - np.float32(1.0), state.params)
  after = jax.jit(method.end_task)(
    state.replace(memory=importance.SiMemory(path=path, importance=old, anchor=anchor)),
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


def test_penalty_of_si_by_hand():
  method = make_si(strength=0.7)
  state = learner(method)
  memory = state.memory.replace(
    importance=jax.tree.map(lambda x: jnp.full_like(x, 2.0), state.params),
    anchor=jax.tree.map(lambda x: x - 0.5, state.params),
  )
  state, count = state.replace(memory=memory), sum(x.size for x in jax.tree.leaves(state.params))
  data = batch(0)
  held = lambda p: method.loss(p, state, data)[1][0]["penalty"]
  value, grads = jax.jit(jax.value_and_grad(held))(state.params)
  np.testing.assert_allclose(value, 0.7 * 2.0 * 0.25 * count, rtol=1e-5)
  for g in jax.tree.leaves(grads):
    np.testing.assert_allclose(g, 2 * 0.7 * 2.0 * 0.5, rtol=1e-5)
  np.testing.assert_allclose(
    importance.weighted_distance(state.params, memory.anchor, memory.importance),
    0.5 * count,
    rtol=1e-5,
  )


@pytest.mark.slow
def test_si_forgets_less_than_fine_tuning_and_keeps_its_shapes():
  method = make_si()
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
def test_bad_settings_of_si(setting, value, message):
  with pytest.raises(ValueError, match=message):
    make_si(**{setting: value})
