"""Multiply-accumulates of a folded network and of its parts, for all units or for open ones.

Axes: N examples, H and W pixels, D channels, U gates of a group.
Reference: Bejnordi et al., 2020, section 4 (MACs of gated layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gating_jax.inference.folded import Block, Conv, Folded, Group, Layer, Part, handed_on


def macs(net: Folded, input_shape: tuple[int, int, int], gates: Sequence[Any] = ()) -> Any:
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
  net: Folded, input_shape: tuple[int, int, int], gates: Sequence[Any] = ()
) -> list[Any]:
  """Computes `macs` of each part, the classifier left out."""
  shape, inputs, gates, found = tuple(input_shape), (), list(gates), []
  for part in net.parts:
    count = len(part.head.groups) if part.head is not None else 0
    opened, gates = opened_of(part, gates[:count]) if gates else [], gates[count:]
    shape, spent = part_macs(part, shape, *inputs, opened=opened)
    found.append(head_macs(part) + spent)
    # The next part multiplies only by the channels that this one's gates leave.
    inputs = handed_on(part, opened)
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
