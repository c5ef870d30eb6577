"""Joint multi-task learning: all tasks at once on shared convolutions.

    L = sum_t [ cross-entropy of task t's head on its images
                + lambda_s (fraction of its gates that are open) ]

With `multitask_trunk` each task has its own head; with `multitask_norms` its own BatchNorm too;
with `multitask_gates` its own gate networks too. A task's own parts get the gradient that they
would get alone; tasks affect each other through what they share. Only where the gradient's norm is
clipped, by one bound for all tasks, do they slow each other's own parts too.

Axes: B examples of each task, N or M examples, T tasks, C classes of a task, U gated units of the
network.
Reference: Caruana, "Multitask learning", 1997; Abati et al., 2020 (the gates).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.continual import shared_net, units
from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Network,
  Prediction,
  Problem,
  StepLoss,
  TaskData,
  TaskNet,
  task_entry,
  tree_size,
)
from gating_jax.continual.methods.task_gates import TaskGatesSettings
from gating_jax.continual.shared_net import OWN, SHARED
from gating_jax.layers.gate import GATE_RNG
from gating_jax.models.summary import ModelCounts
from gating_jax.ops.penalties import closed_share
from gating_jax.training.closed_gates import CLOSED
from gating_jax.types import Array, Tree


def multitask_gates(
  model: nn.Module, problem: Problem, counts: ModelCounts, settings: TaskGatesSettings
) -> Method:
  """Makes the method in which each task has its own gate networks, BatchNorm and head.

  Args:
    model: maps images to `([N, F] features, records)`, its records with writers.
    problem: the learning problem.
    counts: of the model.
    settings: only `sparsity`, `patience` and `threshold` are read; there are no later tasks to
      protect from.
  """
  return _Multitask(shared_net.SharedNet(model, problem), counts, settings).method()


def multitask_norms(model: nn.Module, problem: Problem, counts: ModelCounts) -> Method:
  """Makes the method in which each task has its own BatchNorm and head; no gates.

  Args:
    model: maps images to `([N, F] features, records)`, ungated.
    problem: the learning problem.
    counts: of the model.
  """
  return _Multitask(shared_net.SharedNet(model, problem), counts).method()


def multitask_trunk(network: Network) -> Method:
  """Makes the method in which each task has its own head, and all else is shared.

  A head is a task's columns of the network's outputs.
  """
  classes, tasks = network.problem.classes, network.problem.tasks

  def loss(params, learner, batch):
    """Computes the sum of all tasks' cross-entropies."""
    mean, aux = network.loss(params, learner, batch)
    # The loss is a sum over tasks; `mean` is over the images of all of them, B of each.
    return tasks * mean, aux

  def init(key):
    """Initialises the network; nothing is kept."""
    return InitialState(*network.init(key), ())

  def end_task(learner, data, key):
    """Returns the learner as it is: all tasks end at once."""
    return learner

  def predict(learner, x, task, seen):
    """Predicts from the log-probabilities of all heads, `[N, T C]`."""
    heads = network.logits(learner.params, learner.batch_stats, x).reshape(-1, tasks, classes)
    # Log-probabilities within each head: only these can be compared between heads.
    return network.prediction(jax.nn.log_softmax(heads).reshape(-1, tasks * classes), task, seen)

  return Method(init, loss, end_task, predict=predict, simultaneous=True)


def by_task(batch: Array, tasks: int) -> Array:
  """Separates a batch `[B T, ...]` of alternating tasks into `[T, B, ...]`.

  >>> by_task(jnp.array([0, 10, 1, 11, 2, 12]), 2)
  Array([[ 0,  1,  2],
         [10, 11, 12]], dtype=int32)
  """
  # Position i T + t holds image i of task t.
  return jnp.swapaxes(batch.reshape(-1, tasks, *batch.shape[1:]), 0, 1)


class MultitaskMemory(MemoryNode):
  """The memory of the method where the model is gated.

  Attributes:
    relevant: `[T, U]` bool, the units that each task needs.
  """

  relevant: Array


@dataclasses.dataclass(frozen=True)
class _Multitask:
  """The functions of the method, over the parameters and statistics of `SharedNet`.

  The own parts in them are of all tasks, `[T, ...]`.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  settings: TaskGatesSettings | None = None

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.predict,
      footprint=self.footprint,
      simultaneous=True,
      task_net=self.task_net if self.settings else None,
    )

  @property
  def problem(self) -> Problem:
    """Returns the learning problem."""
    return self.net.problem

  def init(self, key: Array) -> InitialState:
    """Initialises the shared part, and the own parts of all tasks."""
    # Own parts for every task, from a key each; of the shared parts only the first.
    params, batch_stats = jax.lax.map(self.net.fresh, jax.random.split(key, self.problem.tasks))
    params[SHARED] = task_entry(params[SHARED], 0)
    batch_stats[SHARED] = task_entry(batch_stats[SHARED], 0)
    # Without gates nothing is kept.
    memory = ()
    if self.settings:
      memory = MultitaskMemory(jnp.zeros((self.problem.tasks, self.counts.gates), bool))
    return InitialState(params, batch_stats, memory)

  def loss(self, params: Tree, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the sum of all tasks' losses, on `[B T, H, W, D]` images."""

    def of_task(task, own, own_stats, x, labels):
      """Returns one task's loss on `[B, H, W, D]` images, its terms and its statistics."""
      forward = self.net.apply(
        {**params, OWN: own},
        {**learner.batch_stats, OWN: own_stats},
        x,
        train=True,
        # Noise of its own for every task.
        rngs={GATE_RNG: jax.random.fold_in(batch.key, task)},
      )
      terms = shared_net.head_terms(forward.logits, labels, task=task, problem=self.problem)
      total = terms["cross_entropy"]
      if self.settings:
        # Nothing is protected, so all units are available to every task.
        terms["sparsity"] = units.open_share(forward.records, np.ones(self.counts.gates, bool))
        terms[CLOSED] = closed_share(forward.records, axis_name=self.problem.axis_name)
        total += self.settings.sparsity_weight(batch.epoch) * terms["sparsity"]
      return total, terms, forward.batch_stats[OWN]

    tasks = self.problem.tasks
    # All tasks have the same shapes: vmap runs them as one.
    totals, terms, own_stats = jax.vmap(of_task)(
      jnp.arange(tasks),
      params[OWN],
      learner.batch_stats[OWN],
      by_task(batch.x, tasks),
      by_task(batch.labels, tasks),
    )
    # L is a sum, so that a task's own parts get the gradient that they would get alone.
    batch_stats = {**learner.batch_stats, OWN: own_stats}
    return jnp.sum(totals), (jax.tree.map(jnp.mean, terms), batch_stats)

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Finds the units relevant to each task, on its validation images."""
    if not self.settings:
      return learner

    def gates_of(learner, x):
      """Returns the gates of all tasks for each image, `[N, T, U]`."""
      return jnp.moveaxis(units.join_gates(self._run_tasks(learner, x).records), 0, 1)

    gates = self.problem.in_batches(gates_of, learner, data.validation_pixels)
    task_of_image = self.problem.task_of(np.asarray(data.validation_labels))
    rates = []
    for task in range(self.problem.tasks):
      # A task's gates are measured on its own validation images.
      rates.append(gates[task_of_image == task, task].mean(axis=0, dtype=np.float64))
    # A unit is relevant if its gate opens for more than this fraction of the images.
    relevant = np.stack(rates) > self.settings.threshold
    return learner.replace(memory=MultitaskMemory(jnp.asarray(relevant)))

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images, with the task known and unknown."""
    forward = self._run_tasks(learner, x)
    macs = shared_net.forward_macs(forward, self.counts, self.problem.classes)
    # With the task unknown all networks run, so their costs add up.
    return shared_net.prediction(
      self.problem, forward.logits, task=task, macs=macs, agnostic_macs=macs.sum(0)
    )

  def footprint(self, learner: LearnerState) -> Footprint:
    """Measures the parameters, and the units that each task needs."""
    params = tree_size(learner.params)
    if not self.settings:
      return Footprint(params, 0.0)
    # Tasks share all units: none is kept for later ones.
    available = np.ones(self.counts.gates, bool)
    relevant = units.used_by(learner.memory.relevant, available, self.net.shapes[0])
    return Footprint(params, 0.0, relevant)

  def task_net(self, learner: LearnerState, task: Array) -> TaskNet:
    """Returns the gated network of a task."""
    owns = shared_net.own_part(learner.params, learner.batch_stats)
    return self.net.task_net(learner, owns, task)

  def _run_tasks(self, learner: LearnerState, x: Array) -> shared_net.TaskForward:
    """Runs the networks of all tasks, which are learnt at once."""
    owns = shared_net.own_part(learner.params, learner.batch_stats)
    return self.net.run_tasks(learner, owns, x)
