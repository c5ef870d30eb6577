import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.ops.macs import executed_macs, gated_macs
from gating_jax.ops.penalties import (
  balance_loss,
  closed_share,
  decision_entropy_loss,
  entropy_loss,
  indecision_loss,
  l0_loss,
  mac_budget_loss,
  mac_loss,
  target_rate_loss,
)
from gating_jax.types import GateRecord
from tests.helpers.modes import every_mode


def records_of(first, second):
  """Makes two records joined by a pair, [N, 3] and [N, 2].

  All gates are open, to differ from their probabilities.
  """
  return (
    GateRecord(first, first, jnp.ones_like(first), 10),
    GateRecord(second, second, jnp.ones_like(second), 7, 4),
  )


FIRST = np.array([[0.5, 0.25, 0.25], [1.0, 1.0, 0.0]], np.float32)  # 1 and 2 expected open units
SECOND = np.array([[0.5, 0.5], [0.0, 0.5]], np.float32)  # 1 and 0.5
EXPECTED = (10 * 1 + 4 * 1 * 1 + 7 * 1 + 10 * 2 + 4 * 2 * 0.5 + 7 * 0.5) / 2  # 24.25
ALL_GATED = 10 * 3 + 4 * 3 * 2 + 7 * 2  # 68


def test_l0_loss_weighs_every_gate_alike():
  layers = [jnp.array([[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]), jnp.array([[1.0], [0.8]])]
  np.testing.assert_allclose(l0_loss(layers), (0.5 + 0.5 + 0.5 + 0.9) / 4, rtol=1e-6)
  assert abs(float(l0_loss(layers)) - np.mean([p.mean() for p in layers])) > 0.05


@pytest.mark.parametrize(("value", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_l0_loss_is_the_share_of_open_gates(value, share):
  np.testing.assert_array_equal(l0_loss([jnp.full((3, 2), value), jnp.full((3, 5), value)]), share)


def test_target_rate_loss_sums_over_gates_and_layers():
  layers = [jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.array([[1.0], [1.0]])]
  np.testing.assert_allclose(
    target_rate_loss(layers, target=0.6), 0.1**2 + 0.6**2 + 0.4**2, rtol=1e-6
  )
  np.testing.assert_allclose(
    target_rate_loss(layers[:1], target=jnp.array([0.5, 0.2])), 0.04, rtol=1e-6
  )
  np.testing.assert_array_equal(target_rate_loss(layers[1:], target=1.0), 0.0)


def test_entropy_loss_is_of_each_gates_mean_and_does_not_see_how_it_comes_about():
  layers = [np.array([[0.0, 0.5, 0.25]] * 2, np.float32), np.array([[1.0], [0.0]], np.float32)]
  quarter = 0.25 * np.log2(4) + 0.75 * np.log2(4 / 3)
  np.testing.assert_allclose(entropy_loss(layers), (1 + 0 + (1 - quarter) + 0) / 4, rtol=1e-5)


def test_decision_entropy_loss_is_of_each_example():
  layers = [np.array([[0.0, 0.5, 0.25]] * 2, np.float32), np.array([[1.0], [0.0]], np.float32)]
  quarter = 0.25 * np.log2(4) + 0.75 * np.log2(4 / 3)
  np.testing.assert_allclose(
    decision_entropy_loss(layers), (2 * (1 + 0 + (1 - quarter)) + 2) / 8, rtol=1e-5
  )


def test_indecision_loss_is_of_each_example():
  np.testing.assert_allclose(
    indecision_loss([np.array([[0.5, 0.25], [1.0, 0.25]])]), (1 + 0 + 0.75 * 2) / 4
  )
  np.testing.assert_array_equal(indecision_loss([np.array([[1.0], [0.0]])]), 0)


@pytest.mark.parametrize("logit", [-110.0, 110.0])
def test_saturated_gates_have_a_finite_pull(logit):
  for loss in (entropy_loss, decision_entropy_loss, indecision_loss):
    pull = jax.jit(jax.value_and_grad(lambda z, loss=loss: loss([jax.nn.sigmoid(z)])))
    value, slope = pull(jnp.full((3, 2), logit))
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_mac_loss_takes_products_of_probabilities_and_not_gates():
  records = records_of(FIRST, SECOND)
  assert np.mean(executed_macs(records)) == gated_macs(records) == ALL_GATED
  np.testing.assert_allclose(mac_loss(records), EXPECTED / ALL_GATED, rtol=1e-6)


def test_mac_loss_weighs_gates_by_their_cost():
  dear, cheap = (
    GateRecord(p, p, p, cost) for p, cost in ((jnp.array([[1.0]]), 90), (jnp.array([[0.0]]), 10))
  )
  np.testing.assert_allclose(l0_loss([dear.probs, cheap.probs]), 0.5)
  np.testing.assert_allclose(mac_loss((dear, cheap)), 0.9, rtol=1e-6)


def drawn(first, second):
  """Returns the records with gates that are open where their probability is at least a half."""
  return tuple(
    dataclasses.replace(r, gates=(r.probs >= 0.5).astype(r.probs.dtype))
    for r in records_of(first, second)
  )


def test_mac_budget_loss_is_of_the_gates_and_its_gradient_of_their_probabilities():
  # Open units 1 and 2, 2 and 1.
  spent = (10 * 1 + 4 * 1 * 2 + 7 * 2 + 10 * 2 + 4 * 2 * 1 + 7 * 1) / 2
  share, whole = (32 + spent) / (32 + ALL_GATED), 32 + ALL_GATED
  assert abs(spent - EXPECTED) > 5
  # With the expected units of the second.
  per_unit = np.array([[10 + 4 * 1], [10 + 4 * 0.5]]) / 2 / whole
  differentiate = jax.jit(
    jax.value_and_grad(
      lambda p, b: mac_budget_loss(drawn(p, SECOND), never_gated_macs=32, budget=b)
    )
  )
  for budget in (0.5, 1.0):  # the cost is too high, and too low
    loss, gradient = differentiate(FIRST, budget)
    np.testing.assert_allclose(loss, (share - budget) ** 2, rtol=1e-5)
    np.testing.assert_allclose(
      gradient, np.broadcast_to(2 * (share - budget) * per_unit, (2, 3)), rtol=1e-5
    )
  assert 0.5 < share < 1


@pytest.mark.parametrize(
  "loss",
  [
    lambda p: l0_loss([p[:, :3], p[:, 3:]]),
    lambda p: target_rate_loss([p[:, :3], p[:, 3:]], target=0.9),
    lambda p: entropy_loss([p[:, :3] ** 2, p[:, 3:] ** 2]),
    lambda p: indecision_loss([p[:, :3], p[:, 3:]]),
    lambda p: mac_loss(records_of(p[:, :3], p[:, 3:])),
  ],
  ids=["l0", "target rate", "entropy", "indecision", "mac"],
)
def test_gradients_are_the_finite_differences_and_jit_and_vmap_agree(loss, central_differences):
  p = np.random.default_rng(0).uniform(0.2, 0.8, (2, 4, 5))
  gradient = jax.jit(jax.grad(loss))(p[0])
  assert np.abs(gradient).min() > 1e-4
  np.testing.assert_allclose(gradient, central_differences(loss, p[0]), atol=1e-8)
  assert loss(p[0]) != loss(p[1])
  np.testing.assert_allclose(jax.jit(jax.vmap(loss))(p), [loss(p[0]), loss(p[1])], rtol=1e-12)


def test_the_budget_and_the_target_are_over_all_devices():
  p = np.random.default_rng(1).uniform(0, 1, (16, 5)).astype(np.float32)
  losses = {
    "entropy": lambda p, axis: entropy_loss([p**2], axis_name=axis),
    "target": lambda p, axis: target_rate_loss([p], target=0.7, axis_name=axis),
    "budget": lambda p, axis: mac_budget_loss(
      drawn(p[:, :3], p[:, 3:]), never_gated_macs=10, budget=0.3, axis_name=axis
    ),
  }
  for loss in losses.values():
    spread = jax.pmap(lambda p, loss=loss: loss(p, "d"), axis_name="d")(p.reshape(8, 2, 5))
    local = np.mean([loss(part, None) for part in p.reshape(8, 2, 5)])
    assert abs(local / loss(p, None) - 1) > 0.05
    np.testing.assert_allclose(spread, np.full(8, loss(p, None)), rtol=1e-5)


@pytest.mark.parametrize(
  "loss",
  [
    l0_loss,
    lambda r: target_rate_loss(r, target=0.5),
    entropy_loss,
    indecision_loss,
    mac_loss,
    lambda r: mac_budget_loss(r, never_gated_macs=1, budget=0.5),
  ],
)
def test_an_ungated_model_is_an_error(loss):
  message = r"^\w+ must hold at least one (layer|GateRecord); got none: is the model ungated\?$"
  with pytest.raises(ValueError, match=message):
    loss(())


def test_experts_are_balanced_at_one_and_worst_where_one_has_all():
  def loss(probs, gates):
    return float(balance_loss([GateRecord(None, jnp.array(probs), jnp.array(gates))]))

  even, one = [[0.25] * 4] * 4, [[1.0, 0, 0, 0]] * 4
  assert loss(even, np.eye(4)) == 1
  assert loss(one, one) == 4
  # the fraction on its own is no imbalance that a gradient could reduce
  assert loss(even, one) == 1
  tilted = jnp.array([[0.7, 0.1, 0.1, 0.1]] * 4)
  gradient = jax.grad(lambda p: balance_loss([GateRecord(None, p, jnp.array(one))]))(tilted)
  np.testing.assert_allclose(gradient, [[1, 0, 0, 0]] * 4)
  twice = balance_loss([GateRecord(None, tilted, jnp.array(one))] * 2)
  assert float(twice) == pytest.approx(2 * 4 * 0.7)


@pytest.mark.parametrize(
  "loss",
  [
    l0_loss,
    decision_entropy_loss,
    entropy_loss,
    indecision_loss,
    lambda gates: target_rate_loss(gates, target=0.5),
  ],
)
def test_layers_may_be_of_different_types(loss):
  layers = [
    jnp.array([[0.5, 1.0]], jnp.float32),
    jnp.array([[0.5]], jnp.bfloat16),
    jnp.array([[1, 0]]),
  ]
  expected = loss([jnp.asarray(layer, jnp.float32) for layer in layers])
  with jax.numpy_dtype_promotion("strict"):
    np.testing.assert_allclose(loss(layers), expected, rtol=1e-6)


@pytest.mark.parametrize(
  "loss",
  [
    l0_loss,
    decision_entropy_loss,
    entropy_loss,
    indecision_loss,
    lambda records: target_rate_loss(records, target=0.5),
    balance_loss,
    mac_loss,
    lambda records: mac_budget_loss(records, never_gated_macs=4, budget=0.5),
  ],
)
def test_layers_of_float32_and_float64_have_a_loss_in_every_mode(loss):
  with every_mode():
    mixed = lambda: loss(records_of(jnp.asarray(FIRST), jnp.asarray(SECOND, jnp.float64)))
    assert jax.eval_shape(mixed).dtype == jnp.float64


def record(open_for, probs, examples=200):
  """Makes a layer whose gates are open for so many examples, with equal probabilities for all."""
  gates = np.arange(examples)[:, None] < np.asarray(open_for)
  return GateRecord(
    None, jnp.broadcast_to(jnp.asarray(probs), gates.shape), jnp.asarray(gates, jnp.float32)
  )


@pytest.mark.parametrize(
  ("open_for", "prob", "closed"),
  [
    (0, 0.001, 1.0),
    (1, 0.01, 1.0),
    (2, 0.01, 0.0),  # of 1 % of the examples
    (0, 0.2, 0.0),  # only not drawn
    (100, 0.5, 0.0),
    (200, 0.99, 0.0),
  ],
)
def test_a_gate_is_closed_where_hardly_an_example_has_it_open_or_could_have(open_for, prob, closed):
  assert closed_share([record([open_for], [prob])]) == closed


def test_the_share_is_of_all_gates_of_the_network_or_of_those_that_count():
  records = [record([0, 200, 0], [0.0, 1.0, 0.0]), record([200], [1.0])]
  assert closed_share(records) == 0.5
  assert closed_share(records, of=jnp.array([True, True, False, True])) == pytest.approx(1 / 3)
  assert closed_share(records, of=jnp.zeros(4, bool)) == 0


def test_a_net_without_gates_is_refused():
  with pytest.raises(
    ValueError, match="records must hold at least one GateRecord; got none: is the model ungated"
  ):
    closed_share(())


def test_a_record_that_is_in_no_list_is_named():
  with pytest.raises(TypeError, match="records must .*GateRecord"):
    closed_share(record([0], [0.5]))


def test_the_gates_that_count_may_be_a_list_and_must_be_all_gates():
  records = [record([0, 200], [0.0, 1.0])]
  assert closed_share(records, of=[True, False]) == 1
  with pytest.raises(
    ValueError, match=r"of must be \[G\], a truth value for each of the 2 gates; got shape \(3,\)"
  ):
    closed_share(records, of=[True, False, True])


@pytest.mark.parametrize(
  ("loss", "field"),
  [
    (l0_loss, "probs"),
    (entropy_loss, "probs"),
    (decision_entropy_loss, "probs"),
    (indecision_loss, "probs"),
    (lambda layers: target_rate_loss(layers, target=0.6), "gates"),
  ],
)
def test_records_count_as_the_arrays_of_theirs(loss, field):
  random = np.random.default_rng(0)
  records = [
    GateRecord(*(jnp.asarray(random.random((4, c)), jnp.float32) for _ in range(3))) for c in (3, 2)
  ]
  arrays = [getattr(record, field) for record in records]
  assert loss(records) == loss(arrays) == loss([records[0], arrays[1]])
  others = [dataclasses.replace(record, **{field: record.logits / 2}) for record in records]
  assert loss(others) != loss(records)


@pytest.mark.parametrize(
  ("loss", "names"),
  [
    (balance_loss, ["gates"]),
    (closed_share, ["gates"]),
    (mac_loss, ["macs_per_unit"]),
    (
      lambda *layers, **given: mac_budget_loss(*layers, never_gated_macs=4, budget=0.5, **given),
      ["gates", "macs_per_unit"],
    ),
  ],
)
def test_arrays_with_gates_and_costs_count_as_their_records(loss, names):
  random = np.random.default_rng(0)
  records = []
  for units, macs in ((3, 7), (2, 5)):
    probs, gates = (jnp.asarray(random.random((4, units)), jnp.bfloat16) for _ in range(2))
    gates = jnp.where(gates > 0.4, gates, 0) * jnp.arange(units, dtype=gates.dtype)[None]
    records.append(GateRecord(probs, probs / 20, gates, macs_per_unit=macs))
  probs = [record.probs for record in records]
  given = {name: [getattr(record, name) for record in records] for name in names}
  expected = float(loss(records))
  assert expected not in (0, 1)
  assert float(loss(probs, **given)) == pytest.approx(expected, rel=1e-2)
  # A mixture would need a value for one layer and none for the other.
  with pytest.raises(TypeError, match=r"records\[1\] must be a GateRecord; got "):
    loss([records[0], probs[1]])
  for name in names:
    with pytest.raises(TypeError, match=f"^{name} must be given with arrays, one for each layer"):
      loss(probs, **{**given, name: None})
    with pytest.raises(TypeError, match=f"^{name} must be a list of one item per layer; got "):
      loss(probs, **{**given, name: np.ones((2, 4, 3)) if name == "gates" else 8})
    with pytest.raises(ValueError, match=r"^records must hold at least one"):
      loss([], **{name: [] for name in names})
    with pytest.raises(ValueError, match=f"^{name} must have one item for each of the 2 layers; "):
      loss(probs, **{**given, name: given[name][:1]})
  if "gates" in names:
    wide = [given["gates"][0][:, :1], given["gates"][1]]
    with pytest.raises(ValueError, match=r"^gates\[0\] must have the shape of its layer, \(4, 3\)"):
      loss(probs, **{**given, "gates": wide})
    with pytest.raises(TypeError, match=f"^{name} must be None with records, which have their own"):
      loss(records, **{name: given[name]})


def test_settings_of_losses_by_position_warn_and_work():
  records, layers = records_of(FIRST, SECOND), [np.array([[1.0], [0.0]], np.float32)]
  with pytest.warns(DeprecationWarning, match="^target_rate_loss takes target=... by keyword$"):
    assert target_rate_loss(layers, 0.6) == target_rate_loss(layers, target=0.6)
  new = mac_budget_loss(records, never_gated_macs=9, budget=0.5)
  message = "^mac_budget_loss takes never_gated_macs=..., budget=... by keyword$"
  with pytest.warns(DeprecationWarning, match=message) as warned:
    assert mac_budget_loss(records, 9, 0.5) == new
  assert warned[0].filename == __file__
  with pytest.warns(DeprecationWarning, match="takes never_gated_macs=... by keyword"):
    assert mac_budget_loss(records, 9, budget=0.5) == new
  with pytest.raises(TypeError, match="1 positional argument"):
    target_rate_loss(layers, 0.6, target=0.6)
  with pytest.raises(TypeError, match="1 positional argument"):
    target_rate_loss(layers, 0.6, None)
