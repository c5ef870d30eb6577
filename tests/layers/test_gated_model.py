"""Gates around models that are written as their authors write them."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from gating_jax import GatedModel, batch_shaping_loss, beta, find_pairs, model_summary
from gating_jax.inference import folded
from gating_jax.inference.folding import fold
from gating_jax.layers.gate import GateSettings, gate_controls, is_gate_path
from gating_jax.layers.gated_model import holds_channels
from gating_jax.ops.macs import executed_macs, gated_macs

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
SMALL = GateSettings(hidden=4, initial_open=0.6)
# How the models are told that they are trained.
MODES = {"train": True, "training": True, "deterministic": False}


class PlainCNN(nn.Module):
  """Convolutions with pools and a dense layer on the flattened map."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    # Flax's own average does not work under strict promotion.
    x = nn.pooling.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
    x = nn.relu(nn.Conv(6, (3, 3))(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    x = nn.relu(nn.Dense(5)(x))
    return nn.Dense(2)(x)


class PreActivationBlock(nn.Module):
  channels: int

  @nn.compact
  def __call__(self, x, train):
    norm = lambda: nn.BatchNorm(use_running_average=not train)
    y = nn.Conv(self.channels, (3, 3), use_bias=False, name="conv1")(nn.relu(norm()(x)))
    y = nn.Conv(self.channels, (3, 3), use_bias=False, name="conv2")(nn.relu(norm()(y)))
    return x + y


class PreActivationResNet(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(4, (3, 3), name="stem")(x)
    for i in range(2):
      x = PreActivationBlock(4, name=f"block{i + 1}")(x, train)
    return nn.Dense(2, name="head")(jnp.mean(nn.relu(x), axis=(1, 2)))


class InvertedResidual(nn.Module):
  @nn.compact
  def __call__(self, x, training=False):
    norm = lambda: nn.BatchNorm(use_running_average=not training)
    y = nn.relu6(norm()(nn.Conv(6, (1, 1), use_bias=False, name="expand")(x)))
    y = nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(y)
    y = nn.relu6(norm()(y))
    return x + norm()(nn.Conv(3, (1, 1), use_bias=False, name="project")(y))


class MlpBlock(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.width)(x)
    y = nn.gelu(y)
    return nn.Dense(x.shape[-1])(y)


class Mixer(nn.Module):
  """One block of an MLP-Mixer, which mixes patches, then channels."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (4, 4), strides=(4, 4), name="patches")(x)
    x = x.reshape(x.shape[0], -1, 6)
    y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
    x = x + jnp.swapaxes(MlpBlock(5, name="tokens")(y), 1, 2)
    x = x + MlpBlock(7, name="channels")(nn.LayerNorm()(x))
    return nn.Dense(2, name="head")(jnp.mean(x, axis=1))


class WithSetup(nn.Module):
  def setup(self):
    self.layers = [nn.Dense(4), nn.Dense(5), nn.Dense(2)]

  def __call__(self, x):
    x = jnp.mean(x, axis=(1, 2))
    for layer in self.layers[:-1]:
      x = nn.relu(layer(x))
    return self.layers[-1](x)


class Scanned(nn.Module):
  """Two blocks whose parameters are stacked."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="first")(jnp.mean(x, axis=(1, 2)))
    scanned = nn.scan(
      lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}
    )
    x, _ = scanned(MlpBlock(5, name="block"), x, jnp.arange(2))
    return nn.Dense(2, name="last")(x)


class Rematerialised(nn.Module):
  block: type[nn.Module] = nn.remat(MlpBlock)

  @nn.compact
  def __call__(self, x, train=False):
    norm = nn.BatchNorm(use_running_average=not train)
    x = nn.relu(norm(nn.Conv(4, (3, 3), strides=2, use_bias=False, name="stem")(x)))
    x = self.block(5, name="block")(nn.relu(nn.Conv(6, (1, 1), name="conv")(x)).mean((1, 2)))
    return nn.Dense(2, name="head")(x)


class UNet(nn.Module):
  """Two levels, whose features meet again by concatenation."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    def block(x, features, name):
      """Two convolutions with BatchNorm and ReLU."""
      for i in (1, 2):
        x = nn.Conv(features, (3, 3), use_bias=False, name=f"{name}_conv{i}")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{name}_norm{i}")(x))
      return x

    skip = block(x, 4, "down")
    x = block(nn.max_pool(skip, (2, 2), (2, 2)), 6, "bottom")
    x = jax.image.resize(x, (x.shape[0], *skip.shape[1:3], x.shape[3]), "nearest")
    x = nn.Conv(4, (2, 2), name="up")(x)
    x = block(jnp.concatenate([skip, x], axis=-1), 4, "merge")
    return nn.Conv(2, (1, 1), name="logits")(x)


class ConvNeXt(nn.Module):
  """Blocks of a depthwise window, LayerNorm and two dense layers, with a scale."""

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Conv(4, (4, 4), strides=4, name="stem")(x))
    for i in range(2):
      y = nn.Conv(4, (7, 7), feature_group_count=4, name=f"block{i}_dwconv")(x)
      y = nn.LayerNorm()(y)
      y = nn.gelu(nn.Dense(8, name=f"block{i}_pwconv1")(y))
      y = nn.Dense(4, name=f"block{i}_pwconv2")(y)
      gamma = self.param(f"gamma{i}", nn.initializers.constant(0.1), (4,), x.dtype)
      x = x + y * gamma.reshape(1, 1, 1, 4)
    return nn.Dense(2, name="head")(nn.LayerNorm()(x.mean((1, 2))))


class Transformer(nn.Module):
  """One block of a vision transformer."""

  @nn.compact
  def __call__(self, x, train: bool = False):
    x = nn.Conv(6, (4, 4), strides=(4, 4), name="embedding")(x)
    x = x.reshape(x.shape[0], -1, 6)
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
    y = nn.gelu(nn.Dense(12, name="mlp_in")(nn.LayerNorm()(x)))
    y = nn.Dense(6, name="mlp_out")(nn.Dropout(0.1, deterministic=not train)(y))
    return nn.Dense(2, name="head")(nn.LayerNorm()(x + y)[:, 0])


PAIRS = {
  PlainCNN: (("Conv_0", "Conv_1"), ("Conv_1", "Dense_0"), ("Dense_0", "Dense_1")),
  PreActivationResNet: (("block1/conv1", "block1/conv2"), ("block2/conv1", "block2/conv2")),
  InvertedResidual: (("expand", "depthwise"), ("depthwise", "project")),
  Mixer: (("tokens/Dense_0", "tokens/Dense_1"), ("channels/Dense_0", "channels/Dense_1")),
  WithSetup: (("layers_0", "layers_1"), ("layers_1", "layers_2")),
  UNet: (
    ("down_conv1", "down_conv2"),
    ("bottom_conv1", "bottom_conv2"),
    ("merge_conv1", "merge_conv2"),
    ("merge_conv2", "logits"),
  ),
  ConvNeXt: (("block0_pwconv1", "block0_pwconv2"), ("block1_pwconv1", "block1_pwconv2")),
  Transformer: (("mlp_in", "mlp_out"),),
  Scanned: (),
  Rematerialised: (("stem", "conv"),),
}
GATED = [kind for kind, pairs in PAIRS.items() if pairs]
each_model = pytest.mark.parametrize("kind", GATED, ids=lambda kind: kind.__name__)


def without_gates(tree):
  flat = traverse_util.flatten_dict(tree)
  return {path: value for path, value in flat.items() if not is_gate_path(path)}


def with_logits(variables, logits):
  """The variables with the logits of every gate set, by the writer's name."""
  flat = dict(traverse_util.flatten_dict(variables))
  for path in flat:
    if path[-3:-1] == ("head", "logits"):
      value = logits("/".join(path[1 : path.index("gate")]), flat[path].shape[-1])
      flat[path] = np.full_like(flat[path], value if path[-1] == "bias" else 0)
  return traverse_util.unflatten_dict(flat)


def made(kind):
  """A model with gates, its variables, and those of the model itself."""
  model = kind()
  gated = GatedModel(model, PAIRS[kind], SMALL)
  return gated, jax.jit(gated.init)(jax.random.key(0), IMAGES), model


@pytest.mark.parametrize("kind", PAIRS, ids=lambda kind: kind.__name__)
def test_the_pairs_of_a_model_are_found(kind):
  found = find_pairs(kind(), jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32))
  assert found.pairs == PAIRS[kind]
  assert not found.refused.keys() & {writer for writer, _ in found.pairs}


def into_dense(flatten, **settings):
  """A model whose dense layer reads a map, or what is made of it."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.Conv(4, (3, 3), strides=4, name="a")(x))
      return nn.Dense(2, name="b", **settings)(flatten(h))

  return Model()


# A dense layer that reads maps of 2 x 2 pixels, and by how many of its inputs each channel is read.
READ_BY_DENSE = {
  "flattened": (lambda h: h.reshape(len(h), -1), 4),
  "pixels in another order": (lambda h: h.transpose(0, 2, 1, 3).reshape(len(h), -1), 4),
  "rows": (lambda h: h.reshape(len(h), 2, -1), 2),
  "flattened in two steps": (lambda h: h.reshape(-1, 8).reshape(len(h), -1) + 0.0, 4),
  "parted again": (lambda h: jnp.tanh(h.reshape(len(h), -1)).reshape(h.shape), 1),
  "mean": (lambda h: h.mean((1, 2)), 1),
  "largest value": (lambda h: h.max((1, 2)), 1),
  "mean, its axes kept": (lambda h: h.mean((1, 2), keepdims=True).reshape(len(h), -1), 1),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize(("flatten", "count"), READ_BY_DENSE.values(), ids=READ_BY_DENSE)
def test_a_dense_layer_may_read_each_channel_once_for_each_pixel(flatten, count):
  model = into_dense(flatten, use_bias=False)
  assert find_pairs(model, IMAGES).pairs == (("a", "b"),)
  gated = GatedModel(model, (("a", "b"),), SMALL)
  variables = jax.jit(gated.init)(jax.random.key(0), IMAGES)
  closed = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
  shut = with_logits(variables, lambda name, units: np.where(closed, -5.0, 5.0))
  y, records = gated.apply(shut, IMAGES)
  # A closed channel is 0 wherever the dense layer reads it.
  params = dict(variables["params"])
  kernel = params["b"]["kernel"] * np.tile(1 - closed, count)[:, None]
  expected = model.apply({"params": {**params, "b": {"kernel": kernel}}}, IMAGES)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
  # Of 3 x 3 x 3 weights at 4 pixels, and of the dense layer for `count` inputs.
  (record,), rows = records, y.size // (2 * len(IMAGES))
  assert record.macs_per_unit == 27 * 4 + 2 * count * rows
  counts = model_summary(gated, IMAGES.shape[1:])
  assert counts.gated == gated_macs(records) == counts.macs


@pytest.mark.parametrize(
  "flatten",
  [
    # As torch flattens: all pixels of a channel, then those of the next.
    lambda h: h.transpose(0, 3, 1, 2).reshape(len(h), -1),
    lambda h: h.reshape(len(h), -1)[:, ::-1],
    lambda h: h.reshape(len(h), -1)[:, 1:],
    lambda h: jnp.concatenate([h.reshape(len(h), -1)] * 2, axis=1),
    lambda h: jnp.broadcast_to(h[:, :, :, None], (*h.shape[:3], 2, 4)).reshape(*h.shape[:3], 8),
  ],
)
def test_a_dense_layer_that_reads_channels_in_another_order_has_no_pair(flatten):
  found = find_pairs(into_dense(flatten), IMAGES)
  assert found.refused["a"] == "its channels are mixed, or not the last axis of what b reads"


class JoinedAfterMean(nn.Module):
  """A model whose last layer reads twice as many channels as a convolution makes."""

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Conv(4, (3, 3), strides=4, name="a")(x)).mean((1, 2))
    return nn.Dense(2, name="b")(jnp.concatenate([h, 1 - h], axis=1))


class ReadElsewhere(nn.Module):
  """A model with a dense layer that reads another map than that of the convolution before."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(2, name="c")(nn.relu(nn.Conv(4, (3, 3), strides=4, name="a")(x)).mean((1, 2)))
    return y + nn.Dense(2, name="b")(x[:, :2, :2, :2].reshape(len(x), -1))


@pytest.mark.parametrize(
  ("model", "reason"),
  [
    (
      into_dense(lambda h: h.transpose(0, 3, 1, 2).reshape(len(h), -1)),
      "its channels are mixed, or not the last axis of what b reads",
    ),
    (JoinedAfterMean(), "its channels are mixed, or not the last axis of what b reads"),
    (ReadElsewhere(), "its channels are read by c"),
  ],
  ids=["channels first", "joined", "another map"],
)
def test_a_pair_over_a_map_in_another_order_is_refused(model, reason):
  gated = GatedModel(model, (("a", "b"),), SMALL)
  with pytest.raises(ValueError, match=f"'b' does not read a map of 'a', .* says that {reason}"):
    jax.eval_shape(gated.init, jax.random.key(0), IMAGES)


def test_a_layer_without_channels_has_no_pair():
  assert not holds_channels((3, 8), made=(3, 8, 8, 0))


def test_a_flattened_map_is_trained_with_its_gates_and_not_folded():
  gated = GatedModel(into_dense(READ_BY_DENSE["flattened"][0]), (("a", "b"),), SMALL)
  variables = jax.jit(gated.init)(jax.random.key(0), IMAGES)

  def total(params):
    """Sums the outputs of a pass in training."""
    whole, rngs = {**variables, "params": params}, {"gate": jax.random.key(1)}
    (y, _), _ = gated.apply(whole, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
    return y.sum()

  gradients = jax.jit(jax.grad(total))(variables["params"])
  assert np.any(gradients["a"]["gate"]["head"]["logits"]["bias"])
  with pytest.raises(ValueError, match=r"others are a, b \(b is no nn.Conv\)"):
    fold(gated, variables, IMAGES)


def with_examples_moved(move):
  """A model with an operation on all examples between two layers."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
      return nn.Conv(2, (3, 3), name="b")(move(h))

  return Model()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
  "move",
  [
    lambda h: jnp.roll(h, 1, axis=0),
    lambda h: h[::-1],
    lambda h: jnp.flip(h, 0),
    lambda h: h - jnp.mean(h, axis=0, keepdims=True),
    lambda h: jnp.pad(h, ((1, 0), (0, 0), (0, 0), (0, 0)))[: len(h)],
    lambda h: jnp.flip(h.reshape(-1, 4), 0).reshape(h.shape),
  ],
)
def test_layers_between_which_examples_move_are_no_pair(move, count):
  found = find_pairs(with_examples_moved(move), IMAGES[:count])
  assert found.pairs == ()
  assert found.refused["a"] == "examples are mixed, or change their places, before b reads them"


def test_layers_between_which_pixels_move_are_a_pair():
  for move in (
    lambda h: jnp.roll(h, 1, axis=1),
    lambda h: h[:, ::-1] - jnp.mean(h, axis=(1, 2), keepdims=True),
    lambda h: jnp.tanh(h.reshape(-1, 4)).reshape(h.shape),
    lambda h: h.transpose(3, 0, 1, 2)[:, :, 1:].transpose(1, 2, 3, 0),
    lambda h: jnp.squeeze(h[:, None], 1),
    lambda h: checkpoint_name(h, "features"),
  ):
    assert find_pairs(with_examples_moved(move), IMAGES).pairs == (("a", "b"),)


def test_examples_that_a_reshape_parts_are_lost():
  parted = with_examples_moved(lambda h: h.reshape(2, -1, 4).reshape(h.shape))
  assert find_pairs(parted, IMAGES).refused["a"].startswith("examples are mixed, or change their")


def test_a_reader_of_another_number_of_examples_is_refused():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name="b")(nn.Dense(4, name="a")(x)[None])

  found = find_pairs(Model(), np.ones((3, 5), np.float32))
  assert found.refused["a"] == "b reads another number of examples"


def test_a_reader_inside_of_a_transformation_is_refused():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.jit(nn.Dense)(2, name="b")(nn.Dense(4, name="a")(x))

  found = find_pairs(Model(), np.ones((3, 5), np.float32))
  assert found.refused["a"] == "its reader b is inside nn.scan, nn.remat, nn.vmap or nn.jit"


def test_what_cannot_be_gated_has_a_reason():
  refused = {kind: find_pairs(kind(), IMAGES).refused for kind in PAIRS}
  assert refused[PlainCNN] == {"Dense_1": "it makes the model's output"}
  assert refused[PreActivationResNet]["stem"] == "it is read by block1/conv1, block2/conv1, head"
  assert refused[PreActivationResNet]["block2/conv2"] == (
    "head reads channels of block1/conv2, block2/conv2, stem as a sum"
  )
  assert refused[InvertedResidual] == {"project": "it makes the model's output"}
  # The two halves that a U-Net joins, LayerNorm over channels, and attention.
  assert refused[UNet]["down_conv2"] == "it is read by bottom_conv1, merge_conv1"
  mixed = "its channels are mixed, or not the last axis of what %s reads"
  assert refused[UNet]["up"] == mixed % "merge_conv1"
  assert refused[ConvNeXt]["block0_dwconv"] == mixed % "block0_pwconv1"
  assert refused[ConvNeXt]["stem"] == "it is read by block0_dwconv, block1_dwconv, head"
  assert refused[Transformer]["embedding"].startswith("its channels go through dot_general, which")
  assert refused[Scanned]["first"].startswith("its channels go through scan")
  assert refused[Scanned]["block/Dense_0"] == "it is inside nn.scan, nn.remat, nn.vmap or nn.jit"
  assert refused[Rematerialised]["block/Dense_0"].startswith("it is inside nn.scan, nn.remat")
  assert refused[Rematerialised]["conv"].startswith("its channels go through remat2, which")


@pytest.mark.thin(4)
@each_model
def test_with_open_gates_and_without_pairs_it_is_the_model_bit_for_bit(kind):
  gated, variables, model = made(kind)
  plain = jax.jit(model.init)(jax.random.key(0), IMAGES)
  for collection, tree in plain.items():
    # Names and initial values are the model's own.
    expected, found = traverse_util.flatten_dict(tree), without_gates(variables[collection])
    assert found.keys() == expected.keys()
    for path, value in expected.items():
      np.testing.assert_array_equal(found[path], value, err_msg=str(path))
  expected = model.apply(plain, IMAGES)
  y, records = gated.apply(with_logits(variables, lambda name, units: 5.0), IMAGES)
  assert len(records) == len(PAIRS[kind])
  np.testing.assert_array_equal(y, expected)
  y, records = GatedModel(model, ()).apply(plain, IMAGES)
  assert records == ()
  np.testing.assert_array_equal(y, expected)


@pytest.mark.thin(4)
@each_model
def test_without_pairs_it_trains_as_the_model_does(kind):
  model = kind()
  plain = jax.jit(model.init)(jax.random.key(0), IMAGES)
  # The model's own word for its mode, where it has one.
  names = inspect.signature(kind.__call__).parameters
  mode = {name: value for name, value in MODES.items() if name in names}
  rngs = {"dropout": jax.random.key(1)}

  def theirs(variables):
    return model.apply(variables, IMAGES, mutable=["batch_stats"], rngs=rngs, **mode)

  def ours(variables):
    gated = GatedModel(model, ())
    (y, _), new = gated.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)
    return y, new

  (expected, statistics), (y, new) = jax.jit(theirs)(plain), jax.jit(ours)(plain)
  np.testing.assert_array_equal(y, expected)
  jax.tree.map(np.testing.assert_array_equal, new, statistics)
  # Training differs from evaluation, where there is BatchNorm.
  assert ("batch_stats" in plain) == bool(jax.tree.leaves(new))


@pytest.mark.thin(2)
@each_model
def test_closed_channels_are_those_that_the_reader_does_not_see(kind):
  gated, variables, model = made(kind)
  writer, reader = PAIRS[kind][0]
  # Every second gate of the first pair is closed.
  logits = lambda name, units: np.where(np.arange(units) % 2, -5.0, 5.0) if name == writer else 5.0
  shut = with_logits(variables, logits)
  y, records = gated.apply(shut, IMAGES)
  assert (np.asarray(records[0].gates) == (np.arange(records[0].gates.shape[1]) % 2 == 0)).all()
  # A reader with zeros in the kernels of these channels gives the same.
  flat = {}
  for collection in shut:
    for path, value in without_gates(shut[collection]).items():
      value = np.array(value)
      if path == (*reader.split("/"), "kernel"):
        depthwise = value.shape[-2] == 1
        value[(..., slice(1, None, 2)) if depthwise else (..., slice(1, None, 2), slice(None))] = 0
      flat[(collection, *path)] = value
  expected = model.apply(traverse_util.unflatten_dict(flat), IMAGES)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


# The reason why pairs of a model cannot be folded; none where they can.
NOT_FOLDED = {
  PlainCNN: r"Conv_0, Conv_1 \(the second does not read a ReLU\)",
  PreActivationResNet: None,
  InvertedResidual: r"depthwise, project \(depthwise has groups",
  Mixer: r"tokens/Dense_0, tokens/Dense_1 \(tokens/Dense_0 is no nn.Conv\)",
  WithSetup: r"layers_0, layers_1 \(layers_0 is no nn.Conv\)",
  UNet: None,
  ConvNeXt: r"block0_pwconv1 is no nn.Conv",
  Transformer: r"mlp_in, mlp_out \(mlp_in is no nn.Conv\)",
  Rematerialised: None,
}


@pytest.mark.thin(2)
@each_model
def test_pairs_are_folded_or_named_with_the_reason(kind):
  gated, variables, _ = made(kind)
  rng = np.random.default_rng(2)
  flat = dict(traverse_util.flatten_dict(variables))
  for path, value in flat.items():
    # Gates that are open for some images alone.
    if path[-2:] == ("logits", "kernel"):
      flat[path] = rng.normal(0, 3, value.shape).astype(np.float32)
    elif path[-2:] == ("logits", "bias"):
      flat[path] = np.zeros_like(value)
  variables = traverse_util.unflatten_dict(flat)
  if NOT_FOLDED[kind]:
    with pytest.raises(ValueError, match=NOT_FOLDED[kind]):
      fold(gated, variables, IMAGES)
    return
  y, records = gated.apply(variables, IMAGES)
  outputs, logits = folded.run_net(fold(gated, variables, IMAGES), IMAGES)
  np.testing.assert_allclose(outputs, y, rtol=1e-5, atol=1e-6)
  for found, record in zip(logits, records, strict=True):
    np.testing.assert_allclose(found, record.logits, rtol=1e-4, atol=1e-5)
    assert 0 < np.mean(record.gates) < 1


@pytest.mark.thin(2)
@each_model
def test_macs_are_those_of_the_layers(kind):
  gated, variables, model = made(kind)
  counts = model_summary(gated, IMAGES.shape[1:])
  _, records = gated.apply(with_logits(variables, lambda name, units: 5.0), IMAGES)
  everything = np.asarray(executed_macs(records))
  assert (everything == gated_macs(records)).all()
  assert counts.gated == gated_macs(records) <= counts.macs
  assert model_summary(GatedModel(model, ()), IMAGES.shape[1:]).macs == counts.macs
  _, records = gated.apply(with_logits(variables, lambda name, units: -5.0), IMAGES)
  assert (np.asarray(executed_macs(records)) == 0).all()


def test_the_costs_of_pairs_by_hand():
  _, records = jax.eval_shape(
    lambda: GatedModel(PlainCNN(), PAIRS[PlainCNN], SMALL).init_with_output(
      jax.random.key(0), IMAGES
    )[0]
  )
  # conv 3 -> 4 at 8 x 8 and 4 -> 6 at 4 x 4; dense 24 -> 5, from 4 pixels, and 5 -> 2.
  assert [(r.macs_per_unit, r.macs_per_pair) for r in records] == [
    (9 * 3 * 64, 0),
    (0, 9 * 16),
    (2, 4),
  ]
  _, chain = jax.eval_shape(
    lambda: GatedModel(WithSetup(), PAIRS[WithSetup], SMALL).init_with_output(
      jax.random.key(0), IMAGES
    )[0]
  )
  # dense 3 -> 4 -> 5 -> 2: the layer between costs MACs for pairs of open channels.
  assert [(r.macs_per_unit, r.macs_per_pair) for r in chain] == [(3, 0), (2, 1)]
  assert [r.writers for r in chain] == [(("layers_0",),), (("layers_1",),)]
  assert [r.readers for r in chain] == [(("layers_1",),), (("layers_2",),)]
  assert [r.gate for r in chain] == [("layers_0", "gate"), ("layers_1", "gate")]
  _, grouped = jax.eval_shape(
    lambda: GatedModel(InvertedResidual(), PAIRS[InvertedResidual], SMALL).init_with_output(
      jax.random.key(0), IMAGES
    )[0]
  )
  # A depthwise channel reads itself alone; it is counted with its output.
  assert [(r.macs_per_unit, r.macs_per_pair) for r in grouped] == [
    (3 * 64, 0),
    (9 * 64 + 3 * 64, 0),
  ]


@pytest.mark.thin(4)
@each_model
def test_it_trains_under_jit_grad_and_remat(kind):
  gated, variables, _ = made(kind)
  labels = np.array([0, 1, 1])

  def loss(params, forward):
    (y, records), new = forward({**variables, "params": params}, jax.random.key(1))
    # Some of the models make a map.
    logits = y.reshape(len(y), -1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    shaping = sum(batch_shaping_loss(r.logits, beta(0.6, 0.4)).sum() for r in records)
    return nll + shaping, new["batch_stats"]

  def forward(variables, key):
    rngs = {"gate": key, "dropout": key}
    return gated.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)

  grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  grads, stats = grad(variables["params"], forward)
  again, _ = grad(variables["params"], jax.checkpoint(forward))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, again)
  moved = traverse_util.flatten_dict(grads)
  gates = [path for path in moved if is_gate_path(path) and path[-2:] == ("logits", "bias")]
  assert len(gates) == len(PAIRS[kind])
  assert all(np.any(moved[path] != 0) for path in gates)
  assert jax.tree.structure(stats) == jax.tree.structure(dict(variables["batch_stats"]))


def with_gradients(model):
  """What a gated model makes and trains to, with its mode given by its place."""
  variables = jax.jit(lambda: model.init(jax.random.key(0), IMAGES, False))()

  def loss(params):
    """Sums the outputs and the costs of a pass in training."""
    whole = {**variables, "params": params}
    rngs = {"gate": jax.random.key(1)}
    (y, records), new = model.apply(whole, IMAGES, True, mutable=["batch_stats"], rngs=rngs)
    return (y**2).sum() + 1e-3 * executed_macs(records).mean(), new

  gradients = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  evaluated = jax.jit(lambda: model.apply(variables, IMAGES, False))()
  return variables, evaluated, gradients


@pytest.mark.parametrize(
  "change",
  [
    lambda kind, model: nn.remat(kind, static_argnums=(2,))(model, (("stem", "conv"),), SMALL),
    lambda kind, model: kind(model.clone(block=nn.remat(MlpBlock)), (("stem", "conv"),), SMALL),
  ],
  ids=["around", "inside"],
)
def test_rematerialised_around_or_inside_it_computes_the_same(change):
  plain = Rematerialised(block=MlpBlock)
  expected = with_gradients(GatedModel(plain, (("stem", "conv"),), SMALL))
  found = with_gradients(change(GatedModel, plain))
  # Names, numbers and records alike.
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  gradients, _ = found[2]
  assert np.any(gradients["stem"]["gate"]["head"]["logits"]["bias"])


def test_a_mode_that_is_traced_is_refused_with_the_way_to_give_it():
  model = nn.remat(GatedModel)(Rematerialised(), (("stem", "conv"),), SMALL)
  with pytest.raises(TypeError, match=r"train must be True or False .* static_argnums=\(2,\)"):
    model.init(jax.random.key(0), IMAGES, train=True)


def test_the_noise_of_gates_can_be_set_for_one_pass():
  gated, variables, _ = made(WithSetup)
  noise = gate_controls(variables["params"], noise_scale=0.0)
  apply = lambda key: gated.apply(
    {**variables, "noise": noise}, IMAGES, train=True, mutable=["batch_stats"], rngs={"gate": key}
  )[0][1]
  for a, b in zip(apply(jax.random.key(1)), apply(jax.random.key(2)), strict=True):
    np.testing.assert_array_equal(a.gates, b.gates)


def test_further_arguments_reach_the_model():
  class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, scale, deterministic=True):
      h = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4, name="a")(x))
      return scale * nn.Dense(2, name="b")(h)

  x = np.ones((2, 3), np.float32)
  gated = GatedModel(Dropping(), (("a", "b"),), SMALL)
  variables = gated.init(jax.random.key(0), x, scale=1.0)
  one, _ = gated.apply(variables, x, scale=1.0)
  two, _ = gated.apply(variables, x, scale=2.0)
  np.testing.assert_allclose(two, 2 * np.asarray(one), rtol=1e-6)
  rngs = {"gate": jax.random.key(0), "dropout": jax.random.key(1)}
  (dropped, _), _ = gated.apply(
    variables, x, scale=1.0, train=True, rngs=rngs, mutable=["batch_stats"]
  )
  assert dropped.shape == (2, 2)
  with pytest.raises(Exception, match="dropout"):
    gated.apply(
      variables, x, scale=1.0, train=True, mutable=["batch_stats"], rngs={"gate": rngs["gate"]}
    )


class Modal(nn.Module):
  """A model with its own word for the mode, and a setting with the name of one."""

  @nn.compact
  def __call__(self, x, training=False, deterministic=True):
    h = nn.BatchNorm(use_running_average=not training)(nn.Dense(4, name="a")(x))
    return nn.Dense(2, name="b")(nn.relu(h))


def test_the_mode_of_the_model_is_that_of_its_gates():
  x = np.ones((6, 3), np.float32)
  gated = GatedModel(Modal(), (("a", "b"),), SMALL)
  variables = jax.eval_shape(gated.init, jax.random.key(0), x)

  def trace(**mode):
    """Traces a pass without a key, which gates need in training alone."""
    run = lambda variables: gated.apply(variables, x, mutable=["batch_stats"], **mode)
    return jax.eval_shape(run, variables)

  for mode in ({}, {"training": False}, {"deterministic": False}):
    trace(**mode)
  for mode in ({"training": True}, {"train": True, "training": True}):
    with pytest.raises(Exception, match='needs PRNG for "gate"'):
      trace(**mode)
  with pytest.raises(ValueError, match="must say one mode, .*; got train=True, training=False"):
    trace(train=True, training=False)


class Partitioned(nn.Module):
  @nn.compact
  def __call__(self, x):
    split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    h = nn.relu(nn.Dense(4, kernel_init=split, name="a")(x))
    return nn.Dense(2, kernel_init=split, name="b")(h)


def test_kernels_may_say_how_they_are_partitioned():
  x = np.ones((2, 3), np.float32)
  assert find_pairs(Partitioned(), x).pairs == (("a", "b"),)
  gated = GatedModel(Partitioned(), (("a", "b"),), SMALL)
  variables = gated.init(jax.random.key(0), x)
  assert isinstance(variables["params"]["a"]["kernel"], nn.Partitioned)
  y, records = gated.apply(variables, x)
  plain, _ = gated.apply(nn.meta.unbox(variables), x)
  np.testing.assert_array_equal(y, plain)
  assert (records[0].gates.shape, records[0].macs_per_unit) == ((2, 4), 3 + 2)
  counts = model_summary(gated, (3,))
  assert (counts.macs, counts.params) == (3 * 4 + 4 * 2, 3 * 4 + 4 + 4 * 2 + 2)


@pytest.mark.parametrize(
  ("kind", "pairs", "message"),
  [
    (
      WithSetup,
      (("layers_0", "layers_9"),),
      "such as layers_0, layers_1, layers_2; got 'layers_9'",
    ),
    (WithSetup, (("layers_1", "layers_0"),), "'layers_0' is called before 'layers_1' of its pair"),
    (WithSetup, (("layers_0", "layers_2"),), "'layers_0' makes 4 .*'layers_2' reads .* 5"),
    (WithSetup, (("layers_0", "layers_0"),), "every layer as a writer once at most"),
    (
      WithSetup,
      (("layers_0", "layers_1"), ("layers_0", "layers_2")),
      "every layer as a writer once at most, .*; got 'layers_0', 'layers_2'",
    ),
    (UNet, (("up", "merge_conv1"),), r"'up' makes 4 .*'merge_conv1' reads .*\(3, 8, 8, 8\)"),
    (PlainCNN, (("Conv_0", "Dense_1"),), r"'Conv_0' makes 4 .*'Dense_1' reads .*\(3, 5\)"),
    (Scanned, (("block/Dense_0", "block/Dense_1"),), "'block/Dense_0' is called inside one"),
    (Rematerialised, (("block/Dense_0", "block/Dense_1"),), "Transform the gated model instead"),
  ],
)
def test_pairs_that_do_not_fit_are_named(kind, pairs, message):
  with pytest.raises(ValueError, match=message):
    GatedModel(kind(), pairs, SMALL).init(jax.random.key(0), IMAGES)


def test_with_scales_a_model_is_ungated():
  scaled = GateSettings(hidden=4, relaxation="scale")
  gated = GatedModel(WithSetup(), (("layers_0", "layers_1"),), scaled)
  (y, records), variables = gated.init_with_output(jax.random.key(0), IMAGES)
  assert y.shape == (3, 2)
  assert records == ()


def test_pairs_of_another_kind_are_refused():
  for pairs in ("ab", (("a", "b", "c"),), (("a", 1),)):
    with pytest.raises(TypeError, match="pairs"):
      GatedModel(WithSetup(), pairs).init(jax.random.key(0), IMAGES)


def test_a_layer_that_is_called_twice_is_named():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      twice = nn.Dense(3, name="twice")
      return nn.Dense(2, name="last")(twice(twice(nn.Dense(3, name="first")(x))))

  x = np.ones((2, 3), np.float32)
  with pytest.raises(ValueError, match="'twice' is called more than once"):
    GatedModel(Shared(), (("twice", "last"),)).init(jax.random.key(0), x)
  refused = find_pairs(Shared(), x).refused
  assert refused["twice"] == "it is called 2 times"
  assert refused["first"] == "its reader twice is called 2 times"
