"""Prior distributions of features: `cdf` and `pdf` on the natural and on the logit axis.

On the logit axis z = logit(x) the density of Beta(a, b) is bounded, while on the natural axis it is
infinite at 0 and 1 for a, b < 1. The losses on gates therefore work in z throughout.

Parameters are numbers, or arrays with one entry per column of the batch (any shape that broadcasts
to one example's), constant or traced: a loss has gradients in them, so they can be learnt. A value
out of range raises a ValueError if it is known, and gives NaN if it is traced (Beta loses precision
outside its range before that).

Functions of a prior are methods of small values, or functions of a module, so that priors can be
pickled.
Axes: M samples.
References: Bejnordi et al., 2020, section 3 (Beta prior); Maddison et al., 2017 (relaxed
  Bernoulli).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr

from gating_jax.checks import shown
from gating_jax.ops import arguments, beta_cdf, collectives
from gating_jax.ops.arguments import aligned, as_float, real_array, within_reach
from gating_jax.types import Array

# Range of Beta's a and b. Below it, tails reach logits whose sigmoid underflows in float64.
_SMALLEST, _LARGEST = 0.05, 10_000
# Standard deviations beyond which Normal's CDF and slope are 0 or 1 in float64.
_FAR = 40.0

# Acts on an array or a number, elementwise.
Function = Callable[[Any], Array]
Parameter = float | Array


@dataclasses.dataclass(frozen=True)
class Prior:
  """A distribution on the real line or on [0, 1].

  Losses call its functions with the batch axis first. Two priors are equal only if they are one
  object: keep a prior that is a static argument of a jitted function. A prior can be copied. It can
  be pickled if its parameters are known and its functions are not local ones of your own.

  Attributes:
    name: shown in pictures and journals, such as `beta(0.6, 0.4)`.
    cdf: natural axis, x -> F(x), elementwise and differentiable; see `from_cdf` for one that is
      not.
    pdf: natural axis, x -> f(x), 0 outside the support. At 0 and 1, where it may be infinite, it
      has its value one rounding error inside.
    logit_cdf: z -> F(sigmoid(z)), differentiable. None where the support is not [0, 1].
    logit_pdf: z -> dF(sigmoid(z))/dz. None where the support is not [0, 1].
    shape: that of the parameters, `()` where one prior serves all columns.
  Raises:
    TypeError: a field that is no function where one belongs, or a shape that is no tuple.

  >>> prior = Prior("exponential", cdf=lambda x: -jnp.expm1(-x), pdf=lambda x: jnp.exp(-x))
  >>> print(f"{prior.cdf(jnp.array(1.0)):.4f}")
  0.6321
  """

  name: str
  cdf: Function
  pdf: Function
  logit_cdf: Function | None = None
  logit_pdf: Function | None = None
  shape: tuple[int, ...] = ()

  def __post_init__(self):
    arguments.instance("a prior's name", self.name, str, rule="a text")
    arguments.instance("a prior's shape", self.shape, tuple, rule="a tuple of whole numbers")
    _check_functions(self.cdf, self.pdf, self.logit_cdf, logit_pdf=self.logit_pdf)


def check_prior(name: str, value: object) -> None:
  """Raises a TypeError unless `value` is a `Prior`."""
  arguments.instance(name, value, Prior, rule="a Prior, such as beta(0.6, 0.4)")


def beta(a: float | Array, b: float | Array) -> Prior:
  """Returns Beta(a, b) on [0, 1], with a CDF that makes no host call.

      dF/dz = exp(a log sigmoid(z) + b log sigmoid(-z) - log B(a, b)),   z = logit(x)

  For numbers the CDF is a cubic Hermite table on a uniform logit axis, made once in float64, with
  the closed-form slope: |error| <= 1e-6 for every float32 logit. For arrays it is a quadrature,
  with gradients in a and b: for both in [0.05, 50], |error| <= 3e-6, and that of the gradients <=
  1e-4 of their value.

  Args:
    a, b: in [0.05, 10000].
  Raises:
    ValueError: a or b is not in that range.
    TypeError: a or b is no number.

  >>> prior = beta(0.6, 0.4)
  >>> print(f"{prior.cdf(jnp.array(0.5)):.4f} {prior.logit_pdf(jnp.array(0.0)):.4f}")
  0.3841 0.1514
  >>> print(jax.grad(lambda a: beta(a, 0.4).logit_cdf(0.0))(0.6).round(4))
  -0.4791
  """
  rule = f"in [{_SMALLEST}, {_LARGEST}]"
  a = arguments.parameter("beta's a", a, rule, holds=_in_beta_range)
  b = arguments.parameter("beta's b", b, rule, holds=_in_beta_range)
  # Known numbers have a table, which is faster; its cache also makes equal calls return one object.
  if isinstance(a, float) and isinstance(b, float):
    return _fixed_beta(a, b)
  return _prior("beta", _LearnableBeta(a, b), a, b)


def symmetric_beta(a: float | Array) -> Prior:
  """Returns Beta(a, 1 - a), of mean a; the nearer a is to 0 or 1, the more decided it is.

  Args:
    a: in [0.05, 0.95].
  Raises:
    ValueError: a is not in that range.
    TypeError: a is no number.

  >>> symmetric_beta(0.6).name
  'beta(0.6, 0.4)'
  """
  a = arguments.parameter(
    "symmetric_beta's a", a, "in [0.05, 0.95]", holds=lambda v: (v >= _SMALLEST) & (v <= 0.95)
  )
  return beta(a, 1 - a)


def relaxed_bernoulli(mean: float | Array, temperature: float | Array) -> Prior:
  """Returns the binary concrete distribution on [0, 1].

      F(x) = sigmoid(temperature * logit(x) - logit(mean))

  Args:
    mean: in (0, 1), the probability that x > 1/2. (The expectation tends to it as the temperature
      falls.)
    temperature: positive; below 1 the mass gathers at 0 and 1.
  Raises:
    ValueError: an argument out of range.
    TypeError: an argument that is no number.
  Reference: Maddison et al., 2017.

  >>> print(relaxed_bernoulli(0.3, 0.5).cdf(jnp.array(0.5)).round(4))
  0.7
  """
  mean = arguments.parameter(
    "relaxed_bernoulli's mean", mean, "in (0, 1)", holds=lambda v: (v > 0) & (v < 1)
  )
  temperature = arguments.parameter(
    "relaxed_bernoulli's temperature", temperature, "positive", holds=_is_positive
  )
  return _prior("relaxed_bernoulli", _RelaxedBernoulli(mean, temperature), mean, temperature)


def normal(mean: float | Array = 0.0, std: float | Array = 1.0) -> Prior:
  """Returns the Normal distribution on the real line; for features, or logits taken as features.

  Args:
    mean: its expectation.
    std: its standard deviation, positive.
  Raises:
    ValueError: an argument out of range.
    TypeError: an argument that is no number.

  >>> print(f"{normal(1.0, 2.0).cdf(jnp.array(3.0)):.4f}")
  0.8413
  """
  mean = arguments.parameter("normal's mean", mean, "finite", holds=np.isfinite)
  std = arguments.parameter("normal's std", std, "positive", holds=_is_positive)
  family = _Normal(mean, std)
  name, shape = _name("normal", mean, std), _shape("normal", mean, std)
  return Prior(name, family.cdf, family.pdf, shape=shape)


# Priors compare by identity, so return a single instance.
@functools.lru_cache(maxsize=1)
def uniform() -> Prior:
  """Returns the uniform distribution on [0, 1].

  >>> uniform().cdf(jnp.array([-1.0, 0.25, 2.0]))
  Array([0.  , 0.25, 1.  ], dtype=float32)
  """
  return Prior(
    name="uniform",
    cdf=_Sloped(_uniform_cdf, _uniform_pdf),
    pdf=_uniform_pdf,
    logit_cdf=_Sloped(_uniform_logit_cdf, _uniform_logit_pdf),
    logit_pdf=_uniform_logit_pdf,
  )


def empirical(samples: Array, *, axis_name: Hashable | None = None) -> Prior:
  """Returns the distribution of reference samples, or of another batch, as a prior.

      F(s_(j)) = j / (M + 1) at the j-th smallest of M samples,
      linear in between, exponential beyond both ends

  With it `cdf_matching_loss` is a two-sample criterion. The tails, of mass 1 / (M + 1) each, fall
  off over a quarter of the samples' range: values outside are drawn back, unless they lie tens of
  ranges away. Equal samples make a step, with their mean level at the step itself. Gradients reach
  the samples too, though not through the width of the tails. The symmetric two-sample Cramér-von
  Mises form of x and y is the mean of `cdf_matching_loss(x, empirical(y))` and
  `cdf_matching_loss(y, empirical(x))`.

  Args:
    samples: `[M]`, one reference for all columns, or `[M, ...]`, one for each; real values.
    axis_name: the mapped device axis, or axes, over which the samples are spread.
  Raises:
    ValueError: there is no sample, or 2**31 of them or more on all devices together.
    TypeError: samples that are no real numbers.
  Reference: Anderson, 1962 (the two-sample criterion).

  >>> print(empirical(jnp.array([3.0, 1.0, 2.0])).cdf(jnp.array([1.0, 1.5, 3.0])))
  [0.25  0.375 0.75 ]
  """
  real_array("samples", samples)
  samples = as_float(samples)
  if samples.ndim == 0 or samples.shape[0] == 0:
    raise ValueError(
      f"samples must hold at least one value along axis 0; got shape {samples.shape}"
    )
  samples = (
    collectives.whole_batch(samples)
    if axis_name is None
    else collectives.gather_batch(samples, axis_name)
  )
  within_reach("samples of a column over all devices", samples.shape[:1])
  # Sorted once here, not at every call of the CDF.
  family = _Empirical(jnp.sort(samples, axis=0))
  m, *columns = samples.shape
  return Prior(f"empirical({m} samples)", family.cdf, family.pdf, shape=tuple(columns))


def from_cdf(
  cdf: Function,
  pdf: Function,
  *,
  name: str = "custom",
  logit_cdf: Function | None = None,
  logit_pdf: Function | None = None,
  shape: tuple[int, ...] = (),
) -> Prior:
  """Returns a `Prior` from any elementwise pair of cdf and pdf.

  The gradient in x is the pdf; the cdf is never differentiated in x. If both are made from traced
  parameters, gradients reach these through the cdf, provided it is differentiable in them. (Second
  derivatives mixed between x and such a parameter are not available: build a `Prior` for these.)

  Args:
    cdf, pdf: on the natural axis.
    name: shown in pictures and journals.
    logit_cdf, logit_pdf: the same on the logit axis, if the support is [0, 1] and the prior is for
      gates.
    shape: that of the parameters, if they differ from column to column.
  Raises:
    TypeError: one of them is no function.
    ValueError: one of `logit_cdf` and `logit_pdf` is missing.

  >>> exponential = from_cdf(lambda x: 1 - jnp.exp(-x), lambda x: jnp.exp(-x), name="exponential")
  >>> print(jax.grad(exponential.cdf)(0.0))
  1.0
  """
  if (logit_cdf is None) != (logit_pdf is None):
    raise ValueError(
      f"logit_cdf and logit_pdf must come together; got {shown(logit_cdf)} and {shown(logit_pdf)}"
    )
  _check_functions(cdf, pdf, logit_cdf, logit_pdf=logit_pdf)
  # Plain functions have no slope rule yet, neither on the natural nor on the logit axis.
  logit_pair = None
  if logit_cdf is not None and logit_pdf is not None:
    logit_pair = _Pair(logit_cdf, logit_pdf)
  return Prior(name, _Pair(cdf, pdf), pdf, logit_cdf=logit_pair, logit_pdf=logit_pdf, shape=shape)


@functools.lru_cache(maxsize=64)
def _fixed_beta(a: float, b: float) -> Prior:
  return _prior("beta", _FixedBeta(a, b), a, b)


@functools.lru_cache(maxsize=64)
def _beta_table(a: float, b: float) -> Function:
  """Returns the CDF on the logit axis.

  It is cached here and not in the prior, where it would be pickled.
  """
  return beta_cdf.table(a, b, _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
  return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


@dataclasses.dataclass(frozen=True, eq=False)
class _OnUnitInterval(abc.ABC):
  """A distribution on [0, 1]."""

  @abc.abstractmethod
  def logit_cdf(self, z) -> Array:
    """Returns the CDF at sigmoid(z), of z's shape."""

  @abc.abstractmethod
  def logit_pdf(self, z) -> Array:
    """Returns the density of the logit at z, of z's shape."""

  @abc.abstractmethod
  def _density(self, inside) -> Array:
    """Returns the density on (0, 1)."""

  def cdf(self, x):
    """Computes x -> F(x).

    At 0 and 1 themselves, which have no logit, the slope is the pdf's.
    """
    inside = _inside_unit_interval(x)
    x = jnp.asarray(x, inside.dtype)
    value = self.logit_cdf(_logit(inside))
    x = jnp.broadcast_to(x, value.shape)
    # F is 0 or 1 there and beyond, with the pdf's slope in x only.
    edge = _with_tangent(jnp.where(x <= 0, 0.0, 1.0).astype(inside.dtype), self.pdf(x), x)
    return jnp.where((x <= 0) | (x >= 1), edge, value)

  def pdf(self, x):
    """Computes x -> f(x)."""
    density = self._density(_inside_unit_interval(x))
    x = jnp.broadcast_to(as_float(x), density.shape)
    return jnp.where((x < 0) | (x > 1), 0.0, density)


@dataclasses.dataclass(frozen=True, eq=False)
class _Beta(_OnUnitInterval):
  a: Parameter
  b: Parameter

  @abc.abstractmethod
  def _log_norm(self, a, b) -> Array | float:
    """Computes log B(a, b)."""

  def _density(self, inside):
    inside, p, q = aligned(inside, self.a, self.b)
    log_norm = self._log_norm(p, q)
    return jnp.exp((p - 1) * jnp.log(inside) + (q - 1) * jnp.log1p(-inside) - log_norm)


# For known numbers: a table.
class _FixedBeta(_Beta):
  a: float
  b: float

  def logit_cdf(self, z):
    """Returns the CDF at sigmoid(z), of z's shape."""
    # The slope is the closed form and not the table's, which is less exact.
    return _with_slope(_beta_table(self.a, self.b), self.logit_pdf, as_float(z))

  def logit_pdf(self, z):
    """Returns the density of the logit at z, of z's shape."""
    z = as_float(z)
    return jnp.exp(
      self.a * jax.nn.log_sigmoid(z)
      + self.b * jax.nn.log_sigmoid(-z)
      - self._log_norm(self.a, self.b)
    )

  def _log_norm(self, a, b):
    return _log_beta(a, b)


# For arrays: the quadrature.
class _LearnableBeta(_Beta):
  def logit_cdf(self, z):
    """Returns the CDF at sigmoid(z), of z's shape."""
    return beta_cdf.cdf(*self._arrays(z))

  def logit_pdf(self, z):
    """Returns the density of the logit at z, of z's shape."""
    return beta_cdf.density(*self._arrays(z))

  def _arrays(self, z):
    z, *parameters = aligned(as_float(z), self.a, self.b)
    return z, *(jnp.asarray(p, z.dtype) for p in parameters)

  def _log_norm(self, a, b):
    # At least one of them is an array, and a number takes its type.
    dtype = jnp.result_type(*(p for p in (a, b) if not isinstance(p, float)))
    return beta_cdf.log_beta(jnp.asarray(a, dtype), jnp.asarray(b, dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class _RelaxedBernoulli(_OnUnitInterval):
  mean: Parameter
  temperature: Parameter

  def logit_cdf(self, z):
    """Returns the CDF at sigmoid(z), of z's shape."""
    return jax.nn.sigmoid(self._argument(*aligned(as_float(z), self.mean, self.temperature)))

  def logit_pdf(self, z):
    """Returns the density of the logit at z, of z's shape."""
    z, m, t = aligned(as_float(z), self.mean, self.temperature)
    # d sigmoid(u) / dz = t sigmoid(u) sigmoid(-u).
    u = self._argument(z, m, t)
    return t * jax.nn.sigmoid(u) * jax.nn.sigmoid(-u)

  def _argument(self, z, m, t):
    # temperature * logit(x) - logit(mean) of the equation.
    return _positive(t) * z - (jnp.log(m) - jnp.log1p(-m))

  def _density(self, inside):
    # f(x) = dF/dz dz/dx, with dz/dx = 1 / (x (1 - x)).
    density = self.logit_pdf(_logit(inside))
    return density / jnp.broadcast_to(inside * (1 - inside), density.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class _Normal:
  mean: Parameter
  std: Parameter

  def cdf(self, x):
    """Computes x -> F(x)."""
    return ndtr(self._standardised(x)[0])

  def pdf(self, x):
    """Computes x -> f(x)."""
    u, std = self._standardised(x)
    return jnp.exp(-jnp.square(u) / 2) / (math.sqrt(2 * math.pi) * std)

  def _standardised(self, x):
    x, m, s = aligned(as_float(x), self.mean, self.std)
    positive = _positive(s)
    # Clipped, values far away, infinite ones too, give a slope of 0 and not NaN.
    return jnp.clip(x - m, -_FAR * positive, _FAR * positive) / positive, s


# Functions of the module and not lambdas, so that `uniform()` can be pickled.
def _uniform_cdf(x: Array) -> Array:
  return jnp.clip(x, 0, 1)


def _uniform_pdf(x: Array) -> Array:
  x = as_float(x)
  return jnp.where((x >= 0) & (x <= 1), 1.0, 0.0).astype(x.dtype)


def _uniform_logit_cdf(z: Array) -> Array:
  return jax.nn.sigmoid(z)


def _uniform_logit_pdf(z: Array) -> Array:
  z = as_float(z)
  return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


@dataclasses.dataclass(frozen=True, eq=False)
class _Empirical:
  """The distribution of sorted samples, `[M, ...]`.

  Unlike a closure, it can be pickled.
  """

  ordered: Array

  def cdf(self, x):
    """Computes x -> F(x)."""
    x = as_float(x)
    m, *columns = self.ordered.shape
    shape = jnp.broadcast_shapes(x.shape, tuple(columns))
    # Samples that serve all columns make a single one: the search runs over all values at once.
    by_column = jnp.broadcast_to(x, shape).reshape(-1, math.prod(columns))
    samples = self.ordered.astype(x.dtype).reshape(m, -1)
    return jax.vmap(_interpolated_level, in_axes=1, out_axes=1)(samples, by_column).reshape(shape)

  def pdf(self, x):
    """Computes x -> f(x)."""
    x = as_float(x)
    return jax.jvp(self.cdf, (x,), (jnp.ones_like(x),))[1]


def _interpolated_level(ordered: Array, x: Array) -> Array:
  """Computes the interpolated empirical CDF of sorted samples `[M]`, at x `[R]`."""
  m, tiny = ordered.shape[0], jnp.finfo(x.dtype).tiny
  if isinstance(m, int):
    upto = jnp.searchsorted(ordered, x, side="right")
    below = jnp.searchsorted(ordered, x, side="left")
  else:
    # M is not known yet, as in `jax.export`, and a search takes as many steps as M has bits.
    upto = jnp.sum(ordered[:, None] <= x[None], axis=0, dtype=jnp.int32)
    below = jnp.sum(ordered[:, None] < x[None], axis=0, dtype=jnp.int32)
  left, right = ordered[jnp.maximum(upto - 1, 0)], ordered[jnp.minimum(upto, m - 1)]
  inside = (upto > 0) & (upto < m)
  # Halved, the difference of two finite values does not overflow.
  above_left = jnp.where(inside, x / 2 - left / 2, 0)
  between = above_left / jnp.where(inside, jnp.maximum(right / 2 - left / 2, tiny), 1)
  # At a step of t equal samples, F is the mean of their levels: (t - 1) / 2 below the last one's.
  on_step = jnp.maximum(upto - below - 1, 0).astype(x.dtype) / 2
  # A quarter of the range, halved like the distances below.
  scale = lax.stop_gradient(jnp.maximum(ordered[-1] / 8 - ordered[0] / 8, tiny))

  def tail(distance):
    """Returns the mass beyond a point at half this distance outside, times M + 1."""
    return jnp.exp(-jnp.maximum(distance / scale, 0.0))

  lower = tail(ordered[0] / 2 - x / 2)
  inner = upto.astype(x.dtype) + between - on_step
  upper = m + 1 - tail(x / 2 - ordered[-1] / 2) - on_step
  level = jnp.where(upto == 0, lower, jnp.where(upto == m, upper, inner))
  # NaN sorts last, so the last sample shows whether there is one.
  return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, level / (m + 1))


@dataclasses.dataclass(frozen=True, eq=False)
class _Sloped:
  """A `function` of floating-point values with `slope` as its derivative.

  Neither may close over traced values.
  """

  function: Function
  slope: Function

  def __call__(self, x):
    return _with_slope(self.function, self.slope, as_float(x))


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
  """A `function` with `slope` as its derivative.

  Both may close over traced values, through which gradients flow too.
  """

  function: Function
  slope: Function

  def __call__(self, x):
    # The function is differentiated in what it closes over, but not in x.
    return _with_tangent(self.function(lax.stop_gradient(x)), self.slope(x), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_slope(function: Function, slope: Function, x: Array) -> Array:
  """Computes `function(x)`, whose derivative is `slope`.

  Neither may close over traced values.
  """
  return function(x)


@_with_slope.defjvp
def _with_slope_jvp(function, slope, primals, tangents):
  (x,), (tangent,) = primals, tangents
  return function(x), slope(x) * tangent


@jax.custom_jvp
def _with_tangent(value: Array, slope: Array, x: Array) -> Array:
  """Returns `value`, to whose derivative x contributes `slope`.

  That comes in addition to what `value` itself depends on.
  """
  return value


@_with_tangent.defjvp
def _with_tangent_jvp(primals, tangents):
  value, slope, _ = primals
  in_value, _, in_x = tangents
  # Two routes: through what `value` depends on, and through x.
  return value, in_value + slope * in_x


def _inside_unit_interval(x: Array) -> Array:
  """Moves 0 and 1 one rounding error inwards; NaN stays.

  At 0 and 1 logits and densities may be infinite.
  """
  x = as_float(x)
  limits = jnp.finfo(x.dtype)
  # As Python numbers, which take x's type.
  margin = float(limits.epsneg)
  return jnp.where(x <= 0, margin, jnp.clip(x, float(limits.tiny), 1 - margin))


def _logit(inside: Array) -> Array:
  # `log1p` keeps the digits that 1 - x would lose for small x.
  return jnp.log(inside) - jnp.log1p(-inside)


def _in_beta_range(value: np.ndarray) -> np.ndarray:
  return (value >= _SMALLEST) & (value <= _LARGEST)


def _is_positive(value: np.ndarray) -> np.ndarray:
  return (value > 0) & np.isfinite(value)


def _positive(parameter):
  """Returns a parameter, or NaN where it has been learnt out of range.

  A traced parameter cannot be checked in advance.
  """
  return jnp.where(parameter > 0, parameter, jnp.nan)


def _check_functions(cdf: object, pdf: object, logit_cdf: object, *, logit_pdf: object) -> None:
  for name, value in (("cdf", cdf), ("pdf", pdf)):
    arguments.function(name, value)
  for name, value in (("logit_cdf", logit_cdf), ("logit_pdf", logit_pdf)):
    if value is not None:
      arguments.function(name, value, "a function or None")


def _prior(prior: str, family: _OnUnitInterval, *parameters: Parameter) -> Prior:
  return Prior(
    name=_name(prior, *parameters),
    cdf=family.cdf,
    pdf=family.pdf,
    logit_cdf=family.logit_cdf,
    logit_pdf=family.logit_pdf,
    shape=_shape(prior, *parameters),
  )


def _name(prior: str, *parameters) -> str:
  shown_parameters = []
  for parameter in parameters:
    if isinstance(parameter, numbers.Real):
      shown_parameters.append(f"{parameter:g}")
    elif jnp.ndim(parameter):
      # Arrays are shown by their shape, since they may be traced.
      shown_parameters.append(str(list(jnp.shape(parameter))))
    else:
      shown_parameters.append("scalar")
  return f"{prior}({', '.join(shown_parameters)})"


def _shape(prior: str, *parameters) -> tuple[int, ...]:
  # Checked here, where the message can name the prior.
  shapes = [jnp.shape(p) for p in parameters]
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    raise ValueError(
      f"{prior}'s parameters must have shapes that broadcast together; got {shapes}"
    ) from None
