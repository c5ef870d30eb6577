"""What a continual-learning method is: pure functions over a learner, as an optimiser is of optax.

    init(key)                       -> Start          parameters, statistics and memory, their shapes the same for good
    loss(params, learner, batch)    -> (total, (terms, batch_stats))
    end_task(learner, data, key)    -> learner        what is kept of the task, and what the next one begins with
    predict(learner, x, task, seen) -> Prediction

Two more are the identity for most: `gradient` changes the gradient before the optimiser sees it, `update` what the
optimiser makes of it.

Axes: N or B examples, T tasks, C classes of a task, K = T C classes in all.
Reference: van de Ven and Tolias, "Three scenarios for continual learning", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gating_jax.data import batches
from gating_jax.data.tfds import Images
from gating_jax.layers.gate import GATE_RNG
from gating_jax.types import Array


class Table(NamedTuple):
  """What tests found, `[T, T]` each: row i after task i, column j on the test images of task j, NaN where j > i.

  Where all tasks are learnt together, there is only the last row.

  Attributes:
    aware, agnostic: accuracy with the task known and unknown.
    task: share of images whose task is told from the agnostic class.
    macs, agnostic_macs: multiply-accumulates per image.
  """

  aware: Array
  agnostic: Array
  task: Array
  macs: Array
  agnostic_macs: Array


class Learner(struct.PyTreeNode):
  """All that a run changes. Its structure and shapes never do, so that one program and one checkpoint serve all tasks.

  Attributes:
    step: steps taken in all.
    task: which task is being learnt, from 0; T when all are.
    params: what the optimiser changes.
    batch_stats: running statistics of the network that is being trained.
    opt_state: of the optimiser; fresh for every task.
    memory: whatever the method keeps of earlier tasks.
    table: the results of the tests so far.
  """

  step: Array
  task: Array
  params: Any
  batch_stats: Any
  opt_state: Any
  memory: Any
  table: Table


class Start(NamedTuple):
  """The parts of a learner that a method begins with."""

  params: Any
  batch_stats: Any
  memory: Any


class Batch(NamedTuple):
  """What a step sees.

  Attributes:
    x: `[B, H, W, D]` network input.
    labels: `[B]` places in the order of classes.
    key: for whatever is random.
    epoch: epochs of this task before this step, a float.
    place: of this step in its epoch: 0 for the first, 1 for the last.
  """

  x: Array
  labels: Array
  key: Array
  epoch: Array
  place: Array = 0.0


class Prediction(NamedTuple):
  """For images of one task.

  Attributes:
    aware: `[N, C]` scores of that task's classes, the task known.
    agnostic: `[N, K]` scores of all classes, the task unknown; minus infinity for classes not seen yet.
    macs: `[N]` multiply-accumulates of each.
    agnostic_macs: `[N]`.
  """

  aware: Array
  agnostic: Array
  macs: Array
  agnostic_macs: Array


class TaskNet(NamedTuple):
  """What runs for one task: the model, from images to `([N, F] features, records)`, its variables, and the classifier
  on the features, kernel `[F, C]` and bias `[C]`."""

  model: nn.Module
  variables: Mapping[str, Any]
  classifier: tuple[Array, Array]


class TaskData(NamedTuple):
  """A task's images as arrays: `pixels` uint8 `[M, H, W, D]`, `labels` `[M]`, and those held out of its training."""

  pixels: Any
  labels: Any
  validation_pixels: Any
  validation_labels: Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is to be learnt, the same for all methods.

  Attributes:
    tasks, classes: T and C.
    shape: `(H, W, D)` of an image.
    normalise: uint8 pixels to network input.
    augment: `(key, pixels) -> pixels`, the random changes of training, before that.
    axis_name: mapped device axis of the training step.
    batch_size: of passes over a set outside of training.
  """

  tasks: int
  classes: int
  shape: tuple[int, int, int]
  normalise: Callable[[Array], Array]
  axis_name: Hashable | None = None
  batch_size: int = 256
  augment: Callable[[Array, Array], Array] = lambda key, pixels: pixels

  def prepare(self, key: Array, pixels: Array) -> Array:
    """uint8 pixels to network input of training."""
    return self.normalise(self.augment(key, pixels))

  @property
  def all_classes(self) -> int:
    """K."""
    return self.tasks * self.classes

  def in_batches(self, fn: Callable[[Any, Array], Array], state: Any, pixels: Any) -> np.ndarray:
    """`fn(state, x)`, `[N, ...]` of network inputs x, for all of `pixels` `[M, H, W, D]`: `[M, ...]`."""
    run = jax.jit(lambda state, pixels: fn(state, self.normalise(pixels)))
    images = Images(np.asarray(pixels), np.zeros(len(pixels)), ())
    return np.concatenate(
      [np.asarray(run(state, x))[:n] for (x, _), n in batches.cover(images, self.batch_size)]
    )


class Holdings(NamedTuple):
  """What a learner holds.

  Attributes:
    params: numbers that the network of all tasks learnt so far needs.
    memory_mb: 10**6 bytes kept beside them from task to task.
    relevant: for methods whose tasks own units, by layer, `[T, units]` bool: the units each task needs.
  """

  params: int
  memory_mb: float
  relevant: Mapping[str, np.ndarray] = {}


def holdings(learner: Learner) -> Holdings:
  """Of a method that keeps nothing of its network in the memory."""
  return Holdings(tree_size(learner.params), tree_megabytes(learner.memory))


def tree_size(tree: Any) -> int:
  """How many numbers a tree of arrays holds."""
  return sum(x.size for x in jax.tree.leaves(tree))


def tree_megabytes(tree: Any) -> float:
  """What a tree of arrays takes, in 10**6 bytes."""
  return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


def _unchanged_gradient(grads, learner, batch):
  return grads


def _unchanged_update(updates, grads, learner):
  return updates, learner.memory


@dataclasses.dataclass(frozen=True)
class Method:
  """A continual-learning method; see the module.

  `cumulative`: task t is trained on the images of all tasks up to t. `together`: all tasks are learnt at once; every
  step sees as many images of each, those of task t at places t, T + t, 2 T + t, ..., and only the last row of the table
  is filled. `prelude`: a step `(learner, pixels, labels) -> (learner, metrics)` of what comes before the training on
  each task. `check_room`: raises a ValueError where the next task cannot be learnt. `task_net`: `(learner, task) -> `
  the gated net of a task that is learnt; of methods that have gates for every task.
  """

  init: Callable[[Array], Start]
  loss: Callable[[Any, Learner, Batch], tuple[Array, tuple[Mapping[str, Array], Any]]]
  end_task: Callable[[Learner, TaskData, Array], Learner]
  predict: Callable[[Learner, Array, Array, int], Prediction]
  gradient: Callable[[Any, Learner, Batch], Any] = _unchanged_gradient
  update: Callable[[Any, Any, Learner], tuple[Any, Any]] = _unchanged_update
  holdings: Callable[[Learner], Holdings] = holdings
  cumulative: bool = False
  together: bool = False
  prelude: Callable[[Learner, Array, Array], tuple[Learner, Mapping[str, Array]]] | None = None
  check_room: Callable[[Learner], None] = lambda learner: None
  task_net: Callable[[Learner, Array], TaskNet] | None = None


@dataclasses.dataclass(frozen=True)
class Network:
  """One ungated network with an output for every class, which most methods train.

  Attributes:
    model: from images to `([N, K] logits, records)`.
    problem: what it learns.
    macs: of one image.
    scope: which classes compete in the cross-entropy: `own`, those of the example's task; `seen`, all so far.
  """

  model: nn.Module
  problem: Problem
  macs: int
  scope: str = "own"

  def init(self, key: Array) -> tuple[Any, Any]:
    """Parameters and running statistics."""
    variables = self.model.init(key, jnp.zeros((1, *self.problem.shape)))
    return variables["params"], variables.get("batch_stats", {})

  def logits(self, params: Any, batch_stats: Any, x: Array) -> Array:
    """`[N, K]`, in evaluation."""
    return self.model.apply({"params": params, "batch_stats": batch_stats}, x)[0]

  def train_logits(self, params: Any, batch_stats: Any, x: Array, key: Array) -> tuple[Array, Any]:
    """`[N, K]` in training, and the new statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    (logits, _), new = self.model.apply(
      variables, x, train=True, mutable=["batch_stats"], rngs={GATE_RNG: key}
    )
    return logits, new.get("batch_stats", {})

  def visible(self, labels: Array, task: Array, scope: str | None = None) -> Array:
    """`[N, K]` bool: the classes that compete for examples of these labels while `task` is learnt."""
    of_class = jnp.arange(self.problem.all_classes) // self.problem.classes
    if (scope or self.scope) == "own":
      return of_class == (labels // self.problem.classes)[:, None]
    return jnp.broadcast_to(of_class <= task, (len(labels), self.problem.all_classes))

  def seen_with(self, labels: Array) -> Array:
    """`[N, K]` bool: the classes seen by the end of the task of these labels."""
    of_class = jnp.arange(self.problem.all_classes) // self.problem.classes
    return of_class <= (labels // self.problem.classes)[:, None]

  def cross_entropy(
    self, logits: Array, labels: Array, task: Array, scope: str | None = None
  ) -> Array:
    """`[N]`, over the visible classes."""
    return optax.softmax_cross_entropy_with_integer_labels(
      jnp.where(self.visible(labels, task, scope), logits, -jnp.inf), labels
    )

  def loss(
    self, params: Any, learner: Learner, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Any]]:
    """Cross-entropy on the batch: the loss of fine-tuning, and the first term of most others."""
    logits, batch_stats = self.train_logits(params, learner.batch_stats, batch.x, batch.key)
    cross_entropy = jnp.mean(self.cross_entropy(logits, batch.labels, learner.task))
    return cross_entropy, ({"cross_entropy": cross_entropy}, batch_stats)

  def predict(self, learner: Learner, x: Array, task: Array, seen: int) -> Prediction:
    """Both ways from the same logits."""
    return self.prediction(self.logits(learner.params, learner.batch_stats, x), task, seen)

  def prediction(self, scores: Array, task: Array, seen: int) -> Prediction:
    """From `[N, K]` scores."""
    classes = self.problem.classes
    aware = jax.lax.dynamic_slice_in_dim(scores, task * classes, classes, axis=1)
    agnostic = jnp.where(jnp.arange(scores.shape[1]) < seen * classes, scores, -jnp.inf)
    macs = jnp.full(len(scores), float(self.macs))
    return Prediction(aware, agnostic, macs, macs)
