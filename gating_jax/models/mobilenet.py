"""Light network for images: inverted residuals of depthwise convolutions.

Axes: N examples, H and W pixels, D channels, C features.
Reference: Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018, tables 1
and 2.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.layers.conv import ConvNorm, scaled
from gating_jax.types import Array, Records

# Per stage: expansion, channels, blocks, stride of the first block.
MOBILENET_V2 = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


class MobileNet(nn.Module):
  """MobileNetV2 without gates and without a classifier.

  `[N, H, W, D]` images of any size to `([N, C] float32 features, ())`.

  Attributes:
    stages: expansion, channels, blocks and stride of the first block, for each stage.
    stem: channels of the 3x3 convolution before the stages.
    stem_stride: stride of that convolution; 1 for small images.
    head: channels of the 1x1 convolution after the stages; `C`, before `width`.
    width: multiplies every channel count; each is rounded to the nearest integer, at least 1.
    dtype: of the computation, float32 or bfloat16; parameters, BatchNorm statistics and features
      are float32.
    axis_name: mapped device axis over which BatchNorm takes its statistics.
  """

  stages: tuple[tuple[int, int, int, int], ...] = MOBILENET_V2
  stem: int = 32
  stem_stride: int = 2
  head: int = 1280
  width: float = 1.0
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim != 4:
      raise ValueError(f"images must be [N, H, W, D]; got shape {x.shape}")
    layer = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
    stem = layer(scaled(self.stem, self.width), 3, self.stem_stride, name="stem")
    x = nn.relu6(stem(x.astype(self.dtype), train))
    for stage, (expansion, channels, blocks, stride) in enumerate(self.stages, start=1):
      for i in range(1, blocks + 1):
        block = InvertedResidual(
          features=scaled(channels, self.width),
          expansion=expansion,
          # Only the first block of a stage reduces the resolution.
          stride=stride if i == 1 else 1,
          dtype=self.dtype,
          axis_name=self.axis_name,
          name=f"stage{stage}_block{i}",
        )
        x = block(x, train)
    x = nn.relu6(layer(scaled(self.head, self.width), 1, name="head")(x, train))
    # A mean in bfloat16 over many pixels would lose precision.
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2)), ()


class InvertedResidual(nn.Module):
  """Inverted residual block: 1x1 expansion, 3x3 depthwise convolution, 1x1 projection.

  The expansion is to `expansion` times the input's channels. The input is added where shapes agree.
  `[N, H, W, D]` to `[N, H', W', features]`.
  """

  features: int
  expansion: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    inside = self.expansion * x.shape[-1]
    layer = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
    h = x
    # Without expansion the paper's first block has no 1x1 convolution before the depthwise one.
    if self.expansion > 1:
      h = nn.relu6(layer(inside, 1, name="expand")(h, train))
    depthwise = layer(inside, 3, self.stride, depthwise=True, name="depthwise")
    h = nn.relu6(depthwise(h, train))
    # Linear bottleneck: no ReLU after the projection, which would lose information (section 3.2).
    h = layer(self.features, 1, name="project")(h, train)
    return x + h if h.shape == x.shape else h
