import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gating_jax.ops.cpu_convs import (
  convolve_clips,
  convolve_depthwise,
  convolve_doubled,
  convolve_images,
  max_pool,
)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def xla_clips(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
  )


def xla_depthwise(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def values_and_gradients(f, *args):
  """Returns `f(*args)` and the gradients of its product with random cotangents."""

  def both(*args):
    y, pull = jax.vjp(f, *args)
    return y, pull(normal(*y.shape, seed=2))

  return jax.tree.leaves(jax.jit(both)(*args))


def assert_same(ours, theirs, x, kernel, strides, padding):
  sides = [
    values_and_gradients(lambda x, kernel, f=f: f(x, kernel, strides, padding), x, kernel)
    for f in (ours, theirs)
  ]
  for a, b in zip(*sides, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  ("frames", "window", "strides", "padding"),
  [
    (5, (3, 3, 3), (1, 1, 1), ((1, 1),) * 3),
    (6, (3, 3, 3), (2, 2, 2), ((1, 1),) * 3),
    (8, (7, 7, 7), (1, 2, 2), ((3, 3),) * 3),
    (4, (1, 3, 3), (1, 2, 1), ((0, 0), (1, 1), (1, 1))),
    (5, (3, 1, 1), (2, 1, 1), ((1, 1), (0, 0), (0, 0))),
    (1, (3, 3, 3), (1, 1, 1), ((1, 1),) * 3),
    (4, (1, 1, 1), (2, 2, 2), ((0, 0),) * 3),
    (5, (2, 2, 3), (3, 1, 2), ((0, 1), (1, 0), (2, 2))),
  ],
)
def test_clips_are_convolved_as_by_xla(frames, window, strides, padding):
  assert_same(
    convolve_clips,
    xla_clips,
    normal(2, frames, 5, 4, 3),
    normal(*window, 3, 2, seed=1),
    strides,
    padding,
  )


@pytest.mark.parametrize(
  ("window", "strides", "padding"),
  [
    ((3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((5, 2), (1, 3), ((2, 2), (0, 1))),
    ((1, 1), (1, 2), ((0, 0), (0, 0))),
  ],
)
def test_channels_are_convolved_one_by_one_as_by_xla(window, strides, padding):
  assert_same(
    convolve_depthwise,
    xla_depthwise,
    normal(2, 6, 5, 3),
    normal(*window, 1, 3, seed=1),
    strides,
    padding,
  )


@pytest.mark.parametrize(
  ("sizes", "window", "strides", "padding"),
  [
    ((5, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((4, 5, 3), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3),
    ((4, 5, 6), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1))),
    ((5, 1), (2, 3), (2, 2), ((0, 1), (1, 1))),
  ],
)
def test_pooling_is_xlas(sizes, window, strides, padding):
  x = normal(2, *sizes, 3)
  y, gradient = values_and_gradients(lambda x: max_pool(x, window, strides), x)
  expected, expected_gradient = values_and_gradients(
    lambda x: nn.max_pool(x, window, strides, padding), x
  )
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_equal_maxima_share_the_gradient():
  gradient = jax.grad(lambda x: max_pool(x.reshape(1, 3, 1), (3,), (1,))[0, 1, 0])(
    jnp.array([1.0, 0.0, 1.0])
  )
  np.testing.assert_allclose(gradient, [0.5, 0.0, 0.5])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_are_kept(dtype):
  x, kernel = jnp.zeros((1, 2, 4, 4, 3), dtype), jnp.zeros((3, 3, 3, 3, 2), dtype)
  for y in (
    jax.eval_shape(lambda: convolve_clips(x, kernel, (1, 1, 1), ((1, 1),) * 3)),
    jax.eval_shape(
      lambda: convolve_depthwise(x[0], kernel[0, :, :, :1, :1].repeat(3, -1), (1, 1), ((1, 1),) * 2)
    ),
    jax.eval_shape(lambda: max_pool(x, (3, 3, 3), (2, 2, 2))),
  ):
    assert y.dtype == dtype


def xla_images(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@pytest.mark.parametrize(
  ("window", "strides", "padding"),
  [
    ((4, 4), (2, 2), ((1, 1), (1, 1))),
    ((3, 2), (1, 3), ((1, 0), (0, 2))),
    ((1, 1), (1, 1), ((0, 0), (0, 0))),
  ],
)
def test_images_are_convolved_as_by_xla(window, strides, padding):
  assert_same(
    convolve_images, xla_images, normal(2, 6, 8, 3), normal(*window, 3, 5, seed=1), strides, padding
  )


def test_a_doubled_image_is_convolved_as_by_xla():
  doubled = lambda x, kernel, strides, padding: xla_images(
    jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel, strides, padding
  )
  ours = lambda x, kernel, strides, padding: convolve_doubled(x, kernel)
  assert_same(
    ours, doubled, normal(2, 3, 4, 3), normal(3, 3, 3, 5, seed=1), (1, 1), ((1, 1), (1, 1))
  )
