"""Fine-tuning, the lower bound of continual learning, and training on all tasks so far, the upper bound."""

from __future__ import annotations

from gating_jax.continual.method import Method, Network, Start


def fine_tuning(network: Network, *, joint: bool = False) -> Method:
  """Cross-entropy on one task after the other, and nothing against forgetting: the lower bound.

      theta_t = argmin over theta, from theta_{t-1}, of the mean of CE over the images of task t

  With `joint`, over those of all tasks up to t: the upper bound, where steps suffice to see them all as often.
  """
  return Method(
    init=lambda key: Start(*network.init(key), ()),
    loss=network.loss,
    end_task=lambda learner, data, key: learner,
    predict=network.predict,
    cumulative=joint,
  )
