import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.models.mobilenet import InvertedResidual, MobileNet
from gating_jax.models.summary import model_summary
from tests.helpers.filled_nets import filled, normal

TINY = dict(stages=((1, 4, 1, 1), (3, 6, 2, 2)), stem=4, stem_stride=1, head=5)


def test_published_sizes():
  """torchvision's documentation of mobilenet_v2, without its classifier."""
  sizes = model_summary(MobileNet(), (224, 224, 3))
  assert sizes.params == 3_504_872 - (1280 * 1000 + 1000)
  assert sizes.macs == 300_774_272 - 1280 * 1000
  assert (sizes.gates, sizes.gate_params, sizes.gated) == (0, 0, 0)


@pytest.mark.parametrize(
  ("stride", "features", "expansion", "joined"),
  [(1, 3, 2, True), (2, 3, 2, False), (1, 4, 2, False), (1, 3, 1, True)],
)
def test_an_inverted_residual_by_xlas_convolutions(stride, features, expansion, joined):
  x = normal(2, 5, 4, 3)
  block = InvertedResidual(features, expansion, stride)
  variables = filled(block, x.shape, deviation=0.5)
  assert ("expand" in variables["params"]) == (expansion > 1)

  def conv(x, name, stride=1, groups=1):
    p, statistics = variables["params"][name], variables["batch_stats"][name]["norm"]
    padding = [(w // 2, w // 2) for w in p["conv"]["kernel"].shape[:2]]
    x = jax.lax.conv_general_dilated(
      x,
      p["conv"]["kernel"],
      (stride, stride),
      padding,
      feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * p["norm"]["scale"] + p[
      "norm"
    ]["bias"]

  relu6 = lambda x: np.clip(x, 0, 6)
  h = relu6(conv(x, "expand")) if expansion > 1 else x
  h = conv(relu6(conv(h, "depthwise", stride, groups=h.shape[-1])), "project")
  expected = x + h if joined else h
  np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_features_are_the_mean_over_the_last_map():
  x = normal(3, 8, 7, 2)
  net = MobileNet(**TINY)
  variables = filled(net, x.shape, deviation=0.5)
  run = jax.jit(lambda v, x: net.apply(v, x, capture_intermediates=True, mutable=["intermediates"]))
  (y, records), seen = run(variables, x)
  last = seen["intermediates"]["head"]["__call__"][0]
  assert last.shape == (3, 4, 4, 5)
  assert seen["intermediates"]["stage1_block1"]["__call__"][0].shape == (3, 8, 7, 4)
  assert records == ()
  assert np.asarray(y).std(0).max() > 0.1
  np.testing.assert_allclose(y, np.clip(last, 0, 6).mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("width", "stem", "features"), [(1.0, 4, 5), (2, 8, 10), (0.5, 2, 2), (0.01, 1, 1)]
)
def test_width_multiplies_every_channel_count(width, stem, features):
  net = MobileNet(width=width, dtype=jnp.bfloat16, **TINY)
  (y, _), variables = jax.eval_shape(
    lambda x: net.init_with_output(jax.random.key(0), x), jnp.zeros((1, 1, 1, 3))
  )
  assert (y.shape, y.dtype) == ((1, features), jnp.float32)
  assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, stem)


def test_clips_are_refused():
  with pytest.raises(
    ValueError, match=r"images must be \[N, H, W, D\]; got shape \(1, 2, 8, 8, 3\)"
  ):
    jax.eval_shape(MobileNet(**TINY).init, jax.random.key(0), jnp.zeros((1, 2, 8, 8, 3)))
