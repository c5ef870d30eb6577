"""Shared parts of the training tests: a net, images and an objective that compile fast.

There are also ways to compare trees.
"""

import jax
import numpy as np
import optax

from gating_jax.data import augment
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.ops.priors import beta
from gating_jax.training import steps
from gating_jax.training.objectives import ImageObjective

CLASSES, SHAPE = 3, (6, 6, 1)


def net(gating="channel", axis_name=None):
  return ResNet(
    classes=CLASSES,
    blocks=(1,),
    features=4,
    gating=gating,
    gate=GateSettings(hidden=4, initial_open=0.6),
    axis_name=axis_name,
  )


def images(count, seed=0):
  """Makes noise whose brightness differs from image to image, so that pooled features do too."""
  random = np.random.default_rng(seed)
  pixels = random.integers(0, 256, (count, *SHAPE)) * random.uniform(0, 1, (count, 1, 1, 1))
  return pixels.astype(np.uint8), random.integers(0, CLASSES, count).astype(np.int32)


def objective(gamma=0.75, rho=0.5, sparsity="l0", reduction="layer_mean"):
  return ImageObjective(
    prior=beta(0.6, 0.4),
    reduction=reduction,
    sparsity=sparsity,
    target=0.5,
    never_gated_macs=100,
    batch_shaping_coefficient=optax.constant_schedule(gamma),
    sparsity_coefficient=optax.constant_schedule(rho),
  )


def normalise(pixels):
  return augment.normalise(pixels, (0.5,), (0.5,))


def prepare(key, pixels):
  return normalise(pixels)


def state(optimiser, gating="channel", seed=0):
  return steps.init_state(net(gating), optimiser, seed, SHAPE)


def train_step(optimiser, *, gating="channel", axis_name=None, seed=0, objective=objective()):  # noqa: B008
  return steps.make_train_step(
    net(gating, axis_name), optimiser, objective, prepare, seed=seed, axis_name=axis_name
  )


def relative_gap(tree, other):
  """Returns the norm of the difference over the norm of `other`, over all arrays together."""
  tree, other = jax.device_get((tree, other))
  difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, tree, other)
  return float(optax.tree.norm(difference)) / float(optax.tree.norm(other))


def bit_equal(tree, other):
  tree, other = jax.device_get((tree, other))
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  return all(
    np.array_equal(a, b, equal_nan=a.dtype.kind == "f") and a.dtype == b.dtype
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  )
