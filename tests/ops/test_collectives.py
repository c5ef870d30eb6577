import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gating_jax.ops import collectives
from gating_jax.ops.ecdf import batch_shaping_loss
from gating_jax.ops.penalties import target_rate_loss
from gating_jax.ops.priors import beta

DEVICES = 8
AXIS = "devices"


@jax.custom_vjp
def gather_without_sum(x):
  return lax.all_gather(x, AXIS, axis=0, tiled=True)


def _gather_without_sum_fwd(x):
  return gather_without_sum(x), x.shape[0]


def _gather_without_sum_bwd(n, cotangent):
  return (lax.dynamic_slice_in_dim(cotangent, lax.axis_index(AXIS) * n, n),)


gather_without_sum.defvjp(_gather_without_sum_fwd, _gather_without_sum_bwd)


def problem():
  """Three gates, 16 examples whose first features differ from device to device, and a target for a squared error."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 4)) + np.linspace(-1, 1, 16)[:, None] * [1, 0, 0, 0]
  weights = rng.normal(size=(4, 3))
  return [jnp.asarray(a, jnp.float32) for a in (weights, x, rng.normal(size=(16, 3)))]


def gradients(axis_name, *, shaping=50.0, fit=1.0, rate=0.0):
  """The step's part that counts: local gradients, averaged over devices if there are any."""

  def loss(weights, x, y):
    logits = x @ weights
    value = fit * jnp.mean(jnp.square(logits - y))
    value += shaping * jnp.sum(batch_shaping_loss(logits, beta(0.6, 0.4), axis_name=axis_name))
    return value + rate * target_rate_loss([jax.nn.sigmoid(logits)], 0.9, axis_name=axis_name)

  def run(weights, x, y):
    result = jax.value_and_grad(loss)(weights, x, y)
    return result if axis_name is None else lax.pmean(result, axis_name)

  return run


def by_pmap(**terms):
  weights, x, y = problem()
  spread = lambda a: a.reshape(DEVICES, -1, *a.shape[1:])
  run = jax.pmap(gradients(AXIS, **terms), axis_name=AXIS, in_axes=(None, 0, 0))
  value, gradient = run(weights, spread(x), spread(y))
  for device in range(DEVICES):
    np.testing.assert_array_equal(gradient[device], gradient[0])
  return value[0], gradient[0]


def by_shard_map(axis_name=AXIS, mesh_shape=(DEVICES,), **terms):
  mesh = Mesh(np.array(jax.devices()).reshape(mesh_shape), axis_name)
  batch = PartitionSpec(axis_name)
  run = jax.shard_map(gradients(axis_name, **terms), mesh=mesh, in_specs=(PartitionSpec(), batch, batch),
                      out_specs=PartitionSpec(), check_vma=False)
  return jax.jit(run)(*problem())


@functools.cache
def on_one_device(**terms):
  return jax.jit(gradients(None, **terms))(*problem())


def relative_distance(a, b):
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_there_are_eight_devices():
  assert jax.device_count() == DEVICES


def test_both_terms_shape_the_gradient_of_the_problem():
  both, fit, shaping = (on_one_device(**t)[1] for t in ({}, {"shaping": 0.0}, {"fit": 0.0}))
  assert relative_distance(fit, both) > 0.1
  assert relative_distance(shaping, both) > 0.1
  assert relative_distance(fit + shaping, both) < 1e-6


@pytest.mark.parametrize("spread", [by_pmap, by_shard_map])
@pytest.mark.parametrize("terms", [{}, {"rate": 1.0}], ids=str)
def test_eight_devices_and_one_give_the_same_loss_and_gradient(spread, terms):
  value, gradient = on_one_device(**terms)
  spread_value, spread_gradient = spread(**terms)
  np.testing.assert_allclose(spread_value, value, rtol=1e-6)
  assert relative_distance(spread_gradient, gradient) < 1e-6


def test_the_batch_may_be_spread_over_two_axes():
  value, gradient = by_shard_map(("hosts", "devices"), (2, 4))
  assert relative_distance(gradient, on_one_device()[1]) < 1e-6
  np.testing.assert_allclose(value, on_one_device()[0], rtol=1e-6)


@pytest.mark.parametrize("spread", [by_pmap, by_shard_map])
def test_the_comparison_detects_a_backward_pass_without_the_sum(spread, monkeypatch):
  right = on_one_device()
  monkeypatch.setattr(collectives, "gather_batch", lambda x, axis_name: gather_without_sum(x))
  value, gradient = spread()
  np.testing.assert_allclose(value, right[0], rtol=1e-6)
  assert relative_distance(gradient, right[1]) > 0.1


def test_gather_batch_has_the_examples_in_device_order():
  x = jnp.arange(48.0).reshape(DEVICES, 2, 3)
  gathered = jax.pmap(lambda x: collectives.gather_batch(x, AXIS), axis_name=AXIS)(x)
  for device in range(DEVICES):
    np.testing.assert_array_equal(gathered[device], np.arange(48.0).reshape(16, 3))


def test_gather_batch_sums_the_cotangents_of_all_devices():
  x = jnp.zeros((DEVICES, 2))
  cotangents = jnp.asarray(np.random.default_rng(0).integers(0, 9, (DEVICES, 2 * DEVICES)), jnp.float32)
  pull = lambda x, ct: jax.vjp(lambda x: collectives.gather_batch(x, AXIS), x)[1](ct)[0]
  expected = np.asarray(cotangents).sum(0).reshape(DEVICES, 2)
  np.testing.assert_array_equal(jax.pmap(pull, axis_name=AXIS)(x, cotangents), expected)


def test_batch_mean_is_over_all_devices():
  x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
  np.testing.assert_array_equal(collectives.batch_mean(x, None), [22.5, 23.5, 24.5])
  means = jax.pmap(lambda x: collectives.batch_mean(x, AXIS), axis_name=AXIS)(x.reshape(DEVICES, 2, 3))
  np.testing.assert_array_equal(means, np.tile([22.5, 23.5, 24.5], (DEVICES, 1)))


def test_example_keys_do_not_depend_on_the_number_of_devices():
  draw = lambda key, n, axis_name: jax.vmap(jax.random.bits)(collectives.example_keys(key, n, axis_name))
  alone = np.asarray(draw(jax.random.key(3), 16, None))
  assert len(set(alone.tolist())) == 16
  assert not np.isin(draw(jax.random.key(4), 16, None), alone).any()
  by_device = jax.pmap(lambda _: draw(jax.random.key(3), 2, AXIS), axis_name=AXIS)(jnp.zeros(DEVICES))
  np.testing.assert_array_equal(by_device.ravel(), alone)
  two = jax.pmap(lambda _: draw(jax.random.key(3), 8, AXIS), axis_name=AXIS, devices=jax.devices()[:2])(jnp.zeros(2))
  np.testing.assert_array_equal(two.ravel(), alone)
