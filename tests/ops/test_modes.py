"""Every function of `ops` in every mode of JAX. Numbers are NumPy's float64, which promote most."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.ops import (
  compaction,
  confidence,
  cpu_convs,
  ecdf,
  macs,
  native_kernels,
  pallas_kernels,
  penalties,
  priors,
  quantiles,
  ranking,
  relaxations,
  selection,
)
from gating_jax.types import GateRecord
from tests.helpers import spread_loss
from tests.helpers.modes import assert_same, computed, every_mode, traced

N, C = 6, 4
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 2, (N, C))
EACH = np.linspace(0.3, 0.7, C)  # float64, one for each column
WEIGHTS = {
  "none": None,
  "truth values": np.arange(N) > 1,
  "integers": np.arange(N),
  "float64": np.linspace(0, 2, N),
  "one for each value": np.linspace(0, 2, N * C).reshape(N, C),
}
VALID = np.arange(C) < np.array([4, 3, 4, 1, 2, 4])[:, None]
HALF, SIX_TENTHS = np.float64(0.5), np.float64(0.6)
BETA = priors.beta(SIX_TENTHS, np.float64(0.4))
# from_cdf's functions are a user's own, whose constants may be of any type.
EXPONENTIAL = priors.from_cdf(lambda x: 1 - jnp.exp(-x), lambda x: jnp.exp(-x))


def gradient(loss, argnums=0):
  return lambda *args: jax.value_and_grad(lambda *args: jnp.sum(loss(*args)), argnums)(*args)


def shaped(prior, **options):
  return gradient(lambda x: ecdf.batch_shaping_loss(x, prior, **options))


def matched(prior, to_support=lambda x: x):
  return gradient(lambda x: ecdf.cdf_matching_loss(to_support(x), prior))


def learned(make_prior, to_support=jax.nn.sigmoid):
  """Computes the gradient in the parameters of a prior, float32 for any type of logits."""

  def loss(x, each):
    return ecdf.cdf_matching_loss(to_support(x), make_prior(each))

  return lambda x: gradient(loss, (0, 1))(x, EACH.astype(np.float32))


def densities(prior):
  def of(x):
    p = jax.nn.sigmoid(x)
    on_logits = (prior.logit_cdf(x), prior.logit_pdf(x)) if prior.logit_cdf else ()
    return prior.cdf(p), prior.pdf(p), on_logits, jax.grad(lambda p: jnp.sum(prior.cdf(p)))(p)

  return of


LOSSES = {
  **{f"shaping, weights: {name}": shaped(BETA, weights=w) for name, w in WEIGHTS.items()},
  "ties": lambda x: shaped(BETA)(jnp.round(x)),
  "one column": lambda x: shaped(BETA)(x[:, 0]),
  "rank 3, another axis": lambda x: shaped(BETA, axis=1)(x.reshape(N, 2, 2)),
  "large parameters": shaped(priors.beta(300, 200)),
  "parameters of float64": shaped(priors.beta(EACH, SIX_TENTHS)),
  "matching": matched(BETA, jax.nn.sigmoid),
  "uniform": matched(priors.uniform(), jax.nn.sigmoid),
  "normal": matched(priors.normal(np.float64(0), np.float64(2))),
  "normal, one for each": matched(priors.normal(EACH, 2 * EACH)),
  "relaxed Bernoulli": shaped(priors.relaxed_bernoulli(SIX_TENTHS, HALF)),
  "relaxed Bernoulli, one for each": shaped(priors.relaxed_bernoulli(EACH, EACH)),
  "custom": matched(EXPONENTIAL, jnp.exp),
  "samples": matched(priors.empirical(LOGITS)),
  "samples of one column": matched(priors.empirical(LOGITS[:, 0])),
}
PARAMETERS = {
  "beta": learned(lambda each: priors.beta(each, SIX_TENTHS)),
  "symmetric beta": learned(priors.symmetric_beta),
  "relaxed Bernoulli": learned(lambda each: priors.relaxed_bernoulli(each, HALF)),
  "normal": learned(lambda each: priors.normal(each, HALF), lambda x: x),
  "samples": gradient(lambda x: ecdf.cdf_matching_loss(x[:3], priors.empirical(x[3:]))),
  "generalised": lambda x: gradient(
    lambda x, means: sum(
      map(
        jnp.sum,
        (
          ecdf.generalised_batch_shaping_loss(
            x, means, lambda mean: priors.relaxed_bernoulli(mean, HALF), BETA
          )
        ),
      )
    ),
    (0, 1),
  )(x, x[0]),
}
PRIORS = {
  "beta": densities(BETA),
  "beta, one for each": densities(priors.beta(EACH, SIX_TENTHS)),
  "relaxed Bernoulli": densities(priors.relaxed_bernoulli(EACH, HALF)),
  "normal": densities(priors.normal(EACH)),
  "uniform": densities(priors.uniform()),
  "custom": densities(EXPONENTIAL),
  "samples": densities(priors.empirical(LOGITS)),
  "ranks": lambda x: (ecdf.empirical_cdf(x), ecdf.empirical_cdf(jnp.round(x), axis=1)),
  "sort": lambda x: gradient(lambda x: ranking.sort_with_vjp(x) ** 2)(x),
  "sort of ties": lambda x: gradient(lambda x: ranking.sort_with_vjp(jnp.round(x), axis=1) ** 2)(x),
}
SECOND = {
  "fixed prior": lambda x: jax.hessian(lambda x: jnp.sum(ecdf.batch_shaping_loss(x, BETA)))(x),
  "learned prior": lambda x: jax.hessian(
    lambda each: jnp.sum(ecdf.batch_shaping_loss(x, priors.beta(each, SIX_TENTHS)))
  )(x[0] ** 2 + 1),
  "uniform": lambda x: jax.hessian(
    lambda x: jnp.sum(ecdf.cdf_matching_loss(jax.nn.sigmoid(x), priors.uniform()))
  )(x),
  "sort": lambda x: jax.hessian(lambda x: jnp.sum(ranking.sort_with_vjp(x) ** 3))(x[:, 0]),
}


def sampled(gate):
  def of(x):
    draw = functools.partial(gate, jax.random.key(0))
    traced = jnp.float32(0.5)
    return (
      draw(x),
      draw(x, temperature=HALF, noise_scale=HALF),
      draw(x, temperature=traced, noise_scale=traced),
      gradient(draw)(x),
    )

  return of


GATES = {
  "straight through": sampled(relaxations.straight_through_gate),
  "binary concrete": sampled(relaxations.binary_concrete),
  "hard concrete": sampled(relaxations.hard_concrete),
  "open probability": lambda x: relaxations.hard_concrete_open_prob(x, temperature=HALF),
  "location": lambda x: relaxations.hard_concrete_location(x, temperature=HALF),
  "evaluation": lambda x: (
    relaxations.hard_concrete_mean(x),
    relaxations.clipped_sigmoid(x),
    relaxations.threshold_gate(x),
    relaxations.straight_through(x, temperature=HALF),
  ),
}


def records(x):
  probs = jax.nn.sigmoid(x)
  gates = (x > 0).astype(x.dtype)
  return GateRecord(x, probs, gates, 10), GateRecord(x, probs, gates, 5, 3)


def on_records(loss):
  return gradient(lambda x: loss(records(x)))


def on_probs(loss):
  return gradient(lambda x: loss([jax.nn.sigmoid(x), jax.nn.sigmoid(x[:, :2])]))


PENALTIES = {
  "L0": on_probs(penalties.l0_loss),
  "target rate": on_probs(lambda probs: penalties.target_rate_loss(probs, target=SIX_TENTHS)),
  "entropy": on_probs(penalties.entropy_loss),
  "decision entropy": on_probs(penalties.decision_entropy_loss),
  "indecision": on_probs(penalties.indecision_loss),
  "balance": on_records(penalties.balance_loss),
  "MACs": on_records(penalties.mac_loss),
  "budget": on_records(lambda r: penalties.mac_budget_loss(r, never_gated_macs=9, budget=HALF)),
  "counts": lambda x: (macs.executed_macs(records(x)), macs.expected_macs(records(x))),
}
QUANTILES = {
  "share": lambda x: quantiles.open_threshold(x, share=SIX_TENTHS),
  "traced share": lambda x: jax.vmap(lambda s: quantiles.open_threshold(x, share=s))(
    x[0] ** 2 / 99
  ),
  "weights": lambda x: quantiles.open_threshold(x, share=0.3, weights=np.linspace(0, 2, N)),
  "truth values for weights": lambda x: quantiles.open_threshold(x, share=0.3, weights=VALID),
  "unweighted": gradient(lambda x: penalties.unweighted(jnp.abs(x))),
}
SELECTION = {
  "repair": lambda x: gradient(
    lambda x: selection.ensure_one_open(x * (x > 2).astype(x.dtype), x, VALID)
  )(x),
  "repair of truth values": lambda x: selection.ensure_one_open(x > 2, x, VALID),
  "best": lambda x: selection.top_k(x, VALID, k=2),
  "best, some for each": lambda x: selection.top_k(x, VALID, k=np.arange(N)),
  "uniform": lambda x: (
    selection.uniform_k(VALID, k=2),
    selection.uniform_k(VALID, k=np.arange(1, N + 1)),
  ),
  "random": lambda x: selection.random_k(jax.random.key(0), VALID, k=2),
  "first": lambda x: (selection.first_k(VALID, k=2), selection.first_k(VALID, k=np.arange(N))),
  "number": lambda x: (
    selection.budget_to_k(VALID, share=0.3),
    selection.budget_to_k(VALID, share=2),
  ),
  "exits": lambda x: (
    confidence.entropy_share(x),
    confidence.stay_logits(x.reshape(3, 2, C), threshold=HALF),
  ),
  "first sure": lambda x: confidence.first_sure(x.reshape(3, 2, C), x[:3, :1]),
  "open units": lambda x: compaction.open_indices(x[:, 0], capacity=3),
  "put back": lambda x: compaction.scatter_back(
    x[:3], *compaction.open_indices(x[:, 0], capacity=3), size=N
  ),
  "open backward": gradient(
    lambda x: (
      x[:, :1]
      * compaction.open_backward(
        lambda scale, x: scale * x, x[0, 0], x, (x[:, 0] > 0).astype(x.dtype), capacity=N
      )
    )
  ),
}


def images(x):
  return jnp.resize(x, (2, 4, 4, 4))


def kernel(x, *shape):
  return jnp.resize(x, shape)


def branch(x):
  return pallas_kernels.Branch(kernel(x, 3, 3, 4, 4), x[0], kernel(x, 1, 1, 4, 2), x[0, :2])


ONE = ((1, 1), (1, 1))
WINDOWS = {
  "clips": lambda x: cpu_convs.convolve_clips(
    images(x)[:, :, None], kernel(x, 3, 1, 3, 4, 2), (1, 1, 1), ((1, 1), (0, 0), (1, 1))
  ),
  "images": lambda x: cpu_convs.convolve_images(images(x), kernel(x, 3, 3, 4, 2), (2, 2), ONE),
  "doubled": lambda x: cpu_convs.convolve_doubled(images(x), kernel(x, 3, 3, 4, 2)),
  "depthwise": lambda x: cpu_convs.convolve_depthwise(
    images(x), kernel(x, 3, 3, 1, 4), (1, 1), ONE
  ),
  "pool": lambda x: cpu_convs.max_pool(images(x), (3, 3), (2, 2)),
}
BRANCHES = {
  name: lambda x, way=way: way(branch(x), images(x), x[:2, :2] > 0)
  for name, way in {
    "masked": pallas_kernels.masked_branch,
    "dispatched": functools.partial(pallas_kernels.dispatched_branch, capacity=1),
    "gated": pallas_kernels.gated_branch,
  }.items()
}


def chain(x, run, weighted=None):
  kernels_ = [native_kernels.packed(kernel(x, *shape)) for shape in ((3, 3, 4, 4), (1, 1, 4, 2))]
  biases = (x[0], x[0, :2])
  gates = (x[:2], x[2:4] > 0, None)
  return run(images(x), kernels_, biases, gates, weighted=weighted)


WEIGHTED = (True, False)
CHAINS = {
  "twin": lambda x: chain(x, native_kernels.masked_chain),
  "weighted twin": lambda x: chain(x, native_kernels.masked_chain, WEIGHTED),
}
if native_kernels.available():
  CHAINS["native"] = lambda x: chain(x, native_kernels.gated_chain)
  CHAINS["weighted native"] = lambda x: chain(x, native_kernels.gated_chain, WEIGHTED)

HALVES = (jnp.bfloat16, jnp.float16)
ALL = (jnp.float32, *HALVES)
# Some of those above, with what is most likely to differ: a fast test computes their values.
FEW = {
  "shaping": LOSSES["shaping, weights: float64"],
  "samples": LOSSES["samples"],
  "beta": PARAMETERS["beta"],
  "custom": PRIORS["custom"],
  "second derivatives": SECOND["uniform"],
}
SMALL = {  # calls, and the types that they take
  "few": (FEW, ALL),
  "gates": (GATES, ALL),
  "penalties": (PENALTIES, ALL),
  "quantiles": (QUANTILES, ALL),
  "selection": (SELECTION, ALL),
  "windows": (WINDOWS, ALL),
  "branches": (BRANCHES, (jnp.float32, jnp.bfloat16)),
  "chains": (CHAINS, (jnp.float32,)),
}
GROUPS = {
  **SMALL,
  "losses": (LOSSES, ALL),
  "parameters": (PARAMETERS, (jnp.float32, jnp.float16)),
  "priors": (PRIORS, (jnp.float32, jnp.bfloat16)),
  "second derivatives": (SECOND, (jnp.float32, jnp.float16)),
}


def values_to_compare():
  """Tests each group with each of its types; the fast tier computes the small ones in one type."""
  cases = []
  for group, (_, dtypes) in GROUPS.items():
    for i, dtype in enumerate(dtypes):
      fast = group in SMALL and i == len(group) % len(dtypes)
      marks = () if fast else pytest.mark.slow
      cases.append(pytest.param(group, dtype, marks=marks, id=f"{group}-{dtype.__name__}"))
  return cases


@functools.cache
def usual(of, group, dtype):
  return of(GROUPS[group][0], LOGITS.astype(dtype))


@pytest.mark.parametrize("group", ["losses", "priors"])
def test_types_are_the_same_in_every_mode(group):
  without = usual(traced, group, np.float32)
  with every_mode():
    assert_same(traced(GROUPS[group][0], LOGITS.astype(np.float32)), without)


@pytest.mark.parametrize(("group", "dtype"), values_to_compare())
def test_values_and_types_are_the_same_in_every_mode(group, dtype):
  without = usual(computed, group, dtype)
  with every_mode():
    assert_same(computed(GROUPS[group][0], LOGITS.astype(dtype)), without)


def weighted_each(params, batch, logits, **options):
  """With a weight for each value, and truth values for another loss."""
  weights = jnp.broadcast_to(batch["weights"][:, None], logits.shape)
  masked = ecdf.batch_shaping_loss(logits, BETA, weights=batch["weights"] > 1, **options)
  return masked + ecdf.cdf_matching_loss(logits, priors.normal(), weights=weights, **options)


TERMS = [
  spread_loss.weighted,
  weighted_each,
  spread_loss.learned_beta,
  spread_loss.fixed_prior,
  spread_loss.learned_relaxed_bernoulli,
  spread_loss.reference_samples,
]
WAYS = {
  "shard_map": functools.partial(spread_loss.by_shard_map, check_vma=True),
  "pmap": spread_loss.by_pmap,
}


@functools.cache
def usual_over_devices(way, term, exchange):
  return jax.tree.map(np.asarray, WAYS[way](*spread_loss.problem(), term, exchange))


@pytest.mark.thin(12)
@pytest.mark.parametrize("exchange", ecdf.EXCHANGES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("term", TERMS)
def test_values_and_types_over_devices_are_the_same_in_every_mode(term, way, exchange):
  without = usual_over_devices(way, term, exchange)
  with every_mode():
    found = WAYS[way](*spread_loss.problem(), term, exchange)
    assert_same(jax.tree.map(np.asarray, found), without)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, every_mode])
def test_integers_and_truth_values_have_the_loss_of_the_same_in_float32(mode):
  whole = np.round(LOGITS).astype(np.int32)
  with mode():
    for x in (whole, whole.astype(np.int8), whole > 0):
      loss = jax.jit(ecdf.cdf_matching_loss, static_argnums=1)
      found, wanted = loss(x, priors.uniform()), loss(x.astype(np.float32), priors.uniform())
      assert found.dtype == jnp.float32
      np.testing.assert_array_equal(found, wanted)
