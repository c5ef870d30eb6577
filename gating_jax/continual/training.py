"""Training steps of continual learning, for any method.

Axes: B examples on this device, M resident images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import optax

from gating_jax.continual.method import Batch, LearnerState, Method
from gating_jax.ops.collectives import mean_over_devices
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.types import Array

_AUGMENT, _METHOD = range(2)


def make_step(
  method: Method,
  optimiser: optax.GradientTransformation,
  prepare: Callable[[Array, Array], Array],
  *,
  seed: int,
  steps_per_epoch: int,
  axis_name: Hashable | None = None,
) -> Callable[[LearnerState, Array, Array, Array], tuple[LearnerState, dict[str, Array]]]:
  """Makes the training step of a method.

  Metrics are scalars over the whole batch. All randomness is a function of `seed` and
  `learner.step`.

  Args:
    method: of continual learning.
    optimiser: changes the parameters.
    prepare: `(key, pixels) -> x`, augments and normalises.
    seed: of all randomness.
    steps_per_epoch: steps in an epoch of a task.
    axis_name: mapped device axis, if any.
  Returns:
    `(learner, pixels [B, ...], labels [B], first_step) -> (learner, metrics)`, where `first_step`
      is the first step of the task.
  """

  def step(learner, pixels, labels, first_step):
    """Takes one training step on `[B, H, W, D]` pixels and `[B]` labels."""
    key = jax.random.fold_in(jax.random.key(seed), learner.step)
    # `learner.step` counts over all tasks; a schedule of the method counts from the task's first
    # step.
    epochs, place = jnp.divmod(learner.step - first_step, steps_per_epoch)
    batch = Batch(
      x=prepare(jax.random.fold_in(key, _AUGMENT), pixels),
      labels=labels,
      key=jax.random.fold_in(key, _METHOD),
      epoch=epochs + place / steps_per_epoch,
      # 0 for the first step of an epoch, 1 for the last; an epoch of one step has only 0.
      place=place / max(1, steps_per_epoch - 1),
    )
    differentiate = value_and_grad_over_devices(_with_total(method.loss), axis_name, has_aux=True)
    (_, (terms, batch_stats)), grads = differentiate(learner.params, learner, batch)
    metrics = mean_over_devices(terms, axis_name)
    grads = method.gradient(grads, learner, batch)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimiser.update(grads, learner.opt_state, learner.params)
    # After the optimiser: only here are momentum and weight decay part of the step.
    updates, memory = method.update(updates, grads, learner)
    params = optax.apply_updates(learner.params, updates)
    metrics["state_norm"] = optax.tree.norm((params, batch_stats))
    return learner.replace(
      step=learner.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      memory=memory,
    ), metrics

  return step


def _with_total(loss):
  def with_total(params, learner, batch):
    """Returns the total loss, and its terms with the total among them."""
    total, (terms, batch_stats) = loss(params, learner, batch)
    return total, ({"loss": total, **terms}, batch_stats)

  return with_total
