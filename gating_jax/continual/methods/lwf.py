"""Fine-tuning, and learning without forgetting, in which old heads keep their predictions.

Fine-tuning on one task after the other is the lower bound of continual learning; on the images of
all tasks, joint training, it is the upper one. Learning without forgetting adds to it:

    total = cross-entropy
            + w sum_(s < t) mean_n CE(softmax(teacher_s(x_n) / tau), softmax(logits_s(x_n) / tau))

The x_n are images of the new task. The teacher is the network at the end of the last task,
parameters and running statistics, in evaluation. There is no factor tau^2: it belongs to w.

Axes: N examples, T tasks, C classes of a task, K = T C.
Reference: Li and Hoiem, "Learning without forgetting", 2016, without its warm-up of the new head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gating_jax.continual.method import InitialState, Method, Network, Variables
from gating_jax.types import Array


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


def lwf(network: Network, *, weight: float, temperature: float) -> Method:
  """Makes the method; its memory is the `Variables` of the teacher.

  Args:
    network: to train.
    weight: w, of each old head, >= 0.
    temperature: tau > 0.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not weight >= 0:
    raise ValueError(f"weight must be >= 0; got {weight}")
  if not temperature > 0:
    raise ValueError(f"temperature must be > 0; got {temperature}")

  def init(key):
    """Initialises the network, with a copy of it as the teacher."""
    params, batch_stats = network.init(key)
    # During the first task there is no old head, so any teacher will do.
    return InitialState(params, batch_stats, _teacher(params, batch_stats))

  def loss(params, learner, batch):
    """Computes the cross-entropy plus the distillation of old heads."""
    # One pass gives the logits of all heads, for both terms.
    logits, batch_stats = network.train_logits(params, learner.batch_stats, batch.x, key=batch.key)
    cross_entropy = jnp.mean(network.cross_entropy(logits, batch.labels, learner.task))
    # The teacher is in evaluation, on the same images.
    teacher = learner.memory
    taught = network.logits(teacher.params, teacher.batch_stats, batch.x)
    each = old_heads_cross_entropy(
      logits, taught, learner.task, classes=network.problem.classes, temperature=temperature
    )
    distillation = jnp.mean(each)
    terms = {"cross_entropy": cross_entropy, "distillation": distillation}
    return cross_entropy + weight * distillation, (terms, batch_stats)

  def end_task(learner, data, key):
    """Makes the trained network the teacher."""
    return learner.replace(memory=_teacher(learner.params, learner.batch_stats))

  return Method(init, loss, end_task, predict=network.predict)


def old_heads_cross_entropy(
  logits: Array, teacher: Array, task: Array, *, classes: int, temperature: float
) -> Array:
  """Computes the cross-entropy between teacher and network, summed over old heads.

      sum_(s < task) CE(softmax(teacher_s / tau), softmax(logits_s / tau))

  Each term is over the C classes of head s. Its gradient is zero exactly where the softmax of every
  old head equals the teacher's; its value there is their entropy.

  Args:
    logits, teacher: `[N, K]`.
    task: the task being learnt, from 0.
    classes: C.
    temperature: tau.
  Returns:
    `[N]`.

  >>> old = jnp.zeros((1, 4))
  >>> float(old_heads_cross_entropy(old, old, 1, classes=2, temperature=2.0)[0])
  0.6931471824645996
  """
  # `[N, T, C]`, softened.
  logits = logits.reshape(len(logits), -1, classes) / temperature
  teacher = teacher.reshape(len(teacher), -1, classes) / temperature
  each = optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher))
  # Heads from the current task on have no teacher.
  return jnp.sum(each, axis=1, where=jnp.arange(each.shape[1]) < task)


def _teacher(params: Any, batch_stats: Any) -> Variables:
  """Copies a network: a step donates its buffers, so the teacher must have its own."""
  return jax.tree.map(jnp.copy, Variables(params, batch_stats))
