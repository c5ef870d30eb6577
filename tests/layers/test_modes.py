"""Layers, and the networks made of them, in every mode of JAX, including initial parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers import segment_gate
from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.conv import ConvNorm, FactorisedConvNorm
from gating_jax.layers.experts import Experts, mixture
from gating_jax.layers.gate import (
  NOISE,
  ChannelGate,
  GatedChannels,
  GateSettings,
  apply_gates,
)
from gating_jax.models import timegate
from gating_jax.models.columns import Adapter
from gating_jax.models.mobilenet import MobileNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import VGG
from tests.helpers.modes import assert_same, computed, every_mode, traced

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(4, 4, 4, 4)).astype(np.float32)
CLIPS = RANDOM.normal(size=(2, 3, 4, 4, 4)).astype(np.float32)
VIDEOS = RANDOM.normal(size=(4, 6, 8)).astype(np.float32)
VALID = np.arange(6) < np.array([6, 4, 5, 1])[:, None]
RELEVANT = np.arange(6) > 2
RNGS = {"params": 0, "gate": 1, "dropout": 2}
GROUPS = (GatedChannels(4, 10), GatedChannels(8, 10, 2))
GATE = GateSettings(hidden=3, noise_scale=np.float64(0.5), temperature=np.float64(0.5))


def passes(module, *inputs, **options):
  """Computes initial variables, evaluation, and training with gradients."""

  def run():
    keys = {name: jax.random.key(seed) for name, seed in RNGS.items()}
    variables = module.init(keys, *inputs, train=False)
    params = variables.get("params", {})
    state = {name: tree for name, tree in variables.items() if name != "params"} | options.get(
      "state", {}
    )

    def loss(params):
      out, state_after = module.apply(
        {"params": params, **state}, *inputs, train=True, mutable=["batch_stats"], rngs=keys
      )
      parts = [jnp.sum(leaf) for leaf in jax.tree.leaves(out) if leaf.dtype == jnp.float32]
      return sum(parts), (out, state_after)

    return (
      variables,
      module.apply(variables, *inputs, train=False),
      jax.value_and_grad(loss, has_aux=True)(params),
    )

  return run


def gate(**settings):
  return passes(ChannelGate(GROUPS, GateSettings(**settings)), IMAGES)


def resnet(**settings):
  return passes(ResNet(3, (1,), features=4, gate=GATE, **settings), IMAGES)


def policy(name, *relevant):
  return passes(segment_gate.Policy(name, 0.5), VALID, *relevant)


class Expert(ConvNorm):
  """One that gives a vector."""

  def __call__(self, x, train):
    return jnp.mean(super().__call__(x, train), axis=(1, 2))


CHANNELS = {
  "pooled": passes(ChannelGate(GROUPS, GATE), IMAGES),
  "a mask": gate(context="none"),
  "a mask, hard concrete": gate(context="none", relaxation="hard_concrete"),
  "random": gate(context="random"),
  "blocks": gate(block=2),
  "hard concrete": gate(relaxation="hard_concrete"),
  "sigmoid": gate(relaxation="sigmoid"),
  "scale": gate(relaxation="scale"),
  "quantile": gate(
    context="grid+moments",
    normalise=np.float64(2),
    threshold="quantile",
    share=np.float64(0.3),
    weighted=True,
    noise_scale=0.0,
  ),
  "prior": gate(prior=True, threshold="quantile", share=0.5, weighted=True, noise_scale=0.0),
  "all experts": lambda: mixture(VIDEOS[0], None),
  "noise": passes(
    ChannelGate(GROUPS, GATE, name="gate"), IMAGES, state={NOISE: {"scale": np.float32(0.5)}}
  ),
}
SEGMENTS = {
  **{
    context: passes(
      segment_gate.SegmentGate(segment_gate.SegmentGateSettings(8, context)), VIDEOS, VALID
    )
    for context in segment_gate.SEGMENT_CONTEXTS
  },
  **{
    relaxation: passes(
      segment_gate.SegmentGate(segment_gate.SegmentGateSettings(8, "none", relaxation)),
      VIDEOS,
      VALID,
    )
    for relaxation in segment_gate.SEGMENT_RELAXATIONS
  },
  **{name: policy(name) for name in ("all", "uniform", "random", "prefix")},
  "oracle": policy("oracle", np.broadcast_to(RELEVANT, VALID.shape)),
  "dropout": passes(timegate.Dropout(0.5), IMAGES),
  **{
    f"pool, {kind}": functools.partial(
      timegate.pool, VIDEOS, VALID.astype(np.float32), kind, VIDEOS[..., 0]
    )
    for kind in timegate.POOLINGS
  },
  "pool, bfloat16": lambda: timegate.pool(
    VIDEOS.astype(jnp.bfloat16), VALID.astype(np.float32), "attention", VIDEOS[..., 0]
  ),
}
BLOCKS = {
  "gates of bfloat16 features": lambda: apply_gates(
    IMAGES.astype(jnp.bfloat16), IMAGES[:, 0, 0, :2] > 0
  ),
  "experts": passes(Experts((Expert(3, 3), Expert(3, 3)), top_k=1), IMAGES),
  "depthwise": passes(ConvNorm(4, 3, depthwise=True), IMAGES),
  "GroupNorm": passes(ConvNorm(4, 3, group_norm=True), IMAGES),
  "clips": passes(ConvNorm(4, 3), CLIPS),
  "factorised": passes(FactorisedConvNorm(4, 3), CLIPS),
  "adapter": lambda: Adapter(0.1).init_with_output(jax.random.key(0), IMAGES),
  "basic": passes(BasicBlock(4, gating="channel"), IMAGES),
  "bottleneck": passes(Bottleneck(1, gating="all_channels"), IMAGES),
  "skipped": passes(BasicBlock(4, gating="layer", group_norm=True, backward_share=0.5), IMAGES),
}
NETS = {
  "ungated": resnet(),
  "channels": resnet(gating="channel"),
  "layers": resnet(gating="layer"),
  "glance": passes(
    ResNet(
      3,
      (1,),
      features=4,
      gating="channel",
      gate=GateSettings(context="glance", threshold="quantile", share=0.5),
    ),
    IMAGES,
  ),
  "biases": passes(ResNet(3, (1,), features=4, gating="bias", sources=2), np.abs(IMAGES) % 1),
  "VGG": passes(VGG(3, (4, "pool", 4), gating="channel"), IMAGES),
  "MobileNet": passes(MobileNet(((2, 4, 1, 1),), stem=4, head=4), IMAGES),
}
ALL = {"channels": CHANNELS, "segments": SEGMENTS, "blocks": BLOCKS, "nets": NETS}


@functools.cache
def usual(of, group):
  return of(ALL[group])


@pytest.mark.thin(4)
@pytest.mark.parametrize("group", ALL)
def test_layers_have_the_same_types_in_every_mode(group):
  without = usual(traced, group)
  with every_mode():
    assert_same(traced(ALL[group]), without)


@pytest.mark.parametrize(
  "group",
  [pytest.param(group, marks=() if group == "channels" else pytest.mark.slow) for group in ALL],
)
def test_layers_have_the_same_values_in_every_mode(group):
  without = usual(computed, group)
  with every_mode():
    assert_same(computed(ALL[group]), without, sized_by_call=True)
