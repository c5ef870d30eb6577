"""Names of the public API: those of former versions still import."""

import warnings

import pytest

import gating_jax

# The public API before the first renaming.
FORMER = """
  Analysis BasicBlock Bottleneck ChannelGate GateHead GateRecord GateSettings ModelCounts Prior
  ResNet SegmentGate SegmentGateSettings SegmentNet Skipping Switched VGG VideoCounts analyse
  apply_gates batch_shaping_loss beta binary_concrete bucket_sizes capacity_for cdf_matching_loss
  clipped_sigmoid compile_conditional compile_exits count count_video disagreement empirical
  empirical_cdf executed_macs expected_macs export_model find_concepts fold from_cdf gated_macs
  generalised_batch_shaping_loss hard_concrete hard_concrete_mean hard_concrete_open_prob
  heavy_net l0_loss light_net mac_budget_loss mac_loss noise_floor normal open_indices put_back
  quantise relaxed_bernoulli resnet slim sort_with_vjp static_units straight_through_gate
  symmetric_beta target_rate_loss threshold_gate uniform vgg
"""


@pytest.mark.parametrize("name", FORMER.split())
def test_former_names_still_import(name):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    assert getattr(gating_jax, name) is not None


@pytest.mark.parametrize(("old", "new"), gating_jax.RENAMED.items())
def test_a_renamed_name_warns_and_is_the_new_one(old, new):
  assert old not in gating_jax.__all__
  assert new in gating_jax.__all__
  with pytest.warns(DeprecationWarning, match=f"gating_jax.{old} is now called gating_jax.{new}"):
    assert getattr(gating_jax, old) is getattr(gating_jax, new)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'put_front'"):
    gating_jax.put_front  # noqa: B018
