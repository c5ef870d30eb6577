"""A network with shared convolutions, and gates, BatchNorm and head per task.

Parameters and statistics are trees of two parts, `{"shared", "own"}`. The own parts of all tasks
are stacked, `[T, ...]`.

Axes: N examples, T tasks, C classes of a task, F features, U gated units of the network.
Reference: Abati et al., 2020; Serra et al., 2018 (one head per task).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from gating_jax.continual.method import Prediction, Problem, TaskNet
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.summary import ModelCounts
from gating_jax.ops.macs import executed_macs
from gating_jax.types import Array, Records

Tree = Any


class TaskForward(NamedTuple):
  """A forward pass of one task.

  Attributes:
    logits: `[N, C]`.
    features: `[N, F]`.
    records: of the gates.
    batch_stats: the new running statistics.
  """

  logits: Array
  features: Array
  records: Records
  batch_stats: Tree


@dataclasses.dataclass(frozen=True)
class SharedNet:
  """The network.

  Attributes:
    model: maps images to `([N, F] features, records)`, its records with writers.
    problem: the learning problem.
    own_norms: whether every task has its own BatchNorm.
  """

  model: nn.Module
  problem: Problem
  own_norms: bool = True

  def fresh(self, key: Array) -> tuple[Tree, Tree]:
    """Initialises parameters and statistics, split into their parts."""
    network, head = jax.random.split(key)
    variables = self.model.init(network, jnp.zeros((1, *self.problem.shape)))
    _, features = self.shapes
    # The head is no part of the model, which ends at its features.
    kernel = nn.initializers.lecun_normal()(head, (features, self.problem.classes))
    params = self._split(variables["params"])
    own = {
      "net": params["own"],
      "head": {"kernel": kernel, "bias": jnp.zeros(self.problem.classes)},
    }
    return {"shared": params["shared"], "own": own}, self._split(variables.get("batch_stats", {}))

  def apply(self, params: Tree, batch_stats: Tree, x: Array, **training) -> TaskForward:
    """Runs the network for the task whose own part is in the trees.

    Args:
      params, batch_stats: `{"shared", "own"}`, the own part of one task.
      x: `[N, H, W, D]`.
      **training: keywords of the `apply` of a Flax module; evaluation without any.
    """
    _, variables, (kernel, bias) = self._net(params, batch_stats)
    if training:
      (features, records), new = self.model.apply(variables, x, mutable=["batch_stats"], **training)
      batch_stats = self._split(new.get("batch_stats", {}))
    else:
      features, records = self.model.apply(variables, x)
    return TaskForward(features @ kernel + bias, features, records, batch_stats)

  def side_by_side(self, params: Tree, batch_stats: Tree, own: Tree, x: Array) -> TaskForward:
    """Runs all tasks of `own`, one after the other, in evaluation.

    Args:
      params, batch_stats: trees with the shared parts.
      own: `{"params", "batch_stats"}`, each array stacked over tasks.
      x: `[N, H, W, D]`.
    Returns:
      a `Stream` of arrays stacked over tasks.
    """
    # Not vmap, whose rounding depends on the number of tasks: this is one program for any number.
    return jax.lax.map(lambda own: self.of_task(params, batch_stats, own, x), own)

  def of_task(self, params: Tree, batch_stats: Tree, own: Tree, x: Array) -> TaskForward:
    """Runs the network for a task with the own part `own`, in evaluation."""
    return self.apply(
      {**params, "own": own["params"]}, {**batch_stats, "own": own["batch_stats"]}, x
    )

  def net_of(self, params: Tree, batch_stats: Tree, owns: Tree, task: Array) -> TaskNet:
    """Returns the network of one of the tasks in `owns`.

    Args:
      params, batch_stats: trees with the shared parts.
      owns: `{"params", "batch_stats"}`, each array stacked over tasks.
      task: its index.
    """
    own = jax.tree.map(lambda tree: tree[task], owns)
    return self._net({**params, "own": own["params"]}, {**batch_stats, "own": own["batch_stats"]})

  def _net(self, params: Tree, batch_stats: Tree) -> TaskNet:
    own = params["own"]
    variables = {
      "params": merge(params["shared"], own["net"]),
      "batch_stats": merge(batch_stats["shared"], batch_stats["own"]),
    }
    return TaskNet(self.model, variables, (own["head"]["kernel"], own["head"]["bias"]))

  @functools.cached_property
  def shapes(self) -> tuple[Records, int]:
    """Returns the records and the number of features, as shapes."""
    # One image stands for any number: only first axes depend on it.
    x = jax.ShapeDtypeStruct((1, *self.problem.shape), jnp.float32)
    (features, records), _ = jax.eval_shape(
      lambda x: self.model.init_with_output(jax.random.key(0), x), x
    )
    return records, features.shape[-1]

  def _split(self, tree: Tree) -> dict[str, Tree]:
    """Splits a tree into shared convolutions and each task's own rest."""
    flat = traverse_util.flatten_dict(tree)

    def is_shared(path):
      """Returns whether all tasks share the leaf at a path."""
      kernel = flat.get((*path[:-1], "kernel"))
      if kernel is not None:
        # Kernels of dense layers have two axes, those of convolutions more. A bias goes with its
        # kernel.
        return kernel.ndim > 2
      # Without a kernel it is a norm, or a gate that is a plain parameter.
      return not self.own_norms and not is_gate_path(path)

    return split(tree, is_shared)


def split(tree: Tree, is_shared: Callable[[Sequence[str]], bool]) -> dict[str, Tree]:
  """Splits a tree into two parts by the paths of its leaves.

  Args:
    tree: any tree of dicts.
    is_shared: `path -> bool`.
  Returns:
    `{"shared", "own"}`.
  """
  flat = traverse_util.flatten_dict(tree)
  part = lambda shared: traverse_util.unflatten_dict(
    {path: leaf for path, leaf in flat.items() if is_shared(path) == shared}
  )
  return {"shared": part(True), "own": part(False)}


def merge(shared: Tree, own: Tree) -> Tree:
  """Merges two parts again; the inverse of `split`."""
  return traverse_util.unflatten_dict(
    traverse_util.flatten_dict(shared) | traverse_util.flatten_dict(own)
  )


def stack(trees: Tree, tasks: int) -> Tree:
  """Repeats each array T times, one entry per task."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (tasks, *x.shape)), trees)


def put(stacked: Tree, task: int, tree: Tree) -> Tree:
  """Replaces one task's entry in a stacked tree.

  Args:
    stacked: arrays `[T, ...]`.
    task: index of the entry.
    tree: its new arrays `[...]`.
  """
  return jax.tree.map(lambda all_tasks, x: all_tasks.at[task].set(x), stacked, tree)


def head_terms(logits: Array, labels: Array, task: Array, problem: Problem) -> dict[str, Array]:
  """Computes `cross_entropy` and `accuracy` of one task's head.

  Args:
    logits: `[N, C]`.
    labels: `[N]`, all of this task.
    task: its index.
    problem: the learning problem.
  """
  own = labels - task * problem.classes
  return {
    "cross_entropy": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, own)),
    "accuracy": jnp.mean(jnp.argmax(logits, -1) == own),
  }


def macs(stream: TaskForward, counts: ModelCounts, classes: int) -> Array:
  """Computes the multiply-accumulates of each image in each stream.

  Args:
    stream: arrays `[..., N, C]` and so on.
    counts: of the model, which has no head.
    classes: outputs of the head.
  Returns:
    `[..., N]`.
  """
  # `counts` are of the features alone: the head is added, F C per image.
  fixed = jnp.full(
    stream.logits.shape[:-1], float(counts.always_macs + stream.features.shape[-1] * classes)
  )
  return fixed + executed_macs(stream.records) if stream.records else fixed


def prediction(
  problem: Problem,
  logits: Array,
  task: Array,
  macs: Array,
  agnostic_macs: Array,
  scores: Array | None = None,
) -> Prediction:
  """Builds a prediction from the heads of all tasks so far.

  Args:
    problem: the learning problem.
    logits: `[S, N, C]` of the S heads so far.
    task: the task that is known, for the task-aware prediction.
    macs: `[S, N]` of each stream.
    agnostic_macs: `[N]` with the task unknown.
    scores: `[S, N, C]` of all classes with the task unknown; the log-probabilities of each head by
      default.
  """
  scores = jax.nn.log_softmax(logits) if scores is None else scores
  # Classes are numbered task by task: [S, N, C] becomes [N, S C].
  scores = jnp.moveaxis(scores, 0, 1).reshape(logits.shape[1], -1)
  missing = problem.all_classes - scores.shape[1]
  # Classes of later tasks cannot win.
  agnostic = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
  return Prediction(
    jnp.take(logits, task, axis=0), agnostic, jnp.take(macs, task, axis=0), agnostic_macs
  )
