import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.models.video_backbones import (
  HEAVY_NETS,
  I3D,
  LIGHT_NETS,
  InceptionModule,
  InflatedInception,
  heavy_net,
  light_net,
)
from tests.helpers.filled_nets import filled, normal

FRAMES, CLIPS = (3, 16, 15, 1), (2, 8, 16, 15, 1)


def traced(net, shape):
  """Returns features, records and variables as shapes only."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  (y, records), variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  return y, records, variables


def products(net, shape):
  """Returns the MACs per example of every convolution and matrix product in the traced program."""
  x = jnp.zeros((1, *shape))
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  program = jax.make_jaxpr(net.apply)(variables, x)
  total = 0
  for equation in program.eqns:
    assert not any("jaxpr" in name for name in equation.params) or equation.primitive.name in (
      "jit",
      "custom_jvp_call",
    )
    if equation.primitive.name == "conv_general_dilated":
      kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
      order = equation.params["dimension_numbers"].rhs_spec
      total += math.prod(kernel) // kernel[order[0]] * math.prod(out)
  return total


@pytest.mark.parametrize("name", sorted(set(LIGHT_NETS) - {"features"}))
def test_light_nets_give_features_of_frames(name):
  net = light_net(name, width=0.25, dtype=jnp.bfloat16, axis_name="devices")
  assert (net.width, net.dtype, net.axis_name) == (0.25, jnp.bfloat16, "devices")
  y, records, _ = traced(light_net(name, width=0.25, dtype=jnp.bfloat16), FRAMES)
  assert (y.shape[0], y.ndim, y.dtype, records) == (3, 2, jnp.float32, ())


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", sorted(set(HEAVY_NETS) - {"features", "i3d"}))
def test_heavy_nets_give_features_of_clips(name):
  net = heavy_net(name, width=0.125, dtype=jnp.bfloat16, axis_name="devices", stem="small")
  assert (net.width, net.dtype, net.axis_name, net.stem) == (
    0.125,
    jnp.bfloat16,
    "devices",
    "small",
  )
  y, records, _ = traced(heavy_net(name, width=0.125, dtype=jnp.bfloat16), CLIPS)
  assert (y.shape[0], y.ndim, y.dtype, records) == (2, 2, jnp.float32, ())


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("name", "layers"),
  [
    ("resnet3d10", 10),
    ("resnet3d18", 18),
    ("resnet3d34", 34),
    ("resnet3d50", 50),
    ("resnet3d101", 101),
    ("r2plus1d10", 10),
    ("r2plus1d18", 18),
  ],
)
def test_a_net_has_as_many_layers_as_its_name_says_and_all_its_gates(name, layers):
  net = heavy_net(name, width=1 / 16, gating="channel", gate=GateSettings(hidden=3))
  _, records, variables = traced(net, CLIPS)
  per_block = 2 if layers < 50 else 3
  assert 2 + per_block * sum(net.blocks) == layers
  assert len(records) == (per_block - 1) * sum(net.blocks)
  assert variables["params"]["stage1_block1"]["gate"]["head"]["hidden"]["kernel"].shape == (4, 3)
  assert ("space" in variables["params"]["stem"]) == name.startswith("r2plus1d")


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("net", "shape"),
  [
    (light_net("mobilenet_small", width=0.5), (16, 15, 1)),
    (light_net("mobilenet", width=0.25), (32, 33, 3)),
    (light_net("resnet8", width=0.5), (16, 15, 1)),
    (heavy_net("resnet3d10", width=0.125), (8, 16, 15, 1)),
    (heavy_net("resnet3d50", width=0.125, stem="small"), (3, 9, 8, 2)),
    (heavy_net("r2plus1d10", width=0.125), (8, 16, 15, 1)),
    (heavy_net("i3d_small", width=0.125, stem="imagenet"), (8, 32, 32, 1)),
    (heavy_net("i3d_small", width=0.125), (8, 16, 15, 1)),
  ],
  ids=lambda value: type(value).__name__,
)
def test_macs_are_those_of_the_traced_program(monkeypatch, net, shape):
  assert model_summary(net, shape).macs > 1000
  on_cpu = model_summary(net, shape)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert model_summary(net, shape) == on_cpu
  assert products(net, shape) == on_cpu.macs


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (2, 3, 5, 6, 4)])
def test_features_are_averaged_over_all_axes_between(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float16)
  for net in (
    light_net("features"),
    heavy_net("features", gate=GateSettings(hidden=3), dtype=jnp.bfloat16),
  ):
    assert net.init(jax.random.key(0), x) == {}
    y, records = net.apply({}, x, train=True)
    assert (y.dtype, records) == (jnp.float32, ())
    np.testing.assert_allclose(
      y, x.astype(np.float64).reshape(shape[0], -1, 4).mean(1), rtol=1e-5, atol=1e-6
    )
  assert model_summary(light_net("features"), shape[1:]).params == 0


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: light_net("mobilnet"),
      "^light net must be one of .*; got 'mobilnet'. Did you mean 'mobilenet'",
    ),
    (
      lambda: heavy_net("resnet18"),
      "^heavy net must be one of .*; got 'resnet18'. Did you mean 'resnet3d18'",
    ),
    (lambda: light_net("resnet8", width=0), "^width must be > 0; got 0$"),
    (
      lambda: light_net("features", width=0.5),
      "^width of light net 'features' must be left at 1; got 0.5$",
    ),
    (
      lambda: heavy_net("features", stem="small"),
      "^stem of heavy net 'features' must be left at None; got 'small'$",
    ),
    (
      lambda: heavy_net("i3d", gating="channel"),
      "^gating of heavy net 'i3d' must be left at 'none'; got 'channel'$",
    ),
    (
      lambda: traced(light_net("features"), (3,)),
      r"features must be \[N, ..., C\]; got shape \(3,\)",
    ),
  ],
)
def test_bad_settings_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


TINY = (((2, 2, 3, 1, 2, 2),), ((3, 2, 2, 2, 3, 2),))


@pytest.mark.slow
def test_published_sizes_of_inception_nets():
  """torchvision's GoogLeNet has the same modules for images; its classifier is subtracted.

  I3D's table follows from it by hand.
  """
  net = InflatedInception()
  images = model_summary(net, (224, 224, 3)).params
  assert images == 6_624_904 - (1024 * 1000 + 1000)
  windows = sum(m[1] * m[2] + m[3] * m[4] for stage in I3D for m in stage) + 64 * 192
  assert model_summary(net, (16, 32, 32, 3)).params == images + 9 * 2 * windows + 49 * 6 * 3 * 64


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (2, 3, 4, 5, 3)])
def test_a_module_is_four_branches_side_by_side(shape):
  x = normal(*shape)
  module = InceptionModule((2, 2, 3, 1, 2, 4))
  variables = filled(module, shape, deviation=0.3)

  def conv(x, name):
    p, statistics = variables["params"][name], variables["batch_stats"][name]["norm"]
    letters = "DHW"[-(x.ndim - 2) :]
    x = jax.lax.conv_general_dilated(
      x,
      p["conv"]["kernel"],
      (1,) * len(letters),
      "SAME",
      dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    return np.maximum(x * p["norm"]["scale"] + p["norm"]["bias"], 0)

  pooled = np.full(shape, -np.inf)
  for place in np.ndindex(*shape[1:-1]):
    around = tuple(slice(max(i - 1, 0), i + 2) for i in place)
    pooled[:, *place] = np.asarray(x[:, *around]).max(tuple(range(1, len(shape) - 1)))
  expected = [
    conv(x, "branch1"),
    conv(conv(x, "branch2_reduce"), "branch2"),
    conv(conv(x, "branch3_reduce"), "branch3"),
    conv(pooled.astype(np.float32), "branch4"),
  ]
  assert [e.shape[-1] for e in expected] == [2, 3, 2, 4]
  y = jax.jit(module.apply)(variables, x)
  np.testing.assert_allclose(y, np.concatenate(expected, -1), rtol=1e-4, atol=1e-5)


def places(net, shape):
  """Returns the output size of the last module of each stage, without channels."""

  def run(x):
    return net.init_with_output(jax.random.key(0), x, capture_intermediates=True, mutable=True)[1]

  seen = jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))["intermediates"]
  return [seen[f"stage{i + 1}_module1"]["__call__"][0].shape[1:-1] for i in range(len(net.stages))]


def test_resolutions_of_inception_nets():
  assert places(InflatedInception(TINY), (1, 16, 64, 48, 3)) == [(8, 8, 6), (4, 4, 3)]
  assert places(InflatedInception(TINY, stem="small"), (1, 8, 16, 15, 1)) == [(8, 8, 8), (4, 4, 4)]
  assert places(InflatedInception(TINY, stem="small"), (1, 16, 15, 1)) == [(8, 8), (4, 4)]
  assert places(InflatedInception(TINY), (1, 1, 1, 1, 2)) == [(1, 1, 1), (1, 1, 1)]


def test_width_multiplies_every_channel_count():
  y, _ = jax.eval_shape(
    lambda x: InflatedInception(TINY, width=2).init_with_output(jax.random.key(0), x)[0],
    jnp.zeros((1, 4, 8, 8, 1)),
  )
  assert y.shape == (1, 2 * (3 + 2 + 3 + 2))
  sizes = model_summary(InflatedInception(TINY, width=0.001), (4, 8, 8, 1))
  # Three convolutions and twelve of modules, all with one channel out; modules have four out.
  assert (
    sizes.params == (343 + 1 + 27) + (1 + 1 + 27 + 1 + 27 + 1) + (4 + 4 + 27 + 4 + 27 + 4) + 15 * 2
  )


def inflate(images, clips):
  """Returns variables of a net for images as those of its twin for clips: each tap has 1/T."""
  widen = lambda image, clip: (
    image if image.shape == clip.shape else jnp.broadcast_to(image / clip.shape[0], clip.shape)
  )
  return jax.tree.map(widen, images, clips)


def centre(net, variables, x, name):
  """Returns the output of module `name` at the middle frame of a clip."""
  _, seen = jax.jit(
    lambda v, x: net.apply(v, x, capture_intermediates=True, mutable=["intermediates"])
  )(variables, x)
  y = seen["intermediates"][name]["__call__"][0]
  y = y[0] if isinstance(y, tuple) else y
  return y if x.ndim == 4 else y[:, y.shape[1] // 2]


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  ("net", "frames", "name"),
  [
    (InflatedInception(TINY, width=0.5), 64, "stage2_module1"),
    (ResNet(None, blocks=(1, 1), features=2), 25, "stage2_block1"),
  ],
  ids=["i3d", "resnet"],
)
def test_an_inflated_net_sees_a_still_clip_as_its_frame(net, frames, name):
  x = normal(2, 8, 8, 1)
  still = jnp.repeat(x[:, None], frames, axis=1)
  images = filled(net, x.shape, deviation=0.3)
  clips = inflate(images, jax.eval_shape(net.init, jax.random.key(0), still))
  assert clips["params"]["stem1" if "module" in name else "stem"]["conv"]["kernel"].ndim == 5
  expected = centre(net, images, x, name)
  assert np.asarray(expected).std() > 1e-2
  np.testing.assert_allclose(centre(net, clips, still, name), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("make", "shape", "message"),
  [
    (
      lambda: InflatedInception(TINY, stem="smal"),
      (1, 2, 8, 8, 1),
      "stem must .* got 'smal'. Did you mean 'small'",
    ),
    (
      lambda: InflatedInception(TINY),
      (8, 8, 1),
      r"clips must be \[N, F, H, W, D\].*; got shape \(8, 8, 1\)",
    ),
  ],
)
def test_bad_settings_of_inception_nets_are_named(make, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(make().init, jax.random.key(0), jnp.zeros(shape))
