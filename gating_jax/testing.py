"""A check of batch losses, for tests of gradients.

It names the broken rule, the place, and the known slip behind it.

Axes: N examples, C columns, n devices. Independent of any loss in particular; `docs/derivations.md`
explains the slips.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

__all__ = ["LossCheck", "LossCheckError", "check_loss"]

_AXIS = "check_loss_devices"
# Rounding error of terms that cancel, relative to the largest result or 1.
_ROUNDING = 1e-12
_THROUGH_RANKS = (
  "gradient through the ranks: it changes when other examples move in unchanged order, the true "
  "one does not"
)
_UNSEEN = (
  "unlike finite differences: gradient through the ranks by a surrogate with another value, or a "
  "wrong derivative"
)


class LossCheckError(AssertionError):
  """The error of a loss that breaks a rule of `check_loss`; its message has one line per fault.

  >>> check_loss(lambda x: lax.stop_gradient(x).mean(axis=0))
  Traceback (most recent call last):
  gating_jax.testing.LossCheckError: the loss has 1 fault(s)
  - gradient: constant factor 0; in column(s) 0, 1, 2, worst at column 0, example 0: got 0, \
expected 0.142857
  """


@dataclasses.dataclass(frozen=True)
class LossCheck:
  """Measured errors of a loss, as returned by `check_loss`.

  Attributes:
    errors: by rule, the worst relative error; for saturation, the fraction of the gradient that is
      not finite.
    skipped: the rules left out and why; empty if none.

  >>> checked = check_loss(lambda x: x.sum(axis=0), devices=None)
  >>> checked.errors["saturation"], checked.skipped
  (0.0, 'devices: not requested')
  """

  errors: Mapping[str, float]
  skipped: str


def check_loss(
  loss: Callable[..., jax.Array],
  *,
  shape: tuple[int, int] = (7, 3),
  low: float = -3.0,
  high: float = 3.0,
  saturated: Sequence[float] = (0.0, 30.0, -30.0, 110.0, -110.0, 1e4, -1e4),
  devices: int | None = 4,
  tolerance: float = 1e-4,
  seed: int = 0,
) -> LossCheck:
  """Checks a batch loss: its gradient is that of its value, on any devices, and finite.

  All rules are checked before anything is raised:

  - the gradient agrees with finite differences;
  - the gradient is permuted with the examples;
  - jit and vmap change nothing;
  - value and gradient are finite at saturation;
  - n devices, their gradients averaged, give what one device gives, also next to another term.

  Values have no ties, and no column's order is its own inverse, so that a permutation confused with
  its inverse shows. Devices are virtual (`vmap`), and real ones too where there are n.

  Args:
    loss: `[N, C]` values, for any N -> scalar or `[C]`, in the dtype of the values. A loss with a
      keyword `axis_name` is given the axis over which the batch is spread, and must then be the
      loss of the whole batch.
    shape: `(N, C)`, N at least 3; over n devices N is rounded up. A wrong factor is named best if
      N, C and n differ.
    low, high: the range of ordinary values, where the loss has a derivative.
    saturated: values where it must still be finite in float32; the default suits log-odds.
    devices: n, at least 2, or None to leave that rule out.
    tolerance: the relative error allowed.
    seed: the seed of everything random.
  Returns:
    the errors measured, and what was skipped.
  Raises:
    LossCheckError: a rule is broken.
    TypeError: `loss` is no function.
    ValueError: an argument, or the loss's result, is not as described above.

  >>> check_loss(lambda x: jnp.mean(jnp.square(x), axis=0)).skipped
  'devices: the loss takes no keyword axis_name'
  """
  settings = _Settings(shape, low=low, high=high, devices=devices, tolerance=tolerance)
  _check_arguments(loss, settings, saturated)

  def total(x, **axis):
    """Sums the columns; the gradient of each column stays its own."""
    return jnp.sum(loss(x, **axis))

  rng = np.random.default_rng(seed)
  with jax.enable_x64(True):
    outcomes = _check_one_device(total, settings, rng)
    if devices is None:
      skipped = "devices: not requested"
    elif "axis_name" not in inspect.signature(loss).parameters:
      skipped = "devices: the loss takes no keyword axis_name"
    else:
      parallel, skipped = _check_parallel(total, settings, rng)
      outcomes |= parallel
  with jax.enable_x64(False):
    outcomes["saturation"] = _check_saturation(total, shape, saturated)
  # One slip breaks several rules: it is reported once, with all of them.
  rules_of_fault: dict[str, list[str]] = {}
  for rule, outcome in outcomes.items():
    for fault in outcome.faults:
      rules_of_fault.setdefault(fault, []).append(rule)
  if rules_of_fault:
    message = f"the loss has {len(rules_of_fault)} fault(s)"
    for fault, rules in rules_of_fault.items():
      message += f"\n- {', '.join(rules)}: {fault}"
    raise LossCheckError(message)
  return LossCheck({rule: outcome.error for rule, outcome in outcomes.items()}, skipped)


class _Settings(NamedTuple):
  """Arguments of `check_loss`, which documents them."""

  shape: tuple[int, int]
  low: float
  high: float
  devices: int | None
  tolerance: float


class _Outcome(NamedTuple):
  """Outcome of one rule.

  Attributes:
    error: the worst relative error.
    faults: in words; empty where the loss keeps the rule.
  """

  error: float
  faults: list[str]


class _Result(NamedTuple):
  """Value and gradient of a loss, in the order of `jax.value_and_grad`."""

  value: jax.Array | np.ndarray
  gradient: jax.Array | np.ndarray


def _check_one_device(total, settings, rng):
  """Returns each rule's outcome on one device."""
  examples, columns = settings.shape
  x = jnp.asarray(_values(settings, rng, examples))
  y = jnp.asarray(_values(settings, rng, examples))
  order = _order(rng, examples)
  traced_each_time = jax.value_and_grad(total)
  jitted = jax.jit(traced_each_time)
  of_x, of_y = _Result(*jitted(x)), _Result(*jitted(y))
  # A mean in place of a sum, or the reverse, is off by one of these counts.
  too_small, too_large = {}, {}
  for name, count in (("N", examples), ("C", columns), ("devices", settings.devices)):
    if count:
      too_small[f"mean where a sum was meant (1/{name})"] = 1 / count
      too_large[f"sum where a mean was meant ({name})"] = count

  def gradient(x):
    """Returns the gradient `[N, C]` of the loss."""
    return np.asarray(jitted(x)[1])

  factors = too_small | too_large
  outcomes = {
    "gradient": _check_gradient(total, gradient, np.asarray(x), factors=factors, settings=settings)
  }
  permuted = _Result(of_x.value, of_x.gradient[order])
  outcomes["permutation"] = _compare(_Result(*jitted(x[order])), permuted, settings.tolerance)
  outcomes["jit"] = _compare(of_x, _Result(*traced_each_time(x)), settings.tolerance)
  both = _Result(
    np.stack([of_x.value, of_y.value]),
    np.stack([of_x.gradient, of_y.gradient]),
  )
  mapped = jax.jit(jax.vmap(traced_each_time))(jnp.stack([x, y]))
  outcomes["vmap"] = _compare(_Result(*mapped), both, settings.tolerance)
  return outcomes


def _check_gradient(total, gradient, x, *, factors, settings):
  """Compares a gradient with finite differences, and names what is wrong with it.

  Args:
    total: `[N, C]` -> scalar.
    gradient: `[N, C]` -> `[N, C]`.
    x: `[N, C]`.
    factors: known constant factors, by the slip that causes them.
    settings: of the check.
  """
  span, tolerance = settings.high - settings.low, settings.tolerance
  got = gradient(x)
  right, noise = _differences(total, x, 1e-6 * span)
  error = _relative_error(got, right, noise)
  # The slip of each wrong column.
  slips = {}
  for j in np.flatnonzero(error.max(0) > tolerance):
    source = np.argsort(x[:, j])
    allowed = tolerance * np.abs(got[:, j]).max() + noise
    slips[j] = _name_slip(
      got[:, j], right[:, j], source, allowed=allowed, factors=factors, tolerance=tolerance
    )
  if None in slips.values():
    moves = np.argsort(np.argsort(x, axis=0), axis=0) % 2 == 1
    # Moved by less than the smallest gap, 0.5 span / N: the ranks stay the same.
    moved = x - moves * 0.2 * span / len(x)
    # Examples that stay show a gradient through the ranks: it follows those that move, where the
    # true one does not.
    change = _relative_error(gradient(moved), got)
    right_change = _relative_error(_differences(total, moved, 1e-6 * span)[0], right, 2 * noise)
    reacts = np.where(moves, 0, change).max(0) > tolerance
    right_reacts = np.where(moves, 0, right_change).max(0) > tolerance
    for j, slip in slips.items():
      if slip is None:
        slips[j] = _THROUGH_RANKS if reacts[j] and not right_reacts[j] else _UNSEEN
  faults = []
  for slip in dict.fromkeys(slips.values()):
    columns = [int(j) for j in slips if slips[j] == slip]
    among = np.where(np.isin(np.arange(x.shape[1]), columns), error, -1)
    listed = ", ".join(map(str, columns))
    faults.append(f"{slip}; in column(s) {listed}, {_worst(among, got, right)}")
  return _Outcome(float(error.max()), faults)


def _arrangements(gradient: np.ndarray, source: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the slips that reorder a column's gradient, each with the gradient that it makes.

  Args:
    gradient: the right one, `[N]`.
    source: the argsort of the column's values.
  """
  yield "", gradient
  yield "un-sort forgotten", gradient[source]
  yield "sort permutation used instead of its inverse", gradient[source][source]


def _name_slip(got, right, source, *, allowed, factors, tolerance):
  """Names the slip that turns the right gradient of a column into the loss's; None if unknown."""
  if not (np.isfinite(got).all() and np.isfinite(right).all()):
    return "not finite at ordinary values"
  for slip, arranged in _arrangements(right, source):
    factor = _factor(got, arranged, allowed)
    if factor is None:
      continue
    if not slip:
      return _name_factor(factor, factors, tolerance)
    if abs(factor - 1) <= tolerance:
      return slip
    return f"{slip} and {_name_factor(factor, factors, tolerance)}"
  # The same values in another order: no known permutation, but still the right numbers.
  reordered = np.abs(np.sort(got) - np.sort(right)).max() <= allowed
  return "the right values in the wrong places" if reordered else None


def _name_factor(factor, known, tolerance):
  """Names a constant factor by the slips that cause it, if any are known."""
  names = [name for name, usual in known.items() if abs(factor - usual) <= tolerance * usual]
  number = f"constant factor {factor:.4g}"
  return f"{' or '.join(names)}: {number}" if names else number


def _check_parallel(total, settings, rng):
  """Checks the term's part of the gradient of shared parameters, for each batch layout.

  Returns:
    the outcome of each layout, and the layout left out, if any.
  """
  low, high, devices = settings.low, settings.high, settings.devices
  columns = settings.shape[1]
  # Rounded up: each device needs as many examples.
  examples = -(-settings.shape[0] // devices) * devices
  weights = np.zeros((5, columns))
  batch = (
    _values(settings, rng, examples),
    rng.normal(size=(examples, len(weights))),
    rng.uniform(low, high, (examples, columns)),
  )

  def objective(weights, values, inputs, target, *, term=1.0, other=1.0, **axis):
    """Returns the scalar `term * loss + other * squared error`, of weights `[5, C]`."""
    x = values + inputs @ weights
    return term * total(x, **axis) + other * jnp.mean(jnp.square((x - target) / (high - low)))

  def on_one_device(**scales):
    """Evaluates the objective with these scales of its terms."""
    scaled = functools.partial(objective, **scales)
    return _Result(*jax.jit(jax.value_and_grad(scaled))(weights, *batch))

  # The gradient is linear in the terms: subtracting the other one leaves that of the loss.
  right, other = on_one_device(other=0.0), on_one_device(term=0.0)
  over_devices = functools.partial(objective, axis_name=_AXIS)
  spread, skipped = _spread(over_devices, weights, batch, devices=devices)
  factors = {"missing psum (1/devices)": 1 / devices, "one psum too many (devices)": devices}
  outcomes = {}
  for layout, result in spread.items():
    part = _Result(
      np.subtract(result.value, other.value), np.subtract(result.gradient, other.gradient)
    )
    outcome = _compare(part, right, settings.tolerance, row="parameter")
    if outcome.faults:
      named = _name_parts(
        part.gradient,
        np.asarray(right.gradient),
        known=factors,
        tolerance=settings.tolerance,
      )
      outcome = outcome._replace(faults=["; ".join([*named, *outcome.faults])])
    outcomes[f"{devices} devices by {layout}"] = outcome
  return outcomes, skipped


def _name_parts(got, right, *, known, tolerance):
  """Names the errors of the factor c in `gradient = other + c * term`, over all columns."""
  named = []
  for j in np.flatnonzero(_relative_error(got, right).max(0) > tolerance):
    factor = _factor(got[:, j], right[:, j], tolerance * np.abs(got[:, j]).max())
    if factor is None:
      named.append("not a multiple of the gradient on one device")
    else:
      named.append(f"{_name_factor(factor, known, tolerance)} next to another term")
  # Each once, in the order of the columns.
  return list(dict.fromkeys(named))


def _spread(objective, weights, batch, *, devices):
  """Evaluates the mean over devices by each layout of the batch.

  Returns:
    the results by layout, and the layout left out, if any, with the reason.
  """

  def averaged(*args):
    """Averages values and gradients over the devices."""
    return lax.pmean(jax.value_and_grad(objective)(*args), _AXIS)

  def average(*args):
    """Averages the values over the devices."""
    return lax.pmean(objective(*args), _AXIS)

  parts = [array.reshape(devices, -1, array.shape[1]) for array in batch]
  by_vmap = jax.jit(jax.vmap(averaged, (None, 0, 0, 0), axis_name=_AXIS))
  value, gradient = by_vmap(weights, *parts)
  # Every device has the same mean.
  results = {"vmap": _Result(value[0], gradient[0])}
  if len(jax.devices()) < devices:
    return results, f"shard_map: there are fewer than {devices} real devices"
  split, whole = PartitionSpec(_AXIS), PartitionSpec()
  shard_map = functools.partial(
    jax.shard_map,
    mesh=Mesh(np.array(jax.devices()[:devices]), _AXIS),
    in_specs=(whole, split, split, split),
    out_specs=whole,
  )
  by_shard_map = jax.jit(shard_map(averaged, check_vma=False))
  results["shard_map"] = _Result(*by_shard_map(weights, *batch))
  # With check_vma, JAX sums the gradient of a shared parameter over the devices.
  checked = jax.jit(shard_map(jax.value_and_grad(average)))
  try:
    results["shard_map with check_vma"] = _Result(*checked(weights, *batch))
  # check_vma refuses many correct losses that were not written for it.
  except (TypeError, ValueError) as error:
    return results, f"shard_map with check_vma: {str(error).splitlines()[0]}"
  return results, ""


def _check_saturation(total, shape, saturated):
  """Finds values and gradients that are not finite, in float32.

  One batch holds each saturated value alone; the last one holds all of them in turn.
  """
  # Rolled by column, so that the columns of an example saturate at different values.
  in_turn = np.stack([np.resize(np.roll(saturated, -j), shape[0]) for j in range(shape[1])], axis=1)
  alone = [np.full(shape, value) for value in saturated]
  batches = np.asarray([*alone, in_turn], np.float32)
  run = jax.jit(functools.partial(lax.map, jax.value_and_grad(total)))
  values, gradients = run(batches)
  values, gradients = np.asarray(values), np.asarray(gradients)
  bad = ~(np.isfinite(gradients) & np.isfinite(values)[:, None, None])
  if not bad.any():
    return _Outcome(0.0, [])
  kind = "NaN" if np.isnan(values).any() or np.isnan(gradients).any() else "infinity"
  bad_alone = np.asarray(saturated)[bad[:-1].any(axis=(1, 2))]
  where = ", ".join(f"{value:g}" for value in bad_alone) or "all values in turn"
  k, i, j = np.argwhere(bad)[0]
  place = (
    f"column {j}, example {i}, x = {batches[k, i, j]:g}: value {values[k]:g}, gradient "
    f"{gradients[k, i, j]:g}"
  )
  fault = f"{kind} at saturation, in batches of {where}; first at {place}"
  return _Outcome(float(bad.mean()), [fault])


def _compare(got, right, tolerance, row="example"):
  """Compares two results; `row` names the first axis of their gradients."""
  value, gradient = np.asarray(got.value), np.asarray(got.gradient)
  right_value, right_gradient = np.asarray(right.value), np.asarray(right.gradient)
  error = _relative_error(gradient, right_gradient)
  value_error = _relative_error(value.reshape(1, -1), right_value.reshape(1, -1)).max()
  faults = []
  if value_error > tolerance:
    faults.append(f"value {value}, expected {right_value}")
  if error.max() > tolerance:
    faults.append(f"gradient {_worst(error, gradient, right_gradient, row=row)}")
  return _Outcome(float(max(value_error, error.max())), faults)


def _relative_error(got, right, noise=0.0):
  """Returns the elementwise error beyond rounding; infinite where an entry is not finite.

  It is relative to the largest magnitude along axis -2.
  """
  finite = np.isfinite(got) & np.isfinite(right)
  got, right = np.where(finite, got, 0.0), np.where(finite, right, 0.0)
  size = np.maximum(np.abs(got), np.abs(right))
  gap = np.maximum(np.abs(got - right) - noise - _ROUNDING * size.max(initial=1.0), 0)
  error = gap / np.maximum(size.max(-2, keepdims=True), np.finfo(float).tiny)
  return np.where(finite, error, np.inf)


def _worst(error, got, right, *, row="example"):
  """Describes the entry with the largest error."""
  at = np.unravel_index(np.argmax(error), error.shape)
  return f"worst at column {at[-1]}, {row} {at[-2]}: got {got[at]:.6g}, expected {right[at]:.6g}"


def _factor(got, right, allowed):
  """Returns the c for which `got` is `c * right` within `allowed`; None if there is none."""
  # Least squares; where the right gradient is zero, so is the factor.
  factor = np.dot(got, right) / (np.dot(right, right) or 1.0)
  return factor if np.abs(got - factor * right).max() <= allowed else None


def _differences(total, x, step):
  """Returns central differences `[N, C]`, and a bound on their rounding error."""

  def shifted(place_and_shift):
    """Evaluates the loss with one element moved."""
    place, shift = place_and_shift
    return total(jnp.ravel(x).at[place].add(shift).reshape(x.shape))

  places, shifts = np.tile(np.arange(x.size), 2), np.repeat([step, -step], x.size)
  # lax.map holds one of the 2 N C evaluations at a time.
  values = np.asarray(jax.jit(functools.partial(lax.map, shifted))((places, shifts)))
  above, below = np.split(values, 2)
  differences = (above - below).reshape(x.shape) / (2 * step)
  return differences, 16 * np.finfo(values.dtype).eps * np.abs(values).max() / step


def _values(settings, rng, examples):
  """Draws values `[examples, C]` at least `(high - low) / 2N` apart.

  No column's order is its own inverse.
  """
  shape = (examples, settings.shape[1])
  ascending = (np.arange(examples)[:, None] + rng.uniform(0.25, 0.75, shape)) / examples
  order = np.stack([_order(rng, examples) for _ in range(shape[1])], axis=1)
  scaled = np.take_along_axis(ascending, order, axis=0)
  return settings.low + (settings.high - settings.low) * scaled


def _order(rng, n):
  """Draws a random permutation that is not its own inverse."""
  while True:
    order = rng.permutation(n)
    # In an order that is its own inverse, sorting and un-sorting cannot be distinguished.
    if (order[order] != np.arange(n)).any():
      return order


def _check_arguments(loss, settings, saturated):
  """Raises a ValueError for an argument of `check_loss` that breaks its rule."""
  shape, low, high, devices, tolerance = settings
  if not callable(loss):
    raise TypeError(f"loss must be a function of [N, C] values; got {loss!r:.60}")
  whole = isinstance(shape, tuple) and [type(n) for n in shape] == [int, int]
  if not (whole and shape[0] >= 3 and shape[1] >= 1):
    raise ValueError(
      f"shape must be a tuple of whole numbers (N, C), N at least 3 and C at least 1; got {shape!r}"
    )
  if not (np.isfinite([low, high]).all() and low < high):
    raise ValueError(f"low must be below high, both finite; got low {low}, high {high}")
  if not len(saturated) or not np.all(np.abs(saturated) <= np.finfo(np.float32).max):
    raise ValueError(
      f"saturated must hold at least one number, all finite in float32; got {saturated}"
    )
  if devices is not None and not (isinstance(devices, int) and devices >= 2):
    raise ValueError(f"devices must be a whole number, at least 2, or None; got {devices!r}")
  if not 0 < tolerance < 1:
    raise ValueError(f"tolerance must be between 0 and 1; got {tolerance}")
  with jax.enable_x64(True):
    given = jax.ShapeDtypeStruct(shape, np.float64)
    result = jax.eval_shape(loss, given)
  # Checked in float64: a loss with a fixed dtype shows.
  if getattr(result, "shape", None) not in ((), shape[1:]) or result.dtype != given.dtype:
    raise ValueError(
      f"loss must return a scalar or [C] in the dtype of its values; got {result} for {given}"
    )
