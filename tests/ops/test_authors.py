"""The losses against the authors' PyTorch code: equal where it is right, and right where it is not.

Their code (Qualcomm-AI-research/batchshaping, 2023) is not part of this repository. The first half
writes its formulas again in NumPy; the second has one test for each fault found in it, against
hand-made numbers or mpmath. `theirs` in a test is the result of their code for the same input, with
torch 2.13.0 and SciPy 1.17.1 (derivatives in a and b after repairing a conversion that NumPy 2.4
refuses).
"""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special, stats

from gating_jax.ops.ecdf import batch_shaping_loss, cdf_matching_loss
from gating_jax.ops.priors import beta, normal, relaxed_bernoulli, symmetric_beta

N, C = 16, 3
PROBS = np.array([0.7, 0.1, 0.95, 0.4])


def relaxed_bernoulli_cdf(x, mean, temperature):
  return special.expit(temperature * special.logit(x) - special.logit(mean))


def relaxed_bernoulli_pdf(x, mean, temperature):
  cdf = relaxed_bernoulli_cdf(x, mean, temperature)
  return temperature * cdf * (1 - cdf) / (x * (1 - x))


# Constructor, CDF and density by SciPy, and two sets of parameters: numbers, and a prior per gate.
FAMILIES = {
  "symmetric beta": (
    symmetric_beta,
    lambda x, a: stats.beta.cdf(x, a, 1 - a),
    lambda x, a: stats.beta.pdf(x, a, 1 - a),
    [0.6],
    [[0.6, 0.2, 0.9]],
  ),
  "beta": (beta, stats.beta.cdf, stats.beta.pdf, [0.6, 0.4], [[0.6, 2, 1], [0.4, 6, 0.3]]),
  "relaxed bernoulli": (
    relaxed_bernoulli,
    relaxed_bernoulli_cdf,
    relaxed_bernoulli_pdf,
    [0.2, 0.25],
    [[0.2, 0.5, 0.9], [0.25, 1, 0.6]],
  ),
  "normal": (normal, stats.norm.cdf, stats.norm.pdf, [0.3, 0.5], [[0.3, 0, 1], [0.5, 2, 0.2]]),
}


def over(names):
  """Runs a test for both sets of parameters of the named families."""
  cases = [(*FAMILIES[name][:3], np.array(p, float)) for name in names for p in FAMILIES[name][3:]]
  ids = [f"{name}, {kind}" for name in names for kind in ("numbers", "per gate")]
  return pytest.mark.parametrize(("prior", "cdf", "pdf", "parameters"), cases, ids=ids)


each_family = over(FAMILIES)
each_gate_family = over([name for name in FAMILIES if name != "normal"])


def make_prior(constructor, parameters):
  """Makes the prior from arrays `[C]` where `parameters` has them, else from Python numbers."""
  return constructor(*(jnp.asarray(p, jnp.float32) if np.ndim(p) else float(p) for p in parameters))


def their_loss(x, cdf, pdf):
  """Computes the sum form per gate, and its gradient, by their formulas in float64."""
  ordered, rank = np.sort(x, axis=0), np.argsort(np.argsort(x, axis=0), axis=0) + 1
  expected = np.arange(1, len(x) + 1).reshape(-1, *[1] * (x.ndim - 1)) / (len(x) + 1)
  return np.sum((expected - cdf(ordered)) ** 2, axis=0), 2 * pdf(x) * (cdf(x) - rank / (len(x) + 1))


def our_loss(loss, x, prior):
  """Computes the sum form per gate, and its gradient."""
  value, pullback = jax.vjp(jax.jit(lambda x: len(x) * loss(x, prior)), jnp.asarray(x))
  return value, pullback(jnp.ones_like(value))[0]


def random_probs(seed=0):
  return (
    np.random.default_rng(seed).uniform(0.02, 0.98, (N, C)).astype(np.float32).astype(np.float64)
  )


@each_family
def test_value_and_gradient_on_the_natural_axis_are_theirs(prior, cdf, pdf, parameters):
  x = random_probs()
  value, gradient = their_loss(x, lambda x: cdf(x, *parameters), lambda x: pdf(x, *parameters))
  assert np.ptp(value) > 0.05
  our_value, our_gradient = our_loss(
    cdf_matching_loss, x.astype(np.float32), make_prior(prior, parameters)
  )
  np.testing.assert_allclose(our_value, value, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(our_gradient, gradient, rtol=1e-5, atol=1e-5)


@each_gate_family
def test_value_and_gradient_on_the_logit_axis_are_theirs_by_the_chain_rule(
  prior, cdf, pdf, parameters
):
  p = random_probs(1)
  value, gradient = their_loss(p, lambda p: cdf(p, *parameters), lambda p: pdf(p, *parameters))
  logits = special.logit(p).astype(np.float32)
  our_value, our_gradient = our_loss(batch_shaping_loss, logits, make_prior(prior, parameters))
  np.testing.assert_allclose(our_value, value, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(our_gradient, gradient * p * (1 - p), rtol=1e-5, atol=1e-5)


@each_family
def test_the_density_is_theirs_without_the_constant_added_to_its_denominator(
  prior, cdf, pdf, parameters
):
  x = random_probs(2)
  density = make_prior(prior, parameters).pdf(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(density, pdf(x, *parameters), rtol=1e-5, atol=1e-5)


def normal_slopes(x, mean, std):
  density = stats.norm.pdf(x, mean, std)
  return -density, -density * (x - mean) / std


def relaxed_bernoulli_slopes(x, mean, temperature):
  cdf = relaxed_bernoulli_cdf(x, mean, temperature)
  return -cdf * (1 - cdf) / (mean * (1 - mean)), cdf * (1 - cdf) * special.logit(x)


@pytest.mark.parametrize(
  ("family", "slopes"), [("normal", normal_slopes), ("relaxed bernoulli", relaxed_bernoulli_slopes)]
)
@pytest.mark.parametrize("per_gate", [False, True])
def test_derivatives_in_the_prior_parameters_with_a_closed_form_are_theirs(
  family, slopes, per_gate
):
  constructor, cdf, _, *choices = FAMILIES[family]
  parameters = np.array(choices[per_gate], float)
  ordered = np.sort(random_probs(), axis=0)
  gap = cdf(ordered, *parameters) - np.arange(1, N + 1)[:, None] / (N + 1)
  expected = np.array(
    [(2 * gap * slope).sum(0 if per_gate else None) for slope in slopes(ordered, *parameters)]
  )
  loss = lambda parameters: (
    N * cdf_matching_loss(jnp.asarray(ordered, jnp.float32), constructor(*parameters)).sum()
  )
  gradient = jax.jit(jax.grad(loss))(tuple(jnp.asarray(parameters, jnp.float32)))
  assert np.abs(expected).min() > 1e-2
  np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-5, atol=1e-5)


# Their faults, one test each.


def test_no_host_call_is_in_the_compiled_loss():
  """Theirs moves every batch to the host for SciPy.

  torch.compile(fullgraph), vmap and func.grad therefore refuse it.
  """

  def program(cdf, x):
    return jax.jit(lambda x: jnp.sum(cdf(x))).lower(x).as_text()

  x = jnp.zeros((4, 2))
  host = lambda x: jax.pure_callback(
    lambda x: stats.beta.cdf(x, 0.6, 0.4), x, x, vmap_method="expand_dims"
  )
  assert "callback" in program(host, x)
  for prior in (
    beta(0.6, 0.4),
    symmetric_beta(0.6),
    relaxed_bernoulli(0.2, 0.25),
    beta(jnp.full(2, 0.6), 0.4),
  ):
    assert "callback" not in program(
      jax.grad(lambda x, prior=prior: batch_shaping_loss(x, prior).sum()), x
    )
    assert "callback" not in program(
      jax.grad(lambda x, prior=prior: cdf_matching_loss(x, prior).sum()), x
    )
  per_gate = lambda a: batch_shaping_loss(x, beta(a, 0.4)).sum()
  assert "callback" not in program(jax.grad(per_gate), jnp.array([0.6, 2.0]))


def loss_by_mpmath(x, a, b):
  """Computes the mean form of one gate."""
  levels = [mpmath.mpf(i) / (len(x) + 1) for i in range(1, len(x) + 1)]
  cdf = lambda v: mpmath.betainc(a, b, 0, mpmath.mpf(float(v)), regularized=True)
  return sum((cdf(v) - e) ** 2 for v, e in zip(np.sort(x), levels, strict=True)) / len(x)


# Theirs takes differences over a grid of step 0.01, which is not centred for parameters below 0.1.
@pytest.mark.parametrize(
  ("a", "b", "theirs"),
  [
    (0.6, 0.4, (0.05338438, -0.07733835)),
    (0.12, 0.1, (0.05720054, -0.27143234)),
    (0.06, 0.4, (-1.4908037, 0.21885414)),
    (0.3, 0.06, (0.29804182, -1.6613462)),
  ],
)
def test_derivatives_in_a_and_b_are_exact_not_wide_differences(a, b, theirs):
  x = PROBS.astype(np.float32)
  with mpmath.workdps(40):
    exact = [
      float(mpmath.diff(f, v))
      for f, v in (
        (lambda a: loss_by_mpmath(x, a, mpmath.mpf(b)), a),
        (lambda b: loss_by_mpmath(x, mpmath.mpf(a), b), b),
      )
    ]
  assert (np.abs(np.subtract(theirs, exact)) > 5e-6).all()
  loss = lambda a, b: cdf_matching_loss(jnp.asarray(x), beta(a, b)).sum()
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.float32(a), jnp.float32(b))
  np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=2e-6)


def test_the_derivative_in_a_of_the_symmetric_beta_is_exact_near_one():
  theirs = 1.2190313
  x = PROBS.astype(np.float32)
  with mpmath.workdps(40):
    exact = float(mpmath.diff(lambda a: loss_by_mpmath(x, a, 1 - a), 0.93))
  assert abs(theirs - exact) > 0.01 * exact
  slope = jax.jit(jax.grad(lambda a: cdf_matching_loss(jnp.asarray(x), symmetric_beta(a)).sum()))(
    jnp.float32(0.93)
  )
  np.testing.assert_allclose(slope, exact, rtol=1e-5)


def test_each_gate_is_pulled_to_its_own_prior_only():
  """Theirs averages over all pairs of gate and prior."""
  x = random_probs()[:5, :2].astype(np.float32)
  a, b = np.array([0.6, 2.0]), np.array([0.4, 6.0])
  level = np.arange(1, 6)[:, None] / 6
  ordered = np.sort(x.astype(np.float64), axis=0)
  own = np.mean((stats.beta.cdf(ordered, a, b) - level) ** 2, axis=0)
  pairs = np.mean((stats.beta.cdf(ordered[..., None], a, b) - level[..., None]) ** 2)
  assert abs(pairs - own.mean()) > 0.01
  loss = lambda a: cdf_matching_loss(jnp.asarray(x), beta(a, jnp.asarray(b, jnp.float32)))
  a = jnp.asarray(a, jnp.float32)
  np.testing.assert_allclose(jax.jit(loss)(a), own, rtol=1e-5, atol=1e-5)
  slopes = jax.jit(jax.jacrev(loss))(a)
  np.testing.assert_array_equal(slopes * (1 - jnp.eye(2)), np.zeros((2, 2)))
  assert (np.abs(np.diag(slopes)) > 1e-3).all()


def test_a_tie_within_one_gate_counts_whatever_the_other_gates_hold():
  """Their tie handling finds ties only where all gates repeat together.

  Without it, equal values get different levels by their order.
  """
  # Mean over two gates, so half of ours; with and without their tie handling.
  theirs = [
    0.025,
    0,
    -0.025,
    -0.075,
  ]
  x = jnp.array([[0.5, 0.1], [0.2, 0.3], [0.5, 0.7], [0.5, 0.9]])
  by_hand = np.array([[-0.05, -0.05], [0, -0.05], [-0.05, 0.05], [-0.05, 0.05]])
  assert not np.allclose(2 * np.array(theirs), by_hand[:, 0], atol=0.01)
  gradient = jax.jit(jax.grad(lambda x: cdf_matching_loss(x, beta(1, 1)).sum()))(x)
  np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
  alone = jax.jit(jax.grad(lambda x: cdf_matching_loss(x, beta(1, 1)).sum()))(x[:, :1])
  np.testing.assert_allclose(gradient[:, :1], alone, atol=1e-7)


def test_a_constant_gate_at_the_median_of_its_prior_stays_there():
  """Their tie handling gives ties the highest rank, which pushes a constant gate open."""
  theirs = -0.7778
  x = jnp.full((8, 1), 0.5)
  gradient = jax.jit(jax.grad(lambda x: 8 * cdf_matching_loss(x, beta(1, 1)).sum()))(x)
  assert theirs < -0.7
  np.testing.assert_allclose(gradient, np.zeros((8, 1)), atol=1e-6)


def beta_gap_by_mpmath(z, a, b):
  """Returns loss and gradient of one gate probability sigmoid(z), whose expected level is 1/2."""
  with mpmath.workdps(60):
    z, a, b = map(mpmath.mpf, (z, a, b))
    gap = mpmath.betainc(a, b, 0, 1 / (1 + mpmath.exp(-z)), regularized=True) - 0.5
    slope = mpmath.exp(
      -a * mpmath.log1p(mpmath.exp(-z)) - b * mpmath.log1p(mpmath.exp(z))
    ) / mpmath.beta(a, b)
    return float(gap**2), float(2 * gap * slope)


# Theirs clips the density at 100 and takes probabilities, which are 1 in float32 from logit 17.
@pytest.mark.parametrize(
  ("z", "theirs"),
  [
    (10.0, 0.00441573),
    (12.0, 0.00061214),
    (16.0, 1.189e-5),
    (17.0, 0.0),
    (30.0, 0.0),
    (-16.0, -1.12527e-5),
    (-20.0, -2.061e-7),
    (-90.0, 0.0),
    (-110.0, 0.0),
  ],
)
def test_the_gradient_of_a_nearly_saturated_gate_neither_shrinks_nor_vanishes(z, theirs):
  _, gradient = beta_gap_by_mpmath(z, 0.6, 0.4)
  assert abs(theirs) < 0.85 * abs(gradient)
  ours = jax.jit(jax.grad(lambda z: batch_shaping_loss(z, beta(0.6, 0.4))))(jnp.array([z]))
  np.testing.assert_allclose(ours[0], gradient, rtol=2e-5)


def test_the_loss_of_a_nearly_open_gate_keeps_its_digits():
  theirs = 0.25
  value, _ = beta_gap_by_mpmath(17.0, 0.6, 0.4)
  assert theirs - value > 8e-4
  ours = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))(jnp.array([17.0]))
  np.testing.assert_allclose(ours, value, atol=1e-6)


def test_a_density_below_one_thousandth_is_not_raised_to_it():
  theirs = 4.0e-4
  # Of 0.95 under Beta(2, 6): 2 * 42 * 0.95 * 0.05**5 * (1 - 0.8).
  by_hand = 4.9875e-6
  assert by_hand < theirs / 50
  np.testing.assert_allclose(
    84 * 0.95 * 0.05**5 * (stats.beta.cdf(0.95, 2, 6) - 0.8), by_hand, rtol=1e-4
  )
  gradient = jax.jit(jax.grad(lambda p: 4 * cdf_matching_loss(p, beta(2, 6))))(
    jnp.array(PROBS, jnp.float32)
  )
  np.testing.assert_allclose(gradient[2], by_hand, rtol=1e-3)


def test_relaxed_bernoulli_gates_beyond_one_thousandth_still_learn():
  """Theirs clips probabilities to [0.001, 0.999]; with one value the level is 1/2."""
  their_value, their_gradient = 0.00710419, 0.0
  p, mean, temperature = 1e-4, 0.2, 0.25
  odds = (p / (1 - p)) ** temperature * (1 - mean) / mean
  cdf = odds / (1 + odds)
  value, in_logits = (cdf - 0.5) ** 2, 2 * (cdf - 0.5) * temperature * cdf * (1 - cdf)
  assert value > 6 * their_value
  assert abs(in_logits - their_gradient) > 0.02
  prior = relaxed_bernoulli(mean, temperature)
  logit = jnp.array([np.log(p / (1 - p))], jnp.float32)
  ours, gradient = jax.jit(jax.value_and_grad(lambda z: batch_shaping_loss(z, prior)))(logit)
  np.testing.assert_allclose(ours, value, rtol=1e-5)
  np.testing.assert_allclose(gradient[0], in_logits, rtol=1e-5)
  ours, gradient = jax.jit(jax.value_and_grad(lambda p: cdf_matching_loss(p, prior)))(
    jnp.array([p], jnp.float32)
  )
  np.testing.assert_allclose(ours, value, rtol=1e-5)
  np.testing.assert_allclose(gradient[0], in_logits / (p * (1 - p)), rtol=1e-5)


def test_second_derivatives_hold_the_slope_of_the_density():
  """Theirs differentiates twice without an error, but treats the density as a constant."""
  theirs = [0.25849906, 0.32808915, 1.7383606, 0.17605704]
  density = stats.beta.pdf(PROBS, 0.6, 0.4)
  slope = density * (-0.4 / PROBS + 0.6 / (1 - PROBS))
  gap = stats.beta.cdf(PROBS, 0.6, 0.4) - np.array([3, 1, 4, 2]) / 5
  exact = (density**2 + slope * gap) / 2
  np.testing.assert_allclose(theirs, density**2 / 2, rtol=1e-5)
  assert (np.abs(theirs - exact)[:3] > 0.04).all()
  hessian = jax.jit(jax.hessian(lambda p: cdf_matching_loss(p, beta(0.6, 0.4))))(
    jnp.array(PROBS, jnp.float32)
  )
  np.testing.assert_allclose(hessian, np.diag(exact), rtol=1e-5, atol=1e-5)


def test_gates_are_never_pooled_into_one_distribution():
  """By default theirs ranks all gates together: a dead and an always open gate are nearly ideal."""
  theirs, by_hand = 0.088235, 204 / 81 / 8  # the sum of (i / 9)^2 for i = 1 ... 8, over 8
  logits = jnp.tile(jnp.array([-1e4, 1e4]), (8, 1))
  loss = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))(logits)
  np.testing.assert_allclose(loss, [by_hand, by_hand], rtol=1e-5)
  assert float(loss.mean()) > 3 * theirs


def test_float64_values_are_compared_in_float64(x64):
  """Theirs computes its levels, and the Beta CDF, in float32 for every input."""
  theirs_off_by = 5.4e-9
  ours = jax.jit(lambda x: cdf_matching_loss(x, normal(0.3, 0.5)))(jnp.asarray(PROBS, jnp.float64))
  exact = np.mean((stats.norm.cdf(np.sort(PROBS), 0.3, 0.5) - np.arange(1, 5) / 5) ** 2)
  assert ours.dtype == jnp.float64
  assert abs(ours - exact) < theirs_off_by / 1e6


@pytest.mark.parametrize(
  ("constructor", "parameters", "value"),
  [
    (symmetric_beta, [1.02], "1.02"),
    (beta, [0.6, -0.4], "-0.4"),
    (relaxed_bernoulli, [-1.0, 0.25], "-1.0"),
    (normal, [0.0, -0.4], "-0.4"),
  ],
)
def test_parameters_that_name_no_distribution_are_refused(constructor, parameters, value):
  """Theirs returns NaN, and for a negative deviation a falling CDF."""
  with pytest.raises(ValueError, match=rf"must .*got {value}"):
    constructor(*parameters)
