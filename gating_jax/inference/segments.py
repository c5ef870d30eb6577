"""Inference that skips segments: the heavy net runs on the chosen ones of a whole batch only.

Axes: B videos, T segments, K segments that a program of the heavy net takes.
Reference: Hussein et al., 2020 (TimeGate); Verelst and Tuytelaars, 2020 (gather, compute, scatter).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.inference.compiled import Compiled
from gating_jax.models.timegate import Inputs, Outputs, SegmentNet
from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_indices, pieces_for, scatter_back
from gating_jax.types import Array, GateRecord, Records


class Result(NamedTuple):
  """Outputs and segment counts of one batch.

  The heavy net's records, `[B * T, ...]`, are zeros for segments that it did not see.

  Attributes:
    outputs, records: what the model returns.
    chosen: number of segments chosen.
    computed: number of segments computed for them, padding included.
  """

  outputs: Outputs
  records: Records
  chosen: int
  computed: int


class CompiledSegments(Compiled):
  """A compiled `SegmentNet` in evaluation, made by `compile_segments`.

  It maps a batch of videos' arrays to a `Result`. `load` takes other variables of the model.
  """

  def __init__(
    self,
    model: SegmentNet,
    variables: Mapping[str, Any],
    *,
    capacities: Sequence[int],
    prepare: Callable[[Inputs], Inputs],
  ):
    super().__init__(variables, self._weights_of(variables))
    self._capacities = tuple(capacities)
    # A program for each K, which is static; the start within the chosen segments is traced.
    self._choose = jax.jit(functools.partial(_choose, model, prepare))
    self._encode = jax.jit(functools.partial(_encode, model, prepare), static_argnames="capacity")
    self._join = jax.jit(functools.partial(jax.tree.map, jnp.add))
    self._classify = jax.jit(functools.partial(_classify, model))

  def __call__(self, inputs: Inputs) -> Result:
    """Runs on a batch of numpy or jax arrays.

    As with any jitted function, the outputs may still be computed when it returns.
    """
    inputs = _check_inputs(inputs)
    record, outputs, count = self._choose(self.weights, inputs)
    # The only wait for the device: the number of chosen segments decides which programs run.
    pieces = pieces_for(int(count), fitting_capacities(self._capacities, record.gates.size))
    logits, records = self._finish(inputs, record.gates, pieces)
    return Result({**outputs, "logits": logits}, (record, *records), int(count), sum(pieces))

  def warm_up(self, inputs: Inputs) -> None:
    """Compiles and runs every program that a batch of these shapes can need."""
    inputs = _check_inputs(inputs)
    record, _, _ = self._choose(self.weights, inputs)
    every = fitting_capacities(self._capacities, record.gates.size)
    jax.block_until_ready(self._finish(inputs, record.gates, every))

  def _weights_of(self, net: Mapping[str, Any]) -> Mapping[str, Any]:
    # On the device once, not in every call.
    return jax.device_put(net)

  def _finish(self, inputs: Inputs, gates: Array, pieces: Sequence[int]) -> tuple[Array, Records]:
    """Computes the logits, and the heavy net's records.

    Args:
      inputs: of the batch.
      gates: `[B, T]`.
      pieces: numbers of chosen segments that the heavy net takes at a time.
    """
    # `start`: the number of chosen segments that earlier pieces took.
    parts, start = [], 0
    for capacity in pieces:
      parts.append(self._encode(self.weights, inputs, gates, start, capacity=capacity))
      start += capacity
    # Each piece has zeros in the places of the others, so the sum holds all.
    features, records = functools.reduce(self._join, parts)
    return self._classify(self.weights, features, gates), records


def compile_segments(
  model: SegmentNet,
  variables: Mapping[str, Any],
  *,
  capacities: Sequence[int],
  prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> CompiledSegments:
  """Compiles programs whose cost follows the number of segments chosen.

      compile_segments(model, variables, ...)(inputs).outputs
          = model.apply(variables, prepare(inputs))[0]

  There are three kinds of jitted programs: the light net and selector; the heavy net on K chosen
  segments of the whole batch, for a few static K; and the classifier. The host waits for one
  number, how many segments were chosen. It calls the second program for the largest K as often as
  they fill it, then for the smallest K that holds the rest. A program is compiled when a batch
  first needs it; `CompiledSegments.warm_up` compiles all of them.

  One large K suits an accelerator. A CPU is faster with a few clips at a time: as measured, (2+1)-D
  ResNet-18 takes an eighth less per clip with K = 16 than with 64.

  Args:
    model, variables: the network and its trained values.
    capacities: every K, e.g. of `bucket_sizes`; any number of segments is made up of them.
    prepare: from a batch's arrays, all `[B, T, ...]`, to the model's inputs, each segment alone
      (normalised, its centre frame taken). It runs inside the programs; in the second one for the
      chosen segments only.
  Returns:
    A `CompiledSegments`.
  Raises:
    TypeError, ValueError: naming the first argument that is wrong.
  """
  arguments.instance("model", model, SegmentNet, "a SegmentNet")
  arguments.instance("variables", variables, Mapping, "a mapping with params and batch_stats")
  arguments.function("prepare", prepare)
  capacities = arguments.items("capacities", capacities, "numbers >= 1")
  is_number = [isinstance(capacity, int) and capacity >= 1 for capacity in capacities]
  if not is_number or not all(is_number):
    raise ValueError(f"capacities must be numbers >= 1, at least one; got {capacities}")
  return CompiledSegments(model, variables, capacities=capacities, prepare=prepare)


def fitting_capacities(capacities: Sequence[int], segments: int) -> tuple[int, ...]:
  """Returns the capacities for a batch of so many segments, in ascending order."""
  # No K above the number of segments there are: it would compute padding only.
  return tuple(sorted({min(capacity, segments) for capacity in capacities}))


def _check_inputs(inputs: Inputs) -> Inputs:
  """Returns the arrays of a batch on the device.

  Raises:
    TypeError, ValueError: no mapping, or arrays that are not all `[B, T, ...]`.
  """
  arguments.instance(
    "inputs", inputs, Mapping, "a mapping with arrays heavy, valid and, for a light net, light"
  )
  if "valid" not in inputs:
    raise ValueError(f"inputs must have 'valid'; got {', '.join(inputs)}")
  # Once for all programs that take them.
  inputs = jax.device_put(dict(inputs))
  videos, segments = inputs["valid"].shape
  other = {name: x.shape for name, x in inputs.items() if x.shape[:2] != (videos, segments)}
  if other:
    raise ValueError(
      f"inputs must all be [B, T, ...] like valid, {videos} x {segments}; got {other}"
    )
  return inputs


def _choose(
  model: SegmentNet, prepare: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[GateRecord, Outputs, Array]:
  """Chooses segments; returns their record, outputs so far, and the number of chosen segments."""
  record, outputs = model.apply(variables, prepare(inputs), method="choose")
  return record, outputs, jnp.sum(record.gates > 0)


def _encode(
  model: SegmentNet,
  prepare: Callable,
  variables: Mapping[str, Any],
  inputs: Inputs,
  gates: Array,
  start: Array,
  *,
  capacity: int,
) -> tuple[Array, Records]:
  """Computes features and records of `capacity` chosen segments from the `start`-th on.

  They are `[B * T, ...]`, zeros in all other places.
  """
  # Padded by the capacity, so that no slice from a chosen segment on is cut off: `dynamic_slice`
  # would move it.
  index, taken = open_indices(gates.reshape(-1), gates.size + capacity)
  index = lax.dynamic_slice_in_dim(index, start, capacity)
  taken = lax.dynamic_slice_in_dim(taken, start, capacity)
  # Each segment is a video of its own, `[K, 1, ...]`, as `prepare` takes them.
  seen = {}
  for name, x in inputs.items():
    seen[name] = x.reshape(-1, 1, *x.shape[2:])[index]
  heavy = prepare(seen)["heavy"][:, 0]
  encoded = model.apply(variables, heavy, method="encode")
  return jax.tree.map(lambda x: scatter_back(x, index, taken, gates.size), encoded)


def _classify(
  model: SegmentNet, variables: Mapping[str, Any], features: Array, gates: Array
) -> Array:
  """Computes the logits `[B, classes]` from the features of all segments."""
  return model.apply(variables, features.reshape(*gates.shape, -1), gates, method="classify")
