"""Gates around models of Flax NNX, written as their authors write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from gating_jax import GatedModel, find_pairs, from_nnx, model_summary
from gating_jax.inference.conditional import compile_conditional
from gating_jax.layers.gate import GateSettings, is_gate_path

IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
SMALL = GateSettings(hidden=4, initial_open=0.6)
PAIRS = (("block/convs/0", "block/convs/1"),)


class Block(nnx.Module):
  def __init__(self, rngs):
    conv = lambda a, b: nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs)
    self.convs = nnx.List([conv(4, 6), conv(6, 4)])
    self.norms = nnx.List([nnx.BatchNorm(6, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])

  def __call__(self, x):
    y = nnx.relu(self.norms[0](self.convs[0](x)))
    return nnx.relu(x + self.norms[1](self.convs[1](y)))


class SmallCNN(nnx.Module):
  """Has layers in lists, a parameter of its own, a norm that the bridge does not know, dropout."""

  def __init__(self, rngs, rate=0.0):
    self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
    self.block = Block(rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.scale = nnx.Param(jnp.full(4, 1.5))
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.block(self.stem(x))) * self.scale[None, None, None]
    return self.head(self.dropout(jnp.mean(x, axis=(1, 2))))


@pytest.fixture(scope="module")
def trained():
  """A model whose statistics are no longer those that it began with; and itself for Linen."""
  model = SmallCNN(nnx.Rngs(0))
  nnx.jit(lambda model, x: model(x))(model, IMAGES)
  linen = from_nnx(model)
  return model, linen, jax.jit(linen.init)(jax.random.key(5), IMAGES)


def copy_of(model):
  return nnx.clone(model)


def assert_states_are_equal(model, variables):
  """The variables of a model are those of Linen, bit for bit."""
  flat = {}
  for collection, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
    for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
      flat[(collection, *map(str, path))] = variable.get_value()
  found = traverse_util.flatten_dict(variables)
  assert found.keys() == flat.keys()
  for path, value in flat.items():
    np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def test_it_is_the_model_bit_for_bit_in_evaluation_and_in_training(trained):
  model, linen, variables = trained
  assert_states_are_equal(model, variables)
  one = copy_of(model)
  one.eval()
  np.testing.assert_array_equal(linen.apply(variables, IMAGES), one(IMAGES))
  graph, state = nnx.split(one)
  compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, IMAGES)
  np.testing.assert_array_equal(jax.jit(linen.apply)(variables, IMAGES), compiled)
  one.train()
  y, new = linen.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
  np.testing.assert_array_equal(y, one(IMAGES))
  assert_states_are_equal(one, {**variables, **new})
  # The model that was given has neither another mode nor other values.
  assert not model.dropout.deterministic
  assert_states_are_equal(model, variables)


@pytest.mark.slow
def test_without_gates_and_with_open_ones_it_is_the_model_bit_for_bit(trained):
  model, linen, variables = trained
  found = find_pairs(linen, IMAGES)
  assert found.pairs == PAIRS
  assert found.refused["stem"] == "it is read by block/convs/0, head"
  one = copy_of(model)
  one.eval()
  y, records = GatedModel(linen, ()).apply(variables, IMAGES)
  assert records == ()
  np.testing.assert_array_equal(y, one(IMAGES))
  gated = GatedModel(linen, PAIRS, SMALL)
  flat = traverse_util.flatten_dict(jax.jit(gated.init)(jax.random.key(0), IMAGES))
  for path, value in flat.items():
    if path[-3:] == ("head", "logits", "bias") and is_gate_path(path):
      flat[path] = np.full_like(value, 5)
    elif path[-3:] == ("head", "logits", "kernel") and is_gate_path(path):
      flat[path] = np.zeros_like(value)
  y, records = gated.apply(traverse_util.unflatten_dict(flat), IMAGES)
  assert [record.gates.shape for record in records] == [(4, 6)]
  np.testing.assert_array_equal(y, one(IMAGES))
  # 3 x 3 convolutions of 3 x 3 pixels between 4, 6 and 4 channels; then the stem and the head.
  gated_macs = 81 * (4 * 6 + 6 * 4)
  assert model_summary(gated, IMAGES.shape[1:]).gated == gated_macs
  ungated = model_summary(GatedModel(linen, ()), IMAGES.shape[1:])
  assert ungated.macs == gated_macs + 81 * 3 * 4 + 8


def test_it_trains_with_gates_under_jit_and_grad(trained):
  _, linen, _ = trained
  gated = GatedModel(linen, PAIRS, SMALL)
  variables = gated.init(jax.random.key(0), IMAGES)
  labels = np.array([0, 1, 1, 0])

  def loss(params):
    (logits, records), new = gated.apply(
      {**variables, "params": params},
      IMAGES,
      train=True,
      mutable=["batch_stats"],
      rngs={"gate": jax.random.key(1)},
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return nll + sum(record.probs.mean() for record in records), new["batch_stats"]

  grads, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  moved = traverse_util.flatten_dict(grads)
  assert np.any(moved[("block", "convs", "0", "gate", "head", "logits", "bias")] != 0)
  assert np.any(moved[("block", "convs", "1", "kernel")] != 0)
  assert jax.tree.structure(stats) == jax.tree.structure(dict(variables["batch_stats"]))


def test_it_is_folded_and_skips_as_a_linen_model_does(trained):
  _, linen, _ = trained
  gated = GatedModel(linen, PAIRS, SMALL)
  variables = gated.init(jax.random.key(0), IMAGES)
  run = compile_conditional(
    gated, variables, input_shape=IMAGES.shape[1:], batch_size=4, strategy="switch"
  )
  y, records = gated.apply(variables, IMAGES)
  found, logits = run(IMAGES)
  np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(logits[0], records[0].logits, rtol=1e-4, atol=1e-5)


def test_dropout_takes_its_key_from_linen():
  linen = from_nnx(SmallCNN(nnx.Rngs(0), rate=0.5))
  variables = linen.init(jax.random.key(0), IMAGES)

  def apply(**rngs):
    return linen.apply(variables, IMAGES, train=True, mutable=["batch_stats"], **rngs)[0]

  key = lambda i: {"rngs": {"dropout": jax.random.key(i)}}
  np.testing.assert_array_equal(apply(**key(1)), apply(**key(1)))
  assert np.any(apply(**key(1)) != apply(**key(2)))
  with pytest.raises(ValueError, match="rngs must have a key 'dropout'"):
    apply()


def test_layers_inside_of_transformations_run_but_have_no_gates():
  class Rematerialised(nnx.Module):
    def __init__(self, rngs):
      self.first, self.inner = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
      self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
      x = nnx.remat(lambda layer, x: layer(x))(self.inner, self.first(x))
      return self.last(jax.checkpoint(lambda x: self.inner(x))(x))

  model, x = Rematerialised(nnx.Rngs(0)), IMAGES[:, 0, 0]
  linen = from_nnx(model)
  variables = linen.init(jax.random.key(0), x)
  np.testing.assert_array_equal(linen.apply(variables, x), model(x))
  with pytest.raises(ValueError, match="layers that the model calls, such as first, last"):
    GatedModel(linen, (("first", "inner"),)).init(jax.random.key(0), x)


def test_a_norm_inside_of_a_transformation_runs_by_its_own_code():
  class Rematerialised(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(3, epsilon=1.0, rngs=rngs)

    def __call__(self, x):
      return jax.checkpoint(lambda x: self.norm(x))(x)

  linen = from_nnx(Rematerialised(nnx.Rngs(0)))
  x = np.array([[1.0, 2.0, 3.0]], np.float32)
  variables = linen.init(jax.random.key(0), x)
  # Fresh statistics are a mean of 0 and a variance of 1.
  np.testing.assert_allclose(linen.apply(variables, x), x / np.sqrt(2), rtol=1e-6)


class Count(nnx.Variable):
  pass


def test_what_the_model_changes_is_given_back_and_what_it_sows_where_asked_for():
  class Counting(nnx.Module):
    def __init__(self):
      zero = jnp.zeros((), jnp.float32)
      self.count, self.seen = Count(zero), nnx.Intermediate(zero)

    def __call__(self, x):
      self.count.set_value(self.count.get_value() + 1)
      self.seen.set_value(jnp.sum(x))
      return x * self.count.get_value()

  linen, x = from_nnx(Counting()), np.array([2.0, 3.0], np.float32)
  variables = linen.init(jax.random.key(0), x, mutable=True)
  (counts,) = {*variables} - {"intermediates"}
  y, changed = linen.apply(variables, x, mutable=[counts])
  assert changed.keys() == {counts}
  np.testing.assert_array_equal(y, changed[counts]["count"] * x)
  again, _ = linen.apply({**variables, **changed}, x, mutable=[counts])
  np.testing.assert_array_equal(again - y, x)
  _, changed = linen.apply(variables, 2 * x, mutable=[counts, "intermediates"])
  assert changed["intermediates"] == {"seen": 10}


class FrozenKernel(nnx.Variable):
  pass


def test_shared_and_frozen_kernels_are_those_of_the_model():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
      self.second.kernel = self.first.kernel
      self.third = nnx.Linear(3, 2, rngs=rngs)
      self.third.kernel = FrozenKernel(self.third.kernel.get_value())

    def __call__(self, x):
      return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))

  model, x = Tied(nnx.Rngs(0)), IMAGES[:, 0, 0]
  linen = from_nnx(model)
  variables = linen.init(jax.random.key(1), x)
  np.testing.assert_array_equal(linen.apply(variables, x), model(x))
  kernels = {path for path in traverse_util.flatten_dict(variables) if path[-1] == "kernel"}
  assert {path[1:] for path in kernels} == {("first", "kernel"), ("third", "kernel")}
  assert variables["params"]["third"].keys() == {"bias"}


def test_what_is_no_model_of_nnx_is_refused():
  for other in (SmallCNN, nn.Dense(3), lambda x: x):
    with pytest.raises(TypeError, match="model must be an instance of a Flax NNX module"):
      from_nnx(other)
