import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import Bottleneck
from gating_jax.models.expert_net import ExpertNet
from gating_jax.models.resnet import resnet
from gating_jax.models.summary import model_summary

SHAPE = (8, 8, 3)
SMALL = dict(blocks=(1, 2), features=4)


def net(**fields):
  return resnet("resnet20", 5, kind=ExpertNet, **{**SMALL, "experts": 3, **fields})


@pytest.mark.thin(2)
@pytest.mark.parametrize("block", [{}, {"block": Bottleneck, "shortcut": "B"}])
def test_each_expert_is_a_last_stage(block):
  plain, mixed = (
    model_summary(n, SHAPE) for n in (resnet("resnet20", 5, **SMALL, **block), net(**block))
  )
  record = jax.eval_shape(net(**block).init_with_output, jax.random.key(0), jnp.zeros((2, *SHAPE)))[
    0
  ][1][0]
  assert record.gates.shape == (2, 3)
  assert mixed.gated == 3 * record.macs_per_unit
  assert mixed.macs == plain.macs + 2 * record.macs_per_unit
  assert mixed.gate_layers == (("stage2", 3),)
  inputs = 16 if block else 4
  assert (mixed.gate_macs, mixed.gate_params) == (16 * inputs + 48, 16 * inputs + 32 + 51)


def test_with_equal_experts_it_is_the_plain_network():
  x = jax.random.normal(jax.random.key(1), (6, *SHAPE))
  variables = jax.jit(net().init)(jax.random.key(0), x)
  same = lambda tree: {
    k: tree["stage2"]["experts_0"] if k.startswith("experts") else v
    for k, v in tree["stage2"].items()
  }
  equal = {c: {**tree, "stage2": same(tree)} for c, tree in variables.items()}
  plain = {
    c: {
      **{k: v for k, v in tree.items() if k != "stage2"},
      **{f"stage2_block{i + 1}": tree["stage2"]["experts_0"][f"blocks_{i}"] for i in range(2)},
    }
    for c, tree in variables.items()
  }
  y, records = jax.jit(net().apply)(equal, x)
  assert (np.asarray(records[0].gates) > 0.01).all()
  expected, _ = jax.jit(resnet("resnet20", 5, **SMALL).apply)(plain, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  different, _ = jax.jit(net().apply)(variables, x)
  assert np.abs(different - y).max() > 1e-3


def test_gates_inside_experts_are_refused():
  with pytest.raises(
    ValueError, match="gating must be none in a network of experts; got 'channel'"
  ):
    model_summary(net(gating="channel"), SHAPE)
