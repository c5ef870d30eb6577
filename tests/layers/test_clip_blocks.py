"""Residual blocks on clips of frames, whole and factorised; `test_blocks.py` has the images."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.ops.macs import conv_macs, executed_macs

OPEN = 1e4
SHAPE = (2, 3, 5, 4, 3)

# Block, convolution, number of gates, and the input and output side of every gated convolution:
# the first and last gate that switch its channels there, or None.
CASES = {
  "basic": (BasicBlock, "full", 4, {"conv1": (None, (0, 4)), "conv2": ((0, 4), None)}),
  "basic factorised": (
    BasicBlock,
    "factorised",
    4,
    {"conv1/time": (None, (0, 4)), "conv2/space": ((0, 4), None)},
  ),
  "bottleneck": (
    Bottleneck,
    "full",
    8,
    {"conv1": (None, (0, 4)), "conv2": ((0, 4), (4, 8)), "conv3": ((4, 8), None)},
  ),
  "bottleneck factorised": (
    Bottleneck,
    "factorised",
    8,
    {
      "conv1": (None, (0, 4)),
      "conv2/space": ((0, 4), None),
      "conv2/time": (None, (4, 8)),
      "conv3": ((4, 8), None),
    },
  ),
}
cases = pytest.mark.parametrize(
  ("block", "convolution", "gates", "touched"), CASES.values(), ids=CASES
)

apply = jax.jit(lambda block, variables, x: block.apply(variables, x), static_argnums=0)


def clips(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def variables_of(block, x):
  """Makes random variables with every unit alive, by the path of each leaf."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    values = (
      rng.normal(0, 0.5, leaf.shape) if path[-1] == "kernel" else rng.uniform(0.5, 1.0, leaf.shape)
    )
    return jnp.asarray(values, jnp.float32)

  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(block.init, jax.random.key(0), x))
  return {path: fill(path, leaf) for path, leaf in shapes.items()}


def with_gates(flat, gates):
  """Fixes the gate's logits for every input."""
  head = ("params", "gate", "head", "logits")
  logits = jnp.where(jnp.asarray(gates), OPEN, -OPEN)
  flat = {**flat, (*head, "kernel"): 0 * flat[*head, "kernel"], (*head, "bias"): logits}
  return flax.traverse_util.unflatten_dict(flat)


def without_gate(flat):
  return flax.traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if "gate" not in path}
  )


def without_input_channel(flat, conv, channel):
  path = ("params", *conv.split("/"), "conv", "kernel")
  return {**flat, path: flat[path].at[..., channel, :].set(0)}


@pytest.mark.thin(3)
@cases
@pytest.mark.parametrize("stride", [1, 2])
def test_closing_a_gate_is_dropping_one_channel_of_the_ungated_block(
  block, convolution, gates, touched, stride
):
  x = clips(*SHAPE)
  gated, plain = (
    block(4, stride, gating, convolution=convolution) for gating in ("channel", "none")
  )
  flat = variables_of(gated, x)
  expected, no_records = apply(plain, without_gate(flat), x)
  assert no_records == ()
  assert expected.shape == (2, *(-(-size // stride) for size in SHAPE[1:-1]), 4 * block.expansion)
  np.testing.assert_allclose(
    apply(gated, with_gates(flat, np.ones(gates)), x)[0], expected, rtol=1e-4, atol=1e-4
  )
  for conv, (inputs, _) in touched.items():
    if inputs is None:
      continue
    gate = inputs[1] - 2
    y, _ = apply(gated, with_gates(flat, np.arange(gates) != gate), x)
    dropped, _ = apply(plain, without_gate(without_input_channel(flat, conv, gate - inputs[0])), x)
    assert np.abs(np.asarray(dropped - expected)).max() > 1e-2
    np.testing.assert_allclose(y, dropped, rtol=1e-4, atol=1e-4)


def brute_force(block, variables, touched, gates):
  """Returns the MACs per example of gated convolutions, from shapes of calls and open channels."""
  total = 0

  def tally(call, args, kwargs, context):
    nonlocal total
    y = call(*args, **kwargs)
    if isinstance(context.module, nn.Conv):
      name = "/".join(context.module.path[:-1])
      if name in touched:
        *window, inputs, outputs = context.module.get_variable("params", "kernel").shape
        opened = [
          size if side is None else int(gates[slice(*side)].sum())
          for size, side in zip((inputs, outputs), touched[name], strict=True)
        ]
        total += conv_macs((*window, *opened), y.shape)
    return y

  with nn.intercept_methods(tally):
    jax.eval_shape(lambda: block.apply(variables, jnp.zeros(SHAPE)))
  return total


@pytest.mark.thin(3)
@cases
@pytest.mark.parametrize("stride", [1, 2])
def test_macs_are_those_of_the_open_channels(block, convolution, gates, touched, stride):
  gated = block(4, stride, "channel", convolution=convolution)
  x = clips(*SHAPE)
  flat = variables_of(gated, x)
  for seed in range(3):
    opened = np.random.default_rng(seed).random(gates) < 0.6
    variables = with_gates(flat, opened)
    _, records = apply(gated, variables, x)
    np.testing.assert_array_equal(np.concatenate([r.gates[0] for r in records]), opened)
    expected = brute_force(gated, variables, touched, opened)
    assert 0 < expected < brute_force(gated, variables, touched, np.ones(gates))
    np.testing.assert_array_equal(executed_macs(records), expected)


def test_macs_of_a_basic_block_by_hand():
  def per_unit(**settings):
    block = BasicBlock(6, 2, "channel", **settings)
    trace = lambda x: block.init_with_output(jax.random.key(0), x)[0][1]
    (record,) = jax.eval_shape(trace, jax.ShapeDtypeStruct((1, 8, 5, 6, 4), jnp.float32))
    return record.macs_per_unit

  places = 4 * 3 * 3
  assert per_unit() == 27 * places * (4 + 6)
  # Channels between space and time: 27 * 4 * 6 / 54 = 12 in the first convolution, and
  # 27 * 6 * 6 / 72 = 13 in the second.
  assert per_unit(convolution="factorised") == 3 * places * 12 + 9 * places * 13


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_shortcuts_take_every_second_frame_row_and_column(shortcut):
  x = clips(2, 4, 5, 4, 3)
  block = BasicBlock(6, 2, "channel", shortcut)
  flat = variables_of(block, x)
  norms = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1 - 1e-5}
  flat = {
    path: jnp.full(leaf.shape, norms[path[-1]]) if "norm" in path else leaf
    for path, leaf in flat.items()
  }
  variables = with_gates(flat, np.zeros(6))
  y, _ = apply(block, variables, x)
  every = x[:, ::2, ::2, ::2]
  if shortcut == "A":
    expected = jnp.pad(every, ((0, 0),) * 4 + ((1, 2),))
  else:
    expected = every @ variables["params"]["project"]["conv"]["kernel"][0, 0, 0]
  np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_near_matches_of_convolutions_are_suggested():
  with pytest.raises(
    ValueError, match="convolution must be one of .*; got 'factorized'. Did you mean 'factorised'"
  ):
    jax.eval_shape(
      BasicBlock(2, convolution="factorized").init, jax.random.key(0), jnp.zeros(SHAPE)
    )
