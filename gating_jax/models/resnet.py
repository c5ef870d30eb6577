"""Residual networks for small images (CIFAR) and large ones (ImageNet), gated or not.

Reference: He et al., 2016, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Hashable

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.blocks import BasicBlock, Bottleneck, ConvNorm
from gating_jax.layers.gate import GateSettings
from gating_jax.types import Array, Records

# name: (stem, block, blocks per stage, channels of the first stage, shortcut)
_CIFAR = {f"resnet{6 * n + 2}": ("cifar", BasicBlock, (n, n, n), 16, "A") for n in (3, 5, 7, 9, 18)}
_IMAGENET = {
    "resnet18": ("imagenet", BasicBlock, (2, 2, 2, 2), 64, "B"),
    "resnet34": ("imagenet", BasicBlock, (3, 4, 6, 3), 64, "B"),
    "resnet50": ("imagenet", Bottleneck, (3, 4, 6, 3), 64, "B"),
    "resnet101": ("imagenet", Bottleneck, (3, 4, 23, 3), 64, "B"),
}
_STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # window, stride
RESNETS = {**_CIFAR, **_IMAGENET}


class ResNet(nn.Module):
  """`[N, H, W, D]` images of any size to `([N, classes] float32 logits, records)`.

  Attributes:
    classes: number of outputs.
    blocks: residual blocks per stage; each stage after the first halves the resolution and doubles the channels.
    block: `BasicBlock` or `Bottleneck`.
    features: channels of the first stage, before `width`.
    width: multiplies every channel count; each is rounded to the nearest integer, at least 1.
    stem: `cifar`, a 3x3 convolution; `imagenet`, 7x7 with stride 2 and a max pool.
    gating: `none` or `channel`.
    shortcut: `A` (zero padding, no parameters) or `B` (1x1 convolution).
    gate: how gates are built and sampled.
    dtype: of the computation, float32 or bfloat16; parameters, BatchNorm statistics, gates and logits are float32.
    axis_name: mapped device axis over which BatchNorm takes its statistics and examples are numbered.
  """

  classes: int
  blocks: tuple[int, ...]
  block: type[nn.Module] = BasicBlock
  features: int = 16
  width: float = 1.0
  stem: str = "cifar"
  gating: str = "none"
  shortcut: str = "A"
  gate: GateSettings = GateSettings()
  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim != 4:
      raise ValueError(f"images must be [N, H, W, D]; got shape {x.shape}")
    x = self._stem(x.astype(self.dtype), train)
    records: Records = ()
    for stage, count in enumerate(self.blocks):
      for i in range(count):
        x, new = self.block(
            features=self._channels(2**stage),
            stride=2 if stage > 0 and i == 0 else 1,
            gating=self.gating,
            shortcut=self.shortcut,
            gate=self.gate,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=f"stage{stage + 1}_block{i + 1}",
        )(x, train)
        records += new
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return nn.Dense(self.classes, name="classifier")(x), records

  def _channels(self, multiple: int) -> int:
    return max(1, round(self.features * multiple * self.width))

  def _stem(self, x: Array, train: bool) -> Array:
    one_of("stem", self.stem, _STEMS)
    window, stride = _STEMS[self.stem]
    x = nn.relu(ConvNorm(self._channels(1), window, stride, self.dtype, self.axis_name, name="stem")(x, train))
    return x if stride == 1 else nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def resnet(name: str, classes: int, **settings) -> ResNet:
  """A named network: resnet20, 32, 44, 56, 110 (CIFAR), 18, 34, 50, 101 (ImageNet).

  Args:
    name: one of `RESNETS`.
    classes: number of outputs.
    **settings: any other field of `ResNet`, in place of the named network's.
  Raises:
    ValueError: no such name, or a width that is not positive.

  >>> resnet("resnet20", classes=10, gating="channel").blocks
  (3, 3, 3)
  """
  one_of("model name", name, RESNETS)
  if not settings.get("width", 1) > 0:
    raise ValueError(f"width must be > 0; got {settings['width']}")
  stem, block, blocks, features, shortcut = RESNETS[name]
  named = dict(stem=stem, block=block, blocks=blocks, features=features, shortcut=shortcut)
  return ResNet(classes=classes, **{**named, **settings})
