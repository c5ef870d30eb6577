"""Folded and compiled gated models, whose rest is their authors' own code."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from gating_jax import GatedModel, find_pairs, shift_thresholds
from gating_jax.inference import costs, folded
from gating_jax.inference.analysing import analyse, prune, pruning_error
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.export import export_model, load_exported
from gating_jax.inference.folding import fold
from gating_jax.inference.pruning import PruneMask, apply_pruning
from gating_jax.inference.quantising import dequantise, quantise
from gating_jax.inference.strategies import why_not
from gating_jax.layers.gate import GateSettings
from gating_jax.models.summary import model_summary
from gating_jax.ops.macs import executed_macs

SHAPE = (9, 8, 3)
GATE = GateSettings(hidden=4)
WEIGHTED = GateSettings(hidden=4, normalise=1.5, threshold="quantile", share=0.6, weighted=True)
norm = functools.partial(nn.BatchNorm, use_running_average=True)


class Net(nn.Module):
  """A chain of three convolutions, a block with a shortcut, and code of its own."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(5, (3, 3), name="stem")(x)
    h = nn.relu(norm(name="norm1")(nn.Conv(6, (3, 3), strides=2, name="chain1")(x)))
    h = nn.relu(norm(epsilon=0.1, use_scale=False)(nn.Conv(18, (1, 3), name="chain2")(h)))
    x = x[:, ::2, ::2] + nn.Conv(5, (3, 3), name="chain3")(h)
    h = jnp.maximum(0, nn.Conv(7, (3, 3), padding=1, use_bias=False, name="inner")(jnp.tanh(x)))
    y = nn.Conv(5, (1, 1), padding="VALID", name="outer")(h)
    return nn.Dense(3, name="head")(jnp.mean(nn.gelu(x + y), axis=(1, 2)))


PAIRS = (("chain1", "chain2"), ("chain2", "chain3"), ("inner", "outer"))


def images(count=5, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(count, *SHAPE)) + rng.normal(size=(count, 1, 1, 3))).astype(np.float32)


def random_variables(model):
  """Makes variables for which every unit matters, with gates of either kind."""
  rng = np.random.default_rng(1)
  image = jax.ShapeDtypeStruct((1, *SHAPE), np.float32)
  made = jax.eval_shape(model.init, jax.random.key(0), image)
  filled = {}
  for path, leaf in traverse_util.flatten_dict(dict(made)).items():
    scale = 3.0 if "gate" in path and path[-1] in ("kernel", "logits") else 0.3
    filled[path] = np.float32(rng.normal(0, scale, leaf.shape))
    if path[-1] in ("scale", "var"):
      filled[path] = np.float32(rng.uniform(0.5, 1.5, leaf.shape))
  return traverse_util.unflatten_dict(filled)


@functools.cache
def trained(gate=GATE):
  """A gated model, its variables and what they make of images."""
  gated = GatedModel(Net(), PAIRS, gate)
  variables = random_variables(gated)
  return gated, variables, jax.device_get(jax.jit(gated.apply)(variables, images()))


def assert_near(y, expected):
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_pairs_are_those_that_can_be_found():
  assert set(PAIRS) <= set(find_pairs(Net(), images()).pairs)


def test_the_same_outputs_gates_and_macs():
  gated, variables, (expected, records) = trained()
  net = fold(gated, variables, images())
  y, logits = jax.jit(folded.run_net)(net, images())
  assert_near(y, expected)
  for found, record in zip(logits, records, strict=True):
    np.testing.assert_allclose(found, record.logits, rtol=1e-3, atol=1e-3)
  gates = [record.gates for record in records]
  assert all(0 < g.mean() < 1 for g in gates)
  counts = model_summary(gated, SHAPE)
  assert costs.macs(net, SHAPE) == counts.macs + counts.gate_macs
  np.testing.assert_array_equal(
    costs.macs(net, SHAPE, gates), counts.always_macs + np.asarray(executed_macs(records))
  )


def test_what_static_gates_close_is_gone():
  gated, variables, (expected, records) = trained(GateSettings(context="none"))
  net = fold(gated, variables, jax.ShapeDtypeStruct((1, *SHAPE), np.float32))
  y, logits = jax.jit(folded.run_net)(net, images())
  assert logits == ()
  assert_near(y, expected)
  widths = [part.conv.bias.size for part in net.parts]
  assert widths[2] == widths[4] == 5
  left = [max(1, int(record.gates[0].sum())) for record in records]
  assert [widths[0], widths[1], widths[3]] == left
  assert left != [6, 18, 7]


@pytest.mark.thin(3)
@pytest.mark.parametrize("strategy", ["switch", "native", "auto"])
def test_a_compiled_model_equals_it(strategy):
  if reason := why_not(strategy):
    pytest.skip(reason)
  gated, variables, (expected, records) = trained()
  run = compile_conditional(
    gated,
    variables,
    input_shape=SHAPE,
    batch_size=5,
    strategy=strategy,
    calibration=images(4, seed=3),
    candidates=("switch",),
    repeats=1,
  )
  # The kernel for CPUs takes no padding on one side, as that of the first layer.
  fitting = {"switch": ["switch"] * 5, "native": ["masked", *["native"] * 4]}
  assert strategy == "auto" or list(run.strategies) == fitting[strategy]
  y, logits = run(images())
  assert_near(y, expected)
  for found, record in zip(logits, records, strict=True):
    np.testing.assert_array_equal(np.asarray(found) > 0, record.gates > 0)
  run.load(fold(gated, jax.tree.map(lambda leaf: 0 * leaf, variables), images()))
  np.testing.assert_array_equal(run(images())[0], 0)


@pytest.mark.parametrize("strategy", ["switch", "native"])
def test_weights_and_moved_thresholds_are_those_of_the_model(strategy):
  if reason := why_not(strategy):
    pytest.skip(reason)
  gated, variables, _ = trained(WEIGHTED)
  moved = shift_thresholds(variables, shift=0.2)
  # The program of one shift serves another.
  run = compile_conditional(gated, variables, input_shape=SHAPE, batch_size=5, strategy=strategy)
  run.load(fold(gated, moved, images()))
  y, logits = run(images())
  expected, records = jax.jit(gated.apply)(moved, images())
  assert_near(y, expected)
  for found, record in zip(logits, records, strict=True):
    np.testing.assert_array_equal(np.asarray(found) > 0, record.gates > 0)
    assert 0 < np.mean(record.gates > 0) < 1
    assert len(np.unique(record.gates)) > 3


@pytest.mark.parametrize("settings", [{"context": "moments+grid"}, {"relaxation": "scale"}])
def test_other_contexts_and_scales_are_folded(settings):
  gated, variables, (expected, records) = trained(GateSettings(hidden=4, **settings))
  y, logits = jax.jit(folded.run_net)(fold(gated, variables, images()), images())
  assert_near(y, expected)
  # With scales a network is ungated.
  assert len(logits) == len(records) == (0 if "relaxation" in settings else 3)


@pytest.mark.slow
def test_it_is_pruned_quantised_and_exported(tmp_path):
  gated, variables, (expected, _) = trained()
  net = fold(gated, variables, images())
  y, _ = jax.jit(folded.run_net)(dequantise(quantise(net)), images())
  np.testing.assert_allclose(y, expected, atol=0.1 * np.abs(expected).max())
  analysis = analyse(net, None, images())
  small = prune(analysis, multiple=1)
  assert costs.macs(small, SHAPE) < costs.macs(net, SHAPE)
  assert_near(jax.jit(folded.run_net)(small, images())[0], expected)
  export_model(small, tmp_path / "out", input_shape=SHAPE)
  loaded = load_exported(tmp_path / "out")
  assert loaded.card["dense_macs"] == costs.macs(small, SHAPE)
  assert_near(loaded(images())[0], expected)


def test_answers_that_pruning_changes_are_counted():
  gated, variables, (expected, _) = trained()
  net = fold(gated, variables, images())
  # All units of the first two layers go, whatever the images.
  masks = []
  for part in net.parts:
    for group in part.groups:
      removed = np.full(group.gates, len(masks) < 2)
      masks.append(PruneMask(removed, np.zeros(group.gates, bool)))
  moved = pruning_error(net, masks, images())
  y, _ = jax.jit(folded.run_net)(apply_pruning(net, masks), images())
  changed = np.mean(np.argmax(y, -1) != np.argmax(expected, -1))
  assert changed > 0
  assert (moved.changed, moved.affected) == (changed, 1)


class Shared(nn.Module):
  """Layers of a chain whose channels the outputs read, too."""

  middle: bool

  @nn.compact
  def __call__(self, x):
    first = nn.Conv(4, (3, 3), name="a")(x)
    middle = nn.Conv(6, (3, 3), name="b")(nn.relu(first))
    last = nn.Conv(3, (3, 3), name="c")(nn.relu(middle))
    return last, middle if self.middle else first


def test_what_others_read_is_as_in_the_model():
  gated = GatedModel(Shared(middle=False), (("a", "b"), ("b", "c")), GATE)
  variables = random_variables(gated)
  expected, _ = jax.jit(gated.apply)(variables, images())
  found, _ = jax.jit(folded.run_net)(fold(gated, variables, images()), images())
  for y, wanted in zip(found, expected, strict=True):
    assert_near(y, wanted)
  gated = GatedModel(Shared(middle=True), (("a", "b"), ("b", "c")), GATE)
  with pytest.raises(ValueError, match=r"b, c \(b reads for another pair, and it is read by"):
    fold(gated, variables, images())


def between(act, *, groups=1, **settings):
  """Makes a class of models with `act` between two convolutions, the second in groups."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = act(nn.Conv(4, (3, 3), name="a", **settings)(x))
      return nn.Conv(2, (3, 3), feature_group_count=groups, name="b")(h)

  return Model


@pytest.mark.parametrize(
  ("model", "reason"),
  [
    (between(nn.relu6), "the second does not read a ReLU"),
    (between(lambda h: h), "the second does not read a ReLU"),
    (between(lambda h: nn.relu(2 * h)), "between the first and ReLU is something other than Batch"),
    (between(lambda h: nn.relu(nn.GroupNorm(2)(h))), "something other than BatchNorm"),
    (between(lambda h: nn.relu(norm(axis=1)(h))), "its BatchNorm has another axis than the last"),
    (between(lambda h: nn.max_pool(nn.relu(h), (2, 2))), "the second does not read a ReLU"),
    (between(nn.relu, padding="VALID"), "a has padding 'VALID'"),
    (between(nn.relu, padding=((0, 2), (1, 1))), r"a has padding \(\(0, 2\), \(1, 1\)\)"),
    (between(nn.relu, strides=(1, 2)), "a has other strides or dilations along height"),
    (between(nn.relu, dtype=jnp.bfloat16), "a computes in bfloat16"),
    (between(nn.relu, groups=2), "b has groups, a mask or gaps in its input"),
    (between(nn.relu, input_dilation=2, padding=1), "a has groups, a mask or gaps in its input"),
  ],
)
def test_pairs_that_cannot_be_folded_are_named_with_the_reason(model, reason):
  gated = GatedModel(model(), (("a", "b"),), GATE)
  with pytest.raises(ValueError, match=rf"Conv - BatchNorm - ReLU - Conv .* a, b \(.*{reason}"):
    fold(gated, random_variables(gated), images())


@pytest.mark.parametrize(
  "act",
  [
    lambda h: jnp.maximum(checkpoint_name(h, "features"), 0),
    lambda h: jax.lax.max(h, jnp.zeros_like(h)),
  ],
)
def test_a_relu_may_be_written_in_other_ways(act):
  gated = GatedModel(between(act)(), (("a", "b"),), GATE)
  variables = jax.eval_shape(gated.init, jax.random.key(0), images(1))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
  first, second = fold(gated, zeros, images(1)).parts
  assert first.relu
  assert not second.relu


def test_convolutions_along_one_axis_are_not_folded():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.Conv(4, (3,), name="a")(x[:, 0]))
      return nn.Conv(2, (3,), name="b")(h)

  gated = GatedModel(Model(), (("a", "b"),), GATE)
  with pytest.raises(ValueError, match=r"a, b \(.*a is not over height and width"):
    fold(gated, random_variables(gated), images())


def test_dense_layers_and_other_gates_are_not_folded():
  class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.Dense(4, name="a")(jnp.mean(x, axis=(1, 2))))
      return nn.Dense(2, name="b")(h)

  gated = GatedModel(Mlp(), (("a", "b"),), GATE)
  with pytest.raises(ValueError, match=r"a, b \(a is no nn.Conv\)"):
    fold(gated, random_variables(gated), images())
  with pytest.raises(ValueError, match="pairs must be at least one; got none"):
    fold(GatedModel(Net(), ()), {}, images())
  relaxed = GatedModel(Net(), PAIRS, GateSettings(relaxation="sigmoid"))
  with pytest.raises(ValueError, match="gate relaxation must be straight_through"):
    fold(relaxed, {}, images())
  glancing = GatedModel(Net(), PAIRS, GateSettings(context="glance+pooled"))
  with pytest.raises(ValueError, match="'glance' must be computed by the network that has the"):
    fold(glancing, {}, images())


class Hardwired(nn.Module):
  """A model that is always in training."""

  @nn.compact
  def __call__(self, x):
    norm = nn.BatchNorm(use_running_average=False, name="norm1")
    h = nn.relu(norm(nn.Conv(4, (3, 3), name="a")(x)))
    return nn.Conv(2, (3, 3), name="b")(h)


class Masked(nn.Module):
  @nn.compact
  def __call__(self, x, mask, *, scale, train, flag=None, **others):
    h = nn.relu(nn.Conv(4, (3, 3), name="a")(x * mask))
    return nn.Conv(2, (3, 3), name="b")(scale * h)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (Hardwired(), "running averages of BatchNorm .*; norm1 has use_running_average=False"),
    (Masked(), "called with images alone to be folded; Masked also needs mask, scale"),
  ],
)
def test_models_that_images_alone_do_not_run_are_named(model, message):
  gated = GatedModel(model, (("a", "b"),), GATE)
  given = {"mask": 1.0, "scale": 2.0, "train": False} if isinstance(model, Masked) else {}
  made = jax.eval_shape(lambda x: gated.init(jax.random.key(0), x, **given), images())
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made)
  with pytest.raises(ValueError, match=message):
    fold(gated, variables, images())


def test_kernels_that_say_how_they_are_partitioned_are_folded():
  gated, variables, _ = trained()
  kernel = variables["params"]["chain1"]["kernel"]
  path = ("params", "chain1", "kernel")
  boxed = _with(variables, path, nn.Partitioned(kernel, names=(None,) * 4))
  np.testing.assert_array_equal(
    fold(gated, boxed, images()).parts[0].conv.kernel,
    fold(gated, variables, images()).parts[0].conv.kernel,
  )


def test_images_of_another_shape_are_refused():
  gated, variables, _ = trained()
  with pytest.raises(ValueError, match=r"images must be \[N, H, W, D\], .* GatedModel; got None"):
    fold(gated, variables)
  net = fold(gated, variables, images())
  with pytest.raises(ValueError, match=r"must have the shape \(9, 8, 3\), .* got \(8, 8, 3\)"):
    costs.macs(net, (8, 8, 3))
  with pytest.raises(ValueError, match="images must have 3 channels, .* got 1"):
    analyse(net, None, images()[..., :1])
  with pytest.raises(ValueError, match=r"params/head/kernel of shape \(5, 3\); got \(4, 3\)"):
    fold(gated, _with(variables, ("params", "head", "kernel"), np.zeros((4, 3))), images())


def _with(variables, path, value):
  """Returns variables with another value at a path."""
  flat = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({**flat, path: value})
