import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.conv import ConvMacs, ConvNorm, FactorisedConvNorm, scaled

XLA = {2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def apply(module, variables, x):
  """Runs in evaluation, with a new trace in every call, since a test may patch the platform."""
  return jax.jit(lambda variables, x: module.apply(variables, x, False))(variables, x)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(module, x):
  """Makes random variables for this input, with norms alive."""
  rng = np.random.default_rng(1)
  draw = {"kernel": lambda shape: rng.normal(0, 0.5, shape)}
  flat = flax.traverse_util.flatten_dict(
    jax.eval_shape(lambda x: module.init(jax.random.key(0), x, False), x)
  )
  other = lambda shape: rng.uniform(0.5, 1.5, shape)
  return flax.traverse_util.unflatten_dict(
    {
      path: jnp.asarray(draw.get(path[-1], other)(leaf.shape), jnp.float32)
      for path, leaf in flat.items()
    }
  )


def by_hand(x, variables, stride, *, groups=1):
  """Convolution and norm, by XLA's own convolution."""
  norm = jax.tree.map(
    np.asarray, {**variables["batch_stats"]["norm"], **variables["params"]["norm"]}
  )
  kernel = variables["params"]["conv"]["kernel"]
  padding = [(w // 2, w // 2) for w in kernel.shape[:-2]]
  x = jax.lax.conv_general_dilated(
    x, kernel, stride, padding, dimension_numbers=XLA[x.ndim - 2], feature_group_count=groups
  )
  x = (np.asarray(x) - norm["mean"]) / np.sqrt(norm["var"] + np.float32(1e-5))
  return x * norm["scale"] + norm["bias"]


def part(variables, name):
  return {kind: tree[name] for kind, tree in variables.items()}


@pytest.mark.parametrize(
  ("shape", "window", "stride", "kernel"),
  [
    ((2, 5, 6, 3), 3, 2, (3, 3, 3, 4)),
    ((2, 4, 5, 6, 3), 3, 2, (3, 3, 3, 3, 4)),
    ((2, 4, 5, 6, 3), (3, 5, 5), (1, 2, 2), (3, 5, 5, 3, 4)),
  ],
)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_images_and_clips_are_convolved_the_same_on_every_platform(
  monkeypatch, shape, window, stride, kernel, backend
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  module, x = ConvNorm(4, window, stride), normal(*shape)
  variables = filled(module, x)
  assert variables["params"]["conv"]["kernel"].shape == kernel
  stride = (stride,) * (x.ndim - 2) if isinstance(stride, int) else stride
  np.testing.assert_allclose(
    apply(module, variables, x), by_hand(x, variables, stride), rtol=1e-4, atol=1e-5
  )


def test_the_platform_chooses_the_form_of_clip_convolutions_alone(monkeypatch):
  def ranks(x, **settings):
    module = ConvNorm(3, 3, **settings)
    program = jax.make_jaxpr(lambda v, x: module.apply(v, x, False))(filled(module, x), x)
    return [
      len(e.outvars[0].aval.shape)
      for e in program.eqns
      if e.primitive.name == "conv_general_dilated"
    ]

  image, clip = normal(1, 4, 4, 3), normal(1, 2, 4, 4, 3)
  assert (ranks(image), ranks(clip), ranks(image, depthwise=True)) == ([4], [4], [])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert (ranks(image), ranks(clip), ranks(image, depthwise=True)) == ([4], [5], [4])


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_depthwise_convolution_has_a_window_per_channel(monkeypatch, backend):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  module, x = ConvNorm(3, 3, 2, depthwise=True), normal(2, 5, 6, 3)
  variables = filled(module, x)
  assert variables["params"]["conv"]["kernel"].shape == (3, 3, 1, 3)
  expected = by_hand(x, variables, (2, 2), groups=3)
  np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-4, atol=1e-5)


def test_factorised_is_space_then_relu_then_time():
  module, x = FactorisedConvNorm(4, 3, 2), normal(2, 5, 6, 4, 3)
  variables = filled(module, x)
  space, time = part(variables, "space"), part(variables, "time")
  h = by_hand(x, space, (1, 2, 2))
  assert (h < -0.1).any()
  expected = by_hand(jnp.maximum(h, 0), time, (2, 1, 1))
  np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("inputs", "features", "window", "middle"),
  [
    (64, 64, 3, 144),  # 3 * 9 * 64 * 64 / (9 * 64 + 3 * 64)
    (64, 128, 3, 230),  # 221184 / 960 = 230.4
    (3, 64, (3, 7, 7), 83),  # 28224 / 339 = 83.3
    (3, 64, (1, 7, 7), 44),  # 9408 / 211 = 44.6
    (1, 1, 3, 2),  # 27 / 12 = 2.25
  ],
)
def test_the_width_between_space_and_time_matches_the_parameters_of_the_whole(
  inputs, features, window, middle
):
  t, h, w = (window,) * 3 if isinstance(window, int) else window
  x = jax.ShapeDtypeStruct((1, 2, 2, 2, inputs), jnp.float32)
  params = filled(FactorisedConvNorm(features, window), x)["params"]
  space, time = params["space"]["conv"]["kernel"], params["time"]["conv"]["kernel"]
  assert space.shape == (1, h, w, inputs, middle)
  assert time.shape == (t, 1, 1, middle, features)
  whole = t * h * w * inputs * features
  assert whole - (h * w * inputs + t * features) < space.size + time.size <= whole


def test_macs_by_hand():
  assert ConvNorm(7, 3, 2).macs((9, 5, 6, 4)) == ConvMacs(0, 0, 9 * 3 * 3)
  assert ConvNorm(7, (3, 1, 5), (1, 2, 2)).macs((9, 8, 5, 6, 4)) == ConvMacs(0, 0, 15 * 8 * 3 * 3)
  assert ConvNorm(4, 3, 2, depthwise=True).macs((9, 5, 6, 4)) == ConvMacs(9 * 3 * 3, 0, 0)
  # 27 * 4 * 6 / (9 * 4 + 3 * 6) = 12 channels between; space keeps 8 frames, time 4.
  assert FactorisedConvNorm(6, 3, 2).macs((9, 8, 5, 6, 4)) == ConvMacs(
    9 * 8 * 9 * 12, 3 * 4 * 9 * 12, 0
  )


def test_a_factorised_convolution_of_images_is_refused():
  message = r"^a factorised convolution needs clips \[N, F, H, W, D\]; got shape \(1, 4, 4, 3\)"
  with pytest.raises(ValueError, match=message):
    FactorisedConvNorm(2, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), False)


@pytest.mark.parametrize(
  ("shape", "stride", "message"),
  [
    ((1, 4, 3), 1, r"x must be \[N, H, W, D\] or \[N, F, H, W, D\]; got shape \(1, 4, 3\)"),
    ((1, 4, 4, 3), (1, 2, 2), r"stride must be .* one for each of 2 axes; got \(1, 2, 2\)"),
  ],
)
def test_inputs_and_strides_that_do_not_fit_are_named(shape, stride, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    ConvNorm(2, 3, stride).init(jax.random.key(0), jnp.zeros(shape), False)


def test_scaled_channels():
  assert [scaled(16, w) for w in (1.0, 0.25, 1.41, 0.01)] == [16, 4, 23, 1]


@pytest.mark.parametrize("depthwise", [False, True])
def test_taps_of_a_dilated_window_are_pixels_apart(depthwise):
  """The result is that of a kernel dilated by hand, with zeros between its taps."""
  x = normal(2, 9, 7, 4)
  module = ConvNorm(4, 3, 1, depthwise=depthwise, dilation=3)
  variables = filled(module, x)
  kernel = variables["params"]["conv"]["kernel"]
  spread = jnp.zeros((7, 7, *kernel.shape[2:]), kernel.dtype).at[::3, ::3].set(kernel)
  wide = {**variables, "params": {**variables["params"], "conv": {"kernel": spread}}}
  expected = by_hand(x, wide, (1, 1), groups=4 if depthwise else 1)
  assert expected.shape == x.shape
  np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("features", "group"), [(32, 16), (10, 2), (3, 1)])
@pytest.mark.parametrize("conv", [ConvNorm, FactorisedConvNorm])
def test_group_norm_normalises_each_example_by_itself(conv, features, group):
  x = np.random.default_rng(0).normal(size=(3, 4, 5, 6, 2)).astype(np.float32)
  module = conv(features, 3, group_norm=True)
  init, apply = (jax.jit(f, static_argnums=2) for f in (module.init, module.apply))
  variables = init(jax.random.key(0), x, True)
  assert set(variables) == {"params"}
  y = np.asarray(apply(variables, x, True))
  groups = y.reshape(3, -1, features // group, group)
  np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(groups.var((1, 3)), 1, atol=1e-3)
  np.testing.assert_allclose(apply(variables, x[1:2], True)[0], y[1], atol=1e-5)
