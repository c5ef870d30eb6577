"""Progressive networks: one column per task, connected to the frozen earlier columns.

    h_i = f(W h_{i-1} + U ReLU(V [alpha_j h_{i-1}^j]_j)),   j over the columns before

`models/columns.py` says which layers are connected. Nothing is forgotten, and there is no task
inference: with the task unknown, the class with the highest probability of all heads is taken.

Axes: N examples, T tasks, C classes of a task, J = T - 1 columns before the last.
Reference: Rusu et al., "Progressive neural networks", 2016.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
  StepLoss,
  TaskData,
  Variables,
  put_task,
  stack_tasks,
  task_entry,
  tree_size,
)
from gating_jax.models.columns import Column, output_shapes
from gating_jax.models.summary import columns_macs
from gating_jax.types import Array, Tree


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

  The memory is the `Variables` of every task's column, `[T, ...]`.
  """

  column: Column
  problem: Problem

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.predict,
      footprint=self.footprint,
    )

  def init(self, key: Array) -> InitialState:
    """Initialises the first column, and the memory of all columns."""
    column = self._fresh(key)
    # Entries of columns to come hold initial values, which nothing reads.
    memory = stack_tasks(column, self.problem.tasks)
    return InitialState(column.params, column.batch_stats, memory)

  def loss(self, params: Tree, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the cross-entropy of the column being trained, on `[N, H, W, D]` images."""

    def fill(j, before):
      """Adds the layer outputs of column j."""
      _, outputs = self._run(task_entry(learner.memory, j), batch.x, before)
      return self._put(before, j, outputs)

    # There are at most J = T - 1 columns before, also when `task` is T.
    columns = jnp.minimum(learner.task, self.problem.tasks - 1)
    before = lax.fori_loop(0, columns, fill, self._no_outputs(len(batch.x)))
    # Earlier columns are in evaluation and get no gradient; only the last one trains.
    (logits, _), new = self.column.apply(
      {"params": params, "batch_stats": learner.batch_stats},
      batch.x,
      before,
      train=True,
      mutable=["batch_stats"],
    )
    terms = shared_net.head_terms(logits, batch.labels, task=learner.task, problem=self.problem)
    return terms["cross_entropy"], (terms, new.get("batch_stats", {}))

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Stores the trained column and initialises the next one."""
    trained, fresh = Variables(learner.params, learner.batch_stats), self._fresh(key)
    return learner.replace(
      params=fresh.params,
      batch_stats=fresh.batch_stats,
      memory=put_task(learner.memory, int(learner.task), trained),
    )

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images from the columns of `seen` tasks."""

    def one(before, j):
      """Adds the layer outputs of column j, and returns its `[N, C]` logits."""
      logits, outputs = self._run(task_entry(learner.memory, j), x, before)
      return self._put(before, j, outputs), logits

    # Column by column: each needs the outputs of those before it.
    _, logits = lax.scan(one, self._no_outputs(len(x)), jnp.arange(seen))
    # Columns are ungated: every image costs the same.
    aware, agnostic = columns_macs(self.column, self.problem.shape, seen)
    return shared_net.prediction(
      self.problem,
      logits,
      task=task,
      macs=jnp.broadcast_to(aware[:, None], logits.shape[:-1]),
      agnostic_macs=jnp.broadcast_to(agnostic, (len(x),)),
    )

  def footprint(self, learner: LearnerState) -> Footprint:
    """Counts the parameters of the columns learnt.

    Every column has adapters for all other columns; of column j only the j that are used count.
    """
    adapters = 0
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(learner.params)
    for path, leaf in flat.items():
      if any("adapter" in name for name in path):
        adapters += leaf.size
    learnt = int(learner.task)
    layers = learnt * (tree_size(learner.params) - adapters)
    # Column j uses adapters for j columns: 0 + 1 + ... + (learnt - 1) of them in all.
    pairs = learnt * (learnt - 1) // 2
    return Footprint(layers + pairs * (adapters // self._places), 0.0)

  @property
  def _places(self) -> int:
    """Returns J, the number of earlier columns that a column has room for; at least 1."""
    return max(1, self.problem.tasks - 1)

  def _fresh(self, key: Array) -> Variables:
    """Initialises a column."""
    x = jnp.zeros((1, *self.problem.shape))
    variables = self.column.init(key, x, self._no_outputs(1))
    return Variables(variables["params"], variables.get("batch_stats", {}))

  def _no_outputs(self, examples: int) -> tuple[Array, ...]:
    """Returns the earlier outputs that the first column sees: zeros, `[J, N, ...]` per layer."""
    shapes = output_shapes(self.column, self.problem.shape)
    return tuple(jnp.zeros((self._places, examples, *s), self.column.dtype) for s in shapes)

  def _run(
    self, column: Variables, x: Array, before: tuple[Array, ...]
  ) -> tuple[Array, tuple[Array, ...]]:
    """Computes logits and layer outputs of a column in evaluation.

    `before` has zeros for columns from this one on.
    """
    variables = {"params": column.params, "batch_stats": column.batch_stats}
    outputs: Any = self.column.apply(variables, x, before)
    return outputs

  def _put(
    self, before: tuple[Array, ...], j: Array, outputs: tuple[Array, ...]
  ) -> tuple[Array, ...]:
    """Puts the outputs of column j into `before`; those of the last column are never read."""
    # There is no place for the last column: its outputs are dropped.
    return jax.tree.map(lambda b, output: b.at[j].set(output, mode="drop"), before, outputs)
