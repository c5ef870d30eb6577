"""The record that every gated module returns next to its output.

Axes: N examples, C gated units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, overload

import jax
import numpy as np

Array = jax.Array
# An array of the host or of a device.
AnyArray = jax.Array | np.ndarray
Path = tuple[str, ...]
# A tree of arrays, such as parameters: JAX has no type for it.
Tree = Any

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


if TYPE_CHECKING:
  # Unlike that of functools, it keeps the types of the arguments. These may be Flax modules, which
  # have a hash at run time only.
  def cached(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Returns the function with a cache."""
    ...

else:
  cached = functools.cache


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

  >>> gates = np.array([[1.0, 0.0], [1.0, 1.0]])
  >>> record = GateRecord(logits=2 * gates - 1, probs=0.9 * gates, gates=gates, macs_per_unit=72)
  >>> record.gates.sum(axis=1) * record.macs_per_unit
  array([ 72., 144.])
  """

  logits: AnyArray
  probs: AnyArray
  gates: AnyArray
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

_Outputs = TypeVar("_Outputs", covariant=True)


class Apply(Protocol[_Outputs]):
  """The method `apply` of a Flax module that returns `(outputs, records)`.

  Flax's own declaration does not say what the module returns.
  """

  @overload
  def __call__(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    rngs: Any = None,
    method: None = None,
    mutable: Literal[False] = False,
    **kwargs: Any,
  ) -> tuple[_Outputs, Records]: ...

  # Another method, or changed variables next to the outputs.
  @overload
  def __call__(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any: ...
