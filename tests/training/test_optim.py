import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from gating_jax.layers.gate import is_gate_path
from gating_jax.training import optim
from tests.helpers import tiny


@pytest.fixture(scope="module")
def params():
  return tiny.state(optax.identity()).params


def stepped(params, grads, steps=1, **settings):
  optimiser = optim.sgd(optax.constant_schedule(0.1), **settings)
  state = optimiser.init(params)
  for _ in range(steps):
    updates, state = optimiser.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def split(params):
  """`(gate parameters, others)` by path."""
  flat = traverse_util.flatten_dict(jax.device_get(params))
  gates = {path: value for path, value in flat.items() if is_gate_path(path)}
  return gates, {path: value for path, value in flat.items() if path not in gates}


def test_weight_decay_shrinks_everything_but_gates(params):
  zero = jax.tree.map(np.zeros_like, params)
  gates, others = split(params)
  gates_after, others_after = split(stepped(params, zero, momentum=0.0, weight_decay=0.5))
  assert len(gates) == 5  # hidden kernel, norm scale and bias, logits kernel and bias
  assert all("gate" in path for path in gates)
  for path, value in gates.items():
    np.testing.assert_array_equal(gates_after[path], value, err_msg=str(path))
  for path, value in others.items():
    np.testing.assert_allclose(
      others_after[path], value * (1 - 0.1 * 0.5), rtol=1e-6, err_msg=str(path)
    )
  shrunk = [path for path, value in others.items() if np.any(value != others_after[path])]
  assert {path[-1] for path in shrunk} == {"kernel", "scale"}  # biases start at 0


def test_gates_may_decay_at_a_rate_of_their_own(params):
  zero = jax.tree.map(np.zeros_like, params)
  settings = dict(momentum=0.0, weight_decay=0.5)
  gates, _ = split(params)
  _, others_without = split(stepped(params, zero, **settings))
  gates_after, others_after = split(stepped(params, zero, gate_weight_decay=0.25, **settings))
  for path, value in gates.items():
    np.testing.assert_allclose(gates_after[path], value * (1 - 0.1 * 0.25), rtol=1e-6)
  for path, value in others_without.items():
    np.testing.assert_array_equal(others_after[path], value)


def test_without_decay_of_gates_the_state_has_the_tree_of_earlier_checkpoints(params):
  schedule = optax.constant_schedule(0.1)
  optimiser = optim.sgd(schedule, momentum=0.9, weight_decay=0.5)
  earlier = optax.chain(
    optax.add_decayed_weights(0.5, mask=optim.decayed),
    optax.sgd(schedule, momentum=0.9, nesterov=True),
    optax.masked(optax.scale(1.0), optim.mark_gates),
  )
  trees = [jax.tree.structure(o.init(params)) for o in (optimiser, earlier)]
  assert trees[0] == trees[1]


def test_gates_follow_their_gradient(params):
  one = jax.tree.map(np.ones_like, params)
  gates, _ = split(params)
  after, _ = split(stepped(params, one, momentum=0.0, weight_decay=0.5))
  for path, value in gates.items():
    np.testing.assert_allclose(after[path], value - 0.1, rtol=1e-6, atol=1e-7)


def test_gates_may_learn_faster(params):
  one = jax.tree.map(np.ones_like, params)
  settings = dict(steps=2, momentum=0.9, weight_decay=0.0)
  (gates, others), (fast, same) = (
    split(stepped(params, one, gate_lr_multiplier=m, **settings)) for m in (1.0, 5.0)
  )
  begun, _ = split(params)
  for path, value in begun.items():
    np.testing.assert_allclose(fast[path] - value, 5 * (gates[path] - value), rtol=1e-5, atol=1e-6)
  for path, value in others.items():
    np.testing.assert_array_equal(same[path], value)


def test_decayed_is_false_on_gate_paths_alone():
  tree = {
    "block": {"gate": {"head": {"kernel": 1}}, "conv1": {"kernel": 2}},
    "gateway": {"bias": 3},
  }
  assert optim.decayed(tree) == {
    "block": {"gate": {"head": {"kernel": False}}, "conv1": {"kernel": True}},
    "gateway": {"bias": True},
  }


def test_momentum_is_nesterov():
  # v1 = 1, step 1 + 0.9; v2 = 1.9, step 1 + 0.9 * 1.9; each times the learning rate 0.1
  after = stepped(
    {"w": np.float32(2)}, {"w": np.float32(1)}, steps=2, momentum=0.9, weight_decay=0.0
  )
  assert float(after["w"]) == pytest.approx(2 - 0.1 * (1.9 + 2.71))


def test_weight_decay_goes_through_momentum():
  after = stepped({"w": np.float32(2)}, {"w": np.float32(0)}, momentum=0.9, weight_decay=0.5)
  assert float(after["w"]) == pytest.approx(2 - 0.1 * 1.9 * 0.5 * 2)


def test_the_learning_rate_is_read_at_each_step():
  optimiser = optim.sgd(lambda step: 10.0**-step, momentum=0.0, weight_decay=0.0)
  state, seen = optimiser.init({"w": np.float32(0)}), []
  for _ in range(3):
    updates, state = optimiser.update({"w": np.float32(1)}, state, {"w": np.float32(0)})
    seen.append(float(updates["w"]))
  assert seen == pytest.approx([-1, -0.1, -0.01])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(momentum=1.0, weight_decay=0), r"momentum must be in \[0, 1\); got 1.0"),
    (dict(momentum=-0.1, weight_decay=0), "momentum must be .*; got -0.1"),
    (dict(momentum=0, weight_decay=-1e-4), "weight_decay must be >= 0; got -0.0001"),
    (
      dict(momentum=0, weight_decay=0, gate_weight_decay=-1.0),
      "gate_weight_decay must be >= 0; got -1.0",
    ),
    (
      dict(momentum=0, weight_decay=0, gate_lr_multiplier=0),
      "gate_lr_multiplier must be > 0; got 0",
    ),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    optim.sgd(optax.constant_schedule(0.1), **settings)


def test_adam_decays_everything_but_gates_apart_from_the_gradient(params):
  gates, others = split(params)
  optimiser = optim.adam(optax.constant_schedule(0.1), weight_decay=0.5)
  step = lambda grads: optax.apply_updates(
    params, optimiser.update(grads, optimiser.init(params), params)[0]
  )
  gates_after, others_after = split(step(jax.tree.map(lambda x: np.full_like(x, -3), params)))
  for path, value in gates.items():  # the first step of Adam is the gradient's sign
    np.testing.assert_allclose(
      gates_after[path], value + 0.1, rtol=1e-5, atol=1e-6, err_msg=str(path)
    )
  for path, value in others.items():
    np.testing.assert_allclose(
      others_after[path], value + 0.1 - 0.05 * value, rtol=1e-5, atol=1e-6, err_msg=str(path)
    )


def test_adam_refuses_bad_weight_decay():
  with pytest.raises(ValueError, match=r"^weight_decay must be >= 0; got nan$"):
    optim.adam(optax.constant_schedule(0.1), weight_decay=float("nan"))


@pytest.mark.parametrize(
  "make",
  [
    lambda: optim.sgd(optax.constant_schedule(0.1), momentum=0.9, weight_decay=0.1),
    lambda: optim.adam(optax.constant_schedule(0.1), weight_decay=0.1),
  ],
)
def test_frozen_parameters_stay_bit_for_bit_and_the_others_move_as_without(params, make):
  is_frozen = lambda path: "conv1" in path or path[-1] == "scale"
  grads = [jax.tree.map(lambda x, n=n: np.cos(n + 3 * np.asarray(x)), params) for n in range(3)]

  def trained(optimiser):
    after, state = params, optimiser.init(params)
    for grad in grads:
      updates, state = optimiser.update(grad, state, after)
      after = optax.apply_updates(after, updates)
    return traverse_util.flatten_dict(jax.device_get(after))

  before, plain = traverse_util.flatten_dict(jax.device_get(params)), trained(make())
  after = trained(optim.frozen(make(), is_frozen))
  still = [path for path in before if is_frozen(path)]
  assert 3 < len(still) < len(before)
  assert any(is_gate_path(path) for path in still)
  for path, value in before.items():
    assert (plain[path] != value).all()
    np.testing.assert_array_equal(
      after[path], value if path in still else plain[path], err_msg=str(path)
    )


def test_parameters_frozen_at_first_move_later_as_if_training_began_for_them(params):
  is_frozen = lambda path: "conv1" in path
  rate = optax.piecewise_constant_schedule(0.1, {2: 0.5, 4: 0.5})
  make = lambda rate: optim.sgd(rate, momentum=0.9, weight_decay=0.1, gate_lr_multiplier=2.0)
  grads = [jax.tree.map(lambda x, n=n: np.cos(n + 3 * np.asarray(x)), params) for n in range(5)]

  def trained(optimiser, grads):
    after, state, seen = params, optimiser.init(params), []
    for grad in grads:
      updates, state = optimiser.update(grad, state, after)
      after = optax.apply_updates(after, updates)
      seen.append(traverse_util.flatten_dict(jax.device_get(after)))
    return seen

  before = traverse_util.flatten_dict(jax.device_get(params))
  seen = trained(optim.frozen_at_first(make, rate, is_frozen=is_frozen, steps=3), grads)
  plain = trained(make(rate), grads)
  # The frozen ones begin at step 3, with the learning rate of that step.
  late = trained(make(lambda step: rate(step + 3)), grads[3:])
  for path, value in before.items():
    for step in range(5):
      expected = plain[step][path]
      if is_frozen(path):
        expected = value if step < 3 else late[step - 3][path]
      # Rounding is that of parameters of up to 1.
      np.testing.assert_allclose(
        seen[step][path], expected, rtol=1e-6, atol=1e-8, err_msg=f"{step} {path}"
      )
  with pytest.raises(ValueError, match="steps must be >= 0; got -1"):
    optim.frozen_at_first(make, rate, is_frozen=is_frozen, steps=-1)
