"""Progressive networks: one column per task, connected to the frozen earlier columns.

    h_i = f(W h_{i-1} + U ReLU(V [alpha_j h_{i-1}^j]_j)),   j over the columns before

`models/columns.py` says which layers are connected. Nothing is forgotten, and there is no task
inference: with the task unknown, the class with the highest probability of all heads is taken.

Axes: N examples, T tasks, C classes of a task, J = T - 1 columns before the last.
Reference: Rusu et al., "Progressive neural networks", 2016.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from gating_jax.continual import shared_net
from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  Method,
  Prediction,
  Problem,
  TaskData,
  tree_size,
)
from gating_jax.models.columns import Column, column_macs, output_shapes
from gating_jax.types import Array

Tree = Any


def progressive(column: Column, problem: Problem) -> Method:
  """Makes the method, with one such column per task.

  Args:
    column: the network of a task, with a head of C classes.
    problem: the learning problem.
  """
  return _Progressive(column, problem).method()


@dataclasses.dataclass(frozen=True)
class _Progressive:
  """The functions of the method, over parameters and statistics of the column being trained.

  Memory: `{"params", "batch_stats"}` of every task's column, `[T, ...]`.
  """

  column: Column
  problem: Problem

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(self.init, self.loss, self.end_task, self.predict, footprint=self.footprint)

  def init(self, key: Array) -> InitialState:
    """Initialises the first column, and the memory of all columns."""
    column = self._fresh(key)
    return InitialState(
      column["params"], column["batch_stats"], shared_net.stack(column, self.problem.tasks)
    )

  def loss(
    self, params: Tree, learner: LearnerState, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Tree]]:
    """Computes the cross-entropy of the column being trained, on `[N, H, W, D]` images."""
    before = self._none(len(batch.x))

    def fill(j, before):
      """Adds the layer outputs of column j."""
      return self._put(before, j, self._run(learner.memory, j, batch.x, before)[1])

    # There are at most J = T - 1 columns before, also when `task` is T.
    before = lax.fori_loop(0, jnp.minimum(learner.task, self.problem.tasks - 1), fill, before)
    # Earlier columns are in evaluation and get no gradient; only the last one trains.
    (logits, _), new = self.column.apply(
      {"params": params, "batch_stats": learner.batch_stats},
      batch.x,
      before,
      train=True,
      mutable=["batch_stats"],
    )
    terms = shared_net.head_terms(logits, batch.labels, learner.task, self.problem)
    return terms["cross_entropy"], (terms, new.get("batch_stats", {}))

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Stores the trained column and initialises the next one."""
    column, fresh = {"params": learner.params, "batch_stats": learner.batch_stats}, self._fresh(key)
    return learner.replace(
      **fresh, memory=shared_net.put(learner.memory, int(learner.task), column)
    )

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images from the columns of `seen` tasks."""

    def one(before, j):
      """Adds the layer outputs of column j, and returns its `[N, C]` logits."""
      logits, outputs = self._run(learner.memory, j, x, before)
      return self._put(before, j, outputs), logits

    # Column by column: each needs the outputs of those before it.
    _, logits = lax.scan(one, self._none(len(x)), jnp.arange(seen))
    macs = [column_macs(self.column, self.problem.shape, j) for j in range(seen)]
    layers, heads = (np.array(column, np.float32) for column in zip(*macs, strict=True))
    # Columns are ungated: every image costs the same.
    every = lambda total: jnp.broadcast_to(total, logits.shape[:-1])
    # Column j needs the layers of all columns up to it, and its own head.
    aware = every((np.cumsum(layers) + heads)[:, None])
    return shared_net.prediction(
      self.problem, logits, task, aware, every(layers.sum() + heads.sum())[0]
    )

  def footprint(self, learner: LearnerState) -> Footprint:
    """Counts the parameters of the columns learnt.

    Every column has adapters for all other columns; of column j only the j that are used count.
    """
    learnt, places = int(learner.task), max(1, self.problem.tasks - 1)
    adapters = sum(
      leaf.size
      for path, leaf in traverse_util.flatten_dict(learner.params).items()
      if any("adapter" in name for name in path)
    )
    used = learnt * (tree_size(learner.params) - adapters) + learnt * (learnt - 1) // 2 * (
      adapters // places
    )
    return Footprint(used, 0.0)

  def _fresh(self, key: Array) -> dict[str, Tree]:
    variables = self.column.init(key, jnp.zeros((1, *self.problem.shape)), self._none(1))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  def _none(self, examples: int) -> tuple[Array, ...]:
    """Returns the earlier outputs that the first column sees: zeros.

    There is at least one place, where there is one task.
    """
    places = max(1, self.problem.tasks - 1)
    return tuple(
      jnp.zeros((places, examples, *shape), self.column.dtype)
      for shape in output_shapes(self.column, self.problem.shape)
    )

  def _run(
    self, columns: Tree, j: Array, x: Array, before: tuple[Array, ...]
  ) -> tuple[Array, tuple[Array, ...]]:
    """Computes logits and layer outputs of column j in evaluation.

    `before` has zeros for columns from j on.
    """
    return self.column.apply(jax.tree.map(lambda tree: tree[j], columns), x, before)

  def _put(
    self, before: tuple[Array, ...], j: Array, outputs: tuple[Array, ...]
  ) -> tuple[Array, ...]:
    """Puts the outputs of column j into `before`; those of the last column are never read."""
    # There is no place for the last column: its outputs are dropped.
    return tuple(b.at[j].set(o, mode="drop") for b, o in zip(before, outputs, strict=True))
