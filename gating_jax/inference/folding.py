"""Conversion of a Flax model and its variables to a `FoldedNet`.

Gates that look at no image are folded away: the channels they close are removed, and those they
leave are scaled by them. Closed features that a VGG net without a classifier ends with stay.

Axes: D input channels, O output channels.
Reference: Jacob et al., 2018, section 3.2; Louizos et al., 2018 (hard concrete gates).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.checks import one_of, shown
from gating_jax.inference.folded import Block, Conv, FoldedNet, Group, Head, Layer, Part
from gating_jax.layers.blocks import GATINGS
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import POOL, VGG
from gating_jax.ops import relaxations
from gating_jax.ops.arguments import instance
from gating_jax.types import Path

_EPSILON = nn.BatchNorm.epsilon
_VGG_POOL = (2, 2, 0)


def fold(model: nn.Module, variables: Mapping[str, Any] | None) -> FoldedNet:
  """Converts a network in evaluation, with the same outputs up to rounding, in float32.

  Args:
    model: a `ResNet` of images or a `VGG`. Its gates are straight-through and of the pooled
      features; or the same for all images, unless the outputs of blocks are gated.
    variables: its trained values, `params` and `batch_stats`.
  Returns:
    A `FoldedNet`.
  Raises:
    ValueError: another model, gates that are never exactly closed, or variables of another model.
    TypeError: variables that are no mapping.
  """
  check_foldable(model)
  assert isinstance(model, (ResNet, VGG))  # which has been checked
  flat = _flat(model, variables)
  parts = _vgg_parts(model, flat) if isinstance(model, VGG) else _resnet_parts(model, flat)
  if isinstance(model, ResNet) and not model.pool:
    return FoldedNet(parts, pooled=False)
  if model.classes is None:
    return FoldedNet(parts)
  kernel = jnp.asarray(flat["params", "classifier", "kernel"])
  bias = jnp.asarray(flat["params", "classifier", "bias"])
  # Only here are the last features read by a kernel that can do without closed ones.
  if isinstance(model, VGG) and model.gating == "channel" and parts[-1].head is None:
    parts, kernel = _without_closed_features(parts, kernel)
  return FoldedNet(parts, (kernel, bias))


def _flat(model: nn.Module, variables: Mapping[str, Any] | None) -> dict[Path, np.ndarray]:
  """Returns the variables in float32, by path.

  Raises:
    ValueError: naming the first variable that the model does not have, lacks, or has in another
      shape.
  """
  if variables is not None:
    instance("variables", variables, Mapping, "a mapping with params and batch_stats")
  flat = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables or {})).items():
    if path[0] in ("params", "batch_stats"):
      flat[path] = np.asarray(leaf, np.float32)
  # The first kernel tells the number of channels of images, which the model does not know.
  first_path = ("layer1", "conv") if isinstance(model, VGG) else ("stem",)
  first = flat.get(("params", *first_path, "conv", "kernel"))
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
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(made))
  return {path: leaf.shape for path, leaf in flat.items()}


class _Rule(NamedTuple):
  """A condition on a setting of a model.

  Attributes:
    name, value: the setting.
    holds: whether it can be folded.
    wanted: the words that say when it can.
  """

  name: str
  value: Any
  holds: bool
  wanted: str


def check_foldable(model: Any, kinds: Sequence[type] = (ResNet, VGG)) -> None:
  """Raises ValueError unless a model is exactly of one of the kinds and can be folded."""
  # A subclass may have parts that would not be folded.
  if type(model) not in kinds:
    got = shown(model) if isinstance(model, type) else type(model).__name__
    raise ValueError(f"model must be {' or '.join(kind.__name__ for kind in kinds)}; got {got}")
  one_of("gating", model.gating, GATINGS)
  for rule in _rules_of(model):
    if not rule.holds:
      raise ValueError(f"the model's {rule.name} must be {rule.wanted}; got {rule.value!r}")


def _rules_of(model: ResNet | VGG) -> list[_Rule]:
  """Returns the conditions under which a model can be folded."""
  gate, gated = model.gate, model.gating != "none"
  rules = [
    _Rule(
      "gate context",
      gate.context,
      holds=not gated or gate.context in ("pooled", "none"),
      wanted="pooled or none, since other contexts are random",
    ),
    _Rule(
      "gate relaxation",
      gate.relaxation,
      holds=not gated or gate.context == "none" or gate.relaxation == "straight_through",
      wanted="straight_through for conditional gates, since only it gives exactly 0 or 1",
    ),
  ]
  if isinstance(model, ResNet):
    rules += [
      _Rule(
        "gate context",
        gate.context,
        holds=model.gating != "all_channels" or gate.context == "pooled",
        wanted="pooled if block outputs are gated",
      ),
      _Rule(
        "group_norm",
        model.group_norm,
        holds=not model.group_norm,
        wanted="False: GroupNorm cannot be folded",
      ),
      _Rule("convolution", model.convolution, holds=model.convolution == "full", wanted="full"),
    ]
  else:
    one_layer = "for one dense layer after the mean over pixels, as folded networks have"
    rules += [
      _Rule("hidden", model.hidden, holds=not model.hidden, wanted=f"() {one_layer}"),
      _Rule("pooled", model.pooled, holds=model.pooled == 1, wanted=f"1 {one_layer}"),
    ]
  return rules


def _resnet_parts(model: ResNet, flat: Mapping[Path, np.ndarray]) -> tuple[Part, ...]:
  """Folds the stem and the blocks of a residual network, in their order."""
  # The plan depends only on the number of axes, which is 4 for images.
  probe = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  stem_plan = model.stem_plan
  # The stride of images is the same along both sides.
  stem = fold_conv(flat, ("stem",), stride=stem_plan.stride[-1])
  parts: list[Part] = [Layer(stem, pool=stem_plan.pool)]
  channels = stem.bias.size
  for stage in model.plan(probe):
    for plan in stage.blocks:
      block = _block(
        model,
        flat,
        plan.name,
        channels=channels,
        stride=plan.stride,
        dilations=plan.dilations,
      )
      if block.project is None:
        channels += sum(block.pad[1:])
      else:
        channels = block.project.bias.size
      parts.append(block)
  return tuple(parts)


def _block(
  model: ResNet,
  flat: Mapping[Path, np.ndarray],
  name: str,
  *,
  channels: int,
  stride: int,
  dilations: tuple[int, int],
) -> Block:
  """Folds a residual block.

  Args:
    model: the network.
    flat: its variables, by path.
    name: of the block in the variables.
    channels: of its input.
    stride: of the block.
    dilations: of the first and of later convolutions with a window.
  """
  convs = _branch(flat, name, stride, dilations)
  if ("params", name, "project", "conv", "kernel") in flat:
    block = Block(convs, project=fold_conv(flat, (name, "project"), stride))
  else:
    # A shortcut without a projection is padded with zeros to the block's channels, half of them on
    # each side.
    missing = convs[-1].bias.size - channels
    block = Block(convs, pad=(stride, missing // 2, missing - missing // 2))
  groups = _block_groups(model, flat, name, convs)
  if not groups:
    return block
  if model.gate.context == "none":
    return _with_static_gates(model, block, _static_gates(model, flat, name, groups))
  return dataclasses.replace(
    block,
    head=_head(flat, name, groups),
    layer_gate=model.gating == "layer",
    output_gate=model.gating == "all_channels",
  )


def _branch(
  flat: Mapping[Path, np.ndarray], name: str, stride: int, dilations: tuple[int, int]
) -> tuple[Conv, ...]:
  """Folds the convolutions of a block's branch; arguments as in `_block`."""
  first, later = dilations
  # A bottleneck has a third convolution: 1 x 1, window, 1 x 1.
  if ("params", name, "conv3", "conv", "kernel") in flat:
    return (
      fold_conv(flat, (name, "conv1")),
      fold_conv(flat, (name, "conv2"), stride, first),
      fold_conv(flat, (name, "conv3")),
    )
  return (
    fold_conv(flat, (name, "conv1"), stride, first),
    fold_conv(flat, (name, "conv2"), dilation=later),
  )


def _block_groups(
  model: ResNet, flat: Mapping[Path, np.ndarray], name: str, convs: Sequence[Conv]
) -> tuple[Group, ...]:
  """Returns the groups of a block's gates; none without gates."""
  if model.gating == "layer":
    # Not every block of the network need have a gate.
    gated = any(path[1:3] == (name, GATE_NAME) for path in flat)
    return (Group(1),) if gated else ()
  gated_convs = {"none": (), "channel": convs[:-1], "all_channels": convs}[model.gating]
  return tuple(_group(model, conv.bias.size) for conv in gated_convs)


def _with_static_gates(model: ResNet, block: Block, gates: Sequence[np.ndarray]) -> Block:
  """Folds gates that look at no image into the convolutions of a block."""
  convs = list(block.convs)
  if model.gating == "layer":
    # The gate scales the last convolution; a closed one removes the branch.
    scale = float(gates[0][0])
    convs[-1] = _scaled(convs[-1], scale)
    return dataclasses.replace(block, convs=tuple(convs) if scale > 0 else ())
  # The channels they close go, in the kernel before and after.
  for i, scale in enumerate(gates):
    convs[i], convs[i + 1] = _scaled_away(convs[i], scale, convs[i + 1])
  return dataclasses.replace(block, convs=tuple(convs))


def _vgg_parts(model: VGG, flat: Mapping[Path, np.ndarray]) -> tuple[Layer, ...]:
  """Folds the layers of a VGG net, in their order."""
  layers = []
  for place, channels in enumerate(model.chain):
    if channels == POOL:
      continue
    conv = fold_conv(flat, (f"layer{len(layers) + 1}", "conv"), norm=model.norm)
    is_pooled = POOL in model.chain[place + 1 : place + 2]
    layers.append(Layer(conv, pool=_VGG_POOL if is_pooled else None))
  if model.gating == "channel":
    for i in range(len(layers)):
      _gate_layer(model, flat, layers, i)
  return tuple(layers)


def _gate_layer(model: VGG, flat: Mapping[Path, np.ndarray], layers: list[Layer], i: int) -> None:
  """Gives a layer its gates; where they look at no image, folds them into it and the next."""
  name, layer = f"layer{i + 1}", layers[i]
  groups = (_group(model, layer.conv.bias.size),)
  if model.gate.context != "none":
    layers[i] = dataclasses.replace(layer, head=_head(flat, name, groups))
    return
  (scale,) = _static_gates(model, flat, name, groups)
  if i + 1 < len(layers):
    conv, following = _scaled_away(layer.conv, scale, layers[i + 1].conv)
    layers[i + 1] = dataclasses.replace(layers[i + 1], conv=following)
  else:
    # The last layer's channels are the features: all stay, closed ones as zeros.
    conv = _scaled(layer.conv, scale)
  layers[i] = dataclasses.replace(layer, conv=conv)


def _without_closed_features(
  parts: tuple[Part, ...], classifier: jax.Array
) -> tuple[tuple[Part, ...], jax.Array]:
  """Removes the last layer's channels that are 0 for every input, also from the classifier.

  Static gates close such channels; no other convolution reads them.
  """
  *before, last = parts
  assert isinstance(last, Layer)  # as all parts of a VGG
  conv = last.conv
  closed = np.all(np.asarray(conv.kernel) == 0, axis=(0, 1, 2)) & (np.asarray(conv.bias) == 0)
  kept = _at_least_one(~closed)
  last = dataclasses.replace(last, conv=conv.select(outputs=kept))
  return (*before, last), classifier[kept]


def _group(model, channels: int) -> Group:
  """Returns the group of the gates of so many channels."""
  size = model.gate.channels_per_gate(channels)
  return Group(channels // size, size)


def fold_stages(
  model: ResNet, variables: Mapping[str, Any] | None
) -> tuple[list[tuple[Part, ...]], dict[Path, np.ndarray]]:
  """Returns the parts of each stage, the stem with the first, and the variables by path."""
  flat = _flat(model, variables)
  stem, *blocks = _resnet_parts(model, flat)
  stages, start = [], 0
  for count in model.blocks:
    stages.append(tuple(blocks[start : start + count]))
    start += count
  return [(stem, *stages[0]), *stages[1:]], flat


def fold_conv(
  flat: Mapping[Path, np.ndarray], path: Path, stride: int = 1, dilation: int = 1, norm: bool = True
) -> Conv:
  """Folds the BatchNorm of a `ConvNorm`, if any, into its convolution."""
  kernel = flat["params", *path, "conv", "kernel"]
  if not norm:
    bias = flat["params", *path, "conv", "bias"]
    return Conv(jnp.asarray(kernel), jnp.asarray(bias), stride, dilation)
  factor, bias = _norm(flat, (*path, "norm"))
  return Conv(jnp.asarray(kernel * factor), jnp.asarray(bias), stride, dilation)


def _norm(flat: Mapping[Path, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns BatchNorm in evaluation as a factor and a summand of each channel."""
  # y = x * factor + bias, with factor = scale / sqrt(var + eps) and bias = beta - mean * factor; in
  # float64, so that it is rounded once.

  def get(kind: str, name: str) -> np.ndarray:
    """Returns a value of the BatchNorm."""
    return flat[kind, *path, name].astype(np.float64)

  factor = get("params", "scale") / np.sqrt(get("batch_stats", "var") + _EPSILON)
  bias = get("params", "bias") - get("batch_stats", "mean") * factor
  return factor.astype(np.float32), bias.astype(np.float32)


def _head(flat: Mapping[Path, np.ndarray], name: str, groups: tuple[Group, ...]) -> Head:
  """Returns the gate network of a part."""
  path = (name, GATE_NAME, "head")
  # BatchNorm follows the first Dense layer, which has no bias of its own.
  factor, bias = _norm(flat, (*path, "norm"))
  return Head(
    hidden=jnp.asarray(flat["params", *path, "hidden", "kernel"] * factor),
    hidden_bias=jnp.asarray(bias),
    logits=jnp.asarray(flat["params", *path, "logits", "kernel"]),
    logits_bias=jnp.asarray(flat["params", *path, "logits", "bias"]),
    groups=groups,
  )


def _static_gates(
  model: ResNet | VGG, flat: Mapping[Path, np.ndarray], name: str, groups: tuple[Group, ...]
) -> list[np.ndarray]:
  """Returns the values of gates that look at no image, `[C]` for the channels of each group."""
  logits = jnp.asarray(flat["params", name, GATE_NAME, "logits"])
  if model.gate.relaxation == "hard_concrete":
    location = relaxations.hard_concrete_location(logits, model.gate.temperature)
    gates = relaxations.hard_concrete_mean(location)
  elif model.gate.relaxation == "sigmoid":
    gates = jax.nn.sigmoid(logits)
  else:
    gates = relaxations.threshold_gate(logits)
  # One array holds the gates of all groups in their order.
  found, start = [], 0
  for group in groups:
    own = np.asarray(gates)[start : start + group.gates]
    found.append(np.repeat(own, group.channels))
    start += group.gates
  return found


def _scaled(conv: Conv, scale: np.ndarray | float) -> Conv:
  """Multiplies the output channels of a convolution by `[O]` numbers, or by one number."""
  each = jnp.broadcast_to(jnp.asarray(scale, conv.bias.dtype), conv.bias.shape)
  return Conv(conv.kernel * each[None, None, None], conv.bias * each, conv.stride, conv.dilation)


def _scaled_away(writer: Conv, scale: np.ndarray, reader: Conv) -> tuple[Conv, Conv]:
  """Removes the channels between two convolutions that have scale 0, and scales the writer.

  ReLU and max pools commute with the scale, which is above 0 for the channels kept.
  """
  kept = _at_least_one(scale)
  return _scaled(writer, scale).select(outputs=kept), reader.select(inputs=kept)


def _at_least_one(scale: np.ndarray) -> np.ndarray:
  """Returns the indices of values other than 0; index 0 if there are none.

  A convolution keeps one channel, which its scale closes.
  """
  (kept,) = np.nonzero(scale)
  return kept if kept.size else np.arange(1)
