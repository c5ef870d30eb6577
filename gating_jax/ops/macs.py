"""Multiply-accumulate counts, from shapes and gate records.

One multiply-accumulate is 1; biases, BatchNorm, pooling and additions are not counted.

Axes: N examples, C gates of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gating_jax.ops import arguments
from gating_jax.ops.precision import float_dtype
from gating_jax.types import Array, GateRecord, Records


def conv_macs(kernel_shape: Sequence[int], output_shape: Sequence[int]) -> int:
  """MACs per example of a convolution or dense layer.

  Args:
    kernel_shape: `[*window, Cin / groups, Cout]`; a dense kernel is `[Cin, Cout]`.
    output_shape: `[N, *spatial, Cout]`.

  >>> conv_macs((3, 3, 16, 32), (1, 8, 8, 32))
  294912
  """
  for name, shape in (("kernel_shape", kernel_shape), ("output_shape", output_shape)):
    for size in arguments.items(name, shape, "sizes"):
      arguments.whole_number(f"each of {name}", size, 0)
  return math.prod(kernel_shape) * math.prod(output_shape[1:-1])


def executed_macs(records: Records) -> Array:
  """MACs per example that the gated units of a network execute.

      sum_l  macs_per_unit_l |g_l| + macs_per_pair_l |g_(l-1)| |g_l|,   |g| = number of units whose gate is above 0

  Args:
    records: in the network's order.
  Returns:
    `[N]`. Exact to the unit below 2**24 for float32 gates, and beyond for numpy float64 ones.
  Raises:
    ValueError: no records, the first one claims pairs with one before it, or records of several batches.
    TypeError: `records` is no list of `GateRecord`.
  """
  records = checked_records(records, "gates")
  return _macs(records, [_open_units(r.gates) for r in records])


def expected_macs(records: Records) -> Array:
  """`executed_macs` at the units' probabilities of being open, `[N]`; pairs as if both were independent."""
  records = checked_records(records, "probs")
  return _macs(records, [_wide(r.probs).sum(-1) for r in records])


def gated_macs(records: Records) -> int:
  """MACs per example with every gate open."""
  records = checked_records(records)
  units = [
    np.shape(r.gates)[-1] for r in records
  ]  # which may be of batches of their own, images and segments
  single = sum(u * r.macs_per_unit for u, r in zip(units, records, strict=True))
  return single + sum(
    units[i - 1] * units[i] * r.macs_per_pair for i, r in enumerate(records) if r.macs_per_pair
  )


def _open_units(gates: Array) -> Array:
  """`[N]`."""
  gates = _wide(gates)
  return (gates > 0).astype(gates.dtype).sum(-1)


def _wide(x: Array) -> Array:
  """In float32, or float64 if it is that, as NumPy's arrays may be: MACs exceed what 16 bits can count."""
  return x.astype(np.promote_types(float_dtype(x), np.float32))


def _macs(records: Records, open_units: Sequence[Array]) -> Array:
  total = 0
  for i, record in enumerate(records):
    total = total + open_units[i] * float(record.macs_per_unit)
    if record.macs_per_pair:
      total = total + open_units[i - 1] * open_units[i] * float(record.macs_per_pair)
  return total


def checked_records(records: Records, *fields: str, with_examples: bool = False) -> Records:
  """The records as a tuple.

  Args:
    records: of one forward pass.
    fields: names of those of their arrays that must have one shape but for the last axis.
    with_examples: whether there must be an example, as for a mean over them.
  Raises:
    ValueError, TypeError: as of `executed_macs`.
  """
  records = arguments.items("records", records, "one GateRecord per gated layer")
  for i, record in enumerate(records):
    arguments.instance(f"records[{i}]", record, GateRecord, "a GateRecord")
    for cost in ("macs_per_unit", "macs_per_pair"):
      arguments.number(f"records[{i}].{cost}", getattr(record, cost), ">= 0", lambda v: v >= 0)
    for field in fields:
      name, values = f"records[{i}].{field}", getattr(record, field)
      arguments.real_array(name, values)
      if np.ndim(values) < 2:  # those of several tasks have an axis more in front
        raise ValueError(f"{name} must be [N, C]; got shape {np.shape(values)}")
  for field in fields:
    shapes = [getattr(record, field).shape for record in records]
    if len({shape[:-1] for shape in shapes}) > 1:
      raise ValueError(
        f"records must be of one batch, that of one forward pass; got {field} of shapes {shapes}"
      )
  if not records:
    raise ValueError("records must hold at least one GateRecord; got none: is the model ungated?")
  if records[0].macs_per_pair:
    raise ValueError(
      "the first record's macs_per_pair must be 0, no record is before it; "
      f"got {records[0].macs_per_pair}"
    )
  for field in fields:
    shape = getattr(records[0], field).shape
    if with_examples and shape[-2] == 0:
      raise ValueError(f"records must be of at least one example; got {field} of shape {shape}")
  return records
