"""ResNets on clips of frames; `test_resnets.py` has the images."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.blocks import Bottleneck
from gating_jax.models.resnets import ResNet, resnet
from gating_jax.models.summary import model_summary
from gating_jax.ops.macs import executed_macs

OPEN = 1e4
TINY = {
  "whole": dict(blocks=(1, 1), features=3, stem="small"),
  "factorised": dict(blocks=(1, 1), features=3, stem="clip", convolution="factorised"),
  "bottleneck": dict(blocks=(1,), features=2, block=Bottleneck, shortcut="B", stem="imagenet"),
}
tiny = pytest.mark.parametrize("settings", TINY.values(), ids=TINY)

apply = jax.jit(lambda net, variables, x: net.apply(variables, x), static_argnums=0)


def clips(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def traced(net, shape):
  """Returns output, records and variables as shapes only."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  (y, records), variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  return y, records, flax.traverse_util.flatten_dict(variables)


def filled(net, shape):
  """Makes random parameters and statistics by path, with every unit alive."""
  rng = np.random.default_rng(1)

  def fill(path, leaf):
    values = (
      rng.normal(0, 0.3, leaf.shape) if path[-1] == "kernel" else rng.uniform(0.5, 1.0, leaf.shape)
    )
    return jnp.asarray(values, jnp.float32)

  return {path: fill(path, leaf) for path, leaf in traced(net, shape)[2].items()}


def with_all_logits(flat, logit):
  fixed = {"kernel": 0.0, "bias": logit}
  return {
    path: jnp.full_like(leaf, fixed[path[-1]]) if path[-2] == "logits" else leaf
    for path, leaf in flat.items()
  }


def nested(flat):
  return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.thin(3)
@tiny
def test_with_all_gates_open_the_gated_net_is_the_ungated_one_and_costs_the_same(settings):
  gated, plain = (ResNet(3, gating=gating, **settings) for gating in ("channel", "none"))
  x = clips(2, 3, 9, 8, 2)
  flat = filled(gated, x.shape)
  expected, no_records = apply(
    plain, nested({path: leaf for path, leaf in flat.items() if "gate" not in path}), x
  )
  assert no_records == ()
  closed, closed_records = apply(gated, nested(with_all_logits(flat, -OPEN)), x)
  assert np.abs(np.asarray(closed - expected)).max() > 0.01
  y, records = apply(gated, nested(with_all_logits(flat, OPEN)), x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  sizes = model_summary(gated, x.shape[1:])
  assert sizes.macs == model_summary(plain, x.shape[1:]).macs
  assert 0 < sizes.gated < sizes.macs
  np.testing.assert_array_equal(executed_macs(records), sizes.gated)
  np.testing.assert_array_equal(executed_macs(closed_records), 0)


# Parameters with 400 classes from torchvision's documentation of r3d_18; its MACs for 16 frames of
# 112 x 112 are 40.70 billion. Hara's variant by hand: a stem of 7 frames, and no projections.
R3D_18 = 33_371_472
PROJECTIONS = 64 * 128 + 128 * 256 + 256 * 512 + 2 * (128 + 256 + 512)


def test_published_sizes():
  clip = (16, 112, 112, 3)
  tran = model_summary(resnet("resnet18", 400, stem="clip"), clip)
  assert tran.params == R3D_18
  assert round(tran.macs / 1e9, 2) == 40.70
  hara = model_summary(resnet("resnet18", 400, shortcut="A"), clip)
  assert hara.params == R3D_18 - PROJECTIONS + 4 * 49 * 3 * 64 == 33_235_280
  factorised = model_summary(resnet("resnet18", 400, stem="clip", convolution="factorised"), clip)
  # Every width between is rounded down; 17 of them, each with a norm.
  assert abs(factorised.params - R3D_18) < 0.001 * R3D_18


def test_a_frame_is_convolved_with_the_middle_of_every_window():
  """A clip of one frame sees zero padding before and after, so only the middle tap counts."""
  settings = dict(blocks=(1, 1), features=3, stem="cifar")
  images, videos = ResNet(4, **settings), ResNet(4, **settings)
  x = clips(2, 6, 5, 2)
  flat = filled(videos, (2, 1, 6, 5, 2))
  middle = {path: leaf[1] if leaf.ndim == 5 else leaf for path, leaf in flat.items()}
  expected, _ = apply(images, nested(middle), x)
  np.testing.assert_allclose(
    apply(videos, nested(flat), x[:, None])[0], expected, rtol=1e-4, atol=1e-5
  )


def test_without_classes_the_answer_is_what_the_classifier_sees():
  settings = TINY["whole"]
  headless, headed = ResNet(None, **settings), ResNet(4, **settings)
  for shape in ((2, 3, 8, 8, 2), (2, 8, 8, 2)):
    x = clips(*shape)
    flat = filled(headed, shape)
    head = {path: flat.pop(path) for path in list(flat) if "classifier" in path}
    features, _ = apply(headless, nested(flat), x)
    assert features.shape == (2, 6)
    expected = (
      features @ head["params", "classifier", "kernel"] + head["params", "classifier", "bias"]
    )
    np.testing.assert_allclose(
      apply(headed, nested(flat | head), x)[0], expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
  ("stem", "kernel", "places"),
  [
    ("cifar", (3, 3, 3), (8, 16, 14)),
    ("small", (3, 3, 3), (8, 8, 7)),
    ("clip", (3, 7, 7), (8, 8, 7)),
    ("imagenet", (7, 7, 7), (4, 4, 4)),
  ],
)
def test_each_stem_has_its_window_and_leaves_so_many_places(stem, kernel, places):
  """`places` reaches the only block, a Bottleneck whose first record shows the number of places."""
  for axes in (3, 2):
    net = ResNet(
      4, blocks=(1,), features=2, block=Bottleneck, shortcut="B", gating="channel", stem=stem
    )
    _, records, flat = traced(net, (1, *(8, 16, 14)[-axes:], 1))
    assert flat["params", "stem", "conv", "kernel"].shape == (*kernel[-axes:], 1, 2)
    assert records[0].macs_per_unit == 2 * np.prod(places[-axes:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_features_and_parameters_stay_long(dtype):
  net = ResNet(None, dtype=dtype, gating="channel", **TINY["factorised"])
  y, records, flat = traced(net, (2, 4, 8, 8, 1))
  assert {leaf.dtype for leaf in [y, *jax.tree.leaves(records), *flat.values()]} == {
    jnp.dtype(jnp.float32)
  }


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: traced(resnet("resnet20", 10, convolution="whole"), (1, 2, 8, 8, 3)),
      "convolution must be one of factorised, full; got 'whole'",
    ),
    (
      lambda: traced(resnet("resnet20", 10, convolution="factorised"), (1, 8, 8, 3)),
      r"a factorised convolution needs clips \[N, F, H, W, D\]; got shape \(1, 8, 8, 3\)",
    ),
    (
      lambda: traced(resnet("resnet20", 10), (1, 2, 2, 8, 8, 3)),
      r"images must be \[N, H, W, D\], or clips \[N, F, H, W, D\]; got shape \(1, 2, 2, 8, 8, 3\)",
    ),
  ],
)
def test_bad_settings_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
