"""Counts of multiply-accumulates (MACs), from shapes and gate records.

One multiply-accumulate is 1; biases, BatchNorm, pooling and additions are not counted.

Axes: N examples, C gates of one layer.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from gating_jax.ops import arguments
from gating_jax.ops.arguments import float_dtype
from gating_jax.types import AnyArray, Array, GateRecord, Records


def conv_macs(kernel_shape: Sequence[int], output_shape: Sequence[int]) -> int:
  """Computes the MACs per example of a convolution or dense layer.

  Args:
    kernel_shape: `[*window, Cin / groups, Cout]`; a dense kernel is `[Cin, Cout]`.
    output_shape: `[N, *spatial, Cout]`.

  >>> conv_macs((3, 3, 16, 32), (1, 8, 8, 32))
  294912
  """
  for name, shape in {"kernel_shape": kernel_shape, "output_shape": output_shape}.items():
    for size in arguments.items(name, shape, "sizes"):
      arguments.whole_number(f"each of {name}", size, 0)
  # Every entry of the kernel is used once at every output place.
  return math.prod(kernel_shape) * math.prod(output_shape[1:-1])


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
  """
  records = checked_records(records, "gates")
  return _macs(records, [_open_units(r.gates) for r in records])


def expected_macs(records: Records) -> Array:
  """Computes `executed_macs` at the units' probabilities of being open, `[N]`.

  Two units of a pair count as independent.
  """
  records = checked_records(records, "probs")
  # The expected number of open units of each layer.
  return _macs(records, [_wide(r.probs).sum(-1) for r in records])


def gated_macs(records: Records) -> int:
  """Computes the MACs per example with every gate open."""
  total = before = 0
  for record in checked_records(records):
    # Only the last axes matter: records may be of different batches, such as images and segments.
    units = np.shape(record.gates)[-1]
    total += units * record.macs_per_unit
    if record.macs_per_pair:
      total += before * units * record.macs_per_pair
    before = units
  return total


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
  costs = []
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
    arguments.instance(f"records[{i}]", record, GateRecord, "a GateRecord")
    for cost in ("macs_per_unit", "macs_per_pair"):
      arguments.number(f"records[{i}].{cost}", getattr(record, cost), ">= 0", lambda v: v >= 0)
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
