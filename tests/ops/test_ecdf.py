import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from gating_jax.ops import ranking
from gating_jax.ops.ecdf import (
  _mean_rank,
  batch_shaping_loss,
  cdf_matching_loss,
  empirical_cdf,
  generalised_batch_shaping_loss,
  noise_floor,
)
from gating_jax.ops.priors import Prior, beta, empirical, normal, relaxed_bernoulli, uniform
from gating_jax.types import GateRecord

# Sum form and d/dp of p = [0.7, 0.1, 0.95, 0.4] as one gate, by SciPy's `betainc` in float64.
PROBS = np.array([0.7, 0.1, 0.95, 0.4])
GOLDEN = [
  (beta(0.6, 0.4), 0.018932542863914, [-0.1236429045, -0.1138296860, -0.1106583266, -0.0897803745]),
  (beta(0.5, 0.5), 0.005457716838903, [0.0430517070, 0.0102554452, 0.1648435263, 0.0466593738]),
  (beta(2, 6), 0.394319465485171, [0.0566119553, -0.2495216115, 0.0000049875, 1.1531822432]),
  (uniform(), 0.0425, [0.2, -0.2, 0.3, 0.0]),
]
# One program each: without jit, every operation on a new shape is compiled on its own.
matching, shaping = (
  jax.jit(loss, static_argnames=("prior", "axis"))
  for loss in (cdf_matching_loss, batch_shaping_loss)
)
places = jax.jit(empirical_cdf, static_argnames="axis")
golden = pytest.mark.parametrize(
  ("prior", "loss", "slope"), GOLDEN, ids=[g[0].name for g in GOLDEN]
)


@pytest.fixture
def library_sort(monkeypatch):
  """Uses XLA's sort in place of the network, which takes seconds to compile at 256 values.

  test_ranking compares the two.
  """
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


def test_an_exactly_placed_batch_has_no_loss_and_one_value_that_by_hand():
  np.testing.assert_allclose(matching(jnp.array([0.75, 0.25, 0.5]), uniform()), 0, atol=1e-12)
  np.testing.assert_allclose(matching(jnp.array([0.9]), uniform()), 0.16, rtol=1e-6)
  np.testing.assert_allclose(shaping(jnp.log(jnp.array([9.0])), uniform()), 0.16, rtol=1e-6)


def test_constant_gates_at_batch_256(library_sort):
  loss = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))
  logits = jnp.broadcast_to(jnp.array([-1e4, 0.0, 1e4]), (256, 3))
  np.testing.assert_allclose(loss(logits), [0.33268, 0.09612, 0.33268], atol=5e-6)
  probs = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0]), (256, 3))
  loss = jax.jit(lambda p: cdf_matching_loss(p, beta(0.6, 0.4)))
  np.testing.assert_allclose(loss(probs), [0.33268, 0.09612, 0.33268], atol=5e-6)


@pytest.mark.parametrize(
  ("n", "columns"), [(7, 20_000), pytest.param(256, 3000, marks=pytest.mark.slow)]
)
def test_samples_of_the_prior_have_the_noise_floor_as_their_mean_loss(n, columns, library_sort):
  rng = np.random.default_rng(n)
  loss = jax.jit(lambda z: batch_shaping_loss(z, beta(0.6, 0.4)))
  logit_sample = lambda a, b: special.logit(
    np.clip(rng.beta(a, b, (n, columns)), 1e-300, 1 - 1e-16)
  ).astype(np.float32)
  losses = np.asarray(loss(logit_sample(0.6, 0.4)), np.float64)
  floor = noise_floor(n)
  assert abs(losses.mean() - floor) < 4 * losses.std() / np.sqrt(columns)
  np.testing.assert_allclose(losses.mean(), floor, rtol=0.06)
  assert np.mean(loss(logit_sample(2, 6))) > 1.2 * floor


def test_the_noise_floor_by_hand():
  np.testing.assert_allclose([noise_floor(1), noise_floor(256)], [1 / 12, 0.000649], rtol=1e-3)


@pytest.mark.slow
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


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  ("shape", "axis", "prior"),
  [
    ((1, 2), 0, beta(0.6, 0.4)),
    ((2, 2), 0, beta(0.6, 0.4)),
    ((2, 7), -1, beta(0.6, 0.4)),
    ((3, 2), 0, beta(0.6, 0.4)),
    ((3, 2), 0, beta(2, 6)),
    ((8, 2), 0, beta(0.6, 0.4)),
    ((13,), 0, beta(0.6, 0.4)),
    ((2, 5, 2), 1, beta(0.6, 0.4)),
    ((2, 5, 2), 1, uniform()),
  ],
  ids=lambda v: getattr(v, "name", str(v)),
)
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
    np.testing.assert_allclose(shaping(moved, uniform(), axis=axis), expected, rtol=1e-5)


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
  value, pullback = jax.vjp(
    jax.jit(lambda z: batch_shaping_loss(z, prior)), np.array(columns, np.float32).T
  )
  gradient = np.asarray(pullback(jnp.ones_like(value))[0])
  assert np.isfinite(value).all()
  assert np.isfinite(gradient).all()
  tail = np.sort([np.where(v > 0, 1.0, 0.0) for v in columns[4]])
  np.testing.assert_allclose(value[4], np.mean((tail - np.arange(1, 7) / 7) ** 2), rtol=1e-5)


@pytest.mark.parametrize("prior", [beta(0.6, 0.4), beta(0.05, 50), uniform()], ids=lambda p: p.name)
def test_probabilities_of_exactly_zero_and_one_have_finite_losses_and_gradients(prior):
  columns = np.array(
    [[0.0, 1.0, 0.5, 0.0, 1.0, 1e-30], [0.0] * 6, [1.0] * 6, [0.0, 1.0] * 3], np.float32
  )
  value, pullback = jax.vjp(jax.jit(lambda p: cdf_matching_loss(p, prior)), columns.T)
  gradient = np.asarray(pullback(jnp.ones_like(value))[0])
  assert np.isfinite(gradient).all()
  place = np.arange(1, 7) / 7
  expected = [
    np.mean((end - place) ** 2) for end in (np.zeros(6), np.ones(6), np.repeat([0.0, 1.0], 3))
  ]
  np.testing.assert_allclose(value[1:], expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [batch_shaping_loss, cdf_matching_loss])
def test_nan_in_gives_nan_out_in_its_column_only(loss):
  x = unique_values((6, 3), seed=0).astype(np.float32) / 7 + 0.5
  run = jax.jit(
    jax.value_and_grad(lambda x: (lambda v: (jnp.sum(v), v))(loss(x, beta(0.6, 0.4))), has_aux=True)
  )
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
  loss = shaping(z.astype(jnp.bfloat16), uniform())
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, shaping(z, uniform()), rtol=1e-6)


def test_integer_features_are_ranked_as_reals():
  wide = Prior("linear", cdf=lambda x: x / 10, pdf=lambda x: jnp.full_like(x, 0.1))
  np.testing.assert_allclose(
    matching(np.array([8, 1, 5]), wide), (0.15**2 + 0 + 0.05**2) / 3, rtol=1e-5
  )


def test_of_a_record_the_logits_count():
  logits = jax.random.normal(jax.random.key(0), (6, 2))
  record = GateRecord(logits=logits, probs=None, gates=None)
  prior = beta(0.6, 0.4)
  np.testing.assert_array_equal(
    batch_shaping_loss(record, prior), batch_shaping_loss(logits, prior)
  )


def test_jit_and_vmap_agree():
  z = unique_values((3, 4, 2), seed=3).astype(np.float32)
  loss = lambda z: batch_shaping_loss(z, uniform())
  np.testing.assert_allclose(jax.jit(jax.vmap(loss))(z), np.stack([loss(v) for v in z]), rtol=1e-5)


@pytest.mark.parametrize(
  "values",
  [
    [3.0, 1.0, 2.0],
    [0.7, 0.1, 0.4, 0.1],
    [1.0] * 5,
    [0.0, -0.0, 1.0],
    [np.inf, 2.0, -np.inf, np.inf],
    [4.0],
  ],
  ids=str,
)
def test_the_empirical_cdf_is_the_mean_rank(values):
  x = np.array(values, np.float32)
  np.testing.assert_allclose(places(x), stats.rankdata(values) / (len(values) + 1), rtol=1e-6)


def test_the_mean_rank_of_ties_does_not_wrap_at_32_bits():
  first, last = jnp.array([0, 3, 2**31 - 9]), jnp.array([1, 3, 2**31 - 3])
  assert _mean_rank(first, last, np.float32).tolist() == [1.5, 4, 2**31]


def test_the_empirical_cdf_ranks_along_any_axis_without_gradient():
  x = np.random.default_rng(0).integers(0, 3, (2, 5, 2)).astype(np.float32)
  np.testing.assert_allclose(places(x, axis=1), stats.rankdata(x, axis=1) / 6, rtol=1e-6)
  np.testing.assert_allclose(places(x, axis=-3), stats.rankdata(x, axis=0) / 3, rtol=1e-6)
  np.testing.assert_array_equal(
    jax.jit(jax.grad(lambda x: empirical_cdf(x, axis=1).sum()))(x), np.zeros_like(x)
  )
  np.testing.assert_allclose(places(np.array([30, 10, 20])), [0.75, 0.25, 0.5])


def test_a_prior_without_a_logit_axis_is_named():
  real_line = Prior("normal(0, 1)", cdf=jax.scipy.stats.norm.cdf, pdf=jax.scipy.stats.norm.pdf)
  message = (
    "prior must have a logit axis, so its support must be [0, 1]; got normal(0, 1); "
    "use cdf_matching_loss"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    batch_shaping_loss(jnp.zeros((3, 1)), real_line)
  np.testing.assert_allclose(matching(np.zeros((1, 2), np.float32), real_line), [0, 0], atol=1e-12)


@pytest.mark.parametrize(
  ("loss", "name"), [(batch_shaping_loss, "logits"), (cdf_matching_loss, "x")]
)
def test_an_empty_batch_and_a_missing_axis_are_named(loss, name):
  with pytest.raises(
    ValueError, match=rf"^{name} must hold at least one example along axis 0; got shape \(0, 3\)$"
  ):
    loss(jnp.zeros((0, 3)), uniform())
  with pytest.raises(
    ValueError, match=r"^axis must name an axis of the input; got axis 2, shape \(4, 3\)$"
  ):
    loss(jnp.zeros((4, 3)), uniform(), axis=2)


losses = pytest.mark.parametrize(
  ("loss", "prior"),
  [(batch_shaping_loss, beta(0.6, 0.4)), (cdf_matching_loss, normal(0.2, 1.5))],
  ids=["logits", "features"],
)


def value_and_gradient(loss, prior):
  def run(x, weights):
    value = loss(x, prior, weights=weights)
    return jnp.sum(value * jnp.arange(1.0, value.size + 1, dtype=value.dtype)), value

  return jax.jit(jax.value_and_grad(run, has_aux=True))


@losses
def test_a_mask_leaves_rows_out_as_if_they_were_not_there(loss, prior):
  # With ties among all rows.
  x = np.random.default_rng(0).integers(-3, 4, (9, 3)).astype(np.float32) / 2
  x[[2, 5]] = x[[0, 1]]
  keep = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1], bool)
  run = value_and_gradient(loss, prior)
  (_, right), right_gradient = run(x[keep], None)
  x[7] = [np.nan, np.inf, 3e38]
  for mask in (keep, keep.astype(np.float32), np.repeat(keep[:, None], 3, 1)):
    (_, value), gradient = run(x, mask)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    np.testing.assert_allclose(gradient[keep], right_gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[~keep], np.zeros((3, 3)))


@losses
def test_a_whole_weight_has_the_gradient_of_as_many_copies(loss, prior):
  x = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
  x[3] = x[0]
  copies = np.array([1, 3, 0, 2, 1])
  run = value_and_gradient(loss, prior)
  _, gradient = run(x, copies.astype(np.float32))
  _, by_copy = run(np.repeat(x, copies, axis=0), None)
  of = np.repeat(np.arange(5), copies)
  np.testing.assert_allclose(
    gradient, [by_copy[of == i].sum(0) for i in range(5)], rtol=2e-5, atol=1e-7
  )
  assert np.abs(gradient).max() > 1e-3


def test_weights_by_hand_and_one_weight_for_each_value():
  x, weights = jnp.array([[0.9, 0.3], [0.2, 0.3]]), jnp.array([[1.0, 2.0], [2.0, 0.5]])
  levels = np.array(
    [[(3 - 0.5 + 0.5) / 4, (2 - 1 + 0.5) / 3.5], [(2 - 1 + 0.5) / 4, (2.5 - 0.25 + 0.5) / 3.5]]
  )
  right = (weights * (x - levels) ** 2).sum(0) / weights.sum(0)
  np.testing.assert_allclose(matching(x, uniform(), weights=weights), right, rtol=1e-6)
  swapped = matching(x.T, uniform(), axis=1, weights=weights.T)
  np.testing.assert_allclose(swapped, right, rtol=1e-6)


def test_weights_of_nothing_are_no_loss_and_negative_ones_are_not_a_number():
  run = value_and_gradient(batch_shaping_loss, beta(0.6, 0.4))
  x = jnp.array([[1.0, 2.0], [-1.0, jnp.nan]])
  (_, value), gradient = run(x, jnp.zeros(2))
  np.testing.assert_array_equal(value, [0, 0])
  np.testing.assert_array_equal(gradient, np.zeros((2, 2)))
  (_, value), _ = run(jnp.array([[1.0, 2.0], [-1.0, 0.0]]), jnp.array([[1.0, 1.0], [-1.0, 1.0]]))
  np.testing.assert_array_equal(np.isnan(value), [True, False])


def test_what_is_left_out_has_no_part_in_the_gradient_of_learned_parameters():
  x = jnp.array([1.0, 2.0, -1.0, 0.5])  # the prior does not know -1

  def loss(width, x, weights):
    log_normal = Prior(
      "log-normal", lambda x: jax.scipy.stats.norm.cdf(jnp.log(x) / width), lambda x: x
    )
    return cdf_matching_loss(x, log_normal, weights=weights)

  gradient = jax.jit(jax.grad(loss))
  np.testing.assert_allclose(
    gradient(0.7, x, jnp.array([1.0, 1.0, 0.0, 1.0])),
    gradient(0.7, x[jnp.array([0, 1, 3])], None),
    rtol=1e-5,
  )


def test_ties_among_many_have_exact_levels():
  # Longer than the network.
  x = np.random.default_rng(0).integers(0, 700, (2500, 1)).astype(np.float32)
  gap = lambda x: jax.grad(lambda x: jnp.sum(cdf_matching_loss(x, prior)))(x)
  prior = Prior("linear", lambda x: x / 700, lambda x: jnp.full_like(x, 1 / 700))
  scale = 2 / 2500 / 700
  right = scale * (x / 700 - stats.rankdata(x, axis=0) / 2501)
  np.testing.assert_allclose(jax.jit(gap)(x), right, atol=scale * 2e-7)


def test_generalised_loss_is_finite_for_every_finite_mean():
  means = jnp.array([-3e38, -110.0, -20.0, 0.0, 20.0, 110.0, 3e38])
  logits = jnp.linspace(-2, 2, 28).reshape(4, 7)
  for family in (lambda mean: relaxed_bernoulli(mean, 0.4), lambda mean: beta(mean, 1 - mean)):
    loss = lambda z, m: sum(map(jnp.sum, generalised_batch_shaping_loss(z, m, family, beta(3, 7))))  # noqa: B023
    for part in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(logits, means)):
      assert np.isfinite(part).all()


def test_nan_is_never_a_number_whatever_the_prior_makes_of_it():
  x = jnp.array([0.3, jnp.nan, 2.0])
  blind = Prior("blind", lambda x: jnp.where(x > 0, 1 - jnp.exp(-x), 0.0), lambda x: x)
  assert np.isnan(matching(x, blind))
  assert np.isnan(matching(jnp.ones(3), empirical(x)))
  np.testing.assert_array_equal(
    np.isnan(places(jnp.stack([x, jnp.ones(3)], 1))), [[True, False]] * 3
  )
  with pytest.raises(
    ValueError, match=r"^x must hold at least one example along axis 0; got shape \(0, 2\)$"
  ):
    empirical_cdf(jnp.zeros((0, 2)))


@pytest.mark.parametrize(
  "make",
  [
    lambda v: normal(0.0, v),
    lambda v: relaxed_bernoulli(0.5, v),
    lambda v: relaxed_bernoulli(v, 0.5),
    lambda v: beta(v, 0.4),
  ],
  ids=["std", "temperature", "mean", "a"],
)
def test_a_learned_parameter_out_of_range_makes_nan(make):
  loss = jax.jit(lambda v: cdf_matching_loss(jnp.array([0.3, 0.6]), make(v)))
  assert np.isnan(loss(-0.1))
  assert np.isfinite(loss(0.5))


def test_weights_that_do_not_fit_are_named():
  message = (
    "weights must be of shape (4,), one per example, or of the shape of logits, (4, 3); got (3,)"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    batch_shaping_loss(jnp.zeros((4, 3)), uniform(), weights=jnp.ones(3))
  with pytest.raises(ValueError, match="^exchange must be one of .*gather.*; got 'gathr'"):
    batch_shaping_loss(jnp.zeros((4, 3)), uniform(), exchange="gathr")


def test_tied_columns_have_the_value_of_any_order_and_the_mean_levels_gradient():
  value, gradient = jax.jit(jax.value_and_grad(lambda x: cdf_matching_loss(x, uniform())))(
    np.full(4, 0.3, np.float32)
  )
  np.testing.assert_allclose(value, np.mean((0.3 - np.arange(1, 5) / 5) ** 2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [2 / 4 * (0.3 - 0.5)] * 4, rtol=1e-6)


def test_second_derivatives_are_those_of_fixed_ranks(x64):
  x = unique_values((5, 1), seed=0)[:, 0]
  hessian = jax.jit(jax.hessian(lambda z: batch_shaping_loss(z, beta(0.6, 0.4))))(x)
  p, density = special.expit(x), beta(0.6, 0.4).logit_pdf(x)
  slope = density * (0.6 * (1 - p) - 0.4 * p)
  gap = special.betainc(0.6, 0.4, p) - stats.rankdata(x) / 6
  np.testing.assert_allclose(hessian, np.diag(2 / 5 * (density**2 + gap * slope)), atol=1e-7)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  "differentiate",
  [
    lambda f, x: jax.jacfwd(f)(x),
    lambda f, x: jax.jvp(f, (x,), (x,)),
    lambda f, x: jax.jit(jax.jacfwd(f))(x),
  ],
  ids=["jacfwd", "jvp", "jit"],
)
@pytest.mark.parametrize(
  "f", [lambda x: batch_shaping_loss(x, uniform()), ranking.sort_with_vjp], ids=["loss", "sort"]
)
def test_forward_mode_is_refused_with_what_to_use_instead(differentiate, f):
  with pytest.raises(
    TypeError, match="reverse-mode rule only: use jax.grad, jax.vjp or jax.jacrev"
  ):
    differentiate(f, jnp.array([0.5, -1.0]))


EXTREMES = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 1e4, -1e4, 3.3e38, -3.3e38, 16.0, 17.0, -104.0]
ANY_PRIOR = {
  "beta": beta(0.6, 0.4),
  "sharp beta": beta(0.05, 50),
  "learnable beta": beta(np.array([0.6, 50.0], np.float32), np.array([0.4, 0.05], np.float32)),
  "relaxed Bernoulli": relaxed_bernoulli(np.array([0.3, 0.99], np.float32), 0.2),
  "normal": normal(0.5, np.array([1e-3, 2.0], np.float32)),
  "uniform": uniform(),
  "samples": empirical(np.array([0.0, 1.0, 1.0, -5.0], np.float32)),
}


@functools.cache
def both_losses(name):
  """Adds value and gradient of the losses on either axis, as far as the prior has them."""
  prior = ANY_PRIOR[name]
  on_logits = batch_shaping_loss if prior.logit_cdf else lambda *_, **__: 0
  total = lambda x, w, axis: jnp.sum(
    sum(loss(x, prior, weights=w, axis=axis) for loss in (cdf_matching_loss, on_logits))
  )
  return jax.jit(jax.value_and_grad(total), static_argnums=2)


@pytest.mark.parametrize(
  "name",
  [  # a program for each form of each prior
    pytest.param(name, marks=() if name == "beta" else pytest.mark.slow) for name in ANY_PRIOR
  ],
)
@given(
  form=st.sampled_from(
    [(1, jnp.float32, 0), (2, jnp.bfloat16, 0), (6, jnp.float32, 0), (13, jnp.float32, 1)]
  ),
  data=st.data(),
)
def test_finite_inputs_have_a_finite_loss_and_a_gradient_that_follows_examples(name, form, data):
  n, dtype, axis = form
  value = st.sampled_from(EXTREMES) | st.floats(-5, 5, width=32)
  x = jnp.array(data.draw(st.lists(value, min_size=2 * n, max_size=2 * n)), dtype).reshape(n, 2)
  weights = np.array(
    data.draw(st.lists(st.sampled_from([0, 0.5, 1, 3]), min_size=n, max_size=n)), np.float32
  )
  order = np.array(data.draw(st.permutations(range(n))))
  moveaxis = lambda x: x.T if axis else x
  total, gradient = both_losses(name)(moveaxis(x), weights, axis)
  again, moved = both_losses(name)(moveaxis(x[order]), weights[order], axis)
  assert gradient.dtype == dtype
  gradient, moved = (np.asarray(moveaxis(g), np.float32) for g in (gradient, moved))
  assert np.isfinite(total)
  assert np.isfinite(gradient).all()
  assert total >= 0
  np.testing.assert_allclose(again, total, rtol=1e-5, atol=1e-6)
  size = np.abs(gradient).max() + 1e-6
  np.testing.assert_allclose(moved / size, gradient[order] / size, rtol=1e-4, atol=1e-5)
