"""Distributions a feature should follow: `cdf` and `pdf` on the natural and on the logit axis.

On the logit axis z = logit(x) the density of Beta(a, b) is bounded, while on the natural axis it is infinite at 0 and 1
for a, b < 1. The losses on gates therefore work in z throughout.

Parameters are numbers, or arrays with one entry per column of the batch (any shape that broadcasts to one example's),
constant or traced: a loss has gradients in them, so they can be learned. What is out of range raises a ValueError where
it is known, and makes NaN where it is traced (Beta loses precision outside its range before that).
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

from gating_jax.ops import beta_cdf
from gating_jax.ops.precision import as_float
from gating_jax.types import Array

_SMALLEST, _LARGEST = 0.05, 10_000  # of Beta's a, b: below, tails reach logits whose sigmoid underflows in float64
_FAR = 40.0  # standard deviations, beyond which Normal's CDF and slope are 0 or 1 in float64

Function = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Prior:
  """A distribution on the real line or on [0, 1]. Losses call its functions with the batch axis first.

  Two priors are equal if they are one object: keep it, where it is a static argument of a jitted function.

  Attributes:
    name: shown in pictures and journals, such as `beta(0.6, 0.4)`.
    cdf: natural axis, x -> F(x), elementwise and differentiable; see `from_cdf` for one that is not.
    pdf: natural axis, x -> f(x), 0 outside the support. At 0 and 1, where it may be infinite, its value a
      rounding error inside.
    logit_cdf: z -> F(sigmoid(z)), differentiable. None where the support is not [0, 1].
    logit_pdf: z -> dF(sigmoid(z))/dz. None where the support is not [0, 1].
    shape: that of the parameters, `()` where one prior serves all columns.
  """

  name: str
  cdf: Function
  pdf: Function
  logit_cdf: Function | None = None
  logit_pdf: Function | None = None
  shape: tuple[int, ...] = ()


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

  >>> prior = beta(0.6, 0.4)
  >>> print(f"{prior.cdf(jnp.array(0.5)):.4f} {prior.logit_pdf(jnp.array(0.0)):.4f}")
  0.3841 0.1514
  >>> print(jax.grad(lambda a: beta(a, 0.4).logit_cdf(0.0))(0.6).round(4))
  -0.4791
  """
  in_range = f"in [{_SMALLEST}, {_LARGEST}]", lambda v: (v >= _SMALLEST) & (v <= _LARGEST)
  a, b = _checked("beta", "a", a, *in_range), _checked("beta", "b", b, *in_range)
  if isinstance(a, numbers.Real) and isinstance(b, numbers.Real):
    return _fixed_beta(float(a), float(b))
  return _learnable_beta(a, b)


def symmetric_beta(a: float | Array) -> Prior:
  """Beta(a, 1 - a): of mean a, and the more decided the nearer a is to 0 or 1.

  Args:
    a: in [0.05, 0.95].
  Raises:
    ValueError: a is not in that range.

  >>> symmetric_beta(0.6).name
  'beta(0.6, 0.4)'
  """
  a = _checked("symmetric_beta", "a", a, "in [0.05, 0.95]", lambda v: (v >= _SMALLEST) & (v <= 0.95))
  return beta(a, 1 - a)


def relaxed_bernoulli(mean: float | Array, temperature: float | Array) -> Prior:
  """The binary concrete distribution on [0, 1]: F(x) = sigmoid(temperature * logit(x) - logit(mean)).

  Args:
    mean: in (0, 1), the probability that x > 1/2. (The expectation tends to it as the temperature falls.)
    temperature: positive; below 1 the mass gathers at 0 and 1.
  Raises:
    ValueError: an argument out of range.
  Reference: Maddison et al., 2017.

  >>> print(relaxed_bernoulli(0.3, 0.5).cdf(jnp.array(0.5)).round(4))
  0.7
  """
  mean = _checked("relaxed_bernoulli", "mean", mean, "in (0, 1)", lambda v: (v > 0) & (v < 1))
  temperature = _checked("relaxed_bernoulli", "temperature", temperature, "positive", lambda v: v > 0)

  def argument(z):
    m, t = _cast(z.dtype, mean, temperature)
    return _positive(t) * z - (jnp.log(m) - jnp.log1p(-m))

  def logit_cdf(z):
    return jax.nn.sigmoid(argument(as_float(z)))

  def logit_pdf(z):
    u = argument(as_float(z))
    return _cast(u.dtype, temperature)[0] * jax.nn.sigmoid(u) * jax.nn.sigmoid(-u)

  def pdf(x):
    inside = _inside_unit_interval(x)
    density = logit_pdf(jnp.log(inside) - jnp.log1p(-inside)) / (inside * (1 - inside))
    return jnp.where((x < 0) | (x > 1), 0.0, density)

  return Prior(_name("relaxed_bernoulli", mean, temperature), _on_unit_interval(logit_cdf, pdf), pdf,
               logit_cdf, logit_pdf, _shape("relaxed_bernoulli", mean, temperature))


def normal(mean: float | Array = 0.0, std: float | Array = 1.0) -> Prior:
  """The Normal distribution on the real line; for features, or for logits taken as features.

  Args:
    mean: its expectation.
    std: its standard deviation, positive.
  Raises:
    ValueError: an argument out of range.

  >>> print(f"{normal(1.0, 2.0).cdf(jnp.array(3.0)):.4f}")
  0.8413
  """
  mean = _checked("normal", "mean", mean, "finite", np.isfinite)
  std = _checked("normal", "std", std, "positive", lambda v: v > 0)

  def standardise(x):
    x = as_float(x)
    m, s = _cast(x.dtype, mean, std)
    s = _positive(s)
    return jnp.clip(x - m, -_FAR * s, _FAR * s) / s

  def pdf(x):
    u = standardise(x)
    return jnp.exp(-jnp.square(u) / 2) / (math.sqrt(2 * math.pi) * _cast(u.dtype, std)[0])

  return Prior(_name("normal", mean, std), lambda x: ndtr(standardise(x)), pdf, shape=_shape("normal", mean, std))


@functools.lru_cache(maxsize=1)
def uniform() -> Prior:
  """The uniform distribution on [0, 1].

  >>> uniform().cdf(jnp.array([-1.0, 0.25, 2.0]))
  Array([0.  , 0.25, 1.  ], dtype=float32)
  """
  def pdf(x):
    return jnp.where((x >= 0) & (x <= 1), 1.0, 0.0).astype(jnp.result_type(x, jnp.bfloat16))

  def logit_pdf(z):
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

  cdf = _with_slope(lambda x: jnp.clip(x, 0, 1), pdf)
  return Prior("uniform", cdf, pdf, _with_slope(jax.nn.sigmoid, logit_pdf), logit_pdf)


def from_cdf(
    cdf: Function, pdf: Function, *, name: str = "custom", logit_cdf: Function | None = None,
    logit_pdf: Function | None = None, shape: tuple[int, ...] = (),
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
    ValueError: one of `logit_cdf` and `logit_pdf` is missing.

  >>> exponential = from_cdf(lambda x: 1 - jnp.exp(-x), lambda x: jnp.exp(-x), name="exponential")
  >>> print(jax.grad(exponential.cdf)(0.0))
  1.0
  """
  if (logit_cdf is None) != (logit_pdf is None):
    raise ValueError(f"logit_cdf and logit_pdf must come together; got {logit_cdf} and {logit_pdf}")
  pair = lambda f, slope: lambda x: _with_tangent(f(lax.stop_gradient(x)), slope(x), x)
  return Prior(name, pair(cdf, pdf), pdf, logit_cdf and pair(logit_cdf, logit_pdf), logit_pdf, shape)


@functools.lru_cache(maxsize=64)
def _fixed_beta(a: float, b: float) -> Prior:
  log_norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
  table = beta_cdf.table(a, b, log_norm)
  slope = lambda z: jnp.exp(a * jax.nn.log_sigmoid(z) + b * jax.nn.log_sigmoid(-z) - log_norm)
  return _beta_prior(a, b, _with_slope(table, slope), slope, lambda dtype: log_norm)


def _learnable_beta(a, b) -> Prior:
  on_logits = lambda function: lambda z: function(as_float(z), *_cast(as_float(z).dtype, a, b))
  log_norm = lambda dtype: beta_cdf.log_beta(*_cast(dtype, a, b))
  return _beta_prior(a, b, on_logits(beta_cdf.cdf), on_logits(beta_cdf.density), log_norm)


def _beta_prior(a, b, logit_cdf, logit_pdf, log_norm) -> Prior:
  def pdf(x):
    inside = _inside_unit_interval(x)
    p, q = _cast(inside.dtype, a, b)
    density = jnp.exp((p - 1) * jnp.log(inside) + (q - 1) * jnp.log1p(-inside) - log_norm(inside.dtype))
    return jnp.where((x < 0) | (x > 1), 0.0, density)

  return Prior(_name("beta", a, b), _on_unit_interval(logit_cdf, pdf), pdf, logit_cdf, logit_pdf, _shape("beta", a, b))


def _on_unit_interval(logit_cdf: Function, pdf: Function) -> Function:
  """x -> F(x); at 0 and 1 themselves, which have no logit, the slope is the pdf's."""
  def cdf(x):
    inside = _inside_unit_interval(x)
    edge = _with_tangent(jnp.where(x <= 0, 0.0, 1.0).astype(inside.dtype), pdf(x), jnp.asarray(x, inside.dtype))
    return jnp.where((x <= 0) | (x >= 1), edge, logit_cdf(jnp.log(inside) - jnp.log1p(-inside)))

  return cdf


def _with_slope(function: Function, slope: Function) -> Function:
  """`function` with `slope` as its derivative; neither may close over traced values."""
  wrapped = jax.custom_jvp(function)
  wrapped.defjvps(lambda tangent, _, x: slope(x) * tangent)
  return wrapped


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
  margin = jnp.finfo(x.dtype).epsneg
  return jnp.where(x <= 0, margin, jnp.clip(x, jnp.finfo(x.dtype).tiny, 1 - margin))


def _cast(dtype, *parameters) -> list:
  """Arrays in x's type; numbers as they are, since they take part in any."""
  return [p if isinstance(p, numbers.Real) else jnp.asarray(p, dtype) for p in parameters]


def _checked(prior: str, name: str, value, rule: str, holds: Callable[[np.ndarray], np.ndarray]):
  """`value` as a number or an array; ValueError where it is known and breaks the rule."""
  if isinstance(value, jax.core.Tracer):
    return value
  try:
    known = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    known = np.nan
  if not np.all(holds(known)):
    raise ValueError(f"{prior}'s {name} must be {rule}; got {value!r}")
  return value if isinstance(value, numbers.Real) else jnp.asarray(value)


def _positive(parameter):
  """NaN where a traced parameter, which could not be checked, has been learned out of range."""
  return jnp.where(parameter > 0, parameter, jnp.nan)


def _name(prior: str, *parameters) -> str:
  show = lambda p: f"{p:g}" if isinstance(p, numbers.Real) else str(list(jnp.shape(p))) if jnp.ndim(p) else "scalar"
  return f"{prior}({', '.join(map(show, parameters))})"


def _shape(prior: str, *parameters) -> tuple[int, ...]:
  shapes = [jnp.shape(p) for p in parameters]
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    raise ValueError(f"{prior}'s parameters must have shapes that broadcast together; got {shapes}") from None
