import dataclasses

import numpy as np
import pytest

from gating_jax.inference import costs, folded
from gating_jax.inference.analysing import _in_blocks, _union, analyse, observe, pruning_error
from gating_jax.inference.conditional import ungated
from gating_jax.inference.folded import Group
from gating_jax.inference.folding import fold
from gating_jax.inference.pruning import PruneMask, apply_pruning
from tests.helpers.folded_nets import count_gates, forced, heads_of
from tests.helpers.gated_models import MODELS, SHAPE, images, random_variables

MODEL = MODELS["basic"]
VARIABLES = random_variables(MODEL)


@pytest.fixture(scope="module")
def gates():
  """Returns the gates of 150 images, `[150, U]` for each group."""
  return [np.asarray(z) > 0 for z in folded.run_net(fold(MODEL, VARIABLES), images(150))[1]]


@pytest.fixture(scope="module")
def analysis():
  return analyse(MODEL, VARIABLES, np.asarray(images(150)))


def test_openings_are_those_of_all_images(analysis, gates):
  logits = folded.run_net(analysis.net, images(150))[1]
  assert analysis.images == 150
  assert [o.part for o in analysis.gate_statistics] == [1, 2, 3]
  for o, g, z in zip(analysis.gate_statistics, gates, logits, strict=True):
    np.testing.assert_array_equal(o.opened, g.sum(axis=0))
    np.testing.assert_array_equal(o.together, [[np.sum(a & b) for a in g.T] for b in g.T])
    np.testing.assert_allclose(o.highest, z.max(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(o.lowest, z.min(axis=0), rtol=1e-4, atol=1e-4)
    rates = g.mean(axis=0)
    np.testing.assert_array_equal(o.always_open, rates > 0.99)
    np.testing.assert_array_equal(o.always_closed, rates < 0.01)
    np.testing.assert_array_equal(o.varies, (rates >= 0.01) & (rates <= 0.99))


def test_correlation_is_pearsons(analysis, gates):
  o, g = next(
    (o, g) for o, g in zip(analysis.gate_statistics, gates, strict=True) if o.varies.sum() > 1
  )
  varies = o.varies
  np.testing.assert_allclose(
    o.correlation[np.ix_(varies, varies)], np.corrcoef(g[:, varies].T), atol=1e-12
  )
  assert not o.correlation[:, (o.opened == 0) | (o.opened == o.images)].any()


@pytest.mark.parametrize("size", [40, 12, 1])
def test_batches_say_the_same_as_one_array(size, analysis):
  x = np.asarray(images(150))
  other = analyse(analysis.net, None, (x[i : i + size] for i in range(0, 150, size)))
  for a, b in zip(analysis.gate_statistics, other.gate_statistics, strict=True):
    np.testing.assert_array_equal(a.together, b.together)
  assert other.macs == pytest.approx(analysis.macs)


def test_macs_of_each_way(analysis, gates):
  net, macs = analysis.net, analysis.macs
  heads = sum(p.head.hidden.size + p.head.logits.size for p in net.parts if p.head)
  assert macs["masked"] == costs.macs(net, SHAPE) == macs["ungated"] + heads
  assert macs["executed"] == pytest.approx(costs.macs(net, SHAPE, gates).mean())
  assert macs["switch of 4"] == macs["masked"]  # no layer has more than 16 channels
  whole = [np.repeat(g.any(axis=1, keepdims=True), g.shape[1], axis=1) for g in gates]
  assert macs["blocks of 16"] == pytest.approx(costs.macs(net, SHAPE, whole).mean())
  union = [
    np.concatenate(
      [
        np.repeat(g[i : i + 8].any(axis=0)[None], len(g[i : i + 8]), axis=0)
        for s in (0, 128)
        for i in range(s, min(s + 128, 150), 8)
      ]
    )
    for g in gates
  ]
  assert macs["union of 8"] == pytest.approx(costs.macs(net, SHAPE, union).mean())
  assert macs["executed"] < macs["union of 8"] < macs["masked"]
  assert analysis.mac_rows()[0] == {"strategy": "ungated", "macs": macs["ungated"], "ratio": 1.0}


def test_a_weighted_unit_counts_as_one_and_the_glance_with_the_gate_networks():
  model = MODELS["recipe"]
  net = fold(model, random_variables(model))
  found = analyse(net, None, np.asarray(images(20))).macs
  gates = [np.asarray(z) > 0 for z in folded.run_net(net, images(20))[1]]
  assert found["executed"] == pytest.approx(costs.macs(net, SHAPE, gates).mean())
  heads = sum(map(costs.head_macs, net.parts)) + costs.glance_macs(net)
  assert found["masked"] - found["ungated"] == heads
  assert found["ungated"] == costs.macs(ungated(net), SHAPE)


def test_units_of_blocks_and_unions():
  opened = np.arange(64) < np.array([0, 16, 17, 33, 64])[:, None]
  assert _in_blocks(opened[:, :20], Group(20), 16).sum(axis=1).tolist() == [0, 16, 20, 20, 20]
  one = np.eye(9, 3, dtype=bool)
  assert _union(one).tolist() == [[True] * 3] * 8 + [[False] * 3]


def test_layer_gates_run_or_do_not_in_every_way():
  analysis = analyse(MODELS["layer"], random_variables(MODELS["layer"]), images(24))
  assert analysis.macs["switch of 4"] == analysis.macs["executed"] == analysis.macs["blocks of 32"]
  assert all(o.layer_gate for o in analysis.gate_statistics)


def test_a_row_has_the_rates_and_counts_of_its_gates(analysis):
  row = analysis.rows()[0]
  o = analysis.gate_statistics[0]
  assert row["units"] == 4
  assert row["open"] == pytest.approx(o.open_rates.mean())
  assert row["always_open"] + row["always_closed"] + row["varies"] == 4
  # By its former name.
  assert row["conditional"] == row["varies"]
  assert (row["open_on_all"], row["closed_on_all"]) == (
    (o.opened == 150).sum(),
    (o.opened == 0).sum(),
  )


def test_a_net_without_gates_has_macs_only():
  analysis = analyse(MODELS["ungated"], random_variables(MODELS["ungated"]), images(3))
  assert analysis.rows() == []
  assert len(set(analysis.macs.values())) == 1


@pytest.mark.parametrize(
  ("calibration", "message"),
  [
    (np.zeros((0, *SHAPE), np.float32), "at least one image; got none"),
    (iter(()), "at least one image; got none"),
    (np.zeros(SHAPE, np.float32), r"images must be \[N, H, W, D\]; got shape"),
    (
      np.zeros((2, *SHAPE), np.uint8),
      "images must be network inputs in floating point, .*; got uint8",
    ),
    (np.full((2, *SHAPE), np.nan, np.float32), "images must be finite; index 0 of 2 is not"),
    (
      np.zeros((2, 9, 8, 1), np.float32),
      "images must have 3 channels, as the network expects; got 1",
    ),
    ([np.zeros((1, 9, 8, 3)), np.zeros((1, 8, 8, 3))], "images must be of one shape"),
  ],
)
def test_bad_calibration_is_named(analysis, calibration, message):
  with pytest.raises(ValueError, match=message):
    analyse(analysis.net, None, calibration)


def test_the_error_of_pruning_needs_an_image(analysis):
  none = [PruneMask.nothing(counted.group.gates) for counted in analysis.gate_statistics]
  with pytest.raises(ValueError, match="^images must be at least one; got none"):
    pruning_error(analysis.net, none, iter(()))


def test_a_last_smaller_batch_runs_in_the_same_program():
  net = fold(MODEL, VARIABLES)
  sizes = [(len(x), len(y), len(logits[0])) for x, y, logits in observe(net, images(200))]
  assert sizes == [(128, 128, 128), (72, 72, 72)]


def test_pruning_error_counts_what_new_images_move():
  net, x = fold(MODEL, VARIABLES), images(40, seed=3)
  middle = -np.median(np.asarray(folded.run_net(net, x)[1][0]), axis=0)
  net = forced(net, [middle, *([0] * h.logits_bias.size for h in heads_of(net)[1:])])
  logits = np.asarray(folded.run_net(net, x)[1][0])
  opens, closes = logits[:, 0] > 0, logits[:, 3] <= 0
  assert 0 < opens.mean() < 1
  none = [PruneMask(*np.zeros((2, h.logits_bias.size), bool)) for h in heads_of(net)[1:]]
  wrong = [PruneMask(np.array([1, 0, 0, 0], bool), np.array([0, 0, 0, 1], bool)), *none]
  found = pruning_error(net, wrong, x)
  assert found.images == 40
  assert found.affected == np.mean(opens | closes)
  assert found.opened.tolist() == [opens.mean(), *[0.0] * len(none)]
  assert found.closed.tolist() == [closes.mean(), *[0.0] * len(none)]
  y, z = folded.run_net(net, x)[0], folded.run_net(apply_pruning(net, wrong), x)[0]
  gap = np.abs(np.asarray(y - z)).max(axis=1)
  np.testing.assert_allclose(found.difference[0], gap[opens | closes].max(), rtol=1e-4)
  assert found.difference[1] < 1e-4 < found.difference[0]
  assert found.changed == np.mean(np.argmax(y, 1) != np.argmax(z, 1))
  assert found.rows(count_gates(net, x))[0] == {
    "part": 1,
    "group": 0,
    "would open": opens.mean(),
    "would close": closes.mean(),
  }
  feature_map = pruning_error(dataclasses.replace(net, classifier=None, pooled=False), wrong, x)
  assert (feature_map.affected, feature_map.changed) == (found.affected, 0)
  assert feature_map.difference[1] < 1e-4 < feature_map.difference[0]


def test_former_attributes_of_statistics_warn_and_work(analysis):
  with pytest.warns(DeprecationWarning, match="openings is now called gate_statistics"):
    counted = analysis.openings[0]
  with pytest.warns(DeprecationWarning, match="conditional is now called varies"):
    assert counted.conditional.tolist() == counted.varies.tolist()
