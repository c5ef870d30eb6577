"""Size of a model for images or videos: parameters, gates and MACs, found by tracing it once.

A network for long videos is counted part by part, a progressive one column by column.

Axes: N examples, M videos, T segments, J columns before one, S columns.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.errors import FlaxError

from gating_jax.checks import first_line, shown
from gating_jax.layers.gate import is_gate_path
from gating_jax.layers.mac_trace import Call, kernel_calls, sum_macs
from gating_jax.models.columns import Column, output_shapes, trace_column
from gating_jax.models.timegate import SegmentNet
from gating_jax.names import former_keyword, former_positional
from gating_jax.ops import arguments
from gating_jax.ops.macs import conv_macs, dense_layer_macs, executed_macs, gated_macs
from gating_jax.types import Array, GateRecord, Path, Records, cached


@dataclasses.dataclass(frozen=True)
class ModelCounts:
  """Sizes of a model for one input.

  Attributes:
    params, gate_params: parameters of the network without its gate networks, and of its gate
      networks.
    gates: number of gated units.
    macs: multiply-accumulates per example of the network without its gate networks, with every gate
      open.
    gate_macs: multiply-accumulates per example of the gate networks.
    gated: the part of `macs` that gates can switch off.
    gate_layers: name and number of gates of each gated layer, in the order of the records.

  >>> counts = ModelCounts(params=9, gate_params=2, gates=8, macs=1000, gate_macs=50, gated=600)
  >>> counts.never_gated_macs, counts.always_macs
  (400, 450)
  """

  params: int
  gate_params: int
  gates: int
  macs: int
  gate_macs: int
  gated: int
  gate_layers: tuple[tuple[str, int], ...] = ()

  @property
  def never_gated_macs(self) -> int:
    """Returns the MACs per example of everything that is never gated, without gate networks."""
    return self.macs - self.gated

  @property
  def never_gated_fraction(self) -> float:
    """Returns `never_gated_macs` as a fraction of `macs`: what closing every gate leaves."""
    return self.never_gated_macs / self.macs

  @property
  def open_macs(self) -> int:
    """Returns the MACs per example with every gate open, gate networks included."""
    return self.macs + self.gate_macs

  @property
  def always_macs(self) -> int:
    """Returns the MACs per example that always run: the ungated part and the gate networks."""
    return self.never_gated_macs + self.gate_macs

  def per_example(self, records: Records, shape: tuple[int, ...], *, further: int = 0) -> Array:
    """Computes the MACs of each example of a forward pass, gate networks included.

    Args:
      records: those of the pass; empty for a network without gates.
      shape: of the result, with one entry for each example.
      further: MACs per example to add, of what is no part of the model, such as a head.
    """
    always = jnp.full(shape, float(self.always_macs + further))
    return always + executed_macs(records).reshape(shape) if records else always

  @former_positional("count")
  def of_results(self, results: Mapping[str, np.ndarray], *, count: int) -> np.ndarray:
    """Computes the MACs of each example, `[N]` float64, from the results of an evaluation.

    Args:
      results: for a network with gates `macs`, `[N]` of the gated units; float32 has too few digits
        for the sum.
      count: N.
    """
    if "macs" not in results:
      # Scales of channels have networks of their own; without any, these are the network's MACs.
      return np.full(count, float(self.open_macs))
    return self.always_macs + results["macs"].astype(np.float64)

  @property
  def fixed(self) -> int:
    """Returns `always_macs`, by its former name."""
    warnings.warn("fixed is now called always_macs", DeprecationWarning, stacklevel=2)
    return self.always_macs


def model_summary(model: nn.Module, input_shape: Any) -> ModelCounts:
  """Counts the parameters, gates and MACs of a model.

  Every `nn.Conv`, `nn.Dense` and `nn.DenseGeneral` that the model calls is counted. Nothing is
  computed.

  Args:
    model: a module called as `model(x)` that returns `(y, records)`.
    input_shape: shape of one example: `(H, W, D)` of an image or `(F, H, W, D)` of a clip; or a
      tree of such tuples, for a model that takes a tree of arrays. Without the axis of the batch:
      a model of clips would take its size for a number of frames.
  Returns:
    A `ModelCounts`.
  Raises:
    TypeError: no module, one that returns something else, or a shape of another kind.
    ValueError: a shape that the model does not take.

  >>> from gating_jax.models.resnets import resnet
  >>> model_summary(resnet("resnet20", classes=10), (32, 32, 3)).macs
  40551040
  """
  return _count(_trace(model, input_shape))


def _count(trace: _Trace) -> ModelCounts:
  """Returns the counts of a traced model."""
  # Keyed by whether the path is that of a gate network.
  params = {True: 0, False: 0}
  gate_macs = sum_macs(trace.calls, is_gate_path)
  leaves: dict[Path, Any] = traverse_util.flatten_dict(trace.variables.get("params", {}))
  for path, leaf in leaves.items():
    params[is_gate_path(path)] += math.prod(leaf.shape)
  gates = [record.gates.shape[-1] for record in trace.records]
  return ModelCounts(
    params=params[False],
    gate_params=params[True],
    gates=sum(gates),
    macs=sum_macs(trace.calls) - gate_macs,
    gate_macs=gate_macs,
    # A network without gates has no records.
    gated=gated_macs(trace.records) if trace.records else 0,
    gate_layers=tuple(zip(layer_names(trace.records), gates, strict=True)),
  )


@former_positional("macs")
def solve_share(model: nn.Module, input_shape: Any, *, macs: float) -> float:
  """Solves for the fraction s of open units at which an example costs this many MACs.

      macs = always + a s + b s^2

  Here every gated layer opens this fraction of its units, `always` are the MACs that always run,
  gate networks included, a those of all units alone and b those of all pairs of units of two layers
  one after the other. So a gated network is set against an ungated one of equal cost.

  Args:
    model: a network with gates; the fraction that its settings open does not matter.
    input_shape: as in `model_summary`.
    macs: multiply-accumulates per example, gate networks included.
  Returns:
    the fraction, in (0, 1].
  Raises:
    ValueError: no gates, MACs that no fraction in (0, 1] has, or a shape as in `model_summary`.
    TypeError: as in `model_summary`.

  >>> from gating_jax.models.resnets import resnet
  >>> narrow = model_summary(resnet("resnet8", 10, width=0.25), (8, 8, 3))
  >>> wide = resnet("resnet8", 10, width=0.25, inner_width=4, gating="channel")
  >>> print(f"{solve_share(wide, (8, 8, 3), macs=narrow.macs):.3f}")
  0.239
  """
  trace = _trace(model, input_shape)
  counts = _count(trace)
  if not counts.gates:
    raise ValueError("model must have gates; got one without")
  arguments.number("macs", macs, "> 0", holds=lambda v: v > 0)
  singles = 0
  for record in trace.records:
    singles += record.gates.shape[-1] * record.macs_per_unit
  pairs = counts.gated - singles
  # The root of the equation above, in the form that b = 0 leaves as it is.
  left = macs - counts.always_macs
  fraction = 2 * left / (singles + math.sqrt(max(singles**2 + 4 * pairs * left, 0.0)))
  if not 0 < fraction <= 1:
    most = counts.always_macs + counts.gated
    raise ValueError(
      f"macs must be above {counts.always_macs:,}, those that always run, and at most {most:,}, "
      f"those of every unit and the gate networks; got {macs:,.0f}"
    )
  return fraction


def reduced_macs(model: nn.Module, input_shape: Any) -> int:
  """Counts the MACs of one example as if each convolution had a single input channel.

  Abati et al., 2020, table 2, count the SimpleCNN on MNIST like this; `model_summary` has its true
  MACs. Gate networks and dense layers are not counted.

  >>> from gating_jax.models.vggs import vgg
  >>> reduced_macs(vgg("simple_cnn", 2), (28, 28, 1))
  926100
  """
  total = 0
  for call in _trace(model, input_shape).calls:
    if call.inputs and not is_gate_path(call.path):
      # The MACs of a convolution are in proportion to its input channels.
      total += call.macs // call.inputs
  return total


def layer_names(records: Sequence[GateRecord]) -> tuple[str, ...]:
  """Returns the name of each gated layer, as used in metrics, reports and files.

  A name is the path of the module whose outputs are gated. A layer whose record has no path, or a
  path that another layer has, is named `layer` and its index, from 0.
  """
  names = []
  for i, record in enumerate(records):
    # The last part of a path is the convolution or the gate itself; the layer is what holds it.
    path = record.writers[0] if record.writers else record.gate
    name = "/".join(path[:-1] or path)
    names.append(name if name and name not in names else f"layer{i:02d}")
  return tuple(names)


class _Trace(NamedTuple):
  """One forward pass: the calls that multiply by kernels; records and variables as shapes."""

  calls: list[Call]
  records: Records
  variables: Any


def _is_shape(node: Any) -> bool:
  """Returns whether a node is a shape: a tuple, which jax would take for a part of the tree."""
  return isinstance(node, tuple)


def _trace(model: nn.Module, input_shape: Any) -> _Trace:
  """Runs a model on shapes alone."""
  arguments.instance(
    "model", model, nn.Module, rule="a network, such as resnet('resnet20', classes=10)"
  )
  shapes = jax.tree.leaves(input_shape, is_leaf=_is_shape)
  rule = "a tuple of whole numbers, such as (32, 32, 3), or a tree of them"
  # Without a tuple there are no leaves, and the input shape itself is at fault.
  if isinstance(input_shape, list) and all(isinstance(size, int) for size in input_shape):
    raise TypeError(f"input_shape must be {rule}; got {shown(input_shape)}")
  for shape in shapes or [input_shape]:
    arguments.instance("input_shape", shape, tuple, rule=rule)
    for size in shape:
      arguments.whole_number("each of input_shape", size)

  def init(x):
    """Returns the records and variables of one forward pass on inputs x `[1, ...]`."""
    out, variables = model.init_with_output(jax.random.key(0), x)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], (tuple, list))):
      raise TypeError(f"model must return (y, records), as gated networks do; got {shown(out)}")
    # Without boxes that say how values are partitioned over devices.
    return out[1], nn.meta.unbox(variables)

  inputs = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    input_shape,
    is_leaf=_is_shape,
  )
  # The trace is abstract: only shapes are computed.
  with kernel_calls() as calls:
    try:
      records, variables = jax.eval_shape(init, inputs)
    except (TypeError, ValueError, FlaxError) as error:
      # Models name the shape of a whole batch, which the caller has not given.
      if "shape" not in str(error):
        raise
      raise ValueError(
        "input_shape must be that of one example which the model takes, without the axis of the "
        f"batch; got {input_shape}: {first_line(error)}"
      ) from error
  return _Trace(calls, records, variables)


# Counts of a light net that is not there.
NOTHING = ModelCounts(params=0, gate_params=0, gates=0, macs=0, gate_macs=0, gated=0)


@dataclasses.dataclass(frozen=True)
class VideoCounts:
  """Sizes of a `SegmentNet`.

  Attributes:
    segments: T.
    light, heavy: sizes of the two nets, for one segment.
    selector: MACs of the segment gate and of the light net's head, for a video of T segments.
    classifier: MACs of the classifier for a video.

  >>> heavy = ModelCounts(params=9, gate_params=0, gates=0, macs=100, gate_macs=0, gated=0)
  >>> VideoCounts(segments=4, light=NOTHING, heavy=heavy, selector=0, classifier=7).all_segments
  407
  """

  segments: int
  light: ModelCounts
  heavy: ModelCounts
  selector: int
  classifier: int

  @property
  def all_segments(self) -> int:
    """Returns the MACs without gating: the heavy net on all T segments and the classifier.

    Every channel is open. Gating is compared with this number.
    """
    return self.segments * self.heavy.macs + self.classifier

  def all_valid(self, valid: np.ndarray) -> float:
    """Returns the mean over videos of the MACs without gating on the valid segments, `[M, T]`.

    As `all_segments`, but the padding of shorter videos costs nothing.
    """
    return float(np.mean(np.sum(valid, axis=1))) * self.heavy.macs + self.classifier

  def per_video(self, gates: np.ndarray, valid: np.ndarray, heavy_macs: np.ndarray) -> np.ndarray:
    """Computes the MACs of each video, `[M]`.

    The light net and the selector run on all segments of a video, the heavy net on the chosen ones,
    and the classifier once.

    Args:
      gates: `[M, T]`; a segment is chosen where its gate is above 0.
      valid: `[M, T]` bool.
      heavy_macs: `[M, T]`, MACs of the heavy net on each segment.
    Raises:
      ValueError: gates or masks of another number of segments.
    """
    if np.shape(gates) != np.shape(valid) or np.shape(valid)[1:] != (self.segments,):
      raise ValueError(
        f"gates and valid must be [M, {self.segments}]; got {np.shape(gates)} and {np.shape(valid)}"
      )
    # The selector is counted for T segments; a shorter video pays for its own ones only.
    fraction = np.sum(valid, axis=1) / self.segments
    heavy = np.sum(np.where(gates > 0, heavy_macs, 0.0), axis=1)
    return fraction * (self.segments * self.light.macs + self.selector) + heavy + self.classifier

  @former_positional("taken")
  def computed(self, valid: np.ndarray, *, taken: float | None = None) -> float:
    """Computes the mean over videos of the MACs of programs that mask channels.

    The heavy net has every channel and its gate networks, and runs on padding and on segments that
    are not chosen, too.

    Args:
      valid: `[M, T]` bool.
      taken: segments per video that the heavy net runs on; None for all T.
    Raises:
      ValueError: as in `per_video`.
    """
    heavy = float(self.heavy.open_macs)
    every = np.ones(np.shape(valid))
    masked = float(self.per_video(every, valid, heavy * every).mean())
    return masked if taken is None else masked - (self.segments - taken) * heavy


@former_keyword("made_elsewhere", "precomputed")
def video_summary(
  model: SegmentNet,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  precomputed: tuple[int, int] = (0, 0),
) -> VideoCounts:
  """Counts the MACs and parameters of a network for long videos.

  Args:
    model: a network whose nets return `(features, records)`.
    shapes: shapes of a video's inputs: `heavy` `(T, ...)`, `valid` `(T,)` and, where there is a
      light net, `light`.
    precomputed: MACs per segment of making the light and the heavy net's inputs, where these are
      precomputed features.
  Returns:
    A `VideoCounts`.
  Raises:
    TypeError: another network, or a shape that is missing.

  >>> from gating_jax.models.video_backbones import FeaturePool
  >>> model = SegmentNet(classes=10, light=FeaturePool(), heavy=FeaturePool())
  >>> shapes = {"light": (6, 4), "heavy": (6, 4), "valid": (6,)}
  >>> video_summary(model, shapes, precomputed=(100, 1000)).heavy.macs
  1000
  """
  arguments.instance("model", model, SegmentNet, rule="a SegmentNet")
  arguments.instance("shapes", shapes, Mapping, rule="a mapping of names to shapes")
  for name in ("heavy", "valid", *(("light",) if model.light is not None else ())):
    arguments.instance(
      f"shapes[{name!r}]", shapes.get(name), tuple, rule="a tuple of whole numbers"
    )
  segments = shapes["valid"][0]
  heavy = model_summary(model.heavy.clone(parent=None), shapes["heavy"][1:])
  light = NOTHING
  if model.light is not None:
    light = model_summary(model.light.clone(parent=None), shapes["light"][1:])
  # A count is per entry of the first axis: per segment for both nets, per video for all else.
  whole = model_summary(model, dict(shapes))
  # Without light net and selector, the rest after the heavy net is the classifier.
  dense = model_summary(model.clone(selection="all", light=None, light_head=False), dict(shapes))
  classifier = dense.macs - heavy.macs
  gate_network = whole.gate_macs - heavy.gate_macs
  selector = gate_network + whole.macs - light.macs - heavy.macs - classifier
  if model.selection == "gate" and model.gate.context == "attention":
    # Products without a kernel: queries with keys, and weights with values.
    selector += 2 * segments**2 * model.gate.hidden
  light_before, heavy_before = precomputed
  return VideoCounts(
    segments=segments,
    light=dataclasses.replace(light, macs=light.macs + light_before),
    heavy=dataclasses.replace(heavy, macs=heavy.macs + heavy_before),
    selector=selector,
    classifier=classifier,
  )


class ColumnMacs(NamedTuple):
  """MACs per image of one column of a progressive network: of its layers and its dense layer."""

  layers: int
  head: int


@cached
def column_macs(column: Column, shape: tuple[int, int, int], columns_before: int) -> ColumnMacs:
  """Counts the MACs of a column that has `columns_before` columns before it.

  Multiplications by values known to be 0, those of the missing columns, are not counted.

  Args:
    column: the column.
    shape: `(H, W, D)` of an image.
    columns_before: J.
  """
  *inner, last = output_shapes(column, shape)
  j, before = columns_before, ()
  if j:
    before = [(j, 1, *h) for h in (*inner, last)]
  with kernel_calls() as calls:
    trace_column(column, shape, before)
  head = sum_macs(calls, _is_classifier)
  layers = sum_macs(calls) - head
  # The trace sees convolutions and dense layers. An adapter's V is an einsum, counted here: a 1x1
  # convolution of the J columns' channels.
  for height, width, channels in inner:
    layers += conv_macs((1, 1, j * channels, channels), (1, height, width, channels))
  # The classifier's adapter reads the mean of the last output.
  head += dense_layer_macs((j * last[-1], last[-1]))
  return ColumnMacs(layers, head)


def _is_classifier(path: Path) -> bool:
  return path == ("classifier",)


def columns_macs(
  column: Column, shape: tuple[int, int, int], seen: int
) -> tuple[np.ndarray, np.ndarray]:
  """Counts the MACs per image of a progressive network, by the task that an image belongs to.

  Args:
    column: one column.
    shape: `(H, W, D)` of an image.
    seen: S, the number of columns.
  Returns:
    `[S]` float32 MACs where the task is known, and one number where it is not.
  """
  # `[S, 2]`: the layers and the head of each column.
  macs = [column_macs(column, shape, j) for j in range(seen)]
  layers, heads = np.array(macs, np.float32).T
  # Column j needs the layers of all columns up to it, and its own head.
  return np.cumsum(layers) + heads, layers.sum() + heads.sum()
