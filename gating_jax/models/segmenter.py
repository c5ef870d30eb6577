"""Semantic segmentation: pyramid pooling on the last feature map of a gated backbone.

Axes: N examples, H and W pixels of the image, h and w of the feature map, D channels.
Reference: Zhao et al., "Pyramid scene parsing network", 2017, section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.layers.context import grid_means
from gating_jax.layers.conv import ConvNorm
from gating_jax.types import Array, Records

BINS = (1, 2, 3, 6)


class Segmenter(nn.Module):
  """Segmentation network: a gated backbone and a pyramid pooling head that always runs.

  `[N, H, W, D]` images of any size to `([N, H, W, classes] float32 logits, records)`. The logits of
  the feature map's pixels are enlarged bilinearly. All gates are the backbone's.

  Attributes:
    backbone: module from images to `([N, h, w, D'], records)`, such as a `ResNet` with
      `pool=False`.
    classes: number of classes of a pixel.
    features: channels of the head's last feature map.
    bins: side of each grid of the pyramid.
    dtype: of the head's computation, float32 or bfloat16.
    axis_name: mapped device axis over which BatchNorm takes its statistics.

  >>> from gating_jax.models.summary import model_summary
  >>> from gating_jax.models.resnets import resnet
  >>> backbone = resnet("resnet20", None, pool=False, output_stride=2)
  >>> model_summary(Segmenter(backbone, classes=11, features=32), (32, 32, 1)).macs
  88762368
  """

  backbone: nn.Module
  classes: int
  features: int = 512
  bins: tuple[int, ...] = BINS
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    size = x.shape[1:3]
    x, records = self.backbone(x, train)
    head = PyramidHead(
      classes=self.classes,
      features=self.features,
      bins=self.bins,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="head",
    )
    # The logits are enlarged, not the features: the head runs on the small map.
    return enlarge(head(x, train), size), records


class PyramidHead(nn.Module):
  """Pyramid pooling head: class logits from a map and its means over ever coarser grids.

  Each grid's means pass through a 1x1 convolution to `D / len(bins)` channels and are enlarged to
  the map. The map and the enlarged means are joined by a 3x3 convolution; a 1x1 convolution
  classifies every pixel. `[N, h, w, D]` to `[N, h, w, classes]` float32.
  """

  classes: int
  features: int
  bins: tuple[int, ...] = BINS
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    layer = functools.partial(ConvNorm, dtype=self.dtype, axis_name=self.axis_name)
    x = x.astype(self.dtype)
    levels = [x]
    # Together the grids have about as many channels as the map, as in the paper.
    features = max(1, x.shape[-1] // len(self.bins))
    for side in self.bins:
      # Means in float32: a cell may hold many pixels.
      level = grid_means(x.astype(jnp.float32), side).astype(self.dtype)
      level = nn.relu(layer(features, 1, name=f"bins{side}")(level, train))
      levels.append(enlarge(level, x.shape[1:3]))
    join = layer(self.features, 3, name="join")
    x = nn.relu(join(jnp.concatenate(levels, axis=-1), train))
    # Logits are float32, whatever the head computes in.
    return nn.Conv(self.classes, (1, 1), name="classifier")(x.astype(jnp.float32))


def enlarge(x: Array, size: Sequence[int]) -> Array:
  """Enlarges `[N, h, w, D]` to `[N, *size, D]`, bilinearly between the centres of pixels."""
  return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")
