"""Convolution and normalisation for images and clips, whole or factorised into space and time.

Axes: N examples, F frames, H and W pixels, channels last.
Reference: Tran et al., "A closer look at spatiotemporal convolutions for action recognition", 2018,
  section 3; Wu and He, "Group normalization", 2018; Yang et al., "CondConv", 2019, and Chen et al.,
  "Dynamic convolution", 2020 (mixed kernels).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.ops import arguments
from gating_jax.ops.cpu_convs import convolve_clips, convolve_depthwise
from gating_jax.ops.macs import ConvMacs, factorised_conv, plain_conv
from gating_jax.types import Array, Path

# Channels of a group, at most: Wu and He, 2018, table 3.
_GROUP = 16


def check_maps(x: Array) -> None:
  """Raises a TypeError or a ValueError unless x holds feature maps of images or clips."""
  arguments.real_array("x", x)
  if jnp.ndim(x) not in (4, 5):
    raise ValueError(f"x must be [N, H, W, D] or [N, F, H, W, D]; got shape {jnp.shape(x)}")


class ConvNorm(nn.Module):
  """A convolution without bias and with symmetric padding, then a normalisation.

  `[N, H, W, D]` to `[N, H', W', features]`, or the same with frames, `[N, F, H, W, D]`.

  Attributes:
    features: output channels.
    window: size, one number for every axis between the first and the last, or one per axis.
    stride: likewise.
    dtype: type in which it computes.
    axis_name: mapped device axis over which BatchNorm takes its statistics.
    depthwise: for images only: every channel has its own window, and `features` is the number
      of input channels.
    norm: False for a bias in place of the normalisation.
    dilation: distance of the window's taps, in pixels.
    group_norm: whether GroupNorm, which treats every example alone, replaces BatchNorm.
  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> conv, x = ConvNorm(features=8, window=3, stride=2), jnp.zeros((1, 16, 16, 3))
  >>> y, _ = jax.eval_shape(lambda: conv.init_with_output(jax.random.key(0), x, train=False))
  >>> y.shape
  (1, 8, 8, 8)
  """

  features: int
  window: int | Sequence[int]
  stride: int | Sequence[int] = 1
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  depthwise: bool = False
  norm: bool = True
  dilation: int = 1
  group_norm: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    check_maps(x)
    arguments.whole_number("features", self.features)
    arguments.whole_number("dilation", self.dilation)
    window = _per_axis("window", self.window, x.ndim - 2)
    stride = _per_axis("stride", self.stride, x.ndim - 2)
    x = nn.Conv(
      self.features,
      window,
      stride,
      # Same size as the input at stride 1, for odd windows.
      padding=[(w // 2 * self.dilation, w // 2 * self.dilation) for w in window],
      kernel_dilation=self.dilation,
      feature_group_count=self.features if self.depthwise else 1,
      use_bias=not self.norm,
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      # The forms for CPUs have no dilation.
      conv_general_dilated=None if self.dilation > 1 else _quickest(len(window), self.depthwise),
      name="conv",
    )(x)
    return self._normalised(x, train)

  def _normalised(self, x: Array, train: bool) -> Array:
    """Returns the convolution's output, normalised where that is asked for."""
    if not self.norm:
      return x
    if self.group_norm:
      # Groups must divide the channels, which need not be a multiple of 16.
      group = math.gcd(_GROUP, self.features)
      return nn.GroupNorm(num_groups=None, group_size=group, dtype=self.dtype, name="norm")(x)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="norm",
    )(x)

  @property
  def writer(self) -> Path:
    """Returns the path of the convolution that makes the output channels, as in `GateRecord`."""
    return (*self.path, "conv")

  # One convolution takes the input channels and makes the output channels.
  reader = writer

  def output_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the output for an input of this shape."""
    return _output_shape(x_shape, self.stride, self.features)

  def macs(self, x_shape: Sequence[int]) -> ConvMacs:
    """Returns the MACs of this convolution's channels on an input of this shape."""
    window = _per_axis("window", self.window, len(x_shape) - 2)
    return plain_conv(window, self.output_shape(x_shape), depthwise=self.depthwise)


class MixedConv(nn.Module):
  """A convolution of images whose kernel is another for each example: a mixture of K kernels.

      W_n = sum over k of pi_nk W_k,   y_n = W_n * x_n

  `[N, H, W, D]` images and `[N, K]` weights pi to `[N, H', W', features]`. One example is a single
  convolution with its mixed kernel. Of several, the outputs of all kernels are mixed, which is the
  same up to rounding, and computes K times as much.

  Attributes:
    kernels: K.
    features, window, stride, dilation, dtype: as in `ConvNorm`, with sizes of both axes.

  >>> conv, x = MixedConv(2, features=3, window=(3, 3), stride=(1, 1)), jnp.ones((2, 4, 4, 1))
  >>> pi = jnp.array([[1.0, 0.0], [0.5, 0.5]])
  >>> y, _ = jax.eval_shape(lambda: conv.init_with_output(jax.random.key(0), x, pi))
  >>> y.shape
  (2, 4, 4, 3)
  """

  kernels: int
  features: int
  window: tuple[int, int]
  stride: tuple[int, int]
  dilation: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mix: Array) -> Array:
    shape = (self.kernels, *self.window, x.shape[-1], self.features)
    # Each kernel on its own begins as that of a convolution.
    init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal", batch_axis=(0,))
    kernel = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
    mix = mix.astype(self.dtype)
    if x.shape[0] == 1:
      return self._convolve(x, jnp.einsum("k,khwdo->hwdo", mix[0], kernel))
    # One convolution has the outputs of all kernels, next to each other.
    wide = jnp.moveaxis(kernel, 0, -2).reshape(*shape[1:-1], self.kernels * self.features)
    y = self._convolve(x, wide)
    each = y.reshape(*y.shape[:-1], self.kernels, self.features)
    return jnp.einsum("nhwko,nk->nhwo", each, mix)

  def _convolve(self, x: Array, kernel: Array) -> Array:
    """Convolves with symmetric padding, `[N, H, W, D]` to `[N, H', W', O]`."""
    padding = []
    for size in self.window:
      padding.append((size // 2 * self.dilation, size // 2 * self.dilation))
    return lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel,
      self.stride,
      padding,
      rhs_dilation=(self.dilation, self.dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class MixedConvNorm(ConvNorm):
  """A `ConvNorm` of images whose convolution is a `MixedConv`; its last argument are the weights.

  Attributes:
    kernels: K.
  Raises:
    TypeError, ValueError: as `ConvNorm`; or clips, whose windows are not mixed.
  """

  kernels: int = 4

  @nn.compact
  def __call__(self, x: Array, train: bool, mix: Array | None = None) -> Array:
    check_maps(x)
    arguments.whole_number("features", self.features)
    arguments.whole_number("kernels", self.kernels)
    if x.ndim != 4 or mix is None:
      raise ValueError(f"mixed kernels need images [N, H, W, D] and weights; got shape {x.shape}")
    height, width = _per_axis("window", self.window, 2)
    down, right = _per_axis("stride", self.stride, 2)
    conv = MixedConv(
      kernels=self.kernels,
      features=self.features,
      window=(height, width),
      stride=(down, right),
      dilation=self.dilation,
      dtype=self.dtype,
      name="conv",
    )
    return self._normalised(conv(x, mix), train)


class FactorisedConvNorm(nn.Module):
  """A (2+1)-D convolution: a `ConvNorm` over space, ReLU, and a `ConvNorm` over time.

  `[N, F, H, W, D]` only. It has about as many parameters as the 3-D convolution: the width between
  the two, for a window of t frames of a pixels, is

      M = floor(t a D features / (a D + t features))

  Fields are as in `ConvNorm`.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> conv, x = FactorisedConvNorm(features=6, window=3), jnp.zeros((1, 4, 8, 8, 3))
  >>> y, _ = jax.eval_shape(lambda: conv.init_with_output(jax.random.key(0), x, train=False))
  >>> y.shape
  (1, 4, 8, 8, 6)
  """

  features: int
  window: int | Sequence[int]
  stride: int | Sequence[int] = 1
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  group_norm: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    check_maps(x)
    arguments.whole_number("features", self.features)
    if x.ndim != 5:
      raise ValueError(f"a factorised convolution needs clips [N, F, H, W, D]; got shape {x.shape}")
    space, time = self._parts(x.shape[-1])
    return time(nn.relu(space(x, train)), train)

  @property
  def writer(self) -> Path:
    """Returns the path of the convolution that makes the output channels."""
    return (*self.path, "time", "conv")

  @property
  def reader(self) -> Path:
    """Returns the path of the convolution that takes the input channels."""
    return (*self.path, "space", "conv")

  def output_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the output for an input of this shape."""
    return _output_shape(x_shape, self.stride, self.features)

  def macs(self, x_shape: Sequence[int]) -> ConvMacs:
    """Returns the MACs of this convolution's channels on an input of this shape."""
    t, *pixels = _per_axis("window", self.window, 3)
    examples, frames = x_shape[:2]
    output_shape, middle = self.output_shape(x_shape), self._middle(x_shape[-1])
    # The spatial convolution has no stride in time: it runs on every frame.
    space = plain_conv((1, *pixels), (examples, frames, *output_shape[2:4], middle))
    return factorised_conv(space, plain_conv((t, 1, 1), output_shape), middle)

  def _parts(self, inputs: int) -> tuple[ConvNorm, ConvNorm]:
    window, stride = _per_axis("window", self.window, 3), _per_axis("stride", self.stride, 3)
    part = functools.partial(
      ConvNorm, dtype=self.dtype, axis_name=self.axis_name, group_norm=self.group_norm
    )
    middle = self._middle(inputs)
    space = part(middle, (1, *window[1:]), (1, *stride[1:]), name="space")
    time = part(self.features, (window[0], 1, 1), (stride[0], 1, 1), name="time")
    return space, time

  def _middle(self, inputs: int) -> int:
    """Returns M of the equation; tiny layers keep at least one channel."""
    t, *pixels = _per_axis("window", self.window, 3)
    a = math.prod(pixels)
    return max(1, t * a * inputs * self.features // (a * inputs + t * self.features))


CONVOLUTIONS = {"full": ConvNorm, "factorised": FactorisedConvNorm}


def scaled(channels: int, width: float) -> int:
  """Returns `channels` times `width`, rounded to the nearest integer, at least 1."""
  return max(1, round(channels * width))


def _output_shape(
  x_shape: Sequence[int], stride: int | Sequence[int], features: int
) -> tuple[int, ...]:
  """Returns the shape after a convolution with symmetric padding and odd windows."""
  n, *sizes, _ = x_shape
  strides = _per_axis("stride", stride, len(sizes))
  places = [-(-size // s) for size, s in zip(sizes, strides, strict=True)]
  return (n, *places, features)


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
  """Returns one size per axis; a single number holds for all of them."""
  sizes = tuple(value) if isinstance(value, Sequence) else (value,) * axes
  for size in sizes:
    arguments.whole_number(name, size)
  if len(sizes) != axes:
    raise ValueError(f"{name} must be a whole number, or one for each of {axes} axes; got {value}")
  return sizes


def _quickest(axes: int, depthwise: bool) -> Callable | None:
  """Returns the function with which `nn.Conv` convolves; None for XLA's convolution."""
  # On a CPU, XLA is quick for plain 2-D convolutions only.
  if jax.default_backend() != "cpu" or (axes == 2 and not depthwise):
    return None
  convolve = convolve_depthwise if depthwise else convolve_clips

  def convolve_without_options(x, kernel, strides, padding, **defaults):
    """Convolves, and ignores options of XLA's convolution that have their default."""
    return convolve(x, kernel, strides, padding)

  return convolve_without_options
