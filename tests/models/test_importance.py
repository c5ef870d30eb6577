"""Importance of units: its value, the gates that begin with it, and static pruning by it."""

import dataclasses

import flax
import jax
import numpy as np
import pytest
from scipy import stats

from gating_jax.layers.blocks import Bottleneck
from gating_jax.layers.gate import GateSettings
from gating_jax.models import select_units, unit_importance, with_prior
from gating_jax.models.importance import UnitImportance, describe_units
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import VGG
from tests.helpers.gated_models import images, random_variables

PRIOR = GateSettings(
  hidden=3,
  noise_scale=0.0,
  context="glance+pooled",
  normalise=2.0,
  threshold="quantile",
  share=0.5,
  weighted=True,
  prior=True,
)


def without_gates(variables):
  """Returns the parameters and statistics of everything but gates."""
  flat = flax.traverse_util.flatten_dict(variables)
  own = {path: leaf for path, leaf in flat.items() if not {"gate", "glance"} & set(path)}
  return flax.traverse_util.unflatten_dict(own)


@pytest.mark.thin(2)
@pytest.mark.parametrize("block", [1, 2])
def test_importance_is_mean_activity_times_the_norm_of_what_reads_it(block):
  gate = GateSettings(context="none", block=block)
  model = VGG(3, (4,), norm=False, gating="channel", gate=gate)
  variables, x = random_variables(model), images(70)
  (found,) = unit_importance(model, variables, x)
  features, _ = model.clone(classes=None, gating="none").apply(without_gates(variables), x)
  kernel = np.asarray(variables["params"]["classifier"]["kernel"])
  by_hand = np.mean(features, axis=0) * np.linalg.norm(kernel, axis=1)
  np.testing.assert_allclose(found.values, by_hand.reshape(-1, block).sum(1), rtol=1e-5)
  assert found.gate == ("layer1", "gate")
  assert found.most(2).tolist() == sorted(np.argsort(found.values)[-2:])


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("wide", "narrow"),
  [
    (ResNet(3, (2,), features=4, gating="channel", gate=PRIOR), {"inner_width": 0.5}),
    (
      ResNet(3, (1,), Bottleneck, features=4, shortcut="B", gating="channel", gate=PRIOR),
      {"inner_width": 0.5},
    ),
    (VGG(3, (4, "pool", 6), gating="channel", gate=PRIOR), {"width": 0.5}),
  ],
  ids=["basic", "bottleneck", "vgg"],
)
def test_gates_begin_as_the_network_that_is_pruned_by_importance(wide, narrow):
  variables, x = random_variables(wide), images(6)
  found = unit_importance(wide, variables, x)
  if isinstance(wide, VGG):
    # Where layers share no gate network each has a rank of its own.
    assert len({units.gate for units in found}) == 2
  begun = with_prior(variables, found, share=0.5)
  y, records = jax.jit(wide.apply)(begun, x)
  for record in records:
    # The same units for all images, with weights of exactly 1.
    assert set(np.unique(record.gates)) == {0.0, 1.0}
    np.testing.assert_array_equal(record.gates.sum(axis=1), record.gates.shape[1] / 2)
  pruned = wide.clone(gating="none", **narrow)
  shapes = jax.eval_shape(pruned.init, jax.random.key(0), x)
  kept = select_units(variables, found, shapes)
  z, none = jax.jit(pruned.apply)(kept, x)
  assert none == ()
  np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5 * np.abs(z).max())
  # All open, it is the whole network.
  everything, _ = jax.jit(wide.apply)(with_prior(variables, found), x)
  dense, _ = jax.jit(wide.clone(gating="none").apply)(without_gates(variables), x)
  np.testing.assert_allclose(everything, dense, rtol=1e-4, atol=1e-5 * np.abs(dense).max())


def test_the_prior_has_normal_scores_of_ranks():
  model = VGG(3, (4,), gating="channel", gate=PRIOR)
  variables = random_variables(model)
  (found,) = unit_importance(model, variables, images(2))
  found = found._replace(values=np.array([3.0, 0.1, 8.0, 3.0]))
  gate = with_prior(variables, [found], scale=4.0, gain=0.5)["params"]["layer1"]["gate"]
  # Of equal units the first is the better one.
  scores = 4 * stats.norm.ppf((np.array([3, 1, 4, 2]) - 0.5) / 4)
  np.testing.assert_allclose(gate["prior"], scores, rtol=1e-5)
  np.testing.assert_array_equal(gate["gain"], 0.5)


def test_what_has_no_importance_is_named():
  x = images(2)
  layer = ResNet(3, (1,), features=4, gating="layer")
  with pytest.raises(ValueError, match="that certain layers read; those of stage1_block1/gate are"):
    unit_importance(layer, random_variables(layer), x)
  ungated = layer.clone(gating="none")
  with pytest.raises(ValueError, match="model must have gates of channels; got one without gates"):
    unit_importance(ungated, random_variables(ungated), x)
  plain = layer.clone(gating="channel")
  variables = random_variables(plain)
  with pytest.raises(ValueError, match="images must hold at least one image; got none"):
    unit_importance(plain, variables, x[:0])
  found = describe_units(plain, variables, x)
  with pytest.raises(ValueError, match="must have a prior for each of 4 gates at stage1_block1/ga"):
    with_prior(variables, found)
  wider = jax.eval_shape(ungated.clone(inner_width=2.0).init, jax.random.key(0), x)
  with pytest.raises(ValueError, match="differ in units alone; .* has shape .*8.* there, and .*4"):
    select_units(variables, found, wider)


def test_no_more_units_than_there_are_can_be_chosen():
  units = UnitImportance((), (), (), np.array([0.5, 2.0]))
  assert units.most(2).tolist() == [0, 1]
  with pytest.raises(ValueError, match=r"^count must be in 0 \.\. 2; got 3"):
    units.most(3)


def test_a_prior_needs_gates_that_learn():
  for fields in ({"context": "none", "normalise": 0.0}, {"context": "random"}):
    with pytest.raises(ValueError, match="gate prior must be False if|must be 0 if"):
      dataclasses.replace(PRIOR, **{"threshold": "zero", "share": 1.0, "weighted": False, **fields})
