"""`jax.export` with symbolic sizes: one program for any number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import gating_jax as gj
from gating_jax.ops import penalties, selection

Z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
PRIOR, KEY = gj.beta(0.6, 0.4), jax.random.key(0)


def gradient(loss):
  return jax.value_and_grad(lambda x: jnp.sum(loss(x)))


def record(x):
  return gj.GateRecord(x, jax.nn.sigmoid(x), gj.threshold_gate(x), 3)


def learned(family):
  """The loss to priors whose means are those of the batch."""
  return gradient(
    lambda x: gj.batch_shaping_loss(x, family(0.2 + 0.6 * jnp.mean(jax.nn.sigmoid(x), axis=0)))
  )


def both_terms(x):
  gates, means = gj.generalised_batch_shaping_loss(
    x, jnp.mean(x, axis=0), gj.symmetric_beta, PRIOR, weights=jnp.abs(x[:, 0])
  )
  return gates + means


def every_penalty(x):
  probs, records = [jax.nn.sigmoid(x)], [record(x)]
  return [
    gj.l0_loss(probs),
    gj.target_rate_loss(probs, target=0.5),
    penalties.entropy_loss(probs),
    penalties.decision_entropy_loss(probs),
    penalties.indecision_loss(probs),
    penalties.balance_loss(records),
    gj.mac_loss(records),
    gj.mac_budget_loss(records, never_gated_macs=x.size, budget=0.5),
    gj.closed_share(records),
  ]


def scatter_back(x):
  index, taken = gj.open_indices(x[:, 0], capacity=2)
  return gj.scatter_back(x[index], index, taken, size=x.shape[0])


def choices(x):
  valid = x > -9
  return [
    selection.top_k(x, valid, k=1),
    selection.uniform_k(valid, k=jnp.ones(x.shape[0], jnp.int32)),
    selection.ensure_one_open(x, x, valid),
    selection.random_k(KEY, valid, k=1),
  ]


FUNCTIONS = {
  "loss": (gradient(lambda x: gj.batch_shaping_loss(x, PRIOR)), "n, c"),
  "loss of one gate": (gradient(lambda x: gj.batch_shaping_loss(x, PRIOR, weights=x > 0)), "n"),
  "loss with weights": (
    gradient(lambda x: gj.batch_shaping_loss(x, PRIOR, weights=jnp.abs(x))),
    "n, c",
  ),
  "loss of some rows": (
    gradient(lambda x: gj.batch_shaping_loss(x, PRIOR, weights=x[:, 0] > 0)),
    "n, c",
  ),
  "learned beta": (learned(gj.symmetric_beta), "n, c"),
  "learned concrete": (learned(lambda mean: gj.relaxed_bernoulli(mean, 0.4)), "n, c"),
  "generalised loss": (gradient(both_terms), "n, c"),
  "loss over columns": (gradient(lambda x: gj.cdf_matching_loss(x, gj.normal(), axis=1)), "n, c"),
  "loss to samples": (gradient(lambda x: gj.cdf_matching_loss(x, gj.empirical(x[1:] - 1))), "n, 2"),
  "sort": (gradient(lambda x: gj.sort_with_vjp(x) ** 2), "n, c"),
  "ranks": (gj.empirical_cdf, "n, c"),
  "gates": (lambda x: gj.straight_through_gate(KEY, x), "n, 2"),
  "penalties": (every_penalty, "n, c"),
  "compaction": (scatter_back, "n, c"),
  "choices of segments": (choices, "n, c"),
}
QUICK = ("loss", "penalties")


@pytest.mark.parametrize(
  "name",
  [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUNCTIONS],
)
def test_a_function_is_exported_for_any_number_of_examples(name):
  function, sizes = FUNCTIONS[name]
  shape = jax.ShapeDtypeStruct(export.symbolic_shape(sizes, constraints=("n >= 2",)), jnp.float32)
  exported = export.export(jax.jit(function))(shape)
  z = Z if "c" in sizes or "2" in sizes else Z[:, 0]
  for x in (z, z[:2], np.round(z)):
    for got, right in zip(
      *map(jax.tree.leaves, (exported.call(x), jax.jit(function)(x))), strict=True
    ):
      np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


def test_the_levels_of_samples_not_known_yet_are_those_of_any_number():
  def levels(samples, x):
    return gj.empirical(samples).cdf(x)

  (m,) = export.symbolic_shape("m")
  shapes = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (m, 4)]
  exported = export.export(jax.jit(levels))(*shapes)
  x = np.float32([1, 1.5, 2, 3])
  # At the j-th of M samples the level is j / (M + 1); equal ones have the mean of theirs.
  for samples, right in (([3, 1, 2], [1, 1.5, 2, 3]), ([1, 2, 2, 3], [1, 1.5, 2.5, 4])):
    got = exported.call(np.float32(samples), x)
    np.testing.assert_allclose(got, np.array(right) / (len(samples) + 1), rtol=1e-6)


def test_a_choice_by_a_table_needs_a_known_number_of_segments():
  shape = jax.ShapeDtypeStruct(export.symbolic_shape("n, t"), jnp.float32)
  for choose in (
    lambda x: selection.budget_to_k(x > 0, share=0.5),
    lambda x: selection.first_k(x > 0, k=1),
  ):
    with pytest.raises(
      ValueError, match=r"^valid must have a static number of segments; got shape \(n, t\)"
    ):
      export.export(jax.jit(choose))(shape)


def test_parameters_of_one_column_do_not_fit_columns_not_known_yet():
  shape = jax.ShapeDtypeStruct(export.symbolic_shape("n, c"), jnp.float32)
  with pytest.raises(
    ValueError, match=r"^prior's parameters must broadcast to \(c,\), .*; got \(2,\) for beta"
  ):
    export.export(jax.jit(lambda x: gj.batch_shaping_loss(x, gj.beta(np.full(2, 0.6), 0.4))))(shape)
