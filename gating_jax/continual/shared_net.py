"""A network with shared convolutions, and gates, BatchNorm and head per task.

Parameters and statistics are dicts of two parts, `{SHARED, OWN}`: the convolutions, and the rest,
of which each task has its own. A task's own part of the parameters is `{NET, HEAD}`: of the
network, which ends at its features, and of the linear head on them.

Where the own parts are kept, `Variables` hold parameters and statistics of all tasks, stacked over
them.

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

from gating_jax.continual.method import (
  LearnerState,
  Prediction,
  Problem,
  TaskNet,
  Variables,
  task_entry,
)
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.summary import ModelCounts
from gating_jax.ops.macs import dense_layer_macs
from gating_jax.types import Array, Path, Records, Tree

# Parts of a learner's parameters and statistics: of all tasks, and of one. Dicts, not nodes with
# fields: optimisers address leaves by paths through dicts.
SHARED, OWN = "shared", "own"
# Parts of a task's own parameters.
NET, HEAD = "net", "head"


class Parts(NamedTuple):
  """A tree in two parts.

  Attributes:
    shared: what all tasks share.
    own: what each task has of its own.
  """

  shared: Tree
  own: Tree


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
    # The head is no part of the model, so it needs a key of its own.
    network_key, head_key = jax.random.split(key)
    variables = self.model.init(network_key, jnp.zeros((1, *self.problem.shape)))
    _, features = self.shapes
    kernel = nn.initializers.lecun_normal()(head_key, (features, self.problem.classes))
    params = self._split(variables["params"])
    # Its bias starts at 0, as that of a Flax `Dense` does.
    head = {"kernel": kernel, "bias": jnp.zeros(self.problem.classes)}
    params[OWN] = {NET: params[OWN], HEAD: head}
    return params, self._split(variables.get("batch_stats", {}))

  def apply(self, params: Tree, batch_stats: Tree, x: Array, **training) -> TaskForward:
    """Runs the network for the task whose own part is in the trees.

    Args:
      params, batch_stats: `{SHARED, OWN}`, the own part of one task.
      x: `[N, H, W, D]`.
      **training: keywords of the `apply` of a Flax module; evaluation without any.
    """
    _, variables, (kernel, bias) = self._net(params, batch_stats)
    # Statistics change in training alone.
    if training:
      (features, records), new = self.model.apply(variables, x, mutable=["batch_stats"], **training)
      batch_stats = self._split(new.get("batch_stats", {}))
    else:
      outputs: Any = self.model.apply(variables, x)
      features, records = outputs
    return TaskForward(features @ kernel + bias, features, records, batch_stats=batch_stats)

  def run_tasks(self, learner: LearnerState, owns: Variables, x: Array) -> TaskForward:
    """Runs the networks of several tasks, one after the other, in evaluation.

    Args:
      learner: with the shared parts.
      owns: the tasks' own parts, stacked over them.
      x: `[N, H, W, D]`.
    Returns:
      a `TaskForward` of arrays stacked over tasks.
    """
    # Not vmap, whose rounding depends on the number of tasks: this is one program for any number.
    return jax.lax.map(lambda own: self.run_task(learner, own, x), owns)

  def run_task(self, learner: LearnerState, own: Variables, x: Array) -> TaskForward:
    """Runs the network of a task with the own part `own`, in evaluation."""
    return self.apply(*with_own(learner, own), x)

  def task_net(self, learner: LearnerState, owns: Variables, task: Array) -> TaskNet:
    """Returns the network of one task, whose own part is the entry of `task` in `owns`."""
    return self._net(*with_own(learner, task_entry(owns, task)))

  def _net(self, params: Tree, batch_stats: Tree) -> TaskNet:
    """Returns the network of the task whose own part is in the trees."""
    own, head = params[OWN], params[OWN][HEAD]
    variables = {
      "params": merge(params[SHARED], own[NET]),
      "batch_stats": merge(batch_stats[SHARED], batch_stats[OWN]),
    }
    return TaskNet(self.model, variables, (head["kernel"], head["bias"]))

  @functools.cached_property
  def shapes(self) -> tuple[Records, int]:
    """Returns the records and the number of features, as shapes."""
    # One image stands for any number: only first axes depend on it.
    x = jax.ShapeDtypeStruct((1, *self.problem.shape), jnp.float32)

    def init(x):
      """Returns the output for an image and the fresh variables."""
      return self.model.init_with_output(jax.random.key(0), x)

    (features, records), _ = jax.eval_shape(init, x)
    return records, features.shape[-1]

  def _split(self, tree: Tree) -> dict[str, Tree]:
    """Splits a tree into shared convolutions and each task's own rest, `{SHARED, OWN}`."""
    flat: dict[Path, Any] = traverse_util.flatten_dict(tree)

    def is_shared(path):
      """Returns whether all tasks share the leaf at a path."""
      # Each task has its own gates: their networks, thresholds and glance.
      if is_gate_path(path):
        return False
      kernel = flat.get((*path[:-1], "kernel"))
      if kernel is not None:
        # Kernels of dense layers have two axes, those of convolutions more. A bias goes with its
        # kernel.
        return kernel.ndim > 2
      # Without a kernel it is a norm.
      return not self.own_norms

    parts = split(tree, is_shared)
    return {SHARED: parts.shared, OWN: parts.own}


def split(tree: Tree, is_shared: Callable[[Sequence[str]], bool]) -> Parts:
  """Splits a tree into two parts by the paths of its leaves.

  Args:
    tree: any tree of dicts.
    is_shared: `path -> bool`.
  """
  shared, own = {}, {}
  for path, leaf in traverse_util.flatten_dict(tree).items():
    part = shared if is_shared(path) else own
    part[path] = leaf
  unflatten = traverse_util.unflatten_dict
  return Parts(unflatten(shared), unflatten(own))


def merge(shared: Tree, own: Tree) -> Tree:
  """Merges two parts again; the inverse of `split`."""
  return traverse_util.unflatten_dict(
    traverse_util.flatten_dict(shared) | traverse_util.flatten_dict(own)
  )


def own_part(params: Tree, batch_stats: Tree) -> Variables:
  """Returns the own part of parameters and statistics `{SHARED, OWN}`."""
  return Variables(params[OWN], batch_stats[OWN])


def with_own(learner: LearnerState, own: Variables) -> tuple[Tree, Tree]:
  """Returns a learner's parameters and statistics, with `own` as the own part of both."""
  params = {**learner.params, OWN: own.params}
  return params, {**learner.batch_stats, OWN: own.batch_stats}


def head_terms(logits: Array, labels: Array, *, task: Array, problem: Problem) -> dict[str, Array]:
  """Computes `cross_entropy` and `accuracy` of one task's head.

  Args:
    logits: `[N, C]`.
    labels: `[N]`, all of this task.
    task: its index.
    problem: the learning problem.
  """
  # The head numbers the classes of its task from 0.
  own = labels - task * problem.classes
  return {
    "cross_entropy": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, own)),
    "accuracy": jnp.mean(jnp.argmax(logits, -1) == own),
  }


def forward_macs(forward: TaskForward, counts: ModelCounts, classes: int) -> Array:
  """Computes the multiply-accumulates of each image in each task's forward pass.

  Args:
    forward: arrays `[..., N, C]` and so on.
    counts: of the model, which has no head.
    classes: outputs of the head.
  Returns:
    `[..., N]`.
  """
  # `counts` are of the features alone: the head is added.
  head = dense_layer_macs((forward.features.shape[-1], classes))
  return counts.per_example(forward.records, forward.logits.shape[:-1], further=head)


def prediction(
  problem: Problem,
  logits: Array,
  *,
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
    macs: `[S, N]` of each task's forward pass.
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
    aware=jnp.take(logits, task, axis=0),
    agnostic=agnostic,
    macs=jnp.take(macs, task, axis=0),
    agnostic_macs=agnostic_macs,
  )
