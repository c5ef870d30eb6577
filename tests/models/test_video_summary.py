import flax.linen as nn
import jax
import numpy as np
import pytest

from gating_jax.layers.gate import GATE_NAME, ChannelGate, GatedChannels, GateSettings
from gating_jax.layers.segment_gate import SegmentGateSettings
from gating_jax.models.summary import NOTHING, VideoCounts, video_summary
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops.macs import executed_macs
from gating_jax.types import GateRecord

T, C, D, LIGHT, HEAVY, CLASSES, K, HIDDEN = 5, 2, 3, 7, 11, 4, 6, 8
SHAPES = {"light": (T, C), "heavy": (T, D), "valid": (T,), "relevant": (T,)}
FIXED = D * D  # of the heavy net, which its gates do not switch


class Light(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(LIGHT)(x), ()


class Heavy(nn.Module):
  gated: bool = True

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(D)(x)
    records = (
      ChannelGate((GatedChannels(HEAVY, D),), GateSettings(hidden=2), name=GATE_NAME)(x, train)
      if self.gated
      else ()
    )
    y = nn.Dense(HEAVY)(x)
    return (y * records[0].gates if records else y), records


def net(selection="gate", context="none", *, light=True, gated=False, **settings):
  gate = SegmentGateSettings(K, context, hidden=HIDDEN)
  return SegmentNet(
    CLASSES, Light() if light else None, Heavy(gated), selection, gate=gate, **settings
  )


@pytest.mark.parametrize(
  ("context", "macs"),
  [
    ("none", 0),
    ("convolution", T * 7 * HIDDEN),
    ("attention", T * 4 * HIDDEN * HIDDEN + 2 * T * T * HIDDEN),
  ],
)
def test_parts_by_hand(context, macs):
  counts = video_summary(net(context=context), SHAPES)
  assert counts.segments == T
  assert (counts.light.macs, counts.heavy.macs) == (C * LIGHT, FIXED + D * HEAVY)
  assert counts.light.params == C * LIGHT + LIGHT
  assert counts.selector == T * (LIGHT * K + K * HIDDEN + HIDDEN * HIDDEN + HIDDEN) + macs
  assert counts.classifier == HEAVY * 512 + 512 * CLASSES
  assert counts.all_segments == T * (FIXED + D * HEAVY) + HEAVY * 512 + 512 * CLASSES


def test_the_light_head_counts_as_selector_and_attention_scores_as_classifier():
  plain = video_summary(net("uniform", light=False), SHAPES)
  assert (plain.light, plain.selector, plain.classifier) == (
    NOTHING,
    0,
    HEAVY * 512 + 512 * CLASSES,
  )
  head = video_summary(net("confidence", pooling="attention"), SHAPES)
  assert (head.selector, head.classifier) == (T * LIGHT * CLASSES, plain.classifier + T * HEAVY)
  both = video_summary(net("gate", light_head=True), SHAPES)
  assert both.selector == video_summary(net("gate"), SHAPES).selector + T * LIGHT * CLASSES
  assert both.classifier == plain.classifier


def test_what_was_spent_on_features_elsewhere_is_each_nets_own():
  plain, with_nets = (
    video_summary(net(), SHAPES, precomputed=macs) for macs in ((0, 0), (1000, 30_000))
  )
  assert with_nets.light.macs == plain.light.macs + 1000
  assert with_nets.all_segments == plain.all_segments + T * 30_000
  assert (with_nets.selector, with_nets.classifier) == (plain.selector, plain.classifier)
  with pytest.warns(DeprecationWarning, match="made_elsewhere is now called precomputed"):
    assert video_summary(net(), SHAPES, made_elsewhere=(1000, 30_000)) == with_nets


def test_channel_gates_do_not_count_as_the_segments_gate():
  gated, plain = (video_summary(net(gated=gated), SHAPES) for gated in (True, False))
  assert (gated.heavy.gated, gated.heavy.gate_macs) == (HEAVY * D, D * 2 + 2 * HEAVY)
  assert (gated.heavy.macs, gated.selector, gated.classifier) == (
    plain.heavy.macs,
    plain.selector,
    plain.classifier,
  )


def test_channel_gates_and_segment_gates_multiply():
  model, rng = net(gated=True), np.random.default_rng(0)
  videos = 6
  valid = np.arange(T) < rng.integers(1, T + 1, videos)[:, None]
  inputs = {
    "light": rng.normal(size=(videos, T, C)),
    "heavy": rng.normal(size=(videos, T, D)),
    "valid": valid,
  }
  (_, records), _ = jax.jit(model.init_with_output)(jax.random.key(0), inputs)
  gates, channels = (np.asarray(record.gates) for record in records)
  channels = rng.integers(0, 2, channels.shape).astype(np.float32)
  counts = video_summary(model, SHAPES)
  heavy_macs = counts.heavy.always_macs + executed_macs((GateRecord(None, None, channels, D),))
  spent = counts.per_video(gates, valid, heavy_macs.reshape(videos, T))
  channels = channels.reshape(videos, T, HEAVY)
  for m in range(videos):
    expected = HEAVY * 512 + 512 * CLASSES
    for t in range(T):
      if valid[m, t]:
        expected += C * LIGHT + LIGHT * K + K * HIDDEN + HIDDEN * HIDDEN + HIDDEN
      if gates[m, t]:
        expected += FIXED + D * 2 + 2 * HEAVY + D * channels[m, t].sum()
    assert spent[m] == pytest.approx(expected)


def test_nothing_open_costs_what_chooses_and_classifies():
  counts = VideoCounts(T, NOTHING, NOTHING, selector=50, classifier=7)
  gates, valid = np.zeros((2, T)), np.array([[True] * T, [True] + [False] * (T - 1)])
  np.testing.assert_allclose(counts.per_video(gates, valid, np.full((2, T), 100.0)), [57, 17])
  gates[0, 1:3], gates[1, 0] = 0.3, 1
  np.testing.assert_allclose(counts.per_video(gates, valid, np.full((2, T), 100.0)), [257, 117])
