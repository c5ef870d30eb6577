"""Training of gates that a quantile opens, by a schedule of their share."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from gating_jax.layers.gate import GateSettings
from gating_jax.training import devices, optim, steps
from gating_jax.training.devices import BATCH, REPLICATED
from tests.helpers import tiny

GATE = GateSettings(
  hidden=4,
  context="glance+pooled",
  normalise=2.0,
  threshold="quantile",
  share=0.25,
  weighted=True,
  noise_scale=0.0,
)
NET = dataclasses.replace(tiny.net(), gate=GATE)
OPTIMISER = optax.sgd(0.1, momentum=0.9, nesterov=True)
SHARE = optim.transition(1.0, GATE.share, 0.0, 0.75, 4, form="cosine")
STEPS = 4


def make_step(axis_name=None, share=SHARE):
  return steps.make_train_step(
    NET.clone(axis_name=axis_name),
    OPTIMISER,
    tiny.objective(gamma=0.0, rho=0.0),
    tiny.prepare,
    seed=0,
    axis_name=axis_name,
    share=share,
  )


def fresh():
  return steps.init_state(NET, OPTIMISER, 0, tiny.SHAPE)


@functools.cache
def plain():
  """Returns `(state, metrics)` after each step on one device that is not mapped."""
  run, reached = jax.jit(make_step()), [(fresh(), None)]
  for i in range(STEPS):
    reached.append(run(reached[-1][0], *tiny.images(32, seed=i)))
  return reached


def test_the_share_falls_from_1_and_gates_follow_it():
  shares = [float(metrics["gates/share"]) for _, metrics in plain()[1:]]
  np.testing.assert_allclose(shares, [1, 0.8125, 0.4375, 0.25], rtol=1e-6)
  rates = [float(metrics["gate_rate/stage1_block1/conv1"]) for _, metrics in plain()[1:]]
  np.testing.assert_allclose(rates, np.round(np.multiply(shares, 128)) / 128, atol=1 / 128)


def test_without_a_schedule_the_share_is_that_of_the_gates():
  _, metrics = jax.jit(make_step(share=None))(fresh(), *tiny.images(32))
  assert metrics["gate_rate/stage1_block1/conv1"] == 0.25
  assert "gates/share" not in metrics


@pytest.mark.thin(2)
@pytest.mark.parametrize("backend", devices.BACKENDS)
def test_eight_devices_train_the_network_of_one(backend):
  run = devices.map_over_devices(
    make_step(devices.AXIS),
    args=(REPLICATED, BATCH, BATCH),
    results=(REPLICATED, REPLICATED),
    backend=backend,
  )
  state = devices.replicate(fresh())
  for i in range(STEPS):
    state, metrics = run(state, *tiny.images(32, seed=i))
  one, of_one = plain()[-1]
  for part in ("params", "batch_stats"):
    start, ours, theirs = (getattr(s, part) for s in (plain()[0][0], state, one))
    assert tiny.relative_gap(start, theirs) > 1e-2, part
    assert tiny.relative_gap(ours, theirs) < 1e-5, part
  np.testing.assert_allclose(metrics["loss"], of_one["loss"], rtol=1e-5)
  threshold = state.batch_stats["stage1_block1"]["gate"]["threshold"]
  assert len({float(np.asarray(s.data).ravel()[0]) for s in threshold.addressable_shards}) == 1


def test_a_restart_ends_with_the_same_bits():
  run, (halfway, _) = jax.jit(make_step()), plain()[2]
  state = jax.device_get(halfway)
  for i in range(2, STEPS):
    state, _ = run(state, *tiny.images(32, seed=i))
  assert tiny.bit_equal(state, plain()[-1][0])


def test_a_net_without_such_gates_keeps_no_threshold():
  assert "threshold" in str(jax.tree.structure(fresh()))
  assert "threshold" not in str(jax.tree.structure(tiny.state(OPTIMISER)))
