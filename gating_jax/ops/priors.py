"""Distributions a feature should follow: `cdf` and `pdf` on the natural and on the logit axis.

On the logit axis z = logit(x) the density of Beta(a, b) is bounded, while on the natural axis it is infinite at 0 and 1
for a, b < 1. The losses on gates therefore work in z throughout.

Parameters are numbers, or arrays with one entry per column of the batch (any shape that broadcasts to one example's),
constant or traced: a loss has gradients in them, so they can be learned. What is out of range raises a ValueError where
it is known, and makes NaN where it is traced (Beta loses precision outside its range before that).

Functions of a prior are methods of small values, or functions of a module, so that priors can be pickled.
References: Bejnordi et al., 2020, section 3 (Beta prior); Maddison et al., 2017 (relaxed Bernoulli).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr

from gating_jax.checks import shown
from gating_jax.ops import arguments, beta_cdf
from gating_jax.ops.arguments import aligned
from gating_jax.ops.precision import as_float
from gating_jax.types import Array

_SMALLEST, _LARGEST = (
  0.05,
  10_000,
)  # of Beta's a, b: below, tails reach logits whose sigmoid underflows in float64
_FAR = 40.0  # standard deviations, beyond which Normal's CDF and slope are 0 or 1 in float64

Function = Callable[[Array], Array]
Parameter = float | Array


@dataclasses.dataclass(frozen=True)
class Prior:
  """A distribution on the real line or on [0, 1]. Losses call its functions with the batch axis first.

  Two priors are equal if they are one object: keep it, where it is a static argument of a jitted function. A prior can
  be copied, and pickled where its parameters are known and its functions are not local ones of your own.

  Attributes:
    name: shown in pictures and journals, such as `beta(0.6, 0.4)`.
    cdf: natural axis, x -> F(x), elementwise and differentiable; see `from_cdf` for one that is not.
    pdf: natural axis, x -> f(x), 0 outside the support. At 0 and 1, where it may be infinite, its value a
      rounding error inside.
    logit_cdf: z -> F(sigmoid(z)), differentiable. None where the support is not [0, 1].
    logit_pdf: z -> dF(sigmoid(z))/dz. None where the support is not [0, 1].
    shape: that of the parameters, `()` where one prior serves all columns.
  Raises:
    TypeError: a field that is no function where one belongs, or a shape that is no tuple.
  """

  name: str
  cdf: Function
  pdf: Function
  logit_cdf: Function | None = None
  logit_pdf: Function | None = None
  shape: tuple[int, ...] = ()

  def __post_init__(self):
    arguments.instance("a prior's name", self.name, str, "a text")
    arguments.instance("a prior's shape", self.shape, tuple, "a tuple of whole numbers")
    _check_functions(self.cdf, self.pdf, self.logit_cdf, self.logit_pdf)


def check_prior(name: str, value: object) -> None:
  """Raises a TypeError unless `value` is a `Prior`."""
  arguments.instance(name, value, Prior, "a Prior, such as beta(0.6, 0.4)")


def beta(a: float | Array, b: float | Array) -> Prior:
  """Beta(a, b) on [0, 1], with a CDF that makes no host call.

      dF/dz = exp(a log sigmoid(z) + b log sigmoid(-z) - log B(a, b)),   z = logit(x)

  For numbers the CDF is a cubic Hermite table on a uniform logit axis, made once in float64, with the closed-form
  slope: |error| <= 1e-6 for every float32 logit. For arrays it is a quadrature, with gradients in a and b: for both in
  [0.05, 50], |error| <= 3e-6, and that of the gradients <= 1e-4 of their value.

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
  in_range = f"in [{_SMALLEST}, {_LARGEST}]", lambda v: (v >= _SMALLEST) & (v <= _LARGEST)
  a, b = (
    arguments.parameter("beta's a", a, *in_range),
    arguments.parameter("beta's b", b, *in_range),
  )
  if isinstance(a, float) and isinstance(b, float):
    return _fixed_beta(a, b)
  return _prior("beta", _LearnableBeta(a, b), a, b)


def symmetric_beta(a: float | Array) -> Prior:
  """Beta(a, 1 - a): of mean a, and the more decided the nearer a is to 0 or 1.

  Args:
    a: in [0.05, 0.95].
  Raises:
    ValueError: a is not in that range.
    TypeError: a is no number.

  >>> symmetric_beta(0.6).name
  'beta(0.6, 0.4)'
  """
  a = arguments.parameter(
    "symmetric_beta's a", a, "in [0.05, 0.95]", lambda v: (v >= _SMALLEST) & (v <= 0.95)
  )
  return beta(a, 1 - a)


def relaxed_bernoulli(mean: float | Array, temperature: float | Array) -> Prior:
  """The binary concrete distribution on [0, 1]: F(x) = sigmoid(temperature * logit(x) - logit(mean)).

  Args:
    mean: in (0, 1), the probability that x > 1/2. (The expectation tends to it as the temperature falls.)
    temperature: positive; below 1 the mass gathers at 0 and 1.
  Raises:
    ValueError: an argument out of range.
    TypeError: an argument that is no number.
  Reference: Maddison et al., 2017.

  >>> print(relaxed_bernoulli(0.3, 0.5).cdf(jnp.array(0.5)).round(4))
  0.7
  """
  mean = arguments.parameter(
    "relaxed_bernoulli's mean", mean, "in (0, 1)", lambda v: (v > 0) & (v < 1)
  )
  temperature = arguments.parameter(
    "relaxed_bernoulli's temperature", temperature, "positive", _is_positive
  )
  return _prior("relaxed_bernoulli", _RelaxedBernoulli(mean, temperature), mean, temperature)


def normal(mean: float | Array = 0.0, std: float | Array = 1.0) -> Prior:
  """The Normal distribution on the real line; for features, or for logits taken as features.

  Args:
    mean: its expectation.
    std: its standard deviation, positive.
  Raises:
    ValueError: an argument out of range.
    TypeError: an argument that is no number.

  >>> print(f"{normal(1.0, 2.0).cdf(jnp.array(3.0)):.4f}")
  0.8413
  """
  mean = arguments.parameter("normal's mean", mean, "finite", np.isfinite)
  std = arguments.parameter("normal's std", std, "positive", _is_positive)
  family = _Normal(mean, std)
  return Prior(
    _name("normal", mean, std), family.cdf, family.pdf, shape=_shape("normal", mean, std)
  )


@functools.lru_cache(maxsize=1)
def uniform() -> Prior:
  """The uniform distribution on [0, 1].

  >>> uniform().cdf(jnp.array([-1.0, 0.25, 2.0]))
  Array([0.  , 0.25, 1.  ], dtype=float32)
  """
  return Prior(
    "uniform",
    _Sloped(_uniform_cdf, _uniform_pdf),
    _uniform_pdf,
    _Sloped(_uniform_logit_cdf, _uniform_logit_pdf),
    _uniform_logit_pdf,
  )


def from_cdf(
  cdf: Function,
  pdf: Function,
  *,
  name: str = "custom",
  logit_cdf: Function | None = None,
  logit_pdf: Function | None = None,
  shape: tuple[int, ...] = (),
) -> Prior:
  """A `Prior` from any pair of cdf and pdf, elementwise: the gradient in x is the pdf, the cdf is never differentiated.

  Where both are made from traced parameters, gradients reach these through the cdf, if it is differentiable in them.
  (Second derivatives mixed between x and such a parameter are not available: build a `Prior` for these.)

  Args:
    cdf, pdf: on the natural axis.
    name: shown in pictures and journals.
    logit_cdf, logit_pdf: the same on the logit axis, if the support is [0, 1] and the prior is for gates.
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
  _check_functions(cdf, pdf, logit_cdf, logit_pdf)
  logit_pair = None if logit_cdf is None else _Pair(logit_cdf, logit_pdf)
  return Prior(name, _Pair(cdf, pdf), pdf, logit_pair, logit_pdf, shape)


@functools.lru_cache(maxsize=64)
def _fixed_beta(a: float, b: float) -> Prior:
  return _prior("beta", _FixedBeta(a, b), a, b)


@functools.lru_cache(maxsize=64)
def _beta_table(a: float, b: float) -> Function:
  """The CDF on the logit axis. Kept here and not in the prior, where it would be pickled."""
  return beta_cdf.table(a, b, _log_beta(a, b))


def _log_beta(a: float, b: float) -> float:
  return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


@dataclasses.dataclass(frozen=True, eq=False)
class _OnUnitInterval:
  """A distribution on [0, 1]: subclasses have `logit_cdf`, `logit_pdf` and `_density`, that on (0, 1)."""

  def cdf(self, x):
    """x -> F(x); at 0 and 1 themselves, which have no logit, the slope is the pdf's."""
    inside = _inside_unit_interval(x)
    x = jnp.asarray(x, inside.dtype)
    value = self.logit_cdf(_logit(inside))
    x = jnp.broadcast_to(x, value.shape)
    edge = _with_tangent(jnp.where(x <= 0, 0.0, 1.0).astype(inside.dtype), self.pdf(x), x)
    return jnp.where((x <= 0) | (x >= 1), edge, value)

  def pdf(self, x):
    """x -> f(x)."""
    density = self._density(_inside_unit_interval(x))
    x = jnp.broadcast_to(as_float(x), density.shape)
    return jnp.where((x < 0) | (x > 1), 0.0, density)


@dataclasses.dataclass(frozen=True, eq=False)
class _Beta(_OnUnitInterval):
  a: Parameter
  b: Parameter

  def _density(self, inside):
    inside, p, q = aligned(inside, self.a, self.b)
    log_norm = self._log_norm(p, q)
    return jnp.exp((p - 1) * jnp.log(inside) + (q - 1) * jnp.log1p(-inside) - log_norm)


class _FixedBeta(_Beta):
  def logit_cdf(self, z):
    return _with_slope(_beta_table(self.a, self.b), self.logit_pdf, as_float(z))

  def logit_pdf(self, z):
    z = as_float(z)
    return jnp.exp(
      self.a * jax.nn.log_sigmoid(z)
      + self.b * jax.nn.log_sigmoid(-z)
      - self._log_norm(self.a, self.b)
    )

  def _log_norm(self, a, b):
    return _log_beta(a, b)


class _LearnableBeta(_Beta):
  def logit_cdf(self, z):
    return beta_cdf.cdf(*self._arrays(z))

  def logit_pdf(self, z):
    return beta_cdf.density(*self._arrays(z))

  def _arrays(self, z):
    z, *parameters = aligned(as_float(z), self.a, self.b)
    return z, *(jnp.asarray(p, z.dtype) for p in parameters)

  def _log_norm(self, a, b):
    dtype = jnp.result_type(*(p for p in (a, b) if not isinstance(p, float)))
    return beta_cdf.log_beta(jnp.asarray(a, dtype), jnp.asarray(b, dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class _RelaxedBernoulli(_OnUnitInterval):
  mean: Parameter
  temperature: Parameter

  def logit_cdf(self, z):
    return jax.nn.sigmoid(self._argument(*aligned(as_float(z), self.mean, self.temperature)))

  def logit_pdf(self, z):
    z, m, t = aligned(as_float(z), self.mean, self.temperature)
    u = self._argument(z, m, t)
    return t * jax.nn.sigmoid(u) * jax.nn.sigmoid(-u)

  def _argument(self, z, m, t):
    return _positive(t) * z - (jnp.log(m) - jnp.log1p(-m))

  def _density(self, inside):
    density = self.logit_pdf(_logit(inside))
    return density / jnp.broadcast_to(inside * (1 - inside), density.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class _Normal:
  mean: Parameter
  std: Parameter

  def cdf(self, x):
    """x -> F(x)."""
    return ndtr(self._standardised(x)[0])

  def pdf(self, x):
    """x -> f(x)."""
    u, std = self._standardised(x)
    return jnp.exp(-jnp.square(u) / 2) / (math.sqrt(2 * math.pi) * std)

  def _standardised(self, x):
    x, m, s = aligned(as_float(x), self.mean, self.std)
    positive = _positive(s)
    return jnp.clip(x - m, -_FAR * positive, _FAR * positive) / positive, s


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
class _Sloped:
  """`function` of floating-point values, with `slope` as its derivative; neither may close over traced values."""

  function: Function
  slope: Function

  def __call__(self, x):
    return _with_slope(self.function, self.slope, as_float(x))


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
  """`function` with `slope` as its derivative; both may close over traced values, through which gradients go too."""

  function: Function
  slope: Function

  def __call__(self, x):
    return _with_tangent(self.function(lax.stop_gradient(x)), self.slope(x), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_slope(function: Function, slope: Function, x: Array) -> Array:
  """`function(x)`, whose derivative is `slope`; neither may close over traced values."""
  return function(x)


@_with_slope.defjvp
def _with_slope_jvp(function, slope, primals, tangents):
  (x,), (tangent,) = primals, tangents
  return function(x), slope(x) * tangent


@jax.custom_jvp
def _with_tangent(value: Array, slope: Array, x: Array) -> Array:
  """`value`, to which x contributes the derivative `slope` besides what `value` itself depends on."""
  return value


@_with_tangent.defjvp
def _with_tangent_jvp(primals, tangents):
  value, slope, _ = primals
  in_value, _, in_x = tangents
  return value, in_value + slope * in_x


def _inside_unit_interval(x: Array) -> Array:
  """Moves 0 and 1, where logits and densities may be infinite, one rounding error inwards; NaN stays."""
  x = as_float(x)
  limits = jnp.finfo(x.dtype)
  margin = float(limits.epsneg)
  return jnp.where(x <= 0, margin, jnp.clip(x, float(limits.tiny), 1 - margin))


def _logit(inside: Array) -> Array:
  return jnp.log(inside) - jnp.log1p(-inside)


def _is_positive(value: np.ndarray) -> np.ndarray:
  return (value > 0) & np.isfinite(value)


def _positive(parameter):
  """NaN where a traced parameter, which could not be checked, has been learned out of range."""
  return jnp.where(parameter > 0, parameter, jnp.nan)


def _check_functions(cdf: object, pdf: object, logit_cdf: object, logit_pdf: object) -> None:
  for name, value in (("cdf", cdf), ("pdf", pdf)):
    arguments.function(name, value)
  for name, value in (("logit_cdf", logit_cdf), ("logit_pdf", logit_pdf)):
    if value is not None:
      arguments.function(name, value, "a function or None")


def _prior(prior: str, family: _OnUnitInterval, *parameters: Parameter) -> Prior:
  return Prior(
    _name(prior, *parameters),
    family.cdf,
    family.pdf,
    family.logit_cdf,
    family.logit_pdf,
    _shape(prior, *parameters),
  )


def _name(prior: str, *parameters) -> str:
  show = lambda p: (
    f"{p:g}"
    if isinstance(p, numbers.Real)
    else str(list(jnp.shape(p)))
    if jnp.ndim(p)
    else "scalar"
  )
  return f"{prior}({', '.join(map(show, parameters))})"


def _shape(prior: str, *parameters) -> tuple[int, ...]:
  shapes = [jnp.shape(p) for p in parameters]
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    raise ValueError(
      f"{prior}'s parameters must have shapes that broadcast together; got {shapes}"
    ) from None
