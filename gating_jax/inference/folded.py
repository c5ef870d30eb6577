"""A trained network as plain arrays, with BatchNorm folded into its convolutions.

    Part = Layer   y = gates * pool(ReLU(conv x))                  a stem, or a layer of a VGG net
                                                                   (ReLU, pool: where it has them)
         | Block   y = ReLU(conv_k(.. gates * ReLU(conv_1 x)) + shortcut(x))
                                                                   residual, or gates * that

A gate is 0 where its unit is closed; where it is open, 1 or the unit's weight, above 0. Scales, as
of squeeze-and-excitation, multiply units too, but close none: a part that has them has no gates.

Every faster program starts from it. `run_net` calls one function for each part, so that a strategy
is a function of a part and nothing else. `inference.costs` counts its multiply-accumulates.

Axes: N examples, H and W pixels, D input channels, U gates of a group, each of which switches
`channels` adjacent ones, X exits before the last, K classes.
Reference: Jacob et al., 2018, section 3.2 (folding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.layers.context import (
  FLAT_DEVIATION,
  NOTHING_SHARED,
  NUMBERS_PER_CHANNEL,
  Shared,
  context_of,
  grid_means,
  standardised_thumbnail,
)
from gating_jax.names import lazy_names
from gating_jax.ops.macs import dense_layer_macs
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.types import AnyArray, Array

Gates = tuple[Array, ...]
_T = TypeVar("_T")
# `[N, U]` gates of every group of a network in host memory, in order.
AllGates = Sequence[np.ndarray]
Shape = tuple[int, int, int]


def _static(default: Any) -> Any:
  """Returns a field that is compiled into programs, not mapped over."""
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conv:
  """A `[h, w, D, O]` kernel and `[O]` bias; stride 1 keeps the resolution.

  Padding is symmetric; or, with `same`, XLA's "SAME", which may pad one pixel more after than
  before.
  """

  kernel: Array
  bias: Array
  stride: int = _static(1)
  dilation: int = _static(1)
  same: bool = _static(False)

  def __call__(self, x: Array) -> Array:
    """Maps `[N, H, W, D]` to `[N, H', W', O]`."""
    # PyTorch's padding: the same on both sides. XLA's "SAME" differs for strides above 1.
    height, width = self.kernel.shape[:2]
    vertical, horizontal = height // 2 * self.dilation, width // 2 * self.dilation
    symmetric = [(vertical, vertical), (horizontal, horizontal)]
    y = lax.conv_general_dilated(
      x,
      self.kernel,
      (self.stride,) * 2,
      "SAME" if self.same else symmetric,
      rhs_dilation=(self.dilation,) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.bias[None, None, None]

  def select(
    self, inputs: AnyArray | slice | None = None, outputs: AnyArray | slice | None = None
  ) -> Conv:
    """Returns the convolution restricted to some of its channels.

    Args:
      inputs, outputs: indices within bounds, `[K]`, in the order that the channels get; or a slice;
        None for all channels as they are.
    """
    kernel, bias = self.kernel, self.bias
    if inputs is not None:
      kernel = _select(kernel, 2, inputs)
    if outputs is not None:
      kernel, bias = _select(kernel, 3, outputs), _select(bias, 0, outputs)
    return dataclasses.replace(self, kernel=kernel, bias=bias)


def _select(array: Array, axis: int, index: AnyArray | slice) -> Array:
  """Selects entries of one axis of an array."""
  place = (slice(None),) * axis + (index,)
  if isinstance(index, slice):
    return array[place]
  # Indices come from `top_k` or from the host and are in bounds: no clamping.
  return jnp.asarray(array).at[place].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Group:
  """Output channels of one convolution: `always` without a gate, then `gates` * `channels`."""

  gates: int
  channels: int = 1
  always: int = 0

  @property
  def width(self) -> int:
    """Returns the number of the convolution's output channels."""
    return self.always + self.gates * self.channels

  def expand(self, gates: AnyArray) -> Array:
    """Expands `[N, U]` gates to `[N, width]`, the factor of each channel."""
    # The channels of a gate are adjacent.
    each = jnp.repeat(gates, self.channels, axis=1)
    return jnp.concatenate([jnp.ones((each.shape[0], self.always), each.dtype), each], axis=1)


def expand_groups(groups: Sequence[Group], gates: Sequence[AnyArray]) -> list[Array]:
  """Expands the `[N, U]` gates of each group to `[N, C]`, a factor for each channel."""
  return [group.expand(g) for group, g in zip(groups, gates, strict=True)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """A gate network; it returns the logits of all groups.

  Context, Dense with its BatchNorm folded, ReLU, Dense with thresholds of its logits folded.

  Attributes:
    groups: of the channels that the gates switch, or that scales multiply.
    context: parts of the context, some of `pooled`, `moments`, `grid` and `glance`.
    shift: of weighted gates, a number, or `[U]` numbers for the gates of all groups: an open unit
      of logit z has the weight 2 sigmoid(z + shift). None: the gate of an open unit is 1.
    scales: whether the channels are multiplied by 2 sigmoid(z), and none is ever closed.
  """

  hidden: Array
  hidden_bias: Array
  logits: Array
  logits_bias: Array
  groups: tuple[Group, ...] = _static(())
  context: tuple[str, ...] = _static(("pooled",))
  shift: Array | None = None
  scales: bool = _static(False)

  def __call__(self, x: Array, shared: Shared = NOTHING_SHARED) -> Gates:
    """Maps `[N, H, W, D]` to the logits of each group, `[N, U]`.

    They are NaN for an example that is not finite. `shared` holds the parts of the context that are
    computed once for all gate networks.
    """
    context = self._context(x.astype(jnp.float32), shared)
    hidden = jax.nn.relu(context @ self.hidden + self.hidden_bias[None])
    logits = hidden @ self.logits + self.logits_bias[None]
    # Adds 0, or NaN where the ReLU has hidden that the input is not finite.
    logits += 0 * jnp.sum(context, axis=1, keepdims=True)
    return tuple(self._split(logits))

  def gates(self, logits: Gates) -> Gates:
    """Maps the logits of each group to its gates or scales, `[N, U]` both.

    Gates of a logit that is NaN are closed.
    """
    if self.scales:
      return tuple(2 * jax.nn.sigmoid(z) for z in logits)
    if self.shift is None:
      return tuple(threshold_gate(z) for z in logits)
    gates = []
    for z, shift in zip(logits, self.shifts(), strict=True):
      # A choice and not a product: NaN must not reach a closed gate.
      gates.append(jnp.where(z > 0, 2 * jax.nn.sigmoid(z + shift), 0))
    return tuple(gates)

  def shifts(self) -> Sequence[Any]:
    """Returns the `shift` of each group: a number, `[1, U]` numbers for `[N, U]`, or None."""
    if self.shift is None or not self.shift.ndim:
      return [self.shift] * len(self.groups)
    return self._split(self.shift[None])

  def _split(self, numbers: Array) -> list[Array]:
    """Splits the last axis, of the gates of all groups, into those of each."""
    # One Dense layer makes the gates of all groups in their order.
    ends = np.cumsum([group.gates for group in self.groups])
    return jnp.split(numbers, ends[:-1], axis=-1)

  def _context(self, x: Array, shared: Shared) -> Array:
    """Maps `[N, H, W, D]` to the context, `[N, numbers]`."""
    found = []
    for part in self.context:
      # The same mean as `context_of`, but faster for one image.
      found.append(pooled(x) if part == "pooled" else context_of(x, (part,), shared))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)

  def select_inputs(self, index: np.ndarray, channels: int) -> Head:
    """Returns the gate network of a map with some of its channels; the others are 0 everywhere.

    Args:
      index: of the channels that are left, in the order that they get.
      channels: the number that the map has now.
    """
    rows, start, bias = [], 0, self.hidden_bias
    gone = np.setdiff1d(np.arange(channels), index)
    for part in self.context:
      numbers = NUMBERS_PER_CHANNEL.get(part)
      if numbers is None:
        # A part of the whole image stays as it is.
        size = self._shared_size(channels)
        rows.append(np.arange(start, start + size))
        start += size
        continue
      if part == "moments":
        # The deviations follow the means, and are above 0 even for a map of zeros.
        bias = bias + FLAT_DEVIATION * jnp.sum(self.hidden[start + channels + gone], axis=0)
      for _ in range(numbers):
        rows.append(start + np.asarray(index))
        start += channels
    return dataclasses.replace(self, hidden=self.hidden[np.concatenate(rows)], hidden_bias=bias)

  def _shared_size(self, channels: int) -> int:
    """Returns the size of the one part of the context that is not of the map's channels."""
    of_map = sum(NUMBERS_PER_CHANNEL.get(part, 0) for part in self.context)
    return self.hidden.shape[0] - channels * of_map


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Glance:
  """A light look at the whole image, which gate networks may read.

      glance = mean over pixels of ReLU(conv t)

  t is the thumbnail of `layers.context.Glance`, and conv has the BatchNorm that follows it.
  """

  conv: Conv

  def __call__(self, x: Array) -> Array:
    """Maps `[N, H, W, D]` images to `[N, 8]`."""
    return jnp.mean(jax.nn.relu(self.conv(standardised_thumbnail(x))), axis=(1, 2))


class _Gated:
  """The groups of a part's gates.

  Attributes:
    layer_gate: whether the one gate switches a block's branch as a whole.
    output_gate: whether the last group gates the output of a block.
  """

  head: Head | None
  layer_gate = False
  output_gate = False

  @property
  def groups(self) -> tuple[Group, ...]:
    """Returns all groups of gates, or none; scales are no gates."""
    return () if self.head is None or self.head.scales else self.head.groups

  @property
  def weighted(self) -> bool:
    """Returns whether open units have weights."""
    return bool(self.groups) and self.head is not None and self.head.shift is not None

  @property
  def inner_groups(self) -> tuple[Group, ...]:
    """Returns the groups gated inside the part: all but that of a block's output."""
    return self.groups[:-1] if self.output_gate else self.groups

  @property
  def outer_group(self) -> Group | None:
    """Returns the group that gates a block's output, if any."""
    return self.groups[-1] if self.output_gate and self.groups else None

  def masks(self, gates: Sequence[AnyArray]) -> list[Array]:
    """Expands the gates, or scales, inside the part to `[N, C]`, a factor for each channel."""
    groups = () if self.head is None else self.head.groups
    inner = groups[:-1] if self.output_gate else groups
    return expand_groups(inner, gates[: len(inner)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer(_Gated):
  """A convolution, and optionally ReLU, a max pool and gates of its channels.

  `pool` is `(window, stride, padding)`.
  """

  conv: Conv
  head: Head | None = None
  pool: tuple[int, int, int] | None = _static(None)
  relu: bool = _static(True)

  def after(self, h: Array) -> Array:
    """Applies what follows the convolution, except the gates."""
    h = jax.nn.relu(h) if self.relu else h
    if self.pool is None:
      return h
    window, stride, pad = self.pool
    # Over height and width; not over examples and channels.
    return lax.reduce_window(
      h,
      -jnp.inf,
      lax.max,
      window_dimensions=(1, window, window, 1),
      window_strides=(1, stride, stride, 1),
      padding=((0, 0), (pad, pad), (pad, pad), (0, 0)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block(_Gated):
  """A residual block: convolutions with ReLU between, a shortcut, ReLU.

  Attributes:
    convs: of the branch; empty if it never runs.
    head: gates the outputs of all convolutions but the last, a group each. With `output_gate` its
      last group gates the output of the block as well; with `layer_gate` it gates the branch as a
      whole. None: no gates.
    project: convolution of the shortcut. None: the shortcut is the input, every `pad[0]`-th pixel
      of it, with `pad[1]` channels of zeros before and `pad[2]` after.
  """

  convs: tuple[Conv, ...]
  head: Head | None = None
  project: Conv | None = None
  layer_gate: bool = _static(False)
  output_gate: bool = _static(False)
  pad: tuple[int, int, int] = _static((1, 0, 0))

  def shortcut(self, x: Array) -> Array:
    """Maps `[N, H, W, D]` to the shape of the block's output."""
    if self.project is not None:
      return self.project(x)
    stride, before, after = self.pad
    return jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(before, after)])


Part = Layer | Block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedNet:
  """A network for images in evaluation.

  Its parts run in order; then follow means over pixels, hidden dense layers with ReLU and the
  classifier, if any. Without `pooled` it ends with the last feature map. A `glance` is computed
  once for all gate networks.

  Attributes:
    parts: layers and blocks.
    classifier: kernel `[D', classes]` and bias, or None.
    pooled: whether means over pixels follow the parts.
    hidden: kernel and bias of each dense layer before the classifier.
    cells: parts of the last map, along a side, over each of which a mean is taken; their features
      are read as one vector, part by part.

  >>> net = FoldedNet(parts=(), classifier=(jnp.ones((3, 2)), jnp.zeros(2)))
  >>> outputs, gate_logits = run_net(net, jnp.ones((1, 4, 4, 3)))
  >>> outputs.shape, gate_logits
  ((1, 2), ())
  """

  parts: tuple[Part, ...]
  classifier: tuple[Array, Array] | None = None
  pooled: bool = _static(True)
  glance: Glance | None = None
  hidden: tuple[tuple[Array, Array], ...] = ()
  cells: int = _static(1)

  def outputs(self, x: Array, run_part: Callable[[int, Array], Array]) -> Array:
    """Computes the outputs for images, each part by `run_part(its number, its input)`."""
    for i in range(len(self.parts)):
      x = run_part(i, x)
    if not self.pooled:
      return x
    if self.cells == 1:
      x = pooled(x)
    else:
      x = grid_means(x, self.cells, precision="highest").reshape(x.shape[0], -1)
    for kernel, bias in self.hidden:
      x = jax.nn.relu(x @ kernel + bias[None])
    if self.classifier is not None:
      kernel, bias = self.classifier
      x = x @ kernel + bias[None]
    return x

  def starts(self, input_shape: Shape) -> dict[int, Shape]:
    """Returns the input shape of each part that does not read the output of the part before."""
    return {0: input_shape}

  def check_channels(self, channels: int) -> None:
    """Raises ValueError unless the network takes images of `channels` channels."""
    first = self.parts[0]
    # A block whose branch was pruned has a projection at most, and then any number fits.
    conv = first.conv if isinstance(first, Layer) else next(iter(first.convs), first.project)
    if conv is not None and conv.kernel.shape[2] != channels:
      raise ValueError(
        f"images must have {conv.kernel.shape[2]} channels, as the network expects; got {channels}"
      )

  @property
  def has_classes(self) -> bool:
    """Returns whether the largest of the last axis of the outputs is the answer."""
    return self.classifier is not None

  def outer_macs(self) -> int:
    """Returns the multiply-accumulates per example of what is in no part: of dense layers."""
    return dense_layer_macs(*(kernel.shape for kernel, _ in self.dense))

  @property
  def dense(self) -> tuple[tuple[Array, Array], ...]:
    """Returns kernel and bias of every dense layer, in their order."""
    return self.hidden if self.classifier is None else (*self.hidden, self.classifier)

  def select_features(self, index: AnyArray) -> FoldedNet:
    """Returns the network whose first dense layer reads `[K]` channels of the last map alone."""
    (kernel, bias), *others = self.dense
    # Rows are the channels of each part of the map.
    parts, outputs = self.cells**2, kernel.shape[1]
    rows = kernel.reshape(parts, kernel.shape[0] // parts, outputs)[:, index]
    *hidden, classifier = (rows.reshape(-1, outputs), bias), *others
    return dataclasses.replace(self, hidden=tuple(hidden), classifier=classifier)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitNet:
  """Stages, and an exit after each but the last, which takes the stage's feature map.

  The last stage ends with logits, the others with a feature map.

  Attributes:
    stages: X + 1 networks.
    exits: X networks, each to `[N, K]` logits.
    threshold: fraction of the largest entropy; an image leaves at an exit of less entropy.

  >>> last = FoldedNet(parts=(), classifier=(jnp.ones((3, 2)), jnp.zeros(2)))
  >>> net = ExitNet((FoldedNet(parts=(), pooled=False), last), exits=(last,), threshold=0.3)
  >>> len(net.stages), len(net.exits), net.threshold
  (2, 1, 0.3)
  """

  stages: tuple[FoldedNet, ...]
  exits: tuple[FoldedNet, ...]
  threshold: float = dataclasses.field(metadata={"static": True})


def output_groups(part: Part, per_group: tuple[_T, ...]) -> tuple[_T, ...]:
  """Selects, from values for each group of a part, those of its output's channels.

  Returns nothing where these have no gates.
  """
  if isinstance(part, Layer):
    return per_group
  return per_group[-1:] if part.output_gate else ()


class Step(NamedTuple):
  """A part of a network, with what belongs to its gates.

  Attributes:
    part: the part.
    own: a value for each of its groups, or none.
    before: a value for each group of its input's channels, or none.
  """

  part: Part
  own: tuple[Any, ...]
  before: tuple[Any, ...]


def walk(net: FoldedNet, per_group: Sequence[Any] = ()) -> Iterator[Step]:
  """Iterates over the parts in their order.

  Args:
    net: the network.
    per_group: a value for every group of the network in order; or none at all.
  """
  start, before = 0, ()
  for part in net.parts:
    end = start + len(part.groups)
    own = tuple(per_group[start:end])
    yield Step(part, own, before)
    start, before = end, output_groups(part, own)


class GroupPlace(NamedTuple):
  """The place of a group of units in a network.

  Attributes:
    part, index: the index of the network's part, and of the group within it.
    group: the group.
    layer_gate: whether its one unit is the branch of a block, and not channels.
  """

  part: int
  index: int
  group: Group
  layer_gate: bool


def group_places(net: FoldedNet) -> list[GroupPlace]:
  """Lists the place of every group, in the order of its gates."""
  found = []
  for i, part in enumerate(net.parts):
    for j, group in enumerate(part.groups):
      found.append(GroupPlace(part=i, index=j, group=group, layer_gate=part.layer_gate))
  return found


def join_batches(batches: Sequence[AllGates]) -> list[np.ndarray]:
  """Joins the gates of several batches: `[N, U]` of each group to `[M, U]`."""
  return [np.concatenate(of_group) for of_group in zip(*batches, strict=True)]


# `(part, x, gates, gates of x) -> y`; the part is of the kind that the runner was made for.
Runner = Callable[[Any, Array, Gates, Gates], Array]


def run_net(
  net: FoldedNet, x: Array, runners: Runner | Sequence[Runner] | None = None
) -> tuple[Array, Gates]:
  """Computes the network's output and the logits of all its gates.

  Args:
    net: the network.
    x: `[N, H, W, D]` images.
    runners: `(part, x, gates, gates of x) -> y`, one for all parts or one for each; `masked` if
      None. The gates of a part are a tuple, one `[N, U]` a group, empty where it has none; or its
      scales. x has been multiplied by its gates. The gates of a block's output multiply the result
      afterwards, so a runner may ignore them.
  Returns:
    `(outputs, tuple of [N, U] logits)`, the latter in the order of the model's records; outputs are
    `[N, classes]`, without a classifier `[N, D']`, and without pooling `[N, H', W', D']`.
  """
  runners = runners or masked
  runners = [runners] * len(net.parts) if callable(runners) else runners
  if len(runners) != len(net.parts):
    raise ValueError(f"runners must be one for each of {len(net.parts)} parts; got {len(runners)}")
  shared = NOTHING_SHARED if net.glance is None else {"glance": net.glance(x)}
  # The logits of each part that has run, and the gates of its output's channels.
  found: dict[int, Gates] = {}
  leaving: dict[int, Gates] = {}

  def run_part(i: int, x: Array) -> Array:
    """Computes a part, with its gates."""
    part = net.parts[i]
    # Gates come first: a runner may skip what they close.
    logits, gates = _decide(part, x, shared)
    # Scales decide on nothing.
    found[i] = logits if part.groups else ()
    leaving[i] = output_groups(part, gates) if part.groups else ()
    # The gates of this part's input channels, if they have any.
    y = runners[i](part, x, gates, leaving.get(i - 1, ()))
    if part.output_gate and part.head is not None:
      # y = gates * ReLU(branch + shortcut): here, so that no strategy needs to know of it.
      y = y * part.head.groups[-1].expand(gates[-1])[:, None, None]
    return y

  y = net.outputs(x, run_part)
  logits: Gates = ()
  for i in range(len(net.parts)):
    logits += found[i]
  return y, logits


def _decide(part: Part, x: Array, shared: Shared) -> tuple[Gates, Gates]:
  """Returns the logits and the gates, or scales, of each group of a part; none without any."""
  if part.head is None:
    return (), ()
  logits = part.head(x, shared)
  return logits, part.head.gates(logits)


def pooled(x: Array) -> Array:
  """Computes the mean over pixels, `[N, H, W, D]` to `[N, D]`."""
  n, h, w, d = x.shape
  # One image: XLA computes the product several times as fast as the mean on a CPU. More images: XLA
  # joins the mean to what computes x.
  if n != 1:
    return jnp.mean(x, axis=(1, 2))
  return jnp.dot(
    jnp.full((1, h * w), 1 / (h * w), x.dtype), x.reshape(h * w, d), precision="highest"
  )


def masked(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
  """Computes the whole part and multiplies by the gates; every strategy must equal this."""
  del before
  masks = part.masks(gates)
  if isinstance(part, Layer):
    y = part.after(part.conv(x))
    return y * masks[0][:, None, None] if masks else y
  # A branch that never runs leaves the shortcut alone.
  if not part.convs:
    return jax.nn.relu(part.shortcut(x))
  branch = chain(part.convs, x, () if part.layer_gate else masks)
  if part.layer_gate and masks:
    branch = branch * masks[0][:, None, None]
  return jax.nn.relu(branch + part.shortcut(x))


def chain(convs: Sequence[Conv], x: Array, masks: Sequence[Array] = ()) -> Array:
  """Applies convolutions with ReLU between.

  Args:
    convs: the convolutions.
    x: `[N, H, W, D]`.
    masks: `[N, C]` factors of the output channels of each convolution but the last; or none.
  """
  first, *rest = convs
  h = first(x)
  for i, conv in enumerate(rest):
    h = jax.nn.relu(h)
    # Each group gates the input of the next convolution.
    h = conv(h * masks[i][:, None, None] if masks else h)
  return h


def shapes_of(net: Any) -> Any:
  """Returns the same tree with `jax.ShapeDtypeStruct` for arrays."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), net)


def check_alike(net: Any, like: Any) -> None:
  """Raises ValueError unless two networks differ in their weights alone.

  Args:
    net: the network.
    like: `shapes_of` the other network.
  """
  shapes = shapes_of(net)
  # The structure holds the static fields, such as strides and groups.
  if jax.tree.structure(shapes) != jax.tree.structure(like):
    raise ValueError(
      "net must have the parts and settings (groups of gates, strides, threshold) of the compiled "
      "network; got others"
    )
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  for (path, found), wanted in zip(leaves, jax.tree.leaves(like), strict=True):
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
      where = jax.tree_util.keystr(path, simple=True, separator=".")
      raise ValueError(
        f"net must have the shapes of the compiled network, at {where} {wanted.dtype} "
        f"{wanted.shape}; got {found.dtype} {found.shape}"
      )


if not TYPE_CHECKING:
  # Former names of the counts in `inference.costs`.
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.inference.costs": (
        "Cost",
        "macs",
        "macs_by_part",
        "exit_macs",
        "stage_macs",
        "glance_macs",
        "head_macs",
        "opened_of",
        "open_channels",
        "part_macs",
        "branch_macs",
        "shortcut_macs",
      )
    },
  )
