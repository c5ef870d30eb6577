"""Fine-tuning, the lower bound of continual learning, and training on all tasks so far, the upper bound."""

from __future__ import annotations

from gating_jax.continual.method import Method, Network, Start


def fine_tuning(network: Network, *, joint: bool = False) -> Method:
  """Cross-entropy on one task after the other, and nothing against forgetting: the lower bound.

  With `joint`, task t is trained on the images of all tasks up to t: the upper bound.
  """
  return Method(
      init=lambda key: Start(*network.init(key), ()),
      loss=network.loss,
      end_task=lambda learner, data, key: learner,
      predict=network.predict,
      cumulative=joint)
