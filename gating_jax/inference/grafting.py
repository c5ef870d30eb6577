"""Chains of a `GatedModel`'s pairs, which run inside of the model's own code.

In a chain the reader of each pair is the writer of the next:

    y_0 = x,   y_i = gates_i * ReLU(norm_i(conv_i(y_{i-1}))),   y_k = conv_k(y_{k-1})

These are the parts of a `GraftedNet`. The model's code runs as it stands until it calls the last
convolution of a chain. There it gets y_k, and continues with that. Nothing then reads what the
model itself has computed in between, and XLA leaves it out.

Axes: N images of H x W pixels and D channels.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from jax.ad_checkpoint import checkpoint_name

from gating_jax.checks import few
from gating_jax.inference.folded import FoldedNet, Shape
from gating_jax.layers.gated_model import LAYERS, GatedModel, check_pairs, mode_of
from gating_jax.layers.mac_trace import kernel_calls, sum_macs
from gating_jax.layers.pair_search import CALLS, find_pairs
from gating_jax.types import Array, Path

if TYPE_CHECKING:
  from flax.linen.module import InterceptorContext

# The marks of a call's input and output in a trace, with its number.
_READS, _WRITES = "gating_jax reads ", "gating_jax writes "
# Operations that leave a value as it is.
_UNCHANGED = ("name", "copy", "copy_p", "stop_gradient")


class Graft(NamedTuple):
  """A model, and where the parts of a network have their place in it.

  Attributes:
    model: the model, without gates.
    layers: path of the layer that each part stands for.
    starts: number of the first part of each chain, with the shape of its input.
    ends: number of the last part of each chain.
    image_shape: `(H, W, D)` of images.
    outer_macs: MACs of all other layers of the model.
  """

  model: nn.Module
  layers: tuple[Path, ...]
  starts: tuple[tuple[int, Shape], ...]
  ends: tuple[int, ...]
  image_shape: Shape
  outer_macs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GraftedNet(FoldedNet):
  """A gated model in evaluation: its parts are the layers of its pairs, the rest is its own code.

  Attributes:
    variables: of the model, without those of gates.
    graft: the model, and the places of the parts.
  """

  variables: Any = None
  graft: Graft | None = dataclasses.field(default=None, metadata={"static": True})

  def outputs(self, x: Array, run_part: Callable[[int, Array], Array]) -> Array:
    """Computes the outputs for images, each part by `run_part(its number, its input)`."""
    graft = self._graft
    places = {path: i for i, path in enumerate(graft.layers)}
    starts = dict(graft.starts)
    made: dict[int, Array] = {}

    def run_chain(
      next_fun: Callable[..., Any],
      args: tuple[Any, ...],
      kwargs: dict[str, Any],
      context: InterceptorContext,
    ) -> Any:
      """Calls a module's method, with the parts of a chain in place of its layers."""
      i = places.get(context.module.path)
      if i is None or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
      (x,) = args or (kwargs["inputs"],)
      # Later layers of a chain read what the part before has left open.
      made[i] = run_part(i, x if i in starts else made[i - 1])
      # The model's own layer is for whatever reads the first of a chain in addition to the pair.
      return made[i] if i in graft.ends else next_fun(x)

    mode: dict[str, Any] = {**mode_of(graft.model, train=False)}
    with nn.intercept_methods(run_chain):
      y: Any = graft.model.apply(self.variables, x, **mode)
    return y

  def starts(self, input_shape: Shape) -> dict[int, Shape]:
    """Returns the input shape of each part that does not read the output of the part before.

    Raises:
      ValueError: images of another shape than those that the network was folded for.
    """
    graft = self._graft
    if tuple(input_shape) != graft.image_shape:
      raise ValueError(
        f"images must have the shape {graft.image_shape}, for which the network was folded; got "
        f"{tuple(input_shape)}"
      )
    return dict(graft.starts)

  def check_channels(self, channels: int) -> None:
    """Raises ValueError unless the network takes images of `channels` channels."""
    wanted = self._graft.image_shape[2]
    if channels != wanted:
      raise ValueError(
        f"images must have {wanted} channels, as the network expects; got {channels}"
      )

  @property
  def has_classes(self) -> bool:
    """Returns True: the largest output counts as the answer, whatever it means to the model."""
    return True

  def outer_macs(self) -> int:
    """Returns the multiply-accumulates per example of the model's other layers."""
    return self._graft.outer_macs

  @property
  def _graft(self) -> Graft:
    """Returns the places of the parts."""
    assert self.graft is not None  # a default, since the base class has defaults
    return self.graft


class Norm(NamedTuple):
  """A BatchNorm after a convolution: its path, and its epsilon."""

  path: Path
  epsilon: float


class ChainLayer(NamedTuple):
  """A convolution of a chain.

  Attributes:
    path: of the layer.
    stride, dilation, same: as in `folded.Conv`.
    norm: the BatchNorm after it; None without one, and for the last of a chain.
  """

  path: Path
  stride: int
  dilation: int
  same: bool
  norm: Norm | None = None


class Chains(NamedTuple):
  """The chains of a model, and the places of their layers."""

  chains: tuple[tuple[ChainLayer, ...], ...]
  graft: Graft


def find_chains(model: GatedModel, variables: Mapping[str, Any], shape: Shape) -> Chains:
  """Finds the chains of a gated model, in a trace of the model without its gates.

  Args:
    model: the gated model.
    variables: of the model.
    shape: `(H, W, D)` of an image.
  Raises:
    ValueError: pairs that are not Conv - BatchNorm - ReLU - Conv on images, each with the
      reason; or a BatchNorm that does not use its running averages.
  """
  inner = model.model
  mode: dict[str, Any] = {**mode_of(inner, train=False)}
  calls = _Calls()

  def run(variables: Any, x: Any) -> Any:
    """Applies the model with marked layers."""
    with nn.intercept_methods(calls.mark):
      return inner.apply(variables, x, **mode)

  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  with kernel_calls() as kernels:
    trace = jax.make_jaxpr(run)(variables, image)
  inputs = [_Value("input") for _ in trace.jaxpr.invars]
  _values_of(trace.jaxpr, inputs, calls.marks)
  norms, readers = _norms_of(model, calls, image), check_pairs(model.pairs).readers
  chains, layers, starts, ends = [], [], [], []
  for first in calls.in_order(readers):
    # The others are reached from the first writer of their chain.
    if first in readers.values():
      continue
    starts.append((len(layers), calls.input_shape(first)))
    chain = []
    layer: str | None = first
    while layer is not None:
      chain.append(calls.chain_layer(layer, norms.get(layer)))
      layer = readers.get(layer)
    chains.append(tuple(chain))
    layers += [each.path for each in chain]
    ends.append(len(layers) - 1)
  outer = sum_macs(kernels, lambda path: path not in layers)
  graft = Graft(
    inner,
    tuple(layers),
    starts=tuple(starts),
    ends=tuple(ends),
    image_shape=shape,
    outer_macs=outer,
  )
  return Chains(tuple(chains), graft)


def check_arguments(model: nn.Module) -> None:
  """Raises a ValueError unless a model can be called with images and its mode alone."""
  names = inspect.signature(type(model).__call__).parameters
  kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  mode, needed = mode_of(model, train=False), []
  # Those after the model itself and its images.
  for other in list(names.values())[2:]:
    if other.default is other.empty and other.kind not in kinds and other.name not in mode:
      needed.append(other.name)
  if needed:
    raise ValueError(
      f"model must be called with images alone to be folded; {type(model).__name__} also needs "
      f"{few(needed)}"
    )


def _norms_of(model: GatedModel, calls: _Calls, image: Any) -> dict[str, Norm | None]:
  """Returns the BatchNorm after each writer, if any; arguments and errors as of `find_chains`."""
  readers, writers = check_pairs(model.pairs)
  found = find_pairs(model.model, image)
  refused, norms = [], {}
  for writer, reader in readers.items():
    try:
      norms[writer] = calls.norm_between(writer, reader)
      # Its own input is gated, so that the model's code alone does not know what it makes.
      if writer in writers and (writer, reader) not in found.pairs:
        why = found.refused.get(writer, f"{reader} is not what reads its channels")
        raise _DoesNotFit(f"{writer} reads for another pair, and {why}")
    except _DoesNotFit as error:
      refused.append(f"{writer}, {reader} ({error})")
  if refused:
    raise ValueError(
      "pairs must be Conv - BatchNorm - ReLU - Conv on images to be folded, the BatchNorm left out "
      f"or not; others are {few(refused)}"
    )
  return norms


class _DoesNotFit(Exception):
  """A pair that cannot be folded; its text is the reason."""


class _Call(NamedTuple):
  """A call of a layer in a trace.

  Attributes:
    number: of the call, in the marks of its input and output.
    module: the layer.
    shape: of its input, without N.
  """

  number: int
  module: nn.Module
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
  """A value of a trace: the operation that made it, with its parameters and its operands."""

  operation: str
  params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  operands: tuple[_Value, ...] = ()


class _Calls:
  """The calls of Conv, Dense and BatchNorm layers in a trace, in their order.

  Attributes:
    marks: marked values of the trace, by their marks.
  """

  def __init__(self):
    self.marks: dict[str, _Value] = {}
    self._calls: list[_Call] = []

  def mark(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
  ) -> Any:
    """Calls a module's method; marks the input and the output of a layer with a number."""
    module, number = context.module, len(self._calls)
    if not isinstance(module, (*LAYERS, nn.BatchNorm)) or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    keyword = "x" if isinstance(module, nn.BatchNorm) else "inputs"
    x, *others = args or (kwargs.pop(keyword),)
    if isinstance(module, nn.BatchNorm):
      _check_running(module, *others, **kwargs)
    self._calls.append(_Call(number, module, jnp.shape(x)[1:]))
    y = next_fun(checkpoint_name(x, f"{_READS}{number}"), *others, **kwargs)
    return checkpoint_name(y, f"{_WRITES}{number}")

  def in_order(self, names: Mapping[str, str]) -> list[str]:
    """Returns those of some layers that are called, in the order of the calls."""
    called = ["/".join(call.module.path) for call in self._calls]
    return [name for name in called if name in names]

  def input_shape(self, name: str) -> Shape:
    """Returns `(H, W, D)` of a convolution's input."""
    height, width, channels = self._call_of(name).shape
    return (height, width, channels)

  def chain_layer(self, name: str, norm: Norm | None) -> ChainLayer:
    """Returns a convolution of a chain."""
    return _conv_layer(self._call_of(name))._replace(norm=norm)

  def norm_between(self, writer: str, reader: str) -> Norm | None:
    """Returns the BatchNorm between the layers of a pair; None without one.

    Raises:
      _DoesNotFit: anything else is between them, or they are no convolutions of images.
    """
    first, second = self._call_of(writer), self._call_of(reader)
    for call in (first, second):
      _conv_layer(call)
    value = _unchanged(self._mark(_READS, second).operands[0])
    zeros = [operand for operand in value.operands if _is_zero(operand)]
    if value.operation != "max" or len(zeros) != 1:
      raise _DoesNotFit("the second does not read a ReLU")
    (value,) = [_unchanged(operand) for operand in value.operands if not _is_zero(operand)]
    if value is self._mark(_WRITES, first):
      return None
    for call in self._calls:
      module = call.module
      if not isinstance(module, nn.BatchNorm) or value is not self._mark(_WRITES, call):
        continue
      if _unchanged(self._mark(_READS, call).operands[0]) is self._mark(_WRITES, first):
        return _norm_of(module)
    raise _DoesNotFit("between the first and ReLU is something other than BatchNorm")

  def _call_of(self, name: str) -> _Call:
    """Returns the one call of a layer."""
    (found,) = [call for call in self._calls if "/".join(call.module.path) == name]
    return found

  def _mark(self, kind: str, call: _Call) -> _Value:
    """Returns the marked input or output of a call."""
    return self.marks[f"{kind}{call.number}"]


def _check_running(
  module: nn.BatchNorm, use_running_average: bool | None = None, **others: Any
) -> None:
  """Raises a ValueError unless a BatchNorm uses running averages; arguments as of its call."""
  mode = module.use_running_average if use_running_average is None else use_running_average
  if not mode:
    raise ValueError(
      "model must use the running averages of BatchNorm in evaluation to be folded; "
      f"{'/'.join(module.path)} has use_running_average={mode}"
    )


def _conv_layer(call: _Call) -> ChainLayer:
  """Returns a convolution as a layer of a chain.

  Raises:
    _DoesNotFit: it is none, or of another kind than a folded network has.
  """
  conv, name = call.module, "/".join(call.module.path)
  if type(conv) is not nn.Conv:
    raise _DoesNotFit(f"{name} is no nn.Conv")
  kernel = (conv.kernel_size,) if isinstance(conv.kernel_size, int) else tuple(conv.kernel_size)
  if len(call.shape) != 3 or len(kernel) != 2:
    raise _DoesNotFit(f"{name} is not over height and width")
  if conv.dtype not in (None, jnp.float32):
    raise _DoesNotFit(f"{name} computes in {np.dtype(conv.dtype).name}")
  is_whole = conv.feature_group_count == 1 and conv.mask is None
  if not is_whole or _pair(conv.input_dilation) != (1, 1):
    raise _DoesNotFit(f"{name} has groups, a mask or gaps in its input")
  strides, dilations = _pair(conv.strides), _pair(conv.kernel_dilation)
  if len({*strides}) != 1 or len({*dilations}) != 1:
    raise _DoesNotFit(f"{name} has other strides or dilations along height than along width")
  (stride, _), (dilation, _) = strides, dilations
  padding = canonicalize_padding(conv.padding, 2)
  is_odd = all(size % 2 for size in kernel)
  symmetric = [(size // 2 * dilation,) * 2 for size in kernel]
  if padding == "SAME":
    # With stride 1 both paddings are one, which all strategies know.
    return ChainLayer(conv.path, stride, dilation, same=stride != 1 or not is_odd)
  none = [(0, 0)] * 2
  pads = none if padding == "VALID" else padding
  if not (is_odd and pads == symmetric):
    raise _DoesNotFit(f"{name} has padding {conv.padding!r}")
  return ChainLayer(conv.path, stride, dilation, same=False)


def _pair(sizes: int | Sequence[int] | None) -> tuple[int, int]:
  """Returns a setting of a convolution along height and along width."""
  if sizes is None or isinstance(sizes, int):
    height = width = sizes or 1
  else:
    height, width = sizes
  return (height, width)


def _norm_of(module: nn.BatchNorm) -> Norm:
  """Returns a BatchNorm that can be folded."""
  if module.axis not in (-1, 3):
    raise _DoesNotFit("its BatchNorm has another axis than the last")
  return Norm(module.path, module.epsilon)


def _values_of(jaxpr: Any, inputs: Sequence[_Value], marks: dict[str, _Value]) -> list[_Value]:
  """Returns the results of a trace, given its inputs, and notes its marked values."""
  made = dict(zip(jaxpr.invars, inputs, strict=True))

  def value_of(variable: Any) -> _Value:
    """Returns the value of a variable; literals have no hash."""
    if hasattr(variable, "val"):
      return _Value("literal", {"value": variable.val})
    return made.get(variable) or _Value("constant")

  for equation in jaxpr.eqns:
    operands, name = tuple(map(value_of, equation.invars)), equation.primitive.name
    if name in CALLS:
      inner = equation.params[CALLS[name]]
      results = _values_of(getattr(inner, "jaxpr", inner), operands, marks)
    else:
      value = _Value(name, equation.params, operands)
      results = [value] * len(equation.outvars)
      if name == "name":
        marks[equation.params["name"]] = value
    made.update(zip(equation.outvars, results, strict=True))
  return [value_of(variable) for variable in jaxpr.outvars]


def _unchanged(value: _Value) -> _Value:
  """Returns where a value comes from, up to operations that change nothing."""
  while True:
    is_mark = value.operation == "name" and value.params["name"].startswith(_WRITES)
    to_float = value.operation == "convert_element_type" and (
      value.params["new_dtype"] == jnp.float32
    )
    if is_mark or not (to_float or value.operation in _UNCHANGED):
      return value
    value = value.operands[0]


def _is_zero(value: _Value) -> bool:
  """Returns whether a value is the number 0, perhaps broadcast."""
  if value.operation in ("broadcast_in_dim", "convert_element_type"):
    return _is_zero(value.operands[0])
  return (
    value.operation == "literal"
    and np.ndim(value.params["value"]) == 0
    and not (value.params["value"])
  )
