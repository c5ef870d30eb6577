import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual.method import Batch, Variables
from gating_jax.continual.methods.lwf import fine_tuning, lwf, old_heads_cross_entropy
from tests.helpers import conflicting

NET = conflicting.network()


def make(net=NET, weight=1.0, temperature=2.0):
  return lwf(net, weight=weight, temperature=temperature)


def random_logits(seed, n=4, classes=6):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(n, classes)) * 3, jnp.float32)


def distillation(net, task):
  """Returns the term as a function of parameters; the teacher is the learner's initial state."""
  method = make(net)
  state = conflicting.learner(method, optax.sgd(0.1)).replace(task=jnp.asarray(task))
  data = conflicting.task(1)
  batch = Batch(
    net.problem.normalise(data.pixels),
    jnp.asarray(data.labels),
    jax.random.key(0),
    jnp.asarray(0.0),
  )
  return state, lambda p: method.loss(p, state, batch)[1][0]["distillation"]


def test_value_by_hand():
  """Teacher (2/3, 1/3) and student (1/2, 1/2) at temperature 2, in the one old head: ln 2."""
  teacher = 2 * jnp.log(jnp.array([[2.0, 1.0, 9.0, 1.0]]))
  found = old_heads_cross_entropy(
    jnp.array([[5.0, 5.0, 1.0, 0.0]]), teacher, 1, classes=2, temperature=2.0
  )
  np.testing.assert_allclose(found, [np.log(2)], rtol=1e-6)
  student = 2 * jnp.log(jnp.array([[1.0, 3.0, 1.0, 0.0 + 1]]))
  found = old_heads_cross_entropy(student, teacher, 1, classes=2, temperature=2.0)
  np.testing.assert_allclose(found, [-(2 / 3 * np.log(1 / 4) + 1 / 3 * np.log(3 / 4))], rtol=1e-6)


@pytest.mark.parametrize("task", [0, 1, 2, 3])
def test_only_old_heads_matter(task):
  """The gradient is (softmax(z / tau) - softmax(t / tau)) / tau in old heads, and 0 in others."""
  student, teacher = random_logits(0), random_logits(1)
  summed = lambda z, task: jnp.sum(
    old_heads_cross_entropy(z, teacher, task, classes=2, temperature=2.0)
  )
  grads = jax.jit(jax.grad(summed))(student, task)
  soft = lambda z: np.asarray(jax.nn.softmax(z.reshape(4, 3, 2) / 2.0)).reshape(4, 6)
  expected = (soft(student) - soft(teacher)) / 2.0 * (np.arange(6) < 2 * task)
  np.testing.assert_allclose(grads, expected, atol=1e-6)


def test_the_loss_is_least_and_flat_where_student_and_teacher_agree():
  teacher = random_logits(0)
  value = lambda z: jnp.sum(old_heads_cross_entropy(z, teacher, 2, classes=2, temperature=2.0))
  # A constant for each head changes no softmax.
  shifted = teacher + jnp.repeat(jnp.array([5.0, -3.0, 1.0]), 2)
  for same in (teacher, shifted):
    np.testing.assert_allclose(jax.grad(value)(same), 0, atol=1e-6)
  p = np.asarray(jax.nn.softmax(teacher.reshape(4, 3, 2)[:, :2] / 2.0))
  np.testing.assert_allclose(value(teacher), -np.sum(p * np.log(p)), rtol=1e-5)
  assert float(value(random_logits(1))) > float(value(teacher)) + 0.1


def test_a_fresh_student_has_no_gradient_unless_its_statistics_differ():
  """With BatchNorm the gradient is not zero.

  The student uses the batch's statistics, the teacher its own.
  """
  largest = {}
  for norm in (False, True):
    state, term = distillation(conflicting.network(norm=norm), task=1)
    largest[norm] = max(
      float(np.abs(g).max()) for g in jax.tree.leaves(jax.jit(jax.grad(term))(state.params))
    )
  assert largest[False] < 1e-6
  assert largest[True] > 1e-3


def test_first_task_has_nothing_to_keep():
  state, term = distillation(NET, task=0)
  value, grads = jax.jit(jax.value_and_grad(term))(state.params)
  assert float(value) == 0
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_the_teacher_is_the_learner_after_the_last_task_and_stays_frozen():
  net = conflicting.network(norm=True)
  method, optimiser = make(net), optax.sgd(0.1)
  state, data = conflicting.learner(method, optimiser), conflicting.task(0)
  step = jax.jit(conflicting.step(method, net, optimiser))
  state = method.end_task(step(state, data.pixels, data.labels, 0.0)[0], data, jax.random.key(0))
  state, teacher = state.replace(task=jnp.asarray(1)), jax.device_get(state.memory)
  jax.tree.map(
    np.testing.assert_array_equal,
    teacher,
    jax.device_get(Variables(state.params, state.batch_stats)),
  )
  data = conflicting.task(1)
  for _ in range(3):
    state, _ = step(state, data.pixels, data.labels, 0.0)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.memory), teacher)
  for now, then in (
    (state.params["hidden"], teacher.params["hidden"]),
    (state.batch_stats["norm"], teacher.batch_stats["norm"]),
  ):
    assert all(
      not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (now, then)), strict=True)
    )
  jax.tree.map(
    np.testing.assert_array_equal,
    method.end_task(state, data, jax.random.key(1)).memory.params,
    state.params,
  )


def test_forgets_less_than_fine_tuning_and_keeps_its_shapes():
  _, free = conflicting.learn(fine_tuning(NET), NET)
  states, held = conflicting.learn(make(), NET)
  assert free[0, 0] - free[1, 0] > 0.1
  assert held[0, 0] - held[1, 0] < 0.05
  assert held[1, 1] > 0.9
  shapes = [
    jax.tree.map(jnp.shape, s.memory)
    for s in (conflicting.learner(make(), optax.sgd(0.1)), *states)
  ]
  assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("weight", -1.0, "weight must be >= 0; got -1.0"),
    ("temperature", 0.0, "temperature must be > 0; got 0.0"),
  ],
)
def test_settings_out_of_range_are_named(setting, value, message):
  with pytest.raises(ValueError, match=message):
    make(**{setting: value})
