"""The empirical CDF of a batch, and losses that pull it towards a prior's CDF.

Axes: N examples (the whole batch, over all devices), C independent features or gates.
Words: a value's place is its index in ascending order, from 0; its rank is one more. Its level is
where the empirical CDF has it: i / (N + 1) for rank i, and for ties the mean of their levels.
Reference: Bejnordi et al., 2020, section 3; Cramér (1928), von Mises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.checks import one_of
from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives, ranking
from gating_jax.ops.arguments import as_float
from gating_jax.ops.priors import Prior, check_prior
from gating_jax.types import AnyArray, Array, GateRecord

EXCHANGES = ("gather", "all_to_all")
# Least mean of a learned prior. Below it, a batch has hardly an example on one side, and Beta's
# parameters are out of range.
_LEAST_MEAN = 0.05


@former_positional("axis")
def empirical_cdf(x: AnyArray, *, axis: int = 0) -> Array:
  """Computes each value's level in its column: `rank / (N + 1)`, without a gradient.

  Tied values have their mean rank.

  Args:
    x: real values, any shape.
    axis: the axis over which values are ranked.
  Returns:
    float, in (0, 1), same shape, original order; NaN in a column that holds one.
  Raises:
    ValueError: `axis` is not an axis of `x`, there is no value along it, or `x` holds 2**31 values
      or more.
    TypeError: `x` is no array of real numbers.

  >>> empirical_cdf(jnp.array([0.7, 0.1, 0.4, 0.1]))
  Array([0.8, 0.3, 0.6, 0.3], dtype=float32)
  """
  x, axis = _batch(x, axis, "x")
  x = lax.stop_gradient(jnp.moveaxis(x, axis, 0))
  source, tied = ranking.argsort(x)
  first, last = ranking.tie_bounds(tied)
  rank = _mean_rank(first, last, x.dtype)
  level = ranking.unsort(rank / jnp.asarray(x.shape[0] + 1, x.dtype), source)
  return jnp.moveaxis(jnp.where(jnp.isnan(x).any(axis=0), jnp.nan, level), 0, axis)


def _mean_rank(first: Array, last: Array, dtype: np.dtype) -> Array:
  """Computes the mean of the ranks first + 1 .. last + 1 of each run of ties, in a real type."""
  # The sum of both places would exceed int32 beyond 2**30 values.
  return first.astype(dtype) + ((last - first).astype(dtype) / 2 + 1)


@ranking.reverse_mode_only
def batch_shaping_loss(
  logits: AnyArray | GateRecord,
  prior: Prior,
  *,
  axis: int = 0,
  axis_name: Hashable | None = None,
  weights: AnyArray | None = None,
  exchange: str = "gather",
) -> Array:
  """Computes the squared gap between each gate's empirical CDF and a prior's, from log-odds.

      loss = mean_i (F(p_(i)) - i / (N + 1))^2,   p = sigmoid(logits), p_(i) the i-th smallest

  With weights w, of sum W and of running sum W_(i) in that order,

      loss = sum_i w_(i) (F(p_(i)) - (W_(i) - w_(i) / 2 + 1 / 2) / (W + 1))^2 / W

  The gradient is finite for every finite logit. N i.i.d. samples of the prior itself have the
  expected loss `noise_floor(N)`.

  Args:
    logits: `[N, C]` gate log-odds, or any shape; columns along `axis` are independent gates. Of a
      record, its logits. The loss is computed in float32, or in float64 if they are; integers and
      truth values count as float32.
    prior: a `Prior` on [0, 1]; parameters that are arrays hold one entry per column.
    axis: the batch axis.
    axis_name: the mapped device axis, or axes, over which the batch is spread. The loss and its
      gradient are those of the whole batch, provided gradients are averaged over devices like those
      of the other terms.
    weights: `[N]`, or of `logits`' shape, non-negative; their sum counts as the number of examples.
      A mask of 0 and 1 leaves out rows, as if they were absent (NaN in them too); a whole number n
      has the gradient of n copies. The loss has no gradient in them, and is 0 where all are 0.
    exchange: how devices share the batch. `gather`: each device ranks all columns. `all_to_all`:
      each ranks its part of the columns; less work and traffic, one more collective.
  Returns:
    `[C]`, dimensionless: `logits`' shape without `axis`. Times N it is the sum form. NaN where the
    column holds a NaN, or a weight is negative.
  Raises:
    ValueError: the prior has no logit axis, its parameters or `weights` do not fit, `axis` is not
      an axis of `logits`, N is 0, the whole batch has 2**31 logits or more, or `exchange` is
      unknown.
    TypeError: an argument of another kind, such as a number for a prior; or forward-mode
      differentiation (`jax.jvp`, `jax.jacfwd`), for which there is no rule; reverse mode and
      `jax.hessian` work. Around a `jit` the message is JAX's own.

  >>> from gating_jax.ops.priors import beta
  >>> p = jnp.array([0.7, 0.1, 0.95, 0.4])
  >>> print(f"{4 * batch_shaping_loss(jnp.log(p / (1 - p)), beta(0.6, 0.4)):.5f}")
  0.01893

  Reference: Bejnordi et al., 2020, section 3.
  """
  check_prior("prior", prior)
  if prior.logit_cdf is None:
    raise ValueError(
      f"prior must have a logit axis, so its support must be [0, 1]; got {prior.name}; "
      "use cdf_matching_loss"
    )
  one_of("exchange", exchange, EXCHANGES)
  logits = arguments.of_record(logits, "logits")
  batch = _prepare("logits", logits, prior, cdf=prior.logit_cdf, axis=axis, weights=weights)
  return _loss_over_devices(batch, axis_name=axis_name, exchange=exchange)


@ranking.reverse_mode_only
def cdf_matching_loss(
  x: AnyArray,
  prior: Prior,
  *,
  axis: int = 0,
  axis_name: Hashable | None = None,
  weights: AnyArray | None = None,
  exchange: str = "gather",
) -> Array:
  """Computes `batch_shaping_loss` on the natural axis, for probabilities or any real feature.

      loss = mean_i (F(x_(i)) - i / (N + 1))^2

  For gates prefer `batch_shaping_loss`: a probability that has rounded to 0 or 1 has lost the
  logit's digits.

  Args:
    x: `[N, C]` probabilities or features, of N examples.
    prior, axis, axis_name, weights, exchange: as in `batch_shaping_loss`.
  Returns:
    As `batch_shaping_loss`.
  Raises:
    ValueError, TypeError: as `batch_shaping_loss`.

  >>> from gating_jax.ops.priors import normal, uniform
  >>> print(f"{4 * cdf_matching_loss(jnp.array([0.7, 0.1, 0.95, 0.4]), uniform()):.4f}")
  0.0425
  >>> x = jax.random.normal(jax.random.key(0), (256, 2))
  >>> losses = cdf_matching_loss(x, normal(jnp.array([0.0, 3.0]), 1.0))
  >>> print(f"{losses[0]:.2f} {losses[1]:.2f}")
  0.00 0.30
  """
  check_prior("prior", prior)
  one_of("exchange", exchange, EXCHANGES)
  batch = _prepare("x", x, prior, cdf=prior.cdf, axis=axis, weights=weights)
  return _loss_over_devices(batch, axis_name=axis_name, exchange=exchange)


def generalised_batch_shaping_loss(
  logits: AnyArray | GateRecord,
  mean_logits: AnyArray,
  prior: Callable[[Array], Prior],
  hyperprior: Prior,
  **options,
) -> tuple[Array, Array]:
  """Computes batch-shaping losses with one learned prior per gate, and a hyperprior of their means.

  Gates may differ in how often they are open, while all of them together follow the hyperprior:

      batch_shaping_loss(logits, prior(mean))  and  batch_shaping_loss(mean_logits, hyperprior),
      mean = sigmoid(mean_logits), kept within [0.05, 0.95]

  Args:
    logits: `[N, C]` gate log-odds, or a record.
    mean_logits: `[C]`, learned: the log-odds of each prior's mean.
    prior: means `[C]` -> `Prior`, such as `lambda mean: relaxed_bernoulli(mean, 0.4)`, or
      `symmetric_beta`.
    hyperprior: a `Prior` on [0, 1], of the means.
    **options: those of `batch_shaping_loss`, for the first term.
  Returns:
    the loss of each gate, `[C]`, and that of the means, a scalar; dimensionless, to be weighted and
    added.
  Raises:
    ValueError, TypeError: as `batch_shaping_loss`; or a `prior` that is no function.
  Reference: Havtorn et al., 2023 (MSViT), section 3.

  >>> from gating_jax.ops.priors import beta, symmetric_beta
  >>> gates, means = generalised_batch_shaping_loss(
  ...   jnp.zeros((8, 3)), jnp.zeros(3), symmetric_beta, beta(3, 7)
  ... )
  >>> print(gates.shape, means.shape)
  (3,) ()
  """
  arguments.real_array("mean_logits", mean_logits)
  arguments.function("prior", prior, "a function of means, such as symmetric_beta")
  check_prior("hyperprior", hyperprior)
  mean_logits = as_float(mean_logits)
  mean = jnp.clip(jax.nn.sigmoid(mean_logits), _LEAST_MEAN, 1 - _LEAST_MEAN)
  of_gates = batch_shaping_loss(logits, prior(mean), **options)
  return of_gates, batch_shaping_loss(mean_logits, hyperprior)


def noise_floor(n: int) -> float:
  """Computes the expected mean-form loss of n i.i.d. samples of the prior itself.

      1 / (6 (n + 1))

  Args:
    n: number of examples of the whole batch, at least 1.
  Returns:
    The loss, a number.
  Raises:
    ValueError, TypeError: n is no such number.

  >>> round(noise_floor(256), 6)
  0.000649
  """
  arguments.whole_number("n", n)
  return 1 / (6 * (n + 1))


class _Prepared(NamedTuple):
  """The examples of this device, as the loss reads them.

  Attributes:
    keys: `[N, C]`, by which examples are ranked; without a gradient.
    values: `[N, C]`, the prior's CDF at the keys.
    weights: `[N, C]`, or None where all are 1.
    columns: the shape of the loss, whose product is C.
  """

  keys: Array
  values: Array
  weights: Array | None
  columns: tuple[int, ...]


def _prepare(
  name: str, x: AnyArray, prior: Prior, *, cdf: Callable, axis: int, weights: AnyArray | None
) -> _Prepared:
  """Computes the prior's CDF at each value, checks all shapes, and moves the batch axis first."""
  x, axis = _batch(x, axis, name)
  # Ranking works on the first axis; weights may still have the original shape.
  original, x = x, jnp.moveaxis(x, axis, 0)
  if weights is not None:
    weights = collectives.whole_weights(weights, original, name=name, axis=axis)
    weights = jnp.moveaxis(weights, axis, 0)
    x = _fill(x, weights != 0)
  columns = x.shape[1:]
  if not _fits(prior.shape, columns):
    raise ValueError(
      f"prior's parameters must broadcast to {columns}, the shape of {name} without axis {axis}; "
      f"got {prior.shape} for {prior.name}"
    )
  # Levels belong to the whole batch, the prior's CDF to one example: each device computes it for
  # its own examples.
  values = cdf(x)
  if values.shape != x.shape:
    raise ValueError(
      f"prior's cdf must be elementwise; got {values.shape} from {x.shape}, with {prior.name}"
    )
  # A NaN stays one, whatever the CDF returns for it.
  values = jnp.where(jnp.isnan(x), jnp.nan, values.astype(x.dtype))
  # All axes but the first become one: each column is ranked on its own.
  keys, values, of_examples = jax.tree.map(
    lambda v: v.reshape(v.shape[0], -1), (lax.stop_gradient(x), values, weights)
  )
  return _Prepared(keys, values, of_examples, columns=columns)


def _loss_over_devices(batch: _Prepared, *, axis_name: Hashable | None, exchange: str) -> Array:
  """Computes the loss of the whole batch, of which this device has a part."""
  *arrays, columns = batch
  if axis_name is None:
    loss = _mean_square_gap(*arrays)
  elif exchange == "gather":
    # Every device ranks all columns of all examples.
    gathered = jax.tree.map(lambda v: collectives.gather_batch(v, axis_name), arrays)
    loss = _mean_square_gap(*gathered)
  else:
    # Every device ranks its part of the columns, for all examples.
    own_columns = jax.tree.map(lambda v: collectives.exchange_columns(v, axis_name), arrays)
    own_losses = _mean_square_gap(*own_columns)
    # The last columns may be padding, which made the parts equal.
    loss = collectives.gather_batch(own_losses, axis_name)[: math.prod(columns)]
  return loss.reshape(columns)


@jax.custom_vjp
def _mean_square_gap(keys, values, weights):
  """Computes the weighted mean over axis 0 of (value - level of its key)^2, `[N, C]` to `[C]`."""
  return _mean_square_gap_fwd(keys, values, weights)[0]


def _mean_square_gap_fwd(keys, values, weights):
  n = keys.shape[0]
  source, tied = ranking.argsort(keys)
  # In sorted order: the weights w_(i), those before them W_(i) - w_(i), and their sum W. In the
  # original order: each example's part of the mean.
  if weights is None:
    # Adds 0 times an array that varies over devices, since `shard_map` requires that this one does.
    before = jnp.arange(n, dtype=values.dtype)[:, None] + 0 * source.astype(values.dtype)
    in_order = jnp.ones_like(before)
    total = jnp.asarray(n, values.dtype)
    part = 1 / total
  else:
    in_order = ranking.take(weights, source)
    total = jnp.sum(weights, axis=0, keepdims=True)
    before = jnp.cumsum(in_order, axis=0) - in_order
    part = weights / jnp.where(total == 0, 1, total)
  # (W_(i) - w_(i) / 2 + 1 / 2) / (W + 1); with weights 1 it is i / (N + 1).
  level = (before + (in_order + 1) / 2) / (total + 1)
  # Ties are rare in logits, and the mean over them is skipped at run time where there are none.
  shared = lax.cond(
    jnp.any(tied), _level_of_run, lambda level, *_: level, level, tied, before, in_order, total
  )
  gap = values - ranking.unsort(shared, source)
  if weights is not None:
    # NaN in a row that is left out must not reach the sum as 0 * NaN.
    gap = jnp.where(weights == 0, 0, gap)
  # Over a run of ties the mean of (F - e_i)^2 is (F - mean e)^2 plus the variance of e.
  spread = in_order * (jnp.square(level) - jnp.square(shared)) / jnp.where(total == 0, 1, total)
  loss = jnp.sum(part * jnp.square(gap), axis=0) + jnp.sum(spread, axis=0)
  # The residual is dL/dF of the loss, which the backward pass scales.
  return loss, 2 * part * gap


def _level_of_run(level, tied, before, in_order, total):
  """Computes each place's mean level over its run of ties, from the weights before and in it."""
  first, last = ranking.tie_bounds(tied)
  start = jnp.take_along_axis(before, first, 0)
  end = jnp.take_along_axis(before + in_order, last, 0)
  # A place on its own keeps its level, which the mean of a run of one would round differently.
  return jnp.where(first == last, level, (start + (end - start + 1) / 2) / (total + 1))


# Place i, where the element s(i) went, has the level e_i. The levels are constants, and un-sorting
# them un-sorts the gradient: dL/dF_s(i) = 2/N (F_s(i) - e_i). Tied elements have the mean of their
# levels, hence equal gradients.
def _mean_square_gap_bwd(gradient, cotangent):
  return None, gradient * cotangent[None], None


_mean_square_gap.defvjp(_mean_square_gap_fwd, _mean_square_gap_bwd)


def _batch(x, axis, name):
  """Returns `x` as floating-point values, whole, and `axis` counted from the front."""
  arguments.real_array(name, x)
  x = collectives.whole_batch(as_float(x))
  axis = ranking.check_axis(x, axis)
  if x.shape[axis] == 0:
    raise ValueError(
      f"{name} must hold at least one example along axis {axis}; got shape {x.shape}"
    )
  return x, axis


def _fill(x, keep):
  """Replaces each value that is left out by the largest other value of its column.

  The prior's CDF is finite there, so a value that is left out gives no infinity and no NaN.
  """
  largest = jnp.max(jnp.where(keep, lax.stop_gradient(x), -jnp.inf), axis=0)
  return jnp.where(keep, x, jnp.where(keep.any(axis=0), largest, 0))


def _fits(shape, columns):
  try:
    return jnp.broadcast_shapes(shape, columns) == columns
  except ValueError:
    return False
