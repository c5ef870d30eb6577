"""A trained network as plain arrays, with BatchNorm folded into its convolutions.

    Part = Layer   y = gates * pool(ReLU(conv x))                  a stem, or a layer of a VGG net
         | Block   y = ReLU(conv_k(.. gates * ReLU(conv_1 x)) + shortcut(x))
                                                                   residual, or gates * that

Every faster program starts from it. `run` calls one function for each part, so that a strategy is a
function of a part and nothing else.

Axes: N examples, H and W pixels, D input channels, U gates of a group, each of which switches
`channels` adjacent ones.
Reference: Jacob et al., 2018, section 3.2 (folding); Bejnordi et al., 2020, section 3.

Multiply-accumulates of a folded network and of its parts, for all units or for open ones.

Axes: N examples, H and W pixels, D channels, U gates of a group.
Reference: Bejnordi et al., 2020, section 4 (MACs of gated layers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.ops.relaxations import threshold_gate
from gating_jax.types import Array

Gates = tuple[Array, ...]
# Static fields are compiled in, not mapped over.
_static = lambda default: dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conv:
  """A `[h, w, D, O]` kernel and `[O]` bias; symmetric padding: stride 1 keeps the resolution."""

  kernel: Array
  bias: Array
  stride: int = _static(1)
  dilation: int = _static(1)

  def __call__(self, x: Array) -> Array:
    """Maps `[N, H, W, D]` to `[N, H', W', O]`."""
    # PyTorch's padding: the same on both sides. XLA's "SAME" differs for strides above 1.
    padding = [(size // 2 * self.dilation,) * 2 for size in self.kernel.shape[:2]]
    y = lax.conv_general_dilated(
      x,
      self.kernel,
      (self.stride,) * 2,
      padding,
      rhs_dilation=(self.dilation,) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.bias[None, None, None]


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

  def expand(self, gates: Array) -> Array:
    """Expands `[N, U]` gates to `[N, width]`, the factor of each channel."""
    # The channels of a gate are adjacent.
    each = jnp.repeat(gates, self.channels, axis=1)
    return jnp.concatenate([jnp.ones((each.shape[0], self.always), each.dtype), each], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """A gate network; it returns the logits of all groups.

  Mean over pixels, Dense with its BatchNorm folded, ReLU, Dense.
  """

  hidden: Array
  hidden_bias: Array
  logits: Array
  logits_bias: Array
  groups: tuple[Group, ...] = _static(())

  def __call__(self, x: Array) -> Gates:
    """Maps `[N, H, W, D]` to the logits of each group, `[N, U]`.

    They are NaN for an example that is not finite.
    """
    context = pooled(x.astype(jnp.float32))
    hidden = jax.nn.relu(context @ self.hidden + self.hidden_bias[None])
    logits = hidden @ self.logits + self.logits_bias[None]
    # Adds 0, or NaN where the ReLU has hidden that the input is not finite.
    logits += 0 * jnp.sum(context, axis=1, keepdims=True)
    # One Dense layer gives the logits of all groups in their order.
    ends = [sum(g.gates for g in self.groups[: i + 1]) for i in range(len(self.groups))]
    return tuple(jnp.split(logits, ends[:-1], axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution, ReLU, and optionally a max pool and gates of its channels.

  `pool` is `(window, stride, padding)`.
  """

  conv: Conv
  head: Head | None = None
  pool: tuple[int, int, int] | None = _static(None)

  def after(self, h: Array) -> Array:
    """Applies what follows the convolution, except the gates."""
    h = jax.nn.relu(h)
    if self.pool is None:
      return h
    window, stride, pad = self.pool
    spatial = lambda a, others: (others, a, a, others)
    return lax.reduce_window(
      h, -jnp.inf, lax.max, spatial(window, 1), spatial(stride, 1), spatial((pad, pad), (0, 0))
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
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


def groups_of(part: Part) -> tuple[Group, ...]:
  """Returns the groups gated inside a part: all of its head's but that of a block's output."""
  groups = part.head.groups if part.head is not None else ()
  return groups[:-1] if gates_output(part) else groups


def gates_output(part: Part) -> bool:
  """Tests for a block whose output has gates, the last of its groups."""
  return isinstance(part, Block) and part.output_gate


def output_groups(part: Part, of_groups: Sequence[Any]) -> Sequence[Any]:
  """Selects, from values for each group of a part, those of its output's channels.

  Returns nothing where these have no gates.
  """
  return of_groups if isinstance(part, Layer) else of_groups[-1:] if part.output_gate else ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FoldedNet:
  """A network for images in evaluation.

  Its parts run in order; then follow the mean over pixels and the classifier, if any. Without
  `pooled` it ends with the last feature map.
  """

  parts: tuple[Part, ...]
  classifier: tuple[Array, Array] | None = None
  pooled: bool = _static(True)


Runner = Callable[[Part, Array, Gates, Gates], Array]


def run(
  net: FoldedNet, x: Array, runners: Runner | Sequence[Runner] | None = None
) -> tuple[Array, Gates]:
  """Computes the network's output and the logits of all its gates.

  Args:
    net: the network.
    x: `[N, H, W, D]` images.
    runners: `(part, x, gates, gates of x) -> y`, one for all parts or one for each; `masked` if
      None. The gates of a part are a tuple, one `[N, U]` a group, empty where it has none. The
      gates of a block's output multiply the result afterwards, so a runner may ignore them.
  Returns:
    `(outputs, tuple of [N, U] logits)`, the latter in the order of the model's records; outputs are
    `[N, classes]`, without a classifier `[N, D']`, and without pooling `[N, H', W', D']`.
  """
  runners = runners or masked
  runners = [runners] * len(net.parts) if callable(runners) else runners
  # `before`: the gates of this part's input channels, if they have any.
  found, before = (), ()
  for part, runner in zip(net.parts, runners, strict=True):
    # Gates come first: a runner may skip what they close.
    logits = part.head(x) if part.head is not None else ()
    gates = tuple(threshold_gate(z) for z in logits)
    x = runner(part, x, gates, before)
    found += logits
    before = output_groups(part, gates)
    if gates_output(part):
      # y = gates * ReLU(branch + shortcut): here, so that no strategy needs to know of it.
      x = x * part.head.groups[-1].expand(gates[-1])[:, None, None]
  if not net.pooled:
    return x, found
  x = pooled(x)
  if net.classifier is not None:
    kernel, bias = net.classifier
    x = x @ kernel + bias[None]
  return x, found


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
  """Computes the whole part and multiplies closed units by 0; every strategy must equal this."""
  masks = [group.expand(g)[:, None, None] for group, g in zip(groups_of(part), gates, strict=False)]
  if isinstance(part, Layer):
    y = part.after(part.conv(x))
    return y * masks[0] if masks else y
  if not part.convs:
    return jax.nn.relu(part.shortcut(x))
  h, *rest = part.convs
  h = h(x)
  for i, conv in enumerate(rest):
    h = jax.nn.relu(h)
    # Each group gates the input of the next convolution; a gate of the branch comes after the last.
    h = conv(h * masks[i] if masks and not part.layer_gate else h)
  return jax.nn.relu((h * masks[0] if part.layer_gate and masks else h) + part.shortcut(x))


def shapes_of(net: Any) -> Any:
  """Returns the same tree with `jax.ShapeDtypeStruct` for arrays."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), net)


def check_channels(net: FoldedNet, channels: int) -> None:
  """Raises ValueError unless the network takes images of `channels` channels."""
  first = net.parts[0]
  # A block whose branch was pruned has a projection at most, and then any number of channels fits.
  conv = first.conv if isinstance(first, Layer) else next(iter(first.convs), first.project)
  if conv is not None and conv.kernel.shape[2] != channels:
    raise ValueError(
      f"images must have {conv.kernel.shape[2]} channels, as the network expects; got {channels}"
    )


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
  for (path, found), wanted in zip(
    jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(like), strict=True
  ):
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
      where = jax.tree_util.keystr(path, simple=True, separator=".")
      raise ValueError(
        f"net must have the shapes of the compiled network, at {where} {wanted.dtype} "
        f"{wanted.shape}; got {found.dtype} {found.shape}"
      )


def macs(net: FoldedNet, input_shape: tuple[int, int, int], gates: Sequence[Any] = ()) -> Any:
  """Computes the multiply-accumulates per example, gate networks included.

  Args:
    net: the network.
    input_shape: `(H, W, D)` of an image.
    gates: `[N, U]` of every group in order, 0 or 1; empty if every gate is open.
  Returns:
    `[N]` numbers, or one number without `gates`.
  """
  total = sum(macs_by_part(net, input_shape, gates))
  return total + (net.classifier[0].size if net.classifier is not None else 0)


def macs_by_part(
  net: FoldedNet, input_shape: tuple[int, int, int], gates: Sequence[Any] = ()
) -> list[Any]:
  """Computes `macs` of each part, the classifier left out."""
  shape, inputs, gates, found = tuple(input_shape), (), list(gates), []
  for part in net.parts:
    count = len(part.head.groups) if part.head is not None else 0
    opened, gates = opened_of(part, gates[:count]) if gates else [], gates[count:]
    shape, spent = part_macs(part, shape, *inputs, opened=opened)
    found.append(head_macs(part) + spent)
    # The next part multiplies only by the channels that this one's gates leave.
    inputs = output_groups(part, opened)
  return found


def head_macs(part: Part) -> int:
  """Returns the multiply-accumulates of a part's gate network for one example; 0 without one."""
  return part.head.hidden.size + part.head.logits.size if part.head is not None else 0


def opened_of(part: Part, gates: Sequence[Any]) -> list[Any]:
  """Computes what a part's `[N, U]` gates open, for each of its groups.

  Returns:
    `[N]` numbers of open channels, or, for a branch with one gate, whether it runs.
  """
  groups = part.head.groups if part.head is not None else ()
  if isinstance(part, Block) and part.layer_gate:
    return [g[:, 0] > 0 for g in gates]
  return [open_channels(group, g) for group, g in zip(groups, gates, strict=True)]


def open_channels(group: Group, gates: Any) -> Any:
  """Counts the open channels of a group, `[N]`, from its `[N, U]` gates."""
  return group.always + group.channels * (gates > 0).sum(-1)


def part_macs(
  part: Part, shape: tuple[int, int, int], inputs: Any = None, *, opened: Sequence[Any] = ()
) -> tuple[tuple[int, int, int], Any]:
  """Computes the output shape of a part and its multiply-accumulates, the gate network left out.

  Args:
    part: the part.
    shape: `(H, W, D)` of its input.
    inputs: number of input channels that are computed with, `[N]` or one; None for all.
    opened: as of `opened_of`; for a branch also the fraction of the examples for which it runs.
      Empty: all.
  Returns:
    `(H', W', D')`, and the multiply-accumulates of an example.
  """
  if isinstance(part, Layer):
    shape, spent = _conv_macs(part.conv, shape, inputs, opened[0] if opened else None)
    if part.pool:
      window, stride, pad = part.pool
      shape = (*((size + 2 * pad - window) // stride + 1 for size in shape[:2]), shape[2])
    return shape, spent
  # A gate of the whole branch scales its cost; gates of channels scale each convolution's.
  last, share = opened[-1] if opened and part.output_gate else None, 1
  if opened and part.layer_gate:
    (share,), opened = opened, ()
  # Without a projection the shortcut costs nothing; strides round up.
  outer, fixed = (*(-(-size // part.pad[0]) for size in shape[:2]), shape[2] + sum(part.pad[1:])), 0
  if part.project is not None:
    # All inputs count, as in the records of the model.
    outer, fixed = _conv_macs(part.project, shape, None, last)
  branch = 0
  for i, conv in enumerate(part.convs):
    outputs = opened[i] if i < len(opened) else None
    shape, spent = _conv_macs(conv, shape, inputs, outputs)
    # Channels closed by a gate are no input of the next convolution.
    branch, inputs = branch + spent, outputs
  return outer, fixed + share * branch


def _conv_macs(
  conv: Conv, shape: tuple[int, ...], inputs: Any = None, outputs: Any = None
) -> tuple[tuple, Any]:
  h, w, i, o = conv.kernel.shape
  # Padding is symmetric, so a stride divides the size, rounded up.
  height, width = (-(-size // conv.stride) for size in shape[:2])
  return (height, width, o), h * w * height * width * (i if inputs is None else inputs) * (
    o if outputs is None else outputs
  )
