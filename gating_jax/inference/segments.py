"""Inference that skips segments: the heavy net runs on the chosen ones of a whole batch only.

    segments   the light net on all segments, the heavy net on chosen ones, gathered
    masked     both nets on all segments
    ungated    the heavy net alone, on all segments, as the baseline

Axes: B videos, T segments, K segments that a program of the heavy net takes.
Reference: Hussein et al., 2020 (TimeGate); Verelst and Tuytelaars, 2020 (gather, compute, scatter).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.checks import one_of
from gating_jax.inference.compiled import (
  AUTO,
  MAX_SLOWDOWN_ALL_OPEN,
  Compiled,
  TimedProgram,
  Timing,
  baseline_programs,
  count_pieces,
  count_runs,
  time_programs,
)
from gating_jax.inference.costs import MacRatios
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.summary import VideoCounts, video_summary
from gating_jax.models.timegate import THRESHOLDS, Inputs, Outputs, SegmentNet
from gating_jax.ops import arguments
from gating_jax.ops.compaction import open_indices, pieces_for, scatter_back
from gating_jax.timing import MASKED, SEGMENTS, UNGATED, ReportProgress
from gating_jax.types import Array, GateRecord, Records

# Added to a gate's log-odds, it opens every segment.
_ALWAYS = 1e4


class Result(NamedTuple):
  """Outputs and segment counts of one batch.

  The heavy net's records, `[B * T, ...]`, are zeros for segments that it did not see. `masked`
  sees all of them.

  Attributes:
    outputs, records: what the model returns.
    chosen: number of segments chosen.
    computed: number of segments computed for them, padding included.
  """

  outputs: Outputs
  records: Records
  chosen: int
  computed: int


# From a batch's arrays to the model's inputs.
Prepare = Callable[[Inputs], Inputs]


class SkippingProgram:
  """Programs of a network that run its heavy net on chosen segments only.

  Args:
    model: the network.
    prepare, capacities: as in `compile_segments`.
  """

  def __init__(self, model: SegmentNet, prepare: Prepare, capacities: Sequence[int]):
    self._capacities = tuple(capacities)
    # A program for each K, which is static; the start within the chosen segments is traced.
    self._choose = jax.jit(functools.partial(_choose, model, prepare))
    self._encode = jax.jit(functools.partial(_encode, model, prepare), static_argnames="capacity")
    self._join = jax.jit(functools.partial(jax.tree.map, jnp.add))
    self._classify = jax.jit(functools.partial(_classify, model))

  def __call__(self, variables: Mapping[str, Any], inputs: Inputs) -> Result:
    """Runs on a batch."""
    inputs = _check_inputs(inputs)
    record, outputs, count = self._choose(variables, inputs)
    # The only wait for the device: the number of chosen segments decides which programs run.
    pieces = pieces_for(int(count), fitting_capacities(self._capacities, record.gates.size))
    logits, records = self._finish(variables, inputs, record.gates, pieces=pieces)
    return Result(
      {**outputs, "logits": logits}, (record, *records), chosen=int(count), computed=sum(pieces)
    )

  def warm_up(self, variables: Mapping[str, Any], inputs: Inputs) -> None:
    """Compiles and runs every program that a batch of these shapes can need."""
    inputs = _check_inputs(inputs)
    record, _, _ = self._choose(variables, inputs)
    every = fitting_capacities(self._capacities, record.gates.size)
    jax.block_until_ready(self._finish(variables, inputs, record.gates, pieces=every))

  def _finish(
    self, variables: Mapping[str, Any], inputs: Inputs, gates: Array, *, pieces: Sequence[int]
  ) -> tuple[Array, Records]:
    """Computes the logits, and the heavy net's records.

    Args:
      variables: of the network.
      inputs: of the batch.
      gates: `[B, T]`.
      pieces: numbers of chosen segments that the heavy net takes at a time.
    """
    # `start`: the number of chosen segments that earlier pieces took.
    parts, start = [], 0
    for capacity in pieces:
      parts.append(self._encode(variables, inputs, gates, start=start, capacity=capacity))
      start += capacity
    # Each piece has zeros in the places of the others, so the sum holds all.
    features, records = functools.reduce(self._join, parts)
    return self._classify(variables, features, gates), records


class MaskedProgram:
  """The program of a network that runs its heavy net on all segments.

  Args:
    model: the network.
    prepare: as in `compile_segments`.
  """

  def __init__(self, model: SegmentNet, prepare: Prepare):
    self._whole = jax.jit(functools.partial(_run_whole, model, prepare))

  def __call__(self, variables: Mapping[str, Any], inputs: Inputs) -> Result:
    """Runs on a batch."""
    outputs, records, count = self._whole(variables, _check_inputs(inputs))
    return Result(outputs, records, chosen=int(count), computed=records[0].gates.size)

  def warm_up(self, variables: Mapping[str, Any], inputs: Inputs) -> None:
    """Compiles and runs the program for a batch of these shapes."""
    jax.block_until_ready(self(variables, inputs).outputs)


class CompiledSegments(Compiled):
  """A compiled `SegmentNet` in evaluation, made by `compile_segments`.

  It maps a batch of videos' arrays to a `Result`. `load` takes other variables of the model.

  Args:
    variables: of the network.
    strategy: `segments` or `masked`.
    program: `(variables, inputs) -> Result`.
    timings: as in `Compiled`.

  Attributes:
    strategy: `segments`, or `masked` where the heavy net runs on all segments.
    program: the call is `program(weights, inputs)`.

  >>> from gating_jax.models.video_backbones import FeaturePool
  >>> model = SegmentNet(classes=10, light=FeaturePool(), heavy=FeaturePool())
  >>> x, valid = jnp.ones((2, 6, 4)), jnp.ones((2, 6), bool)
  >>> inputs = {"light": x, "heavy": x, "valid": valid}
  >>> variables = jax.jit(model.init)(jax.random.key(0), inputs)
  >>> program = compile_segments(model, variables, capacities=(12,), strategy="masked")
  >>> program.strategy, program(inputs).outputs["logits"].shape
  ('masked', (2, 10))
  """

  def __init__(
    self,
    variables: Mapping[str, Any],
    *,
    strategy: str,
    program: SkippingProgram | MaskedProgram,
    timings: Sequence[Timing] = (),
  ):
    super().__init__(variables, self._weights_of(variables), timings)
    self.strategy, self.program = strategy, program

  def __call__(self, inputs: Inputs) -> Result:
    """Runs on a batch of numpy or jax arrays.

    As with any jitted function, the outputs may still be computed when it returns.
    """
    return self.program(self.weights, inputs)

  def warm_up(self, inputs: Inputs) -> None:
    """Compiles and runs every program that a batch of these shapes can need."""
    self.program.warm_up(self.weights, inputs)

  def _weights_of(self, net: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the variables on the device."""
    # On the device once, not in every call.
    return jax.device_put(net)


def compile_segments(
  model: SegmentNet,
  variables: Mapping[str, Any],
  *,
  capacities: Sequence[int],
  prepare: Prepare = lambda inputs: inputs,
  strategy: str = SEGMENTS,
  calibration: Inputs | None = None,
  counts: VideoCounts | None = None,
  repeats: int = 20,
  max_slowdown_all_open: float = MAX_SLOWDOWN_ALL_OPEN,
  progress: ReportProgress | None = None,
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
    strategy: `segments`, which skips; `masked`, the heavy net on all segments; or `auto`, the
      faster of the two on this machine, unless it is too slow where every segment is chosen.
    calibration: a batch like those to come, which `auto` needs; its times are in `report`.
    counts: `video_summary` of the network, for the MACs in `report`; None counts it here.
    repeats: number of timed calls of each program.
    max_slowdown_all_open, progress: as in `compile_conditional`.
  Returns:
    A `CompiledSegments`.
  Raises:
    TypeError, ValueError: naming the first argument that is wrong.

  >>> from gating_jax.models.video_backbones import FeaturePool
  >>> model = SegmentNet(classes=10, light=FeaturePool(), heavy=FeaturePool())
  >>> x, valid = jnp.ones((2, 6, 4)), jnp.ones((2, 6), bool)
  >>> inputs = {"light": x, "heavy": x, "valid": valid}
  >>> variables = jax.jit(model.init)(jax.random.key(0), inputs)
  >>> program = compile_segments(model, variables, capacities=(4, 12))
  >>> program(inputs).outputs["logits"].shape
  (2, 10)
  """
  arguments.instance("model", model, SegmentNet, rule="a SegmentNet")
  arguments.instance("variables", variables, Mapping, rule="a mapping with params and batch_stats")
  arguments.function("prepare", prepare)
  capacities = arguments.items("capacities", capacities, "numbers >= 1")
  is_number = [isinstance(capacity, int) and capacity >= 1 for capacity in capacities]
  if not is_number or not all(is_number):
    raise ValueError(f"capacities must be numbers >= 1, at least one; got {capacities}")
  one_of("strategy", strategy, (AUTO, MASKED, SEGMENTS))
  arguments.whole_number("repeats", repeats)
  arguments.number(
    "max_slowdown_all_open", max_slowdown_all_open, "> 0", holds=lambda value: value > 0
  )
  network = _Network(model, variables, prepare=prepare, capacities=capacities)
  if strategy != AUTO:
    return CompiledSegments(variables, strategy=strategy, program=network.program(strategy))
  if calibration is None:
    raise ValueError(f"calibration must be given for strategy {strategy!r}; got None")
  # Programs are timed on the arrays as they come, which may be in host memory.
  _check_inputs(calibration)
  programs = network.programs(calibration)
  # A piece of work is a program compiled, or all of them timed once.
  choice = time_programs(
    programs,
    [calibration],
    repeats=repeats,
    max_slowdown_all_open=max_slowdown_all_open,
    advance=count_pieces(progress, count_runs(programs) + repeats),
  )
  timings = choice.timings(network.mac_ratios(calibration, counts))
  program = programs[choice.strategy].run
  assert isinstance(program, (SkippingProgram, MaskedProgram))  # the others are never chosen
  return CompiledSegments(variables, strategy=choice.strategy, program=program, timings=timings)


class _Network(NamedTuple):
  """A network to compile, with the arguments of `compile_segments`."""

  model: SegmentNet
  variables: Mapping[str, Any]
  prepare: Prepare
  capacities: Sequence[int]

  def program(self, strategy: str) -> SkippingProgram | MaskedProgram:
    """Makes the program of a strategy."""
    if strategy == MASKED:
      return MaskedProgram(self.model, self.prepare)
    return SkippingProgram(self.model, self.prepare, self.capacities)

  def programs(self, inputs: Inputs) -> dict[str, TimedProgram]:
    """Makes the programs to time on a batch."""
    # The worst case: every segment is chosen.
    all_open = self._replace(
      model=self.model.clone(share=1.0), variables=opened_variables(self.model, self.variables)
    )
    # On the device once, so that no call times a copy.
    weights, open_weights = jax.device_put((self.variables, all_open.variables))
    programs = {}
    for name in (SEGMENTS, MASKED):
      programs[name] = TimedProgram(
        self.program(name), weights, open_weights=open_weights, open_run=all_open.program(name)
      )
    dense = dense_program(self.model, self.prepare)
    return programs | baseline_programs(dense, weights, [inputs])

  def mac_ratios(self, inputs: Inputs, counts: VideoCounts | None) -> MacRatios:
    """Computes the ratios of multiply-accumulates to those of the baseline.

    The baseline is the heavy net on all segments and the classifier. What is computed includes the
    heavy net on padding and on segments that are not chosen.

    Args:
      inputs: of a batch.
      counts: as in `compile_segments`.
    """
    if counts is None:
      prepared = jax.eval_shape(self.prepare, inputs)
      counts = video_summary(self.model, {name: x.shape[1:] for name, x in prepared.items()})

    def run_gates(variables: Mapping[str, Any], inputs: Inputs) -> tuple[Array, Array]:
      """Returns the gates, and the heavy net's MACs on each segment, `[B, T]` both."""
      results: Any = self.model.apply(variables, self.prepare(inputs))
      _, (record, *channels) = results
      return record.gates, counts.heavy.per_example(tuple(channels), record.gates.shape)

    gates, heavy_macs = jax.device_get(jax.jit(run_gates)(self.variables, inputs))
    valid = np.asarray(inputs["valid"])
    # Padding of shorter videos costs nothing in the baseline.
    dense = counts.all_valid(valid)
    opened = counts.per_video(gates, valid, heavy_macs).mean()
    # Segments per video that `segments` computes, padding included.
    sizes = fitting_capacities(self.capacities, valid.size)
    taken = sum(pieces_for(int(np.sum(gates > 0)), sizes)) / len(valid)
    return MacRatios.relative_to(
      dense,
      opened=float(opened),
      computed={
        MASKED: counts.computed(valid),
        SEGMENTS: counts.computed(valid, taken=taken),
        UNGATED: counts.all_segments,
      },
    )


def dense_program(
  model: SegmentNet, prepare: Prepare
) -> Callable[[Mapping[str, Any], Inputs], Outputs]:
  """Makes the program of the heavy net on all segments, without light net and gate.

  Args:
    model, prepare: as in `compile_segments`.
  Returns:
    a jitted function `(variables, inputs) -> outputs`.
  """
  dense = model.clone(selection="all", light=None, light_head=False)
  return jax.jit(lambda variables, inputs: dense.apply(variables, prepare(inputs))[0])


def opened_variables(model: SegmentNet, variables: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the variables with a bias of a learned gate at which every segment is chosen."""
  # Fixed selections take every segment with `share` 1, unless they have a threshold; no gate.
  if model.selection != "gate":
    return {kind: tree for kind, tree in variables.items() if kind != THRESHOLDS}
  gate = variables["params"][GATE_NAME]
  bias = gate["logits"]["bias"] + _ALWAYS
  gate = {**gate, "logits": {**gate["logits"], "bias": bias}}
  return {**variables, "params": {**variables["params"], GATE_NAME: gate}}


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
    "inputs", inputs, Mapping, rule="a mapping with arrays heavy, valid and, for a light net, light"
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


def _run_whole(
  model: SegmentNet, prepare: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[Outputs, Records, Array]:
  """Computes outputs and records of all segments, and the number of chosen segments."""
  results: Any = model.apply(variables, prepare(inputs))
  outputs, records = results
  return outputs, records, jnp.sum(records[0].gates > 0)


def _choose(
  model: SegmentNet, prepare: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[GateRecord, Outputs, Array]:
  """Chooses segments; returns their record, outputs so far, and the number of chosen segments."""
  results: Any = model.apply(variables, prepare(inputs), method="choose")
  record, outputs = results
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
  index, taken = open_indices(gates.reshape(-1), capacity=gates.size + capacity)
  index = lax.dynamic_slice_in_dim(index, start, capacity)
  taken = lax.dynamic_slice_in_dim(taken, start, capacity)
  # Each segment is a video of its own, `[K, 1, ...]`, as `prepare` takes them.
  seen = {}
  for name, x in inputs.items():
    seen[name] = x.reshape(-1, 1, *x.shape[2:])[index]
  heavy = prepare(seen)["heavy"][:, 0]
  encoded = model.apply(variables, heavy, method="encode")
  return jax.tree.map(lambda x: scatter_back(x, index, taken, size=gates.size), encoded)


def _classify(
  model: SegmentNet, variables: Mapping[str, Any], features: Array, gates: Array
) -> Array:
  """Computes the logits `[B, classes]` from the features of all segments."""
  features = features.reshape(*gates.shape, -1)
  logits: Any = model.apply(variables, features, gates, method="classify")
  return logits
