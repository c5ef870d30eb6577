"""Coefficients and learning rates as functions of the step, their corners given as fractions of training."""

from __future__ import annotations

import collections

import optax

from gating_jax.checks import one_of

LEARNING_RATES = ("step", "cosine")


def fade_out(coefficient: float, end: float, total_steps: int) -> optax.Schedule:
  """From `coefficient` at the start, linear to 0 at the fraction `end`; 0 from the start where `end` is 0."""
  _check_fractions(end=end)
  if not end:
    return optax.constant_schedule(0.0)
  return optax.linear_schedule(coefficient, 0.0, max(1, round(end * total_steps)))


def fade_in(coefficient: float, start: float, full: float, total_steps: int) -> optax.Schedule:
  """0 up to the fraction `start`, linear to `coefficient` at the fraction `full`, constant after."""
  return ramp(0.0, coefficient, start, full, total_steps)


def ramp(first: float, last: float, start: float, full: float, total_steps: int) -> optax.Schedule:
  """`first` up to the fraction `start`, linear to `last` at the fraction `full`, constant after; `last` from the start
  where `full` is 0."""
  _check_fractions(start=start, full=full)
  if not start <= full:
    raise ValueError(f"start must be <= full; got start {start}, full {full}")
  if full == 0:
    return optax.constant_schedule(last)
  begin = round(start * total_steps)
  return optax.linear_schedule(
    first, last, max(1, round(full * total_steps) - begin), transition_begin=begin
  )


def learning_rate(
  kind: str,
  peak: float,
  total_steps: int,
  *,
  warmup: float = 0.0,
  drops: tuple[float, ...] = (),
  factor: float = 0.1,
) -> optax.Schedule:
  """Linear warm-up over the fraction `warmup`, then `cosine` to 0, or `step`: times `factor` at each of `drops`."""
  _check_fractions(warmup=warmup, **{f"drops[{i}]": d for i, d in enumerate(drops)})
  one_of("schedule", kind, LEARNING_RATES)
  if not peak > 0:
    raise ValueError(f"learning_rate must be > 0; got {peak}")
  warm = round(warmup * total_steps)
  if kind == "cosine":
    after = optax.cosine_decay_schedule(peak, max(1, total_steps - warm))
  else:
    drops_at = collections.Counter(round(d * total_steps) - warm for d in drops)
    after = optax.piecewise_constant_schedule(
      peak, {at: factor**count for at, count in drops_at.items()}
    )
  if not warm:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm])


def _check_fractions(**fractions: float) -> None:
  for name, value in fractions.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must be a fraction of training, in [0, 1]; got {value}")
