import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.gate import GATE_RNG, GateSettings
from gating_jax.models.generator import Critic, Generator
from gating_jax.models.summary import model_summary
from gating_jax.ops.macs import executed_macs


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(net, *inputs, seed=1):
  """Makes random variables with biases alive, without compiling `init`."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    positive = path[-1] in ("scale", "var")
    return jnp.asarray(
      rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.5, leaf.shape), jnp.float32
    )

  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(net.init, jax.random.key(0), *inputs))
  return flax.traverse_util.unflatten_dict(
    {path: fill(path, leaf) for path, leaf in shapes.items()}
  )


@pytest.mark.parametrize(
  ("shape", "maps"),
  [
    ((8, 8, 1), [(4, 4, 4)]),
    ((28, 28, 1), [(7, 7, 8), (14, 14, 4)]),
    ((32, 32, 3), [(4, 4, 16), (8, 8, 8), (16, 16, 4)]),
    ((12, 20, 2), [(6, 10, 4)]),
  ],
)
def test_maps_double_from_the_smallest_that_fits_to_the_image(shape, maps):
  generator = Generator(shape, classes=3, latent=6, width=4, gating="channel")
  critic = Critic(classes=3, width=4)
  z, images, labels = normal(3, 6), jnp.zeros((3, *shape)), jnp.arange(3)
  (made, records), variables = jax.eval_shape(
    lambda z: generator.init_with_output(jax.random.key(0), z, labels), z
  )
  assert made.shape == (3, *shape)
  assert [r.gates.shape for r in records] == [(3, features) for *_, features in maps]
  seed, *others = [
    variables["params"][f"map{i + 1}"]["filters"]["kernel"].shape for i in range(len(maps))
  ]
  # Latent values and the label, one-hot.
  assert seed == (6 + 3, *maps[0])
  assert others == [
    (3, 3, before[-1], after[-1]) for before, after in zip(maps, maps[1:], strict=False)
  ]
  scores, variables = jax.eval_shape(
    lambda x: critic.init_with_output(jax.random.key(0), x, labels), images
  )
  assert scores.shape == (3,)
  assert [variables["params"][f"conv{i + 1}"]["kernel"].shape[-1] for i in range(len(maps))] == [
    features for *_, features in reversed(maps)
  ]
  assert variables["params"]["score"]["kernel"].shape == (np.prod(maps[0]), 3)


def xla_on_doubled(x, p):
  doubled = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
  return p["bias"] + jax.lax.conv_general_dilated(
    doubled, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def test_a_generator_by_xlas_convolutions_of_doubled_maps():
  generator, z = Generator((16, 24, 2), classes=3, latent=5, width=3), normal(4, 5)
  labels = jnp.array([0, 1, 2, 1])
  variables = filled(generator, z, labels)
  p = variables["params"]
  x = np.concatenate([z, np.eye(3)[labels]], axis=1)
  h = np.maximum(
    np.einsum("nz,zhwc->nhwc", x, p["map1"]["filters"]["kernel"]) + p["map1"]["filters"]["bias"], 0
  )
  h = np.maximum(xla_on_doubled(h, p["map2"]["filters"]), 0)
  images, records = jax.jit(generator.apply)(variables, z, labels)
  np.testing.assert_allclose(images, np.tanh(xla_on_doubled(h, p["pixels"])), rtol=1e-4, atol=1e-5)
  assert records == ()
  assert np.std(images) > 0.3


def test_a_critic_by_xlas_convolutions():
  critic, x, labels = Critic(classes=3, width=3), normal(4, 16, 24, 2), jnp.array([0, 1, 2, 1])
  variables = filled(critic, x, labels)
  p, h = variables["params"], x
  for name in ("conv1", "conv2"):
    h = p[name]["bias"] + jax.lax.conv_general_dilated(
      h, p[name]["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = np.where(h > 0, h, 0.2 * h)
  expected = (h.reshape(4, -1) @ p["score"]["kernel"] + p["score"]["bias"])[jnp.arange(4), labels]
  scores = jax.jit(critic.apply)(variables, x, labels)
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-3)


def test_a_score_does_not_depend_on_the_other_images():
  critic, x, labels = Critic(classes=3, width=3), normal(4, 8, 8, 1), jnp.array([0, 1, 2, 1])
  variables = filled(critic, x, labels)
  apply = jax.jit(critic.apply)
  alone = apply(variables, x[1:2], labels[1:2])
  np.testing.assert_allclose(apply(variables, x, labels)[1], alone[0], rtol=1e-5)


def test_labels_reach_both_nets():
  generator, critic = Generator((8, 8, 1), classes=3, latent=5, width=3), Critic(3, width=3)
  z, labels = jnp.repeat(normal(1, 5), 3, axis=0), jnp.arange(3)
  images, _ = jax.jit(generator.apply)(filled(generator, z, labels), z, labels)
  x = jnp.repeat(normal(1, 8, 8, 1), 3, axis=0)
  variables = filled(critic, x, labels)
  scores = jax.jit(critic.apply)(variables, x, labels)
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert np.max(np.abs(images[a] - images[b])) > 0.1
    assert abs(scores[a] - scores[b]) > 0.01
  only = {
    "kernel": variables["params"]["score"]["kernel"][:, 2:],
    "bias": variables["params"]["score"]["bias"][2:],
  }
  third = jax.jit(Critic(1, width=3).apply)(
    {"params": {**variables["params"], "score": only}}, x, jnp.zeros(3, int)
  )
  np.testing.assert_allclose(scores[2], third[2], rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8, 1), (8, 6, 1), (9, 10, 3), (8, 11, 1)])
def test_sides_must_be_even_and_at_least_8(shape):
  message, label = "images must have even sides of at least 8; got shape", jnp.zeros(1, int)
  with pytest.raises(ValueError, match=message):
    Generator(shape, classes=3, latent=4, width=2).init(jax.random.key(0), normal(1, 4), label)
  with pytest.raises(ValueError, match=message):
    Critic(classes=3, width=2).init(jax.random.key(0), normal(1, *shape), label)


def test_a_wrong_latent_size_and_gating_are_named():
  settings = dict(shape=(8, 8, 1), classes=3, latent=4)
  with pytest.raises(ValueError, match=r"z must be \[N, 4\] to match latent; got shape \(1, 5\)"):
    Generator(**settings).init(jax.random.key(0), normal(1, 5), jnp.zeros(1, int))
  with pytest.raises(ValueError, match="gating must be one of channel, none; got 'chanel'"):
    Generator(**settings, gating="chanel").init(jax.random.key(0), normal(1, 4), jnp.zeros(1, int))


@functools.cache
def gated():
  """Makes a gated generator of three maps, its inputs, and variables; every gate opens for some."""
  generator = Generator(
    (32, 32, 1), classes=3, latent=6, width=2, gating="channel", gate=GateSettings(hidden=4)
  )
  inputs = normal(40, 6), jnp.arange(40) % 3
  variables, apply = filled(generator, *inputs), jax.jit(generator.apply)
  for name in ("map1", "map2", "map3"):
    _, records = apply(variables, *inputs)
    logits = records[int(name[-1]) - 1].logits
    variables["params"][name]["gate"]["head"]["logits"]["bias"] -= np.median(logits, axis=0)
  return generator, variables, inputs


@pytest.mark.slow
def test_a_closed_channel_is_as_one_without_a_filter():
  generator, variables, inputs = gated()
  apply = jax.jit(generator.apply)
  images, records = apply(variables, *inputs)
  assert all(0 < np.mean(r.gates[:, c]) < 1 for r in records for c in range(r.gates.shape[1]))
  for i, record in enumerate(records):
    shut = jnp.flatnonzero(record.gates[:, 0] == 0)
    assert 5 < len(shut) < 35
    filters = variables["params"][f"map{i + 1}"]["filters"]
    other = {name: leaf.at[..., 0].set(9.0) for name, leaf in filters.items()}
    params = {
      **variables["params"],
      f"map{i + 1}": {**variables["params"][f"map{i + 1}"], "filters": other},
    }
    changed, _ = apply({**variables, "params": params}, *inputs)
    np.testing.assert_array_equal(changed[shut], images[shut])
    assert np.mean(np.max(np.abs(changed - images), axis=(1, 2, 3)) > 1e-3) > 0.2


class OfLabelZero(nn.Module):
  generator: Generator

  @nn.compact
  def __call__(self, z):
    return self.generator(z, jnp.zeros(len(z), int))


def test_the_macs_of_open_channels():
  generator, variables, inputs = gated()
  sizes = model_summary(OfLabelZero(generator), (6,))
  dense, last = (6 + 3) * 4 * 4 * 8, 32 * 32 * 9 * 2 * 1
  assert sizes.macs == dense + 8 * 8 * 9 * 8 * 4 + 16 * 16 * 9 * 4 * 2 + last == sizes.gated
  assert model_summary(OfLabelZero(generator.clone(gating="none")), (6,)).macs == sizes.macs
  _, records = jax.jit(generator.apply)(variables, *inputs)
  assert [r.writers for r in records] == [((f"map{i}", "filters"),) for i in (1, 2, 3)]
  a, b, c = (np.sum(r.gates, axis=-1) for r in records)
  by_hand = (6 + 3) * 16 * a + 8 * 8 * 9 * a * b + 16 * 16 * 9 * b * c + 32 * 32 * 9 * c
  np.testing.assert_array_equal(executed_macs(records), by_hand)


def test_training_draws_gates_and_evaluation_does_not():
  generator, variables, inputs = gated()

  @jax.jit
  def train(key):
    (_, records), _ = generator.apply(
      variables, *inputs, train=True, rngs={GATE_RNG: key}, mutable=["batch_stats"]
    )
    return records[0].gates

  assert np.mean(train(jax.random.key(0)) != train(jax.random.key(1))) > 0.02
  _, records = jax.jit(generator.apply)(variables, *inputs)
  np.testing.assert_array_equal(records[0].gates, np.asarray(records[0].logits) > 0)
