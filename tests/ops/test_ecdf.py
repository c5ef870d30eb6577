import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from gating_jax.ops import ranking
from gating_jax.ops.ecdf import batch_shaping_loss, cdf_matching_loss, empirical_cdf, noise_floor
from gating_jax.ops.priors import Prior, beta, uniform

# Sum form and d/dp of p = [0.7, 0.1, 0.95, 0.4] as one gate, from shared/spec/batch_shaping.md.
PROBS = np.array([0.7, 0.1, 0.95, 0.4])
GOLDEN = [
    (beta(0.6, 0.4), 0.018932542863914, [-0.1236429045, -0.1138296860, -0.1106583266, -0.0897803745]),
    (beta(0.5, 0.5), 0.005457716838903, [0.0430517070, 0.0102554452, 0.1648435263, 0.0466593738]),
    (beta(2, 6), 0.394319465485171, [0.0566119553, -0.2495216115, 0.0000049875, 1.1531822432]),
    (uniform(), 0.0425, [0.2, -0.2, 0.3, 0.0]),
]
golden = pytest.mark.parametrize(("prior", "loss", "slope"), GOLDEN, ids=[g[0].name for g in GOLDEN])


@pytest.fixture
def library_sort(monkeypatch):
  """XLA's sort in place of the network, which takes seconds to compile at 256 values; test_ranking compares the two."""
  monkeypatch.setattr(ranking, "_NETWORK_MAX_LENGTH", 0)


def sum_form(loss, prior):
  return jax.jit(jax.value_and_grad(lambda x: 4 * loss(x, prior)))


@golden
def test_golden_values_on_probabilities(prior, loss, slope):
  value, gradient = sum_form(cdf_matching_loss, prior)(PROBS.astype(np.float32))
  np.testing.assert_allclose(value, loss, rtol=2e-5)
  np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=1e-6)


@golden
def test_golden_values_on_logits(prior, loss, slope):
  value, gradient = sum_form(batch_shaping_loss, prior)(special.logit(PROBS).astype(np.float32))
  np.testing.assert_allclose(value, loss, rtol=2e-5)
  np.testing.assert_allclose(gradient, slope * PROBS * (1 - PROBS), rtol=2e-5, atol=1e-6)


@golden
def test_golden_values_in_float64(prior, loss, slope, x64):
  value, gradient = sum_form(cdf_matching_loss, prior)(PROBS)
  np.testing.assert_allclose(value, loss, atol=5e-9)
  np.testing.assert_allclose(gradient, slope, atol=1e-7)
  value, gradient = sum_form(batch_shaping_loss, prior)(special.logit(PROBS))
  np.testing.assert_allclose(value, loss, atol=5e-9)
  np.testing.assert_allclose(gradient, slope * PROBS * (1 - PROBS), atol=1e-7)


def test_the_loss_of_an_exactly_placed_batch_is_zero_and_that_of_one_value_is_by_hand():
  np.testing.assert_allclose(cdf_matching_loss(jnp.array([0.75, 0.25, 0.5]), uniform()), 0, atol=1e-12)
  np.testing.assert_allclose(cdf_matching_loss(jnp.array([0.9]), uniform()), 0.16, rtol=1e-6)
  np.testing.assert_allclose(batch_shaping_loss(jnp.log(jnp.array([9.0])), uniform()), 0.16, rtol=1e-6)


def test_constant_gates_at_batch_256(library_sort):
  loss = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))
  logits = jnp.broadcast_to(jnp.array([-1e4, 0.0, 1e4]), (256, 3))
  np.testing.assert_allclose(loss(logits), [0.33268, 0.09612, 0.33268], atol=5e-6)
  probs = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0]), (256, 3))
  loss = jax.jit(lambda p: cdf_matching_loss(p, beta(0.6, 0.4)))
  np.testing.assert_allclose(loss(probs), [0.33268, 0.09612, 0.33268], atol=5e-6)


@pytest.mark.parametrize(("n", "columns"), [(7, 20_000), (256, 3000)])
def test_samples_of_the_prior_have_the_noise_floor_as_their_mean_loss(n, columns, library_sort):
  rng = np.random.default_rng(n)
  loss = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))
  logit_sample = lambda a, b: special.logit(np.clip(rng.beta(a, b, (n, columns)), 1e-300, 1 - 1e-16)).astype(np.float32)
  losses = np.asarray(loss(logit_sample(0.6, 0.4)), np.float64)
  floor = noise_floor(n)
  assert abs(losses.mean() - floor) < 4 * losses.std() / np.sqrt(columns)
  np.testing.assert_allclose(losses.mean(), floor, rtol=0.06)
  assert np.mean(loss(logit_sample(2, 6))) > 1.2 * floor


def test_the_noise_floor_by_hand():
  np.testing.assert_allclose([noise_floor(1), noise_floor(256)], [1 / 12, 0.000649], rtol=1e-3)


def test_plain_gradient_steps_spread_narrow_gates_over_the_prior():
  means = np.array([-3.0, 0.0, 3.0])
  start = np.random.default_rng(0).normal(means, 0.1, (256, 3)).astype(np.float32)
  loss = lambda z: 256 * jnp.sum(batch_shaping_loss(z, beta(0.6, 0.4)))
  step = lambda z, _: (z - 0.5 * jax.grad(loss)(z), None)
  end = np.asarray(jax.jit(lambda z: jax.lax.scan(step, z, length=2000)[0])(start), np.float64)
  open_before, open_after = (start > 0).mean(0), (end > 0).mean(0)
  np.testing.assert_array_equal(open_before[[0, 2]], [0, 1])
  np.testing.assert_allclose(open_after, [0.617] * 3, atol=5e-4)
  mean_p = special.expit(end).mean(0)
  assert ((mean_p > 0.5995) & (mean_p < 0.6015)).all()
  rank = (np.argsort(np.argsort(end, 0), 0) + 1) / 257
  gap = special.betainc(0.6, 0.4, special.expit(end)) - rank
  np.testing.assert_allclose((gap**2).sum(0), [0.011] * 3, atol=1e-3)


def unique_values(shape, seed):
  """float64 in (-3, 3), at least 1e-3 apart."""
  rng = np.random.default_rng(seed)
  n = int(np.prod(shape))
  return (rng.permutation(n) + rng.uniform(0.2, 0.8, n)).reshape(shape) * 6 / n - 3


@pytest.mark.parametrize(("shape", "axis", "prior"), [
    ((1, 2), 0, beta(0.6, 0.4)),
    ((2, 2), 0, beta(0.6, 0.4)),
    ((3, 2), 0, beta(0.6, 0.4)),
    ((2, 7), -1, beta(0.6, 0.4)),
    ((8, 2), 0, beta(0.6, 0.4)),
    ((2, 5, 2), 1, beta(0.6, 0.4)),
    ((13,), 0, beta(0.6, 0.4)),
    ((3, 2), 0, beta(2, 6)),
    ((2, 5, 2), 1, uniform()),
], ids=lambda v: getattr(v, "name", str(v)))
def test_gradients_are_the_finite_differences(shape, axis, prior, central_differences):
  x = unique_values(shape, seed=shape[axis])
  weights = np.random.default_rng(1).uniform(1, 2, np.delete(shape, axis))
  on_logits = lambda z: jnp.sum(weights * batch_shaping_loss(z, prior, axis=axis))
  gradient = np.asarray(jax.jit(jax.grad(on_logits))(x))
  assert np.abs(gradient).max() > 1e-3
  np.testing.assert_allclose(gradient, central_differences(on_logits, x), atol=2e-6)
  p = 0.5 + x / 7
  on_probs = lambda p: jnp.sum(weights * cdf_matching_loss(p, prior, axis=axis))
  gradient = np.asarray(jax.jit(jax.grad(on_probs))(p))
  assert np.abs(gradient).max() > 1e-3
  np.testing.assert_allclose(gradient, central_differences(on_probs, p), atol=2e-5)


def test_the_axis_only_moves_the_batch():
  x = unique_values((4, 2, 3), seed=0).astype(np.float32)
  expected = np.mean((special.expit(np.sort(x, 0)) - np.arange(1, 5).reshape(4, 1, 1) / 5) ** 2, 0)
  assert np.ptp(expected) > 1e-3
  for axis, moved in ((0, x), (1, np.moveaxis(x, 0, 1)), (-1, np.moveaxis(x, 0, -1))):
    np.testing.assert_allclose(batch_shaping_loss(moved, uniform(), axis=axis), expected, rtol=1e-5)


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), beta(0.05, 50), uniform()], ids=lambda p: p.name)
def test_saturated_logits_have_finite_losses_and_gradients(prior):
  columns = [
      [-1e4, 1e4, 0.0, -110.0, 110.0, 30.0],
      [1e4] * 6,
      [-1e4] * 6,
      [0.0] * 6,
      [-1e4, 1e4] * 3,
      [16.0, 17.0, 88.0, 89.0, 103.0, 104.0],
      [-16.0, -17.0, -88.0, -89.0, -103.0, -104.0],
  ]
  value, pullback = jax.vjp(jax.jit(lambda z: batch_shaping_loss(z, prior)), np.array(columns, np.float32).T)
  gradient = np.asarray(pullback(jnp.ones_like(value))[0])
  assert np.isfinite(value).all()
  assert np.isfinite(gradient).all()
  tail = np.sort([np.where(v > 0, 1.0, 0.0) for v in columns[4]])
  np.testing.assert_allclose(value[4], np.mean((tail - np.arange(1, 7) / 7) ** 2), rtol=1e-5)


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), beta(0.05, 50), uniform()], ids=lambda p: p.name)
def test_probabilities_of_exactly_zero_and_one_have_finite_losses_and_gradients(prior):
  columns = np.array([[0.0, 1.0, 0.5, 0.0, 1.0, 1e-30], [0.0] * 6, [1.0] * 6, [0.0, 1.0] * 3], np.float32)
  value, pullback = jax.vjp(jax.jit(lambda p: cdf_matching_loss(p, prior)), columns.T)
  gradient = np.asarray(pullback(jnp.ones_like(value))[0])
  assert np.isfinite(gradient).all()
  place = np.arange(1, 7) / 7
  expected = [np.mean((end - place) ** 2) for end in (np.zeros(6), np.ones(6), np.repeat([0.0, 1.0], 3))]
  np.testing.assert_allclose(value[1:], expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [batch_shaping_loss, cdf_matching_loss])
def test_nan_in_gives_nan_out_in_its_column_only(loss):
  x = unique_values((6, 3), seed=0).astype(np.float32) / 7 + 0.5
  run = jax.jit(jax.value_and_grad(lambda x: (lambda v: (jnp.sum(v), v))(loss(x, beta(0.6, 0.4))), has_aux=True))
  (_, clean), clean_gradient = run(x)
  assert np.isfinite(clean).all()
  (_, value), gradient = run(np.where(np.arange(18).reshape(6, 3) == 7, np.nan, x))
  np.testing.assert_array_equal(np.isnan(value), [False, True, False])
  assert np.isnan(gradient[2, 1])
  np.testing.assert_array_equal(value[::2], clean[::2])
  np.testing.assert_array_equal(gradient[:, ::2], clean_gradient[:, ::2])


def test_equal_gates_move_together():
  z = jnp.array([[0.5], [-1.0], [0.5], [0.5]])
  gradient = jax.jit(jax.grad(lambda z: jnp.sum(batch_shaping_loss(z, beta(0.6, 0.4)))))(z)[:, 0]
  assert gradient[1] != gradient[0]
  np.testing.assert_array_equal(gradient[jnp.array([2, 3])], [gradient[0]] * 2)


def test_bfloat16_logits_are_compared_in_float32():
  z = jnp.array([[0.5], [-1.0], [2.5], [0.25]])
  loss = batch_shaping_loss(z.astype(jnp.bfloat16), uniform())
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, batch_shaping_loss(z, uniform()), rtol=1e-6)


def test_integer_features_are_ranked_as_reals():
  wide = Prior("linear", cdf=lambda x: x / 10, pdf=lambda x: jnp.full_like(x, 0.1))
  np.testing.assert_allclose(cdf_matching_loss(jnp.array([8, 1, 5]), wide), (0.15**2 + 0 + 0.05**2) / 3, rtol=1e-5)


def test_jit_and_vmap_agree():
  z = unique_values((3, 4, 2), seed=3).astype(np.float32)
  loss = lambda z: batch_shaping_loss(z, beta(0.6, 0.4))
  np.testing.assert_allclose(jax.jit(jax.vmap(loss))(z), np.stack([loss(v) for v in z]), rtol=1e-5)


@pytest.mark.parametrize("values", [
    [3.0, 1.0, 2.0], [0.7, 0.1, 0.4, 0.1], [1.0] * 5, [0.0, -0.0, 1.0], [np.inf, 2.0, -np.inf, np.inf], [4.0]
], ids=str)
def test_the_empirical_cdf_is_the_mean_rank(values):
  x = jnp.array(values)
  np.testing.assert_allclose(empirical_cdf(x), stats.rankdata(values) / (len(values) + 1), rtol=1e-6)


def test_the_empirical_cdf_ranks_along_any_axis_without_gradient():
  x = np.random.default_rng(0).integers(0, 3, (2, 5, 2)).astype(np.float32)
  ranks = jax.jit(empirical_cdf, static_argnums=1)
  np.testing.assert_allclose(ranks(x, 1), stats.rankdata(x, axis=1) / 6, rtol=1e-6)
  np.testing.assert_allclose(ranks(x, -3), stats.rankdata(x, axis=0) / 3, rtol=1e-6)
  np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: empirical_cdf(x, 1).sum()))(x), np.zeros_like(x))
  np.testing.assert_allclose(empirical_cdf(jnp.array([30, 10, 20])), [0.75, 0.25, 0.5])


def test_a_prior_without_a_logit_axis_is_named():
  real_line = Prior("normal(0, 1)", cdf=jax.scipy.stats.norm.cdf, pdf=jax.scipy.stats.norm.pdf)
  message = "prior must have a logit axis, that is, live on [0, 1]; got normal(0, 1); use cdf_matching_loss"
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    batch_shaping_loss(jnp.zeros((3, 1)), real_line)
  np.testing.assert_allclose(cdf_matching_loss(jnp.zeros((1, 2)), real_line), [0, 0], atol=1e-12)


@pytest.mark.parametrize(("loss", "name"), [(batch_shaping_loss, "logits"), (cdf_matching_loss, "x")])
def test_an_empty_batch_and_a_missing_axis_are_named(loss, name):
  with pytest.raises(ValueError, match=rf"^{name} must hold at least one example along axis 0; got shape \(0, 3\)$"):
    loss(jnp.zeros((0, 3)), uniform())
  with pytest.raises(ValueError, match=r"^axis must name an axis of the input; got axis 2, shape \(4, 3\)$"):
    loss(jnp.zeros((4, 3)), uniform(), axis=2)
