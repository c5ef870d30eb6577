import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual.generators import wgan
from gating_jax.continual.generators.wgan import WganSettings
from gating_jax.layers.gate import GateSettings
from gating_jax.models.generator import Critic, Generator
from gating_jax.training import devices, steps
from gating_jax.training.devices import BATCH, REPLICATED
from tests.helpers import tiny

SETTINGS = WganSettings(critic_steps=2, learning_rate=1e-3, ema_decay=0.9)


class Pair(nn.Module):
  """Makes a generator of two-pixel images, wide enough that training succeeds from every seed."""

  shape = (1, 2, 1)
  latent = 2

  @nn.compact
  def __call__(self, z, labels, train=False):
    h = nn.leaky_relu(nn.Dense(64)(z))
    return jnp.tanh(nn.Dense(2)(nn.leaky_relu(nn.Dense(64)(h)))).reshape(-1, *self.shape), ()


class PairCritic(nn.Module):
  @nn.compact
  def __call__(self, x, labels):
    h = nn.leaky_relu(nn.Dense(64)(x.reshape(-1, 2)))
    return nn.Dense(1)(nn.leaky_relu(nn.Dense(64)(h)))[:, 0]


PAIR = Pair(), PairCritic()


def generated(generator, state, key, n, labels=None):
  """Returns `[n, H, W, D]` uint8 images of the averaged parameters."""
  variables = {"params": state.average, "batch_stats": state.batch_stats}
  made, _ = generator.apply(variables, wgan.draw_latents(key, n, generator.latent), labels)
  return wgan.to_pixels(made)


def gated_nets(axis_name=None):
  """Makes a generator and a critic that are gated and conditional."""
  generator = Generator(
    (8, 8, 1),
    latent=6,
    width=4,
    classes=3,
    gating="channel",
    gate=GateSettings(hidden=4, initial_open=0.6),
    axis_name=axis_name,
  )
  return generator, Critic(width=4, classes=3)


def images(count, shape=(1, 2, 1), classes=3, seed=0):
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (count, *shape)) * rng.uniform(0, 1, (count, 1, 1, 1))
  return pixels.astype(np.uint8), rng.integers(0, classes, count).astype(np.int32)


@pytest.mark.slow
def test_it_learns_how_two_pixels_belong_together():
  left = np.arange(60, 201, 4)
  pixels = np.stack([left, 230 - left // 2], axis=-1).astype(np.uint8).reshape(-1, 1, 2, 1)
  settings = WganSettings(critic_steps=3, learning_rate=2e-3)
  run = jax.jit(steps.resident_steps(wgan.make_wgan_step(*PAIR, settings, seed=0)))
  draw = jax.jit(lambda state: generated(PAIR[0], state, jax.random.key(1), 500))
  made = lambda state: np.asarray(draw(state), float).reshape(-1, 2)
  off_line = lambda pairs: np.mean(np.abs(pairs[:, 1] - (230 - pairs[:, 0] / 2)))
  state = wgan.init_state(*PAIR, settings, 0)
  assert off_line(made(state)) > 20
  indices = np.random.default_rng(0).integers(0, len(left), (32 * 3, 1000))
  state, metrics = run(state, (pixels, np.zeros(len(left), np.int32)), indices)
  pairs = made(state)
  assert off_line(pairs) < 3
  np.testing.assert_allclose(np.mean(pairs[:, 0]), np.mean(left), atol=8)
  np.testing.assert_allclose(np.std(pairs[:, 0]), np.std(left), rtol=0.2)
  assert metrics["distance"].shape == (1000,)
  assert abs(np.mean(metrics["distance"][-100:])) < 0.2 * np.max(metrics["distance"])
  assert all(np.isfinite(values).all() for values in metrics.values())


@functools.cache
def step(seed=0):
  return jax.jit(wgan.make_wgan_step(*PAIR, SETTINGS, seed=seed))


@functools.cache
def start(seed=0):
  return wgan.init_state(*PAIR, SETTINGS, seed)


def after(state, first, last, seed=0):
  for at in range(first, last):
    state, _ = step(seed)(state, *images(8, seed=at))
  return state


@pytest.mark.slow
def test_a_run_that_stopped_continues_to_the_bit(tmp_path):
  whole, half = after(start(), 0, 4), after(start(), 0, 2)
  np.savez(tmp_path / "half.npz", *jax.tree.leaves(jax.device_get(half)))
  kept = np.load(tmp_path / "half.npz")
  read = jax.tree.unflatten(jax.tree.structure(half), [kept[name] for name in kept.files])
  assert tiny.bit_equal(after(read, 2, 4), whole)
  assert int(whole.step) == 4
  assert tiny.relative_gap(whole.critic, half.critic) > 1e-3


def test_a_step_depends_on_seed_and_step():
  generator = after(start(), 0, 1).generator
  assert tiny.bit_equal(after(start(), 0, 1).generator, generator)
  assert not tiny.bit_equal(after(start(), 0, 1, seed=1).generator, generator)
  assert not tiny.bit_equal(after(start().replace(step=jnp.int32(1)), 0, 1).generator, generator)
  assert not tiny.bit_equal(start(1).critic, start().critic)


def test_the_average_follows_the_generator():
  first = start()
  second = after(first, 0, 1)
  third = after(second, 1, 2)
  expected = jax.tree.map(
    lambda a, b, c: 0.81 * a + 0.09 * b + 0.1 * c, *(s.generator for s in (first, second, third))
  )
  assert tiny.relative_gap(third.average, third.generator) > 1e-4
  assert tiny.relative_gap(third.average, expected) < 1e-6


def test_a_step_by_hand():
  """Two critic updates, each on every other image, and one of the generator, with given noise."""
  pixels, (generator, critic), adam = images(8)[0], PAIR, SETTINGS.adam()
  key = jax.random.fold_in(jax.random.key(0), 0)
  draw = lambda i, stream: jax.random.fold_in(jax.random.fold_in(key, i), stream)
  make = lambda params, i: generator.apply(
    {"params": params}, wgan.draw_latents(draw(i, wgan.LATENT_STREAM), 4, 2), None
  )[0]
  score = lambda params, x: critic.apply({"params": params}, x, None)

  @jax.jit
  def by_hand(state):
    params, opt = state.critic, state.critic_opt
    for i in range(2):
      uniform = lambda n, i=i: jax.random.uniform(jax.random.fold_in(draw(i, wgan.MIX_STREAM), n))
      real, mix = wgan.to_unit(pixels[i::2]), jnp.stack([uniform(n) for n in range(4)])
      fake = make(state.generator, i)
      loss = lambda p, *args: wgan.critic_loss(functools.partial(score, p), *args, penalty=10.0)[0]
      updates, opt = adam.update(jax.grad(loss)(params, real, fake, mix), opt)
      params = optax.apply_updates(params, updates)
    loss, gradient = jax.value_and_grad(lambda p: -jnp.mean(score(params, make(p, 2))))(
      state.generator
    )
    updates, _ = adam.update(gradient, state.generator_opt)
    return params, optax.apply_updates(state.generator, updates), loss, mix

  critic_params, generator_params, loss, mix = by_hand(start())
  new, metrics = step()(start(), *images(8))
  assert len(set(mix.tolist())) == 4
  assert tiny.relative_gap(critic_params, start().critic) > 1e-3
  assert tiny.relative_gap(new.critic, critic_params) < 1e-6
  assert tiny.relative_gap(new.generator, generator_params) < 1e-6
  np.testing.assert_allclose(metrics["generator_loss"], loss, rtol=1e-5)


@functools.cache
def gated_step(axis_name=None):
  return wgan.make_wgan_step(
    *gated_nets(axis_name),
    SETTINGS,
    seed=0,
    axis_name=axis_name,
    hooks=wgan.GeneratorHooks(
      records_loss=lambda records: 5 * sum(jnp.mean(r.gates) for r in records)
    ),
  )


@functools.cache
def gated_start():
  return wgan.init_state(*gated_nets(), SETTINGS, 0)


gated_images = functools.partial(images, shape=(8, 8, 1))
alone = functools.cache(lambda: jax.jit(gated_step()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", devices.BACKENDS)
def test_eight_devices_equal_one(backend):
  spread = devices.map_over_devices(
    gated_step(devices.AXIS),
    args=(REPLICATED, BATCH, BATCH),
    results=(REPLICATED, REPLICATED),
    backend=backend,
  )
  eight, one = devices.replicate(gated_start()), gated_start()
  for at in range(2):
    eight, metrics = spread(eight, *gated_images(32, seed=at))
    one, expected = alone()(one, *gated_images(32, seed=at))
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
  for part in ("generator", "critic", "average", "batch_stats"):
    moved = tiny.relative_gap(getattr(one, part), getattr(gated_start(), part))
    gap = tiny.relative_gap(getattr(eight, part), getattr(one, part))
    assert gap < moved / 20, (part, gap, moved)


@pytest.mark.slow
def test_a_gated_generator_learns_its_gates_and_samples_without_noise():
  state, fresh = gated_start(), gated_start()
  for at in range(3):
    state, _ = alone()(state, *gated_images(32, seed=at))
  head = lambda s: s.generator["map1"]["gate"]["head"]["logits"]["bias"]
  np.testing.assert_array_less(head(state), head(fresh))  # the loss of the records closes them
  assert not tiny.bit_equal(state.batch_stats, fresh.batch_stats)
  draw = jax.jit(
    lambda state: generated(gated_nets()[0], state, jax.random.key(3), 5, jnp.arange(5) % 3)
  )
  np.testing.assert_array_equal(draw(state), draw(state))
  assert np.any(draw(state) != draw(state.replace(average=fresh.average)))


def test_labels_reach_the_loss():
  pixels, labels = gated_images(32)
  one, other = (alone()(gated_start(), pixels, y)[0] for y in (labels, (labels + 1) % 3))
  assert not tiny.bit_equal(one.critic, other.critic)


def test_an_update_may_leave_parameters_as_they_are_to_the_bit():
  freeze = lambda updates, params: {
    **updates,
    "Dense_0": jax.tree.map(jnp.zeros_like, params["Dense_0"]),
  }
  state = start()
  run = jax.jit(
    wgan.make_wgan_step(*PAIR, SETTINGS, seed=0, hooks=wgan.GeneratorHooks(update=freeze))
  )
  new, _ = run(*(run(state, *images(8))[0], *images(8, seed=1)))
  for part in (new.generator, new.average):
    assert tiny.bit_equal(part["Dense_0"], state.generator["Dense_0"])
    assert tiny.relative_gap(part["Dense_1"], state.generator["Dense_1"]) > 1e-4


def test_the_gradient_is_changed_before_the_optimiser_and_the_update_after_it():
  """Adam's first update is the sign of the gradient times the learning rate."""
  sign = lambda p: jnp.where(p > 0, 1.0, -1.0)
  change = wgan.GeneratorHooks(
    gradient=lambda grads, params: jax.tree.map(sign, params),
    update=lambda updates, params: jax.tree.map(lambda u: 3 * u, updates),
  )
  state = start()
  new, _ = jax.jit(wgan.make_wgan_step(*PAIR, SETTINGS, seed=0, hooks=change))(state, *images(8))
  expected = jax.tree.map(lambda p: p - 3e-3 * sign(p), state.generator)
  assert tiny.relative_gap(new.generator, expected) < 1e-6


def test_the_generator_runs_with_a_view_of_its_parameters():
  """A net that doubles what was halved makes the same images.

  Adam's step does not depend on the gradient's scale.
  """
  times = lambda factor: lambda params: jax.tree.map(lambda p: factor * p, params)
  halved = start().replace(generator=times(0.5)(start().generator))
  run = jax.jit(
    wgan.make_wgan_step(*PAIR, SETTINGS, seed=0, hooks=wgan.GeneratorHooks(view=times(2.0)))
  )
  new, metrics = run(halved, *images(8))
  expected, same = step()(start(), *images(8))
  for name in same:
    np.testing.assert_allclose(metrics[name], same[name], rtol=1e-5)
  moved = lambda a, b: jax.tree.map(jnp.subtract, a.generator, b.generator)
  assert tiny.relative_gap(moved(new, halved), moved(expected, start())) < 0.02


@pytest.mark.thin(3)
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_sizes_of_images(shape):
  generator, critic = Generator(shape, latent=6, width=2, classes=3), Critic(width=2, classes=3)

  def run(pixels):
    fresh = wgan.init_state(generator, critic, SETTINGS, 0)
    state, _ = wgan.make_wgan_step(generator, critic, SETTINGS, seed=0)(
      fresh, pixels, jnp.zeros(8, int)
    )
    return fresh, state, generated(generator, state, jax.random.key(1), 5, jnp.arange(5) % 3)

  fresh, state, made = jax.eval_shape(run, jnp.zeros((8, *shape), jnp.uint8))
  assert (made.shape, made.dtype) == ((5, *shape), jnp.uint8)
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert described(state) == described(fresh)


def test_samples_depend_on_key_and_place():
  sample = jax.jit(lambda key: generated(PAIR[0], start(), key, 4))
  draw = lambda seed: np.asarray(sample(jax.random.key(seed)), float)
  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.mean(np.abs(draw(0) - draw(1))) > 1
  assert len(np.unique(draw(0).reshape(4, -1), axis=0)) == 4


def test_pixels_survive_the_way_there_and_back():
  pixels = np.arange(256, dtype=np.uint8)
  unit = wgan.to_unit(jnp.asarray(pixels))
  np.testing.assert_allclose([unit[0], unit[255]], [-1, 1], atol=1e-6)
  np.testing.assert_array_equal(wgan.to_pixels(unit), pixels)
  np.testing.assert_array_equal(wgan.to_pixels(jnp.array([-3.0, 3.0])), [0, 255])


def test_images_must_divide_over_the_updates_of_the_critic():
  with pytest.raises(
    ValueError, match="images must be a multiple of the 2 updates of the critic; got 7"
  ):
    step()(start(), *images(7))


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    (dict(critic_steps=0), "critic_steps must be >= 1; got 0"),
    (dict(penalty=-1.0), "penalty must be >= 0; got -1.0"),
    (dict(learning_rate=0.0), "learning_rate must be > 0; got 0.0"),
    (dict(beta1=1.0), r"beta1 must be in \[0, 1\); got 1.0"),
    (dict(beta2=-0.1), r"beta2 must be in \[0, 1\); got -0.1"),
    (dict(ema_decay=1.0), r"ema_decay must be in \[0, 1\); got 1.0"),
  ],
)
def test_bad_settings_are_named(setting, message):
  with pytest.raises(ValueError, match=message):
    WganSettings(**setting)
