"""Ways to run one part of a folded network that skip closed units, all equal to `folded.masked`.

    masked           every channel, and closed ones times 0
    switch           each example alone: a program for each of a few counts of open channels,
                     weights gathered
    block_dispatch   the adjacent channels that a gate switches, for the examples open for it,
                     gathered: a program for each of a few counts of them
    layer_dispatch   the same for a branch with one gate
    cluster          a few sets of channels that calibration data open together, weights gathered
                     beforehand: an example goes to the smallest that covers what it opens
    native           our kernel for CPUs: channels that are closed for an example are not computed,
                     for any number of examples
    pallas           our kernel for GPUs: closed blocks of channels are not computed; interpreted
                     elsewhere, slowly

A `Strategy` says how to make a part's program and how many multiply-accumulates that computes;
`account` sums these over the parts of a network.
Every count has a program, the largest for all: no capacity overflows.
A unit is open where its gate is above 0; the gate of an open unit is 1, or its weight.

Axes: N examples, U gates of a group, C channels, K channels or examples that a program takes.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter; what of the MACs saved is saved
in practice); Riquelme et al., 2021 (experts' static capacity).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.inference import costs, folded
from gating_jax.inference.clusters import CHANNELS, are_covered, select_channels, unions
from gating_jax.inference.costs import Account, open_channels
from gating_jax.inference.folded import (
  AllGates,
  Block,
  Conv,
  FoldedNet,
  Gates,
  Group,
  Layer,
  Part,
  Runner,
  Shape,
  chain,
  output_groups,
  walk,
)
from gating_jax.names import lazy_names
from gating_jax.ops import native_kernels, pallas_kernels
from gating_jax.ops.compaction import bucket_sizes, example_sizes
from gating_jax.timing import MASKED
from gating_jax.types import AnyArray, Array


@dataclasses.dataclass(frozen=True)
class PartContext:
  """The context of a part, for which a strategy is made.

  Attributes:
    buckets: largest number of programs.
    gates: `[M, U]` of each group, on calibration data; or none.
    groups_before: groups of the channels of its input.
    rectified: whether its input is never below 0, as for all parts but the first.
  """

  buckets: int
  gates: tuple[np.ndarray, ...] = ()
  groups_before: tuple[Group, ...] = ()
  rectified: bool = False


def contexts_of(
  net: FoldedNet, buckets: int, gates: Sequence[np.ndarray] = ()
) -> list[PartContext]:
  """Returns the context of each part.

  Args:
    net: the network.
    buckets: largest number of programs.
    gates: `[M, U]` of every group of the network in order, or none.
  """
  contexts, groups_before = [], ()
  for i, (part, own, _) in enumerate(walk(net, gates)):
    contexts.append(PartContext(buckets, own, groups_before, rectified=i > 0))
    groups_before = output_groups(part, part.groups)
  return contexts


class CompiledPart(NamedTuple):
  """A part with its weights in the form that its runner needs."""

  part: Part
  run: Runner


@dataclasses.dataclass(frozen=True)
class PartBatch:
  """A batch of examples at one part of a network.

  Attributes:
    part: the part.
    context: the context that a strategy was made for.
    shape: `(H, W, D)` of the part's input.
    gates: `[N, U]` of each of the part's groups.
    before: `[N, U]` of each of `context.groups_before`.
    count: N.
  """

  part: Part
  context: PartContext
  shape: Shape
  gates: Sequence[np.ndarray]
  before: Sequence[np.ndarray]
  count: int

  def macs(self, inputs: Any = None, opened: Sequence[Any] = ()) -> Any:
    """Computes multiply-accumulates per example, the gate network left out.

    Args:
      inputs: as in `costs.part_macs`.
      opened: the same; but a block's shortcut is computed whole in any case.
    """
    return costs.computed_macs(self.part, self.shape, inputs, opened=opened)

  def total(self, inputs: Any = None, opened: Sequence[Any] = ()) -> float:
    """Computes `macs` summed over the examples."""
    return costs.macs_over_examples(self.macs(inputs, opened), self.count)

  def padded(self, is_open: np.ndarray) -> int:
    """Returns the number of examples that `for_open` computes for the open ones of `[N]`."""
    sizes = example_sizes(len(is_open), self.context.buckets)
    return sizes[np.searchsorted(sizes, np.sum(is_open > 0))]


class Strategy(NamedTuple):
  """A way to run a part, and its cost.

  Attributes:
    make: compiles a part in its context; None where the strategy does not fit the part.
    macs: computes the multiply-accumulates of a batch by the program made, including padding and
      wasted work; the gate network is left out.
  """

  make: Callable[[Part, PartContext], CompiledPart | None]
  macs: Callable[[PartBatch], float]


def masked(part: Part, context: PartContext) -> CompiledPart:
  """Computes the whole part and multiplies closed units by 0."""
  del context
  return CompiledPart(part, folded.masked)


def masked_macs(batch: PartBatch) -> float:
  """Counts every channel for every example."""
  return batch.total()


class _Axis(NamedTuple):
  """An axis of channels that `switch` chooses from.

  Attributes:
    group: the group of its gates.
    widths: the number of channels that each program computes, fewest first.
  """

  group: Group
  widths: tuple[int, ...]


def _axes(inputs: Sequence[Group], part: Part, context: PartContext) -> list[_Axis]:
  """Returns the axes of some groups of a part's input, and of the groups inside it."""
  groups = (*inputs, *part.inner_groups)
  axes = []
  for group, widths in zip(groups, capacities(groups, context.buckets), strict=True):
    axes.append(_Axis(group, widths))
  return axes


def _switched_inputs(part: Part, context: PartContext) -> tuple[Group, ...]:
  """Returns the groups of the input's channels that `switch` chooses from."""
  # A layer's input may be gated; a block's input goes through the shortcut, too, and stays whole.
  return context.groups_before if isinstance(part, Layer) else ()


def switch(part: Part, context: PartContext) -> CompiledPart | None:
  """Computes with the weights of open channels only; None where no channel is gated."""
  inputs = _switched_inputs(part, context)
  if not (inputs or part.inner_groups) or part.layer_gate or is_dead(part):
    return None
  axes = _axes(inputs, part, context)

  def run_one(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the part for one example, x `[1, H, W, D]`, by the smallest program that fits."""
    chosen = (*before[: len(inputs)], *gates[: len(part.inner_groups)])
    masks, needed = [], []
    for axis, g in zip(axes, chosen, strict=True):
      mask = axis.group.expand(g)[0]
      masks.append(mask)
      needed.append(_smallest_program(jnp.sum(mask > 0), axis.widths))

    def run_some(program: int) -> Array:
      """Computes the part with its open channels, filled up with closed ones."""
      # Open channels first, those of one gate in order. In the program, as sorting fewer is
      # quicker.
      kept = []
      for axis, mask in zip(axes, masks, strict=True):
        kept.append(_Kept(*lax.top_k(mask, min(axis.widths[program], mask.size))))
      return _compact(part, x, kept)

    def run_all() -> Array:
      """Computes the part with all channels."""
      return folded.masked(part, x, gates, before=before)

    programs = []
    for program in range(len(axes[0].widths)):
      whole = all(axis.widths[program] >= axis.group.width for axis in axes)
      programs.append(run_all if whole else functools.partial(run_some, program))
    # One program serves all axes: the smallest that holds the open channels of each.
    return lax.switch(jnp.max(jnp.stack(needed)), programs)

  return CompiledPart(part, _one_by_one(run_one))


def switch_macs(batch: PartBatch) -> float:
  """Counts the channels of the program that each example takes."""
  part, inputs = batch.part, _switched_inputs(batch.part, batch.context)
  axes = _axes(inputs, part, batch.context)
  opened = open_channels(inputs, batch.before[: len(inputs)])
  opened += open_channels(part.inner_groups, batch.gates[: len(part.inner_groups)])
  # The same program as `switch` runs: the smallest that holds the open channels of each axis.
  needed = []
  for axis, channels in zip(axes, opened, strict=True):
    needed.append(np.searchsorted(axis.widths, channels))
  program = np.max(needed, axis=0)
  # Widths are multiples of 16, which may exceed the channels there are.
  computed = []
  for axis in axes:
    computed.append(np.minimum(np.array(axis.widths)[program], axis.group.width))
  return batch.total(computed[0] if inputs else None, opened=computed[len(inputs) :])


def is_dead(part: Part) -> bool:
  """Tests whether a group has no channels, as `prune` leaves a branch that never opens."""
  return any(group.width == 0 for group in part.inner_groups)


def capacities(groups: Sequence[Group], buckets: int) -> list[tuple[int, ...]]:
  """Returns the channels that the programs of `switch` take of each group, fewest first.

  There is a number for each program.
  """
  of_groups = [bucket_sizes(group.width, buckets=buckets, multiple=CHANNELS) for group in groups]
  programs, filled = max(map(len, of_groups)), []
  for sizes in of_groups:
    # A group with fewer sizes repeats its last one.
    filled.append(sizes + sizes[-1:] * (programs - len(sizes)))
  return filled


def _smallest_program(count: Array, sizes: Sequence[int]) -> Array | int:
  """Returns the index of the first of the rising sizes that holds `count`."""
  return sum((count > size).astype(jnp.int32) for size in sizes[:-1])


def _one_by_one(run_one: Runner) -> Runner:
  """Turns a runner of one example into one of any number, one after the other."""

  def run(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the part for x `[N, H, W, D]`, one example after the other."""
    if len(x) == 1:
      return run_one(part, x, gates, before)

    def run_next(example: tuple[Array, Gates, Gates]) -> Array:
      """Computes the part for one example, without its first axis."""
      return run_one(part, *jax.tree.map(lambda a: a[None], example))[0]

    # A loop, not `vmap`, which would compute every program for every example.
    return lax.map(run_next, (x, gates, before))

  return run


class _Kept(NamedTuple):
  """The channels of a group that a program computes: `[K]` gates and `[K]` indices."""

  gates: Array
  index: Array


def _compact(part: Part, x: Array, kept: Sequence[_Kept]) -> Array:
  """Computes the part with some channels of each group; all others are closed."""
  if isinstance(part, Layer):
    return _compact_layer(part, x, kept)
  indices, masks = [], []
  for channels in kept:
    indices.append(channels.index)
    masks.append(channels.gates[None])
  branch = chain(_subnet(part.convs, indices), x, masks)
  return jax.nn.relu(branch + part.shortcut(x))


def _compact_layer(layer: Layer, x: Array, kept: Sequence[_Kept]) -> Array:
  """Computes a layer with some channels of its input and its output."""
  conv, kept = layer.conv, list(kept)
  # The first entry is then the layer's input: its closed channels are zeros, and left out.
  if len(kept) > len(layer.groups):
    index = kept.pop(0).index
    conv, x = conv.select(inputs=index), x.at[..., index].get(mode="promise_in_bounds")
  if not kept:
    return layer.after(conv(x))
  (channels,) = kept
  y = layer.after(conv.select(outputs=channels.index)(x)) * channels.gates[None, None, None]
  return _spread(y, channels.index, layer.conv.bias.size)


def _subnet(convs: Sequence[Conv], channels: Sequence[AnyArray]) -> tuple[Conv, ...]:
  """Restricts convolutions to the given channels between them."""
  # The first reads all channels, the last writes all.
  ends, subnet = [None, *channels, None], []
  for i, conv in enumerate(convs):
    subnet.append(conv.select(inputs=ends[i], outputs=ends[i + 1]))
  return tuple(subnet)


def _spread(y: Array, index: Array, size: int) -> Array:
  """Puts channels in their places, with zeros elsewhere."""
  # A gather, each place from its channel or from a channel of zeros after the last.
  places = jnp.arange(index.size, dtype=jnp.int32)
  source = jnp.full((size,), index.size, jnp.int32).at[index].set(places)
  return jnp.pad(y, [(0, 0)] * 3 + [(0, 1)])[..., source]


def layer_dispatch(part: Part, context: PartContext) -> CompiledPart | None:
  """Runs the branch on the examples open for it, gathered; None without a gate of the branch."""
  if not isinstance(part, Block) or not part.layer_gate or not part.groups:
    return None
  # ReLU changes nothing in a shortcut that is the input and never below 0.
  plain_shortcut = context.rectified and part.project is None

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, its branch on the open examples only."""
    del before

    def run_branch(x: Array, *weights: Array) -> Array:
      """Computes the branch of some examples, times their `[K, 1]` weights, if they have any."""
      branch = chain(part.convs, x)
      for weight in weights:
        branch = branch * weight[:, None, None]
      return branch

    return for_open(
      gates[0][:, 0] > 0,
      inputs=(x, *_weights_of(part, gates)),
      function=run_branch,
      y=part.shortcut(x),
      buckets=context.buckets,
      after=jax.nn.relu,
      closed=_unchanged if plain_shortcut else jax.nn.relu,
    )

  return CompiledPart(part, run)


def _weights_of(part: Part, gates: Gates) -> Gates:
  """Returns the gates of the part's first group where they are weights; nothing where 0 or 1."""
  return gates[:1] if part.weighted else ()


def layer_dispatch_macs(batch: PartBatch) -> float:
  """Counts the branch for the examples gathered, as a fraction of all N."""
  fraction = batch.padded(batch.gates[0][:, 0]) / batch.count
  return batch.total(opened=[fraction])


def _has_one_hidden_group(part: Part) -> TypeGuard[Block]:
  """Tests for a block of two convolutions with gates of the channels between them."""
  return (
    isinstance(part, Block)
    and not part.layer_gate
    and len(part.inner_groups) == 1
    and not is_dead(part)
  )


def block_dispatch(part: Part, context: PartContext) -> CompiledPart | None:
  """Runs each gate's channels on the examples open for it, gathered.

  It is None unless the part has two convolutions whose gates switch several channels each.
  """
  if not _has_one_hidden_group(part) or part.inner_groups[0].channels == 1:
    return None
  (group,) = part.inner_groups

  def run_span(convs: Sequence[Conv], span: slice, x: Array, *weights: Array) -> Array:
    """Computes the branch with some of the hidden channels; the last bias is left out.

    The hidden channels are multiplied by their `[K, 1]` weights, if they have any.
    """
    first, last = convs
    last = dataclasses.replace(last.select(inputs=span), bias=jnp.zeros_like(last.bias))
    return chain((first.select(outputs=span), last), x, weights)

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, each gate's channels on their open examples only."""
    del before
    # The last bias once: each gate's channels add their part of the sum without it.
    y = part.shortcut(x) + part.convs[-1].bias[None, None, None]
    if group.always:
      # Channels without a gate run for all examples.
      y = y + run_span(part.convs, slice(group.always), x)
    for unit in range(group.gates):
      start = group.always + unit * group.channels
      span = slice(start, start + group.channels)
      weights = [weight[:, unit : unit + 1] for weight in _weights_of(part, gates)]
      y = for_open(
        gates[0][:, unit] > 0,
        inputs=(x, *weights),
        function=functools.partial(run_span, part.convs, span),
        y=y,
        buckets=context.buckets,
      )
    return jax.nn.relu(y)

  return CompiledPart(part, run)


def block_dispatch_macs(batch: PartBatch) -> float:
  """Counts each gate's channels for the examples gathered for it."""
  (group,) = batch.part.inner_groups
  examples = 0
  for gates in batch.gates[0].T:
    examples += batch.padded(gates)
  # The mean number of channels that run for an example.
  channels = group.always + group.channels * examples / batch.count
  return batch.total(opened=[channels])


def _unchanged(y: Array) -> Array:
  """Returns y."""
  return y


def for_open(
  is_open: Array,
  inputs: tuple[Array, ...],
  function: Callable[..., Any],
  y: Any,
  buckets: int,
  after: Callable[[Array], Array] = _unchanged,
  closed: Callable[[Array], Array] | None = None,
) -> Any:
  """Adds to y, arrays `[N, ...]`, the function of the open examples.

  There is a program for each of a few counts of open examples.

  Args:
    is_open: `[N]` bool.
    inputs: of the function, arrays `[N, ...]`.
    function: from the gathered inputs to arrays like y.
    y: the array, or a tree of arrays.
    buckets: largest number of programs.
    after: applied to each element of the sum, within the programs, so that it needs no further pass
      over y.
    closed: something cheaper that does the same to y where nothing is added; `after` if None.
  Returns:
    The tree of y, with `after` or `closed` applied.
  """
  closed = closed or after
  total, sizes = is_open.size, example_sizes(is_open.size, buckets)

  def where(flags: Array, tree: Any) -> Any:
    """Puts 0 where a flag of an example is False."""
    expand = lambda a: jnp.expand_dims(flags, range(1, a.ndim))
    return jax.tree.map(lambda a: jnp.where(expand(a), a, 0), tree)

  def run_none() -> Any:
    """Adds nothing."""
    return jax.tree.map(closed, y)

  def run_all() -> Any:
    """Adds the function of all examples, 0 for closed ones."""
    added = function(*inputs)
    # The program for one example runs only if it is open: nothing to mask.
    added = added if total == 1 else where(is_open, added)
    return jax.tree.map(lambda a, b: after(a + b), y, added)

  def run_some(count: int) -> Any:
    """Adds the function of `count` gathered examples, the open ones among them."""
    # Open examples come first; the rest of the K are closed ones, to which `where` adds 0.
    taken, index = lax.top_k(is_open.astype(jnp.float32), count)
    gathered = [a[index] for a in inputs]
    added = where(taken > 0, function(*gathered))

    def put(a: Array, b: Array) -> Array:
      """Adds b to the examples of a that were gathered."""
      summed = after(a[index] + b)
      return closed(a).at[index].set(summed, unique_indices=True, mode="promise_in_bounds")

    return jax.tree.map(put, y, added)

  programs = [run_none]
  for size in sizes[1:]:
    programs.append(run_all if size == total else functools.partial(run_some, size))
  # The smallest program that holds all open examples runs.
  return lax.switch(_smallest_program(jnp.sum(is_open), sizes), programs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Clustered(Block):
  """A block with subnets, each with some channels of each group."""

  subnets: tuple[tuple[Conv, ...], ...] = ()


def cluster(part: Part, context: PartContext) -> CompiledPart | None:
  """Runs each example through the smallest of a few subnets that has all channels it opens.

  It is None without calibration data, or without gates of channels of a block.
  """
  if not isinstance(part, Block) or part.layer_gate or not part.inner_groups or is_dead(part):
    return None
  if not context.gates:
    return None
  sets = _channel_sets(part, context)
  subnets = tuple(_subnet(part.convs, kept) for kept in sets)

  def run_masked(convs: Sequence[Conv], x: Array, *masks: Array) -> Array:
    """Computes a branch, each of whose channels is multiplied by its mask."""
    return chain(convs, x, masks)

  def run(part: _Clustered, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, each example by its smallest subnet."""
    del before
    masks = part.masks(gates)
    y, waiting = part.shortcut(x), jnp.ones(len(x), bool)
    # Smallest first: an example goes to the first set that covers what it opens.
    for convs, kept in zip(part.subnets, sets, strict=True):
      kept_masks = select_channels(masks, kept)
      taken = waiting & are_covered(masks, kept_masks)
      y = for_open(
        taken,
        inputs=(x, *kept_masks),
        function=functools.partial(run_masked, convs),
        y=y,
        buckets=context.buckets,
      )
      waiting &= ~taken
    return for_open(
      waiting,
      inputs=(x, *masks),
      function=functools.partial(run_masked, part.convs),
      y=y,
      buckets=context.buckets,
      after=jax.nn.relu,
    )

  return CompiledPart(_Clustered(**vars(part), subnets=subnets), run)


def _channel_sets(block: Block, context: PartContext) -> list[list[np.ndarray]]:
  """Returns the sets of channels that calibration data open together, smallest first."""
  groups = block.inner_groups
  # The last program computes all channels, so one bucket less is left for sets.
  return unions(groups, context.gates[: len(groups)], context.buckets - 1)


def cluster_macs(batch: PartBatch) -> float:
  """Counts the channels of each set for the examples gathered for it."""
  part = batch.part
  assert isinstance(part, Block)  # `cluster` fits no other
  masks = list(map(np.asarray, part.masks(batch.gates)))
  whole = [np.arange(group.width) for group in part.inner_groups]
  # The shortcut runs for all; an example waits until a set covers what it opens.
  total = costs.macs_over_examples(costs.shortcut_macs(part, batch.shape).macs, batch.count)
  waiting = np.ones(batch.count, bool)
  for kept in [*_channel_sets(part, batch.context), whole]:
    taken = waiting & np.asarray(are_covered(masks, select_channels(masks, kept)))
    branch = costs.branch_macs(part, batch.shape, opened=[index.size for index in kept])
    total += costs.macs_over_examples(branch, batch.padded(taken))
    waiting &= ~taken
  return total


def native(part: Part, context: PartContext) -> CompiledPart | None:
  """Fits any part that computes something, without dilation or padding on one side.

  XLA computes the projection. It does not fit parts with scales, of which it has nothing to skip.
  """
  convs = (part.conv,) if isinstance(part, Layer) else part.convs
  if not convs or (part.head is not None and part.head.scales):
    return None
  packed = []
  for conv in convs:
    # The kernel pads symmetrically.
    if conv.dilation != 1 or conv.same or not conv.kernel.size:
      return None
    # Packed once, not in every call: the kernel reads the weights in another layout.
    packed.append(dataclasses.replace(conv, kernel=native_kernels.packed(conv.kernel)))

  def gates_before(before: Gates) -> Array | None:
    """Expands the gates of the part's input to `[N, D]`; None where it has none."""
    if not context.groups_before:
      return None
    (group,), (gates,) = context.groups_before, before
    return group.expand(gates)

  def run_layer(layer: Layer, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the layer for x `[N, H, W, D]` by the native kernel."""
    (own,) = layer.masks(gates) or [None]
    # The input has been multiplied by its gates: here they only choose.
    masks, weighted = [gates_before(before), own], [layer.weighted]
    y = _native_chain((layer.conv,), x, masks, weighted=weighted, relu=layer.relu)
    return layer.after(y)

  def run_block(block: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]` by the native kernel."""
    if block.layer_gate and block.groups:
      # The same gate for each channel of each convolution; the input stays whole.
      wide = [jnp.broadcast_to(gates[0], (len(x), conv.bias.size)) for conv in block.convs]
      masks = [None, *wide]
      # The weight multiplies the branch, once.
      weighted = [False] * (len(wide) - 1) + [block.weighted]
    else:
      between = block.masks(gates) or [None] * (len(block.convs) - 1)
      group = block.outer_group
      outer = None if group is None else group.expand(gates[-1])
      masks = [gates_before(before), *between, outer]
      # Gates of the output multiply it afterwards.
      weighted = [block.weighted] * len(between) + [False]
    return _native_chain(block.convs, x, masks, shortcut=block.shortcut(x), weighted=weighted)

  if isinstance(part, Layer):
    return CompiledPart(dataclasses.replace(part, conv=packed[0]), run_layer)
  return CompiledPart(dataclasses.replace(part, convs=tuple(packed)), run_block)


def _native_chain(
  convs: Sequence[Conv],
  x: Array,
  masks: Sequence[Array | None],
  *,
  shortcut: Array | None = None,
  weighted: Sequence[bool],
  relu: bool = True,
) -> Array:
  """Computes the convolutions, ReLU and the sum with the shortcut in one call.

  `masks` are of the input, and of the outputs of each convolution; None where all are open.
  `weighted` says of which outputs they also multiply. `relu` is whether ReLU also follows the last
  convolution.
  """
  return native_kernels.gated_chain(
    x,
    [conv.kernel for conv in convs],
    [conv.bias for conv in convs],
    gates=masks,
    shortcut=shortcut,
    strides=[conv.stride for conv in convs],
    weighted=[flag and mask is not None for flag, mask in zip(weighted, masks[1:], strict=True)],
    relu=relu,
  )


def native_macs(batch: PartBatch) -> float:
  """Counts the open channels, and the shortcut whole."""
  opened = costs.opened_of(batch.part, batch.gates)
  # The input of a branch of one gate is computed whole.
  inputs = () if batch.part.layer_gate else open_channels(batch.context.groups_before, batch.before)
  return batch.total(*inputs, opened=opened)


def pallas(part: Part, context: PartContext) -> CompiledPart | None:
  """Fits blocks of two convolutions whose gates switch several channels each.

  On a GPU that number is a multiple of 16.
  """
  del context
  if not _has_one_hidden_group(part):
    return None
  (group,), (first, last) = part.inner_groups, part.convs
  if group.channels == 1 or group.always:
    return None
  if last.stride != 1 or (first.dilation, last.dilation) != (1, 1):
    return None
  # Triton's dots have at least 16 on each side.
  if jax.default_backend() == "gpu" and group.channels % 16:
    return None

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]` by the Pallas kernel."""
    del before
    first, last = part.convs
    weights = pallas_kernels.Branch(first.kernel, first.bias, kernel2=last.kernel, bias2=last.bias)
    branch = pallas_kernels.gated_branch(weights, x, gates[0], stride=first.stride)
    return jax.nn.relu(branch + part.shortcut(x))

  return CompiledPart(part, run)


def pallas_macs(batch: PartBatch) -> float:
  """Counts the open channels: blocks of closed ones are skipped inside the kernel, unpadded."""
  return batch.total(opened=open_channels(batch.part.inner_groups, batch.gates[:1]))


def why_not(name: str) -> str:
  """Explains why a strategy cannot run on this machine, and what would help; empty if it can."""
  # Only the native kernel has to be built; Pallas is interpreted where there is no GPU.
  if name != "native":
    return ""
  if jax.default_backend() != "cpu":
    return f"it runs on CPUs; the default backend is {jax.default_backend()}"
  return native_kernels.why_not()


def worth_trying(name: str) -> bool:
  """Tests whether a strategy runs on this machine, and may be fast."""
  return not why_not(name) and (name != "pallas" or jax.default_backend() == "gpu")


# Strategies of plain JAX, which run on any platform.
EXPORTABLE = (MASKED, "switch", "block_dispatch", "layer_dispatch", "cluster")
STRATEGIES: dict[str, Strategy] = {
  MASKED: Strategy(masked, masked_macs),
  "switch": Strategy(switch, switch_macs),
  "block_dispatch": Strategy(block_dispatch, block_dispatch_macs),
  "layer_dispatch": Strategy(layer_dispatch, layer_dispatch_macs),
  "cluster": Strategy(cluster, cluster_macs),
  "native": Strategy(native, native_macs),
  "pallas": Strategy(pallas, pallas_macs),
}


def account(
  net: FoldedNet,
  shape: Shape,
  batches: Sequence[AllGates],
  *,
  strategies: Sequence[Iterable[str]],
  contexts: Sequence[PartContext],
  size: int,
) -> Account:
  """Counts the MACs of a network on some batches of images.

  Args:
    net: the network.
    shape: `(H, W, D)` of an image.
    batches: for each batch, `[N, U]` gates of every group of the network in order.
    strategies: the strategies of each part.
    contexts: the context of each part.
    size: N.
  Returns:
    An `Account`, per image.
  """
  of_parts = costs.macs_by_part(net, shape, folded.join_batches(batches))
  walks = [list(folded.walk(net, gates)) for gates in batches]
  starts = net.starts(shape)
  dense, opened, computed, heads = [], [], [], []
  for i, part in enumerate(net.parts):
    shape = starts.get(i, shape)
    # Counted batch by batch: padding depends on how many examples of a batch are open.
    of_batches = []
    for walked in walks:
      _, own, before = walked[i]
      of_batches.append(PartBatch(part, contexts[i], shape, gates=own, before=before, count=size))
    by_strategy = {}
    for name in strategies[i]:
      total = sum(map(STRATEGIES[name].macs, of_batches))
      by_strategy[name] = total / (size * len(batches))
    computed.append(by_strategy)
    # Gate networks are a field of their own.
    heads.append(costs.head_macs(part))
    opened.append(float(np.mean(of_parts[i])) - heads[i])
    shape, macs = costs.part_macs(part, shape)
    dense.append(macs)
  return Account(
    dense,
    opened,
    computed,
    heads=heads,
    outer=net.outer_macs(),
    glance=costs.glance_macs(net),
  )


if not TYPE_CHECKING:
  # It was here before.
  __getattr__, __dir__ = lazy_names(
    __name__, {"gating_jax.inference.costs": ("exit_dispatch_macs",)}
  )
