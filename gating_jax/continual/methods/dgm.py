"""DGM: dynamic generative memory, a masked generator for replay.

    L = r CE(images of the task) + (1 - r) CE(generated images of all tasks so far)

All classes so far are generated with the same probability. All tasks have one generator, a
conditional WGAN-GP with HAT's masks (`protections.masked`). It is trained on each task before the
classifier is. With r = 0 the classifier sees only generated images: next to real ones of the task
it could learn the difference between real and generated, and not the classes.

Differences from the paper: the classifier is a network of its own, that of the other methods, and
not a second head of the critic; the generator has its full width from the start and does not grow
by what a task takes; masks are learnt as in HAT, and each task has its own layer of pixels.

Reference: Ostapenko et al., "Learning to remember: a synaptic plasticity driven framework for
continual learning", CVPR 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Network,
  StepLoss,
  TaskData,
  tree_size,
)
from gating_jax.continual.rehearsal import Rehearsal, make_pretrain_step
from gating_jax.types import Array


class RehearsalMemory(MemoryNode):
  """The memory of the method.

  Attributes:
    rehearsal: memory of the generator.
  """

  rehearsal: Any


def dgm(network: Network, rehearsal: Rehearsal, *, real_weight: float) -> Method:
  """Makes the method.

  Args:
    network: the classifier.
    rehearsal: a generative one; its memory is all that is kept.
    real_weight: r, in [0, 1).
  Raises:
    ValueError: `real_weight` outside its range.
  """
  if not 0 <= real_weight < 1:
    raise ValueError(f"real_weight must be a fraction in [0, 1); got {real_weight}")

  def init(key: Array) -> InitialState:
    """Initialises the classifier and the generator's memory."""
    net_key, rehearsal_key = jax.random.split(key)
    memory = RehearsalMemory(rehearsal.init(rehearsal_key))
    return InitialState(*network.init(net_key), memory)

  def loss(params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the weighted cross-entropy on real and generated images."""
    noise, drawing = jax.random.split(batch.key)
    x, labels, _ = rehearsal.replay(learner.memory.rehearsal, batch, learner.task, key=drawing)
    # One batch, for BatchNorm; with r = 0 no real image goes through the network.
    if real_weight:
      x, labels = jnp.concatenate([x, batch.x]), jnp.concatenate([labels, batch.labels])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, key=noise)
    each = network.cross_entropy(logits, labels, learner.task)
    if not real_weight:
      return jnp.mean(each), ({"replay": jnp.mean(each)}, batch_stats)
    # Generated images come first.
    new, replayed = jnp.mean(each[-len(batch.x) :]), jnp.mean(each[: -len(batch.x)])
    # L = r CE(images of the task) + (1 - r) CE(generated images)
    total = real_weight * new + (1 - real_weight) * replayed
    return total, ({"cross_entropy": new, "replay": replayed}, batch_stats)

  def end_task(learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Keeps the task's generator in the memory."""
    # The classifier keeps no images: the generator has learnt the task in the pretraining.
    kept = rehearsal.keep(learner.memory.rehearsal, data, int(learner.task), key=key)
    return learner.replace(memory=RehearsalMemory(kept))

  def footprint(learner: LearnerState) -> Footprint:
    """Measures the classifier's parameters and the generator's memory."""
    rehearsed_mb = rehearsal.megabytes(learner.memory.rehearsal, int(learner.task))
    return Footprint(tree_size(learner.params), rehearsed_mb)

  return Method(
    init,
    loss,
    end_task,
    predict=network.predict,
    footprint=footprint,
    pretrain_step=make_pretrain_step(rehearsal, network.problem),
  )
