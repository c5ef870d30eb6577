import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special, stats

from gating_jax.ops.priors import beta, uniform

SHAPES = [
  (0.6, 0.4),
  (0.5, 0.5),
  (2, 6),
  (1, 1),
  (0.05, 50),
  (50, 0.05),
  (50, 50),
  (0.05, 0.05),
  (3.7, 0.2),
]


def wide_grid():
  """float32 logits: dense in [-40, 40], powers of ten up to 1e4 on both sides."""
  rng = np.random.default_rng(0)
  dense = np.concatenate(
    [np.linspace(-40, 40, 20_001), rng.uniform(-40, 40, 20_000), rng.normal(0, 1, 10_000)]
  )
  powers = 10.0 ** np.linspace(-10, 4, 400)
  return np.sort(np.concatenate([dense, powers, -powers, [0.0]])).astype(np.float32)


def true_cdf(a, b, z):
  """Computes I_{sigmoid(z)}(a, b) in float64, by the tail that keeps its digits."""
  z = np.asarray(z, np.float64)
  return np.where(
    z <= 0, special.betainc(a, b, special.expit(z)), 1 - special.betainc(b, a, special.expit(-z))
  )


def true_slope(a, b, z):
  z = np.asarray(z, np.float64)
  return np.exp(a * special.log_expit(z) + b * special.log_expit(-z) - special.betaln(a, b))


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_the_beta_cdf_is_right_to_1e_6_for_every_float32_logit(a, b):
  z = wide_grid()
  got = np.asarray(jax.jit(beta(a, b).logit_cdf)(z), np.float64)
  np.testing.assert_allclose(got, true_cdf(a, b, z), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.4), (0.05, 50), (50, 50)])
def test_the_beta_cdf_agrees_with_forty_digit_arithmetic(a, b):
  z = np.array([-1e4, -300, -90, -20, -3, -0.3, 0, 0.01, 1, 7, 17, 60, 110, 1e4], np.float32)
  with mpmath.workdps(40):
    exact = [
      float(mpmath.betainc(a, b, 0, 1 / (1 + mpmath.exp(-mpmath.mpf(float(v)))), regularized=True))
      for v in z
    ]
  np.testing.assert_allclose(
    np.asarray(jax.jit(beta(a, b).logit_cdf)(z), np.float64), exact, rtol=0, atol=1e-6
  )


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_the_logit_density_is_the_closed_form(a, b):
  z = wide_grid()
  got = np.asarray(jax.jit(beta(a, b).logit_pdf)(z), np.float64)
  np.testing.assert_allclose(got, true_slope(a, b, z), rtol=5e-5, atol=1e-7)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.4), (2, 6)])
def test_the_lower_tail_keeps_its_relative_precision(a, b):
  z = -np.linspace(5, 60 / a, 500).astype(np.float32)
  exact = true_cdf(a, b, z)
  assert exact.min() < 1e-20
  np.testing.assert_allclose(jax.jit(beta(a, b).logit_cdf)(z), exact, rtol=1e-4, atol=1e-9)
  beyond = exact < 1e-10
  np.testing.assert_allclose(jax.jit(beta(a, b).logit_cdf)(z[beyond]), exact[beyond], rtol=1e-4)


def test_the_logit_density_of_beta_06_04_peaks_at_the_mean():
  density = beta(0.6, 0.4).logit_pdf
  peak = np.log(0.6 / 0.4)
  np.testing.assert_allclose(density(jnp.array(peak)), 0.1544, atol=5e-5)
  z = jnp.linspace(-5, 5, 1001)
  assert abs(float(z[jnp.argmax(density(z))]) - peak) < 0.02


@pytest.mark.parametrize(
  "prior", [beta(0.6, 0.4), beta(0.05, 50), beta(50, 50), uniform()], ids=lambda p: p.name
)
def test_the_gradient_of_the_cdf_is_the_density_on_either_axis(prior):
  z = jnp.asarray(wide_grid()[::37])
  slope = jax.jit(jax.vmap(jax.grad(prior.logit_cdf)))(z)
  assert float(jnp.max(slope)) > 0.04
  np.testing.assert_allclose(slope, prior.logit_pdf(z), rtol=5e-5)
  x = jnp.linspace(0.001, 0.999, 201)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(jax.grad(prior.cdf)))(x), prior.pdf(x), rtol=5e-5, atol=1e-37
  )


def test_probability_and_logit_share_a_cdf_and_obey_the_chain_rule():
  prior = beta(0.6, 0.4)
  p = np.linspace(0.01, 0.99, 99)
  z = special.logit(p)
  np.testing.assert_allclose(
    prior.cdf(jnp.asarray(p, jnp.float32)), prior.logit_cdf(jnp.asarray(z, jnp.float32)), atol=1e-6
  )
  np.testing.assert_allclose(
    np.asarray(prior.pdf(jnp.asarray(p, jnp.float32))) * p * (1 - p),
    prior.logit_pdf(jnp.asarray(z, jnp.float32)),
    rtol=1e-5,
  )


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_the_natural_axis_agrees_with_scipy(a, b):
  x = np.unique(
    np.concatenate(
      [np.linspace(0, 1, 2001), 10.0 ** np.linspace(-30, -1, 200), 1 - 2.0 ** -np.arange(2, 25)]
    ).astype(np.float32)
  )
  prior = beta(a, b)
  np.testing.assert_allclose(
    np.asarray(jax.jit(prior.cdf)(x), np.float64),
    special.betainc(a, b, x.astype(np.float64)),
    rtol=0,
    atol=2e-6,
  )
  inside = x[(x > 0) & (x < 1)].astype(np.float64)
  np.testing.assert_allclose(
    np.asarray(jax.jit(prior.pdf)(inside.astype(np.float32)), np.float64),
    stats.beta.pdf(inside, a, b),
    rtol=1e-4,
    atol=1e-30,
  )


def test_float64_is_kept_and_finer_than_float32(x64):
  z = np.random.default_rng(0).uniform(-20, 20, 1000)
  prior = beta(0.6, 0.4)
  got = prior.logit_cdf(jnp.asarray(z))
  assert got.dtype == jnp.float64
  np.testing.assert_allclose(got, true_cdf(0.6, 0.4, z), rtol=0, atol=3e-8)
  np.testing.assert_allclose(prior.logit_pdf(jnp.asarray(z)), true_slope(0.6, 0.4, z), rtol=1e-12)


@pytest.mark.parametrize(
  "prior", [beta(*shape) for shape in SHAPES] + [uniform()], ids=lambda p: p.name
)
def test_the_cdf_is_monotone_from_zero_to_one(prior):
  z = wide_grid()
  value = np.asarray(jax.jit(prior.logit_cdf)(z), np.float64)
  assert np.diff(value).min() >= -np.finfo(np.float32).eps
  assert value.min() >= -1e-9
  assert value.max() <= 1 + np.finfo(np.float32).eps
  np.testing.assert_allclose(value[[0, -1]], [0, 1], atol=1e-7)
  np.testing.assert_array_equal(prior.cdf(jnp.array([-0.5, 0.0, 1.0, 1.5])), [0, 0, 1, 1])


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), beta(0.05, 50), uniform()], ids=lambda p: p.name)
def test_value_and_slope_are_finite_at_the_ends(prior):
  for function, ends in (
    (prior.cdf, [0.0, 1.0]),
    (prior.pdf, [0.0, 1.0]),
    (prior.logit_cdf, [-1e4, 1e4, -110.0, 110.0]),
    (prior.logit_pdf, [-1e4, 1e4]),
  ):
    value, pullback = jax.vjp(jax.jit(function), jnp.array(ends))
    assert np.isfinite(value).all()
    if function in (prior.cdf, prior.logit_cdf):
      assert np.isfinite(pullback(jnp.ones(len(ends)))[0]).all()


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), uniform()], ids=lambda p: p.name)
def test_nan_stays_nan(prior):
  for function in (prior.cdf, prior.logit_cdf, prior.logit_pdf):
    np.testing.assert_array_equal(
      np.isnan(jax.jit(function)(jnp.array([0.3, jnp.nan, 0.6]))), [False, True, False]
    )


def test_the_uniform_prior_by_hand():
  prior = uniform()
  x = jnp.array([-1.0, 0.0, 0.25, 1.0, 2.0])
  np.testing.assert_array_equal(prior.cdf(x), [0, 0, 0.25, 1, 1])
  np.testing.assert_array_equal(prior.pdf(x), [0, 1, 1, 1, 0])
  z = jnp.log(jnp.array([1 / 3, 1.0, 3.0]))
  np.testing.assert_allclose(prior.logit_cdf(z), [0.25, 0.5, 0.75], rtol=1e-6)
  np.testing.assert_allclose(prior.logit_pdf(z), [0.1875, 0.25, 0.1875], rtol=1e-6)


def test_beta_1_1_is_the_uniform_prior():
  z = jnp.linspace(-30, 30, 301)
  np.testing.assert_allclose(beta(1, 1).logit_cdf(z), uniform().logit_cdf(z), atol=1e-6)
  assert float(jnp.abs(beta(1, 1.1).logit_cdf(z) - uniform().logit_cdf(z)).max()) > 1e-2


def calls_the_host(function, *args):
  lowered = jax.jit(function).lower(*args).as_text()
  return "callback" in str(jax.make_jaxpr(function)(*args)) or "callback" in lowered


def test_the_beta_prior_compiles_without_calling_the_host():
  z = jnp.linspace(-3, 3, 5)
  scipy_cdf = lambda v: special.betainc(0.6, 0.4, special.expit(v)).astype(v.dtype)
  assert calls_the_host(lambda z: jax.pure_callback(scipy_cdf, z, z), z)
  prior = beta(0.6, 0.4)
  for function in (prior.cdf, prior.pdf, prior.logit_cdf, prior.logit_pdf):
    assert not calls_the_host(function, z)
    if function in (prior.cdf, prior.logit_cdf):
      assert not calls_the_host(lambda z, f=function: jax.vjp(f, z)[1](z), z)


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), uniform()], ids=lambda p: p.name)
def test_jit_and_vmap_agree(prior):
  for function in (prior.cdf, prior.pdf, prior.logit_cdf, prior.logit_pdf):
    x = jnp.linspace(0.05, 0.95, 6).reshape(2, 3)
    np.testing.assert_allclose(
      jax.jit(jax.vmap(function))(x), np.stack([function(row) for row in x]), rtol=1e-6
    )


def test_forward_mode_agrees_with_reverse_mode():
  z = jnp.array([-2.0, 0.5])
  prior = beta(0.6, 0.4)
  _, tangent = jax.jvp(prior.logit_cdf, (z,), (jnp.array([1.0, 2.0]),))
  np.testing.assert_allclose(tangent, true_slope(0.6, 0.4, z) * [1, 2], rtol=1e-5)


@pytest.mark.parametrize(
  "bad", [0, -0.5, 0.04, 10_001, float("inf"), float("nan"), "half", None, np.array([0.5, 0.0])]
)
def test_a_parameter_out_of_range_is_named(bad):
  for name, args in (("a", (bad, 0.4)), ("b", (0.6, bad))):
    kind = TypeError if bad is None or isinstance(bad, str) else ValueError
    with pytest.raises(
      kind, match=re.escape(f"beta's {name} must be in [0.05, 10000]; got {bad!r}")
    ):
      beta(*args)


def test_priors_carry_their_names():
  assert beta(0.6, 0.4).name == "beta(0.6, 0.4)"
  assert beta(2, 6).name == "beta(2, 6)"
  assert uniform().name == "uniform"
