"""Networks for video segments, by name: light ones see a frame, heavy ones a clip of frames.

All return `([N, C] float32 features, records)`. The residual ones are those for images, in
`models/resnets.py` and `models/mobilenet.py`; I3D is here.

Axes: N segments, F frames, H and W pixels, D channels, C features.
Reference: Hussein et al., "TimeGate: conditional gating of segments in long-range activities",
2020; Carreira and Zisserman, "Quo vadis, action recognition? A new model and the Kinetics dataset",
2017 (I3D).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.blocks import GATINGS
from gating_jax.layers.conv import ConvNorm, scaled
from gating_jax.layers.gate import GateSettings, check_gate_settings
from gating_jax.models.mobilenet import MobileNet
from gating_jax.models.resnets import RESNETS, STEMS, ResNet
from gating_jax.ops import arguments
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


class FeaturePool(nn.Module):
  """Mean over all axes but the first and last, `[N, ..., C]` to `[N, C]`.

  It stands in for a network where the inputs are precomputed features.
  """

  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim < 2:
      raise ValueError(f"features must be [N, ..., C]; got shape {x.shape}")
    return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1))), ()


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
  Raises:
    ValueError: when called, inputs of another rank, or an unknown stem.

  >>> import jax
  >>> model = InflatedInception(stages=(((2, 1, 2, 1, 2, 1),),), stem="small")
  >>> clips = jnp.ones((2, 4, 8, 8, 3))
  >>> (features, _), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), clips)
  >>> features.shape
  (2, 7)
  """

  stages: tuple[tuple[tuple[int, ...], ...], ...] = I3D
  width: float = 1.0
  stem: str = "imagenet"
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim not in (4, 5):
      raise ValueError(
        f"images must be [N, H, W, D], or clips [N, F, H, W, D]; got shape {x.shape}"
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
    """Applies the layers before the first stage."""
    one_of("stem", self.stem, _STEMS)
    axes = x.ndim - 2
    # Frames keep their number here; images have the last two axes only.
    half = (1, 2, 2)[-axes:]

    def conv(x, i, *, features, window, stride):
      """Applies convolution i of the stem, normalisation and ReLU: `[N, ..., D] -> [N, ..., C]`."""
      features = scaled(features, self.width)
      layer = ConvNorm(
        features,
        window,
        stride,
        dtype=self.dtype,
        axis_name=self.axis_name,
        name=f"stem{i}",
      )
      return nn.relu(layer(x, train))

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

  channels: tuple[int, ...]
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    def conv(x, name, features, window=1):
      """Applies a convolution, normalisation and ReLU: `[N, ..., D] -> [N, ..., features]`."""
      layer = ConvNorm(features, window, dtype=self.dtype, axis_name=self.axis_name, name=name)
      return nn.relu(layer(x, train))

    one, reduce2, two, reduce3, three, four = self.channels
    axes = x.ndim - 2
    branch1 = conv(x, "branch1", one)
    # The reductions make the 3x3x3 convolutions cheap (GoogLeNet).
    branch2 = conv(conv(x, "branch2_reduce", reduce2), "branch2", two, window=3)
    branch3 = conv(conv(x, "branch3_reduce", reduce3), "branch3", three, window=3)
    branch4 = conv(max_pool(x, (3,) * axes, (1,) * axes), "branch4", four)
    return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


def _resnet(name: str) -> functools.partial[ResNet]:
  """Returns a named residual net without its classifier, whose other fields may be replaced."""
  return functools.partial(ResNet, classes=None, **RESNETS[name]._asdict())


# (2+1)-D: every window over space, then over time (Tran et al., 2018).
_FACTORISED = dict(stem="clip", convolution="factorised")

LIGHT_NETS = {
  "mobilenet": functools.partial(MobileNet),
  # For frames of 16 to 64 pixels: a stride of 4 in all, where MobileNetV2 has 32.
  "mobilenet_small": functools.partial(
    MobileNet,
    stages=((1, 16, 1, 2), (4, 24, 2, 1), (4, 32, 2, 2)),
    stem=16,
    stem_stride=1,
    head=64,
  ),
  "resnet8": functools.partial(ResNet, classes=None, blocks=(1, 1, 1)),
  "features": functools.partial(FeaturePool),
}
HEAVY_NETS = {
  "resnet3d10": functools.partial(_resnet("resnet18"), blocks=(1, 1, 1, 1)),
  "resnet3d18": _resnet("resnet18"),
  "resnet3d34": _resnet("resnet34"),
  "resnet3d50": _resnet("resnet50"),
  "resnet3d101": _resnet("resnet101"),
  "r2plus1d10": functools.partial(_resnet("resnet18"), blocks=(1, 1, 1, 1), **_FACTORISED),
  "r2plus1d18": functools.partial(_resnet("resnet18"), **_FACTORISED),
  "i3d": functools.partial(InflatedInception),
  # The first module of each stage.
  "i3d_small": functools.partial(
    InflatedInception, stages=tuple(stage[:1] for stage in I3D), stem="small"
  ),
  "features": functools.partial(FeaturePool),
}


def light_net(
  name: str,
  *,
  width: float = 1.0,
  dtype: jnp.dtype = jnp.float32,
  axis_name: str | None = None,
) -> nn.Module:
  """Builds a network for `[N, H, W, D]` frames.

  Args:
    name: one of `LIGHT_NETS`: `mobilenet`; `mobilenet_small` and `resnet8` for frames of 16 to 64
      pixels; `features` for precomputed features.
    width, dtype, axis_name: fields of the network.
  Returns:
    A module that returns `(features, records)`.
  Raises:
    ValueError: no such name, a width that is not positive, or a width that the network does not
      have.

  >>> light_net("mobilenet_small", width=0.5).stem_stride
  1
  """
  return _build("light net", LIGHT_NETS, name, width=width, dtype=dtype, axis_name=axis_name)


def heavy_net(
  name: str,
  *,
  width: float = 1.0,
  stem: str | None = None,
  gating: str = "none",
  gate: GateSettings | None = None,
  group_norm: bool = False,
  dtype: jnp.dtype = jnp.float32,
  axis_name: str | None = None,
) -> nn.Module:
  """Builds a network for `[N, F, H, W, D]` clips.

  Args:
    name: one of `HEAVY_NETS`.
    stem: replaces the named network's; `small` for frames of 16 to 64 pixels.
    gating: `channel` for channel gates inside the network, where it has them.
    gate: settings of these gates.
    group_norm: GroupNorm in place of BatchNorm, so that every clip is treated alone.
    width, dtype, axis_name: fields of the network.
  Returns:
    A module that returns `(features, records)`.
  Raises:
    ValueError: no such name, a width that is not positive, or a setting that the network does not
      have.

  >>> heavy_net("resnet3d10", gating="channel", stem="small").blocks
  (1, 1, 1, 1)
  """
  settings = dict(
    width=width,
    stem=stem,
    gating=gating,
    gate=gate,
    group_norm=group_norm,
    dtype=dtype,
    axis_name=axis_name,
  )
  return _build("heavy net", HEAVY_NETS, name, **settings)


def _build(what: str, table: dict[str, Any], name: str, **settings) -> nn.Module:
  """Builds a named network of a table, and refuses settings that it does not have."""
  one_of(what, name, table)
  arguments.number("width", settings["width"], "> 0", holds=lambda v: v > 0)
  if settings.get("gate") is not None:
    check_gate_settings("gate", settings["gate"])
  net = table[name]
  known = {field.name for field in dataclasses.fields(net.func)}
  if "stem" in known and settings.get("stem") is not None:
    one_of("stem", settings["stem"], _STEMS if net.func is InflatedInception else STEMS)
  if "gating" in known and "gating" in settings:
    one_of("gating", settings["gating"], GATINGS)
  # A setting that the network lacks must keep its default: silently ignored, it would mislead.
  for setting, unset in (("width", 1), ("stem", None), ("gating", "none"), ("group_norm", False)):
    if setting not in known and settings.get(setting, unset) != unset:
      raise ValueError(
        f"{setting} of {what} {name!r} must be left at {unset!r}; got {settings[setting]!r}"
      )
  # None means the named network's own value.
  given = {key: value for key, value in settings.items() if key in known and value is not None}
  return net(**given)
