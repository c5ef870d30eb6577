"""A check of batch losses, for tests of gradients.

It names the broken rule, the place, and the known slip behind it.

Axes: N examples, C columns, n devices. Independent of any loss in particular; `docs/derivations.md`
explains the slips.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

_AXIS = "check_loss_devices"
# Rounding error of terms that cancel, relative to the largest result or 1.
_ROUNDING = 1e-12
# The slips that reorder a column's gradient; `source` is the argsort of its values.
_ARRANGEMENTS = {
  "": lambda gradient, source: gradient,
  "un-sort forgotten": lambda gradient, source: gradient[source],
  "sort permutation used instead of its inverse": lambda gradient, source: gradient[source][source],
}
_THROUGH_RANKS = (
  "gradient through the ranks: it changes when other examples move in unchanged order, the true "
  "one does not"
)
_UNSEEN = (
  "unlike finite differences: gradient through the ranks by a surrogate with another value, or a "
  "wrong derivative"
)


class LossCheckError(AssertionError):
  """The error of a loss that breaks a rule of `check_loss`; its message has one line per fault."""


@dataclasses.dataclass(frozen=True)
class LossCheck:
  """Measured errors of a loss, as returned by `check_loss`.

  Attributes:
    errors: by rule, the worst relative error; for saturation, the fraction of the gradient that is
      not finite.
    skipped: the rules left out and why; empty if none.
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
    ValueError: an argument, or the loss's result, is not as described above.

  >>> check_loss(lambda x: jnp.mean(jnp.square(x), axis=0)).skipped
  'devices: the loss takes no keyword axis_name'
  """
  _check_arguments(loss, shape, low, high, saturated, devices, tolerance)
  total = lambda x, **axis: jnp.sum(loss(x, **axis))
  rng = np.random.default_rng(seed)
  with jax.enable_x64(True):
    outcomes = _check_one_device(total, rng, shape, low, high, devices, tolerance)
    if devices is None or "axis_name" not in inspect.signature(loss).parameters:
      skipped = (
        "devices: not requested"
        if devices is None
        else "devices: the loss takes no keyword axis_name"
      )
    else:
      parallel, skipped = _check_parallel(total, rng, shape, low, high, devices, tolerance)
      outcomes |= parallel
  with jax.enable_x64(False):
    outcomes["saturation"] = _check_saturation(total, shape, saturated)
  faults = dict.fromkeys(fault for _, found in outcomes.values() for fault in found)
  if faults:
    rules = lambda fault: ", ".join(rule for rule, (_, found) in outcomes.items() if fault in found)
    lines = [f"{rules(fault)}: {fault}" for fault in faults]
    raise LossCheckError("\n- ".join([f"the loss has {len(lines)} fault(s)", *lines]))
  return LossCheck({rule: error for rule, (error, _) in outcomes.items()}, skipped)


def _check_one_device(total, rng, shape, low, high, devices, tolerance):
  """Returns each rule's outcome: the worst relative error, and the faults in words."""
  x, y = (jnp.asarray(_values(rng, shape, low, high)) for _ in range(2))
  order = _order(rng, shape[0])
  plain = jax.value_and_grad(total)
  jitted = jax.jit(plain)
  here, there = jitted(x), jitted(y)
  stacked = [np.stack(pair) for pair in zip(here, there, strict=True)]
  # A mean in place of a sum, or the reverse, is off by one of these counts.
  counts = {name: n for name, n in zip(("N", "C", "devices"), (*shape, devices), strict=True) if n}
  factors = {f"mean where a sum was meant (1/{name})": 1 / n for name, n in counts.items()}
  factors |= {f"sum where a mean was meant ({name})": n for name, n in counts.items()}
  return {
    "gradient": _check_gradient(
      total, lambda x: jitted(x)[1], np.asarray(x), high - low, factors, tolerance
    ),
    "permutation": _compare(jitted(x[order]), (here[0], here[1][order]), tolerance),
    "jit": _compare(here, plain(x), tolerance),
    "vmap": _compare(jax.jit(jax.vmap(plain))(jnp.stack([x, y])), stacked, tolerance),
  }


def _check_gradient(total, gradient, x, span, factors, tolerance):
  got, (right, noise) = np.asarray(gradient(x)), _differences(total, x, 1e-6 * span)
  error = _relative_error(got, right, noise)
  wrong = np.flatnonzero(error.max(0) > tolerance)
  slips = {
    j: _name_slip(got[:, j], right[:, j], np.argsort(x[:, j]), noise, factors, tolerance)
    for j in wrong
  }
  if None in slips.values():
    moves = np.argsort(np.argsort(x, axis=0), axis=0) % 2 == 1
    # Moved by less than the smallest gap, 0.5 span / N: the ranks stay the same.
    moved = x - moves * 0.2 * span / len(x)
    # Examples that stay show a gradient through the ranks: it follows those that move, where the
    # true one does not.
    change = _relative_error(np.asarray(gradient(moved)), got)
    right_change = _relative_error(_differences(total, moved, 1e-6 * span)[0], right, 2 * noise)
    reacts, right_reacts = (
      np.where(moves, 0, a).max(0) > tolerance for a in (change, right_change)
    )
    slips = {
      j: slip or (_THROUGH_RANKS if reacts[j] and not right_reacts[j] else _UNSEEN)
      for j, slip in slips.items()
    }
  problems = []
  for slip in dict.fromkeys(slips.values()):
    columns = [int(j) for j in wrong if slips[j] == slip]
    among = np.where(np.isin(np.arange(x.shape[1]), columns), error, -1)
    problems.append(
      f"{slip}; in column(s) {', '.join(map(str, columns))}, {_worst(among, got, right)}"
    )
  return float(error.max()), problems


def _name_slip(got, right, source, noise, factors, tolerance):
  """Names the slip that turns the right gradient of a column into the loss's; None if unknown."""
  if not (np.isfinite(got).all() and np.isfinite(right).all()):
    return "not finite at ordinary values"
  allowed = tolerance * np.abs(got).max() + noise
  for slip, arrange in _ARRANGEMENTS.items():
    factor = _factor(got, arrange(right, source), allowed)
    if factor is not None:
      scale = (
        "" if slip and abs(factor - 1) <= tolerance else _name_factor(factor, factors, tolerance)
      )
      return " and ".join(filter(None, [slip, scale]))
  # The same values in another order: no known permutation, but still the right numbers.
  reordered = np.abs(np.sort(got) - np.sort(right)).max() <= allowed
  return "the right values in the wrong places" if reordered else None


def _name_factor(factor, known, tolerance):
  names = " or ".join(name for name, c in known.items() if abs(factor - c) <= tolerance * c)
  return f"{names}{': ' * bool(names)}constant factor {factor:.4g}"


def _check_parallel(total, rng, shape, low, high, n, tolerance):
  """Checks the term's part of the gradient of shared parameters, for each batch layout."""
  # Rounded up: each device needs as many examples.
  whole = -(-shape[0] // n) * n, shape[1]
  weights = np.zeros((5, shape[1]))
  batch = (
    _values(rng, whole, low, high),
    rng.normal(size=(whole[0], len(weights))),
    rng.uniform(low, high, whole),
  )

  def objective(weights, values, inputs, target, *, term=1.0, other=1.0, **axis):
    """Returns the scalar `term * loss + other * squared error`, of weights `[5, C]`."""
    x = values + inputs @ weights
    return term * total(x, **axis) + other * jnp.mean(jnp.square((x - target) / (high - low)))

  alone = lambda **scales: jax.jit(jax.value_and_grad(functools.partial(objective, **scales)))(
    weights, *batch
  )
  # The gradient is linear in the terms: subtracting the other one leaves that of the loss.
  right, beside = alone(other=0.0), alone(term=0.0)
  spread, skipped = _spread(functools.partial(objective, axis_name=_AXIS), weights, batch, n)
  factors = {"missing psum (1/devices)": 1 / n, "one psum too many (devices)": n}
  outcomes = {}
  for layout, result in spread.items():
    share = [np.subtract(*pair) for pair in zip(result, beside, strict=True)]
    error, problems = _compare(share, right, tolerance, "parameter")
    if problems:
      problems = [
        "; ".join([*_name_shares(share[1], np.asarray(right[1]), factors, tolerance), *problems])
      ]
    outcomes[f"{n} devices by {layout}"] = error, problems
  return outcomes, skipped


def _name_shares(got, right, known, tolerance):
  """Names the errors of the factor c in `gradient = other + c * term`, over all columns."""
  wrong = np.flatnonzero(_relative_error(got, right).max(0) > tolerance)
  factors = [_factor(got[:, j], right[:, j], tolerance * np.abs(got[:, j]).max()) for j in wrong]
  return dict.fromkeys(
    "not a multiple of the gradient on one device"
    if factor is None
    else f"{_name_factor(factor, known, tolerance)} next to another term"
    for factor in factors
  )


def _spread(objective, weights, batch, n):
  """Returns `(value, gradient)` of the mean over devices by layout, and the layout left out."""
  averaged = lambda *args: lax.pmean(jax.value_and_grad(objective)(*args), _AXIS)
  # With check_vma, JAX sums the gradient of a shared parameter over the devices.
  summed = jax.value_and_grad(lambda *args: lax.pmean(objective(*args), _AXIS))
  by_vmap = jax.jit(jax.vmap(averaged, (None, 0, 0, 0), axis_name=_AXIS))
  found = {"vmap": [a[0] for a in by_vmap(weights, *(a.reshape(n, -1, a.shape[1]) for a in batch))]}
  if len(jax.devices()) < n:
    return found, f"shard_map: there are fewer than {n} real devices"
  mesh, split = Mesh(np.array(jax.devices()[:n]), _AXIS), PartitionSpec(_AXIS)
  layout = dict(
    mesh=mesh, in_specs=(PartitionSpec(), split, split, split), out_specs=PartitionSpec()
  )
  found["shard_map"] = jax.jit(jax.shard_map(averaged, **layout, check_vma=False))(weights, *batch)
  try:
    found["shard_map with check_vma"] = jax.jit(jax.shard_map(summed, **layout))(weights, *batch)
  # check_vma refuses many correct losses that were not written for it.
  except (TypeError, ValueError) as error:
    return found, f"shard_map with check_vma: {str(error).splitlines()[0]}"
  return found, ""


def _check_saturation(total, shape, saturated):
  """Finds values and gradients that are not finite, in float32.

  One batch holds each saturated value alone; the last one holds all of them in turn.
  """
  # Rolled by column, so that the columns of an example saturate at different values.
  in_turn = np.stack([np.resize(np.roll(saturated, -j), shape[0]) for j in range(shape[1])], axis=1)
  batches = np.asarray([*(np.full(shape, value) for value in saturated), in_turn], np.float32)
  values, gradients = map(
    np.asarray, jax.jit(lambda x: lax.map(jax.value_and_grad(total), x))(batches)
  )
  bad = ~(np.isfinite(gradients) & np.isfinite(values)[:, None, None])
  if not bad.any():
    return 0.0, []
  kind = "NaN" if np.isnan(values).any() or np.isnan(gradients).any() else "infinity"
  where = [f"{v:g}" for v, wrong in zip(saturated, bad[:-1], strict=True) if wrong.any()] or [
    "all values in turn"
  ]
  k, i, j = np.argwhere(bad)[0]
  place = (
    f"column {j}, example {i}, x = {batches[k, i, j]:g}: value {values[k]:g}, gradient "
    f"{gradients[k, i, j]:g}"
  )
  return float(bad.mean()), [
    f"{kind} at saturation, in batches of {', '.join(where)}; first at {place}"
  ]


def _compare(got, right, tolerance, row="example"):
  """Compares pairs of value and gradient."""
  (value, gradient), (right_value, right_gradient) = (
    [np.asarray(a) for a in pair] for pair in (got, right)
  )
  error = _relative_error(gradient, right_gradient)
  value_error = _relative_error(value.reshape(1, -1), right_value.reshape(1, -1)).max()
  problems = [f"value {value}, expected {right_value}"] if value_error > tolerance else []
  if error.max() > tolerance:
    problems.append(f"gradient {_worst(error, gradient, right_gradient, row)}")
  return float(max(value_error, error.max())), problems


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


def _worst(error, got, right, row="example"):
  at = np.unravel_index(np.argmax(error), error.shape)
  return f"worst at column {at[-1]}, {row} {at[-2]}: got {got[at]:.6g}, expected {right[at]:.6g}"


def _factor(got, right, allowed):
  """Returns the c for which `got` is `c * right` within `allowed`; None if there is none."""
  # Least squares; where the right gradient is zero, so is the factor.
  factor = np.dot(got, right) / (np.dot(right, right) or 1.0)
  return factor if np.abs(got - factor * right).max() <= allowed else None


def _differences(total, x, step):
  """Returns central differences `[N, C]`, and a bound on their rounding error."""
  places, shifts = np.tile(np.arange(x.size), 2), np.repeat([step, -step], x.size)
  shifted = lambda args: total(jnp.ravel(x).at[args[0]].add(args[1]).reshape(x.shape))
  # lax.map holds one of the 2 N C evaluations at a time.
  values = np.asarray(jax.jit(lambda args: lax.map(shifted, args))((places, shifts)))
  differences = np.subtract(*np.split(values, 2)).reshape(x.shape) / (2 * step)
  return differences, 16 * np.finfo(values.dtype).eps * np.abs(values).max() / step


def _values(rng, shape, low, high):
  """Returns values at least `(high - low) / 2N` apart.

  No column's order is its own inverse.
  """
  ascending = (np.arange(shape[0])[:, None] + rng.uniform(0.25, 0.75, shape)) / shape[0]
  order = np.stack([_order(rng, shape[0]) for _ in range(shape[1])], axis=1)
  return low + (high - low) * np.take_along_axis(ascending, order, axis=0)


def _order(rng, n):
  """Returns a random permutation that is not its own inverse."""
  while True:
    order = rng.permutation(n)
    # In an order that is its own inverse, sorting and un-sorting cannot be told from each other.
    if (order[order] != np.arange(n)).any():
      return order


def _check_arguments(loss, shape, low, high, saturated, devices, tolerance):
  if not (
    isinstance(shape, tuple)
    and [type(n) for n in shape] == [int, int]
    and shape[0] >= 3
    and shape[1] >= 1
  ):
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
