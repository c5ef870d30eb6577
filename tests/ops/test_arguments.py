"""Mistakes of readers of the docs: the error names argument, rule and value in one line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import gating_jax as gj
from gating_jax.checks import shown
from gating_jax.ops import arguments, compaction, confidence, macs, penalties, selection

Z, KEY, PRIOR = (
  jnp.linspace(-2, 2, 8, dtype=jnp.float32).reshape(4, 2),
  jax.random.key(0),
  gj.beta(0.6, 0.4),
)
RECORD = gj.GateRecord(Z, jax.nn.sigmoid(Z), gj.threshold_gate(Z), 3)
OTHER = gj.GateRecord(Z[:3], Z[:3], Z[:3], 3)
NONE = jnp.zeros((0, 2))
NOTHING = gj.GateRecord(NONE, NONE, NONE, 1)

LOSSES = {
  "a number for the prior": (
    lambda: gj.batch_shaping_loss(Z, 0.6),
    TypeError,
    "prior must be a Prior, such as beta(0.6, 0.4); got 0.6",
  ),
  "a function for the prior": (
    lambda: gj.cdf_matching_loss(Z, gj.beta),
    TypeError,
    "prior must be a Prior, such as beta(0.6, 0.4); got the function beta",
  ),
  "the class for the prior": (
    lambda: gj.batch_shaping_loss(Z, gj.Prior),
    TypeError,
    "prior must be a Prior, such as beta(0.6, 0.4); got the class Prior",
  ),
  "arguments in the wrong order": (
    lambda: gj.batch_shaping_loss(PRIOR, Z),
    TypeError,
    "prior must be a Prior, such as beta(0.6, 0.4); got ",
  ),
  "a prior for logits": (
    lambda: gj.batch_shaping_loss(PRIOR, PRIOR),
    TypeError,
    "logits must be an array of real numbers; got an object of class Prior",
  ),
  "a list of records for logits": (
    lambda: gj.batch_shaping_loss([RECORD], PRIOR),
    TypeError,
    "logits must be an array of real numbers; got ",
  ),
  "a list of arrays for logits": (
    lambda: gj.batch_shaping_loss([Z, Z], PRIOR),
    TypeError,
    "logits must be an array of real numbers; got ",
  ),
  "complex logits": (
    lambda: gj.batch_shaping_loss(Z.astype(jnp.complex64), PRIOR),
    TypeError,
    "logits must be an array of real numbers; got ",
  ),
  "text for logits": (
    lambda: gj.batch_shaping_loss("logits", PRIOR),
    TypeError,
    "logits must be an array of real numbers; got 'logits'",
  ),
  "text for weights": (
    lambda: gj.batch_shaping_loss(Z, PRIOR, weights="mask"),
    TypeError,
    "weights must be an array of real numbers; got 'mask'",
  ),
  "text for the axis": (
    lambda: gj.batch_shaping_loss(Z, PRIOR, axis="batch"),
    TypeError,
    "axis must be a whole number; got 'batch'",
  ),
  "a prior for the function of means": (
    lambda: gj.generalised_batch_shaping_loss(Z, Z[0], PRIOR, PRIOR),
    TypeError,
    "prior must be a function of means, such as symmetric_beta; got an object of class Prior",
  ),
  "a number for the hyperprior": (
    lambda: gj.generalised_batch_shaping_loss(Z, Z[0], gj.symmetric_beta, 0.6),
    TypeError,
    "hyperprior must be a Prior, such as beta(0.6, 0.4); got 0.6",
  ),
  "an array for the number of examples": (
    lambda: gj.noise_floor(Z),
    TypeError,
    "n must be a whole number >= 1; got ",
  ),
  "no examples": (lambda: gj.noise_floor(0), ValueError, "n must be >= 1; got 0"),
  "a truth value for the number of examples": (
    lambda: gj.noise_floor(True),
    TypeError,
    "n must be a whole number >= 1; got True",
  ),
  "rows of unequal lengths for a parameter": (
    lambda: gj.normal([[0.0], [0.0, 1.0]]),
    TypeError,
    "normal's mean must be finite; got [[0.0], [0.0, 1.0]]",
  ),
  "whole numbers to sort": (
    lambda: gj.sort_with_vjp(jnp.arange(3, dtype=jnp.int32)),
    TypeError,
    "x must be of a floating type, to have a gradient; got int32",
  ),
  "text to sort": (
    lambda: gj.sort_with_vjp("x"),
    TypeError,
    "x must be an array of real numbers; got 'x'",
  ),
  "a prior for samples": (
    lambda: gj.empirical(PRIOR),
    TypeError,
    "samples must be an array of real numbers; got an object of class ",
  ),
  "a record to rank": (
    lambda: gj.empirical_cdf(RECORD),
    TypeError,
    "x must be an array of real numbers; got ",
  ),
}
GATES = {
  "logits for the key": (
    lambda: gj.straight_through_gate(Z, KEY),
    TypeError,
    "key must be a PRNG key, such as jax.random.key(0); got float32[4,2]",
  ),
  "a seed for the key": (
    lambda: gj.binary_concrete(0, Z),
    TypeError,
    "key must be a PRNG key, such as jax.random.key(0); got 0",
  ),
  "a key for logits": (
    lambda: gj.hard_concrete(KEY, KEY),
    TypeError,
    "logits must be an array of real numbers; got ",
  ),
  "text for the temperature": (
    lambda: gj.straight_through_gate(KEY, Z, temperature="cold"),
    TypeError,
    "temperature must be > 0; got 'cold'",
  ),
  "an array of temperatures, one of them 0": (
    lambda: gj.binary_concrete(KEY, Z, temperature=np.array([1.0, 0.0])),
    ValueError,
    "temperature must be > 0; got array([1., 0.])",
  ),
  "a temperature of 0 for a probability": (
    lambda: gj.hard_concrete_open_prob(Z, temperature=0.0),
    ValueError,
    "temperature must be > 0; got 0.0",
  ),
  "text for the noise": (
    lambda: gj.straight_through_gate(KEY, Z, noise_scale="loud"),
    TypeError,
    "noise_scale must be a finite number; got 'loud'",
  ),
  "one number for the stretch": (
    lambda: gj.hard_concrete_mean(Z, stretch=1.1),
    TypeError,
    "stretch must be (low, high) with low < 0 and high > 1; got 1.1",
  ),
  "text in the stretch": (
    lambda: gj.hard_concrete_mean(Z, stretch=("-0.1", 1.1)),
    TypeError,
    "stretch must be (low, high) with low < 0 and high > 1; got ('-0.1', 1.1)",
  ),
  "a slope of 0": (
    lambda: gj.clipped_sigmoid(Z, slope=0.0),
    ValueError,
    "slope must be > 0; got 0.0",
  ),
  "a record for logits of evaluation": (
    lambda: gj.threshold_gate(RECORD),
    TypeError,
    "logits must be an array of real numbers; got ",
  ),
  "a record for gates": (
    lambda: gj.apply_gates(Z, RECORD),
    TypeError,
    "gates must be an array of real numbers; got ",
  ),
  "gates without a column": (
    lambda: gj.apply_gates(Z, jnp.zeros((4, 0))),
    ValueError,
    "gates must be [N, C / b] for x's N examples",
  ),
}
LAYERS = {
  "an array for the list of layers": (
    lambda: gj.l0_loss(Z),
    TypeError,
    "probs must be a list of one [N, C] array per layer; got ",
  ),
  "an array for the list of gates": (
    lambda: gj.target_rate_loss(Z, target=0.5),
    TypeError,
    "gates must be a list of one [N, C] array per layer; got ",
  ),
  "a record without probabilities": (
    lambda: gj.l0_loss([gj.GateRecord(Z, None, Z)]),
    TypeError,
    "probs[0] must be an array of real numbers; got None",
  ),
  "rows for layers": (
    lambda: gj.l0_loss([[0.5, 0.2]]),
    ValueError,
    "probs[0] must be [N, C] with N >= 1; got shape (2,)",
  ),
  "a layer without an example": (
    lambda: gj.l0_loss([NONE]),
    ValueError,
    "probs[0] must be [N, C] with N >= 1; got shape (0, 2)",
  ),
  "a rate in percent": (
    lambda: gj.target_rate_loss([Z], target=60),
    ValueError,
    "target must be in [0, 1]; got 60",
  ),
  "text for layers": (
    lambda: penalties.entropy_loss("probs"),
    TypeError,
    "probs must be a list of one [N, C] array per layer; got ",
  ),
  "one record for records": (
    lambda: gj.executed_macs(RECORD),
    TypeError,
    "records must be a list of one GateRecord per gated layer; got ",
  ),
  "arrays for records": (
    lambda: gj.gated_macs([Z]),
    TypeError,
    "records[0] must be a GateRecord; got ",
  ),
  "records of several batches": (
    lambda: gj.expected_macs([RECORD, OTHER]),
    ValueError,
    "records must be from one batch (one forward pass); got probs of shapes [(4, 2), (3, 2)]",
  ),
  "records of several batches, with a budget": (
    lambda: gj.mac_budget_loss([RECORD, OTHER], never_gated_macs=1, budget=0.5),
    ValueError,
    "records must be from one batch",
  ),
  "records without an example": (
    lambda: gj.mac_loss([NOTHING]),
    ValueError,
    "records must have at least one example; got probs of shape (0, 2)",
  ),
  "records without an example, of experts": (
    lambda: penalties.balance_loss([NOTHING]),
    ValueError,
    "records must have at least one example; got gates of shape (0, 2)",
  ),
  "records without an example, with a budget": (
    lambda: gj.mac_budget_loss([NOTHING], never_gated_macs=1, budget=0.5),
    ValueError,
    "records must have at least one example; got gates of shape (0, 2)",
  ),
  "records without an example, closed or not": (
    lambda: gj.closed_share([NOTHING]),
    ValueError,
    "records must have at least one example; got gates of shape (0, 2)",
  ),
  "a list for a record's gates": (
    lambda: gj.executed_macs([gj.GateRecord(Z, Z, [1.0, 0.0], 1)]),
    ValueError,
    "records[0].gates must be [N, C]; got shape (2,)",
  ),
  "a budget in MACs": (
    lambda: gj.mac_budget_loss([RECORD], never_gated_macs=1, budget=10_000),
    ValueError,
    "budget must be in (0, 1]; got 10000",
  ),
  "text for the MACs": (
    lambda: gj.mac_budget_loss([RECORD], never_gated_macs="1", budget=0.5),
    TypeError,
    "never_gated_macs must be a number >= 0; got '1'",
  ),
  "half a unit": (
    lambda: gj.open_indices(Z[:, 0], capacity=1.5),
    TypeError,
    "capacity must be a whole number >= 1; got 1.5",
  ),
  "a list of units": (
    lambda: gj.open_indices([Z], capacity=1),
    TypeError,
    "gates must be an array of real numbers; got ",
  ),
  "values that are no array": (
    lambda: gj.scatter_back(RECORD, Z[:, 0], Z[:, 0], size=4),
    TypeError,
    "values must be an array of real numbers; got ",
  ),
  "one size for sizes": (
    lambda: gj.capacity_for(3, sizes=4),
    TypeError,
    "sizes must be a list of whole numbers >= 1; got 4",
  ),
  "no sizes": (
    lambda: gj.capacity_for(3, sizes=()),
    ValueError,
    "sizes must hold at least one number; got none",
  ),
  "text for the number of segments": (
    lambda: selection.top_k(Z, Z > 0, k="2"),
    TypeError,
    "k must be an array of real numbers; got '2'",
  ),
  "half a segment": (
    lambda: selection.top_k(Z, Z > 0, k=2.5),
    TypeError,
    "k must be a whole number >= 1; got 2.5",
  ),
  "halves of segments": (
    lambda: selection.uniform_k(Z > 0, k=Z[:, 0]),
    TypeError,
    "k must be a whole number, or an array [B] of them; got ",
  ),
  "numbers of segments of other videos": (
    lambda: selection.first_k(Z > 0, k=np.array([1, 2])),
    ValueError,
    "k must be a whole number, or [B] of them, for 4 videos; got shape (2,)",
  ),
  "a list for gates of segments": (
    lambda: selection.ensure_one_open([[1.0, 0.0]] * 4, Z, Z > 0),
    TypeError,
    "gates must be an [B, T] array of real numbers; got [[1.0, 0.0]",
  ),
  "scores of one video": (
    lambda: selection.top_k(Z[0], Z > 0, k=1),
    ValueError,
    "scores must be [B, T]; got shape (2,)",
  ),
  "scores of other segments": (
    lambda: selection.top_k(Z[:, :1], Z > 0, k=1),
    ValueError,
    "scores, valid must be [B, T] of one shape; got (4, 1), (4, 2)",
  ),
  "a list for valid segments": (
    lambda: selection.budget_to_k([[True]], share=0.5),
    TypeError,
    "valid must be an [B, T] array of real numbers; got [[True]]",
  ),
  "a list of rows for the entropy": (
    lambda: confidence.entropy_share([[0.0, 1.0]]),
    TypeError,
    "logits must be an array of real numbers; got [[0.0, 1.0]]",
  ),
  "text for the threshold": (
    lambda: confidence.stay_logits(Z[None], threshold="0.5"),
    TypeError,
    "threshold must be a number in (0, 1), a fraction of the largest entropy; got '0.5'",
  ),
  "exits that do not belong to the answers": (
    lambda: confidence.first_sure(Z[None], Z),
    ValueError,
    "answers must be [N, X + 1, K] for stay [N, X]; got (1, 4, 2), (4, 2)",
  ),
  "text for the MACs of a record": (
    lambda: gj.gated_macs([gj.GateRecord(Z, Z, Z, "3")]),
    TypeError,
    "records[0].macs_per_unit must be a number >= 0; got '3'",
  ),
  "a size for a shape": (
    lambda: macs.conv_macs(3, (1, 3)),
    TypeError,
    "kernel_shape must be a list of sizes; got 3",
  ),
  "text for the gates that count": (
    lambda: gj.closed_share([RECORD], of="all"),
    TypeError,
    "of must be an array of real numbers; got 'all'",
  ),
  "places that are no whole numbers": (
    lambda: gj.scatter_back(Z, Z[:, 0], Z[:, 0], size=4),
    TypeError,
    "index must be whole numbers; got ",
  ),
  "half of a capacity": (
    lambda: compaction.open_backward(lambda _, x: x, (), Z, Z[:, 0], capacity=1.5),
    TypeError,
    "capacity must be a whole number >= 0; got 1.5",
  ),
  "sizes that are one size": (
    lambda: compaction.pieces_for(3, 4),
    TypeError,
    "sizes must be a list of whole numbers >= 1; got 4",
  ),
  "text for the share of segments": (
    lambda: selection.budget_to_k(Z > 0, share="0.3"),
    TypeError,
    "share must be in (0, 1], or an int number of segments; got '0.3'",
  ),
  "text for buckets": (
    lambda: gj.bucket_sizes(8, buckets="4"),
    TypeError,
    "buckets must be a whole number >= 1; got '4'",
  ),
}


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [*LOSSES.values(), *GATES.values(), *LAYERS.values()],
  ids=[*LOSSES, *GATES, *LAYERS],
)
def test_a_mistake_is_named_in_one_line(call, error, message):
  with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
    call()
  assert len(str(raised.value).splitlines()) == 1


HUGE = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: gj.batch_shaping_loss(x, PRIOR),
    jax.grad(lambda x: gj.batch_shaping_loss(x, PRIOR).sum()),
    lambda x: gj.cdf_matching_loss(x, PRIOR, axis=1),
    gj.empirical_cdf,
    gj.sort_with_vjp,
    lambda x: gj.open_indices(x.ravel(), capacity=8),
  ],
)
def test_more_elements_than_32_bits_count_are_refused(function):
  assert jax.eval_shape(function, jax.ShapeDtypeStruct((2**16, 2**15 - 1), jnp.float32))
  with pytest.raises(ValueError, match=r"must have fewer than 2\*\*31 elements, .*; got shape \("):
    jax.eval_shape(function, HUGE)


def test_samples_of_all_devices_are_counted_together():
  over_devices = jax.vmap(
    lambda x: gj.cdf_matching_loss(x[:2], gj.empirical(x, axis_name="d")), axis_name="d"
  )
  assert jax.eval_shape(over_devices, jax.ShapeDtypeStruct((8, 2**28 - 1), jnp.float32)).shape == (
    8,
  )
  with pytest.raises(
    ValueError, match=r"^samples .* over all devices .* 2\*\*31 .*; got shape \(2147483648,\)"
  ):
    jax.eval_shape(over_devices, jax.ShapeDtypeStruct((8, 2**28), jnp.float32))


def test_what_looks_at_each_element_alone_takes_any_number_of_them():
  def gates(x):
    return gj.threshold_gate(x), gj.straight_through_gate(KEY, x), gj.l0_loss([jax.nn.sigmoid(x)])

  assert jax.eval_shape(gates, HUGE)[0].shape == HUGE.shape


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1,), (4, 0)], ids=str)
def test_one_example_one_column_or_none_have_a_loss(shape):
  def loss(x):
    return gj.batch_shaping_loss(x, PRIOR).sum(), gj.empirical_cdf(x)

  x = np.full(shape, 0.3, np.float32)
  (total, levels), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
  assert levels.shape == gradient.shape == shape
  np.testing.assert_array_equal(levels, np.full(shape, 0.5))
  level = np.arange(1, shape[0] + 1) / (shape[0] + 1)
  each = np.mean((float(special.betainc(0.6, 0.4, special.expit(0.3))) - level) ** 2)
  np.testing.assert_allclose(total, each * np.prod(shape[1:]), rtol=1e-4)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "loss",
  [
    lambda x: gj.batch_shaping_loss(x, PRIOR),
    gj.empirical_cdf,
    lambda x: gj.cdf_matching_loss(x, PRIOR),
  ],
)
def test_a_batch_without_an_example_is_refused(loss):
  with pytest.raises(
    ValueError, match=r"must hold at least one example along axis 0; got shape \(0, 2\)$"
  ):
    loss(NONE)


def test_gates_of_no_example_are_none():
  for gates in (
    gj.threshold_gate(NONE),
    gj.straight_through_gate(KEY, NONE),
    gj.apply_gates(NONE, NONE),
  ):
    assert gates.shape == (0, 2)
  assert gj.executed_macs([gj.GateRecord(NONE, NONE, NONE, 1)]).shape == (0,)


def test_whole_numbers_count_as_reals():
  @jax.jit
  def values(x):
    return (
      gj.batch_shaping_loss(x, PRIOR),
      gj.straight_through_gate(KEY, x),
      gj.binary_concrete(KEY, x),
      gj.hard_concrete_mean(x),
      gj.threshold_gate(x),
      gj.empirical_cdf(x),
    )

  whole = np.array([[-2, 0], [1, 3], [0, -1]])
  for value, right in zip(values(whole), values(whole.astype(np.float32)), strict=True):
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, right)


def test_one_number_has_a_gate():
  for gate in (
    gj.threshold_gate,
    gj.hard_concrete_mean,
    gj.hard_concrete_open_prob,
    gj.clipped_sigmoid,
    lambda x: gj.straight_through_gate(KEY, x),
  ):
    for logit in (0.5, 3, np.float64(0.5)):
      assert gate(logit).shape == ()
      np.testing.assert_allclose(gate(logit), gate(jnp.float32(logit)), rtol=1e-6)


def test_a_size_that_is_not_known_yet_is_a_whole_number():
  (n,) = jax.export.symbolic_shape("n")
  assert arguments.whole_number("n", n, least=2) is None


def test_an_array_of_another_library_holds_no_real_numbers():
  class Tensor:
    shape, dtype = (2,), "a type unknown to JAX"

  with pytest.raises(TypeError, match="^logits must be an array of real numbers; got "):
    gj.threshold_gate(Tensor())


def test_a_value_is_shown_in_one_short_line():
  for value in (
    np.zeros((3, 3)),
    {"a": list(range(100))},
    "long " * 100,
    "two\nlines",
    RECORD,
    dict,
    len,
    None,
  ):
    text = shown(value)
    assert len(text) <= 62
    assert "\n" not in text
