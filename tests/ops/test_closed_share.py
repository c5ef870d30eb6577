import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax import closed_share
from gating_jax.types import GateRecord


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
