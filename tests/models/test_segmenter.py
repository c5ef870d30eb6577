import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.models.resnets import ResNet, resnet
from gating_jax.models.segmenter import Segmenter, enlarge, grid_means
from gating_jax.models.summary import model_summary
from gating_jax.ops.macs import gated_macs

RANDOM = np.random.default_rng(0)
apply = jax.jit(lambda model, variables, x: model.apply(variables, x), static_argnums=0)


def backbone(**fields):
  return ResNet(
    **dict(classes=None, blocks=(1, 2, 1), features=4, pool=False, shortcut="B") | fields
  )


def initialised(model, x):
  """Makes random variables by numpy, since compiling `init` takes seconds."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  signed = lambda v: jnp.asarray(RANDOM.uniform(-1, 1, v.shape), jnp.float32)
  positive = lambda v: jnp.asarray(RANDOM.uniform(0.5, 1.5, v.shape), jnp.float32)
  return {
    "params": jax.tree.map(signed, shapes["params"]),
    "batch_stats": jax.tree.map(positive, shapes["batch_stats"]),
  }


@pytest.mark.parametrize(("size", "side"), [(7, 3), (4, 6), (6, 6), (5, 1), (9, 2)])
def test_grid_means_are_those_of_their_cells(size, side):
  x = RANDOM.normal(size=(2, size, 5, 3)).astype(np.float32)
  got = grid_means(jnp.asarray(x), side)
  for i in range(side):
    for j in range(side):
      rows = slice(math.floor(i * size / side), math.ceil((i + 1) * size / side))
      columns = slice(math.floor(j * 5 / side), math.ceil((j + 1) * 5 / side))
      np.testing.assert_allclose(
        got[:, i, j], x[:, rows, columns].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6
      )


def test_enlarging_is_linear_between_the_centres_of_pixels():
  ramp = jnp.arange(4.0).reshape(1, 1, 4, 1)
  np.testing.assert_allclose(
    enlarge(ramp, (3, 8))[0, :, :, 0], [[0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]] * 3, rtol=1e-6
  )


@pytest.mark.thin(3)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("output_stride", "every"), [(2, 2), (1, 4)])
def test_a_finer_map_has_that_of_the_named_net_among_its_pixels(block, output_stride, every):
  x = jnp.asarray(RANDOM.normal(size=(2, 16, 24, 1)), jnp.float32)
  coarse, fine = backbone(block=block), backbone(block=block, output_stride=output_stride)
  variables = initialised(coarse, x)
  (expected, _), (got, _) = apply(coarse, variables, x), apply(fine, variables, x)
  assert expected.shape[1:3] == (4, 6)
  assert got.shape[1:3] == (4 * every, 6 * every)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got[:, ::every, ::every] / scale, expected / scale, atol=1e-5)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  ("name", "output_stride", "side"),
  [
    ("resnet50", None, 3),
    ("resnet50", 16, 6),
    ("resnet50", 8, 12),
    ("resnet18", 31, 6),
    ("resnet20", 2, 48),
  ],
)
def test_output_stride_is_the_most_that_the_map_is_coarser(name, output_stride, side):
  model = resnet(name, None, pool=False, output_stride=output_stride, gating="channel")
  x = jnp.zeros((1, 96, 96, 3))
  (features, _), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x))
  assert features.shape[1:3] == (side, side)


def test_an_output_stride_that_the_net_cannot_have_is_refused():
  refused = "output_stride must be None or, for images, at least the stem's"
  with pytest.raises(ValueError, match=f"{refused} 4; got 2"):
    jax.eval_shape(
      resnet("resnet18", None, output_stride=2).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
  with pytest.raises(ValueError, match=f"{refused} 1; got 2"):
    jax.eval_shape(backbone(output_stride=2).init, jax.random.key(0), jnp.zeros((1, 4, 16, 16, 3)))


@pytest.mark.parametrize(("output_stride", "sides"), [(None, (16, 8, 4)), (2, (16, 8, 8))])
def test_macs_of_backbone_and_head_by_hand(output_stride, sides):
  net = backbone(gating="channel", output_stride=output_stride, blocks=(1, 1, 1))
  model = Segmenter(net, classes=5, features=6, bins=(1, 3))
  counts = model_summary(model, (16, 16, 1))
  a, b, c = (side**2 for side in sides)
  gated = a * 9 * (4 * 4 + 4 * 4) + b * 9 * (4 * 8 + 8 * 8) + c * 9 * (8 * 16 + 16 * 16)
  fixed = a * 9 * 4 + b * 4 * 8 + c * 8 * 16
  head = (1 + 9) * 16 * 8 + c * 9 * (16 + 8 + 8) * 6 + c * 6 * 5
  assert (counts.gated, counts.macs, counts.gates) == (gated, gated + fixed + head, 4 + 8 + 16)
  assert counts.macs - model_summary(net, (16, 16, 1)).macs == head


@pytest.mark.slow
def test_logits_of_every_pixel_depend_on_the_whole_scene():
  model = Segmenter(backbone(gating="channel"), classes=3, features=6)
  x = jnp.asarray(RANDOM.normal(size=(2, 12, 20, 1)), jnp.float32)
  variables = initialised(model, x)
  logits, records = apply(model, variables, x)
  assert (logits.shape, logits.dtype) == ((2, 12, 20, 3), jnp.float32)
  assert gated_macs(records) == model_summary(model, (12, 20, 1)).gated
  assert records[0].writers == (("backbone", "stage1_block1", "conv1", "conv"),)
  changed, _ = apply(model, variables, x.at[0, -1, -1].add(5))
  assert np.mean(changed[0] != logits[0]) > 0.9
  np.testing.assert_array_equal(changed[1], logits[1])
