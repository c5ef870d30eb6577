"""A class for every pixel: pyramid pooling on the last feature map of a gated backbone.

Axes: N examples, H and W pixels of the image, h and w of the feature map, D channels.
Reference: Zhao et al., "Pyramid scene parsing network", 2017, section 3.2.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.layers.conv import ConvNorm
from gating_jax.types import Array, Records

BINS = (1, 2, 3, 6)


class Segmenter(nn.Module):
  """`[N, H, W, D]` images of any size to `([N, H, W, classes] float32 logits, records)`.

  The logits of the feature map's pixels are enlarged bilinearly. Gates are the backbone's; the head always runs.

  Attributes:
    backbone: a module from images to `([N, h, w, D'], records)`, such as a `ResNet` with `pool=False`.
    classes: of a pixel.
    features: channels of the head's last feature map.
    bins: side of each grid of the pyramid.
    dtype: of the head's computation, float32 or bfloat16.
    axis_name: mapped device axis over which BatchNorm takes its statistics.

  >>> from gating_jax.models.summary import count
  >>> from gating_jax.models.resnet import resnet
  >>> model = Segmenter(resnet("resnet20", None, pool=False, output_stride=2), classes=11, features=32)
  >>> count(model, (32, 32, 1)).macs
  88762368
  """

  backbone: nn.Module
  classes: int
  features: int = 512
  bins: tuple[int, ...] = BINS
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    size = x.shape[1:3]
    x, records = self.backbone(x, train)
    head = PyramidHead(
      self.classes, self.features, self.bins, self.dtype, self.axis_name, name="head"
    )
    return enlarge(head(x, train), size), records


class PyramidHead(nn.Module):
  """The map beside its means over grids of coarser and coarser cells, a 3x3 convolution, and a class for every pixel.

  Each grid's means pass through a 1x1 convolution to `D / len(bins)` channels and are enlarged to the map.
  `[N, h, w, D]` to `[N, h, w, classes]` float32.
  """

  classes: int
  features: int
  bins: tuple[int, ...] = BINS
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    conv = lambda features, window, name: ConvNorm(
      features, window, 1, self.dtype, self.axis_name, name=name
    )
    x = x.astype(self.dtype)
    levels = [x]
    for side in self.bins:
      level = grid_means(x.astype(jnp.float32), side).astype(self.dtype)
      level = nn.relu(conv(max(1, x.shape[-1] // len(self.bins)), 1, f"bins{side}")(level, train))
      levels.append(enlarge(level, x.shape[1:3]))
    x = nn.relu(conv(self.features, 3, "join")(jnp.concatenate(levels, axis=-1), train))
    return nn.Conv(self.classes, (1, 1), name="classifier")(x.astype(jnp.float32))


def grid_means(x: Array, side: int) -> Array:
  """Means of `[N, h, w, D]` over the cells of a grid, `[N, side, side, D]`.

  Cell i of h rows has those from `floor(i h / side)` to before `ceil((i + 1) h / side)`, so that no cell is empty.

  >>> grid_means(jnp.arange(3.0).reshape(1, 1, 3, 1), 2)[0, 0, :, 0]
  Array([0.5, 1.5], dtype=float32)
  """
  rows, columns = (jnp.asarray(_cells(size, side), x.dtype) for size in x.shape[1:3])
  return jnp.einsum("nhwd,ih,jw->nijd", x, rows, columns)


def enlarge(x: Array, size: Sequence[int]) -> Array:
  """`[N, h, w, D]` to `[N, *size, D]`, bilinear between the centres of pixels."""
  return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")


def _cells(size: int, side: int) -> np.ndarray:
  """`[side, size]`, the weight of each pixel in each cell's mean."""
  i, at = np.arange(side)[:, None], np.arange(size)
  inside = (at >= i * size // side) & (at < -(-(i + 1) * size // side))
  return inside / inside.sum(axis=1, keepdims=True)
