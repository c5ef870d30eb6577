import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import RESNETS, ResNet, resnet

OPEN = 1e4
apply = jax.jit(lambda net, variables, x: net.apply(variables, x), static_argnums=0)

TINY = {
  "basic": dict(blocks=(1, 1), features=3),
  "bottleneck": dict(blocks=(1, 1), features=2, block=Bottleneck, shortcut="B", stem="imagenet"),
}
tiny = pytest.mark.parametrize("settings", TINY.values(), ids=TINY)


def image(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def traced(net, shape, dtype=jnp.float32):
  """Returns output, records and variables as shapes only."""
  x = jax.ShapeDtypeStruct(shape, dtype)
  (y, records), variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  return y, records, variables


def filled(variables):
  """Makes random parameters and statistics by numpy, since compiling `init` takes seconds."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    if path[-1] == "kernel":
      return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
    return jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), jnp.float32)

  flat = flax.traverse_util.flatten_dict(variables)
  return flax.traverse_util.unflatten_dict({path: fill(path, leaf) for path, leaf in flat.items()})


def with_all_logits(variables, logit):
  flat = flax.traverse_util.flatten_dict(variables)
  for path in flat:
    if path[-2:] == ("logits", "kernel"):
      flat[path] = flat[path] * 0
    if path[-2:] == ("logits", "bias"):
      flat[path] = flat[path] * 0 + logit
  return flax.traverse_util.unflatten_dict(flat)


def shared_with_ungated(variables):
  flat = flax.traverse_util.flatten_dict(variables)
  return flax.traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if "gate" not in path}
  )


@tiny
def test_with_all_gates_open_the_gated_net_is_the_ungated_one(settings):
  gated, plain = (ResNet(classes=3, gating=gating, **settings) for gating in ("channel", "none"))
  x = image(2, 9, 8, 3)
  _, _, shapes = traced(gated, x.shape)
  variables = filled(shapes)
  ungated = shared_with_ungated(variables)
  assert jax.tree.structure(ungated) == jax.tree.structure(traced(plain, x.shape)[2])
  expected, no_records = apply(plain, ungated, x)
  assert no_records == ()
  closed, _ = apply(gated, with_all_logits(variables, -OPEN), x)
  assert np.abs(np.asarray(closed - expected)).max() > 0.05
  y, records = apply(gated, with_all_logits(variables, OPEN), x)
  assert len(records) == 2 * (2 if "block" in settings else 1)
  assert all(np.all(r.gates == 1) for r in records)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_without_blocks_a_net_is_stem_pool_and_classifier():
  net = ResNet(classes=3, blocks=(), features=2)
  x = image(2, 4, 4, 1)
  variables = filled(traced(net, x.shape)[2])
  p, statistics = variables["params"], variables["batch_stats"]["stem"]["norm"]
  stem = jax.lax.conv_general_dilated(
    x, p["stem"]["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  norm = p["stem"]["norm"]
  h = (stem - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * norm["scale"] + norm["bias"]
  expected = np.maximum(h, 0).mean((1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
  np.testing.assert_allclose(apply(net, variables, x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RESNETS)
def test_a_net_has_as_many_layers_as_its_name_says(name):
  net = resnet(name, classes=10)
  convolutions = {BasicBlock: 2, Bottleneck: 3}[net.block] * sum(net.blocks)
  assert 1 + convolutions + 1 == int(name.removeprefix("resnet"))
  assert (net.stem, net.shortcut) == (("imagenet", "B") if len(net.blocks) == 4 else ("cifar", "A"))


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("name", "size", "gates"),
  [
    ("resnet44", 32, 7 * (16 + 32 + 64)),
    ("resnet110", 32, 18 * (16 + 32 + 64)),
    ("resnet101", 64, 2 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512)),
  ],
)
def test_deep_nets_build(name, size, gates):
  y, records, _ = traced(resnet(name, classes=7, gating="channel"), (1, size, size, 3))
  assert y.shape == (1, 7)
  assert sum(r.gates.shape[-1] for r in records) == gates


@pytest.mark.parametrize(
  ("width", "channels"),
  [
    (0.25, [4, 8, 16]),
    (1.0, [16, 32, 64]),
    (1.41, [23, 45, 90]),
    (4, [64, 128, 256]),
    (0.01, [1, 1, 1]),
  ],
)
def test_width_multiplies_every_channel_count(width, channels):
  net = resnet("resnet20", 10, gating="channel", width=width, blocks=(1, 1, 1))
  _, records, variables = traced(net, (1, 8, 8, 3))
  assert [r.gates.shape[-1] for r in records] == channels
  assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, channels[0])
  assert variables["params"]["classifier"]["kernel"].shape == (channels[2], 10)


@pytest.mark.parametrize("shape", [(2, 31, 29, 3), (1, 28, 28, 1), (3, 1, 1, 2)])
@tiny
def test_any_image_size_and_number_of_channels(settings, shape):
  y, records, variables = traced(ResNet(classes=5, gating="channel", **settings), shape)
  assert y.shape == (shape[0], 5)
  assert {r.gates.shape[0] for r in records} == {shape[0]}
  assert variables["params"]["stem"]["conv"]["kernel"].shape[2] == shape[-1]


def test_an_odd_image_goes_through():
  net = ResNet(classes=4, gating="channel", **TINY["basic"])
  x = image(3, 7, 5, 1)
  y, records = apply(net, filled(traced(net, x.shape)[2]), x)
  assert y.shape == (3, 4)
  assert np.isfinite(y).all()
  assert len(np.unique(np.asarray(y), axis=0)) == 3


def test_bfloat16_computes_short_and_keeps_parameters_gates_and_logits_long():
  x = image(2, 8, 8, 3)
  long, short = (
    ResNet(classes=4, gating="channel", dtype=dtype, **TINY["basic"])
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  y, records, variables = traced(short, x.shape)
  assert {leaf.dtype for leaf in jax.tree.leaves((y, records, variables))} == {
    jnp.dtype(jnp.float32)
  }
  variables = with_all_logits(filled(variables), OPEN)
  expected, got = (np.asarray(apply(net, variables, x)[0]) for net in (long, short))
  gap = np.abs(got - expected).max() / np.abs(expected).max()
  assert 1e-5 < gap < 0.05


@pytest.mark.parametrize(
  ("settings", "convolutions"), [(TINY["basic"], 1 + 4), (TINY["bottleneck"], 1 + 6 + 2)]
)
def test_the_dtype_reaches_every_convolution(settings, convolutions):
  for dtype, short in ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
    net = ResNet(classes=4, gating="channel", dtype=dtype, **settings)
    x, variables = jnp.zeros((1, 8, 8, 3)), traced(net, (1, 8, 8, 3))[2]
    text = str(jax.make_jaxpr(net.apply)(variables, x))
    types = re.findall(r":(\w+)\[[^\]]*\] = conv_general_dilated", text)
    assert types == [short] * convolutions


def test_settings_reach_every_gate():
  settings = GateSettings(hidden=5, initial_open=0.6)
  net = ResNet(classes=2, gating="channel", gate=settings, **TINY["basic"])
  variables = jax.jit(net.init)(jax.random.key(0, impl="unsafe_rbg"), jnp.zeros((1, 4, 4, 3)))
  for stage in ("stage1_block1", "stage2_block1"):
    head = variables["params"][stage]["gate"]["head"]
    assert head["hidden"]["kernel"].shape[1] == 5
    np.testing.assert_allclose(head["logits"]["bias"], np.log(0.6 / 0.4), rtol=1e-6)


def test_shortcut_b_in_a_cifar_net_projects_at_every_new_stage():
  _, _, a = traced(resnet("resnet20", 10, blocks=(1, 1, 1)), (1, 8, 8, 3))
  _, _, b = traced(resnet("resnet20", 10, blocks=(1, 1, 1), shortcut="B"), (1, 8, 8, 3))
  new = set(flax.traverse_util.flatten_dict(b["params"])) - set(
    flax.traverse_util.flatten_dict(a["params"])
  )
  assert {path[:2] for path in new} == {("stage2_block1", "project"), ("stage3_block1", "project")}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: resnet("ResNet-50", 10),
      r"model name must be one of .*; got 'ResNet-50'\. Did you mean 'resnet50'\?$",
    ),
    (
      lambda: resnet("resnt110", 10),
      r"model name must be one of .*; got 'resnt110'\. Did you mean 'resnet110'\?$",
    ),
    (lambda: resnet("vgg", 10), "model name must be one of .*; got 'vgg'$"),
    (lambda: resnet("resnet20", 10, width=0), "width must be > 0; got 0$"),
    (lambda: resnet("resnet20", 10, width=-1.5), "width must be > 0; got -1.5$"),
    (
      lambda: traced(resnet("resnet20", 10, stem="cifr"), (1, 8, 8, 3)),
      "stem must .*'cifr'. Did you mean 'cifar'",
    ),
    (
      lambda: traced(resnet("resnet20", 10, gating="channels"), (1, 8, 8, 3)),
      "gating must .* Did you mean 'channel'",
    ),
    (
      lambda: traced(resnet("resnet20", 10, shortcut="a"), (1, 8, 8, 3)),
      "shortcut must be one of A, B; got 'a'",
    ),
    (
      lambda: traced(resnet("resnet20", 10), (8, 8, 3)),
      r"images must be \[N, H, W, D\], or clips .*; got shape \(8, 8, 3\)",
    ),
  ],
)
def test_bad_settings_are_named_with_what_may_have_been_meant(make, message):
  with pytest.raises(ValueError, match=message):
    make()
