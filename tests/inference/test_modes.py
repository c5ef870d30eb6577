"""Folded, quantised, compiled, early-exit and exported networks in every mode of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import (
  conditional,
  exits,
  export,
  folded,
  folding,
  quantising,
)
from gating_jax.inference.analysing import analyse, prune
from gating_jax.inference.folded import Group
from gating_jax.models.resnet_variants import EarlyExitNet
from tests.helpers import folded_nets, gated_models
from tests.helpers.modes import assert_same, every_mode

EXITS = EarlyExitNet(3, (1, 1), features=4)
STRATEGIES = [(kind, name) for kind, names in folded_nets.KINDS.items() for name in names]


def numbers(tree):
  return jax.tree.map(np.asarray, tree)


def fold(model):
  """Returns the network and its outputs."""
  net = folding.fold(model, gated_models.random_variables(model))
  return net, jax.jit(folded.run_net)(net, gated_models.images())


def small_model(name):
  return lambda: fold(gated_models.MODELS[name])


@jax.jit
def both_ways(net):
  small = quantising.quantise(net)
  return small, quantising.dequantise(small)


def quantised():
  return both_ways(folded_nets.net("chain"))


def with_exits():
  net = exits.fold_exits(EXITS, gated_models.random_variables(EXITS))
  images = gated_models.images()
  return net, exits.make_program()(net, images), exits.make_program(2)(net, images)


def analysed():
  images = folded_nets.images(6)
  analysis = analyse(folded_nets.net("blocks"), None, images)
  small = prune(analysis, multiple=1)
  opened = conditional.opened(analysis.net)
  return (
    dict(analysis.macs),
    small,
    opened,
    [o.opened for o in folded_nets.count_gates(analysis.net, images)],
  )


def compiled(kind, strategy):
  images = folded_nets.images(6)
  run = conditional.compile_conditional(
    folded_nets.net(kind),
    input_shape=folded_nets.SHAPE,
    batch_size=4,
    strategy=strategy,
    calibration=images,
  )
  return run(images)


CALLS = {
  "static gates": small_model("static"),
  "quantised": quantised,
  "analysed": analysed,
  **{
    name: small_model(name)
    for name in (
      "static layers",
      "static vgg",
      "vgg without norm",
      "bottleneck outputs",
      "recipe",
      "weighted outputs",
      "scaled outputs",
      "static weights",
    )
  },
  "exits": with_exits,
  **{f"{kind}, {name}": functools.partial(compiled, kind, name) for kind, name in STRATEGIES},
}
FAST = ("static gates", "quantised", "blocks, switch")


@functools.cache
def usual(name):
  return numbers(CALLS[name]())


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CALLS]
)
def test_networks_of_inference_are_the_same_in_every_mode(name):
  without = usual(name)
  with every_mode():
    assert_same(numbers(CALLS[name]()), without)


def test_weights_that_each_gate_shifts_are_the_same_in_every_mode():
  bias = np.array([1.0, -1.0, 2.0], np.float32)
  logits = (np.array([[0.5, -0.5]], np.float32), np.array([[1.0]], np.float32))
  # Of gates with a prior, the shift is another for each.
  head = folded.Head(bias, bias, bias, bias, (Group(2), Group(1)), shift=jnp.asarray(bias))
  without = numbers(head.gates(logits))
  with every_mode():
    found = numbers(head.gates(logits))
  for gates, wanted in zip(found, without, strict=True):
    np.testing.assert_array_equal(gates, wanted)


def test_parameters_of_float64_are_folded_to_float32():
  model = gated_models.MODELS["static"]
  variables = gated_models.random_variables(model)
  with every_mode():
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    net = folding.fold(model, wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {np.dtype(np.float32)}
    assert_same(numbers(net), numbers(folding.fold(model, variables)))


@pytest.mark.slow
def test_an_export_is_the_same_in_every_mode(tmp_path):
  images = jnp.asarray(folded_nets.images(3))
  net = folded_nets.net("channels")
  export.export_model(net, tmp_path / "usual", input_shape=folded_nets.SHAPE)
  without = numbers(export.load_exported(tmp_path / "usual")(images))
  with every_mode():
    export.export_model(net, tmp_path / "mode", input_shape=folded_nets.SHAPE)
    for name in ("usual", "mode"):
      assert_same(numbers(export.load_exported(tmp_path / name)(images)), without)
