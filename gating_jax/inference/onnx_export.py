"""A folded network as an ONNX model: gates inside, closed channels multiplied by 0.

    images [N, H, W, D] float32  ->  outputs, and the logits of each group of gates

N may be any number from 1 on. Maps have their channels before their pixels inside, as ONNX asks.

Axes: N images, H and W pixels, D input channels, U gates of a group, C channels, S rows and columns
of a grid.
Reference: the operators of ONNX, version 17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.checks import first_line, shown
from gating_jax.cores import usable_cores
from gating_jax.extras import naming_extra
from gating_jax.inference.compiled import check_image_shape, check_images
from gating_jax.inference.folded import Block, Conv, FoldedNet, Group, Head, Layer, Part
from gating_jax.inference.grafting import GraftedNet
from gating_jax.inference.quantising import check_float
from gating_jax.layers.context import (
  GRID,
  LEAST_DEVIATION,
  LEAST_VARIANCE,
  THUMBNAIL,
  cell_weights,
)
from gating_jax.ops import arguments

# Versions of operators and of the file that runtimes of 2022 read.
_OPSET, _FILE_VERSION = 17, 8
# Pixels of a map, its last two axes.
_PIXELS = [2, 3]
_INPUT, _OUTPUT = "images", "outputs"


@naming_extra()
def to_onnx(net: FoldedNet, input_shape: tuple[int, int, int]) -> bytes:
  """Returns a folded network as an ONNX model, which `onnxruntime` and others run.

  Its input is `images`, `[N, H, W, D]` float32, for any N. Its outputs are `outputs`, as of
  `fold`'s network, and `gate_logits_0`, `gate_logits_1` and so on, `[N, U]`, in the order of the
  groups. It computes every channel, and multiplies by the gates.

  Args:
    net: a network of `fold` or `prune`, float32, of a `ResNet` or a `VGG`.
    input_shape: `(H, W, D)`.
  Raises:
    TypeError: `net` is no folded network.
    ValueError: `net` is that of a `GatedModel`, whose other layers are known to JAX alone; it has
      int8 kernels; or images of this shape do not fit.
    ModuleNotFoundError: the package `onnx` is not installed.

  >>> import jax, jax.numpy as jnp
  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,), gating="channel"), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> data = to_onnx(net, (6, 6, 1))
  >>> type(data)
  <class 'bytes'>
  """
  import onnx

  arguments.instance("net", net, FoldedNet, rule="a folded network, as of fold(model, variables)")
  if isinstance(net, GraftedNet):
    raise ValueError(
      "net must be of a ResNet or a VGG; the other layers of a GatedModel are code for JAX. Export "
      "it by export_model"
    )
  check_float(net)
  height, width, channels = check_image_shape(input_shape)
  net.check_channels(channels)
  graph = _Graph()
  x = _Map(graph.add("Transpose", _INPUT, perm=[0, 3, 1, 2]), channels, height=height, width=width)
  shared = {} if net.glance is None else {"glance": _glance(graph, net.glance.conv, x)}
  logits: list[str] = []
  for part in net.parts:
    x = _part(graph, part, x, shared=shared, logits=logits)
  outputs = _outputs(graph, net, x)
  return _serialise(
    onnx, graph, outputs, logits=logits, input_shape=(height, width, channels), net=net
  )


@naming_extra()
def load_onnx(data: bytes) -> Callable[[Any], tuple[np.ndarray, tuple[np.ndarray, ...]]]:
  """Returns a function that runs a model of `to_onnx` in onnxruntime, on the processor.

  It maps images `[N, H, W, D]` to `(outputs, gate logits of each group)`, as a folded network does.
  It takes as many threads as the process may use processors.

  Args:
    data: the content of an ONNX file, bytes.
  Raises:
    TypeError: `data` is of another type than bytes; the path of a file, for example.
    ValueError: it holds no such model. The function raises it for images of another shape than the
      model takes, or in integers.
    ModuleNotFoundError: the package `onnxruntime` is not installed.

  >>> import jax, jax.numpy as jnp
  >>> from gating_jax.inference.folding import fold
  >>> from gating_jax.models.vggs import VGG
  >>> model, x = VGG(classes=3, chain=(4,)), jnp.ones((2, 6, 6, 1))
  >>> net = fold(model, model.init(jax.random.key(0), x))
  >>> outputs, gate_logits = load_onnx(to_onnx(net, (6, 6, 1)))(x)
  >>> outputs.shape, gate_logits
  ((2, 3), ())
  """
  import onnxruntime

  rule = "the bytes of a model, as of to_onnx(net, input_shape)"
  arguments.instance("data", data, bytes, rule=rule)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = usable_cores()
  # Otherwise its threads keep spinning and slow down whatever runs next.
  options.add_session_config_entry("session.force_spinning_stop", "1")
  try:
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
  # onnxruntime raises errors of many types, which have no common one.
  except Exception as error:
    reason = first_line(error)
    raise ValueError(f"data must be {rule}; onnxruntime cannot read it: {reason}") from None
  inputs = {each.name: each.shape for each in session.get_inputs()}
  if inputs.keys() != {_INPUT}:
    raise ValueError(f"data must be {rule}; it takes {', '.join(inputs)}")
  # The first is the number of images.
  shape = inputs[_INPUT][1:]

  def run(images: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Computes the outputs and the gate logits."""
    x = np.asarray(check_images("images", images, shape))
    results: list[Any] = list(session.run(None, {_INPUT: x}))
    outputs, *logits = results
    return outputs, tuple(logits)

  return run


class _Map(NamedTuple):
  """A feature map of a graph, `[N, channels, height, width]`."""

  name: str
  channels: int
  height: int
  width: int


class _Graph:
  """Operations in their order, and the arrays that they read."""

  def __init__(self):
    self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
    self.arrays: dict[str, np.ndarray] = {}

  def add(self, kind: str, *inputs: Any, **settings: Any) -> str:
    """Adds an operation with one result, which it names; inputs are names or arrays."""
    (name,) = self.add_many(kind, 1, *inputs, **settings)
    return name

  def add_many(self, kind: str, results: int, *inputs: Any, **settings: Any) -> list[str]:
    """Adds an operation with several results."""
    read = [value if isinstance(value, str) else self.hold(value) for value in inputs]
    names = [f"v{len(self.nodes)}_{i}" for i in range(results)]
    self.nodes.append((kind, read, names, settings))
    return names

  def hold(self, array: Any) -> str:
    """Returns the name of a new array of the graph."""
    name = f"w{len(self.arrays)}"
    self.arrays[name] = np.ascontiguousarray(array)
    return name


def _number(value: float) -> np.ndarray:
  """Returns a float32 scalar."""
  return np.asarray(value, np.float32)


def _integers(*values: int) -> np.ndarray:
  """Returns the int64 list that operators take for sizes and axes."""
  return np.asarray(values, np.int64)


def _part(graph: _Graph, part: Part, x: _Map, *, shared: dict[str, str], logits: list[str]) -> _Map:
  """Adds a part with its gates; their logits are appended to `logits`."""
  masks, output_mask = [], None
  if part.head is not None:
    groups = part.head.groups
    found = _head(graph, part.head, x, shared=shared)
    # Scales decide on nothing.
    logits += found if part.groups else []
    for group, of_group, shift in zip(groups, found, part.head.shifts(), strict=True):
      gates = _gates(graph, of_group, shift, scales=part.head.scales)
      masks.append(graph.add("Unsqueeze", _expand(graph, group, gates), _integers(*_PIXELS)))
    if part.output_gate:
      output_mask = masks.pop()
  y = (
    _layer(graph, part, x, masks=masks)
    if isinstance(part, Layer)
    else _block(graph, part, x, masks=masks)
  )
  return y if output_mask is None else y._replace(name=graph.add("Mul", y.name, output_mask))


def _layer(graph: _Graph, layer: Layer, x: _Map, *, masks: Sequence[str]) -> _Map:
  """Adds a convolution, with ReLU, pool and gates where it has them."""
  y = _conv(graph, layer.conv, x)
  if layer.relu:
    y = y._replace(name=graph.add("Relu", y.name))
  if layer.pool is not None:
    window, stride, pad = layer.pool
    name = graph.add(
      "MaxPool", y.name, kernel_shape=[window] * 2, strides=[stride] * 2, pads=[pad] * 4
    )
    height = (y.height + 2 * pad - window) // stride + 1
    y = _Map(name, y.channels, height=height, width=(y.width + 2 * pad - window) // stride + 1)
  return y._replace(name=graph.add("Mul", y.name, masks[0])) if masks else y


def _block(graph: _Graph, block: Block, x: _Map, masks: Sequence[str]) -> _Map:
  """Adds a residual block."""
  y = _shortcut(graph, block, x)
  # A branch that never runs leaves the shortcut alone.
  if block.convs:
    first, *rest = block.convs
    h = _conv(graph, first, x)
    for i, conv in enumerate(rest):
      inside = graph.add("Relu", h.name)
      if masks and not block.layer_gate:
        inside = graph.add("Mul", inside, masks[i])
      h = _conv(graph, conv, h._replace(name=inside))
    branch = graph.add("Mul", h.name, masks[0]) if masks and block.layer_gate else h.name
    y = y._replace(name=graph.add("Add", branch, y.name))
  return y._replace(name=graph.add("Relu", y.name))


def _shortcut(graph: _Graph, block: Block, x: _Map) -> _Map:
  """Adds the shortcut of a block."""
  if block.project is not None:
    return _conv(graph, block.project, x)
  stride, before, after = block.pad
  if stride > 1:
    # Every `stride`-th pixel, from the first on.
    ends, steps = _integers(x.height, x.width), _integers(stride, stride)
    name = graph.add("Slice", x.name, _integers(0, 0), ends, _integers(*_PIXELS), steps)
    x = _Map(name, x.channels, height=-(-x.height // stride), width=-(-x.width // stride))
  if before or after:
    pads = _integers(0, before, 0, 0, 0, after, 0, 0)
    x = x._replace(name=graph.add("Pad", x.name, pads), channels=before + x.channels + after)
  return x


def _conv(graph: _Graph, conv: Conv, x: _Map) -> _Map:
  """Adds a convolution with its bias."""
  *window, _, outputs = conv.kernel.shape
  sizes, starts, ends = [], [], []
  for size, length in zip((x.height, x.width), window, strict=True):
    reach = (length - 1) * conv.dilation + 1
    before = after = length // 2 * conv.dilation
    if conv.same:
      # XLA's "SAME": the pixel more, if any, comes after.
      padding = max((-(-size // conv.stride) - 1) * conv.stride + reach - size, 0)
      before, after = padding // 2, padding - padding // 2
    starts.append(before)
    ends.append(after)
    sizes.append((size + before + after - reach) // conv.stride + 1)
  name = graph.add(
    "Conv",
    x.name,
    np.asarray(conv.kernel, np.float32).transpose(3, 2, 0, 1),
    np.asarray(conv.bias, np.float32),
    kernel_shape=list(window),
    strides=[conv.stride] * 2,
    dilations=[conv.dilation] * 2,
    pads=[*starts, *ends],
  )
  return _Map(name, outputs, *sizes)


def _head(graph: _Graph, head: Head, x: _Map, shared: dict[str, str]) -> list[str]:
  """Adds a gate network; returns the logits of each group, `[N, U]`."""
  parts = [_context(graph, part, x, shared=shared) for part in head.context]
  context = parts[0] if len(parts) == 1 else graph.add("Concat", *parts, axis=1)
  hidden = graph.add("Relu", _dense(graph, context, head.hidden, bias=head.hidden_bias))
  logits = _dense(graph, hidden, head.logits, bias=head.logits_bias)
  # NaN where the ReLU may have hidden that the input is not finite; 0 otherwise.
  total = graph.add("ReduceSum", context, _integers(1), keepdims=1)
  logits = graph.add("Add", logits, graph.add("Mul", total, _number(0)))
  sizes = [group.gates for group in head.groups]
  if len(sizes) == 1:
    return [logits]
  return graph.add_many("Split", len(sizes), logits, _integers(*sizes), axis=1)


def _dense(graph: _Graph, x: str, kernel: Any, bias: Any) -> str:
  """Adds a dense layer."""
  return graph.add("Gemm", x, np.asarray(kernel, np.float32), np.asarray(bias, np.float32))


def _context(graph: _Graph, part: str, x: _Map, shared: dict[str, str]) -> str:
  """Adds a part of a context, as of `context_of`, `[N, numbers]`."""
  if part in shared:
    return shared[part]
  if part == "grid":
    return _cells(graph, x, GRID)
  mean = graph.add("ReduceMean", x.name, axes=_PIXELS, keepdims=1)
  found = graph.add("Flatten", mean, axis=1)
  if part == "pooled":
    return found
  if part != "moments":
    raise ValueError(f"net must have contexts that ONNX models can have; got {shown(part)}")
  centred = graph.add("Sub", x.name, mean)
  variance = graph.add("ReduceMean", graph.add("Mul", centred, centred), axes=_PIXELS, keepdims=0)
  deviation = graph.add("Sqrt", graph.add("Add", variance, _number(LEAST_VARIANCE)))
  return graph.add("Concat", found, deviation, axis=1)


def _cells(graph: _Graph, x: _Map, side: int) -> str:
  """Adds the means over the cells of a grid, `[N, S S D]`."""
  # Cell by cell, the channels of each next to each other.
  means = graph.add("Transpose", _grid(graph, x, side), perm=[0, 2, 3, 1])
  return graph.add("Flatten", means, axis=1)


def _grid(graph: _Graph, x: _Map, side: int) -> str:
  """Adds the means over the cells of a grid, `[N, D, S, S]`."""
  rows = np.asarray(cell_weights(x.height, side), np.float32)
  columns = np.asarray(cell_weights(x.width, side), np.float32)
  return graph.add("MatMul", graph.add("MatMul", rows, x.name), columns.T)


def _glance(graph: _Graph, conv: Conv, x: _Map) -> str:
  """Adds the glance at the images, `[N, 8]`."""
  thumbnail = _grid(graph, x, THUMBNAIL)
  mean = graph.add("ReduceMean", thumbnail, axes=_PIXELS, keepdims=1)
  centred = graph.add("Sub", thumbnail, mean)
  squares = graph.add("Mul", centred, centred)
  variance = graph.add("ReduceMean", squares, axes=[1, *_PIXELS], keepdims=1)
  deviation = graph.add("Sqrt", graph.add("Add", variance, _number(LEAST_VARIANCE)))
  scale = graph.add("Add", deviation, _number(LEAST_DEVIATION))
  standardised = graph.add("Div", centred, scale)
  y = _conv(graph, conv, _Map(standardised, x.channels, height=THUMBNAIL, width=THUMBNAIL))
  return graph.add("ReduceMean", graph.add("Relu", y.name), axes=_PIXELS, keepdims=0)


def _gates(graph: _Graph, logits: str, shift: Any, *, scales: bool) -> str:
  """Adds the gates, or scales, of a group's logits, `[N, U]` both; `shift` is the group's own."""
  if scales:
    return graph.add("Mul", graph.add("Sigmoid", logits), _number(2))
  is_open = graph.add("Greater", logits, _number(0))
  if shift is None:
    return graph.add("Cast", is_open, to=1)  # to float32
  shifted = graph.add("Add", logits, np.asarray(shift, np.float32))
  weights = graph.add("Mul", graph.add("Sigmoid", shifted), _number(2))
  return graph.add("Where", is_open, weights, _number(0))


def _expand(graph: _Graph, group: Group, gates: str) -> str:
  """Adds the factor of each channel, `[N, C]`, of the gates of a group."""
  if group.width == group.gates:
    return gates
  # factor = gates spread + offset: the first `always` channels have the factor 1.
  spread = np.asarray(group.expand(np.eye(group.gates, dtype=np.float32)))
  offset = (np.arange(group.width) < group.always).astype(np.float32)
  return graph.add("Gemm", gates, spread * (1 - offset), offset)


def _outputs(graph: _Graph, net: FoldedNet, x: _Map) -> str:
  """Adds what follows the parts."""
  if not net.pooled:
    return graph.add("Transpose", x.name, perm=[0, 2, 3, 1])
  if net.cells == 1:
    y = graph.add("ReduceMean", x.name, axes=_PIXELS, keepdims=0)
  else:
    y = _cells(graph, x, net.cells)
  for kernel, bias in net.hidden:
    y = graph.add("Relu", _dense(graph, y, kernel, bias=bias))
  if net.classifier is None:
    return y
  return _dense(graph, y, *net.classifier)


def _serialise(
  onnx: Any,
  graph: _Graph,
  outputs: str,
  *,
  logits: Sequence[str],
  input_shape: tuple[int, int, int],
  net: FoldedNet,
) -> bytes:
  """Returns the bytes of a graph, checked by ONNX itself."""
  helper, real = onnx.helper, onnx.TensorProto.FLOAT
  names = {outputs: _OUTPUT}
  for i, name in enumerate(logits):
    names[name] = f"gate_logits_{i}"
  nodes = []
  # Results of the model have names that say what they are.
  for kind, read, made, settings in graph.nodes:
    read = [names.get(name, name) for name in read]
    made = [names.get(name, name) for name in made]
    nodes.append(helper.make_node(kind, read, made, **settings))
  arrays = [onnx.numpy_helper.from_array(a, name) for name, a in graph.arrays.items()]
  images = helper.make_tensor_value_info(_INPUT, real, ["n", *input_shape])
  rank = 2 if net.pooled else 4
  results = [helper.make_tensor_value_info(_OUTPUT, real, ["n", *[None] * (rank - 1)])]
  for name in list(names.values())[1:]:
    results.append(helper.make_tensor_value_info(name, real, ["n", None]))
  model = helper.make_model(
    helper.make_graph(nodes, "gating_jax", [images], results, arrays),
    opset_imports=[helper.make_opsetid("", _OPSET)],
    ir_version=_FILE_VERSION,
    producer_name="gating_jax",
  )
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()
