"""Blocks of channels with one gate each execute the same as one gate per channel would."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import Bottleneck
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import POOL, VGG
from gating_jax.ops.macs import executed_macs, gated_macs

apply = jax.jit(lambda net, variables, x: net.apply(variables, x), static_argnums=0)
NETS = {
  "basic": ResNet(3, (1, 1), features=6, gating="channel"),
  "bottleneck": ResNet(
    3, (1, 1), features=6, block=Bottleneck, shortcut="B", gating="all_channels"
  ),
  "chain": VGG(3, (6, POOL, 12, 6), gating="channel"),
}


def traced(net):
  x = jax.ShapeDtypeStruct((5, 8, 8, 3), jnp.float32)
  (_, records), variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  return records, variables


@pytest.mark.parametrize("block", [2, 3, 12])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_executed_macs_are_those_of_the_open_channels(net, block):
  single, _ = traced(net)
  shared, _ = traced(dataclasses.replace(net, gate=GateSettings(block=block)))
  sizes = [min(block, r.gates.shape[1]) for r in single]
  assert [r.gates.shape[1] * size for r, size in zip(shared, sizes, strict=True)] == [
    r.gates.shape[1] for r in single
  ]
  random = np.random.default_rng(0)
  gates = [random.integers(0, 2, r.gates.shape).astype(np.float64) for r in shared]
  channels = [np.repeat(g, size, axis=1) for g, size in zip(gates, sizes, strict=True)]
  with_gates = lambda records, gates: tuple(
    dataclasses.replace(r, gates=g) for r, g in zip(records, gates, strict=True)
  )
  executed = executed_macs(with_gates(shared, gates))
  np.testing.assert_array_equal(executed, executed_macs(with_gates(single, channels)))
  assert len(np.unique(executed)) > 1
  assert gated_macs(shared) == gated_macs(single)


@pytest.mark.parametrize("net", [NETS["basic"], NETS["chain"]], ids=["basic", "chain"])
def test_a_gate_switches_the_adjacent_channels_of_its_block(net):
  blocks = dataclasses.replace(net, gate=GateSettings(block=3))
  random = np.random.default_rng(0)
  shared = {
    path: random.uniform(0.5, 1, leaf.shape).astype(np.float32)
    for path, leaf in flax.traverse_util.flatten_dict(traced(blocks)[1]).items()
  }
  heads = {path for path in shared if path[-2] == "logits"}
  for path in heads:
    shared[path] = (
      np.where(np.arange(shared[path].shape[-1]) % 2, -1e4, 1e4)
      * (path[-1] == "bias")
      * np.ones(shared[path].shape, np.float32)
    )
  single = {
    path: leaf.repeat(3, axis=-1) if path in heads else leaf for path, leaf in shared.items()
  }
  x = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
  (y, records), (expected, one_each) = (
    apply(net, flax.traverse_util.unflatten_dict(flat), x)
    for net, flat in ((blocks, shared), (net, single))
  )
  assert all(0 < np.mean(r.gates) < 1 for r in records)
  for record, other in zip(records, one_each, strict=True):
    np.testing.assert_array_equal(np.repeat(record.gates, 3, axis=1), other.gates)
  np.testing.assert_allclose(y, expected, rtol=1e-6)
