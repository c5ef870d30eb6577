"""Size of a model: parameters, gates and multiply-accumulates, found by tracing it once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gating_jax.checks import shown
from gating_jax.layers.gate import is_gate_path
from gating_jax.layers.mac_trace import Call, kernel_calls
from gating_jax.ops import arguments
from gating_jax.ops.macs import gated_macs
from gating_jax.types import GateRecord, Records


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
  """

  params: int
  gate_params: int
  gates: int
  macs: int
  gate_macs: int
  gated: int
  gate_layers: tuple[tuple[str, int], ...] = ()

  @property
  def fixed(self) -> int:
    """Returns the MACs per example that always run: the ungated part and the gate networks."""
    return self.macs - self.gated + self.gate_macs


def count(model: nn.Module, input_shape: Any) -> ModelCounts:
  """Counts the parameters, gates and MACs of a model.

  Every `nn.Conv`, `nn.Dense` and `nn.DenseGeneral` that the model calls is counted. Nothing is
  computed.

  Args:
    model: a module called as `model(x)` that returns `(y, records)`.
    input_shape: shape of one example: `(H, W, D)` of an image or `(F, H, W, D)` of a clip; or a
      tree of such tuples, for a model that takes a tree of arrays.

  Raises:
    TypeError: no module, one that returns something else, or a shape of another kind.

  >>> from gating_jax.models.resnet import resnet
  >>> count(resnet("resnet20", classes=10), (32, 32, 3)).macs
  40551040
  """
  calls, records, variables = _trace(model, input_shape)
  # Keyed by whether the path is that of a gate network.
  macs, params = {True: 0, False: 0}, {True: 0, False: 0}
  for call in calls:
    macs[is_gate_path(call.path)] += call.macs
  for path, leaf in traverse_util.flatten_dict(variables.get("params", {})).items():
    params[is_gate_path(path)] += math.prod(leaf.shape)
  return ModelCounts(
    params=params[False],
    gate_params=params[True],
    gates=sum(r.gates.shape[-1] for r in records),
    macs=macs[False],
    gate_macs=macs[True],
    # A network without gates has no records.
    gated=gated_macs(records) if records else 0,
    gate_layers=tuple(zip(layer_names(records), [r.gates.shape[-1] for r in records], strict=True)),
  )


def reduced_macs(model: nn.Module, input_shape: Any) -> int:
  """Counts the MACs of one example as if each convolution had a single input channel.

  Abati et al., 2020, table 2, count the SimpleCNN on MNIST like this; `count` has its true MACs.
  Gate networks and dense layers are not counted.

  >>> from gating_jax.models.vgg import vgg
  >>> reduced_macs(vgg("simple_cnn", 2), (28, 28, 1))
  926100
  """
  calls, *_ = _trace(model, input_shape)
  return sum(
    call.macs // call.inputs for call in calls if call.inputs and not is_gate_path(call.path)
  )


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


def _trace(model: nn.Module, input_shape: Any) -> tuple[list[Call], Records, Any]:
  """Returns the calls that multiply by kernels, and the records and variables as shapes."""
  arguments.instance("model", model, nn.Module, "a network, such as resnet('resnet20', classes=10)")
  # A shape is a tuple, which jax would take for a part of the tree.
  shapes = jax.tree.leaves(input_shape, is_leaf=lambda x: isinstance(x, tuple))
  # Without a tuple there are no leaves, and the input shape itself is at fault.
  for shape in shapes or [input_shape]:
    arguments.instance(
      "input_shape",
      shape,
      tuple,
      "a tuple of whole numbers, such as (32, 32, 3), or a tree of them",
    )
    for size in shape:
      arguments.whole_number("each of input_shape", size)

  def init(x):
    """Returns the records and variables of one forward pass on inputs x `[1, ...]`."""
    out, variables = model.init_with_output(jax.random.key(0), x)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], (tuple, list))):
      raise TypeError(f"model must return (y, records), as gated networks do; got {shown(out)}")
    return out[1], variables

  inputs = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    input_shape,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  # The trace is abstract: only shapes are computed.
  with kernel_calls() as calls:
    records, variables = jax.eval_shape(init, inputs)
  return calls, records, variables
