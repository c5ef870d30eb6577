"""Units that tasks own: which filters are frozen, which gates are shut, and where there is room for more.

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

SHUT = -1e3  # log-odds of a gate that never opens
Tree = Any


@dataclasses.dataclass(frozen=True)
class ProtectionSettings:
  """How tasks are gated and protected.

  Attributes:
    sparsity: lambda_s, the price of the share of open gates.
    patience: how long each task learns without that price.
    threshold: a unit is relevant if its gate opens more often than this share.
    protect_updates, shut_gates: two protections; a task is forgotten without any of them.
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
      raise ValueError(f"threshold must be a share in [0, 1); got {self.threshold}")

  def price(self, elapsed: Array) -> Array:
    """Of the share of open gates, so long after a task has begun."""
    return self.sparsity * (elapsed >= self.patience)


def by_record(units: Array, records: Records) -> list[Array]:
  """`[..., U]` in the parts of each record."""
  ends = np.cumsum([r.gates.shape[-1] for r in records])
  return [units[..., end - r.gates.shape[-1] : end] for end, r in zip(ends, records, strict=True)]


def joined(records: Records) -> Array:
  """`[..., U]`, the gates of all records."""
  return jnp.concatenate([r.gates for r in records], axis=-1)


def open_share(records: Records, available: Array) -> Array:
  """Mean over layers and examples of the share of the available units, `[U]` bool, that are open."""
  there = by_record(available, records)
  return jnp.mean(
    jnp.stack(
      [
        jnp.mean(jnp.sum(r.gates, axis=-1)) / jnp.sum(a)
        for r, a in zip(records, there, strict=True)
      ]
    )
  )


def begin_anew(frozen: Tree, old: Tree, fresh: Tree) -> Tree:
  """`old` where frozen, else `fresh`."""
  return jax.tree.map(jnp.where, frozen, old, fresh)


def layer_name(record: GateRecord) -> str:
  """Of the first convolution whose output a record switches."""
  return "/".join(record.writers[0])


def shut(net: Tree, records: Records, kept: Array) -> Tree:
  """Parameters with the gates of all but the `kept` units, `[U]` bool, shut whatever the input.

  Their gradient is 0, so that no training opens them.
  """
  flat = traverse_util.flatten_dict(net)
  of_records = zip(records, by_record(kept, records), strict=True)
  for gate, group in itertools.groupby(of_records, lambda pair: pair[0].gate):
    mask, path = jnp.concatenate([jnp.asarray(units) for _, units in group]), (*gate, *LOGITS)
    flat[*path, "kernel"] = jnp.where(mask, flat[*path, "kernel"], 0)
    flat[*path, "bias"] = jnp.where(mask, flat[*path, "bias"], SHUT)
  return traverse_util.unflatten_dict(flat)


def nothing_frozen(shared: Tree, records: Records) -> Tree:
  """For each shared parameter whether it is frozen: by its last axis, where gates switch that, or as a whole."""
  gated = {writer for r in records for writer in r.writers}
  return traverse_util.unflatten_dict(
    {
      path: jnp.zeros(leaf.shape[-1:] if path[:-1] in gated else (), bool)
      for path, leaf in traverse_util.flatten_dict(shared).items()
    }
  )


def freeze(frozen: Tree, records: Records, relevant: Array) -> Tree:
  """`frozen` with the filters of `relevant` units, `[U]` bool, and with all convolutions that no gate switches."""
  flat = traverse_util.flatten_dict(frozen)
  flat = {
    path: leaf if leaf.ndim else jnp.asarray((*path[:-1], "kernel") in flat)
    for path, leaf in flat.items()
  }
  for record, units in zip(records, by_record(relevant, records), strict=True):
    for writer in record.writers:
      for name in ("kernel", "bias"):
        if (*writer, name) in flat:
          flat[*writer, name] |= units
  return traverse_util.unflatten_dict(flat)


def full_layers(records: Records, used: np.ndarray, available: np.ndarray) -> list[int]:
  """The records without an available unit, `[U]` bool, that is not used."""
  parts = zip(by_record(used, records), by_record(available, records), strict=True)
  return [i for i, (mine, there) in enumerate(parts) if not np.any(there & ~mine)]


def first_units(records: Records, allocated: float) -> Array:
  """`[U]` bool: the units there are at first, in a network made `allocated` times as wide."""
  return jnp.concatenate(
    [jnp.arange(r.gates.shape[-1]) < round(r.gates.shape[-1] / allocated) for r in records]
  )


def grown(
  records: Records, available: np.ndarray, layers: list[int], *, growth: float, allocated: float
) -> np.ndarray:
  """`available`, `[U]` bool, with some more in these layers: the share `growth` of what they began with."""
  parts = [np.asarray(units) for units in by_record(available, records)]
  for i in layers:
    more = math.ceil(round(len(parts[i]) / allocated) * growth)
    parts[i] = np.arange(len(parts[i])) < parts[i].sum() + more
  return np.concatenate(parts)


def waiting(shared: Tree, records: Records, available: np.ndarray) -> int:
  """How many shared parameters are filters of units that are not available yet."""
  flat, total = traverse_util.flatten_dict(shared), 0
  for record, units in zip(records, by_record(available, records), strict=True):
    total += sum(
      leaf.size // len(units) * int(np.sum(~units))
      for path, leaf in flat.items()
      if path[:-1] in record.writers
    )
  return total


def used_by(relevant: Array, available: Array, records: Records) -> dict[str, np.ndarray]:
  """By layer, `[T, units]` bool: the units `[T, U]` that each task needs, of those that are available, `[U]`."""
  parts = (by_record(np.asarray(x), records) for x in (relevant, available))
  return {
    layer_name(r): relevant[:, there] for r, relevant, there in zip(records, *parts, strict=True)
  }
