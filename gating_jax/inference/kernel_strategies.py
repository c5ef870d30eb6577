"""Strategies that use our own kernels, and the table of all strategies.

The rules of `strategies` hold for these, too.

    native   channels that are closed for an example are not computed, for any number of
             examples, on a CPU
    pallas   closed blocks of channels are not computed, on a GPU; interpreted elsewhere, slowly

Axes: see `strategies`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gating_jax.inference import strategies
from gating_jax.inference.folded import Block, Conv, Gates, Layer, Part, gates_output, groups_of
from gating_jax.inference.strategies import CompiledPart, Setting, is_dead
from gating_jax.ops import native_kernels as native_kernel
from gating_jax.ops import pallas_kernels
from gating_jax.types import Array


def native(part: Part, setting: Setting) -> CompiledPart:
  """Fits any part that computes something, without dilation; XLA computes the projection."""
  convs = (part.conv,) if isinstance(part, Layer) else part.convs
  if not convs or any(conv.dilation != 1 or not conv.kernel.size for conv in convs):
    return None
  # Packed once, not in every call: the kernel reads the weights in another layout.
  turned = [dataclasses.replace(conv, kernel=native_kernel.packed(conv.kernel)) for conv in convs]
  turned = dict(conv=turned[0]) if isinstance(part, Layer) else dict(convs=tuple(turned))

  def run(part: Part, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the part for x `[N, H, W, D]` by the native kernel."""
    own = [group.expand(g) for group, g in zip(groups_of(part), gates, strict=False)]
    inside = [group.expand(g) for group, g in zip(setting.groups_before, before, strict=True)] or [
      None
    ]
    if isinstance(part, Layer):
      y = _chain((part.conv,), x, [*inside, *(own or [None])], None)
      return part.after(y)
    # A gate of the branch is no mask of the channels between its convolutions.
    between = own if own and not part.layer_gate else [None] * (len(part.convs) - 1)
    if not (part.layer_gate and own):
      outer = part.head.groups[-1].expand(gates[-1]) if gates_output(part) else None
      return _chain(part.convs, x, [*inside, *between, outer], part.shortcut(x))
    # A branch with one gate: the same gate for each channel of each convolution.
    whole = [jnp.broadcast_to(gates[0], (len(x), conv.bias.size)) for conv in part.convs]
    return _chain(part.convs, x, [None, *whole], part.shortcut(x))

  return dataclasses.replace(part, **turned), run


def _chain(
  convs: tuple[Conv, ...], x: Array, gates: list[Array | None], shortcut: Array | None
) -> Array:
  return native_kernel.gated_chain(
    x,
    [conv.kernel for conv in convs],
    [conv.bias for conv in convs],
    gates,
    shortcut,
    strides=[conv.stride for conv in convs],
    layout="OIHW",
    implementation="native",
  )


def pallas(part: Part, setting: Setting) -> CompiledPart:
  """Fits blocks of two convolutions whose gates switch several channels each.

  On a GPU that number is a multiple of 16.
  """
  del setting
  if not isinstance(part, Block) or part.layer_gate or len(groups_of(part)) != 1 or is_dead(part):
    return None
  (group,), (first, last) = groups_of(part), part.convs
  if (
    group.channels == 1
    or group.always
    or last.stride != 1
    or (first.dilation, last.dilation) != (1, 1)
  ):
    return None
  # Triton's dots have at least 16 on each side.
  if jax.default_backend() == "gpu" and group.channels % 16:
    return None

  def run(part: Block, x: Array, gates: Gates, before: Gates) -> Array:
    """Computes the block for x `[N, H, W, D]` by the Pallas kernel."""
    del before
    first, last = part.convs
    branch = pallas_kernels.Branch(first.kernel, first.bias, last.kernel, last.bias)
    return jax.nn.relu(
      pallas_kernels.gated_branch(branch, x, gates[0], stride=first.stride) + part.shortcut(x)
    )

  return part, run


def why_not(name: str) -> str:
  """Explains why a strategy cannot run on this machine, and what would help; empty if it can."""
  # Only the native kernel has to be built; Pallas is interpreted where there is no GPU.
  if name != "native":
    return ""
  if jax.default_backend() != "cpu":
    return f"it runs on CPUs; the default backend is {jax.default_backend()}"
  return native_kernel.why_not()


def worth_trying(name: str) -> bool:
  """Tests whether a strategy runs on this machine, and may be fast."""
  return not why_not(name) and (name != "pallas" or jax.default_backend() == "gpu")


# Strategies of plain JAX, which run on any platform.
EXPORTABLE = ("masked", "switch", "block_dispatch", "layer_dispatch", "cluster")
STRATEGIES: dict[str, Callable[[Part, Setting], CompiledPart]] = {
  "masked": strategies.masked,
  "switch": strategies.switch,
  "block_dispatch": strategies.block_dispatch,
  "layer_dispatch": strategies.layer_dispatch,
  "cluster": strategies.cluster,
  "native": native,
  "pallas": pallas,
}
