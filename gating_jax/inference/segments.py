"""Inference that skips: the heavy net runs on the chosen segments of the whole batch, gathered, and on no others.

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
from gating_jax.ops.compaction import open_indices, pieces_for, put_back
from gating_jax.types import Array, GateRecord, Records


class Result(NamedTuple):
  """Of a batch: what the model returns, how many segments were chosen, and how many computed for them, with padding.

  The heavy net's records, `[B * T, ...]`, are zeros in the places of segments that it did not see.
  """

  outputs: Outputs
  records: Records
  chosen: int
  computed: int


class Skipping:
  """A `SegmentNet` in evaluation whose cost follows the number of segments chosen.

      Skipping(model, variables, ...)(inputs).outputs = model.apply(variables, prepare(inputs))[0]

  Jitted programs: light net and selector; the heavy net on K chosen segments of the whole batch, for a few static K;
  the classifier. The host waits for one number, how many were chosen, and calls the second program for the largest K as
  often as they fill it, then for the smallest K that holds the rest. A program is compiled when a batch first needs it;
  `warm_up` compiles all.

  One large K suits an accelerator. A CPU is quicker with a few clips at a time: measured, (2+1)-D ResNet-18 takes an
  eighth less per clip with K = 16 than with 64.
  """

  def __init__(
    self,
    model: SegmentNet,
    variables: Mapping[str, Any],
    *,
    capacities: Sequence[int],
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs,
  ):
    """Builds the programs.

    Args:
      model, variables: the network and its trained values.
      capacities: every K, e.g. of `bucket_sizes`; any number of segments is made up of them.
      prepare: from a batch's arrays, all `[B, T, ...]`, to the model's inputs, each segment by itself (normalised, its
        centre frame taken). Runs inside the programs, in the second for the chosen segments alone.
    """
    arguments.instance("model", model, SegmentNet, "a SegmentNet")
    arguments.instance("variables", variables, Mapping, "a mapping with params and batch_stats")
    arguments.function("prepare", prepare)
    capacities = arguments.items("capacities", capacities, "numbers >= 1")
    if not capacities or any(
      not isinstance(capacity, int) or capacity < 1 for capacity in capacities
    ):
      raise ValueError(f"capacities must be numbers >= 1, at least one; got {capacities}")
    self._variables = jax.device_put(variables)
    self._capacities = tuple(capacities)
    self._choose = jax.jit(functools.partial(_choose, model, prepare))
    self._encode = jax.jit(functools.partial(_encode, model, prepare), static_argnames="capacity")
    self._join = jax.jit(functools.partial(jax.tree.map, jnp.add))
    self._classify = jax.jit(functools.partial(_classify, model))

  def __call__(self, inputs: Inputs) -> Result:
    """Runs on a batch of numpy or jax arrays; the outputs may still be on their way, as from any jitted function."""
    inputs, capacities = self._checked(inputs)
    record, outputs, count = self._choose(self._variables, inputs)
    pieces = pieces_for(int(count), capacities)
    logits, records = self._finish(inputs, record.gates, pieces)
    return Result({**outputs, "logits": logits}, (record, *records), int(count), sum(pieces))

  def warm_up(self, inputs: Inputs) -> None:
    """Compiles and runs every program that a batch of these shapes can need."""
    inputs, capacities = self._checked(inputs)
    record, _, _ = self._choose(self._variables, inputs)
    jax.block_until_ready(self._finish(inputs, record.gates, capacities))

  def _checked(self, inputs: Inputs) -> tuple[Inputs, tuple[int, ...]]:
    """The inputs on the device, and the capacities for as many segments."""
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
      sorted({min(capacity, videos * segments) for capacity in self._capacities})
    )

  def _finish(self, inputs: Inputs, gates: Array, pieces: Sequence[int]) -> tuple[Array, Records]:
    starts = itertools.accumulate(pieces, initial=0)
    parts = [
      self._encode(self._variables, inputs, gates, start, capacity=capacity)
      for start, capacity in zip(starts, pieces, strict=False)
    ]
    features, records = functools.reduce(self._join, parts)
    return self._classify(self._variables, features, gates), records


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
  """Features and records of the chosen segments from the `start`-th on, `[B * T, ...]`, zeros in all other places."""
  places = open_indices(gates.reshape(-1), gates.size + capacity)
  index, taken = (lax.dynamic_slice_in_dim(x, start, capacity) for x in places)
  seen = {
    name: x.reshape(-1, 1, *x.shape[2:])[index] for name, x in inputs.items()
  }  # videos of one segment
  encoded = model.apply(variables, prepare(seen)["heavy"][:, 0], method="encode")
  return jax.tree.map(lambda x: put_back(x, index, taken, gates.size), encoded)


def _classify(
  model: SegmentNet, variables: Mapping[str, Any], features: Array, gates: Array
) -> Array:
  return model.apply(variables, features.reshape(*gates.shape, -1), gates, method="classify")
