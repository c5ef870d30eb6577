import re

import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax import closed_share
from gating_jax.training.closing import CLOSED, ClosingWatch, Limit
from gating_jax.types import GateRecord

LIMIT = Limit(CLOSED, 0.5, "lower loss.sparsity.coefficient")


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


CHANNELS = Limit("channels", 0.9, "raise that", "channels")


def lines(shares, every=50):
  """Steps and means, as of a log."""
  means = [share if isinstance(share, dict) else {CLOSED: share} for share in shares]
  return [(every * i, m) for i, m in enumerate(means, start=1)]


def said(shares, limits=(LIMIT,), every=50):
  watch = ClosingWatch(limits)
  return [watch(*line) for line in lines(shares, every)]


def test_gates_that_stay_closed_are_said_once_with_what_to_change():
  assert said([0.2, 0.8, 0.9, 0.2, 0.9, 0.9]) == [
    [],
    [
      "warning: 80% of the gates are closed for all examples, and closed gates hardly learn. If "
      "this is unintended: lower loss.sparsity.coefficient. See docs/gate_your_model.md."
    ],
    [],
    [],
    [],
    [],
  ]


def test_a_watch_that_is_shown_earlier_lines_again_goes_on_as_if_never_stopped():
  shares = [
    {CLOSED: a, "channels": b}
    for a, b in [(0.2, 0.2), (0.8, 0.2), (0.8, 0.95), (0.8, 0.95), (0.2, 0.95)] * 2
  ]
  log = lines(shares, every=10)
  expected = said(shares, (LIMIT, CHANNELS), every=10)
  assert [i for i, warnings in enumerate(expected) if warnings] == [2, 3]
  for stop in range(len(log)):
    watch = ClosingWatch((LIMIT, CHANNELS))
    for line in log[:stop]:
      watch(*line)
    assert not any(watch(*line) for line in log[:stop])  # as before each phase of a task
    assert [watch(*line) for line in log[stop:]] == expected[stop:]


@pytest.mark.parametrize("shares", [[0.0] * 5, [0.5] * 5, [{"loss": 1.0}] * 3])
def test_open_gates_are_no_fault(shares):
  assert not any(said(shares))


def test_gates_that_close_for_a_moment_are_no_fault():
  assert not any(said([0.9, 0.9, 0.2] * 20, every=5))
  assert [i for i, text in enumerate(said([0.2] + [0.9] * 9, every=5)) if text] == [
    4
  ]  # after twenty steps


def test_of_several_kinds_of_gates_each_has_a_limit():
  limits = LIMIT, CHANNELS
  assert not any(said([{CLOSED: 0.1, "channels": 0.8}] * 3, limits))
  ((warning,),) = said([{CLOSED: 0.1, "channels": 0.95}], limits)
  assert "95% of the channels" in warning
  (both,) = said([{CLOSED: 0.8, "channels": 0.95}], limits)
  assert [re.search(r"of the (\w+)", warning)[1] for warning in both] == ["gates", "channels"]
  assert not any(
    said([{CLOSED: 0.9, "channels": 0.1}, {CLOSED: 0.1, "channels": 0.95}] * 9, limits, every=10)
  )


def test_the_gates_that_count_may_be_a_list_and_must_be_all_gates():
  records = [record([0, 200], [0.0, 1.0])]
  assert closed_share(records, of=[True, False]) == 1
  with pytest.raises(
    ValueError, match=r"of must be \[G\], a truth value for each of the 2 gates; got shape \(3,\)"
  ):
    closed_share(records, of=[True, False, True])
