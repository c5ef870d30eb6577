"""Small gated models of every kind that `fold` accepts, with every unit alive."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.layers.blocks import Bottleneck
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import VGG

SHAPE = (9, 8, 3)
GATE = GateSettings(hidden=3)
STATIC = GateSettings(context="none", relaxation="hard_concrete")
WEIGHTED = dataclasses.replace(GATE, weighted=True)
# Normalised to small logits, of which the weights differ.
RECIPE = GateSettings(
  hidden=3,
  noise_scale=0.0,
  context="glance+pooled",
  normalise=0.25,
  threshold="quantile",
  share=0.5,
  weighted=True,
)
MAPS = dataclasses.replace(RECIPE, context="moments+grid")
HARD = dataclasses.replace(RECIPE, context="grid+glance+moments", weighted=False)
SCALES = GateSettings(hidden=3, context="glance+pooled", relaxation="scale")
STATIC_WEIGHTS = GateSettings(
  context="none", noise_scale=0.0, threshold="quantile", share=0.5, weighted=True
)
MODELS = {
  "basic": ResNet(3, (2, 1), features=4, gating="channel", gate=GATE),
  "ungated": ResNet(3, (1, 1), features=4),
  "wide inside": ResNet(3, (1, 1), features=3, inner_width=2.0, gating="channel", gate=GATE),
  "blocks": ResNet(3, (1, 1), features=4, gating="channel", gate=GateSettings(hidden=3, block=2)),
  "layer": ResNet(3, (2, 2), features=4, gating="layer", gate=GATE),
  "bottleneck": ResNet(
    3, (1, 2), Bottleneck, features=4, gating="channel", gate=GATE, shortcut="B", stem="imagenet"
  ),
  "dilated": ResNet(
    None, (1, 1, 1), features=3, gating="channel", gate=GATE, shortcut="B", output_stride=2
  ),
  "feature map": ResNet(None, (1, 2), features=4, pool=False, gating="channel", gate=GATE),
  "outputs": ResNet(None, (2, 1), features=4, gating="all_channels", gate=GATE, shortcut="B"),
  "bottleneck outputs": ResNet(
    3, (1, 1), Bottleneck, features=2, gating="all_channels", gate=GATE, shortcut="B"
  ),
  "static": ResNet(3, (2, 1), features=4, gating="channel", gate=STATIC),
  "static layers": ResNet(3, (3,), features=4, gating="layer", gate=STATIC),
  "vgg": VGG(3, (4, "pool", 6, 6, "pool"), gating="channel", gate=GATE),
  "vgg without norm": VGG(3, (4, "pool", 6), norm=False, gating="channel", gate=GATE),
  "static vgg": VGG(3, (4, "pool", 6), gating="channel", gate=STATIC),
  "recipe": ResNet(3, (2, 1), features=4, gating="channel", gate=RECIPE),
  "weighted layers": ResNet(3, (2, 2), features=4, gating="layer", gate=WEIGHTED),
  "weighted outputs": ResNet(
    None, (2, 1), features=4, gating="all_channels", gate=MAPS, shortcut="B"
  ),
  "thresholds": ResNet(
    3, (1, 2), Bottleneck, features=4, gating="channel", gate=HARD, shortcut="B"
  ),
  "weighted vgg": VGG(
    3,
    (4, "pool", 6, 6, "pool"),
    gating="channel",
    gate=dataclasses.replace(RECIPE, context="moments+glance+grid"),
  ),
  "scales": ResNet(3, (2, 1), features=4, gating="channel", gate=SCALES),
  "scaled outputs": ResNet(
    3, (1, 1), Bottleneck, features=2, gating="all_channels", gate=SCALES, shortcut="B"
  ),
  "scaled layers": ResNet(3, (2, 1), features=4, gating="layer", gate=SCALES),
  "scaled vgg": VGG(3, (4, "pool", 6), gating="channel", gate=SCALES),
  "static weights": ResNet(3, (2, 1), features=4, gating="channel", gate=STATIC_WEIGHTS),
  "static weighted layers": ResNet(3, (3,), features=4, gating="layer", gate=STATIC_WEIGHTS),
}


def images(count=5, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(
    rng.normal(0, 1, (count, *SHAPE)) + rng.normal(0, 1, (count, 1, 1, 3)), jnp.float32
  )


def random_variables(model, seed=1):
  """Makes variables for which every unit matters, with gates of either kind."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[-1] == "kernel":
      return rng.normal(0, 3.0 if "gate" in path else 0.3, leaf.shape)
    if path[-1] in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape)
    if path[-1] == "logits":
      return rng.normal(0, 3.0, leaf.shape)
    return rng.normal(0, 0.3, leaf.shape)

  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images(1)))
  return flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(fill(path, leaf), jnp.float32) for path, leaf in shapes.items()}
  )
