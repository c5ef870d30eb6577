"""Search for the pairs of layers that a `GatedModel` can gate, in a trace of the model.

The input and the output of every Conv and Dense layer are marked in the trace. From each output the
search follows the channels, operation by operation, to the layers that read them. A layer can be
gated where one other layer alone reads its channels, each in its place: nothing else may see them,
such as a shortcut, a second layer or the model's output. A dense layer may read a map that is
flattened, pixel by pixel: there the channels are in their places once for each pixel. Examples,
too, must keep their places, since the gates of one would otherwise switch the channels of another.

Axes: N examples, C channels of a layer.
Reference: Molchanov et al., "Importance estimation for neural network pruning", 2019, section 3
(which channels can be removed on their own).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
from flax.core import tracers
from jax.ad_checkpoint import checkpoint_name

from gating_jax.checks import few
from gating_jax.layers.gated_model import LAYERS, holds_channels, mode_of
from gating_jax.layers.mac_trace import uncounted
from gating_jax.ops import arguments

if TYPE_CHECKING:
  from flax.linen.module import InterceptorContext

# The marks of a layer's input and output in a trace.
_READS, _WRITES = "reads ", "writes "
# A reader's name for the result of the model.
_OUTPUT = "the model's output"
# Operations on each entry alone, which leave channels in their places.
_ELEMENTWISE = frozenset(
  """
  abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv
  erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
  nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient
  sub tan tanh xor
  """.split()  # noqa: SIM905
)
_REDUCTIONS = frozenset(
  ["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_and"]
)
_POOLS = frozenset(["reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window"])
# Operations that hold a whole trace, by the name of the parameter that has it.
CALLS = {
  "pjit": "jaxpr",
  "jit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
}


class FoundPairs(NamedTuple):
  """Pairs that can be gated, and why other layers cannot be writers.

  Attributes:
    pairs: `(writer, reader)` of each pair, as `GatedModel` takes them, in the order of the writers.
    refused: the reason, by the path of the layer.

  >>> found = FoundPairs(pairs=(("conv1", "conv2"),), refused={"conv2": "it is read last"})
  >>> [writer for writer, _ in found.pairs]
  ['conv1']
  """

  pairs: tuple[tuple[str, str], ...]
  refused: dict[str, str]


def find_pairs(model: nn.Module, x: Any, **kwargs: Any) -> FoundPairs:
  """Finds the pairs of a Flax Linen model that a `GatedModel` can gate.

  Nothing is computed: the model is traced in evaluation. A pair is proposed where each channel of
  the writer reaches one channel of one reader, of the same example, and nothing else. In a map that
  is flattened for a dense layer it reaches one channel for each pixel.

  Args:
    model: a model, called as `model(x)`; see `GatedModel`.
    x: an example batch, or its shape as a `jax.ShapeDtypeStruct`; `[N, ...]`, perhaps of one
      example.
    **kwargs: further arguments of the model.
  Returns:
    The pairs, and for each other Conv and Dense layer the reason.
  Raises:
    TypeError: `model` is no Linen module.

  >>> class Net(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     h = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
  ...     h = nn.relu(h + nn.Conv(8, (3, 3), name="conv2")(h))
  ...     h = nn.relu(nn.Conv(4, (3, 3), name="conv3")(h))
  ...     return nn.Dense(2, name="last")(h.mean((1, 2)))
  >>> found = find_pairs(Net(), jax.numpy.ones((1, 6, 6, 3)))
  >>> found.pairs
  (('conv3', 'last'),)
  >>> found.refused["conv1"]
  'it is read by conv2, conv3'
  """
  arguments.instance("model", model, nn.Module, rule="a Flax Linen module")
  mode = {**mode_of(model, train=False), **kwargs}
  # A model that is counted just now, as it begins, has its layers once.
  with uncounted():
    return _search(model, x, mode)


def _search(model: nn.Module, x: Any, mode: Mapping[str, Any]) -> FoundPairs:
  """Finds the pairs of a model that is called as `model(x, **mode)`."""
  calls = _Calls()
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **mode), x)

  def run(variables: Any, x: Any) -> Any:
    """Applies the model with marked layers."""
    calls.trace = tracers.current_trace()
    with nn.intercept_methods(calls.mark):
      return model.apply(variables, x, **mode)

  # Dropout is off in evaluation, so that no key is needed.
  trace = jax.make_jaxpr(run)(variables, x)
  search = _Search()
  results = search.follow(trace.jaxpr, [frozenset()] * len(trace.jaxpr.invars))
  for variable, flows in zip(trace.jaxpr.outvars, results, strict=True):
    for flow in flows:
      search.note(flow, _OUTPUT, len(variable.aval.shape))
  return calls.pairs(search)


class _Calls:
  """The calls of layers in a trace, marked there by their names.

  Attributes:
    trace: state of JAX's tracing outside of the model.
  """

  trace: Any

  def __init__(self):
    # Shapes of what each layer reads and makes, and the number of its calls.
    self._read: dict[str, tuple[int, ...]] = {}
    self._made: dict[str, tuple[int, ...]] = {}
    self._count: dict[str, int] = {}
    self._transformed: set[str] = set()

  def mark(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
  ) -> Any:
    """Calls a module's method; marks the input and the output of a layer with its path."""
    module = context.module
    if not isinstance(module, LAYERS) or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    layer = "/".join(module.path)
    x, *others = args or (kwargs.pop("inputs"),)
    y = next_fun(checkpoint_name(x, _READS + layer), *others, **kwargs)
    self._count[layer] = self._count.get(layer, 0) + 1
    self._read[layer], self._made[layer] = x.shape, y.shape
    if tracers.current_trace() != self.trace:
      self._transformed.add(layer)
    return checkpoint_name(y, _WRITES + layer)

  def pairs(self, search: _Search) -> FoundPairs:
    """Returns the pairs, from the readers that a search has found."""
    pairs, refused = [], {}
    for layer in self._made:
      reason = self._reason(layer, search)
      if reason:
        refused[layer] = reason
      else:
        (reader,) = search.readers[layer]
        pairs.append((layer, reader))
    return FoundPairs(tuple(pairs), refused)

  def _reason(self, layer: str, search: _Search) -> str:
    """Returns why a layer cannot be a writer; empty if it can."""
    if layer in self._transformed:
      return "it is inside nn.scan, nn.remat, nn.vmap or nn.jit"
    if self._count[layer] > 1:
      return f"it is called {self._count[layer]} times"
    if layer in search.lost:
      return f"its channels go through {search.lost[layer]}, which the search does not follow"
    readers = sorted(search.readers.get(layer, ()))
    if readers == [_OUTPUT]:
      return f"it makes {_OUTPUT}"
    if len(readers) != 1:
      return f"it is read by {few(readers, 5) or 'no layer'}"
    (reader,) = readers
    if self._count[reader] > 1:
      return f"its reader {reader} is called {self._count[reader]} times"
    if reader in self._transformed:
      return f"its reader {reader} is inside nn.scan, nn.remat, nn.vmap or nn.jit"
    made, read = self._made[layer], self._read[reader]
    if search.misaligned.get(layer) or not holds_channels(read, made):
      return f"its channels are mixed, or not the last axis of what {reader} reads"
    # A value with one axis has no examples.
    if made[:-1][:1] != read[:-1][:1]:
      return f"{reader} reads another number of examples"
    if search.moved.get(layer):
      return f"examples are mixed, or change their places, before {reader} reads them"
    if len(search.sources[reader]) > 1:
      return f"{reader} reads channels of {few(sorted(search.sources[reader]), 5)} as a sum"
    return ""


@dataclasses.dataclass(frozen=True)
class _Flow:
  """Channels of a layer in a value of the trace.

  Attributes:
    writer: the layer.
    channels: number of them.
    axis: the axis of the value along which they are, in their order, perhaps again and again; None
      where they are mixed.
    examples: the axis along which the examples are, in their order, perhaps with pixels after each;
      None where they are mixed, or others stand in their places.
    count: number of examples.
  """

  writer: str
  channels: int
  axis: int | None
  examples: int | None
  count: int


# The channels in a value, of any number of layers.
_Flows = frozenset[_Flow]


class _Search:
  """Follows the channels of layers through a trace.

  Attributes:
    readers: layers that read the channels of a writer, by the writer.
    sources: writers whose channels a layer reads, by the reader.
    misaligned: whether a reader of a writer finds its channels elsewhere than on the last axis.
    moved: whether a reader of a writer finds its examples elsewhere than on the first axis.
    lost: the first operation, for a writer, that could not be followed.
  """

  def __init__(self):
    self.readers: dict[str, set[str]] = {}
    self.sources: dict[str, set[str]] = {}
    self.misaligned: dict[str, bool] = {}
    self.moved: dict[str, bool] = {}
    self.lost: dict[str, str] = {}

  def note(self, flow: _Flow, reader: str, rank: int) -> None:
    """Notes that the channels of a layer are read, in a value of so many axes."""
    writer = flow.writer
    self.readers.setdefault(writer, set()).add(reader)
    self.sources.setdefault(reader, set()).add(writer)
    aligned, in_place = flow.axis == rank - 1, flow.examples == 0
    self.misaligned[writer] = self.misaligned.get(writer, False) or not aligned
    self.moved[writer] = self.moved.get(writer, False) or not in_place

  def follow(self, jaxpr: Any, inputs: Sequence[_Flows]) -> list[_Flows]:
    """Returns the channels in the results of a trace, given those in its inputs."""
    found: dict[Any, _Flows] = {}
    # Literals and constants hold no channels.
    for variable, flows in zip(jaxpr.invars, inputs, strict=True):
      found[variable] = flows

    def flows_of(variable: Any) -> _Flows:
      """Returns the channels in a variable; literals have no hash."""
      return frozenset() if hasattr(variable, "val") else found.get(variable, frozenset())

    for equation in jaxpr.eqns:
      results = self._step(equation, [flows_of(variable) for variable in equation.invars])
      for variable, flows in zip(equation.outvars, results, strict=True):
        found[variable] = flows
    return [flows_of(variable) for variable in jaxpr.outvars]

  def _step(self, equation: Any, inputs: list[_Flows]) -> list[_Flows]:
    """Returns the channels in the results of one operation."""
    name, outputs = equation.primitive.name, len(equation.outvars)
    if name == "name":
      return [self._mark(equation, inputs[0])]
    # Also without channels in its inputs: a nested trace may hold marks.
    if name in CALLS:
      inner = equation.params[CALLS[name]]
      return self.follow(getattr(inner, "jaxpr", inner), inputs)
    flows = []
    for place, incoming in enumerate(inputs):
      for flow in incoming:
        flows.append(self._moved(equation, place, flow))
    return [frozenset(flows)] * outputs

  def _mark(self, equation: Any, flows: _Flows) -> _Flows:
    """Returns the channels after a mark: a reader ends those that it reads, a writer begins its."""
    mark, shape = equation.params["name"], equation.outvars[0].aval.shape
    rank = len(shape)
    if mark.startswith(_READS):
      for flow in flows:
        self.note(flow, mark.removeprefix(_READS), rank)
      return frozenset()
    if mark.startswith(_WRITES):
      # A value without examples has none to move.
      count = shape[0] if rank > 1 and shape[0] != 0 else 1
      return frozenset(
        [_Flow(mark.removeprefix(_WRITES), shape[-1], axis=rank - 1, examples=0, count=count)]
      )
    # A name that the model itself gave.
    return flows

  def _moved(self, equation: Any, place: int, flow: _Flow) -> _Flow:
    """Returns the channels of a layer after an operation on one of its operands."""
    name, params = equation.primitive.name, equation.params
    shape = equation.invars[place].aval.shape
    result = equation.outvars[0].aval.shape
    if name in _ELEMENTWISE:
      return flow
    axis, examples = flow.axis, flow.examples
    if name == "reshape":
      if axis is not None:
        axis = _channels_after_reshape(axis, shape, result, channels=flow.channels)
      if examples is not None:
        examples = _examples_after_reshape(examples, shape, result, count=flow.count)
      return dataclasses.replace(flow, axis=axis, examples=examples)
    move = _MOVES.get(name)
    if move is None:
      if axis is not None:
        self.lost.setdefault(flow.writer, name)
      return dataclasses.replace(flow, axis=None, examples=None)
    if axis is not None:
      axis = move(axis, params, shape, result)
    if examples is not None:
      examples = move(examples, params, shape, result)
    return dataclasses.replace(flow, axis=axis, examples=examples)


# Where an axis is after an operation: `(axis, params, shape, shape of the result)` to the axis or
# None. Each keeps the order of the channels along the axis.


def _after_transpose(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns the place of an axis in a permutation."""
  return tuple(params["permutation"]).index(axis)


def _after_broadcast(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns the axis of the larger array that an axis becomes."""
  place = params["broadcast_dimensions"][axis]
  return place if result[place] == shape[axis] else None


def _channels_after_reshape(axis: int, shape: Any, result: Any, *, channels: int) -> int | None:
  """Returns the axis of channels, which axes before it may have joined, or left again."""
  after = _product(shape[axis + 1 :])
  places = []
  for place, size in enumerate(result):
    if _product(result[place + 1 :]) == after and size % channels == 0:
      # Of axes of length 1 around it, the one with the length that it had.
      places.append((size == shape[axis], place))
  return max(places)[1] if places else None


def _examples_after_reshape(axis: int, shape: Any, result: Any, *, count: int) -> int | None:
  """Returns the axis of examples, which may be joined with the axes after it, or parted again."""
  before = _product(shape[:axis])
  for place, size in enumerate(result):
    if _product(result[:place]) == before and size % count == 0:
      return place
  return None


def _after_squeeze(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis without those of length 1 before it."""
  gone = params["dimensions"]
  return None if axis in gone else axis - sum(1 for other in gone if other < axis)


def _after_reduction(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis without those over which values are summed, or the like."""
  gone = params["axes"]
  return None if axis in gone else axis - sum(1 for other in gone if other < axis)


def _after_pool(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis along which the windows have one entry."""
  return axis if params["window_dimensions"][axis] == 1 and result[axis] == shape[axis] else None


def _after_pad(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis to which nothing is added, and from which nothing is taken."""
  return axis if tuple(params["padding_config"][axis]) == (0, 0, 0) else None


def _after_part(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis that slicing or joining leaves as it is."""
  return axis if result[axis] == shape[axis] else None


def _after_reverse(axis: int, params: Mapping[str, Any], shape: Any, result: Any) -> int | None:
  """Returns an axis that is not reversed."""
  return None if axis in params["dimensions"] else axis


def _product(sizes: Sequence[int]) -> int:
  """Returns the product of sizes, which may be symbolic."""
  product = 1
  for size in sizes:
    product *= size
  return product


_MOVES: dict[str, Callable[[int, Mapping[str, Any], Any, Any], int | None]] = {
  "transpose": _after_transpose,
  "broadcast_in_dim": _after_broadcast,
  "squeeze": _after_squeeze,
  "pad": _after_pad,
  "slice": _after_part,
  "dynamic_slice": _after_part,
  "concatenate": _after_part,
  "rev": _after_reverse,
  **dict.fromkeys(_REDUCTIONS, _after_reduction),
  **dict.fromkeys(_POOLS, _after_pool),
}
