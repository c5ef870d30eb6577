"""Conversion of a Flax model and its variables to a `FoldedNet` network.

Gates that look at no image are folded away: the channels they close are removed, and those they
leave are scaled by them. Closed features that a VGG net without a classifier ends with stay.

Axes: D input channels, O output channels.
Reference: Jacob et al., 2018, section 3.2; Louizos et al., 2018 (hard concrete gates).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.checks import one_of, shown
from gating_jax.inference.folded import Block, Conv, FoldedNet, Group, Head, Layer, Part
from gating_jax.layers.blocks import GATINGS
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.resnet import ResNet
from gating_jax.models.vgg import POOL, VGG
from gating_jax.ops import relaxations
from gating_jax.ops.arguments import instance
from gating_jax.types import Path

_EPSILON = nn.BatchNorm.epsilon
_STEM_POOL, _VGG_POOL = (3, 2, 1), (2, 2, 0)


def fold(model: ResNet | VGG, variables: Mapping[str, Any]) -> FoldedNet:
  """Converts a network in evaluation, with the same outputs up to rounding, in float32.

  Args:
    model: a `ResNet` of images or a `VGG`. Its gates are straight-through and of the pooled
      features; or the same for all images, unless the outputs of blocks are gated.
    variables: its trained values, `params` and `batch_stats`.
  Returns:
    A `FoldedNet` network.
  Raises:
    ValueError: another model, gates that are never exactly closed, or variables of another model.
    TypeError: variables that are no mapping.
  """
  check(model)
  flat = _flat(model, variables)
  parts = tuple((_vgg_parts if isinstance(model, VGG) else _resnet_parts)(model, flat))
  if isinstance(model, ResNet) and not model.pool:
    return FoldedNet(parts, pooled=False)
  if model.classes is None:
    return FoldedNet(parts)
  kernel, bias = (jnp.asarray(flat["params", "classifier", name]) for name in ("kernel", "bias"))
  # Only here are the last features read by a kernel that can do without closed ones.
  if isinstance(model, VGG) and model.gating == "channel" and parts[-1].head is None:
    parts, kernel = _without_closed_features(parts, kernel)
  return FoldedNet(parts, (kernel, bias))


def _flat(model: nn.Module, variables: Mapping[str, Any]) -> dict[Path, np.ndarray]:
  """Returns the variables in float32, by path.

  Raises:
    ValueError: naming the first variable that the model does not have, lacks, or has in another
      shape.
  """
  if variables is not None:
    instance("variables", variables, Mapping, "a mapping with params and batch_stats")
  flat = {
    path: np.asarray(leaf, np.float32)
    for path, leaf in traverse_util.flatten_dict(dict(variables or {})).items()
    if path[0] in ("params", "batch_stats")
  }
  # The first kernel tells the number of channels of images, which the model does not know.
  first = flat.get(
    ("params", *(("layer1", "conv") if isinstance(model, VGG) else ("stem",)), "conv", "kernel")
  )
  wanted = _shapes(model, 3 if first is None else first.shape[2])
  for path in sorted(wanted.keys() | flat.keys()):
    got = flat[path].shape if path in flat else "none"
    if got != wanted.get(path, "none"):
      raise ValueError(
        f"variables must be those of the model, with {'/'.join(path)} of shape "
        f"{wanted.get(path, 'none')}; got {got}"
      )
  return flat


def _shapes(model: nn.Module, channels: int) -> dict[Path, tuple[int, ...]]:
  """Returns the shapes of a model's variables, by path."""
  # Any size works from which the pools leave a pixel.
  images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(dict(made)).items()}


def check(model: Any, kinds: Sequence[type] = (ResNet, VGG)) -> None:
  """Raises ValueError unless a model is exactly of one of the kinds and can be folded."""
  # A subclass may have parts that would not be folded.
  if type(model) not in kinds:
    got = shown(model) if isinstance(model, type) else type(model).__name__
    raise ValueError(f"model must be {' or '.join(kind.__name__ for kind in kinds)}; got {got}")
  one_of("gating", model.gating, GATINGS)
  gated = model.gating != "none"
  rules = [
    (
      "gate context",
      model.gate.context,
      not gated or model.gate.context in ("pooled", "none"),
      "pooled or none, since other contexts are random",
    ),
    (
      "gate relaxation",
      model.gate.relaxation,
      not gated or model.gate.context == "none" or model.gate.relaxation == "straight_through",
      "straight_through for conditional gates, since only it gives exactly 0 or 1",
    ),
  ]
  if isinstance(model, ResNet):
    rules += [
      (
        "gate context",
        model.gate.context,
        model.gating != "all_channels" or model.gate.context == "pooled",
        "pooled if block outputs are gated",
      ),
      ("group_norm", model.group_norm, not model.group_norm, "False: GroupNorm cannot be folded"),
      ("convolution", model.convolution, model.convolution == "full", "full"),
    ]
  for name, value, holds, rule in rules:
    if not holds:
      raise ValueError(f"the model's {name} must be {rule}; got {value!r}")


def _resnet_parts(model: ResNet, flat: Mapping[Path, np.ndarray]):
  # Strides depend only on the number of axes, which is 4 for images.
  probe = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  stem = fold_conv(flat, ("stem",), stride=1 if model.stem == "cifar" else 2)
  yield Layer(stem, pool=_STEM_POOL if model.stem == "imagenet" else None)
  channels = stem.bias.size
  strides, dilations = model.resolution(probe)
  for stage, count in enumerate(model.blocks):
    for i in range(count):
      block = _block(
        model,
        flat,
        f"stage{stage + 1}_block{i + 1}",
        channels,
        strides[stage] if i == 0 else 1,
        (max(1, dilations[stage] // 2) if i == 0 else dilations[stage], dilations[stage]),
      )
      channels = channels + sum(block.pad[1:]) if block.project is None else block.project.bias.size
      yield block


def _block(model, flat, name: str, channels: int, stride: int, dilations: tuple[int, int]) -> Block:
  # A block of two convolutions, or a bottleneck of three.
  basic = ("params", name, "conv3", "conv", "kernel") not in flat
  names = ("conv1", "conv2") if basic else ("conv1", "conv2", "conv3")
  strides, spread = ((stride, 1), dilations) if basic else ((1, stride, 1), (1, dilations[0], 1))
  convs = [
    fold_conv(flat, (name, conv), s, d) for conv, s, d in zip(names, strides, spread, strict=True)
  ]
  out = convs[-1].bias.size
  projects = ("params", name, "project", "conv", "kernel") in flat
  project = fold_conv(flat, (name, "project"), stride) if projects else None
  # A shortcut without a projection is padded with zeros to the block's channels, half of them on
  # each side.
  missing = 0 if project is not None else out - channels
  shape = dict(
    project=project, pad=(stride if project is None else 1, missing // 2, missing - missing // 2)
  )
  if model.gating == "layer":
    if not any(path[1:3] == (name, GATE_NAME) for path in flat):
      return Block(tuple(convs), **shape)
    head = _head(model, flat, name, (Group(1),))
    if isinstance(head, Head):
      return Block(tuple(convs), head, layer_gate=True, **shape)
    # A gate that looks at no image scales the last convolution; a closed one removes the branch.
    scale = float(head[0][0])
    convs = [*convs[:-1], _scaled(convs[-1], scale)] if scale > 0 else []
    return Block(tuple(convs), **shape)
  head = None
  if model.gating == "all_channels":
    groups = tuple(_group(model, conv.bias.size) for conv in convs)
    return Block(tuple(convs), _head(model, flat, name, groups), output_gate=True, **shape)
  if model.gating == "channel":
    groups = tuple(_group(model, conv.bias.size) for conv in convs[:-1])
    head = _head(model, flat, name, groups)
    if not isinstance(head, Head):
      # Static gates: the channels they close go, in the kernel before and after.
      for i, scale in enumerate(head):
        convs[i], convs[i + 1] = _scaled_away(convs[i], scale, convs[i + 1])
      head = None
  return Block(tuple(convs), head, **shape)


def _vgg_parts(model: VGG, flat: Mapping[Path, np.ndarray]):
  places = [i for i, channels in enumerate(model.chain) if channels != POOL]
  convs = [fold_conv(flat, (f"layer{i + 1}", "conv"), norm=model.norm) for i in range(len(places))]
  heads = [None] * len(convs)
  if model.gating == "channel":
    heads = [
      _head(model, flat, f"layer{i + 1}", (_group(model, conv.bias.size),))
      for i, conv in enumerate(convs)
    ]
  for i, head in enumerate(heads):
    if isinstance(head, list):
      heads[i] = None
      if i + 1 < len(convs):
        convs[i], convs[i + 1] = _scaled_away(convs[i], head[0], convs[i + 1])
      else:
        # The last layer's channels are the features: all stay, closed ones as zeros.
        convs[i] = _scaled(convs[i], head[0])
  for place, conv, head in zip(places, convs, heads, strict=True):
    yield Layer(conv, head, pool=_VGG_POOL if POOL in model.chain[place + 1 : place + 2] else None)


def _without_closed_features(
  parts: tuple[Layer, ...], classifier: jax.Array
) -> tuple[tuple[Layer, ...], jax.Array]:
  """Removes the last layer's channels that are 0 for every input, also from the classifier.

  Static gates close such channels; no other convolution reads them.
  """
  *before, last = parts
  conv = last.conv
  closed = np.all(np.asarray(conv.kernel) == 0, axis=(0, 1, 2)) & (np.asarray(conv.bias) == 0)
  kept = _at_least_one(~closed)
  conv = dataclasses.replace(conv, kernel=conv.kernel[..., kept], bias=conv.bias[kept])
  return (*before, dataclasses.replace(last, conv=conv)), classifier[kept]


def _group(model, channels: int) -> Group:
  size = model.gate.channels_per_gate(channels)
  return Group(channels // size, size)


def fold_stages(
  model: ResNet, variables: Mapping[str, Any]
) -> tuple[list[tuple[Part, ...]], dict[Path, np.ndarray]]:
  """Returns the parts of each stage, the stem with the first, and the variables by path."""
  flat = _flat(model, variables)
  stem, *blocks = _resnet_parts(model, flat)
  ends = np.cumsum(model.blocks)
  stages = [tuple(blocks[end - count : end]) for end, count in zip(ends, model.blocks, strict=True)]
  return [(stem, *stages[0]), *stages[1:]], flat


def fold_conv(
  flat: Mapping[Path, np.ndarray], path: Path, stride: int = 1, dilation: int = 1, norm: bool = True
) -> Conv:
  """Folds the BatchNorm of a `ConvNorm`, if any, into its convolution."""
  kernel = flat["params", *path, "conv", "kernel"]
  if not norm:
    return Conv(
      jnp.asarray(kernel), jnp.asarray(flat["params", *path, "conv", "bias"]), stride, dilation
    )
  factor, bias = _norm(flat, (*path, "norm"))
  return Conv(jnp.asarray(kernel * factor), jnp.asarray(bias), stride, dilation)


def _norm(flat: Mapping[Path, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns BatchNorm in evaluation as a factor and a summand of each channel."""
  # y = x * factor + bias, with factor = scale / sqrt(var + eps) and bias = beta - mean * factor; in
  # float64, so that it is rounded once.
  get = lambda kind, name: flat[kind, *path, name].astype(np.float64)
  factor = get("params", "scale") / np.sqrt(get("batch_stats", "var") + _EPSILON)
  bias = get("params", "bias") - get("batch_stats", "mean") * factor
  return factor.astype(np.float32), bias.astype(np.float32)


def _head(
  model, flat: Mapping[Path, np.ndarray], name: str, groups: tuple[Group, ...]
) -> Head | list[np.ndarray]:
  """Returns the gate network, or the values of gates that look at no image.

  The latter are one array of channels a group.
  """
  if model.gate.context == "none":
    logits = jnp.asarray(flat["params", name, GATE_NAME, "logits"])
    if model.gate.relaxation == "hard_concrete":
      gates = relaxations.hard_concrete_mean(
        relaxations.hard_concrete_location(logits, model.gate.temperature)
      )
    else:
      gates = {"sigmoid": jax.nn.sigmoid, "straight_through": relaxations.threshold_gate}[
        model.gate.relaxation
      ](logits)
    ends = np.cumsum([group.gates for group in groups])[:-1]
    return [
      np.repeat(part, group.channels)
      for part, group in zip(np.split(np.asarray(gates), ends), groups, strict=True)
    ]
  get = functools.partial(_get, flat, (name, GATE_NAME, "head"))
  factor, bias = _norm(flat, (name, GATE_NAME, "head", "norm"))
  # BatchNorm follows the first Dense layer, which has no bias of its own.
  return Head(
    jnp.asarray(get("hidden", "kernel") * factor),
    jnp.asarray(bias),
    jnp.asarray(get("logits", "kernel")),
    jnp.asarray(get("logits", "bias")),
    groups,
  )


def _get(flat: Mapping[Path, np.ndarray], path: Path, *name: str) -> np.ndarray:
  return flat["params", *path, *name]


def _scaled(conv: Conv, scale: np.ndarray | float) -> Conv:
  """Multiplies the output channels of a convolution by `[O]` numbers, or by one number."""
  scale = jnp.broadcast_to(jnp.asarray(scale, conv.bias.dtype), conv.bias.shape)
  return Conv(conv.kernel * scale[None, None, None], conv.bias * scale, conv.stride, conv.dilation)


def _scaled_away(writer: Conv, scale: np.ndarray, reader: Conv) -> tuple[Conv, Conv]:
  """Removes the channels between two convolutions that have scale 0, and scales the writer.

  ReLU and max pools commute with the scale, which is above 0 for the channels kept.
  """
  kept = _at_least_one(scale)
  writer = _scaled(writer, scale)
  return (
    dataclasses.replace(writer, kernel=writer.kernel[..., kept], bias=writer.bias[kept]),
    dataclasses.replace(reader, kernel=reader.kernel[:, :, kept]),
  )


def _at_least_one(scale: np.ndarray) -> np.ndarray:
  """Returns the indices of values other than 0; index 0 if there are none.

  A convolution keeps one channel, which its scale closes.
  """
  (kept,) = np.nonzero(scale)
  return kept if kept.size else np.arange(1)
