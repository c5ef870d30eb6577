"""Training steps over devices, optionally without the backward pass of closed units."""

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
  """Maps a model's training steps over all devices: `(state, ...) -> (state, metrics [K])`.

  Args:
    make_steps: returns the steps of a model.
    model: the model to train.
    full: the same model with the whole backward pass, where `model` may hold fewer units than are
      open, see `or_in_full`; None otherwise.
    args, backend: as in `map_over_devices`; the state is the first argument.
  Returns:
    the steps, compiled at their first call.
  """

  def mapped(model, donate):
    """Returns the steps of `model`, mapped over devices; donates the buffers at `donate`."""
    return devices.map_over_devices(
      make_steps(model),
      args=args,
      results=(devices.REPLICATED, devices.REPLICATED),
      backend=backend,
      donate=donate,
    )

  # The state's buffers are given away only where no second pass may need them again.
  return mapped(model, (0,)) if full is None else or_in_full(mapped(model, ()), mapped(full, (0,)))


def or_in_full(skipping: Callable, full: Callable) -> Callable:
  """Combines steps without the backward pass of closed units and the same steps in full.

  The full steps run where more units are open than the first ones hold. Both are `(state, ...) ->
  (state, metrics [K])`. The first ones leave `state` as it was, to be used again, and their
  gradients are NaN where they do not hold what is open, see `open_backward`. The choice is a
  function of the arguments alone, so that a restart repeats it. The metric `in_full` is 1 where the
  full steps ran.

  Args:
    skipping: the steps without the backward pass of closed units.
    full: the steps with the whole backward pass.
  Returns:
    steps of the same form.
  """
  compiled = False

  def in_full(state, *batch):
    """Runs the full steps; the first call, in the midst of a training, compiles them."""
    nonlocal compiled
    if compiled:
      return full(state, *batch)
    compiled = True
    with working(
      "compiling the training step with its full backward pass",
      "up to a minute or two on a CPU, once",
    ):
      return full(state, *batch)

  def run(state: Any, *batch: Any) -> tuple[Any, dict[str, Any]]:
    """Runs `skipping`, and `full` where a gradient is NaN; returns metrics `[K]`."""
    after, metrics = skipping(state, *batch)
    # A gradient of NaN marks a step that held too few units: the whole call is repeated in full.
    missed = not np.isfinite(jax.device_get(metrics["gradient_norm"])).all()
    if missed:
      after, metrics = in_full(state, *batch)
    # `[K]`, as all metrics: the steps of one call run in full together.
    return after, {
      **metrics,
      "in_full": np.full(metrics["gradient_norm"].shape, missed, np.float32),
    }

  return run
