"""The one record that every gated module returns beside its output.

Axes: N examples, C gated units.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = jax.Array
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GateRecord:
  """What one gate layer decided for a batch.

  Attributes:
    logits: `[N, C]` log-odds that a unit is open, without noise.
    probs: `[N, C]` probability that a unit is open.
    gates: `[N, C]` what multiplied the tensor: 0/1, or relaxed values; a unit runs where it is above 0.
    macs_per_unit: multiply-accumulates that one open unit costs per example.
    macs_per_pair: multiply-accumulates of one open unit of this record together with one open unit of
      the record **before** it: a convolution gated on both sides. 0 elsewhere.
    writers: paths of the convolutions whose output channels these gates switch, each as in the tree of parameters.
    readers: paths of the layers whose input channels they switch; where an input passes by the layer too, as by a
      shortcut, none.
    gate: path of the module that decided; records of one module follow each other, in the order of its outputs.
  """

  logits: Any
  probs: Any
  gates: Any
  macs_per_unit: int = 0
  macs_per_pair: int = 0
  writers: tuple[Path, ...] = ()
  readers: tuple[Path, ...] = ()
  gate: Path = ()


jax.tree_util.register_dataclass(
  GateRecord,
  data_fields=["logits", "probs", "gates"],
  meta_fields=["macs_per_unit", "macs_per_pair", "writers", "readers", "gate"],
)

Records = tuple[GateRecord, ...]
