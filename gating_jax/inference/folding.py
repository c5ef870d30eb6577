"""Conversion of a Flax model and its variables to a `FoldedNet`.

Gates that look at no image are folded away: the channels they close are removed, and those they
leave are scaled by them. Closed features that a VGG net without a classifier ends with stay.
Of a `GatedModel` the layers of its pairs are folded; the rest is its own code.

What the logits z = W h + b of a gate network are moved by is folded into its last layer:

    z' = s (z - mean) / sqrt(var + eps) - theta - shift
    W' = W s / sqrt(var + eps),   b' = s (b - mean) / sqrt(var + eps) - theta - shift

Gates with a prior have s gain in place of s, and + prior. An open unit's weight, 2 sigmoid(z' +
shift), or 2 sigmoid(z' + shift + theta - prior) with a prior, is computed when the network runs.

Axes: D input channels, O output channels, U gates of a gate network.
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
from gating_jax.inference.folded import Block, Conv, FoldedNet, Glance, Group, Head, Layer, Part
from gating_jax.inference.grafting import ChainLayer, GraftedNet, check_arguments, find_chains
from gating_jax.layers.blocks import BIAS, GATINGS, KERNELS
from gating_jax.layers.context import GLANCE_NAME
from gating_jax.layers.gate import (
  GAIN,
  GATE_NAME,
  LOGITS,
  PRIOR,
  SHIFT,
  SHUT,
  THRESHOLD,
  GateSettings,
)
from gating_jax.layers.gated_model import GatedModel
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import POOL, VGG
from gating_jax.ops import relaxations
from gating_jax.ops.arguments import instance
from gating_jax.types import Path

_EPSILON = nn.BatchNorm.epsilon
_VGG_POOL = (2, 2, 0)


def fold(model: nn.Module, variables: Mapping[str, Any] | None, images: Any = None) -> FoldedNet:
  """Converts a network in evaluation, with the same outputs up to rounding, in float32.

  Args:
    model: a `ResNet` of images, a `VGG`, or a `GatedModel` of images whose pairs are Conv -
      BatchNorm - ReLU - Conv, the BatchNorm left out or not. Its gates are straight-through, and
      read the features, a glance or both; or they are the same for all images, unless the outputs
      of blocks are gated. They may be normalised and weighted, and have thresholds. Scales are
      taken as well.
    variables: its trained values, `params` and `batch_stats`; thresholds may have been moved by
      `shift_thresholds`. Of a `GatedModel` also what further collections the model reads.
    images: for a `GatedModel` alone: images such as those to come, `[N, H, W, D]`, or their shape
      as a `jax.ShapeDtypeStruct`. The network is for images of this height and width.
  Returns:
    A `FoldedNet`.
  Raises:
    ValueError: another model, gates that are never exactly closed, variables of another model, or
      pairs that cannot be folded, which the message names with the reason.
    TypeError: variables that are no mapping.

  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> len(net.parts), net.classifier[0].shape
  (1, (4, 3))
  """
  # Without boxes that say how values are partitioned over devices.
  variables = nn.meta.unbox(variables)
  if isinstance(model, GatedModel):
    return _graft(model, variables, images)
  check_foldable(model)
  assert isinstance(model, (ResNet, VGG))  # which has been checked
  flat = _flat(model, variables)
  parts = _vgg_parts(model, flat) if isinstance(model, VGG) else _resnet_parts(model, flat)
  glance = _glance(flat)
  if isinstance(model, ResNet) and not model.pool:
    return FoldedNet(parts, pooled=False, glance=glance)
  cells = model.pooled if isinstance(model, VGG) else 1
  if model.classes is None:
    return FoldedNet(parts, glance=glance, cells=cells)
  dense = []
  for name in model.dense_names if isinstance(model, VGG) else ("classifier",):
    kernel, bias = flat["params", name, "kernel"], flat["params", name, "bias"]
    dense.append((jnp.asarray(kernel), jnp.asarray(bias)))
  *hidden, classifier = dense
  net = FoldedNet(parts, classifier, glance=glance, hidden=tuple(hidden), cells=cells)
  # Only here are the last features read by a kernel that can do without closed ones.
  if isinstance(model, VGG) and model.gating == "channel" and parts[-1].head is None:
    net = _without_closed_features(net)
  return net


def _graft(model: GatedModel, variables: Mapping[str, Any] | None, images: Any) -> GraftedNet:
  """Folds the layers of a gated model's pairs; arguments as in `fold`."""
  shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
  if len(shape) != 4:
    raise ValueError(
      "images must be [N, H, W, D], or their shape, where the model is a GatedModel; got "
      f"{shown(images)}"
    )
  if not model.pairs:
    raise ValueError("the model's pairs must be at least one; got none")
  _check_rules(_gate_rules(model.gate))
  check_arguments(model.model)
  flat = _flat(model, variables, jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32))
  own = _without_gates(model, variables or {})
  _, height, width, channels = shape
  found = find_chains(model, own, (height, width, channels))
  parts: list[Part] = []
  for chain in found.chains:
    parts += _chain_parts(model, flat, chain)
  return GraftedNet(tuple(parts), pooled=False, variables=own, graft=found.graft)


def _without_gates(model: GatedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the variables of a gated model without those of its gates, as arrays."""
  gates = [(*writer.split("/"), GATE_NAME) for writer, _ in model.pairs]
  kept = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    if not any(path[1 : len(gate) + 1] == gate for gate in gates):
      kept[path] = jnp.asarray(leaf)
  return traverse_util.unflatten_dict(kept)


def _chain_parts(
  model: GatedModel, flat: Mapping[Path, np.ndarray], chain: Sequence[ChainLayer]
) -> list[Layer]:
  """Folds the convolutions of a chain; all but the last have gates, which the next one reads."""
  convs = [_chain_conv(flat, layer) for layer in chain]
  heads: list[Head | None] = [None] * len(chain)
  for i, layer in enumerate(chain[:-1]):
    # The channels that the model has, also where gates before have removed inputs.
    groups = (_group(model, convs[i].bias.size),)
    if model.gate.context == "none":
      (scale,) = _static_gates(model, flat, layer.path, groups=groups)
      convs[i], convs[i + 1] = _scaled_away(convs[i], scale, convs[i + 1])
    else:
      heads[i] = _head(model.gate, flat, layer.path, groups=groups)
  parts = []
  for i, (conv, head) in enumerate(zip(convs, heads, strict=True)):
    parts.append(Layer(conv, head, relu=i + 1 < len(convs)))
  return parts


def _chain_conv(flat: Mapping[Path, np.ndarray], layer: ChainLayer) -> Conv:
  """Folds the BatchNorm of a chain's layer, if any, into its convolution."""
  kernel = flat["params", *layer.path, "kernel"]
  bias = flat.get(("params", *layer.path, "bias"), np.zeros(kernel.shape[-1], np.float32))
  if layer.norm is not None:
    factor, shift = _norm(flat, layer.norm.path, layer.norm.epsilon)
    kernel, bias = kernel * factor, bias * factor + shift
  return Conv(
    jnp.asarray(kernel),
    jnp.asarray(bias),
    stride=layer.stride,
    dilation=layer.dilation,
    same=layer.same,
  )


def _flat(
  model: nn.Module, variables: Mapping[str, Any] | None, images: Any = None
) -> dict[Path, np.ndarray]:
  """Returns the variables in float32, by path; `images` as in `_shapes`.

  Raises:
    ValueError: naming the first variable that the model does not have, lacks, or has in another
      shape.
  """
  if variables is not None:
    instance("variables", variables, Mapping, rule="a mapping with params and batch_stats")
  flat = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables or {})).items():
    if path[0] in ("params", "batch_stats"):
      flat[path] = np.asarray(leaf, np.float32)
  if images is None:
    # The first kernel has the number of channels of images, which the model does not know.
    first_path = ("layer1", "conv") if isinstance(model, VGG) else ("stem",)
    first = flat.get(("params", *first_path, "conv", "kernel"))
    channels = 3 if first is None else first.shape[2]
    # Any size works from which the pools leave a pixel.
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  wanted = _shapes(model, images)
  for path in flat:
    # The model does not make it: `shift_thresholds` adds it next to a threshold.
    if path[-1] == SHIFT and (*path[:-1], THRESHOLD) in wanted:
      wanted[path] = ()
  for path in sorted(wanted.keys() | flat.keys()):
    got = flat[path].shape if path in flat else "none"
    if got != wanted.get(path, "none"):
      raise ValueError(
        f"variables must be those of the model, with {'/'.join(path)} of shape "
        f"{wanted.get(path, 'none')}; got {got}"
      )
  return flat


def _shapes(model: nn.Module, images: Any) -> dict[Path, tuple[int, ...]]:
  """Returns the shapes of a model's parameters and statistics, by path; `images` as a shape."""
  made = jax.eval_shape(lambda x: nn.meta.unbox(model.init(jax.random.key(0), x)), images)
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(made))
  shapes = {}
  for path, leaf in flat.items():
    if path[0] in ("params", "batch_stats"):
      shapes[path] = leaf.shape
  return shapes


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
  _check_rules(_rules_of(model))


def _check_rules(rules: Sequence[_Rule]) -> None:
  """Raises a ValueError that names the first condition which does not hold."""
  for rule in rules:
    if not rule.holds:
      raise ValueError(f"the model's {rule.name} must be {rule.wanted}; got {rule.value!r}")


def _gate_rules(gate: GateSettings) -> list[_Rule]:
  """Returns the conditions under which gates can be folded."""
  reads_images = bool(gate.parts) and "told" not in gate.parts
  return [
    _Rule(
      "gate context",
      gate.context,
      holds=gate.context == "none" or reads_images,
      wanted="pooled or another that reads images alone, or none",
    ),
    _Rule(
      "gate relaxation",
      gate.relaxation,
      holds=gate.context == "none" or gate.relaxation in ("straight_through", "scale"),
      wanted="straight_through for conditional gates, since only it gives exactly 0, or scale",
    ),
  ]


def _rules_of(model: ResNet | VGG) -> list[_Rule]:
  """Returns the conditions under which a model can be folded."""
  gate = model.gate
  rules = [
    _Rule(
      "gating",
      model.gating,
      holds=model.gating not in (BIAS, KERNELS),
      wanted="none or that of gates",
    ),
  ]
  if model.gating != "none":
    rules += _gate_rules(gate)
  if isinstance(model, ResNet):
    rules += [
      _Rule(
        "sources",
        model.sources,
        holds=not model.sources,
        wanted="0, since images with a number of their source cannot be folded yet",
      ),
      _Rule(
        "gate context",
        gate.context,
        holds=model.gating != "all_channels" or gate.context != "none",
        wanted="pooled or another that reads images if block outputs are gated",
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
    rules.append(
      _Rule(
        "max_map",
        model.max_map,
        holds=model.max_map is None,
        wanted="None, as of model.clone(max_map=None), since folded networks take larger maps",
      )
    )
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
  convs = _branch(flat, name, stride=stride, dilations=dilations)
  if ("params", name, "project", "conv", "kernel") in flat:
    block = Block(convs, project=fold_conv(flat, (name, "project"), stride))
  else:
    # A shortcut without a projection is padded with zeros to the block's channels, half of them on
    # each side.
    missing = convs[-1].bias.size - channels
    block = Block(convs, pad=(stride, missing // 2, missing - missing // 2))
  groups = _block_groups(model, flat, name, convs=convs)
  if not groups:
    return block
  if model.gate.context == "none":
    return _with_static_gates(model, block, _static_gates(model, flat, (name,), groups=groups))
  return dataclasses.replace(
    block,
    head=_head(model.gate, flat, (name,), groups=groups),
    layer_gate=model.gating == "layer",
    output_gate=model.gating == "all_channels",
  )


def _branch(
  flat: Mapping[Path, np.ndarray], name: str, stride: int, *, dilations: tuple[int, int]
) -> tuple[Conv, ...]:
  """Folds the convolutions of a block's branch; arguments as in `_block`."""
  first, later = dilations
  # A bottleneck has a third convolution: 1 x 1, window, 1 x 1.
  if ("params", name, "conv3", "conv", "kernel") in flat:
    return (
      fold_conv(flat, (name, "conv1")),
      fold_conv(flat, (name, "conv2"), stride=stride, dilation=first),
      fold_conv(flat, (name, "conv3")),
    )
  return (
    fold_conv(flat, (name, "conv1"), stride=stride, dilation=first),
    fold_conv(flat, (name, "conv2"), dilation=later),
  )


def _block_groups(
  model: ResNet, flat: Mapping[Path, np.ndarray], name: str, *, convs: Sequence[Conv]
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
      _gate_layer(model, flat, layers, i=i)
  return tuple(layers)


def _gate_layer(
  model: VGG, flat: Mapping[Path, np.ndarray], layers: list[Layer], *, i: int
) -> None:
  """Gives a layer its gates; where they look at no image, folds them into it and the next."""
  name, layer = f"layer{i + 1}", layers[i]
  groups = (_group(model, layer.conv.bias.size),)
  if model.gate.context != "none":
    layers[i] = dataclasses.replace(layer, head=_head(model.gate, flat, (name,), groups=groups))
    return
  (scale,) = _static_gates(model, flat, (name,), groups=groups)
  if i + 1 < len(layers):
    conv, following = _scaled_away(layer.conv, scale, layers[i + 1].conv)
    layers[i + 1] = dataclasses.replace(layers[i + 1], conv=following)
  else:
    # The last layer's channels are the features: all stay, closed ones as zeros.
    conv = _scaled(layer.conv, scale)
  layers[i] = dataclasses.replace(layer, conv=conv)


def _without_closed_features(net: FoldedNet) -> FoldedNet:
  """Removes the last layer's channels that are 0 for every input, also from its reader.

  Static gates close such channels; no other convolution reads them.
  """
  *before, last = net.parts
  assert isinstance(last, Layer)  # as all parts of a VGG
  conv = last.conv
  closed = np.all(np.asarray(conv.kernel) == 0, axis=(0, 1, 2)) & (np.asarray(conv.bias) == 0)
  kept = _at_least_one(~closed)
  last = dataclasses.replace(last, conv=conv.select(outputs=kept))
  return dataclasses.replace(net, parts=(*before, last)).select_features(kept)


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
  flat: Mapping[Path, np.ndarray],
  path: Path,
  stride: int = 1,
  *,
  dilation: int = 1,
  norm: bool = True,
) -> Conv:
  """Folds the BatchNorm of a `ConvNorm`, if any, into its convolution."""
  kernel = flat["params", *path, "conv", "kernel"]
  if not norm:
    bias = flat["params", *path, "conv", "bias"]
    return Conv(jnp.asarray(kernel), jnp.asarray(bias), stride=stride, dilation=dilation)
  factor, bias = _norm(flat, (*path, "norm"))
  return Conv(jnp.asarray(kernel * factor), jnp.asarray(bias), stride=stride, dilation=dilation)


def _norm(
  flat: Mapping[Path, np.ndarray], path: Path, epsilon: float = _EPSILON
) -> tuple[np.ndarray, np.ndarray]:
  """Returns BatchNorm in evaluation as a factor and a summand of each channel."""
  # y = x * factor + bias, with factor = scale / sqrt(var + eps) and bias = beta - mean * factor; in
  # float64, so that it is rounded once.

  def get(name: str, otherwise: float) -> np.ndarray:
    """Returns a parameter of the BatchNorm, which need not have it."""
    return flat.get(("params", *path, name), np.asarray(otherwise)).astype(np.float64)

  mean, var = (flat["batch_stats", *path, name].astype(np.float64) for name in ("mean", "var"))
  factor = get("scale", 1) / np.sqrt(var + epsilon)
  bias = get("bias", 0) - mean * factor
  return factor.astype(np.float32), bias.astype(np.float32)


def _glance(flat: Mapping[Path, np.ndarray]) -> Glance | None:
  """Returns the look at the whole image that gates read; None where they read none."""
  if ("params", GLANCE_NAME, "conv", "kernel") not in flat:
    return None
  return Glance(fold_conv(flat, (GLANCE_NAME,), stride=2))


def _head(
  gate: GateSettings, flat: Mapping[Path, np.ndarray], part: Path, groups: tuple[Group, ...]
) -> Head:
  """Returns the gate network of a part, by its path, with thresholds of its logits folded."""
  path = (*part, GATE_NAME, "head")
  # BatchNorm follows the first Dense layer, which has no bias of its own.
  factor, bias = _norm(flat, (*path, "norm"))
  kernel, logits_bias = _moved_logits(gate, flat, part)
  return Head(
    hidden=jnp.asarray(flat["params", *path, "hidden", "kernel"] * factor),
    hidden_bias=jnp.asarray(bias),
    logits=jnp.asarray(kernel),
    logits_bias=jnp.asarray(logits_bias),
    groups=groups,
    context=gate.parts,
    # Always there, so that networks of other shifts are of one shape, and share a program.
    shift=jnp.asarray(_weight_shift(gate, flat, part)) if gate.weighted else None,
    scales=not gate.decides,
  )


def _moved_logits(
  gate: GateSettings, flat: Mapping[Path, np.ndarray], part: Path
) -> tuple[np.ndarray, np.ndarray]:
  """Returns W' `[hidden, U]` and b' `[U]` of the equation, in float32."""
  path = ("params", *part, GATE_NAME, *LOGITS)
  kernel, bias = flat[*path, "kernel"], flat[*path, "bias"]
  # Gates that are shut permanently have this bias for all images, and are not normalised.
  shut = (bias == SHUT) & ~kernel.any(axis=0)
  # In float64, so that each number is rounded once.
  moved, moved_bias = kernel.astype(np.float64), bias.astype(np.float64)
  if gate.normalise:
    stats = ("batch_stats", *part, GATE_NAME, "normalised")
    factor = gate.normalise / np.sqrt(flat[*stats, "var"].astype(np.float64) + _EPSILON)
    moved, moved_bias = moved * factor, (moved_bias - flat[*stats, "mean"]) * factor
  if gate.prior:
    gain = flat["params", *part, GATE_NAME, GAIN].astype(np.float64)
    moved, moved_bias = moved * gain, moved_bias * gain
    moved_bias = moved_bias + flat["params", *part, GATE_NAME, PRIOR]
  moved_bias = moved_bias - _threshold(flat, part)
  moved_bias = np.where(shut, bias, moved_bias) - _shift(flat, part)
  return moved.astype(np.float32), moved_bias.astype(np.float32)


def _threshold(flat: Mapping[Path, np.ndarray], part: Path) -> np.ndarray:
  """Returns the threshold of the logits of a part's gates, a number; 0 without one."""
  return flat.get(("batch_stats", *part, GATE_NAME, THRESHOLD), np.zeros((), np.float32))


def _shift(flat: Mapping[Path, np.ndarray], part: Path) -> np.ndarray:
  """Returns what `shift_thresholds` has added to the threshold, a number; 0 if nothing."""
  return flat.get(("batch_stats", *part, GATE_NAME, SHIFT), np.zeros((), np.float32))


def _weight_shift(gate: GateSettings, flat: Mapping[Path, np.ndarray], part: Path) -> np.ndarray:
  """Returns what is added to the folded logits of open units for their weights, as in `Head`."""
  shift = _shift(flat, part)
  if not gate.prior:
    return shift
  return shift + _threshold(flat, part) - flat["params", *part, GATE_NAME, PRIOR]


def _static_gates(
  model: ResNet | VGG | GatedModel,
  flat: Mapping[Path, np.ndarray],
  part: Path,
  *,
  groups: tuple[Group, ...],
) -> list[np.ndarray]:
  """Returns the values of gates that look at no image, `[C]` for the channels of each group."""
  raw = flat["params", *part, GATE_NAME, "logits"]
  trained = jnp.asarray(np.where(raw == SHUT, raw, raw - _threshold(flat, part)))
  logits = trained - _shift(flat, part)
  if model.gate.relaxation == "hard_concrete":
    location = relaxations.hard_concrete_location(logits, temperature=model.gate.temperature)
    gates = relaxations.hard_concrete_mean(location)
  elif model.gate.relaxation == "sigmoid":
    gates = jax.nn.sigmoid(logits)
  else:
    gates = relaxations.threshold_gate(logits)
    if model.gate.weighted:
      gates = gates * (2 * jax.nn.sigmoid(trained))
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
  return dataclasses.replace(
    conv, kernel=conv.kernel * each[None, None, None], bias=conv.bias * each
  )


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
