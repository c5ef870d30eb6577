import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import Bottleneck
from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
from gating_jax.models.resnets import resnet
from gating_jax.models.summary import model_summary
from gating_jax.ops import confidence
from gating_jax.ops.macs import executed_macs, gated_macs

SHAPE, CLASSES = (8, 8, 3), 5
SMALL = dict(blocks=(1, 1, 1), features=4)
FEWER = dict(blocks=(1, 2), features=4)


def net(threshold=0.5, **fields):
  return resnet("resnet20", CLASSES, kind=EarlyExitNet, threshold=threshold, **{**SMALL, **fields})


@functools.cache
def trained():
  """Makes variables whose exits are certain of some images and not of others."""
  x = (
    jax.random.normal(jax.random.key(1), (24, *SHAPE))
    * jnp.linspace(0.1, 3, 24)[:, None, None, None]
  )
  variables = jax.jit(net().init)(jax.random.key(0), x)
  for name, scale in (("exit1", 2), ("exit2", 20)):
    dense = variables["params"][name]["classifier"]
    dense["kernel"] = scale * dense["kernel"]
  return variables, x


@functools.cache
def run(threshold, train=False):
  variables, x = trained()
  options = dict(mutable=["batch_stats"], method="all_exits") if train else {}
  out = jax.jit(lambda v: net(threshold).apply(v, x, train, **options))(variables)
  return out[0] if train else out


def test_units_cost_what_follows_up_to_the_next_exit():
  counts = model_summary(net(), SHAPE)
  exit_macs = lambda side, i, o: 9 * i * o * (side // 2) ** 2 + o * CLASSES
  stage = lambda side, i, o: 9 * side**2 * (i * o + o * o)  # shortcuts are free
  second, third = stage(4, 4, 8) + exit_macs(4, 8, 16), stage(2, 8, 16) + 16 * CLASSES
  _, records = jax.eval_shape(net().init_with_output, jax.random.key(0), jnp.zeros((1, *SHAPE)))[0]
  assert [r.macs_per_unit for r in records] == [second, third]
  plain = model_summary(resnet("resnet20", CLASSES, **SMALL), SHAPE)
  assert counts.macs == plain.macs + exit_macs(8, 4, 8) + exit_macs(4, 8, 16)
  assert counts.gated == second + third
  assert (counts.gates, counts.gate_params, counts.gate_layers) == (
    2,
    0,
    (("exit1", 1), ("exit2", 1)),
  )


def test_of_resnet20_the_exits_cost_little():
  counts = model_summary(resnet("resnet20", 10, kind=EarlyExitNet), (32, 32, 3))
  assert counts.macs - 40_551_040 == 9 * 16 * 32 * 256 + 320 + 9 * 32 * 64 * 64 + 640


def test_an_image_has_the_answer_of_its_exit_and_later_gates_are_closed():
  answers, _ = run(0.5, train=True)
  assert answers.shape == (24, 3, CLASSES)
  y, records = run(0.5)
  left = np.concatenate([r.gates for r in records], axis=1)
  assert {tuple(row) for row in left} == {(0, 0), (1, 0), (1, 1)}
  np.testing.assert_array_equal(np.concatenate([r.logits for r in records], axis=1) > 0, left)
  never, everything = run(1e-9)
  always, nothing = run(1 - 1e-9)
  assert all((r.gates == 1).all() for r in everything)
  assert all((r.gates == 0).all() for r in nothing)
  np.testing.assert_array_equal(y[left.sum(axis=1) == 2], never[left.sum(axis=1) == 2])
  np.testing.assert_array_equal(y[left.sum(axis=1) == 0], always[left.sum(axis=1) == 0])
  assert not np.array_equal(never, always)
  # The shape is the same in training.
  trains = lambda v: net().apply(v, trained()[1], True, mutable=["batch_stats"])[0][0]
  assert jax.eval_shape(trains, trained()[0]).shape == y.shape
  first, second = (r.macs_per_unit for r in records)
  np.testing.assert_array_equal(executed_macs(records), left @ np.array([first, second]))
  assert gated_macs(records) == first + second


def test_where_no_image_leaves_it_is_the_plain_network_of_the_same_parameters():
  variables, x = trained()
  plain = resnet("resnet20", CLASSES, **SMALL)
  theirs = jax.tree.structure(jax.eval_shape(plain.init, jax.random.key(0), x)["params"])
  own = {
    c: {k: v for k, v in tree.items() if not k.startswith("exit")} for c, tree in variables.items()
  }
  assert jax.tree.structure(own["params"]) == theirs
  y, records = plain.apply(own, x)
  assert records == ()
  np.testing.assert_allclose(run(1e-9)[0], y, rtol=1e-5, atol=1e-6)


def test_every_parameter_is_trained_and_none_by_the_records():
  variables, x = trained()
  apply = lambda p: net().apply(
    {**variables, "params": p}, x, True, mutable=["batch_stats"], method="all_exits"
  )[0]
  grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(apply(p)[0]))))(variables["params"])
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  silent = jax.jit(jax.grad(lambda p: sum(jnp.sum(r.probs + r.logits) for r in apply(p)[1])))(
    variables["params"]
  )
  assert all((g == 0).all() for g in jax.tree.leaves(silent))


def test_a_budget_is_met_by_the_threshold_found_for_it():
  _, records = run(0.5)
  stay = np.concatenate([r.logits for r in records], axis=1)
  counts, macs = model_summary(net(), SHAPE), [r.macs_per_unit for r in records]
  found = confidence.threshold_for_budget(
    stay, macs, always_macs=counts.always_macs, threshold=0.5, share=0.8
  )
  spent = counts.always_macs + np.mean(executed_macs(run(found)[1]))
  assert 0.8 - sum(macs) / 24 / counts.macs < spent / counts.macs <= 0.8


@pytest.mark.parametrize(
  ("fields", "shape"),
  [
    ({"gating": "channel"}, SHAPE),
    ({"classes": None}, SHAPE),
    ({"blocks": (2,)}, SHAPE),
    ({}, (4, *SHAPE)),
  ],
)
def test_what_cannot_have_exits_is_refused(fields, shape):
  with pytest.raises(
    ValueError, match="a network with exits must have classes, two stages, gating='none' and images"
  ):
    jax.eval_shape(net().clone(**fields).init, jax.random.key(0), jnp.zeros((1, *shape)))


def experts_net(**fields):
  return resnet("resnet20", 5, kind=ExpertNet, **{**FEWER, "experts": 3, **fields})


@pytest.mark.thin(2)
@pytest.mark.parametrize("block", [{}, {"block": Bottleneck, "shortcut": "B"}])
def test_each_expert_is_a_last_stage(block):
  plain, mixed = (
    model_summary(n, SHAPE) for n in (resnet("resnet20", 5, **FEWER, **block), experts_net(**block))
  )
  record = jax.eval_shape(
    experts_net(**block).init_with_output, jax.random.key(0), jnp.zeros((2, *SHAPE))
  )[0][1][0]
  assert record.gates.shape == (2, 3)
  assert mixed.gated == 3 * record.macs_per_unit
  assert mixed.macs == plain.macs + 2 * record.macs_per_unit
  assert mixed.gate_layers == (("stage2", 3),)
  inputs = 16 if block else 4
  assert (mixed.gate_macs, mixed.gate_params) == (16 * inputs + 48, 16 * inputs + 32 + 51)


def test_with_equal_experts_it_is_the_plain_network():
  x = jax.random.normal(jax.random.key(1), (6, *SHAPE))
  variables = jax.jit(experts_net().init)(jax.random.key(0), x)
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
  y, records = jax.jit(experts_net().apply)(equal, x)
  assert (np.asarray(records[0].gates) > 0.01).all()
  expected, _ = jax.jit(resnet("resnet20", 5, **FEWER).apply)(plain, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  different, _ = jax.jit(experts_net().apply)(variables, x)
  assert np.abs(different - y).max() > 1e-3


def test_gates_inside_experts_are_refused():
  with pytest.raises(
    ValueError, match="gating must be none in a network of experts; got 'channel'"
  ):
    model_summary(experts_net(gating="channel"), SHAPE)
