"""The time that a step passes to a method, and what a method may keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual import training
from gating_jax.continual.method import InitialState, Method
from tests.helpers import toy


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 41, 83])
def test_epoch_and_place_are_exact_at_every_step(steps_per_epoch):
  seen = lambda params, learner, batch: (
    params["w"] ** 2,
    ({"epoch": batch.epoch, "place": batch.place}, {}),
  )
  method = Method(lambda key: InitialState({"w": jnp.ones(())}, {}, ()), seen, None, None)
  step = jax.jit(
    training.make_step(
      method, optax.sgd(0.0), lambda key, pixels: pixels, seed=0, steps_per_epoch=steps_per_epoch
    )
  )
  learner, first = toy.start(method), 7
  learner = learner.replace(
    opt_state=optax.sgd(0.0).init(learner.params), step=learner.step + first
  )
  for taken in range(3 * steps_per_epoch):
    learner, metrics = step(learner, jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32), np.int32(first))
    epoch, i = divmod(taken, steps_per_epoch)
    assert int(metrics["epoch"]) == epoch
    assert float(metrics["epoch"]) == pytest.approx(taken / steps_per_epoch)
    assert float(metrics["place"]) == pytest.approx(i / max(1, steps_per_epoch - 1))


def test_a_method_may_keep_the_very_parameters_that_the_next_step_donates():
  keep = lambda learner, data, key: learner.replace(memory=learner.params)
  loss = lambda params, learner, batch: ((params["w"] - learner.memory["w"]) ** 2, ({}, {}))
  init = lambda key: InitialState({"w": jnp.ones(())}, {}, {"w": jnp.zeros(())})
  method, optimiser = Method(init, loss, keep, None), optax.sgd(0.25)
  learner = toy.start(method)
  learner = learner.replace(opt_state=optimiser.init(learner.params))
  learner = training.end_task(
    method, optimiser, learner, None, learnt=1, key=jax.random.key(0)
  ).replace(params={"w": jnp.full((), 3.0)})
  assert float(learner.memory["w"]) == 1
  learner = training.end_task(method, optimiser, learner, None, learnt=2, key=jax.random.key(0))
  step = training.make_step(
    method, optimiser, lambda key, pixels: pixels, seed=0, steps_per_epoch=1
  )
  train = jax.jit(step, donate_argnums=0)
  learner, _ = train(learner, jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32), np.int32(0))
  assert float(learner.memory["w"]) == float(learner.params["w"]) == 3
