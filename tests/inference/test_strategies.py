"""The accounted MACs of strategies against those of their convolutions, run one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import clusters, conditional, costs, folded
from gating_jax.inference.analysing import gates_of
from gating_jax.inference.folded import Group
from gating_jax.inference.strategies import (
  EXPORTABLE,
  STRATEGIES,
  PartBatch,
  PartContext,
  account,
  capacities,
  contexts_of,
  why_not,
)
from gating_jax.ops import native_kernels
from tests.helpers.folded_nets import KINDS, SHAPE, images, net

CASES = [
  (kind, strategy)
  for kind, known in KINDS.items()
  for strategy in ("masked", *known)
  if strategy in EXPORTABLE
]


def prepared(kind, count, buckets=3):
  """Returns network, contexts from calibration images, and a batch's gates and inputs of parts."""
  of = net(kind)
  gates = gates_of(of, images(6, seed=5))
  return of, contexts_of(of, buckets, gates), conditional.part_inputs(of, images(count))


@pytest.mark.thin(28)
@pytest.mark.parametrize(("kind", "strategy"), CASES)
@pytest.mark.parametrize("count", [1, 5])
def test_it_is_what_the_convolutions_are_given(kind, strategy, count, monkeypatch):
  of, contexts, seen = prepared(kind, count)
  given = []
  convolve = folded.Conv.__call__

  def counting(conv, x):
    y = convolve(conv, x)
    given.append(y.size * np.prod(conv.kernel.shape[:3]))
    return y

  shape, compared = SHAPE, 0
  monkeypatch.setattr(folded.Conv, "__call__", counting)
  for part, context, (x, gates, before) in zip(of.parts, contexts, seen, strict=True):
    if (made := STRATEGIES[strategy].make(part, context)) is not None:
      given.clear()
      with jax.disable_jit():
        made[1](made[0], x, gates, before)
      said = STRATEGIES[strategy].macs(PartBatch(part, context, shape, gates, before, count))
      assert said == pytest.approx(sum(given), rel=1e-12)
      compared += 1
    shape, _ = costs.part_macs(part, shape)
  assert compared


@pytest.mark.thin(4)
@pytest.mark.skipif(bool(why_not("native")), reason=why_not("native"))
@pytest.mark.parametrize("kind", KINDS)
def test_native_computes_what_is_open_and_shortcuts_whole(kind, monkeypatch):
  of, contexts, seen = prepared(kind, 5)
  given, chain, convolve = [], native_kernels.gated_chain, folded.Conv.__call__

  def counting_chain(x, kernels, biases, gates, *args, strides, **kwargs):
    size = np.array(x.shape[1:3])
    opened = [
      np.full(len(x), len(of_channels)) if gate is None else (np.asarray(gate) > 0).sum(1)
      for gate, of_channels in zip(gates, [np.zeros(x.shape[3]), *biases], strict=True)
    ]
    for i, kernel in enumerate(kernels):  # [O, I, h, w]
      size = -(-size // strides[i])
      given.append(np.prod(kernel.shape[2:]) * np.prod(size) * np.sum(opened[i] * opened[i + 1]))
    return chain(x, kernels, biases, gates, *args, strides=strides, **kwargs)

  def counting(conv, x):
    given.append((y := convolve(conv, x)).size * np.prod(conv.kernel.shape[:3]))
    return y

  monkeypatch.setattr(native_kernels, "gated_chain", counting_chain)
  monkeypatch.setattr(folded.Conv, "__call__", counting)
  shape, compared = SHAPE, 0
  for part, context, (x, gates, before) in zip(of.parts, contexts, seen, strict=True):
    if (made := STRATEGIES["native"].make(part, context)) is not None:
      given.clear()
      made[1](made[0], x, gates, before)
      batch = PartBatch(part, context, shape, gates, before, 5)
      assert STRATEGIES["native"].macs(batch) == sum(given)
      compared += 1
    shape, _ = costs.part_macs(part, shape)
  assert compared


def test_the_weight_of_a_layer_gate_multiplies_the_branch():
  part, rng = net("weighted layers").parts[1], np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 5, 4, 6)), jnp.float32)
  gates = (jnp.array([[0.0], [0.5], [1.5], [0.0]]),)
  own, run = STRATEGIES["layer_dispatch"].make(part, PartContext(2))
  y, expected = jax.jit(run)(own, x, gates, ()), folded.masked(part, x, gates, ())
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_parts_that_a_strategy_cannot_run_are_left_to_others():
  block = net("blocks").parts[1]
  (first, last), head = block.convs, dataclasses.replace(block.head, scales=True)
  strided = dataclasses.replace(block, convs=(first, dataclasses.replace(last, stride=2)))
  for strategy, part in {
    "cluster": block,
    "native": folded.Block(()),
    "pallas": strided,
  }.items():
    assert STRATEGIES[strategy].make(part, PartContext(4)) is None
  assert STRATEGIES["native"].make(dataclasses.replace(block, head=head), PartContext(4)) is None


def test_the_native_kernel_runs_on_processors_alone(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert why_not("native") == "it runs on CPUs; the default backend is gpu"
  assert why_not("switch") == ""


def test_one_program_leaves_no_sets_of_channels_to_cluster():
  gates = [np.array([[1, 0], [0, 1]])]
  assert clusters.unions([Group(2, channels=16)], gates, 0) == []
  assert len(clusters.unions([Group(2, channels=16)], gates, 2)) == 2


def test_a_part_without_a_convolution_computes_all_there_is():
  account = costs.Account(
    dense=[0], opened=[0], computed=[{"masked": 0, "native": 0}], heads=[3], outer=0
  )
  assert account.part_ratios(0) == (1.0, {"masked": 1.0, "native": 1.0})


def test_capacities_of_groups_that_switch_together():
  assert capacities([Group(64)], 4) == [(16, 32, 48, 64)]
  assert capacities([Group(64)], 2) == [(32, 64)]
  assert capacities([Group(64), Group(8, channels=2, always=4)], 4) == [
    (16, 32, 48, 64),
    (16, 32, 32, 32),
  ]


def test_ratios_of_parts_and_of_whole_programs():
  of, contexts, _ = prepared("blocks", 4)
  strategies = [
    [
      name
      for name in ("masked", "native", "pallas")
      if STRATEGIES[name].make(part, context) or name == "native"
    ]
    for part, context in zip(of.parts, contexts, strict=True)
  ]
  gates = gates_of(of, images(6, seed=5))
  indices = np.array([[0, 2], [3, 5]])
  batches = [[g[index] for g in gates] for index in indices]
  found = account(of, SHAPE, batches, strategies=strategies, contexts=contexts, size=2)
  heads = [costs.head_macs(part) for part in of.parts]
  dense = costs.macs_by_part(conditional.ungated(of), SHAPE)
  assert found.dense == dense
  opened, computed = found.part_ratios(1)
  assert computed["masked"] == 1
  assert computed["native"] == computed["pallas"] == pytest.approx(opened)
  assert opened < computed["masked"]
  classifier = of.classifier[0].size
  opened, computed = found.net_ratios(
    {"masked": ["masked"] * 3, "mixed": ["masked", "native", "masked"]}
  )
  total = sum(dense) + classifier
  assert computed["masked"] == pytest.approx((total + sum(heads)) / total)
  saved = found.computed[1]["masked"] - found.computed[1]["native"]
  assert computed["mixed"] == pytest.approx(computed["masked"] - saved / total)
  gates = [context.gates[0][indices.ravel()] for context in contexts[1:]]
  assert opened == pytest.approx(costs.macs(of, SHAPE, gates).mean() / total)
