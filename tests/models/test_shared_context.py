"""What networks compute once for all their gates: a glance, and the sources they are told."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import Bottleneck
from gating_jax.layers.experts import Experts
from gating_jax.layers.gate import GATE_RNG, GateSettings, is_gate_path
from gating_jax.layers.segment_gate import SegmentGateSettings
from gating_jax.models.generator import Generator
from gating_jax.models.resnet_variants import ExpertNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.segmenter import Segmenter
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import POOL, VGG

RECIPE = GateSettings(
  hidden=4,
  context="glance+pooled",
  normalise=2.0,
  threshold="quantile",
  share=0.4,
  weighted=True,
  noise_scale=0.0,
)
BASIC = ResNet(3, (1, 1), features=4, gating="channel", gate=RECIPE)
BACKBONE = dataclasses.replace(BASIC, classes=None, pool=False, output_stride=2)
NETS = {
  "basic": (BASIC, (9, 8, 3)),
  "all channels": (dataclasses.replace(BASIC, gating="all_channels"), (8, 8, 3)),
  "layers": (dataclasses.replace(BASIC, blocks=(2, 1), gating="layer"), (8, 8, 3)),
  "bottleneck": (dataclasses.replace(BASIC, block=Bottleneck, shortcut="B"), (8, 8, 3)),
  "clips": (BASIC, (2, 8, 8, 3)),
  "chain": (VGG(3, (4, POOL, 6), gating="channel", gate=RECIPE), (9, 8, 3)),
  "segmenter": (Segmenter(BACKBONE, classes=3, features=8), (8, 8, 3)),
}


def images(shape, count=6, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)


def traced(net, shape):
  x = jax.ShapeDtypeStruct((6, *shape), jnp.float32)
  keys = {"params": jax.random.key(0), GATE_RNG: jax.random.key(1)}
  return jax.eval_shape(lambda x: net.init_with_output(keys, x, train=True), x)


def paths(variables):
  return {"/".join(path[:-1]) for path in flax.traverse_util.flatten_dict(variables["params"])}


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", NETS)
def test_every_network_takes_one_glance_for_all_of_its_gates(kind):
  net, shape = NETS[kind]
  (_, records), variables = traced(net, shape)
  glances = [path for path in paths(variables) if "glance" in path]
  assert len({path.partition("glance")[0] for path in glances}) == 1
  assert len(records) > 0
  counts = model_summary(net, shape)
  depth = shape[-1]
  # The glance's convolution has 4 x 4 places, and belongs to the gates.
  backbone = net.backbone if kind == "segmenter" else net
  pooled = dataclasses.replace(backbone, gate=dataclasses.replace(RECIPE, context="pooled"))
  pooled = net.clone(backbone=pooled) if kind == "segmenter" else pooled
  without = model_summary(pooled, shape)
  gates = len({record.gate for record in records})
  assert counts.macs == without.macs
  assert counts.gate_macs - without.gate_macs == 16 * 9 * depth * 8 + gates * 8 * 4


def test_two_nets_that_differ_in_what_they_glance_at_open_other_gates():
  x = images((8, 8, 3))
  net = dataclasses.replace(BASIC, gate=dataclasses.replace(RECIPE, context="glance"))
  keys = {"params": jax.random.key(0), GATE_RNG: jax.random.key(1)}
  variables = jax.jit(net.init)(keys, x)
  flat = flax.traverse_util.flatten_dict(variables)
  for path in flat:
    if path[1:2] == ("glance",) and path[-1] == "kernel":
      assert is_gate_path(path)
      flat[path] = -flat[path]
  run = jax.jit(lambda v: net.apply(v, x, train=True, rngs=keys, mutable=["batch_stats"])[0])
  (_, records), (_, others) = run(variables), run(flax.traverse_util.unflatten_dict(flat))
  for record, other in zip(records, others, strict=True):
    assert np.sum(record.gates > 0) == round(0.4 * record.gates.size)
    assert np.any((record.gates > 0) != (other.gates > 0))


@pytest.mark.parametrize("kind", ["channel", "all_channels"])
def test_a_network_with_scales_is_ungated_and_its_scales_cost(kind):
  gate = GateSettings(hidden=4, relaxation="scale", context="glance")
  scaled = dataclasses.replace(BASIC, gating=kind, gate=gate)
  (_, records), _ = traced(scaled, (8, 8, 3))
  plain = model_summary(dataclasses.replace(BASIC, gating="none"), (8, 8, 3))
  counts = model_summary(scaled, (8, 8, 3))
  assert records == ()
  assert (counts.macs, counts.gates, counts.gated) == (plain.macs, 0, 0)
  assert counts.gate_macs > 0
  chain = VGG(3, (4, POOL, 6), gating="channel", gate=gate)
  assert traced(chain, (8, 8, 3))[0][1] == ()


def told(net, shape=(8, 8, 3), count=6):
  """Returns outputs on images that differ in nothing but their source."""
  pixels = jnp.broadcast_to(images(shape, 1), (count, *shape))
  source = jnp.arange(count, dtype=jnp.float32) % 3
  x = jnp.concatenate([pixels, jnp.broadcast_to(source[:, None, None, None], (count, 8, 8, 1))], -1)
  variables = jax.jit(lambda x: net.init({"params": jax.random.key(0)}, x))(x)
  return jax.jit(net.apply)(variables, x), variables


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  "net",
  [
    dataclasses.replace(BASIC, gating="bias", sources=3),
    dataclasses.replace(BASIC, sources=3, gate=GateSettings(context="assigned", share=0.5)),
    dataclasses.replace(BASIC, sources=3, gate=GateSettings(context="told+pooled")),
  ],
  ids=["bias", "assigned", "told"],
)
def test_a_network_that_is_told_its_sources_may_differ_between_them_alone(net):
  (y, _), variables = told(net)
  np.testing.assert_array_equal(y[:3], y[3:])
  if net.gate.context != "told+pooled":
    assert len(np.unique(np.asarray(y), axis=0)) == 3
  # The number of the source is no channel of the image.
  assert variables["params"]["stem"]["conv"]["kernel"].shape[2] == 3


def test_the_source_survives_zeros_that_crops_and_cutting_out_put_in_its_place():
  net = dataclasses.replace(BASIC, gating="bias", sources=3)
  _, variables = told(net)
  whole = np.broadcast_to(np.arange(3, dtype=np.float32)[:, None, None, None], (3, 8, 8, 1))
  cropped = np.where(np.arange(8)[:, None, None] < 4, np.float32(0), whole)
  pixels, run = images((8, 8, 3), 3), jax.jit(net.apply)
  outputs = [
    run(variables, jnp.concatenate([pixels, number], -1))[0] for number in (whole, cropped)
  ]
  np.testing.assert_array_equal(*outputs)


def test_a_network_takes_off_a_source_that_nothing_reads():
  (y, _), _ = told(dataclasses.replace(BASIC, gating="none", sources=3))
  np.testing.assert_array_equal(y, np.broadcast_to(y[:1], y.shape))


@pytest.mark.parametrize(
  ("net", "shape", "message"),
  [
    (
      dataclasses.replace(BASIC, gate=GateSettings(context="told")),
      (8, 8, 3),
      "gate context 'told' needs a network with sources; got sources 0",
    ),
    (
      dataclasses.replace(BASIC, gating="bias"),
      (8, 8, 3),
      "gate context 'told' needs a network with sources; got sources 0",
    ),
    (
      ExpertNet(3, (1, 1), features=4, experts=2, gate=GateSettings(context="glance")),
      (8, 8, 3),
      "gate context must be pooled in a mixture of experts; got 'glance'",
    ),
  ],
  ids=["told", "bias", "experts"],
)
def test_a_network_without_what_its_gates_ask_for_is_refused(net, shape, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    traced(net, shape)


def test_a_generator_has_no_image_to_glance_at():
  gate = GateSettings(context="glance")
  net = Generator((8, 8, 1), classes=3, latent=4, width=2, gating="channel", gate=gate)
  with pytest.raises(ValueError, match="^gate context 'glance' must be computed by the network"):
    jax.eval_shape(lambda z: net.init(jax.random.key(0), z, jnp.zeros(2, int)), jnp.zeros((2, 4)))


def test_segments_have_no_quantiles():
  with (
    pytest.warns(DeprecationWarning, match="gate is now given by its fields"),
    pytest.raises(ValueError, match="^gate normalise of segments must be 0.0; got 2.0"),
  ):
    SegmentGateSettings(gate=GateSettings(normalise=2.0))


def test_experts_take_settings_of_gates_that_read_nothing():
  assert Experts((), gate=GateSettings(context="none")).gate.parts == ()
