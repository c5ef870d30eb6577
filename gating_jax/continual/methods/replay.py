"""Experience replay: every step also sees images of earlier tasks from an episodic memory.

    L = mean of CE over the batch and the draw together

Both go through the network as one batch, so that BatchNorm normalises new and old images alike, in
training and in the test. With one pass for each, its running statistics would fit neither.

Reference: Chaudhry et al., "On tiny episodic memories in continual learning", 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.continual import memory
from gating_jax.continual.method import Batch, Learner, Method, Network, Start, TaskData
from gating_jax.types import Array


def er(network: Network, rehearsal: memory.ReplaySettings) -> Method:
  """Makes the method; its memory is a `memory.Memory`.

  Args:
    network: to train.
    rehearsal: sizes of the memory and of each draw.
  """
  problem = network.problem

  def init(key: Array) -> Start:
    """Initialises the network and an empty memory."""
    return Start(*network.init(key), memory.empty(rehearsal.images, problem.shape))

  def loss(
    params: Any, learner: Learner, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Any]]:
    """Computes the mean cross-entropy over the batch and the replayed images."""
    noise, drawing = jax.random.split(batch.key)
    # Before the first task ends these are examples of the batch itself.
    x, labels, _, _ = memory.draw_inputs(
      learner.memory, drawing, batch, problem, rehearsal.batch_size
    )
    # One batch, for BatchNorm.
    x, labels = jnp.concatenate([batch.x, x]), jnp.concatenate([batch.labels, labels])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, noise)
    each = network.cross_entropy(logits, labels, learner.task)
    new, old = jnp.split(each, [len(batch.x)])
    # The loss is a mean over all images; the two means are metrics.
    return jnp.mean(each), ({"cross_entropy": jnp.mean(new), "replay": jnp.mean(old)}, batch_stats)

  def end_task(learner: Learner, data: TaskData, key: Array) -> Learner:
    """Adds the task's images to the memory."""
    return learner.replace(memory=memory.share(learner.memory, data.pixels, data.labels, key))

  return Method(init, loss, end_task, network.predict)
