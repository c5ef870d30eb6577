"""A network with early exits as one program that goes on with the images that no exit was sure of, gathered.

    stage 1 -> exit 1 -> those it is not sure of: stage 2 -> exit 2 -> those it is not sure of: stage 3 -> ..

After an exit the program takes the smallest of a few numbers of images that holds all that stay; the largest is all.

Axes: N images, H and W pixels, D channels, X exits before the last, K classes.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from deep neural networks",
2016.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.inference import folded
from gating_jax.inference.conditional import (
  GAIN,
  Timing,
  check_arguments,
  in_batches,
  rows,
  run_over,
  spread_batches,
)
from gating_jax.inference.folded import Folded, Layer
from gating_jax.inference.folding import fold_conv, fold_stages
from gating_jax.inference.strategies import for_open
from gating_jax.models.early_exit import EarlyExitNet
from gating_jax.ops import exits
from gating_jax.timing import race
from gating_jax.types import Array

MASKED, EXIT_DISPATCH = "masked", "exit_dispatch"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExitNet:
  """Stages that end with a feature map, the last with logits; after each but the last an exit, which takes that map.

  Attributes:
    stages: X + 1 networks.
    exits: X networks, each to `[N, K]` logits.
    threshold: of an exit's entropy, as a share of the largest: below it an image leaves.
  """

  stages: tuple[Folded, ...]
  exits: tuple[Folded, ...]
  threshold: float = dataclasses.field(metadata={"static": True})


class Exiting:
  """`[N, H, W, D]` images, any N, to `([N, K] logits, [N, X])` as of `run`; made by `compile_exits`."""

  def __init__(self, net: ExitNet, batch_size: int, buckets: int | None, timings: tuple[Timing, ...] = ()):
    self.batch_size, self._net, self._timings = batch_size, net, timings
    self.strategy = MASKED if buckets is None else EXIT_DISPATCH
    self._program = program(buckets)

  def __call__(self, x: Array) -> tuple[Array, Array]:
    return in_batches(functools.partial(self._program, self._net), x, self.batch_size)

  def report(self) -> tuple[Timing, ...]:
    """What both ways took when the program was made; empty without calibration images."""
    return self._timings


def fold_exits(model: EarlyExitNet, variables: Mapping[str, Any]) -> ExitNet:
  """The network in evaluation, BatchNorm folded into its convolutions, in float32.

  Raises:
    ValueError: another model, or GroupNorm, which cannot be folded.
  """
  if not isinstance(model, EarlyExitNet) or model.group_norm:
    raise ValueError(f"model must be an EarlyExitNet without GroupNorm; got a {type(model).__name__}"
                     + (" with it" if getattr(model, "group_norm", False) else ""))
  stages, flat = fold_stages(model, variables)
  classifier = lambda *path: tuple(jnp.asarray(flat["params", *path, name]) for name in ("kernel", "bias"))
  return ExitNet(
      stages=(*(Folded(parts, pooled=False) for parts in stages[:-1]), Folded(stages[-1], classifier("classifier"))),
      exits=tuple(Folded((Layer(fold_conv(flat, (name, "conv"), stride=2)),), classifier(name, "classifier"))
                  for name in (f"exit{i + 1}" for i in range(len(stages) - 1))),
      threshold=model.threshold)


def run(net: ExitNet, x: Array, buckets: int | None = None) -> tuple[Array, Array]:
  """The logits of the exit at which each image leaves, and how unsure every exit was.

  Args:
    net: the network.
    x: `[N, H, W, D]` images.
    buckets: numbers of images at most that there is a program for after each exit; None: all is computed for all.
  Returns:
    `[N, K]`, and `[N, X]` as of `ops.exits.stay_logits`, above 0 where an image goes on; where it has left before, the
    exit at which it did stands for the later ones.
  """
  classes = net.stages[-1].classifier[1].size
  packed = _from(net, 0, x, jnp.full(len(x), jnp.inf), buckets)
  return packed[:, :classes], packed[:, classes:]


def program(buckets: int | None = None) -> Any:
  """`run`, compiled, as a function of a network and images."""
  return jax.jit(functools.partial(run, buckets=buckets))


def _from(net: ExitNet, stage: int, x: Array, least: Array, buckets: int | None) -> Array:
  """From a stage on: logits, then how unsure each exit to come is, `[n, K + exits]`, by `least` `[n]` at most."""
  x, _ = folded.run(net.stages[stage], x)
  if stage == len(net.exits):
    return x
  answer, _ = folded.run(net.exits[stage], x)
  stay = jnp.minimum(least, exits.stay_logits(answer[:, None], net.threshold)[:, 0])
  later = jnp.repeat(stay[:, None], len(net.exits) - stage - 1, axis=1)
  left, goes_on = jnp.concatenate([answer, later], axis=1), (stay > 0)[:, None]
  rest = lambda x, stay: _from(net, stage + 1, x, stay, buckets)
  if buckets is None:
    y = jnp.where(goes_on, rest(x, stay), left)
  else:
    y = for_open(stay > 0, (x, stay), rest, jnp.where(goes_on, 0, left), buckets)
  classes = answer.shape[1]
  return jnp.concatenate([y[:, :classes], stay[:, None], y[:, classes:]], axis=1)


def macs(net: ExitNet, input_shape: tuple[int, int, int], stay: Any = None) -> Any:
  """Multiply-accumulates of each image with these `[N, X]` of `run`; without, of one that goes through all."""
  shape, goes_on, total = (1, *input_shape), 1, 0
  for i, stage in enumerate(net.stages):
    spent = int(folded.macs(stage, shape[1:]))
    if i < len(net.exits):
      shape = jax.eval_shape(folded.run, stage, jax.ShapeDtypeStruct(shape, jnp.float32))[0].shape
      spent += int(folded.macs(net.exits[i], shape[1:]))
    total = total + goes_on * spent
    if stay is not None and i < len(net.exits):
      goes_on = goes_on * (np.asarray(stay)[:, i] > 0)
  return total


def compile_exits(
    model: Any, variables: Mapping[str, Any] | None = None, *, input_shape: tuple[int, int, int], batch_size: int,
    buckets: int = 4, calibration: Any = None, repeats: int = 20,
) -> Exiting:
  """A program that gathers, after each exit, the images that stay; it equals computing everything for all.

  With calibration images both ways are timed on this machine, and the faster is taken.

  Args:
    model, variables: what `fold_exits` takes; or an `ExitNet` alone.
    input_shape: `(H, W, D)` of an image.
    batch_size: of the program; other numbers of images are cut and padded to it.
    buckets: numbers of images at most that there is a program for after each exit.
    calibration: `[M, H, W, D]`, M >= 1, images like those to come, or None.
    repeats: calls of each program that are timed.
  Raises:
    ValueError: another model, or values out of range.
  """
  check_arguments(input_shape, batch_size, buckets, calibration, repeats)
  net = model if isinstance(model, ExitNet) else fold_exits(model, variables)
  if calibration is None:
    return Exiting(net, batch_size, buckets)
  batches = spread_batches(calibration, batch_size)
  ways = {MASKED: program(), EXIT_DISPATCH: program(buckets)}
  seconds = {name: statistics.median(spent) / len(batches) for name, spent in race(
      {name: functools.partial(run_over, way, [(net, x) for x in batches]) for name, way in ways.items()},
      repeats).items()}
  stay = np.concatenate([np.asarray(ways[MASKED](net, x)[1]) for x in batches])
  chosen = EXIT_DISPATCH if seconds[EXIT_DISPATCH] < GAIN * seconds[MASKED] else MASKED
  ratio = float(np.mean(macs(net, input_shape, stay))) / macs(net, input_shape)
  return Exiting(net, batch_size, buckets if chosen == EXIT_DISPATCH else None,
                 tuple(rows(None, seconds, ratio, chosen)))
