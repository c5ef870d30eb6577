"""Ways to run one part of a folded network that skip closed units, all equal to `folded.masked`.

    switch           each example alone: a program for each of a few counts of open channels,
                     weights gathered
    block_dispatch   the adjacent channels that a gate switches, for the examples open for it,
                     gathered: a program for each of a few counts of them
    layer_dispatch   the same for a branch with one gate
    cluster          a few sets of channels that calibration data open together, weights gathered
                     beforehand: an example goes to the smallest that covers what it opens

Every count has a program, the largest for all: no capacity overflows.

Axes: N examples, U gates of a group, C channels, K channels or examples that a program takes.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Riquelme et al., 2021 (experts'
static capacity).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.inference import folded
from gating_jax.inference.clusters import CHANNELS, covered, unions
from gating_jax.inference.folded import (
  Block,
  Conv,
  FoldedNet,
  Gates,
  Group,
  Layer,
  Part,
  Runner,
  groups_of,
)
from gating_jax.ops.compaction import bucket_sizes
from gating_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Setting:
  """The setting with which a strategy is made for a part.

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


def settings_of(net: FoldedNet, buckets: int, gates: Sequence[np.ndarray] = ()) -> list[Setting]:
  """Returns the setting of each part.

  Args:
    net: the network.
    buckets: largest number of programs.
    gates: `[M, U]` of every group of the network in order, or none.
  """
  settings, groups_before, gates = [], (), list(gates)
  for i, part in enumerate(net.parts):
    groups = part.head.groups if part.head is not None else ()
    own, gates = tuple(gates[: len(groups)]), gates[len(groups) :]
    settings.append(Setting(buckets, own, groups_before, rectified=i > 0))
    groups_before = folded.output_groups(part, groups)
  return settings


# The part with its weights in the form that the runner needs; None where a strategy does not fit.
CompiledPart = tuple[Part, Runner] | None


def masked(part: Part, setting: Setting) -> CompiledPart:
  """Computes the whole part and multiplies closed units by 0."""
  del setting
  return part, folded.masked


def switch(part: Part, setting: Setting) -> CompiledPart:
  """Computes with the weights of open channels only; None where no channel is gated."""
  # A layer's input may be gated; a block's input goes through the shortcut, too, and stays whole.
  inputs = setting.groups_before if isinstance(part, Layer) else ()
  groups = (*inputs, *groups_of(part))
  if not groups or getattr(part, "layer_gate", False) or is_dead(part):
    return None
  sizes = capacities(groups, setting.buckets)
  programs = list(zip(*sizes, strict=True))

  def of_one(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the part for one example, x `[1, H, W, D]`, by the smallest program that fits."""
    masks = [
      group.expand(g)[0] for group, g in zip(groups, (*before[: len(inputs)], *gates), strict=False)
    ]
    # The smallest program that holds the open channels of a group; the largest over groups runs.
    needed = [
      sum((jnp.sum(mask) > size).astype(jnp.int32) for size in of_group[:-1])
      for mask, of_group in zip(masks, sizes, strict=True)
    ]

    def branch(capacities: Sequence[int]) -> Callable[[], Array]:
      """Returns the computation with `capacities` channels of each group."""
      if all(k >= group.width for k, group in zip(capacities, groups, strict=True)):
        return lambda: folded.masked(part, x, gates, before)
      # The open channels first, each kind in order; in the branch, as sorting fewer is quicker.
      return lambda: _compact(
        part,
        x,
        [lax.top_k(mask, min(k, mask.size)) for mask, k in zip(masks, capacities, strict=True)],
      )

    return lax.switch(jnp.max(jnp.stack(needed)), [branch(capacities) for capacities in programs])

  return part, _each(of_one)


def is_dead(part: Part) -> bool:
  """Tests whether a group has no channels, as `prune` leaves a branch that never opens."""
  return any(group.width == 0 for group in groups_of(part))


def capacities(groups: Sequence[Group], buckets: int) -> list[tuple[int, ...]]:
  """Returns the channels that the programs of `switch` take of each group, fewest first.

  There is a number for each program.
  """
  sizes = [bucket_sizes(group.width, buckets, multiple=CHANNELS) for group in groups]
  count = max(len(size) for size in sizes)
  # A group with fewer sizes repeats its last one.
  return [size + size[-1:] * (count - len(size)) for size in sizes]


def _each(of_one: Runner) -> Runner:
  """Turns a runner of one example into one of any number, one after the other."""

  def run(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the part for x `[N, H, W, D]`, one example after the other."""
    if len(x) == 1:
      return of_one(part, x, gates, before)
    one = lambda args: of_one(part, *jax.tree.map(lambda a: a[None], args))[0]
    # A loop, not `vmap`, which would compute every program for every example.
    return lax.map(one, (x, gates, before))

  return run


def _compact(part: Part, x: Array, open_channels: Sequence[tuple[Array, Array]]) -> Array:
  """Computes the part with some channels of each group, each with its gate; others are closed."""
  if isinstance(part, Layer):
    conv, channels = part.conv, list(open_channels)
    # The first entry is then the layer's input: its closed channels are zeros, and left out.
    if len(channels) > len(groups_of(part)):
      _, index = channels.pop(0)
      conv, x = _take(conv, inputs=index), x.at[..., index].get(mode="promise_in_bounds")
    if not channels:
      return part.after(conv(x))
    mask, index = channels[0]
    y = part.after(_take(conv, outputs=index)(x)) * mask[None, None, None]
    return _spread(y, index, part.conv.bias.size)
  convs = _subnet(part.convs, [index for _, index in open_channels])
  return jax.nn.relu(_chain(convs, x, [mask[None] for mask, _ in open_channels]) + part.shortcut(x))


def _subnet(convs: Sequence[Conv], channels: Sequence[Array]) -> tuple[Conv, ...]:
  """Restricts convolutions to the given channels between them."""
  ends = [None, *channels, None]
  return tuple(_take(conv, *ends[i : i + 2]) for i, conv in enumerate(convs))


def _take(conv: Conv, inputs: Array | None = None, outputs: Array | None = None) -> Conv:
  kernel, bias = conv.kernel, conv.bias
  # The indices come from `top_k` or from the host and are in bounds: no clamping.
  if inputs is not None:
    kernel = kernel.at[:, :, inputs].get(mode="promise_in_bounds")
  if outputs is not None:
    kernel, bias = (a.at[..., outputs].get(mode="promise_in_bounds") for a in (kernel, bias))
  return dataclasses.replace(conv, kernel=kernel, bias=bias)


def _spread(y: Array, index: Array, size: int) -> Array:
  """Puts channels in their places, with zeros elsewhere."""
  place = (
    # A gather, each place from its channel or from a channel of zeros after the last.
    jnp.full((size,), index.size, jnp.int32).at[index].set(jnp.arange(index.size, dtype=jnp.int32))
  )
  return jnp.pad(y, [(0, 0)] * 3 + [(0, 1)])[..., place]


def layer_dispatch(part: Part, setting: Setting) -> CompiledPart:
  """Runs the branch on the examples open for it, gathered; None without a gate of the branch."""
  if not getattr(part, "layer_gate", False) or not groups_of(part):
    return None

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, its branch on the open examples only."""
    del before
    branch = lambda x: _chain(part.convs, x)
    return for_open(
      gates[0][:, 0] > 0,
      (x,),
      branch,
      part.shortcut(x),
      setting.buckets,
      after=jax.nn.relu,
      # ReLU changes nothing in a shortcut that is the input and never below 0.
      closed=(lambda y: y) if setting.rectified and part.project is None else jax.nn.relu,
    )

  return part, run


def block_dispatch(part: Part, setting: Setting) -> CompiledPart:
  """Runs each gate's channels on the examples open for it, gathered.

  It is None unless the part has two convolutions whose gates switch several channels each.
  """
  if not isinstance(part, Block) or part.layer_gate or len(groups_of(part)) != 1 or is_dead(part):
    return None
  (group,) = groups_of(part)
  return (part, _dispatch_blocks(group, setting)) if group.channels > 1 else None


def _chain(convs: Sequence[Conv], x: Array, masks: Sequence[Array] = ()) -> Array:
  """Applies convolutions with ReLU between; `[N, C]` masks, if any, multiply all but the last."""
  for i, conv in enumerate(convs):
    x = conv(x)
    if i + 1 < len(convs):
      x = jax.nn.relu(x)
      x = x * masks[i][:, None, None] if masks else x
  return x


def _dispatch_blocks(group: Group, setting: Setting) -> Runner:
  spans = [
    slice(group.always + i * group.channels, group.always + (i + 1) * group.channels)
    for i in range(group.gates)
  ]

  def some(convs: Sequence[Conv], span: slice) -> tuple[Conv, Conv]:
    """Restricts the convolutions to these channels; the last bias is left out."""
    first, last = convs
    return (
      dataclasses.replace(first, kernel=first.kernel[..., span], bias=first.bias[span]),
      dataclasses.replace(last, kernel=last.kernel[:, :, span], bias=jnp.zeros_like(last.bias)),
    )

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, each gate's channels on their open examples only."""
    del before
    # The last bias once: each gate's channels add their part of the sum without it.
    y = part.shortcut(x) + part.convs[-1].bias[None, None, None]
    if group.always:
      # Channels without a gate run for all examples.
      y = y + _chain(some(part.convs, slice(group.always)), x)
    for unit, span in enumerate(spans):
      y = for_open(
        gates[0][:, unit] > 0,
        (x,),
        lambda x, span=span: _chain(some(part.convs, span), x),
        y,
        setting.buckets,
      )
    return jax.nn.relu(y)

  return run


def for_open(
  is_open: Array,
  inputs: tuple[Array, ...],
  function: Callable[..., Any],
  y: Any,
  buckets: int,
  after: Callable[[Array], Array] = lambda y: y,
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
  add = functools.partial(jax.tree.map, lambda a, b: after(a + b))
  where = lambda flags, tree: jax.tree.map(
    lambda a: jnp.where(jnp.expand_dims(flags, range(1, a.ndim)), a, 0), tree
  )

  def branch(k: int) -> Callable[[], Any]:
    """Returns the program for at most k open examples."""
    if k == 0:
      return lambda: jax.tree.map(closed, y)
    if k == total:
      # The program for one example runs only if it is open: nothing to mask.
      if total == 1:
        return lambda: add(y, function(*inputs))
      return lambda: add(y, where(is_open, function(*inputs)))

    def run() -> Any:
      """Computes the function of k gathered examples and adds it to y."""
      # Open examples come first; the rest of the K are closed ones, to which `where` adds 0.
      taken, index = lax.top_k(is_open.astype(jnp.float32), k)
      added = where(taken > 0, function(*(a[index] for a in inputs)))
      put = lambda a, b: (
        closed(a).at[index].set(after(a[index] + b), unique_indices=True, mode="promise_in_bounds")
      )
      return jax.tree.map(put, y, added)

    return run

  # The smallest program that holds all open examples runs.
  count = jnp.sum(is_open)
  return lax.switch(
    sum((count > size).astype(jnp.int32) for size in sizes[:-1]), [branch(k) for k in sizes]
  )


def example_sizes(total: int, buckets: int) -> tuple[int, ...]:
  """Returns the numbers of open examples that the programs of `for_open` take, of `total`."""
  return (0, *bucket_sizes(total, buckets)) if total > 1 else (0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Clustered(Block):
  """A block with subnets, each with some channels of each group."""

  subnets: tuple[tuple[Conv, ...], ...] = ()


def cluster(part: Part, setting: Setting) -> CompiledPart:
  """Runs each example through the smallest of a few subnets that has all channels it opens.

  It is None without calibration data, or without gates of channels of a block.
  """
  if (
    not isinstance(part, Block)
    or part.layer_gate
    or not groups_of(part)
    or not setting.gates
    or is_dead(part)
  ):
    return None
  groups = groups_of(part)
  # The last program computes all channels, so one bucket less is left for sets.
  found = unions(groups, setting.gates[: len(groups)], setting.buckets - 1)
  subnets = tuple(
    _subnet(part.convs, [jnp.asarray(index) for index in of_groups]) for of_groups in found
  )
  made = _Clustered(
    **{field.name: getattr(part, field.name) for field in dataclasses.fields(part)}, subnets=subnets
  )

  def run(part: _Clustered, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]`, each example by its smallest subnet."""
    del before
    own = [group.expand(g) for group, g in zip(groups, gates, strict=False)]
    y, waiting = part.shortcut(x), jnp.ones(len(x), bool)
    for convs, of_groups in zip(part.subnets, found, strict=True):
      # Smallest first: an example goes to the first set that covers what it opens.
      taken = waiting & covered(own, of_groups)
      inputs = (x, *(mask[:, index] for mask, index in zip(own, of_groups, strict=True)))
      y = for_open(
        taken, inputs, lambda x, *m, convs=convs: _chain(convs, x, m), y, setting.buckets
      )
      waiting &= ~taken
    return for_open(
      waiting,
      (x, *own),
      lambda x, *m: _chain(part.convs, x, m),
      y,
      setting.buckets,
      after=jax.nn.relu,
    )

  return made, run
