"""Inference that skips segments: the heavy net runs on the chosen ones of a whole batch only.

Axes: B videos, T segments, K segments that a program of the heavy net takes.
Reference: Hussein et al., 2020 (TimeGate); Verelst and Tuytelaars, 2020 (gather, compute, scatter).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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


class CompiledSegments:
  """A compiled `SegmentNet` in evaluation, made by `compile_segments`.

  It maps a batch of videos' arrays to a `Result`.
  """

  def __init__(
    self,
    model: SegmentNet,
    variables: Mapping[str, Any],
    capacities: Sequence[int],
    prepare: Callable[[Inputs], Inputs],
  ):
    self._variables = jax.device_put(variables)
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
    inputs, capacities = self._checked(inputs)
    record, outputs, count = self._choose(self._variables, inputs)
    # The only wait for the device: the number of chosen segments decides which programs run.
    pieces = pieces_for(int(count), capacities)
    logits, records = self._finish(inputs, record.gates, pieces)
    return Result({**outputs, "logits": logits}, (record, *records), int(count), sum(pieces))

  def warm_up(self, inputs: Inputs) -> None:
    """Compiles and runs every program that a batch of these shapes can need."""
    inputs, capacities = self._checked(inputs)
    record, _, _ = self._choose(self._variables, inputs)
    jax.block_until_ready(self._finish(inputs, record.gates, capacities))

  def _checked(self, inputs: Inputs) -> tuple[Inputs, tuple[int, ...]]:
    """Returns the inputs on the device, and the capacities for as many segments."""
    arguments.instance(
      "inputs", inputs, Mapping, "a mapping with arrays heavy, valid and, for a light net, light"
    )
    if "valid" not in inputs:
      raise ValueError(f"inputs must have 'valid'; got {', '.join(inputs)}")
    inputs = jax.device_put(dict(inputs))
    videos, segments = inputs["valid"].shape
    if other := {name: x.shape for name, x in inputs.items() if x.shape[:2] != (videos, segments)}:
      raise ValueError(
        f"inputs must all be [B, T, ...] like valid, {videos} x {segments}; got {other}"
      )
    return inputs, tuple(
      # No K above the number of segments there are: it would compute padding only.
      sorted({min(capacity, videos * segments) for capacity in self._capacities})
    )

  def _finish(self, inputs: Inputs, gates: Array, pieces: Sequence[int]) -> tuple[Array, Records]:
    starts = itertools.accumulate(pieces, initial=0)
    parts = [
      self._encode(self._variables, inputs, gates, start, capacity=capacity)
      for start, capacity in zip(starts, pieces, strict=False)
    ]
    # Each piece has zeros in the places of the others, so the sum holds all.
    features, records = functools.reduce(self._join, parts)
    return self._classify(self._variables, features, gates), records


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
  if not capacities or any(
    not isinstance(capacity, int) or capacity < 1 for capacity in capacities
  ):
    raise ValueError(f"capacities must be numbers >= 1, at least one; got {capacities}")
  return CompiledSegments(model, variables, capacities, prepare)


def _choose(
  model: SegmentNet, prepare: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[GateRecord, Outputs, Array]:
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
  places = open_indices(gates.reshape(-1), gates.size + capacity)
  index, taken = (lax.dynamic_slice_in_dim(x, start, capacity) for x in places)
  # Each segment is a video of its own, `[K, 1, ...]`, as `prepare` takes them.
  seen = {name: x.reshape(-1, 1, *x.shape[2:])[index] for name, x in inputs.items()}
  encoded = model.apply(variables, prepare(seen)["heavy"][:, 0], method="encode")
  return jax.tree.map(lambda x: scatter_back(x, index, taken, gates.size), encoded)


def _classify(
  model: SegmentNet, variables: Mapping[str, Any], features: Array, gates: Array
) -> Array:
  return model.apply(variables, features.reshape(*gates.shape, -1), gates, method="classify")
