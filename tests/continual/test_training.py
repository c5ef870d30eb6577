"""The time that a step passes to a method."""

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
