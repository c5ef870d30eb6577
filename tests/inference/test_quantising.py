import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import costs, folded
from gating_jax.inference.folded import Conv, FoldedNet, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.quantising import Int8, dequantise, quantise
from tests.helpers.gated_models import MODELS, SHAPE, images, random_variables

run = jax.jit(folded.run_net)


def test_values_and_scales_by_hand():
  kernel = jnp.array([[1.27, 0.0], [-0.64, 0.0], [0.004, 0.0]]).reshape(1, 1, 3, 2)
  net = quantise(FoldedNet((Layer(Conv(kernel, jnp.array([0.3, 0.7]))),)))
  conv = net.parts[0].conv
  assert conv.kernel.values.dtype == jnp.int8
  assert conv.kernel.values[0, 0].tolist() == [[127, 0], [-64, 0], [0, 0]]
  np.testing.assert_allclose(conv.kernel.scale, [0.01, 1.0], rtol=1e-6)
  assert (conv.kernel.shape, conv.kernel.size) == ((1, 1, 3, 2), 6)
  np.testing.assert_array_equal(conv.bias, np.float32([0.3, 0.7]))
  np.testing.assert_allclose(
    dequantise(net).parts[0].conv.kernel[0, 0, :, 0], [1.27, -0.64, 0.0], rtol=1e-6
  )


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["bottleneck", "vgg"])
def test_no_weight_moves_by_more_than_half_a_step_and_gate_networks_not_at_all(name):
  net = fold(MODELS[name], random_variables(MODELS[name]))
  small = jax.jit(quantise)(net)
  leaf = lambda x: isinstance(x, Int8)
  for before, after in zip(jax.tree.leaves(net), jax.tree.leaves(small, is_leaf=leaf), strict=True):
    if isinstance(after, Int8):
      steps = np.abs(after.values * after.scale - before) / after.scale
      assert 0.01 < steps.max() < 0.501
      assert np.abs(after.values).max(axis=tuple(range(before.ndim - 1))).min() == 127
    else:
      np.testing.assert_array_equal(before, after)
  assert (
    sum(map(leaf, jax.tree.leaves(small, is_leaf=leaf)))
    == sum(
      len(getattr(p, "convs", (1,))) + (getattr(p, "project", None) is not None) for p in net.parts
    )
    + 1
  )
  assert costs.macs(small, SHAPE) == costs.macs(net, SHAPE)
  y, z = run(net, images(3))[0], run(jax.jit(dequantise)(small), images(3))[0]
  assert 0 < np.abs(y - z).max() < 0.2 * np.abs(y).max()


def test_a_glance_and_shifts_keep_their_bits():
  net = fold(MODELS["recipe"], random_variables(MODELS["recipe"]))
  small = quantise(net)
  np.testing.assert_array_equal(small.glance.conv.kernel, net.glance.conv.kernel)
  assert small.parts[1].head.shift == 0
  y, z = run(net, images(3))[0], run(dequantise(small), images(3))[0]
  assert y.shape == z.shape
  assert np.isfinite(z).all()


def test_an_empty_kernel_and_a_net_without_classifier():
  net = quantise(FoldedNet((Layer(Conv(jnp.zeros((1, 1, 0, 2)), jnp.ones(2))),)))
  assert net.classifier is None
  assert dequantise(net).parts[0].conv.kernel.shape == (1, 1, 0, 2)
  with pytest.raises(ValueError, match="net must have float32 kernels, .*; got Int8"):
    quantise(net)
