"""The record that every gated module returns next to its output.

Axes: N examples, C gated units.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = jax.Array
Path = tuple[str, ...]
# A tree of arrays, such as parameters: JAX has no type for it.
Tree = Any


@dataclasses.dataclass(frozen=True)
class GateRecord:
  """The decisions of one gate layer for a batch.

  Attributes:
    logits: `[N, C]` log-odds that a unit is open, without noise.
    probs: `[N, C]` probability that a unit is open.
    gates: `[N, C]` values >= 0 that multiply the tensor: 0/1, weighted or relaxed. A unit runs
      where its gate is above 0.
    macs_per_unit: multiply-accumulates that one open unit costs per example.
    macs_per_pair: multiply-accumulates of one open unit of this record together with one open unit
      of the record **before** it, for a convolution gated on both sides. 0 elsewhere.
    writers: paths, in the parameter tree, of the convolutions whose output channels these gates
      switch.
    readers: paths of the layers whose input channels these gates switch; empty where the input also
      bypasses the layer, as through a shortcut.
    gate: path of the module that decides. Records of one module follow each other, in the order of
      its outputs.
  """

  logits: Any
  probs: Any
  gates: Any
  macs_per_unit: int = 0
  macs_per_pair: int = 0
  writers: tuple[Path, ...] = ()
  readers: tuple[Path, ...] = ()
  gate: Path = ()


# Costs and paths are static: they are known when the network is traced, and `jit` compiles for
# them.
jax.tree_util.register_dataclass(
  GateRecord,
  data_fields=["logits", "probs", "gates"],
  meta_fields=["macs_per_unit", "macs_per_pair", "writers", "readers", "gate"],
)

# In the order of the network's layers, on which `macs_per_pair` relies.
Records = tuple[GateRecord, ...]
