"""Ownership of units by tasks: frozen filters, closed gates and free units.

Axes: U gated units of the network, record by record.
Reference: Abati et al., 2020, section 3.2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.layers.gate import LOGITS
from gating_jax.types import Array, GateRecord, Records

# Log-odds of a gate that never opens.
SHUT = -1e3
Tree = Any


@dataclasses.dataclass(frozen=True)
class ProtectionSettings:
  """Settings for gating and protecting tasks.

  Attributes:
    sparsity: lambda_s, the penalty's weight on the fraction of open gates, >= 0.
    patience: time for which each task learns without that penalty, >= 0.
    threshold: a unit is relevant if its gate opens for more than this fraction of examples, in [0,
      1).
    protect_updates, shut_gates: the two protections; both are needed to forget nothing.
  """

  sparsity: float
  patience: float
  threshold: float = 0.0
  protect_updates: bool = True
  shut_gates: bool = True

  def __post_init__(self):
    for name in ("sparsity", "patience"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name} must be >= 0; got {getattr(self, name)}")
    if not 0 <= self.threshold < 1:
      raise ValueError(f"threshold must be a fraction in [0, 1); got {self.threshold}")

  def price(self, elapsed: Array) -> Array:
    """Returns the penalty's weight, `elapsed` after the start of a task."""
    return self.sparsity * (elapsed >= self.patience)


def by_record(units: Array, records: Records) -> list[Array]:
  """Splits units into the parts of each record.

  Args:
    units: `[..., U]`.
    records: of the network.
  Returns:
    `[..., units]` per record.
  """
  ends = np.cumsum([r.gates.shape[-1] for r in records])
  return [units[..., end - r.gates.shape[-1] : end] for end, r in zip(ends, records, strict=True)]


def joined(records: Records) -> Array:
  """Concatenates the gates of all records to `[..., U]`."""
  return jnp.concatenate([r.gates for r in records], axis=-1)


def open_share(records: Records, available: Array) -> Array:
  """Computes the fraction of available units that are open, averaged over layers and examples.

  Args:
    records: of one forward pass.
    available: `[U]` bool, the units that count.
  Returns:
    a scalar.
  """
  there = by_record(available, records)
  return jnp.mean(
    jnp.stack(
      [
        # Gates of unavailable units are shut, so the sum over all units counts the available ones.
        jnp.mean(jnp.sum(r.gates, axis=-1)) / jnp.sum(a)
        for r, a in zip(records, there, strict=True)
      ]
    )
  )


def reinitialise_free(frozen: Tree, old: Tree, fresh: Tree) -> Tree:
  """Keeps `old` where frozen and takes `fresh` elsewhere.

  Args:
    frozen: mask as of `nothing_frozen`.
    old, fresh: shared parameters.
  """
  return jax.tree.map(jnp.where, frozen, old, fresh)


def layer_name(record: GateRecord) -> str:
  """Returns the name of the first convolution whose output a record gates."""
  return "/".join(record.writers[0])


def shut(net: Tree, records: Records, kept: Array) -> Tree:
  """Closes the gates of all but the kept units, for every input.

  The gradient of a closed gate is 0, so no training opens it.

  Args:
    net: parameters of the network.
    records: of the network.
    kept: `[U]` bool.
  Returns:
    parameters in which the other gates have no kernel and a bias of `SHUT`.
  """
  flat = traverse_util.flatten_dict(net)
  of_records = zip(records, by_record(kept, records), strict=True)
  # One gate network may decide for several records, which follow each other.
  for gate, group in itertools.groupby(of_records, lambda pair: pair[0].gate):
    mask, path = jnp.concatenate([jnp.asarray(units) for _, units in group]), (*gate, *LOGITS)
    flat[*path, "kernel"] = jnp.where(mask, flat[*path, "kernel"], 0)
    flat[*path, "bias"] = jnp.where(mask, flat[*path, "bias"], SHUT)
  return traverse_util.unflatten_dict(flat)


def nothing_frozen(shared: Tree, records: Records) -> Tree:
  """Builds the mask of frozen parameters before the first task: all False.

  Args:
    shared: shared parameters.
    records: of the network.
  Returns:
    a tree like `shared`: one bool per output channel where gates switch the channels, else a
      scalar.
  """
  gated = {writer for r in records for writer in r.writers}
  return traverse_util.unflatten_dict(
    {
      path: jnp.zeros(leaf.shape[-1:] if path[:-1] in gated else (), bool)
      for path, leaf in traverse_util.flatten_dict(shared).items()
    }
  )


def freeze(frozen: Tree, records: Records, relevant: Array) -> Tree:
  """Freezes the filters of relevant units, and all convolutions without gates.

  Args:
    frozen: mask as of `nothing_frozen`.
    records: of the network.
    relevant: `[U]` bool.
  Returns:
    the new mask.
  """
  flat = traverse_util.flatten_dict(frozen)
  # Without gates a convolution serves every task as a whole. Only its layer, which has a kernel, is
  # frozen: BatchNorm, where it is shared, trains on.
  flat = {
    path: leaf if leaf.ndim else jnp.asarray((*path[:-1], "kernel") in flat)
    for path, leaf in flat.items()
  }
  for record, units in zip(records, by_record(relevant, records), strict=True):
    for writer in record.writers:
      for name in ("kernel", "bias"):
        if (*writer, name) in flat:
          # A filter stays frozen once any task needs it.
          flat[*writer, name] |= units
  return traverse_util.unflatten_dict(flat)


def full_layers(records: Records, used: np.ndarray, available: np.ndarray) -> list[int]:
  """Returns the indices of records in which every available unit is used.

  Args:
    records: of the network.
    used, available: `[U]` bool.
  """
  parts = zip(by_record(used, records), by_record(available, records), strict=True)
  return [i for i, (mine, there) in enumerate(parts) if not np.any(there & ~mine)]


def first_units(records: Records, allocated: float) -> Array:
  """Returns the initial units of a network.

  Args:
    records: of the network.
    allocated: width of the network over its initial width.
  Returns:
    `[U]` bool.
  """
  return jnp.concatenate(
    [jnp.arange(r.gates.shape[-1]) < round(r.gates.shape[-1] / allocated) for r in records]
  )


def grown(
  records: Records, available: np.ndarray, layers: list[int], *, growth: float, allocated: float
) -> np.ndarray:
  """Adds units to some layers.

  Args:
    records: of the network.
    available: `[U]` bool, the units so far.
    layers: indices of the records that grow.
    growth: units to add, as a fraction of the layer's initial width.
    allocated: width of the network over its initial width.
  Returns:
    `[U]` bool.
  """
  parts = [np.asarray(units) for units in by_record(available, records)]
  for i in layers:
    # `growth` refers to the initial width; the array has the final one.
    more = math.ceil(round(len(parts[i]) / allocated) * growth)
    # Available units are always the first ones of a layer.
    parts[i] = np.arange(len(parts[i])) < parts[i].sum() + more
  return np.concatenate(parts)


def unallocated_params(shared: Tree, records: Records, available: np.ndarray) -> int:
  """Counts the shared parameters of filters whose units are not available yet.

  Args:
    shared: shared parameters.
    records: of the network.
    available: `[U]` bool.
  """
  flat, total = traverse_util.flatten_dict(shared), 0
  for record, units in zip(records, by_record(available, records), strict=True):
    total += sum(
      # The last axis is the units': each has an equal part of the array.
      leaf.size // len(units) * int(np.sum(~units))
      for path, leaf in flat.items()
      if path[:-1] in record.writers
    )
  return total


def used_by(relevant: Array, available: Array, records: Records) -> dict[str, np.ndarray]:
  """Returns the units that each task needs, by layer.

  Args:
    relevant: `[T, U]` bool.
    available: `[U]` bool; the other units are left out.
    records: of the network.
  Returns:
    `[T, units]` bool per layer.
  """
  parts = (by_record(np.asarray(x), records) for x in (relevant, available))
  return {
    layer_name(r): relevant[:, there] for r, relevant, there in zip(records, *parts, strict=True)
  }
