"""Named networks for video segments: light ones see a frame, heavy ones a clip of frames.

All return `([N, C] float32 features, records)`.

Axes: N segments, F frames, H and W pixels, D channels, C features.
Reference: Hussein et al., "TimeGate: conditional gating of segments in long-range activities",
2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.gate import GateSettings, check_gate_settings
from gating_jax.models.inception3d import I3D, InflatedInception
from gating_jax.models.mobilenet import MobileNet
from gating_jax.models.resnet import RESNETS, ResNet
from gating_jax.ops import arguments
from gating_jax.types import Array, Records


class FeaturePool(nn.Module):
  """Mean over all axes but the first and last, `[N, ..., C]` to `[N, C]`.

  It stands in for a network where the inputs are precomputed features.
  """

  dtype: jnp.dtype = jnp.float32
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    if x.ndim < 2:
      raise ValueError(f"features must be [N, ..., C]; got shape {x.shape}")
    return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1))), ()


def _clip_resnet(name: str, **settings) -> tuple[type[nn.Module], dict[str, Any]]:
  """Returns the module and fields of a named residual net without its classifier."""
  return ResNet, dict(classes=None, **{**RESNETS[name]._asdict(), **settings})


# (2+1)-D: every window over space, then over time (Tran et al., 2018).
_FACTORISED = dict(stem="clip", convolution="factorised")

# name: module, its fields
LIGHT_NETS = {
  "mobilenet": (MobileNet, {}),
  # For frames of 16 to 64 pixels: a stride of 4 in all, where MobileNetV2 has 32.
  "mobilenet_small": (
    MobileNet,
    dict(stages=((1, 16, 1, 2), (4, 24, 2, 1), (4, 32, 2, 2)), stem=16, stem_stride=1, head=64),
  ),
  "resnet8": (ResNet, dict(classes=None, blocks=(1, 1, 1))),
  "features": (FeaturePool, {}),
}
HEAVY_NETS = {
  "resnet3d10": _clip_resnet("resnet18", blocks=(1, 1, 1, 1)),
  "resnet3d18": _clip_resnet("resnet18"),
  "resnet3d34": _clip_resnet("resnet34"),
  "resnet3d50": _clip_resnet("resnet50"),
  "resnet3d101": _clip_resnet("resnet101"),
  "r2plus1d10": _clip_resnet("resnet18", blocks=(1, 1, 1, 1), **_FACTORISED),
  "r2plus1d18": _clip_resnet("resnet18", **_FACTORISED),
  "i3d": (InflatedInception, {}),
  # The first module of each stage.
  "i3d_small": (InflatedInception, dict(stages=tuple(stage[:1] for stage in I3D), stem="small")),
  "features": (FeaturePool, {}),
}


def light_net(
  name: str,
  *,
  width: float = 1.0,
  dtype: jnp.dtype = jnp.float32,
  axis_name: Hashable | None = None,
) -> nn.Module:
  """Builds a network for `[N, H, W, D]` frames.

  Args:
    name: one of `LIGHT_NETS`: `mobilenet`; `mobilenet_small` and `resnet8` for frames of 16 to 64
      pixels; `features` for precomputed features.
    width, dtype, axis_name: fields of the network.
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
  axis_name: Hashable | None = None,
) -> nn.Module:
  """Builds a network for `[N, F, H, W, D]` clips.

  Args:
    name: one of `HEAVY_NETS`.
    stem: replaces the named network's; `small` for frames of 16 to 64 pixels.
    gating: `channel` for channel gates inside the network, where it has them.
    gate: settings of these gates.
    group_norm: GroupNorm in place of BatchNorm, so that every clip is treated alone.
    width, dtype, axis_name: fields of the network.
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
  one_of(what, name, table)
  arguments.number("width", settings["width"], "> 0", lambda v: v > 0)
  if settings.get("gate") is not None:
    check_gate_settings("gate", settings["gate"])
  module, named = table[name]
  known = {field.name for field in dataclasses.fields(module)}
  # A setting that the network lacks must keep its default: silently ignored, it would mislead.
  for setting, unset in (("width", 1), ("stem", None), ("gating", "none"), ("group_norm", False)):
    if setting not in known and settings.get(setting, unset) != unset:
      raise ValueError(
        f"{setting} of {what} {name!r} must be left at {unset!r}; got {settings[setting]!r}"
      )
  # None means the named network's own value.
  given = {key: value for key, value in settings.items() if key in known and value is not None}
  return module(**{**named, **given})
