"""Steps that skip the backward pass of closed layers give the results of full steps."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.layers.blocks import BasicBlock, Bottleneck
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.training import steps
from gating_jax.training.steps import or_in_full
from tests.helpers import tiny
from tests.helpers.runs import announced

STEPS, BATCH = 6, 16


def net(share, **fields):
  return ResNet(
    **{
      **dict(
        classes=tiny.CLASSES,
        blocks=(2, 2),
        features=4,
        gating="layer",
        group_norm=True,
        gate=GateSettings(hidden=4, initial_open=0.5),
        backward_share=share,
      ),
      **fields,
    }
  )


def step(share, **fields):
  made = steps.make_train_step(
    net(share, **fields),
    optax.sgd(0.1, 0.9),
    tiny.objective(sparsity="target_rate"),
    tiny.prepare,
    seed=0,
  )
  return jax.jit(steps.resident_steps(made))


def trained(advance, **fields):
  state = steps.init_state(net(1.0, **fields), optax.sgd(0.1, 0.9), 0, tiny.SHAPE)
  start, in_full, data = state.params, [], tiny.images(64)
  for at in range(STEPS):
    state, metrics = advance(state, data, np.arange(at, at + BATCH)[:, None])
    in_full.append(float(metrics.get("in_full", np.zeros(1))[0]))
  moved = optax.tree.norm(optax.tree.sub(state.params, start))
  return state.params, in_full, moved


@pytest.mark.slow
@pytest.mark.parametrize(
  ("share", "fields"), [(0.6, {}), (0.5, {"block": Bottleneck, "shortcut": "B"})]
)
def test_parameters_are_those_of_full_steps(share, fields):
  full, _, moved = trained(step(1.0, **fields), **fields)
  skipped, in_full, _ = trained(or_in_full(step(share, **fields), step(1.0, **fields)), **fields)
  assert 0 < sum(in_full) < STEPS  # both ways are gone
  assert moved > 0.1
  assert tiny.relative_gap(skipped, full) < 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_block_that_leaves_out_closed_examples_has_the_gradient_of_the_whole(block):
  x = np.random.default_rng(0).normal(size=(8, 4, 4, 4 * block.expansion)).astype(np.float32)
  settings, keys = (
    GateSettings(hidden=4, initial_open=0.5),
    {"params": jax.random.key(0), "gate": jax.random.key(1)},
  )
  of_share = lambda share: block(
    4, gating="layer", group_norm=True, gate=settings, backward_share=share
  )
  variables = jax.jit(of_share(1.0).init)(keys, x)

  def output(share, variables):
    (y, (record,)), _ = of_share(share).apply(
      variables, x, train=True, rngs=keys, mutable="batch_stats"
    )
    return jnp.sum(y**2), record.gates

  gradient = jax.jit(jax.grad(output, argnums=1, has_aux=True), static_argnums=0)
  (whole, gates), (skipped, _) = gradient(1.0, variables), gradient(0.99, variables)
  assert 0 < gates.sum() < 8
  assert tiny.relative_gap(skipped, whole) < 1e-5


@pytest.mark.slow
def test_a_step_that_holds_too_little_is_not_taken():
  skipped, *_ = trained(step(0.1))
  assert not np.isfinite(optax.tree.norm(skipped))


@pytest.mark.slow
def test_a_backward_that_holds_less_costs_less():
  def flops(share):
    state = steps.init_state(net(1.0), optax.sgd(0.1, 0.9), 0, tiny.SHAPE)
    lowered = step(share).lower(state, tiny.images(64), np.arange(BATCH)[:, None])
    return lowered.compile().cost_analysis()["flops"]

  assert flops(0.25) < 0.8 * flops(1.0)


def test_batch_norm_has_no_backward_to_leave_out():
  with pytest.raises(ValueError, match="backward_share must be 1 without group_norm, .*; got 0.5"):
    trained(step(0.5, group_norm=False))


def test_a_step_whose_gradient_is_not_a_number_is_taken_again_in_full(monkeypatch, capsys):
  skipping = lambda state, norm: (state + 1, {"gradient_norm": np.array([norm])})

  def full(state, norm):
    time.sleep(0.1)  # longer than a line takes
    return state + 10, {"gradient_norm": np.array([1.0])}

  announced(monkeypatch)
  run = or_in_full(skipping, full)
  (kept, fits), (repeated, missed), _ = run(0, 0.5), run(0, np.nan), run(0, np.nan)
  assert (
    capsys.readouterr().out.count("compiling the training step with its full backward pass (") == 1
  )
  assert (kept, repeated) == (1, 10)
  assert (fits["in_full"], missed["in_full"]) == (0, 1)
  assert missed["gradient_norm"] == 1.0
