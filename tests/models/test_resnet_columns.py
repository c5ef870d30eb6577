import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.models.columns import ResNetColumn, column, column_macs, output_shapes
from gating_jax.models.resnets import ResNet, resnet
from gating_jax.models.summary import model_summary

SHAPE, CLASSES, BEFORE, N = (6, 6, 1), 2, 2, 5
FIELDS = dict(blocks=(1, 2), features=2, shortcut="B")
# By kind: the block of a stage, and the window of its first convolution.
BLOCKS = {
  "basic": (BasicBlock, 3),
  "bottleneck": (Bottleneck, 1),
}


@pytest.fixture(params=BLOCKS)
def block(request):
  return BLOCKS[request.param][0]


def net(block, **settings):
  return ResNetColumn(classes=CLASSES, block=block, **{**FIELDS, **settings})


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def before(block, columns=BEFORE):
  """Makes outputs of so many older columns, in the first places, and zeros."""
  filled = (np.arange(BEFORE) < columns)[:, None, None, None, None]
  return tuple(
    jnp.abs(random(BEFORE, N, *shape, seed=i)) * filled
    for i, shape in enumerate(output_shapes(net(block), SHAPE))
  )


@functools.cache
def variables(block):
  shapes = jax.eval_shape(
    lambda x, b: net(block).init(jax.random.key(0), x, b), random(N, *SHAPE), before(block)
  )
  flat = flax.traverse_util.flatten_dict(shapes)
  return flax.traverse_util.unflatten_dict(
    {
      path: jnp.abs(random(*leaf.shape, seed=i)) + 0.5
      if path[-1] == "var"
      else random(*leaf.shape, seed=i)
      for i, (path, leaf) in enumerate(flat.items())
    }
  )


@functools.cache
def run(block, columns):
  return jax.jit(net(block).apply)(variables(block), random(N, *SHAPE), before(block, columns))


def conv_norm(tree, x, kernel, stride=1):
  """Computes BatchNorm in evaluation of the convolution with this kernel."""
  pad = [(kernel.shape[0] // 2,) * 2] * 2
  y = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  params, stats = tree["params"]["norm"], tree["batch_stats"]["norm"]
  return (y - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def part(tree, *names):
  """Returns parameters and statistics of a module within another."""
  return {
    kind: functools.reduce(lambda t, name: t[name], names, tree[kind])
    for kind in ("params", "batch_stats")
  }


def adapted(tree, name, older):
  p = tree["params"][name]
  stacked = jnp.concatenate([a * h for a, h in zip(p["alpha"], older, strict=True)], -1)
  return jnp.maximum(stacked @ p["kernel"].reshape(-1, p["kernel"].shape[-1]), 0)


def test_a_block_is_the_equation_of_the_docstring():
  """The first block of the second stage: its shortcut projects only the column's own features."""
  tree, place, name = variables(BasicBlock), 1, "stage2_block1"
  _, outputs = run(BasicBlock, 2)
  x = outputs[place]
  both = jnp.concatenate([x, adapted(tree, f"{name}_adapter", before(BasicBlock)[place])], -1)
  kernel = lambda conv: tree["params"][name][conv]["conv"]["kernel"]
  h = jnp.maximum(conv_norm(part(tree, name, "conv1"), both, kernel("conv1"), 2), 0)
  y = conv_norm(part(tree, name, "conv2"), h, kernel("conv2"))
  y += conv_norm(part(tree, name, "project"), x, kernel("project"), 2)
  assert float(jnp.ptp(adapted(tree, f"{name}_adapter", before(BasicBlock)[place]))) > 1
  np.testing.assert_allclose(outputs[place + 1], jnp.maximum(y, 0), rtol=1e-3, atol=1e-3)


def test_logits_are_of_the_pooled_features_of_all_columns():
  tree = variables(BasicBlock)
  logits, outputs = run(BasicBlock, 2)
  pooled = [
    outputs[-1].mean((1, 2)),
    adapted(tree, "classifier_adapter", before(BasicBlock)[-1].mean((2, 3))),
  ]
  p = tree["params"]["classifier"]
  np.testing.assert_allclose(
    logits, jnp.concatenate(pooled, -1) @ p["kernel"] + p["bias"], rtol=1e-4, atol=1e-4
  )


def plain_variables(block):
  """Returns the variables of a column without adapters and their readers."""
  flat = {
    path: x
    for path, x in flax.traverse_util.flatten_dict(variables(block)).items()
    if "adapter" not in path[1]
  }
  for path, x in flat.items():
    if path[2:] == ("conv1", "conv", "kernel"):
      flat[path] = x[:, :, : x.shape[2] // 2]
    if path[1:] == ("classifier", "kernel"):
      flat[path] = x[: len(x) // 2]
  return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.thin(2)
def test_a_first_column_is_a_plain_residual_net(block):
  model = ResNet(CLASSES, block=block, **FIELDS)
  plain = plain_variables(block)
  expected, _ = jax.jit(model.apply)(plain, random(N, *SHAPE))
  np.testing.assert_allclose(run(block, 0)[0], expected, rtol=1e-3, atol=1e-3)
  assert np.abs(run(block, 1)[0] - expected).max() > 0.1
  assert np.abs(run(block, 1)[0] - run(block, 2)[0]).max() > 0.1
  without, _ = jax.jit(net(block).apply)(plain, random(N, *SHAPE), ())
  np.testing.assert_allclose(without, expected, rtol=1e-6, atol=1e-6)


def test_every_adapter_is_of_the_blocks_input_and_changes_what_follows(block):
  flat = flax.traverse_util.flatten_dict(variables(block)["params"])
  for place, name in enumerate(("stage1_block1", "stage2_block1", "stage2_block2")):
    muted = dict(flat)
    muted[f"{name}_adapter", "kernel"] = 0 * flat[f"{name}_adapter", "kernel"]
    tree = {**variables(block), "params": flax.traverse_util.unflatten_dict(muted)}
    _, outputs = jax.jit(net(block).apply)(tree, random(N, *SHAPE), before(block))
    same = [bool(jnp.all(a == b)) for a, b in zip(outputs, run(block, 2)[1], strict=True)]
    assert same[: place + 1] == [True] * (place + 1)
    assert not any(same[place + 1 :])


def test_output_shapes_are_those_of_the_outputs(block):
  shapes = output_shapes(net(block), SHAPE)
  d = block.expansion
  assert shapes == ((6, 6, 2), (6, 6, 2 * d), (3, 3, 4 * d), (3, 3, 4 * d))
  assert tuple(h.shape[1:] for h in run(block, 2)[1]) == shapes
  assert output_shapes(net(block, width=2.0), (5, 7, 3))[-1] == (3, 4, 8 * d)


def expected_macs(kind, j):
  """Returns the MACs of a plain net.

  With older columns, each block's first convolution, the adapters and the head are added.
  """
  block, window = BLOCKS[kind]
  d, plain = block.expansion, model_summary(ResNet(CLASSES, block=block, **FIELDS), SHAPE).macs
  # Pixels, channels: in and out.
  blocks = [
    (36, 2, 36, 2),
    (36, 2 * d, 9 if window == 3 else 36, 4),
    (9, 4 * d, 9, 4),
  ]
  lateral = (
    sum(j * pixels * i * i + window**2 * after * i * f for pixels, i, after, f in blocks)
    if j
    else 0
  )
  head = 4 * d * CLASSES
  return plain - head + lateral, head + (j * (4 * d) ** 2 + head if j else 0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_macs_are_those_of_the_plain_net_and_of_laterals(kind):
  assert [tuple(column_macs(net(BLOCKS[kind][0]), SHAPE, j)) for j in range(3)] == [
    expected_macs(kind, j) for j in range(3)
  ]


def test_parameters_are_those_of_the_plain_net_and_of_laterals():
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  plain = model_summary(ResNet(CLASSES, **FIELDS), SHAPE).params
  blocks = ((2, 2), (2, 4), (4, 4))  # channels in, channels between the convolutions
  adapters = [2 * d * d + 2 for d in (2, 2, 4, 4)]
  laterals = sum(9 * d * f for d, f in blocks) + 4 * CLASSES
  assert size(variables(BasicBlock)["params"]) == plain + sum(adapters) + laterals


def test_a_named_columns_macs():
  net = column("resnet18", 2, stem="cifar", width=0.125)
  plain = model_summary(resnet("resnet18", 2, stem="cifar", width=0.125), (32, 32, 3)).macs
  assert sum(column_macs(net, (32, 32, 3), 0)) == plain
  # Two blocks per stage: the stem and block 1 have 8 and 8 channels at 32 x 32; each further stage
  # halves the side and doubles the channels.
  sizes = [(1024, 8), (1024, 8), (1024, 8), (256, 16), (256, 16), (64, 32), (64, 32), (16, 64)]
  first = [(1024, 8, 8)] * 2 + [
    (256, 8, 16),
    (256, 16, 16),
    (64, 16, 32),
    (64, 32, 32),
    (16, 32, 64),
    (16, 64, 64),
  ]
  lateral = sum(4 * pixels * d * d for pixels, d in sizes) + sum(
    9 * pixels * i * o for pixels, i, o in first
  )
  assert sum(column_macs(net, (32, 32, 3), 4)) == plain + lateral + 4 * 64 * 64 + 64 * 2


def test_gates_are_refused(block):
  with pytest.raises(ValueError, match=r"^extra input channels need gating 'none'; got 'channel'"):
    net(block, gating="channel").init(jax.random.key(0), random(N, *SHAPE), before(block))
