"""Optimisers and schedules.

Weight decay is on all parameters but those of gate networks. The corners of
schedules, of coefficients or learning rates, are fractions of training.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.layers.gate import is_gate_path

LEARNING_RATES = ("step", "cosine")
TRANSITIONS = ("cosine", "linear", "held")


def sgd(
  learning_rate: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  gate_weight_decay: float = 0.0,
  gate_lr_multiplier: float = 1.0,
) -> optax.GradientTransformation:
  """Returns SGD with Nesterov momentum.

  `weight_decay` is added to the gradient, for gate parameters `gate_weight_decay`. Decay draws
  logits towards 0, where gates decide nothing. Where logits are normalised it changes no decision,
  and keeps the kernels of gate networks from growing and so from learning ever more slowly.

  Gate parameters learn `gate_lr_multiplier` times as fast. Means over gates give each gate a small
  gradient; a larger penalty on open gates moves them sooner as well, but then it outweighs the
  task's loss.

  Args:
    learning_rate: from step to number.
    momentum: in [0, 1); without Nesterov's correction where it is 0.
    weight_decay, gate_weight_decay: >= 0.
    gate_lr_multiplier: > 0, factor of the gate parameters' updates.
  Raises:
    ValueError: an argument is out of its range.

  Reference: Bejnordi et al., 2020 (independent re-implementations agree on the gate parameters'
  exemption).
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum must be in [0, 1); got {momentum}")
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay must be >= 0; got {weight_decay}")
  if not gate_weight_decay >= 0:
    raise ValueError(f"gate_weight_decay must be >= 0; got {gate_weight_decay}")
  if not gate_lr_multiplier > 0:
    raise ValueError(f"gate_lr_multiplier must be > 0; got {gate_lr_multiplier}")
  decays = [optax.add_decayed_weights(weight_decay, mask=decayed)]
  # Without one, the optimiser's state has the same tree as in checkpoints of earlier versions.
  if gate_weight_decay:
    decays.append(optax.add_decayed_weights(gate_weight_decay, mask=mark_gates))
  return optax.chain(
    *decays,
    optax.sgd(learning_rate, momentum=momentum, nesterov=momentum > 0),
    # After the learning rate: the factor scales the update, not the momentum.
    optax.masked(optax.scale(gate_lr_multiplier), mark_gates),
  )


def mark_gates(params: Any) -> Any:
  """Returns a tree with True for each parameter of a gate network."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: is_gate_path(path) for path in flat})


def decayed(params: Any) -> Any:
  """Returns a tree with True for each parameter that is not of a gate network."""
  return jax.tree.map(operator.not_, mark_gates(params))


def adam(learning_rate: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
  """Returns Adam with decoupled weight decay, which is 0 for gate parameters.

  Args:
    learning_rate: from step to number.
    weight_decay: >= 0.
  Raises:
    ValueError: `weight_decay` is negative.

  Reference: Kingma and Ba, 2015; Loshchilov and Hutter, 2019.
  """
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay must be >= 0; got {weight_decay}")
  # adamw decays the parameters themselves, apart from the scaled gradient.
  return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)


def frozen(
  optimiser: optax.GradientTransformation, is_frozen: Callable[[Sequence[str]], bool]
) -> optax.GradientTransformation:
  """Returns `optimiser` with the parameters frozen whose path `is_frozen`, without weight decay.

  Args:
    optimiser: trains all other parameters.
    is_frozen: from a parameter's path to whether it stays as it is.
  """
  # Zero updates, not zero gradients: weight decay would move a parameter without a gradient.
  return _by_label(trained=optimiser, still=optax.set_to_zero(), is_frozen=is_frozen)


def frozen_at_first(
  make: Callable[[optax.Schedule], optax.GradientTransformation],
  learning_rate: optax.Schedule,
  *,
  is_frozen: Callable[[Sequence[str]], bool],
  steps: int,
) -> optax.GradientTransformation:
  """Returns an optimiser that freezes some parameters for its first steps.

  While they are frozen they have neither weight decay nor momentum. Statistics of BatchNorm are no
  parameters: they follow the data all the time.

  Args:
    make: from a learning rate to the optimiser of all parameters.
    learning_rate: from step to number.
    is_frozen: from a parameter's path to whether it stays as it is at first.
    steps: so many steps, >= 0.
  Raises:
    ValueError: `steps` is negative.
  """
  if not steps >= 0:
    raise ValueError(f"steps must be >= 0; got {steps}")

  def is_over(step: Any, **extra: Any) -> Any:
    """Returns whether the frozen parameters move at a step; optax may pass on more."""
    return step >= steps

  def later_rate(step):
    """Returns the learning rate for an optimiser that counts from the end of the freezing."""
    return learning_rate(step + steps)

  still = optax.conditionally_mask(make(later_rate), is_over)
  return _by_label(trained=make(learning_rate), still=still, is_frozen=is_frozen)


def _by_label(
  *,
  trained: optax.GradientTransformation,
  still: optax.GradientTransformation,
  is_frozen: Callable[[Sequence[str]], bool],
) -> optax.GradientTransformation:
  """Returns an optimiser that is `still` for the parameters that `is_frozen`, else `trained`."""

  def labels(params):
    """Returns the tree of `params` with a label for each: `still` or `trained`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
      {path: "still" if is_frozen(path) else "trained" for path in flat}
    )

  return optax.multi_transform({"trained": trained, "still": still}, labels)


def fade_out(coefficient: float, fade_end: float, total_steps: int) -> optax.Schedule:
  """Returns a schedule from `coefficient` linearly to 0.

  Args:
    coefficient: the value at the start.
    fade_end: the fraction of training at which it is 0; 0 from the start where it is 0.
    total_steps: steps of the training.
  Raises:
    ValueError: `fade_end` is outside [0, 1].
  """
  _check_fractions(fade_end=fade_end)
  # An end of 0 turns the term off.
  if not fade_end:
    return optax.constant_schedule(0.0)
  return optax.linear_schedule(coefficient, 0.0, max(1, round(fade_end * total_steps)))


def fade_in(
  coefficient: float, ramp_start: float, ramp_end: float, total_steps: int
) -> optax.Schedule:
  """Returns a schedule of 0, then linear to `coefficient`, then constant.

  Args:
    coefficient: the last value.
    ramp_start, ramp_end: fractions of training at which the slope begins and ends.
    total_steps: steps of the training.
  Raises:
    ValueError: as for `ramp`.
  """
  return ramp(0.0, coefficient, ramp_start=ramp_start, ramp_end=ramp_end, total_steps=total_steps)


def ramp(
  first: float, last: float, ramp_start: float, ramp_end: float, total_steps: int
) -> optax.Schedule:
  """Returns a schedule of `first`, then linear to `last`, then constant.

  Args:
    first, last: the values before and after the slope.
    ramp_start, ramp_end: fractions of training at which the slope begins and ends; `last` from
      the start where `ramp_end` is 0.
    total_steps: steps of the training.
  Raises:
    ValueError: a fraction is outside [0, 1], or `ramp_start` is above `ramp_end`.
  """
  _check_fractions(ramp_start=ramp_start, ramp_end=ramp_end)
  if not ramp_start <= ramp_end:
    raise ValueError(
      f"ramp_start must be <= ramp_end; got ramp_start {ramp_start}, ramp_end {ramp_end}"
    )
  if ramp_end == 0:
    return optax.constant_schedule(last)
  # One step at least: with 0 steps optax would stay at `first`.
  begin = round(ramp_start * total_steps)
  return optax.linear_schedule(
    first, last, max(1, round(ramp_end * total_steps) - begin), transition_begin=begin
  )


def transition(
  first: float,
  last: float,
  ramp_start: float,
  ramp_end: float,
  total_steps: int,
  *,
  form: str = "linear",
) -> optax.Schedule:
  """Returns a schedule of `first`, then a transition of one of `TRANSITIONS`, then `last`.

      linear    first + (last - first) f
      cosine    last + (first - last) (1 + cos(pi f)) / 2
      held      first until f = 1

  Here f is the fraction of the transition that is over.

  Args:
    first, last: the values before and after.
    ramp_start, ramp_end, total_steps: as in `ramp`.
    form: of the transition.
  Raises:
    ValueError: as for `ramp`, or an unknown form.
  """
  one_of("form", form, TRANSITIONS)
  # The fraction f, which is 1 from the start where the end is 0.
  over = ramp(0.0, 1.0, ramp_start=ramp_start, ramp_end=ramp_end, total_steps=total_steps)

  def value(step):
    """Returns the value at a step."""
    f = jnp.asarray(over(step))
    if form == "held":
      # At the end exactly: a fraction before it is rounded below 1.
      return jnp.where(f >= 1, last, first)
    left = (1 + jnp.cos(jnp.pi * f)) / 2 if form == "cosine" else 1 - f
    return last + (first - last) * left

  return value


def configured_rate(training: Config, total_steps: int) -> optax.Schedule:
  """Returns the `learning_rate` that the section `optim` of a config describes."""
  return learning_rate(
    training.schedule,
    training.learning_rate,
    total_steps,
    warmup=training.warmup,
    lr_drop_at=training.lr_drop_at,
    factor=training.drop_factor,
  )


def learning_rate(
  kind: str,
  peak: float,
  total_steps: int,
  *,
  warmup: float = 0.0,
  lr_drop_at: tuple[float, ...] = (),
  factor: float = 0.1,
) -> optax.Schedule:
  """Returns a learning rate with linear warm-up and decay.

  Args:
    kind: `cosine` decays to 0; `step` multiplies by `factor` at each of `lr_drop_at`.
    peak: the rate after the warm-up, > 0.
    total_steps: steps of the training.
    warmup: fraction of training for the linear warm-up from 0.
    lr_drop_at: fractions of training.
    factor: see `kind`.
  Raises:
    ValueError: an unknown kind, a rate that is not positive, or a fraction outside [0, 1].
  """
  drops_by_name = {f"lr_drop_at[{i}]": fraction for i, fraction in enumerate(lr_drop_at)}
  _check_fractions(warmup=warmup, **drops_by_name)
  one_of("schedule", kind, LEARNING_RATES)
  if not peak > 0:
    raise ValueError(f"learning_rate must be > 0; got {peak}")
  warm = round(warmup * total_steps)
  if kind == "cosine":
    after = optax.cosine_decay_schedule(peak, max(1, total_steps - warm))
  else:
    # Counted, since several drops may round to the same step: each multiplies the rate.
    drops = collections.Counter()
    for fraction in lr_drop_at:
      # join_schedules counts the steps of `after` from the end of the warm-up.
      drops[round(fraction * total_steps) - warm] += 1
    factors = {step: factor**count for step, count in drops.items()}
    after = optax.piecewise_constant_schedule(peak, factors)
  if not warm:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm])


def _check_fractions(**fractions: float) -> None:
  for name, value in fractions.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be a fraction of training, in [0, 1]; got {value}")
