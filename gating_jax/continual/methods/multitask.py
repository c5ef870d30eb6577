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
from collections.abc import Mapping
from typing import Any

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
  Method,
  Network,
  Prediction,
  Problem,
  TaskData,
  TaskNet,
  tree_size,
)
from gating_jax.continual.methods.task_gates import TaskGatesSettings
from gating_jax.layers.gate import GATE_RNG
from gating_jax.models.summary import ModelCounts
from gating_jax.training.closed_gates import CLOSED, closed_share
from gating_jax.types import Array

Tree = Any


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

  def predict(learner, x, task, seen):
    """Predicts from the log-probabilities of all heads, `[N, T C]`."""
    heads = network.logits(learner.params, learner.batch_stats, x).reshape(-1, tasks, classes)
    # Log-probabilities within each head: only these can be compared between heads.
    return network.prediction(jax.nn.log_softmax(heads).reshape(-1, tasks * classes), task, seen)

  return Method(
    init=lambda key: InitialState(*network.init(key), ()),
    loss=loss,
    end_task=lambda learner, data, key: learner,
    predict=predict,
    simultaneous=True,
  )


def by_task(batch: Array, tasks: int) -> Array:
  """Separates a batch `[B T, ...]` of alternating tasks into `[T, B, ...]`.

  >>> by_task(jnp.array([0, 10, 1, 11, 2, 12]), 2)
  Array([[ 0,  1,  2],
         [10, 11, 12]], dtype=int32)
  """
  return jnp.swapaxes(batch.reshape(-1, tasks, *batch.shape[1:]), 0, 1)


@dataclasses.dataclass(frozen=True)
class _Multitask:
  """The functions of the method, over the parameters and statistics of `SharedNet`.

  Own parts are `[T, ...]`. Memory, where the model is gated: `relevant` `[T, U]`.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  settings: TaskGatesSettings | None = None

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      self.init,
      self.loss,
      self.end_task,
      self.predict,
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
    params, batch_stats = jax.lax.map(self.net.fresh, jax.random.split(key, self.problem.tasks))
    # Own parts for every task, from a key each; of the shared parts only the first.
    of_first = lambda tree: {**tree, "shared": jax.tree.map(lambda x: x[0], tree["shared"])}
    shape = (self.problem.tasks, self.counts.gates)
    return InitialState(
      of_first(params),
      of_first(batch_stats),
      {"relevant": jnp.zeros(shape, bool)} if self.settings else {},
    )

  def loss(
    self, params: Tree, learner: LearnerState, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Tree]]:
    """Computes the sum of all tasks' losses, on `[B T, H, W, D]` images."""

    def of_task(task, own, own_stats, x, labels):
      """Returns one task's loss on `[B, H, W, D]` images, its terms and its statistics."""
      stream = self.net.apply(
        {**params, "own": own},
        {**learner.batch_stats, "own": own_stats},
        x,
        train=True,
        # Noise of its own for every task.
        rngs={GATE_RNG: jax.random.fold_in(batch.key, task)},
      )
      terms = shared_net.head_terms(stream.logits, labels, task, self.problem)
      if not self.settings:
        return terms["cross_entropy"], terms, stream.batch_stats["own"]
      # Nothing is protected, so all units are available to every task.
      terms["sparsity"] = units.open_share(stream.records, np.ones(self.counts.gates, bool))
      terms[CLOSED] = closed_share(stream.records, axis_name=self.problem.axis_name)
      total = terms["cross_entropy"] + self.settings.price(batch.epoch) * terms["sparsity"]
      return total, terms, stream.batch_stats["own"]

    tasks = self.problem.tasks
    # All tasks have the same shapes: vmap runs them as one.
    totals, terms, own_stats = jax.vmap(of_task)(
      jnp.arange(tasks),
      params["own"],
      learner.batch_stats["own"],
      by_task(batch.x, tasks),
      by_task(batch.labels, tasks),
    )
    # L is a sum, so that a task's own parts get the gradient that they would get alone.
    return jnp.sum(totals), (
      jax.tree.map(jnp.mean, terms),
      {**learner.batch_stats, "own": own_stats},
    )

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Finds the units relevant to each task, on its validation images."""
    if not self.settings:
      return learner
    # `[M, T, U]`: gates of all tasks for each image.
    gates = self.problem.in_batches(
      lambda learner, x: jnp.moveaxis(units.joined(self._streams(learner, x).records), 0, 1),
      learner,
      data.validation_pixels,
    )
    of_task = np.asarray(data.validation_labels) // self.problem.classes
    # A task's gates are measured on its own validation images.
    rates = [
      gates[of_task == t, t].mean(axis=0, dtype=np.float64) for t in range(self.problem.tasks)
    ]
    return learner.replace(
      memory={"relevant": jnp.asarray(np.stack(rates) > self.settings.threshold)}
    )

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images, with the task known and unknown."""
    stream = self._streams(learner, x)
    macs = shared_net.macs(stream, self.counts, self.problem.classes)
    return shared_net.prediction(self.problem, stream.logits, task, macs, macs.sum(0))

  def footprint(self, learner: LearnerState) -> Footprint:
    """Measures the parameters, and the units that each task needs."""
    params = tree_size(learner.params)
    if not self.settings:
      return Footprint(params, 0.0)
    available = np.ones(self.counts.gates, bool)
    return Footprint(
      params, 0.0, units.used_by(learner.memory["relevant"], available, self.net.shapes[0])
    )

  def task_net(self, learner: LearnerState, task: Array) -> TaskNet:
    """Returns the gated network of a task."""
    own = {"params": learner.params["own"], "batch_stats": learner.batch_stats["own"]}
    return self.net.net_of(learner.params, learner.batch_stats, own, task)

  def _streams(self, learner: LearnerState, x: Array) -> shared_net.TaskForward:
    own = {"params": learner.params["own"], "batch_stats": learner.batch_stats["own"]}
    return self.net.side_by_side(learner.params, learner.batch_stats, own, x)
