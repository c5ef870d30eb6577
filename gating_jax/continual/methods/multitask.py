"""Joint multi-task learning: all tasks at once on shared convolutions, with more or less that each task has for itself.

    L = sum_t [ cross-entropy of task t's head on its images + lambda_s (share of its gates that are open) ]

`multitask_trunk`: only a head. `multitask_norms`: BatchNorm as well. `multitask_gates`: gate networks too. What a task
has for itself gets the gradient it would get alone; what tasks do to each other, they do in what they share. Only where
the gradient's norm is clipped, a bound over all tasks, do they slow each other's own parts as well.

Axes: B examples of each task, N or M examples, T tasks, C classes of a task, U gated units of the network.
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
  Holdings,
  Learner,
  Method,
  Network,
  Prediction,
  Problem,
  Start,
  TaskData,
  TaskNet,
  tree_size,
)
from gating_jax.continual.methods.task_gates import TaskGatesSettings
from gating_jax.layers.gate import GATE_RNG
from gating_jax.models.summary import ModelCounts
from gating_jax.training.closing import CLOSED, closed_share
from gating_jax.types import Array

Tree = Any


def multitask_gates(
  model: nn.Module, problem: Problem, counts: ModelCounts, settings: TaskGatesSettings
) -> Method:
  """Every task has gate networks, BatchNorm and a head for itself.

  Args:
    model: from images to `([N, F] features, records)`, its records naming their writers.
    problem: what it learns.
    counts: of the model.
    settings: of which `sparsity`, `patience` and `threshold` are read: there is nothing to protect
      from later tasks.
  """
  return _Multitask(shared_net.SharedNet(model, problem), counts, settings).method()


def multitask_norms(model: nn.Module, problem: Problem, counts: ModelCounts) -> Method:
  """Every task has BatchNorm and a head for itself; the model is ungated."""
  return _Multitask(shared_net.SharedNet(model, problem), counts).method()


def multitask_trunk(network: Network) -> Method:
  """Every task has a head for itself, its columns of the network's outputs; all else is shared."""
  classes, tasks = network.problem.classes, network.problem.tasks

  def loss(params, learner, batch):
    mean, aux = network.loss(params, learner, batch)
    return tasks * mean, aux

  def predict(learner, x, task, seen):
    heads = network.logits(learner.params, learner.batch_stats, x).reshape(-1, tasks, classes)
    return network.prediction(jax.nn.log_softmax(heads).reshape(-1, tasks * classes), task, seen)

  return Method(
    init=lambda key: Start(*network.init(key), ()),
    loss=loss,
    end_task=lambda learner, data, key: learner,
    predict=predict,
    together=True,
  )


def by_task(batch: Array, tasks: int) -> Array:
  """`[B T, ...]`, in which tasks follow each other example by example, to `[T, B, ...]`.

  >>> by_task(jnp.array([0, 10, 1, 11, 2, 12]), 2)
  Array([[ 0,  1,  2],
         [10, 11, 12]], dtype=int32)
  """
  return jnp.swapaxes(batch.reshape(-1, tasks, *batch.shape[1:]), 0, 1)


@dataclasses.dataclass(frozen=True)
class _Multitask:
  """The functions of the method, over the parameters and statistics of `SharedNet`, those of the own part `[T, ...]`.

  Memory, where the model is gated: `relevant` `[T, U]`.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  settings: TaskGatesSettings | None = None

  def method(self) -> Method:
    return Method(
      self.init,
      self.loss,
      self.end_task,
      self.predict,
      holdings=self.holdings,
      together=True,
      task_net=self.task_net if self.settings else None,
    )

  @property
  def problem(self) -> Problem:
    return self.net.problem

  def init(self, key: Array) -> Start:
    params, batch_stats = jax.lax.map(self.net.fresh, jax.random.split(key, self.problem.tasks))
    of_first = lambda tree: {**tree, "shared": jax.tree.map(lambda x: x[0], tree["shared"])}
    shape = (self.problem.tasks, self.counts.gates)
    return Start(
      of_first(params),
      of_first(batch_stats),
      {"relevant": jnp.zeros(shape, bool)} if self.settings else {},
    )

  def loss(
    self, params: Tree, learner: Learner, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Tree]]:
    def of_task(task, own, own_stats, x, labels):
      stream = self.net.apply(
        {**params, "own": own},
        {**learner.batch_stats, "own": own_stats},
        x,
        train=True,
        rngs={GATE_RNG: jax.random.fold_in(batch.key, task)},
      )
      terms = shared_net.head_terms(stream.logits, labels, task, self.problem)
      if not self.settings:
        return terms["cross_entropy"], terms, stream.batch_stats["own"]
      terms["sparsity"] = units.open_share(stream.records, np.ones(self.counts.gates, bool))
      terms[CLOSED] = closed_share(stream.records, axis_name=self.problem.axis_name)
      total = terms["cross_entropy"] + self.settings.price(batch.epoch) * terms["sparsity"]
      return total, terms, stream.batch_stats["own"]

    tasks = self.problem.tasks
    totals, terms, own_stats = jax.vmap(of_task)(
      jnp.arange(tasks),
      params["own"],
      learner.batch_stats["own"],
      by_task(batch.x, tasks),
      by_task(batch.labels, tasks),
    )
    return jnp.sum(totals), (
      jax.tree.map(jnp.mean, terms),
      {**learner.batch_stats, "own": own_stats},
    )

  def end_task(self, learner: Learner, data: TaskData, key: Array) -> Learner:
    if not self.settings:
      return learner
    gates = self.problem.in_batches(  # [M, T, U]
      lambda learner, x: jnp.moveaxis(units.joined(self._streams(learner, x).records), 0, 1),
      learner,
      data.validation_pixels,
    )
    of_task = np.asarray(data.validation_labels) // self.problem.classes
    rates = [
      gates[of_task == t, t].mean(axis=0, dtype=np.float64) for t in range(self.problem.tasks)
    ]
    return learner.replace(
      memory={"relevant": jnp.asarray(np.stack(rates) > self.settings.threshold)}
    )

  def predict(self, learner: Learner, x: Array, task: Array, seen: int) -> Prediction:
    stream = self._streams(learner, x)
    macs = shared_net.macs(stream, self.counts, self.problem.classes)
    return shared_net.prediction(self.problem, stream.logits, task, macs, macs.sum(0))

  def holdings(self, learner: Learner) -> Holdings:
    params = tree_size(learner.params)
    if not self.settings:
      return Holdings(params, 0.0)
    available = np.ones(self.counts.gates, bool)
    return Holdings(
      params, 0.0, units.used_by(learner.memory["relevant"], available, self.net.shapes[0])
    )

  def task_net(self, learner: Learner, task: Array) -> TaskNet:
    own = {"params": learner.params["own"], "batch_stats": learner.batch_stats["own"]}
    return self.net.net_of(learner.params, learner.batch_stats, own, task)

  def _streams(self, learner: Learner, x: Array) -> shared_net.Stream:
    own = {"params": learner.params["own"], "batch_stats": learner.batch_stats["own"]}
    return self.net.side_by_side(learner.params, learner.batch_stats, own, x)
