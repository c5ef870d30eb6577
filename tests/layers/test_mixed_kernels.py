"""Convolutions of several kernels that each example mixes, and networks of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gating_jax.images import build
from gating_jax.inference.folding import check_foldable
from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.conv import MixedConv, MixedConvNorm
from gating_jax.layers.gate import NOISE, GateSettings, KernelWeights, gate_controls
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.training.outlines import Outline
from tests.helpers.modes import every_mode

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(3, 5, 4, 2)), jnp.float32)
NET = ResNet(3, (1,), features=4, gating="kernels", kernels=3, gate=GateSettings(hidden=2))


@pytest.mark.parametrize("dilation", [1, 2])
def test_each_example_is_convolved_with_its_own_mixture(dilation):
  conv = MixedConv(2, features=3, window=(3, 3), stride=(2, 2), dilation=dilation)
  mix = jnp.asarray([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]], jnp.float32)
  variables = conv.init(jax.random.key(0), X, mix)
  kernel = np.asarray(variables["params"]["kernel"])
  # Each kernel begins as that of a convolution, of a fan-in of 18.
  assert kernel.shape == (2, 3, 3, 2, 3)
  assert kernel.std() == pytest.approx(np.sqrt(2 / 18), rel=0.25)
  y = conv.apply(variables, X, mix)
  for n in range(3):
    own = np.tensordot(mix[n], kernel, 1)
    by_hand = jax.lax.conv_general_dilated(
      X[n : n + 1],
      own,
      (2, 2),
      [(dilation, dilation)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(y[n : n + 1], by_hand, atol=1e-5)
    # One image alone takes the mixed kernel.
    np.testing.assert_allclose(
      conv.apply(variables, X[n : n + 1], mix[n : n + 1]), by_hand, atol=1e-5
    )


def test_a_network_mixes_by_its_images_and_counts_what_mixing_costs():
  variables = jax.jit(NET.init)(jax.random.key(0), X)
  y, records = jax.jit(NET.apply)(variables, X)
  assert y.shape == (3, 3)
  assert records == ()
  kernels = [
    variables["params"]["stage1_block1"][name]["conv"]["kernel"].shape
    for name in ("conv1", "conv2")
  ]
  assert kernels == [(3, 3, 3, 4, 4)] * 2
  plain, mixed = (model_summary(net, (5, 4, 2)) for net in (NET.clone(gating="none"), NET))
  # Each convolution has 3 kernels of 144 numbers, each of which costs a MAC.
  assert mixed.params - plain.params == 2 * 2 * 144
  assert mixed.macs - plain.macs == 2 * 3 * 144
  # A gate network of 4 channels, 2 hidden units and weights of 2 x 3 kernels.
  assert (mixed.gate_macs, mixed.gates) == (4 * 2 + 2 * 6, 0)
  with pytest.raises(ValueError, match="gating must be none or that of gates; got 'kernels'"):
    check_foldable(NET)


@pytest.mark.slow
def test_a_high_temperature_mixes_evenly_and_kernels_then_learn_alike():
  variables = jax.jit(NET.init)(jax.random.key(0), X)
  block = variables["params"]["stage1_block1"]
  bias = block["gate"]["head"]["logits"]["bias"]
  block["gate"]["head"]["logits"]["bias"] = bias.at[0].set(9.0)

  def outputs(params, softness):
    controls = gate_controls(params, softness=softness)
    return NET.apply({**variables, "params": params, NOISE: controls}, X)[0]

  @jax.jit
  def slopes(softness):
    """Returns the gradient of each kernel of the first convolution, `[K, numbers]`."""
    params = variables["params"]
    found = jax.grad(lambda params: jnp.sum(outputs(params, softness) ** 2))(params)
    return found["stage1_block1"]["conv1"]["conv"]["kernel"].reshape(3, -1)

  decided, even = (np.linalg.norm(slopes(t), axis=1) for t in (1.0, 1e4))
  assert decided[1:].max() < 0.01 * decided[0]
  np.testing.assert_allclose(even, even[0], rtol=1e-2)


def test_the_config_schedules_the_temperature():
  config = common.apply_variants(common.image_config(), "gates=kernels,batch=64,epochs=4")
  config.model.kernels.count = 2
  data = Outline(examples=128, class_names=tuple("abcdefghij"), shape=(8, 8, 1))
  built = build.build(config, outlines=[data, data])
  assert built.model.kernels == 2
  assert [float(built.softness(step)) for step in (0, 1, 2, 7)] == pytest.approx([30, 15.5, 1, 1])
  plain = common.apply_variants(common.image_config(), "gates=none,batch=64")
  assert build.build(plain, outlines=[data, data]).softness is None
  for fields, message in (
    ({"model.gating": "none"}, "model.kernels.count must be None where model.gating is not 'kern"),
    ({"model.name": "vgg8"}, "model.name must be a residual network where model.gating is 'kern"),
    ({"model.gate.context": "random"}, "model.gate.context must be a sum of parts such as pooled"),
    ({"model.kernels.temperature": 0.5}, "model.kernels.temperature must be None or a number >= 1"),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
      build.build(wrong, outlines=[data, data])


def test_clips_and_convolutions_without_weights_are_refused():
  conv = MixedConvNorm(features=2, window=3)
  for x, mix in ((X, None), (X[None], jnp.ones((1, 4)))):
    with pytest.raises(ValueError, match="mixed kernels need images .* and weights; got shape"):
      conv.init(jax.random.key(0), x, False, mix)
  # Of a bottleneck, the convolution with a window alone.
  for block, mixed in ((BasicBlock, {"conv1", "conv2"}), (Bottleneck, {"conv2"})):
    module = block(features=2, gating="kernels", gate=GateSettings(hidden=2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    found = set()
    for name, layer in shapes.items():
      if "conv" in layer and layer["conv"]["kernel"].ndim == 5:
        found.add(name)
    assert found == mixed


def test_weights_of_kernels_have_one_type_for_a_softness_of_any():
  module = KernelWeights(2, 3, GateSettings(hidden=2))
  variables = jax.eval_shape(module.init, jax.random.key(0), X)

  def weigh(variables, x):
    return module.apply({**variables, NOISE: {"softness": np.float64(2)}}, x)

  with every_mode():
    found = jax.eval_shape(weigh, variables, X)
  assert {(weights.shape, weights.dtype) for weights in found} == {((3, 3), np.dtype(np.float32))}
