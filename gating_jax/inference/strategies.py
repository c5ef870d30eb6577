"""How one part of a folded network runs, skipping what its gates close: every strategy equals `folded.masked`.

    switch           each example by itself: a program for each of a few counts of open channels, weights gathered
    block_dispatch   the adjacent channels that a gate switches, for the examples open for it, gathered: a program for
                     each of a few counts of them
    layer_dispatch   the same for a branch with one gate

Every count has a program, the largest for all: no capacity overflows.

Axes: N examples, U gates of a group, C channels, K channels or examples that a program takes.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Riquelme et al., 2021 (experts' static capacity).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.inference import folded
from gating_jax.inference.folded import Block, Conv, Gates, Group, Layer, Part, Runner
from gating_jax.ops.compaction import bucket_sizes
from gating_jax.types import Array

CHANNELS = 16  # capacities are multiples of this, what a row of registers holds


@dataclasses.dataclass(frozen=True)
class Setting:
  """Of a part: examples at a time, programs at most, gates of calibration data and groups of the part before it."""

  batch_size: int
  buckets: int
  gates: tuple[np.ndarray, ...] = ()
  groups_before: tuple[Group, ...] = ()


def groups_of(part: Part) -> tuple[Group, ...]:
  """The groups that a part's own head gates."""
  return part.head.groups if part.head is not None else ()


def masked(part: Part, setting: Setting) -> Runner:
  """The part whole, closed units multiplied by 0."""
  del part, setting
  return folded.masked


def switch(part: Part, setting: Setting) -> Runner | None:
  """Only the open channels' weights; None where no channel is gated."""
  groups = (*setting.groups_before, *groups_of(part)) if isinstance(part, Layer) else groups_of(part)
  if not groups or getattr(part, "layer_gate", False):
    return None
  sizes = [bucket_sizes(group.width, setting.buckets, multiple=CHANNELS) for group in groups]
  count = max(len(size) for size in sizes)
  # Where one group has fewer sizes, its last stands for the others.
  programs = [[size[min(i, len(size) - 1)] for size in sizes] for i in range(count)]

  def of_one(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    masks = [group.expand(g)[0] for group, g in zip(groups, (*before, *gates), strict=True)]
    needed = [sum((jnp.sum(mask) > size).astype(jnp.int32) for size in of_group[:-1])
              for mask, of_group in zip(masks, sizes, strict=True)]
    order = [lax.top_k(mask, mask.size) for mask in masks]  # the open channels first, each kind in order

    def branch(capacities: Sequence[int]) -> Callable[[], Array]:
      if all(k >= group.width for k, group in zip(capacities, groups, strict=True)):
        return lambda: folded.masked(part, x, gates, before)
      return lambda: _compact(part, x, [(mask[:k], index[:k]) if k < mask.size else (mask, index)
                                        for (mask, index), k in zip(order, capacities, strict=True)])

    return lax.switch(jnp.max(jnp.stack(needed)), [branch(capacities) for capacities in programs])

  return _each(of_one)


def _each(of_one: Runner) -> Runner:
  """A runner of one example as one of any number, one after the other."""
  def run(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    if len(x) == 1:
      return of_one(part, x, gates, before)
    one = lambda args: of_one(part, *jax.tree.map(lambda a: a[None], args))[0]
    return lax.map(one, (x, gates, before))
  return run


def _compact(part: Part, x: Array, open_channels: Sequence[tuple[Array, Array]]) -> Array:
  """The part with some channels of each group alone, each with its gate; others count as closed."""
  if isinstance(part, Layer):
    conv, channels = part.conv, list(open_channels)
    if len(channels) > len(groups_of(part)):
      _, index = channels.pop(0)
      conv, x = _take(conv, inputs=index), x[..., index]
    if not channels:
      return part.after(conv(x))
    mask, index = channels[0]
    return _spread(part.after(_take(conv, outputs=index)(x)) * mask, index, part.conv.bias.size)
  h, inputs = x, None
  for i, conv in enumerate(part.convs):
    gated = i < len(open_channels)
    mask, outputs = open_channels[i] if gated else (None, None)
    h = _take(conv, inputs, outputs)(h)
    h = jax.nn.relu(h) * mask if gated else h
    inputs = outputs
  return jax.nn.relu(h + part.shortcut(x))


def _take(conv: Conv, inputs: Array | None = None, outputs: Array | None = None) -> Conv:
  kernel, bias = conv.kernel, conv.bias
  if inputs is not None:
    kernel = kernel[:, :, inputs]
  if outputs is not None:
    kernel, bias = kernel[..., outputs], bias[outputs]
  return dataclasses.replace(conv, kernel=kernel, bias=bias)


def _spread(y: Array, index: Array, size: int) -> Array:
  """Channels in their places, zeros elsewhere."""
  place = jnp.full((size,), index.size, jnp.int32).at[index].set(jnp.arange(index.size, dtype=jnp.int32))
  return jnp.pad(y, [(0, 0)] * 3 + [(0, 1)])[..., place]


def layer_dispatch(part: Part, setting: Setting) -> Runner | None:
  """The branch on the examples open for it, gathered; None without a gate of the whole branch."""
  if not getattr(part, "layer_gate", False) or not groups_of(part):
    return None

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    del before
    branch = lambda x: _chain(part.convs, x)
    return jax.nn.relu(_for_open(gates[0][:, 0] > 0, (x,), branch, part.shortcut(x), setting))

  return run


def block_dispatch(part: Part, setting: Setting) -> Runner | None:
  """Each gate's channels on the examples open for it, gathered; None but for two convolutions whose gates switch
  several channels each."""
  if not isinstance(part, Block) or part.layer_gate or len(groups_of(part)) != 1:
    return None
  (group,) = groups_of(part)
  return _dispatch_blocks(group, setting) if group.channels > 1 else None


def _chain(convs: Sequence[Conv], x: Array) -> Array:
  for i, conv in enumerate(convs):
    x = conv(jax.nn.relu(x) if i else x)
  return x


def _dispatch_blocks(group: Group, setting: Setting) -> Runner:
  spans = [slice(group.always + i * group.channels, group.always + (i + 1) * group.channels)
           for i in range(group.gates)]

  def some(convs: Sequence[Conv], span: slice) -> tuple[Conv, Conv]:
    """Through these channels alone; the last bias is left out."""
    first, last = convs
    return (dataclasses.replace(first, kernel=first.kernel[..., span], bias=first.bias[span]),
            dataclasses.replace(last, kernel=last.kernel[:, :, span], bias=jnp.zeros_like(last.bias)))

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    del before
    y = part.shortcut(x) + part.convs[-1].bias
    if group.always:
      y = y + _chain(some(part.convs, slice(group.always)), x)
    for unit, span in enumerate(spans):
      y = _for_open(gates[0][:, unit] > 0, (x,), lambda x, span=span: _chain(some(part.convs, span), x), y, setting)
    return jax.nn.relu(y)

  return run


def _for_open(is_open: Array, inputs: tuple[Array, ...], function: Callable[..., Array], y: Array,
              setting: Setting) -> Array:
  """y, with the function of the open examples added."""
  total = is_open.size
  sizes = (0, *bucket_sizes(total, setting.buckets)) if total > 1 else (0, 1)
  column = lambda flags: flags[:, None, None, None]

  def branch(k: int) -> Callable[[], Array]:
    if k == 0:
      return lambda: y
    if k == total:
      if total == 1:
        return lambda: y + function(*inputs)
      return lambda: y + jnp.where(column(is_open), function(*inputs), 0)

    def run() -> Array:
      taken, index = lax.top_k(is_open.astype(jnp.float32), k)
      added = jnp.where(column(taken > 0), function(*(a[index] for a in inputs)), 0)
      return y.at[index].add(added, unique_indices=True, mode="promise_in_bounds")
    return run

  count = jnp.sum(is_open)
  return lax.switch(sum((count > size).astype(jnp.int32) for size in sizes[:-1]), [branch(k) for k in sizes])


STRATEGIES: dict[str, Callable[[Part, Setting], Runner | None]] = {
    "masked": masked, "switch": switch, "block_dispatch": block_dispatch, "layer_dispatch": layer_dispatch}
