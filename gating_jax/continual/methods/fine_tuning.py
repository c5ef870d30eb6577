"""Fine-tuning and joint training, the lower and upper bounds of continual learning."""

from __future__ import annotations

from gating_jax.continual.method import InitialState, Method, Network


def fine_tuning(network: Network, *, joint: bool = False) -> Method:
  """Trains by cross-entropy on one task after the other: the lower bound.

      theta_t = argmin over theta, from theta_{t-1}, of the mean of CE over the images of task t

  Args:
    network: to train.
    joint: train on the images of all tasks up to t: the upper bound, if steps suffice to see them
      all as often.
  """
  return Method(
    init=lambda key: InitialState(*network.init(key), ()),
    loss=network.loss,
    # Nothing is done against forgetting.
    end_task=lambda learner, data, key: learner,
    predict=network.predict,
    cumulative=joint,
  )
