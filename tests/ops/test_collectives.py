import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.ops import collectives

DEVICES = 8
AXIS = "devices"


def test_gather_batch_has_the_examples_in_device_order():
  x = jnp.arange(48.0).reshape(DEVICES, 2, 3)
  gathered = jax.pmap(lambda x: collectives.gather_batch(x, AXIS), axis_name=AXIS)(x)
  for device in range(DEVICES):
    np.testing.assert_array_equal(gathered[device], np.arange(48.0).reshape(16, 3))


def test_gather_batch_without_devices_is_the_batch():
  x = np.arange(6.0).reshape(2, 3)
  assert collectives.gather_batch(x, None) is x


def test_gather_batch_sums_the_cotangents_of_all_devices():
  x = jnp.zeros((DEVICES, 2), jnp.float32)
  cotangents = jnp.asarray(
    np.random.default_rng(0).integers(0, 9, (DEVICES, 2 * DEVICES)), jnp.float32
  )
  pull = lambda x, ct: jax.vjp(lambda x: collectives.gather_batch(x, AXIS), x)[1](ct)[0]
  expected = np.asarray(cotangents).sum(0).reshape(DEVICES, 2)
  np.testing.assert_array_equal(jax.pmap(pull, axis_name=AXIS)(x, cotangents), expected)


def test_exchange_columns_gives_each_device_its_share_of_the_columns():
  x = np.arange(1.0, 161, dtype=np.float32).reshape(16, 10)
  shares = jax.pmap(lambda x: collectives.exchange_columns(x, AXIS), axis_name=AXIS)(
    x.reshape(DEVICES, 2, 10)
  )
  assert shares.shape == (DEVICES, 16, 2)
  np.testing.assert_array_equal(np.concatenate(shares, axis=1), np.pad(x, ((0, 0), (0, 6))))


def test_exchange_columns_sends_cotangents_back():
  pull = lambda x, ct: jax.vjp(lambda x: collectives.exchange_columns(x, AXIS), x)[1](ct)[0]
  cotangents = np.random.default_rng(0).normal(size=(DEVICES, 16, 2)).astype(np.float32)
  back = jax.pmap(pull, axis_name=AXIS)(jnp.zeros((DEVICES, 2, 10), jnp.float32), cotangents)
  np.testing.assert_array_equal(back.reshape(16, 10), np.concatenate(cotangents, axis=1)[:, :10])


def test_batch_mean_is_over_all_devices():
  x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
  np.testing.assert_array_equal(collectives.batch_mean(x, None), [22.5, 23.5, 24.5])
  means = jax.pmap(lambda x: collectives.batch_mean(x, AXIS), axis_name=AXIS)(
    x.reshape(DEVICES, 2, 3)
  )
  np.testing.assert_array_equal(means, np.tile([22.5, 23.5, 24.5], (DEVICES, 1)))


def test_example_keys_do_not_depend_on_the_number_of_devices():
  draw = lambda key, n, axis_name: jax.vmap(jax.random.bits)(
    collectives.example_keys(key, n, axis_name)
  )
  alone = np.asarray(draw(jax.random.key(3), 16, None))
  assert len(set(alone.tolist())) == 16
  assert not np.isin(draw(jax.random.key(4), 16, None), alone).any()
  by_device = jax.pmap(lambda _: draw(jax.random.key(3), 2, AXIS), axis_name=AXIS)(
    jnp.zeros(DEVICES)
  )
  np.testing.assert_array_equal(by_device.ravel(), alone)
  two = jax.pmap(
    lambda _: draw(jax.random.key(3), 8, AXIS), axis_name=AXIS, devices=jax.devices()[:2]
  )(jnp.zeros(2))
  np.testing.assert_array_equal(two.ravel(), alone)
