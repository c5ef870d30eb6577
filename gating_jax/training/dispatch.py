"""Training steps over devices, some of which may leave out the backward of what is closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gating_jax.progress import working
from gating_jax.training import devices


def map_steps(
  make_steps: Callable[[nn.Module], Callable],
  model: nn.Module,
  full: nn.Module | None,
  *,
  args: Sequence[str],
  backend: str,
) -> Callable:
  """`make_steps(model)`, `(state, ...) -> (state, metrics [K])`, over all devices.

  Args:
    make_steps: a model's steps.
    model: what is trained.
    full: the same model with the backward of everything, where `model` may hold less than is open, see `or_in_full`.
    args, backend: of `map_over_devices`; the state is the first argument.
  """

  def mapped(model, donate):
    return devices.map_over_devices(
      make_steps(model),
      args=args,
      results=(devices.REPLICATED, devices.REPLICATED),
      backend=backend,
      donate=donate,
    )

  return mapped(model, (0,)) if full is None else or_in_full(mapped(model, ()), mapped(full, (0,)))


def or_in_full(skipping: Callable, full: Callable) -> Callable:
  """Steps whose backward leaves out what is closed or, where more was open than they hold, the same steps in full.

  Both are `(state, ...) -> (state, metrics [K])`. The first leaves `state` as it was, to be used again, and its
  gradients are NaN where it does not hold what is open, see `open_backward`. Which one counts is a function of the
  arguments alone, so that a restart repeats it. The metric `in_full` is 1 where the second does.
  """
  compiled = False

  def in_full(state, *batch):
    """The first call, in the midst of a training, compiles."""
    nonlocal compiled
    if compiled:
      return full(state, *batch)
    compiled = True
    with working(
      "compiling the training step with its whole backward", "up to a minute or two on a CPU, once"
    ):
      return full(state, *batch)

  def run(state: Any, *batch: Any) -> tuple[Any, dict[str, Any]]:
    after, metrics = skipping(state, *batch)
    missed = not np.isfinite(jax.device_get(metrics["gradient_norm"])).all()
    if missed:
      after, metrics = in_full(state, *batch)
    return after, {
      **metrics,
      "in_full": np.full(metrics["gradient_norm"].shape, missed, np.float32),
    }

  return run
