"""Convolution and normalisation, for images and for clips of frames, whole or factorised into space and time.

Axes: N examples, F frames, H and W pixels, channels last.
Reference: Tran et al., "A closer look at spatiotemporal convolutions for action recognition", 2018, section 3;
Wu and He, "Group normalization", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.ops import arguments
from gating_jax.ops.cpu_convs import convolve_clips, convolve_depthwise
from gating_jax.types import Array, Path

_GROUP = 16  # channels, at most: Wu and He, 2018, table 3


def check_maps(x: Array) -> None:
  """Raises a TypeError or a ValueError unless x are feature maps of images or clips."""
  arguments.real_array("x", x)
  if jnp.ndim(x) not in (4, 5):
    raise ValueError(f"x must be [N, H, W, D] or [N, F, H, W, D]; got shape {jnp.shape(x)}")


class ConvMacs(NamedTuple):
  """MACs per example of i input and o output channels: `i * per_input + o * per_output + i * o * per_pair`."""

  per_input: int
  per_output: int
  per_pair: int


class ConvNorm(nn.Module):
  """Convolution without bias, symmetric padding, then BatchNorm with statistics over all devices; or, with
  `norm=False`, a bias in its place; or, with `group_norm`, GroupNorm, of every example by itself.

  `[N, H, W, D]` or `[N, F, H, W, D]`; `window` and `stride` are one number for every axis between, or one per axis.
  A `depthwise` one, of images only, gives every channel a window of its own, and leaves their number. The taps of the
  window lie `dilation` pixels apart.
  """

  features: int
  window: int | Sequence[int]
  stride: int | Sequence[int] = 1
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None
  depthwise: bool = False
  norm: bool = True
  dilation: int = 1
  group_norm: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    check_maps(x)
    arguments.whole_number("features", self.features)
    arguments.whole_number("dilation", self.dilation)
    window, stride = (
      _per_axis("window", self.window, x.ndim - 2),
      _per_axis("stride", self.stride, x.ndim - 2),
    )
    x = nn.Conv(
      self.features,
      window,
      stride,
      padding=[(w // 2 * self.dilation,) * 2 for w in window],
      kernel_dilation=self.dilation,
      feature_group_count=self.features if self.depthwise else 1,
      use_bias=not self.norm,
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      conv_general_dilated=None if self.dilation > 1 else _quickest(len(window), self.depthwise),
      name="conv",
    )(x)
    if not self.norm:
      return x
    if self.group_norm:
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
    """The convolution that makes the output channels, as `GateRecord.writers` names it."""
    return (*self.path, "conv")

  reader = writer

  def macs(self, x_shape: Sequence[int]) -> ConvMacs:
    """Of one channel's worth of this convolution on an input of this shape."""
    axes = len(x_shape) - 2
    window, stride = _per_axis("window", self.window, axes), _per_axis("stride", self.stride, axes)
    outputs = math.prod(-(-size // s) for size, s in zip(x_shape[1:-1], stride, strict=True))
    macs = math.prod(window) * outputs
    return ConvMacs(macs, 0, 0) if self.depthwise else ConvMacs(0, 0, macs)


class FactorisedConvNorm(nn.Module):
  """(2+1)-D: a `ConvNorm` over space, ReLU, a `ConvNorm` over time, with about as many parameters as the 3-D one.

  `[N, F, H, W, D]` only. The width between the two, for a window of t frames of a pixels,

      M = floor(t a D features / (a D + t features))
  """

  features: int
  window: int | Sequence[int]
  stride: int | Sequence[int] = 1
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None
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
    """As `ConvNorm.writer`."""
    return (*self.path, "time", "conv")

  @property
  def reader(self) -> Path:
    """The convolution that takes the input channels, as `GateRecord.readers` names it."""
    return (*self.path, "space", "conv")

  def macs(self, x_shape: Sequence[int]) -> ConvMacs:
    """As `ConvNorm.macs`; no pair of an input and an output channel has a cost of its own."""
    (t, *pixels), stride = _per_axis("window", self.window, 3), _per_axis("stride", self.stride, 3)
    middle = self._middle(x_shape[-1])
    frames, *area = x_shape[1:-1]
    area = math.prod(-(-size // s) for size, s in zip(area, stride[1:], strict=True))
    return ConvMacs(
      per_input=math.prod(pixels) * frames * area * middle,
      per_output=t * -(-frames // stride[0]) * area * middle,
      per_pair=0,
    )

  def _parts(self, inputs: int) -> tuple[ConvNorm, ConvNorm]:
    window, stride = _per_axis("window", self.window, 3), _per_axis("stride", self.stride, 3)
    shared = dict(dtype=self.dtype, axis_name=self.axis_name, group_norm=self.group_norm)
    space = ConvNorm(
      self._middle(inputs), (1, *window[1:]), (1, *stride[1:]), name="space", **shared
    )
    time = ConvNorm(self.features, (window[0], 1, 1), (stride[0], 1, 1), name="time", **shared)
    return space, time

  def _middle(self, inputs: int) -> int:
    t, *pixels = _per_axis("window", self.window, 3)
    a = math.prod(pixels)
    return max(1, t * a * inputs * self.features // (a * inputs + t * self.features))


CONVOLUTIONS = {"full": ConvNorm, "factorised": FactorisedConvNorm}


def scaled(channels: int, width: float) -> int:
  """`channels` times `width`, rounded to the nearest integer, at least 1."""
  return max(1, round(channels * width))


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
  sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
  for size in sizes:
    arguments.whole_number(name, size)
  if len(sizes) != axes:
    raise ValueError(f"{name} must be a whole number, or one for each of {axes} axes; got {value}")
  return sizes


def _quickest(axes: int, depthwise: bool) -> Callable | None:
  """What computes an `nn.Conv`; None is XLA's convolution."""
  if jax.default_backend() != "cpu" or (axes == 2 and not depthwise):
    return None
  convolve = convolve_depthwise if depthwise else convolve_clips
  return lambda x, kernel, strides, padding, **defaults: convolve(x, kernel, strides, padding)
