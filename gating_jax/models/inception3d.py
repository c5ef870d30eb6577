"""Inception networks for clips.

Axes: N examples, F frames, H and W pixels, D channels, C features.
Reference: Carreira and Zisserman, "Quo vadis, action recognition? A new model and the Kinetics
dataset", 2017.
"""

from __future__ import annotations

from collections.abc import Hashable

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.conv import ConvNorm, scaled
from gating_jax.ops.cpu_convs import max_pool
from gating_jax.types import Array, Records

# Per module: channels of the 1x1 branch, of the two 1x1-3x3 branches, of the pooling branch.
# The stages are those of GoogLeNet, from which I3D is inflated.
I3D = (
  ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
  (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
  ),
  ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
_STEMS = ("imagenet", "small")


class InflatedInception(nn.Module):
  """Inception network for clips, or for images, without gates.

  `[N, F, H, W, D]` clips or `[N, H, W, D]` images of any size to `([N, C] float32 features, ())`.

  Attributes:
    stages: modules of each stage, as `InceptionModule.channels`; before each stage but the first, a
      3x3x3 max pool with stride 2 (I3D's last one is 2x2x2).
    width: multiplies every channel count; each is rounded to the nearest integer, at least 1.
    stem: `imagenet`: 7x7x7 with stride 2, 1x1x1 and 3x3x3, with a 1x3x3 max pool of stride (1, 2,
      2) before and after the last two; `small`: 3x3x3 with stride (1, 2, 2).
    dtype: of the computation, float32 or bfloat16; parameters, BatchNorm statistics and features
      are float32.
    axis_name: mapped device axis over which BatchNorm takes its statistics.
  """

  stages: tuple[tuple[tuple[int, ...], ...], ...] = I3D
  width: float = 1.0
  stem: str = "imagenet"
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim not in (4, 5):
      raise ValueError(
        f"clips must be [N, F, H, W, D] and images [N, H, W, D]; got shape {x.shape}"
      )
    x = self._stem(x.astype(self.dtype), train)
    axes = x.ndim - 2
    for stage, modules in enumerate(self.stages, start=1):
      if stage > 1:
        x = max_pool(x, (3,) * axes, (2,) * axes)
      for i, channels in enumerate(modules, start=1):
        channels = tuple(scaled(c, self.width) for c in channels)
        name = f"stage{stage}_module{i}"
        x = InceptionModule(channels, self.dtype, self.axis_name, name=name)(x, train)
    # A mean in bfloat16 over many pixels would lose precision.
    return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1))), ()

  def _stem(self, x: Array, train: bool) -> Array:
    one_of("stem", self.stem, _STEMS)
    axes = x.ndim - 2
    # Frames keep their number here; images have the last two axes only.
    half = (1, 2, 2)[-axes:]

    def conv(x, i, *, features, window, stride):
      """Applies convolution i of the stem, normalisation and ReLU: `[N, ..., D] -> [N, ..., C]`."""
      features = scaled(features, self.width)
      shared = dict(dtype=self.dtype, axis_name=self.axis_name)
      return nn.relu(ConvNorm(features, window, stride, name=f"stem{i}", **shared)(x, train))

    if self.stem == "small":
      return conv(x, 1, features=64, window=3, stride=half)
    pool = (1, 3, 3)[-axes:]
    x = max_pool(conv(x, 1, features=64, window=7, stride=2), pool, half)
    x = conv(x, 2, features=64, window=1, stride=1)
    x = conv(x, 3, features=192, window=3, stride=1)
    return max_pool(x, pool, half)


class InceptionModule(nn.Module):
  """Inception module: four branches side by side.

  The branches are 1x1x1; twice 1x1x1 then 3x3x3; and 3x3x3 max pool then 1x1x1.

  `[N, F, H, W, D]` to `[N, F, H, W, C]`, C the sum over branches; the same without frames.

  Attributes:
    channels: of the first branch, of the second's two convolutions, of the third's two, of the
      last.
  """

  channels: tuple[int, int, int, int, int, int]
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    def conv(x, name, features, window=1):
      """Applies a convolution, normalisation and ReLU: `[N, ..., D] -> [N, ..., features]`."""
      shared = dict(dtype=self.dtype, axis_name=self.axis_name)
      return nn.relu(ConvNorm(features, window, name=name, **shared)(x, train))

    one, reduce2, two, reduce3, three, four = self.channels
    axes = x.ndim - 2
    branch1 = conv(x, "branch1", one)
    # The reductions make the 3x3x3 convolutions cheap (GoogLeNet).
    branch2 = conv(conv(x, "branch2_reduce", reduce2), "branch2", two, window=3)
    branch3 = conv(conv(x, "branch3_reduce", reduce3), "branch3", three, window=3)
    branch4 = conv(max_pool(x, (3,) * axes, (1,) * axes), "branch4", four)
    return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)
