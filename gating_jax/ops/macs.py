"""Counts of multiply-accumulates (MACs): of layers, of gated units, and of gate records.

One multiply-accumulate is 1; biases, BatchNorm, pooling and additions are not counted.

Four modules count MACs. This one turns sizes into MACs, and counts those that open gates execute.
`layers.mac_trace` counts the layers that a network calls, `models.summary` whole networks, and
`inference.costs` what compiled programs compute, padding included.

Axes: N examples, C gates of one layer.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.ops import arguments
from gating_jax.ops.arguments import float_dtype, number_as, one_dtype
from gating_jax.types import AnyArray, Array, GateRecord, Records


def conv_macs(kernel_shape: Sequence[int], output_shape: Sequence[int]) -> int:
  """Computes the MACs per example of a convolution or dense layer.

  Args:
    kernel_shape: `[*window, Cin / groups, Cout]`; a dense kernel is `[Cin, Cout]`.
    output_shape: `[N, *spatial, Cout]`.
  Returns:
    The MACs, a whole number.
  Raises:
    ValueError, TypeError: sizes that are no whole numbers >= 0.

  >>> conv_macs((3, 3, 16, 32), (1, 8, 8, 32))
  294912
  """
  for name, shape in {"kernel_shape": kernel_shape, "output_shape": output_shape}.items():
    for size in arguments.items(name, shape, "sizes"):
      arguments.whole_number(f"each of {name}", size, 0)
  # Every entry of the kernel is used once at every output place.
  return math.prod(kernel_shape) * math.prod(output_shape[1:-1])


def dense_layer_macs(*kernel_shapes: Sequence[int]) -> int:
  """Computes the MACs per example of dense layers, one after the other.

  Args:
    kernel_shapes: `[Cin, Cout]` of each.

  >>> dense_layer_macs((8, 4), (4, 2))
  40
  """
  return sum(conv_macs(shape, (1, shape[-1])) for shape in kernel_shapes)


class ConvMacs(NamedTuple):
  """Coefficients of a convolution's MACs per example.

  With i input and o output channels it costs `i * per_input + o * per_output + i * o * per_pair`.

  >>> ConvMacs(per_input=0, per_output=0, per_pair=9).total(inputs=2, outputs=4)
  72
  """

  per_input: int
  per_output: int
  per_pair: int

  def total(self, *, inputs: int, outputs: int) -> int:
    """Returns the MACs with this many input and output channels."""
    return inputs * self.per_input + outputs * (self.per_output + inputs * self.per_pair)


def plain_conv(
  window: Sequence[int], output_shape: Sequence[int], *, depthwise: bool = False
) -> ConvMacs:
  """Returns the coefficients of a convolution; of a dense layer, the window is `()`.

  Args:
    window: size of the window, one number per axis.
    output_shape: `[N, *spatial, Cout]`.
    depthwise: whether an output channel reads the input channel of its number alone.

  >>> plain_conv((3, 3), (1, 8, 8, 32))
  ConvMacs(per_input=0, per_output=0, per_pair=576)
  """
  # Those of a kernel with one input and one output channel.
  macs = conv_macs((*window, 1, 1), output_shape)
  # A depthwise channel reads itself alone, so it costs nothing per pair.
  return ConvMacs(macs, 0, 0) if depthwise else ConvMacs(0, 0, macs)


def factorised_conv(space: ConvMacs, time: ConvMacs, middle: int) -> ConvMacs:
  """Returns the coefficients of two convolutions, one after the other.

  No pair of an input and an output channel has its own cost, since the channels in between
  always run.

  Args:
    space, time: the first and the second convolution, both plain.
    middle: number of channels in between.

  >>> factorised_conv(ConvMacs(0, 0, 9), ConvMacs(0, 0, 3), middle=4)
  ConvMacs(per_input=36, per_output=12, per_pair=0)
  """
  return ConvMacs(per_input=space.per_pair * middle, per_output=time.per_pair * middle, per_pair=0)


def shared_among(macs: int, *, inputs: int | None = None, outputs: int | None = None) -> ConvMacs:
  """Returns the coefficients of a layer whose MACs its channels share in equal parts.

  Args:
    macs: MACs per example of the whole layer.
    inputs, outputs: number of the channels that share them: the input channels, the output
      channels or, with both, the pairs of them.
  Raises:
    ValueError: neither is given.

  >>> shared_among(72, outputs=4), shared_among(72, inputs=2, outputs=4).per_pair
  (ConvMacs(per_input=0, per_output=18, per_pair=0), 9)
  """
  if inputs is not None and outputs is not None:
    return ConvMacs(0, 0, macs // (inputs * outputs))
  if inputs is not None:
    return ConvMacs(macs // inputs, 0, 0)
  if outputs is not None:
    return ConvMacs(0, macs // outputs, 0)
  raise ValueError("inputs or outputs must be the number of channels that share; got neither")


class UnitMacs(NamedTuple):
  """MACs per example of a gated unit.

  Attributes:
    alone: of the open unit.
    per_pair: of the open unit together with an open one of the record before, as in `GateRecord`.

  >>> UnitMacs(alone=10, per_pair=2).of_gate(channels=4, before=8)
  UnitMacs(alone=40, per_pair=64)
  """

  alone: int
  per_pair: int = 0

  def of_gate(self, channels: int, before: int = 1) -> UnitMacs:
    """Returns those of a gate that switches several channels.

    Args:
      channels: number of channels of the gate.
      before: number of channels of a gate of the record before.
    """
    # Two gates, of `channels` and of `before` channels, switch channels * before pairs.
    return UnitMacs(channels * self.alone, channels * before * self.per_pair)

  def plus(self, macs: int) -> UnitMacs:
    """Returns those of a unit that costs so many MACs more."""
    return UnitMacs(self.alone + macs, self.per_pair)


def channel_macs(
  made: ConvMacs,
  *,
  inputs: int | None = None,
  read: ConvMacs | None = None,
  outputs: int | None = None,
) -> UnitMacs:
  """Computes the cost of a gated channel in the layer that makes it and in the one that reads it.

  A layer gated on both sides costs MACs per pair of open channels. They belong to the channels that
  it makes, so that no pair counts twice.

  Args:
    made: of the layer that makes the channel.
    inputs: number of channels that this layer reads, if all of them are read; None if gates switch
      them.
    read: of the layer that reads the channel; None for one whose costs belong to other channels.
    outputs: number of channels that the reading layer makes, if all of them are made; None if gates
      switch them.

  >>> conv = ConvMacs(0, 0, 9)
  >>> channel_macs(conv, inputs=3, read=conv, outputs=5)
  UnitMacs(alone=72, per_pair=0)
  >>> channel_macs(conv, read=conv)
  UnitMacs(alone=0, per_pair=9)
  """
  alone, per_pair = made.per_output, made.per_pair
  if inputs is not None:
    # All channels of the input are read, whatever is open.
    alone, per_pair = alone + inputs * per_pair, 0
  if read is not None:
    alone += read.per_input
    if outputs is not None:
      # All channels of the output are made, whatever is open.
      alone += outputs * read.per_pair
  return UnitMacs(alone, per_pair)


def executed_macs(records: Records) -> Array:
  """Computes the MACs per example that the gated units of a network execute.

      sum_l  macs_per_unit_l |g_l| + macs_per_pair_l |g_(l-1)| |g_l|,
      |g| = number of units whose gate is above 0

  Args:
    records: in the network's order.
  Returns:
    `[N]`. Exact to the unit below 2**24 for float32 gates, and beyond for numpy float64 ones.
  Raises:
    ValueError: no records, the first one claims pairs with one before it, or records of several
      batches.
    TypeError: `records` is no list of `GateRecord`.

  >>> gates = np.array([[1.0, 0.0], [1.0, 1.0]])
  >>> first = GateRecord(gates, gates, gates, macs_per_unit=10)
  >>> second = GateRecord(gates, gates, gates, macs_per_unit=1, macs_per_pair=5)
  >>> executed_macs((first, second))
  array([16., 42.])
  """
  records = checked_records(records, "gates")
  return _macs(records, [_open_units(r.gates) for r in records])


def expected_macs(records: Records) -> Array:
  """Computes `executed_macs` at the units' probabilities of being open, `[N]`.

  Two units of a pair count as independent.

  Args:
    records: as in `executed_macs`.
  Returns:
    `[N]` MACs of each example.
  Raises:
    ValueError, TypeError: as `executed_macs`.

  >>> probs = np.array([[0.5, 0.25]])
  >>> expected_macs([GateRecord(probs, probs, probs, macs_per_unit=8)])
  array([6.])
  """
  records = checked_records(records, "probs")
  # The expected number of open units of each layer.
  return _macs(records, [_wide(r.probs).sum(-1) for r in records])


def gated_macs(records: Records) -> int:
  """Computes the MACs per example with every gate open.

  Args:
    records: in the network's order; only the number of gates and the costs count.
  Returns:
    The MACs of the gated units, a number.
  Raises:
    ValueError, TypeError: as `executed_macs`.

  >>> gates = np.zeros((1, 4))
  >>> first = GateRecord(gates, gates, gates, macs_per_unit=10)
  >>> gated_macs([first, GateRecord(gates, gates, gates, macs_per_pair=5)])
  120
  """
  total = before = 0
  for record in checked_records(records):
    # Only the last axes matter: records may be of different batches, such as images and segments.
    units = np.shape(record.gates)[-1]
    total += units * record.macs_per_unit
    if record.macs_per_pair:
      total += before * units * record.macs_per_pair
    before = units
  return total


def mac_fraction(records: Records, executed: Array, *, never_gated_macs: int) -> Array:
  """Returns MACs as a fraction of those with every gate open, without gate networks.

  Args:
    records: of one forward pass.
    executed: MACs per example of the gated units, such as the mean of `executed_macs`.
    never_gated_macs: MACs per example of everything that is never gated.

  >>> gates = np.array([[1.0, 0.0]], np.float32)
  >>> record = GateRecord(gates, gates, gates, macs_per_unit=8)
  >>> mac_fraction([record], executed_macs([record]), never_gated_macs=4)
  Array([0.6], dtype=float32)
  """
  # A fraction of the whole network, not of its gated part, can be compared between models. It is
  # computed in floats, since MACs of a large network exceed int32.
  every = number_as(never_gated_macs + gated_macs(records), like=executed)
  return (number_as(never_gated_macs, like=executed) + executed) / every


def _open_units(gates: AnyArray) -> Any:
  """Returns the number of open units of each example, `[N]`."""
  gates = _wide(gates)
  return (gates > 0).astype(gates.dtype).sum(-1)


def _wide(x: AnyArray) -> Any:
  """Returns x in float32, or in float64 if it is that, as NumPy's arrays may be.

  MACs exceed what 16 bits can count.
  """
  return x.astype(np.promote_types(float_dtype(x), np.float32))


def _macs(records: Records, open_units: Sequence[Array]) -> Array:
  """Computes the MACs of each example from the open units `[N]` of each record."""
  open_units, costs = one_dtype(*open_units), []
  for i, record in enumerate(records):
    # The sum over l of the equation; in floats, since a count can exceed the range of int32.
    costs.append(open_units[i] * float(record.macs_per_unit))
    if record.macs_per_pair:
      costs.append(open_units[i - 1] * open_units[i] * float(record.macs_per_pair))
  return functools.reduce(operator.add, costs)


def checked_records(records: Records, *fields: str, with_examples: bool = False) -> Records:
  """Returns the records as a tuple.

  Args:
    records: of one forward pass.
    fields: names of record arrays whose shapes must agree in all but the last axis.
    with_examples: whether there must be at least one example, as for a mean over them.
  Raises:
    ValueError, TypeError: as in `executed_macs`.
  """
  records = arguments.items("records", records, "one GateRecord per gated layer")
  for i, record in enumerate(records):
    arguments.instance(f"records[{i}]", record, GateRecord, rule="a GateRecord")
    for cost in ("macs_per_unit", "macs_per_pair"):
      arguments.number(
        f"records[{i}].{cost}", getattr(record, cost), ">= 0", holds=lambda v: v >= 0
      )
    for field in fields:
      name, values = f"records[{i}].{field}", getattr(record, field)
      arguments.real_array(name, values)
      # Records of several tasks have one more axis in front.
      if np.ndim(values) < 2:
        raise ValueError(f"{name} must be [N, C]; got shape {np.shape(values)}")
  for field in fields:
    shapes = [getattr(record, field).shape for record in records]
    # Only the number of gates may differ between layers.
    if len({shape[:-1] for shape in shapes}) > 1:
      raise ValueError(
        f"records must be from one batch (one forward pass); got {field} of shapes {shapes}"
      )
  if not records:
    raise ValueError("records must hold at least one GateRecord; got none: is the model ungated?")
  if records[0].macs_per_pair:
    raise ValueError(
      "the first record's macs_per_pair must be 0, since no record precedes it; "
      f"got {records[0].macs_per_pair}"
    )
  for field in fields:
    shape = getattr(records[0], field).shape
    if with_examples and shape[-2] == 0:
      raise ValueError(f"records must have at least one example; got {field} of shape {shape}")
  return records
