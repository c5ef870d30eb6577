import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.gate import GateSettings
from gating_jax.models.summary import model_summary
from gating_jax.models.video_backbones import HEAVY_NETS, LIGHT_NETS, heavy_net, light_net

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
