"""Ownership of units by tasks: frozen filters, closed gates and free units.

Axes: U gated units of the network, record by record.
Reference: Abati et al., 2020, section 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.layers.gate import LOGITS, SHUT
from gating_jax.ops.penalties import unweighted
from gating_jax.types import AnyArray, Array, GateRecord, Path, Records, Tree


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

  def sparsity_weight(self, elapsed: Array) -> Array:
    """Returns the penalty's weight, `elapsed` after the start of a task."""
    # A penalty from the first step on would close gates before they have learnt anything.
    return self.sparsity * (elapsed >= self.patience)


class RecordPlace(NamedTuple):
  """The place of a record's units among those of the network.

  Attributes:
    record: of one gated layer.
    place: slice of the last axis of `[..., U]`.
  """

  record: GateRecord
  place: slice


def record_places(records: Records) -> list[RecordPlace]:
  """Returns the place of each record's units, in the order of the records."""
  found, start = [], 0
  for record in records:
    stop = start + record.gates.shape[-1]
    found.append(RecordPlace(record, slice(start, stop)))
    start = stop
  return found


def by_record(units: AnyArray, records: Records) -> list[Any]:
  """Splits units into the parts of each record.

  Args:
    units: `[..., U]`.
    records: of the network.
  Returns:
    `[..., units]` per record.
  """
  return [units[..., place] for _, place in record_places(records)]


def join_gates(records: Records) -> Array:
  """Concatenates the gates of all records to `[..., U]`, 1 where a unit is open and 0 elsewhere."""
  gates = jnp.concatenate([record.gates for record in records], axis=-1)
  # A weighted gate is above 1.
  return (gates > 0).astype(gates.dtype)


def count_units(records: Records) -> int:
  """Counts the gated units U of the network."""
  return sum(record.gates.shape[-1] for record in records)


def open_share(records: Records, available: AnyArray) -> Array:
  """Computes the fraction of available units that are open, averaged over layers and examples.

  Args:
    records: of one forward pass.
    available: `[U]` bool, the units that count.
  Returns:
    a scalar.
  """
  fractions = []
  for record, place in record_places(records):
    # Gates of unavailable units are shut, so the sum over all units counts the available ones.
    open_units = jnp.mean(jnp.sum(unweighted(record.gates), axis=-1))
    fractions.append(open_units / jnp.sum(available[place]))
  return jnp.mean(jnp.stack(fractions))


def reinitialise_free(frozen: Tree, old: Tree, fresh: Tree) -> Tree:
  """Returns shared parameters as they were where frozen, and initialised again elsewhere.

  Args:
    frozen: mask, as `nothing_frozen` makes it.
    old, fresh: shared parameters.
  """
  # One bool per output channel, the last axis, broadcasts over a kernel.
  return jax.tree.map(jnp.where, frozen, old, fresh)


def layer_name(record: GateRecord) -> str:
  """Returns the name of the first convolution whose output a record gates."""
  return "/".join(record.writers[0])


def close_gates(net: Tree, records: Records, kept: AnyArray) -> Tree:
  """Closes the gates of all but the kept units, for every input.

  The gradient of a closed gate is 0, so no training opens it.

  Args:
    net: parameters of the network.
    records: of the network.
    kept: `[U]` bool.
  Returns:
    parameters in which the other gates have no kernel and a bias of `SHUT`.
  """
  # One gate network may decide for several records, in the order of its outputs.
  kept_by_gate = {}
  for record, place in record_places(records):
    kept_by_gate.setdefault(record.gate, []).append(jnp.asarray(kept[place]))
  flat: dict[Path, Any] = traverse_util.flatten_dict(net)
  for gate, parts in kept_by_gate.items():
    mask, path = jnp.concatenate(parts), (*gate, *LOGITS)
    # Without a kernel no input can outweigh the bias.
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
  gated, frozen = gated_layers(records), {}
  flat: dict[Path, Any] = traverse_util.flatten_dict(shared)
  for path, leaf in flat.items():
    frozen[path] = jnp.zeros(leaf.shape[-1:] if path[:-1] in gated else (), bool)
  return traverse_util.unflatten_dict(frozen)


def gated_layers(records: Records) -> set[Path]:
  """Returns the paths of the layers whose output channels gates switch."""
  layers = set()
  for record in records:
    layers.update(record.writers)
  return layers


def freeze(frozen: Tree, records: Records, relevant: AnyArray) -> Tree:
  """Freezes the filters of relevant units, and all convolutions without gates.

  Args:
    frozen: mask, as `nothing_frozen` makes it.
    records: of the network.
    relevant: `[U]` bool.
  Returns:
    the new mask.
  """
  flat: dict[Path, Any] = traverse_util.flatten_dict(frozen)
  for path, leaf in flat.items():
    if not leaf.ndim:
      # Without gates a convolution serves every task as a whole. Only its layer, which has a
      # kernel, is frozen: BatchNorm, where it is shared, trains on.
      flat[path] = jnp.asarray((*path[:-1], "kernel") in flat)
  for record, place in record_places(records):
    for writer in record.writers:
      for name in ("kernel", "bias"):
        if (*writer, name) in flat:
          # A filter stays frozen once any task needs it.
          flat[*writer, name] |= relevant[place]
  return traverse_util.unflatten_dict(flat)


def full_layers(records: Records, used: np.ndarray, available: np.ndarray) -> list[int]:
  """Returns the indices of records in which every available unit is used.

  Args:
    records: of the network.
    used, available: `[U]` bool.
  """
  # A unit can be learnt by the next task if it exists and no task needs it.
  free = available & ~used
  return [i for i, units in enumerate(by_record(free, records)) if not np.any(units)]


def first_units(records: Records, allocated: float) -> Array:
  """Returns the initial units of a network.

  Args:
    records: of the network.
    allocated: width of the network over its initial width.
  Returns:
    `[U]` bool.
  """
  parts = []
  for record in records:
    width = record.gates.shape[-1]
    # The last width over the factor is the first width.
    parts.append(jnp.arange(width) < round(width / allocated))
  return jnp.concatenate(parts)


def grow_layers(
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
  flat: dict[Path, Any] = traverse_util.flatten_dict(shared)
  total = 0
  for record, place in record_places(records):
    units = available[place]
    for path, leaf in flat.items():
      if path[:-1] in record.writers:
        # The last axis is the units': each has an equal part of the array.
        total += leaf.size // len(units) * int(np.sum(~units))
  return total


def used_by(relevant: AnyArray, available: AnyArray, records: Records) -> dict[str, np.ndarray]:
  """Returns the units that each task needs, by layer.

  Args:
    relevant: `[T, U]` bool.
    available: `[U]` bool; the other units are left out.
    records: of the network.
  Returns:
    `[T, units]` bool per layer.
  """
  relevant, available = np.asarray(relevant), np.asarray(available)
  used = {}
  for record, place in record_places(records):
    # Units that the layer has not grown to are none of its units yet.
    used[layer_name(record)] = relevant[:, place][:, available[place]]
  return used
