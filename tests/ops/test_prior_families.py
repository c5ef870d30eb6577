"""Priors with arrays of parameters and learned ones, and priors of every other family."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special, stats

from gating_jax.ops import beta_cdf
from gating_jax.ops.ecdf import batch_shaping_loss, cdf_matching_loss
from gating_jax.ops.priors import (
  Prior,
  beta,
  empirical,
  from_cdf,
  normal,
  relaxed_bernoulli,
  symmetric_beta,
  uniform,
)


def exact_beta(z, a, b):
  """Computes F, dF/da, dF/db at the logit z to many digits, from the tail that keeps them."""
  z, a, b = (mpmath.mpf(float(v)) for v in (z, a, b))
  sign = 1 if z <= mpmath.log(a / b) else -1
  tail = lambda a, b: (
    mpmath.betainc(a, b, 0, mpmath.expit(z), regularized=True)
    if sign > 0
    else mpmath.betainc(b, a, 0, mpmath.expit(-z), regularized=True)
  )
  step = mpmath.mpf(10) ** -20
  slope = lambda f, v: (f(v * (1 + step)) - f(v * (1 - step))) / (2 * v * step)
  value = tail(a, b)
  return [
    float(v)
    for v in (
      value if sign > 0 else 1 - value,
      sign * slope(lambda a: tail(a, b), a),
      sign * slope(lambda b: tail(a, b), b),
    )
  ]


@pytest.fixture(scope="module")
def beta_grid():
  """Returns `z, a, b` from tail to tail of many Betas, and the exact F, dF/da, dF/db."""
  mpmath.expit = lambda z: 1 / (1 + mpmath.exp(-z))
  points = []
  for a in (0.05, 0.6, 50.0):
    for b in (0.05, 0.4, 50.0):
      width, mode = np.sqrt((a + b) / (a * b)), np.log(a / b)
      points += [(mode + width * w, a, b) for w in (-9, -3, -1, -0.1, 0.05, 0.7, 2, 8)]
      points += [(z, a, b) for z in (-30, 0.0, 4.0)]
  z, a, b = np.asarray(points, np.float32).T
  with mpmath.workdps(60):
    exact = np.array([exact_beta(*point) for point in zip(z, a, b, strict=True)])
  return (z, a, b), exact.T


def test_learnable_beta_has_the_value_and_the_gradients_of_sixty_digit_arithmetic(beta_grid):
  (z, a, b), exact = beta_grid
  value, pullback = jax.vjp(jax.jit(beta_cdf.cdf), z, a, b)
  _, in_a, in_b = pullback(jnp.ones_like(value))
  np.testing.assert_allclose(value, exact[0], rtol=0, atol=3e-6)
  assert np.ptp(exact[1]) > 1
  for got, right in ((in_a, exact[1]), (in_b, exact[2])):
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-33)


def test_learnable_beta_agrees_with_the_fixed_one():
  z = np.linspace(-60, 60, 501).astype(np.float32)[:, None]
  a, b = np.array([[0.6, 0.05, 50, 8], [0.4, 3.0, 0.05, 2]], np.float32)
  learnable = beta(a, b)
  fixed = [beta(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
  for name in ("logit_cdf", "logit_pdf"):
    of_all = lambda z, name=name: jnp.concatenate([getattr(p, name)(z) for p in fixed], axis=1)
    right = jax.jit(of_all)(z)
    np.testing.assert_allclose(jax.jit(getattr(learnable, name))(z), right, rtol=1e-5, atol=3e-6)
  x = np.concatenate([[-0.5, 0, 1, 1.5], np.linspace(0.01, 0.99, 50)]).astype(np.float32)[:, None]
  for name, rtol in (("cdf", 1e-5), ("pdf", 1e-4)):
    of_all = lambda x, name=name: jnp.concatenate([getattr(p, name)(x) for p in fixed], axis=1)
    right = jax.jit(of_all)(x)
    np.testing.assert_allclose(jax.jit(getattr(learnable, name))(x), right, rtol=rtol, atol=3e-6)


def test_learnable_beta_is_finite_at_every_logit():
  z = np.array([-1e30, -1e4, -110, 0, 110, 1e4, 1e30], np.float32)[:, None]
  a, b = np.array([[0.05, 0.6, 50], [50, 0.4, 0.05]], np.float32)
  value, pullback = jax.vjp(jax.jit(lambda z, a, b: beta(a, b).logit_cdf(z)), z, a, b)
  np.testing.assert_allclose(value[np.array([0, -1])], [[0] * 3, [1] * 3], atol=1e-6)
  assert all(np.isfinite(g).all() for g in pullback(jnp.ones_like(value)))


def test_second_derivatives_of_learnable_beta_are_the_differences_of_the_first(x64):
  point = jnp.array([0.7, 0.6, 0.4])
  f = lambda v: beta_cdf.cdf(*v)
  steps = 1e-5 * np.eye(3)
  gradient = jax.jit(jax.grad(f))
  right = [(gradient(point + s) - gradient(point - s)) / 2e-5 for s in steps]
  hessian = jax.jit(jax.hessian(f))(point)
  assert np.abs(hessian).min() > 1e-3
  np.testing.assert_allclose(hessian, right, rtol=2e-4)


PARAMETERS = {
  "beta": (beta, [0.6, 3.0], [0.4, 2.0]),
  "symmetric_beta": (symmetric_beta, [0.3, 0.8]),
  "relaxed_bernoulli": (relaxed_bernoulli, [0.3, 0.8], [0.4, 2.0]),
  "normal": (normal, [-1.0, 0.5], [0.3, 2.0]),
}
families = pytest.mark.parametrize(  # the symmetric one is computed as beta is
  ("family", "parameters"),
  [
    pytest.param(f, p, id=name, marks=pytest.mark.slow if name == "symmetric_beta" else ())
    for name, (f, *p) in PARAMETERS.items()
  ],
)


def loss_of(prior):
  return batch_shaping_loss if prior.logit_cdf else cdf_matching_loss


@families
def test_column_k_meets_prior_k_only(family, parameters):
  x = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
  together = family(*map(jnp.array, parameters))
  assert together.shape == (2,)
  alone = [family(*column) for column in zip(*parameters, strict=True)]
  right = jax.jit(lambda x: [loss_of(prior)(x[:, k], prior) for k, prior in enumerate(alone)])(x)
  assert abs(right[0] - right[1]) > 1e-3
  loss = jax.jit(lambda x, axis: loss_of(together)(x, together, axis=axis), static_argnums=1)
  np.testing.assert_allclose(loss(x, 0), right, rtol=1e-5)
  np.testing.assert_allclose(loss(x.T, 1), right, rtol=1e-5)
  jacobian = jax.jacrev(lambda *p: loss_of(together)(x, family(*p)), argnums=range(len(parameters)))
  gradients = jax.jit(jacobian)(*map(jnp.array, parameters))
  for gradient in gradients:
    assert np.abs(np.diag(gradient)).min() > 1e-4
    np.testing.assert_array_equal(gradient[[0, 1], [1, 0]], [0, 0])


@families
def test_gradients_in_the_parameters_are_the_finite_differences(
  family, parameters, central_differences
):
  x = np.random.default_rng(0).normal(size=(7, 2))
  loss = lambda p: jnp.sum(jnp.array([1.0, 2.0]) * loss_of(family(*p))(x, family(*p)))
  point = np.array(parameters)
  gradient = jax.jit(jax.grad(loss))(jnp.asarray(point))
  np.testing.assert_allclose(
    gradient, central_differences(loss, point, step=1e-4), rtol=1e-4, atol=1e-7
  )


@families
def test_on_probabilities_gradients_in_parameters_and_values_are_finite_differences(
  family, parameters, central_differences
):
  point = np.array([*parameters, [0.2, 0.9], [0.7, 0.4]])
  loss = lambda p: jnp.sum(cdf_matching_loss(p[-2:], family(*p[:-2])))
  gradient = jax.jit(jax.grad(loss))(jnp.asarray(point))
  np.testing.assert_allclose(
    gradient, central_differences(loss, point, step=1e-5), rtol=2e-4, atol=1e-6
  )


@families
def test_no_family_calls_the_host(family, parameters):
  x = jnp.zeros((3, 2))
  value_and_gradient = jax.value_and_grad(
    lambda x, *p: jnp.sum(loss_of(family(*p))(x, family(*p))), argnums=(0, 1)
  )
  assert (
    "callback" not in jax.jit(value_and_gradient).lower(x, *map(jnp.array, parameters)).as_text()
  )


def test_the_relaxed_bernoulli_is_the_binary_concrete():
  prior = relaxed_bernoulli(0.3, 0.5)
  rng = np.random.default_rng(0)
  u = rng.uniform(size=200_000)
  sample = special.expit((special.logit(u) + special.logit(0.3)) / 0.5)
  x = np.array([0.01, 0.2, 0.5, 0.9], np.float32)
  np.testing.assert_allclose(prior.cdf(x), [(sample <= v).mean() for v in x], atol=5e-3)
  np.testing.assert_allclose(
    prior.cdf(x), special.expit(0.5 * special.logit(x) - special.logit(0.3)), rtol=1e-5
  )
  np.testing.assert_allclose(
    prior.pdf(x), (prior.cdf(x + 1e-3) - prior.cdf(x - 1e-3)) / 2e-3, rtol=3e-2
  )
  np.testing.assert_allclose(prior.logit_cdf(special.logit(x)), prior.cdf(x), rtol=1e-5)
  np.testing.assert_array_equal(prior.cdf(jnp.array([-1.0, 0.0, 1.0, 2.0])), [0, 0, 1, 1])


def test_the_normal_agrees_with_scipy_and_is_finite_everywhere():
  x = np.array([-3.4e38, -1e9, -20, -2, 0.3, 4, 30, 3.4e38], np.float32)
  prior = normal(0.5, 1.7)
  np.testing.assert_allclose(
    prior.cdf(x), stats.norm.cdf(x.astype(np.float64), 0.5, 1.7), rtol=2e-5, atol=1e-36
  )
  np.testing.assert_allclose(
    prior.pdf(x), stats.norm.pdf(x.astype(np.float64), 0.5, 1.7), rtol=2e-5, atol=1e-36
  )
  value, pullback = jax.vjp(
    jax.jit(lambda x, m, s: normal(m, s).cdf(x)), x, jnp.array(0.5), jnp.array(0.1)
  )
  assert all(np.isfinite(g).all() for g in pullback(jnp.ones_like(value)))


def test_symmetric_beta_is_beta():
  z = jnp.linspace(-4, 4, 9)
  np.testing.assert_array_equal(symmetric_beta(0.6).logit_cdf(z), beta(0.6, 0.4).logit_cdf(z))
  assert symmetric_beta(0.6).name == "beta(0.6, 0.4)"
  assert normal(jnp.zeros(3), 2.0).name == "normal([3], 2)"
  assert symmetric_beta([0.3, 0.8]).shape == (2,)


to_samples = jax.jit(lambda x, samples: cdf_matching_loss(x, empirical(samples)))
SAMPLES = [2.0, -1.0, 0.5, 0.5, 4.0, 0.5]


def test_samples_make_an_interpolated_empirical_cdf():
  prior = empirical(np.array(SAMPLES))
  at = np.array([-1, -0.25, 0.5, 1.25, 2, 3, 4, -1 - 1.25, 4 + 1.25, -3, 6], np.float32)
  level, slope = jax.jit(lambda x: (prior.cdf(x), prior.pdf(x)))(at)
  np.testing.assert_allclose(level[:7], np.array([1, 1.5, 3, 4.5, 5, 5.5, 6]) / 7, rtol=1e-6)
  # A quarter of the range away.
  np.testing.assert_allclose(level[7:9], [np.exp(-1) / 7, 1 - np.exp(-1) / 7], rtol=1e-5)
  np.testing.assert_allclose(slope[np.array([1, 3])], np.array([1 / 1.5, 1 / 1.5]) / 7, rtol=1e-6)
  assert (slope[9:] > 0).all()


@pytest.mark.slow
def test_a_batch_equal_to_its_reference_has_no_loss_and_a_moved_one_is_drawn_back():
  x = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
  np.testing.assert_allclose(to_samples(x, x), [0, 0], atol=1e-12)
  reference = np.stack([x[:, 0] - 5, x[:, 1] + 5], axis=1)
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(cdf_matching_loss(x, empirical(reference)))))(x)
  assert (np.sign(gradient) == [1, -1]).all()


def test_columns_with_a_reference_each_are_those_with_one_reference():
  rng = np.random.default_rng(1)
  x, samples = (
    rng.normal(size=(6, 2, 3)).astype(np.float32),
    rng.normal(size=(5, 2, 3)).astype(np.float32),
  )
  together = to_samples(x, samples)
  right = [[to_samples(x[:, i, j], samples[:, i, j]) for j in range(3)] for i in range(2)]
  assert np.ptp(right) > 1e-3
  np.testing.assert_allclose(together, right, rtol=1e-6)


def test_the_symmetric_form_approaches_the_two_sample_cramer_von_mises_statistic():
  rng = np.random.default_rng(2)
  x, y = (
    rng.normal(size=3000).astype(np.float32),
    rng.normal(0.3, 1.2, size=2500).astype(np.float32),
  )
  n, m = len(x), len(y)
  statistic = stats.cramervonmises_2samp(x, y).statistic
  both = jax.jit(
    lambda x, y: n * cdf_matching_loss(x, empirical(y)) + m * cdf_matching_loss(y, empirical(x))
  )
  ours = both(x, y)
  np.testing.assert_allclose(ours * n * m / (n + m) ** 2, statistic, rtol=0.01)


def test_gradients_of_samples_are_the_finite_differences(central_differences):
  inside = np.random.default_rng(3).normal(size=(2, 6, 2))
  inside[1, :2] = [[-9, -9], [9, 9]]  # the tails' width has no gradient: keep all of x inside
  loss = lambda x: jnp.sum(cdf_matching_loss(x[0], empirical(x[1])))
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss))(inside), central_differences(loss, inside), atol=1e-6
  )


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  "samples", [[3.0], [1.0, 1.0], [-3.4e38, 3.4e38], [0.0, 1e-40], SAMPLES], ids=str
)
def test_samples_of_any_kind_leave_everything_finite(samples):
  x = jnp.array([-3.4e38, -1.0, 0.0, 1.0, 1.0, 3.0, 3.4e38])
  loss = jax.jit(
    jax.value_and_grad(lambda x, s: cdf_matching_loss(x, empirical(s)), argnums=(0, 1))
  )
  for part in jax.tree.leaves(loss(x, jnp.array(samples))):
    assert np.isfinite(part).all()


def test_any_pair_of_cdf_and_pdf_makes_a_prior_whose_gradient_is_the_pdf():
  table = np.linspace(0, 5, 2001)
  prior = from_cdf(
    lambda x: jnp.interp(x, table, 1 - np.exp(-table)), lambda x: jnp.where(x > 0, jnp.exp(-x), 0.0)
  )
  x = jnp.array([0.1, 1.0, 3.0])
  np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(prior.cdf)))(x), np.exp(-x), rtol=1e-6)
  right = np.mean((1 - np.exp(-x) - np.array([1, 2, 3]) / 4) ** 2)
  np.testing.assert_allclose(jax.jit(lambda x: cdf_matching_loss(x, prior))(x), right, rtol=1e-4)
  with pytest.raises(ValueError, match="support must be \\[0, 1\\]; got custom"):
    batch_shaping_loss(x, prior)


def test_a_pair_may_close_over_learned_parameters(central_differences):
  def loss(parameters):
    rate, x = parameters[0], parameters[1:]
    return cdf_matching_loss(
      x, from_cdf(lambda x: 1 - jnp.exp(-rate * x), lambda x: rate * jnp.exp(-rate * x))
    )

  point = np.array([0.7, 0.2, 2.0, 1.1])
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss))(jnp.asarray(point)), central_differences(loss, point), atol=1e-7
  )


def test_a_pair_on_the_logit_axis_serves_gates():
  logistic = lambda z: jax.nn.sigmoid(z)
  prior = from_cdf(uniform().cdf, uniform().pdf, logit_cdf=logistic, logit_pdf=uniform().logit_pdf)
  z = jnp.array([0.3, -1.0, 2.0])
  np.testing.assert_allclose(
    batch_shaping_loss(z, prior), batch_shaping_loss(z, uniform()), rtol=1e-6
  )
  with pytest.raises(ValueError, match="^logit_cdf and logit_pdf must come together"):
    from_cdf(uniform().cdf, uniform().pdf, logit_cdf=logistic)


def doubled(x):
  return 2 * x


def two(x):
  return jnp.full_like(x, 2)


KINDS = {
  "beta": beta(0.6, 0.4),
  "beta of arrays": beta(np.array([0.6, 3.0]), 0.4),
  "relaxed_bernoulli": relaxed_bernoulli(0.3, 0.5),
  "symmetric_beta": symmetric_beta(0.3),
  "empirical": empirical(np.arange(6.0).reshape(3, 2)),
  "normal": normal(np.array([0.0, 1.0]), 2.0),
  "from_cdf": from_cdf(doubled, two, name="half", logit_cdf=doubled, logit_pdf=two),
  "uniform": uniform(),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("prior", KINDS.values(), ids=KINDS)
def test_a_prior_can_be_copied_and_pickled(prior):
  x = jnp.array([[-0.5, 0.0], [0.3, 0.7], [1.0, 2.5]])
  copied = pickle.loads(pickle.dumps(copy.deepcopy(copy.copy(prior))))
  assert (copied.name, copied.shape) == (prior.name, prior.shape)
  names = ["cdf", "pdf"] + ["logit_cdf", "logit_pdf"] * (prior.logit_cdf is not None)
  values = lambda prior: jax.jit(lambda x: [getattr(prior, name)(x) for name in names])(x)
  np.testing.assert_array_equal(values(copied), values(prior))
  assert callable(pickle.loads(pickle.dumps(prior.cdf)))
  if prior.logit_cdf is None:
    assert copied.logit_cdf is copied.logit_pdf is None


@pytest.mark.parametrize(
  ("prior", "dtype"),
  [
    (beta(0.6, 0.4), jnp.bfloat16),
    (beta(np.full(2, 0.6), 0.4), jnp.int32),
    (uniform(), jnp.bfloat16),
    (normal(), jnp.float16),
  ],
)
def test_a_prior_computes_in_float32_at_least(prior, dtype):
  functions = [f for f in (prior.cdf, prior.pdf, prior.logit_cdf, prior.logit_pdf) if f is not None]
  values = jax.eval_shape(lambda x: [f(x) for f in functions], jax.ShapeDtypeStruct((3, 2), dtype))
  assert {value.dtype for value in values} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: symmetric_beta(0.96), "symmetric_beta's a must be in [0.05, 0.95]; got 0.96"),
    (lambda: relaxed_bernoulli(1.0, 0.5), "relaxed_bernoulli's mean must be in (0, 1); got 1.0"),
    (
      lambda: relaxed_bernoulli(0.5, 0.0),
      "relaxed_bernoulli's temperature must be positive; got 0.0",
    ),
    (lambda: normal(0.0, -1.0), "normal's std must be positive; got -1.0"),
    (lambda: normal(np.inf, 1.0), "normal's mean must be finite; got inf"),
    (lambda: normal(0.0, np.inf), "normal's std must be positive; got inf"),
    (lambda: beta(np.zeros((3, 4)), 1.0), "beta's a must be in [0.05, 10000]; got float64[3,4]"),
    (
      lambda: beta(np.ones(2), np.ones(3)),
      "beta's parameters must have shapes that broadcast together; got [(2,), (3,)]",
    ),
    (
      lambda: empirical(jnp.zeros((0, 2))),
      "samples must hold at least one value along axis 0; got shape (0, 2)",
    ),
    (lambda: empirical(1.0), "samples must hold at least one value along axis 0; got shape ()"),
    (
      lambda: batch_shaping_loss(jnp.zeros((4, 2)), beta(np.ones(3), 1.0)),
      "prior's parameters must broadcast to (2,), the shape of logits without axis 0; got (3,) for "
      "beta([3], 1)",
    ),
    (
      lambda: cdf_matching_loss(jnp.zeros((4, 2)), normal(jnp.zeros((4, 1)))),
      "prior's parameters must broadcast to (2,), the shape of x without axis 0; got (4, 1) for "
      "normal([4, 1], 1)",
    ),
    (
      lambda: cdf_matching_loss(jnp.zeros((4, 2)), from_cdf(lambda x: x[:2], lambda x: x)),
      "prior's cdf must be elementwise; got (2, 2) from (4, 2), with custom",
    ),
  ],
)
def test_bad_parameters_are_named(make, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    make()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: normal("0", 1.0), "normal's mean must be finite; got '0'"),
    (lambda: normal(0.0, 1j), "normal's std must be positive; got 1j"),
    (
      lambda: symmetric_beta(beta),
      "symmetric_beta's a must be in [0.05, 0.95]; got the function beta",
    ),
    (
      lambda: relaxed_bernoulli([0.5, "0.5"], 1.0),
      "relaxed_bernoulli's mean must be in (0, 1); got [0.5, '0.5']",
    ),
    (lambda: from_cdf(0.5, two), "cdf must be a function; got 0.5"),
    (lambda: from_cdf(doubled, uniform()), "pdf must be a function; got an object of class Prior"),
    (
      lambda: from_cdf(doubled, two, logit_cdf="z", logit_pdf=two),
      "logit_cdf must be a function or None; got 'z'",
    ),
    (
      lambda: from_cdf(doubled, two, shape=2),
      "a prior's shape must be a tuple of whole numbers; got 2",
    ),
    (
      lambda: from_cdf(doubled, two, name=two),
      "a prior's name must be a text; got the function two",
    ),
    (lambda: Prior("half", doubled, None), "pdf must be a function; got None"),
  ],
)
def test_what_makes_no_prior_is_named(make, message):
  with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
    make()
