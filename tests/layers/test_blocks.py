import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import GATINGS, BasicBlock, Bottleneck
from gating_jax.layers.gate import GateSettings

OPEN = 1e4


apply = jax.jit(lambda block, variables, x: block.apply(variables, x), static_argnums=0)


def image(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def variables_of(block, x, *, plain_norms=False):
  """Makes random variables with every unit alive; `plain_norms` change nothing in evaluation.

  They are made by numpy, since compiling `init` takes seconds.
  """
  rng = np.random.default_rng(1)
  plain = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1 - 1e-5}

  def fill(path, leaf):
    if path[-1] not in plain:
      return jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
    if plain_norms:
      return jnp.full(leaf.shape, plain[path[-1]])
    return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), jnp.float32)

  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(block.init, jax.random.key(0), x))
  return flax.traverse_util.unflatten_dict(
    {path: fill(path, leaf) for path, leaf in shapes.items()}
  )


def with_logits(variables, logits):
  """Fixes the gate's logits to `logits` for every input."""
  flat = flax.traverse_util.flatten_dict(variables)
  flat["params", "gate", "head", "logits", "kernel"] *= 0
  flat["params", "gate", "head", "logits", "bias"] = jnp.asarray(logits, jnp.float32)
  return flax.traverse_util.unflatten_dict(flat)


def without_gate(variables):
  return {kind: {k: v for k, v in tree.items() if k != "gate"} for kind, tree in variables.items()}


def without_input_channel(variables, conv, channel):
  flat = flax.traverse_util.flatten_dict(variables)
  path = ("params", conv, "conv", "kernel")
  flat[path] = flat[path].at[:, :, channel].set(0)
  return flax.traverse_util.unflatten_dict(flat)


# Block, number of gates, and what each group of gates feeds: (first gate, last gate, convolution).
CASES = [(BasicBlock, 4, [(0, 4, "conv2")]), (Bottleneck, 8, [(0, 4, "conv2"), (4, 8, "conv3")])]
blocks = pytest.mark.parametrize(("block", "gates", "groups"), CASES, ids=["basic", "bottleneck"])


@blocks
@pytest.mark.parametrize("stride", [1, 2])
def test_closing_one_gate_is_dropping_one_channel_of_the_ungated_block(
  block, gates, groups, stride
):
  x = image(2, 5, 5, 3)
  gated, plain = (block(4, stride=stride, gating=gating) for gating in ("channel", "none"))
  variables = variables_of(gated, x)
  logits = np.full(gates, OPEN)
  expected, no_records = apply(plain, without_gate(variables), x)
  assert no_records == ()
  np.testing.assert_allclose(
    apply(gated, with_logits(variables, logits), x)[0], expected, rtol=1e-5, atol=1e-5
  )
  for first, last, conv in groups:
    for gate in range(first, last):
      y, records = apply(
        gated, with_logits(variables, np.where(np.arange(gates) == gate, -OPEN, OPEN)), x
      )
      assert sum(int(np.sum(r.gates == 0)) for r in records) == len(x)
      dropped, _ = apply(
        plain, without_input_channel(without_gate(variables), conv, gate - first), x
      )
      assert np.abs(np.asarray(dropped - expected)).max() > 1e-2
      np.testing.assert_allclose(y, dropped, rtol=1e-5, atol=1e-5)


@blocks
def test_all_gates_closed_leave_the_shortcut_and_a_constant(block, gates, groups):
  x = image(2, 4, 4, 4 * block.expansion)
  gated = block(4, gating="channel")
  variables = variables_of(gated, x)
  y, _ = apply(gated, with_logits(variables, np.full(gates, -OPEN)), x)
  last = groups[-1][2]
  norm, statistics = variables["params"][last]["norm"], variables["batch_stats"][last]["norm"]
  constant = norm["bias"] - norm["scale"] * statistics["mean"] / np.sqrt(statistics["var"] + 1e-5)
  np.testing.assert_allclose(
    y, np.maximum(np.asarray(x) + np.asarray(constant), 0), rtol=1e-4, atol=1e-5
  )


@blocks
def test_open_gates_change_nothing_in_training_either(block, gates, groups):
  x = image(4, 4, 4, 3)
  gated, plain = (block(4, gating=gating) for gating in ("channel", "none"))
  variables = with_logits(variables_of(gated, x), np.full(gates, OPEN))
  train = jax.jit(
    lambda net, v: net.apply(
      v, x, train=True, mutable=["batch_stats"], rngs={"gate": jax.random.key(0)}
    ),
    static_argnums=0,
  )
  (y, records), updated = train(gated, variables)
  (expected, _), expected_updated = train(plain, without_gate(variables))
  assert np.abs(np.asarray(y - apply(plain, without_gate(variables), x)[0])).max() > 1e-2
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    without_gate(updated),
    expected_updated,
  )
  assert all(np.all(r.gates == 1) for r in records)


def test_gates_act_on_their_own_example_only():
  x = image(3, 4, 4, 4) + 3 * image(3, 1, 1, 4, seed=1)
  block = BasicBlock(4, gating="channel")
  variables = with_logits(variables_of(block, x, plain_norms=True), np.zeros(4))
  variables["params"]["gate"]["head"]["logits"]["kernel"] = jnp.asarray(
    np.random.default_rng(1).normal(0, 10, (16, 4)), jnp.float32
  )
  y, (record,) = apply(block, variables, x)
  assert len(np.unique(record.gates, axis=0)) > 1
  for n in range(3):
    np.testing.assert_allclose(
      apply(block, variables, x[n : n + 1])[0][0], y[n], rtol=1e-5, atol=1e-5
    )


def macs_of(block, shape, gating="channel", **settings):
  """Returns the MACs per unit and per pair, for each record."""
  module = block(gating=gating, **settings)
  y, records = jax.eval_shape(
    lambda x: module.init_with_output(jax.random.key(0), x)[0],
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )
  return y.shape, [(r.gates.shape, r.macs_per_unit, r.macs_per_pair) for r in records]


def test_macs_of_a_basic_block_by_hand():
  assert macs_of(BasicBlock, (2, 8, 8, 5), features=6, stride=2) == (
    (2, 4, 4, 6),
    [((2, 6), 9 * 16 * 5 + 9 * 16 * 6, 0)],
  )
  assert macs_of(BasicBlock, (2, 7, 5, 6), features=6) == ((2, 7, 5, 6), [((2, 6), 9 * 35 * 12, 0)])


def test_macs_of_a_bottleneck_by_hand():
  assert macs_of(Bottleneck, (2, 8, 8, 16), features=6, stride=2) == (
    (2, 4, 4, 24),
    [((2, 6), 64 * 16, 0), ((2, 6), 16 * 24, 9 * 16)],
  )
  assert macs_of(Bottleneck, (1, 7, 5, 3), features=2, stride=2) == (
    (1, 4, 3, 8),
    [((1, 2), 35 * 3, 0), ((1, 2), 12 * 8, 9 * 12)],
  )


def test_a_block_wider_inside_has_gates_to_choose_from_and_keeps_its_shapes():
  assert macs_of(BasicBlock, (2, 8, 8, 5), features=6, stride=2, inner_width=2.5) == (
    (2, 4, 4, 6),
    [((2, 15), 9 * 16 * 5 + 9 * 16 * 6, 0)],
  )
  assert macs_of(Bottleneck, (2, 8, 8, 16), features=6, stride=2, inner_width=0.5) == (
    (2, 4, 4, 24),
    [((2, 3), 64 * 16, 0), ((2, 3), 16 * 24, 9 * 16)],
  )


def test_macs_with_gated_outputs_by_hand():
  basic = dict(features=6, stride=2, gating="all_channels")
  assert macs_of(BasicBlock, (2, 8, 8, 5), **basic)[1] == [
    ((2, 6), 9 * 16 * 5, 0),
    ((2, 6), 16 * 5, 9 * 16),
  ]
  assert macs_of(BasicBlock, (2, 8, 8, 5), **basic, gated_input=True)[1] == [
    ((2, 6), 0, 9 * 16),
    ((2, 6), 16 * 5, 9 * 16),
  ]
  assert macs_of(Bottleneck, (2, 8, 8, 16), **basic)[1] == [
    ((2, 6), 64 * 16, 0),
    ((2, 6), 0, 9 * 16),
    ((2, 24), 16 * 16, 16),
  ]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_gated_outputs_equal_the_ungated_block_where_open_and_0_where_closed(block):
  x = image(2, 5, 5, 3)
  gated, ungated = (block(2, stride=2, gating=gating) for gating in ("all_channels", "none"))
  variables = variables_of(gated, x, plain_norms=True)
  full = without_gate(variables)
  inner = 2 * (block.expansion // 4 + 1)
  logits = np.full(inner + 2 * block.expansion, OPEN)
  expected = np.array(ungated.apply(full, x)[0])
  np.testing.assert_allclose(
    apply(gated, with_logits(variables, logits), x)[0], expected, rtol=1e-6
  )
  logits[inner + 1] = -OPEN
  expected[..., 1] = 0
  np.testing.assert_allclose(
    apply(gated, with_logits(variables, logits), x)[0], expected, rtol=1e-6
  )


@blocks
def test_a_layer_gate_skips_the_whole_block_of_an_image(block, gates, groups):
  x = image(6, 4, 4, 4 * block.expansion)
  gated, plain = (block(4, gating=gating) for gating in ("layer", "none"))
  variables = with_logits(variables_of(gated, x), [0.0])
  variables["params"]["gate"]["head"]["logits"]["kernel"] = jnp.asarray(
    np.random.default_rng(1).normal(0, 10, (16, 1)), jnp.float32
  )
  y, (record,) = apply(gated, variables, x)
  assert record.gates.shape == (6, 1)
  assert 0 < np.mean(record.gates) < 1
  expected = np.where(
    record.gates[:, :, None, None] > 0,
    apply(plain, without_gate(variables), x)[0],
    np.maximum(x, 0),
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("block", "shape", "settings", "expected"),
  [
    (BasicBlock, (2, 7, 5, 6), dict(features=6), [((2, 1), 9 * 35 * 36 * 2, 0)]),
    (
      BasicBlock,
      (2, 7, 5, 6),
      dict(features=6, gate=GateSettings(block=8)),
      [((2, 1), 9 * 35 * 36 * 2, 0)],
    ),
    (Bottleneck, (2, 4, 4, 8), dict(features=2), [((2, 1), 16 * (8 * 2 + 9 * 2 * 2 + 2 * 8), 0)]),
    (BasicBlock, (2, 8, 8, 6), dict(features=6, stride=2), []),
    (BasicBlock, (2, 8, 8, 4), dict(features=6, shortcut="A"), []),
    (Bottleneck, (2, 8, 8, 6), dict(features=6), []),
  ],
)
def test_a_layer_gate_needs_equal_shapes_and_counts_all_convolutions(
  block, shape, settings, expected
):
  assert macs_of(block, shape, gating="layer", **settings)[1] == expected


def test_a_bottleneck_whose_backward_leaves_out_examples_has_the_same_outputs():
  x, key = image(6, 2, 2, 8), jax.random.key(0)
  whole = Bottleneck(2, gating="layer", group_norm=True, gate=GateSettings(hidden=2))
  variables = variables_of(whole, x)
  settings = {"train": True, "rngs": {"gate": key}, "mutable": "batch_stats"}

  @jax.jit
  def outputs(variables):
    blocks = (whole, whole.clone(backward_share=0.99))
    return [block.apply(variables, x, **settings)[0] for block in blocks]

  (y, (record,)), (skipped, _) = outputs(variables)
  assert 0 < record.gates.sum() < 6
  np.testing.assert_allclose(skipped, y, rtol=1e-5, atol=1e-6)


def test_records_name_what_writes_and_reads_their_channels():
  x = image(1, 6, 6, 3)
  basic = dict(features=2, stride=2, gating="all_channels")
  records = lambda block, x: jax.jit(block.init_with_output)(jax.random.key(0), x)[0][1]
  inner, outer = records(BasicBlock(**basic), x)
  assert (inner.writers, inner.readers) == ((("conv1", "conv"),), (("conv2", "conv"),))
  assert (outer.writers, outer.readers) == ((("conv2", "conv"), ("project", "conv")), ())
  first, second, last = records(Bottleneck(**basic), x)
  assert [r.writers[0][0] for r in (first, second, last)] == ["conv1", "conv2", "conv3"]
  clips = jnp.zeros((1, 2, 4, 4, 3))
  inner, _ = records(BasicBlock(**basic, convolution="factorised"), clips)
  assert (inner.writers, inner.readers) == (
    (("conv1", "time", "conv"),),
    (("conv2", "space", "conv"),),
  )


def closed_block(shortcut, x, features, stride):
  """Returns the output of a block with closed branch and fresh norms: the ReLU of its shortcut."""
  block = BasicBlock(features, stride=stride, gating="channel", shortcut=shortcut)
  variables = variables_of(block, x, plain_norms=True)
  return apply(block, with_logits(variables, np.full(features, -OPEN)), x)[0], variables["params"]


def test_shortcut_a_subsamples_and_pads_with_zero_channels():
  x = image(2, 5, 5, 3)
  y, params = closed_block("A", x, 6, 2)
  assert set(params) == {"conv1", "conv2", "gate"}
  np.testing.assert_allclose(y[..., 1:4], np.maximum(x[:, ::2, ::2], 0), atol=1e-6)
  np.testing.assert_array_equal(y[..., [0, 4, 5]], np.zeros((2, 3, 3, 3)))


def test_shortcut_b_projects():
  x = image(2, 5, 5, 3)
  y, params = closed_block("B", x, 6, 2)
  projected = x[:, ::2, ::2] @ params["project"]["conv"]["kernel"][0, 0]
  np.testing.assert_allclose(y, np.maximum(projected, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_equal_shapes_are_joined_without_a_projection(shortcut):
  x = image(2, 4, 4, 3)
  y, params = closed_block(shortcut, x, 3, 1)
  assert set(params) == {"conv1", "conv2", "gate"}
  np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-6)


def shape_of(block, shape=(1, 4, 4, 8)):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(lambda x: block.init_with_output(jax.random.key(0), x)[0][0], x).shape


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_near_matches_of_names_are_suggested(block):
  with pytest.raises(
    ValueError, match=r"^gating must be one of all_.*; got 'chanel'\. Did you mean 'channel'"
  ):
    shape_of(block(2, gating="chanel"))
  with pytest.raises(ValueError, match=r"^shortcut must be one of A, B; got 'C'"):
    shape_of(block(8 // block.expansion, shortcut="C"))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_gating_without_a_description_of_its_units_is_an_error(block, monkeypatch):
  monkeypatch.setattr("gating_jax.layers.blocks.GATINGS", (*GATINGS, "pairs"))
  with pytest.raises(ValueError, match="gating 'pairs' is in GATINGS, but _groups does not"):
    jax.eval_shape(block(4, gating="pairs").init, jax.random.key(0), image(1, 4, 4, 4))


def test_shortcut_a_cannot_drop_channels():
  message = r"^shortcut A cannot drop channels; got 8 in, 4 out; use shortcut B"
  with pytest.raises(ValueError, match=message):
    shape_of(BasicBlock(4, shortcut="A"))
  assert shape_of(BasicBlock(4, shortcut="B")) == (1, 4, 4, 4)


def test_mixed_kernels_need_full_convolutions():
  with pytest.raises(ValueError, match="^convolution must be full for mixed kernels; got 'fact"):
    shape_of(BasicBlock(8, gating="kernels", convolution="factorised"))


def test_extra_channels_need_the_pixels_of_the_input():
  x, extra = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 2, 2, 4))
  message = r"^extra must have the examples and pixels of x, \(1, 4, 4\); got shape \(1, 2, 2, 4\)"
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: BasicBlock(4).init(jax.random.key(0), x, extra=extra))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_extra_channels_are_taken_by_their_former_name(block):
  x = jnp.zeros((1, 4, 4, 4), jnp.float32)
  shapes = lambda **extra: jax.eval_shape(
    lambda: block(4, gating="none").init(jax.random.key(0), x, **extra)
  )
  with pytest.warns(DeprecationWarning, match="beside is now called extra"):
    found = shapes(beside=x)
  assert found == shapes(extra=x)
  assert found["params"]["conv1"]["conv"]["kernel"].shape[2] == 8
