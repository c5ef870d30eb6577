"""`jax.export` with sizes that are not known yet: one program for any number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import gating_jax as gj

Z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
PRIOR, KEY = gj.beta(0.6, 0.4), jax.random.key(0)


def gradient(loss):
  return jax.value_and_grad(lambda x: jnp.sum(loss(x)))


def record(x):
  return gj.GateRecord(x, jax.nn.sigmoid(x), gj.threshold_gate(x), 3)


FUNCTIONS = {
    "loss": (gradient(lambda x: gj.batch_shaping_loss(x, PRIOR)), "n, c"),
    "loss with weights": (gradient(lambda x: gj.batch_shaping_loss(x, PRIOR, weights=jnp.abs(x))), "n, c"),
    "loss over columns": (gradient(lambda x: gj.cdf_matching_loss(x, gj.normal(), axis=1)), "n, c"),
    "loss to samples": (gradient(lambda x: gj.cdf_matching_loss(x, gj.empirical(x[1:] - 1))), "n, 2"),
    "sort": (gradient(lambda x: gj.sort_with_vjp(x) ** 2), "n, c"),
    "ranks": (gj.empirical_cdf, "n, c"),
    "gates": (lambda x: gj.straight_through_gate(KEY, x), "n, 2"),
    "penalties": (lambda x: (gj.l0_loss([jax.nn.sigmoid(x)]), gj.mac_loss([record(x)])), "n, 2"),
}
QUICK = ("loss", "penalties")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in FUNCTIONS])
def test_a_function_is_exported_for_any_number_of_examples(name):
  function, sizes = FUNCTIONS[name]
  shape = jax.ShapeDtypeStruct(export.symbolic_shape(sizes, constraints=("n >= 2",)), jnp.float32)
  exported = export.export(jax.jit(function))(shape)
  for x in (Z, Z[:2], np.round(Z)):
    for got, right in zip(*map(jax.tree.leaves, (exported.call(x), jax.jit(function)(x))), strict=True):
      np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


def test_parameters_of_one_column_do_not_fit_columns_not_known_yet():
  shape = jax.ShapeDtypeStruct(export.symbolic_shape("n, c"), jnp.float32)
  with pytest.raises(ValueError, match=r"^prior's parameters must broadcast to \(c,\), .*; got \(2,\), of beta"):
    export.export(jax.jit(lambda x: gj.batch_shaping_loss(x, gj.beta(np.full(2, 0.6), 0.4))))(shape)
