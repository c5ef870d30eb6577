"""Interface of continual-learning methods.

A method is a set of pure functions over a learner, as an optax optimiser is over its state:

    init(key)                       -> InitialState   parameters, statistics and memory
    loss(params, learner, batch)    -> (total, (terms, batch_stats))
    end_task(learner, data, key)    -> learner        keeps the task and prepares for the next one
    predict(learner, x, task, seen) -> Prediction

The shapes of parameters, statistics and memory never change. Two more functions are the identity
for most methods: `gradient` changes the gradient before the optimiser sees it, `update` changes
what the optimiser makes of it.

A method of a few functions is written as closures over its settings; one whose functions share
helpers, as a frozen dataclass whose `method()` collects them.

Axes: N or B examples, T tasks, C classes of a task, K = T C classes in all.
Reference: van de Ven and Tolias, "Three scenarios for continual learning", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gating_jax.data.image_sets import Images, padded_batches
from gating_jax.layers.gate import GATE_RNG
from gating_jax.types import AnyArray, Array

# A loss, its metrics by name, and the new running statistics.
StepLoss = tuple[Array, tuple[Mapping[str, Array], Any]]


class TaskTable(NamedTuple):
  """Test results, `[T, T]` each.

  Row i holds the tests after task i, column j those on the test images of task j; entries above the
  diagonal are NaN. Methods that learn all tasks at once fill only the last row.

  Attributes:
    aware, agnostic: accuracy with the task known and unknown.
    task: fraction of images whose agnostic class belongs to the right task.
    macs, agnostic_macs: multiply-accumulates per image, with the task known and unknown.
  """

  aware: AnyArray
  agnostic: AnyArray
  task: AnyArray
  macs: AnyArray
  agnostic_macs: AnyArray


class LearnerState(struct.PyTreeNode):
  """Everything that a run changes.

  Its structure and shapes never change, so one program and one checkpoint format serve all tasks.

  Attributes:
    step: steps taken in all.
    task: index of the task being learnt, from 0; T when all are learnt.
    params: parameters that the optimiser changes.
    batch_stats: running statistics of the network being trained.
    opt_state: state of the optimiser; fresh for every task.
    memory: whatever the method keeps of earlier tasks: a `MemoryNode` or a `ReplayMemory`; `()` if
      it keeps nothing.
    table: results of the tests so far.
  """

  step: Array
  task: Array
  params: Any
  batch_stats: Any
  opt_state: Any
  memory: Any
  table: TaskTable


@dataclass_transform(frozen_default=True)
class MemoryNode:
  """Base class of what methods keep: frozen dataclasses that are PyTree nodes.

  To JAX and to checkpoints, an instance looks like a dict of its fields: its children are in the
  order of their names, whatever that of the fields is. So checkpoints of dicts are restored too.
  """

  # Every subclass is a dataclass.
  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __init_subclass__(cls):
    dataclasses.dataclass(frozen=True)(cls)
    # In the order in which JAX sorts the keys of a dict.
    names = sorted(field.name for field in dataclasses.fields(cls))
    jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])

  def replace(self, **changes: Any) -> Any:
    """Returns a copy with other values for some fields."""
    return dataclasses.replace(self, **changes)


class Variables(MemoryNode):
  """The variables of a network, or of several, stacked over tasks.

  Attributes:
    params, batch_stats: trees of dicts, as Flax makes them.
  """

  params: Any
  batch_stats: Any


class InitialState(NamedTuple):
  """The parts of a learner that a method initialises."""

  params: Any
  batch_stats: Any
  memory: Any


class Batch(NamedTuple):
  """Input of one training step.

  Attributes:
    x: `[B, H, W, D]` network input.
    labels: `[B]` positions in the order of classes.
    key: PRNG key for all randomness of the step.
    epoch: epochs of this task before this step, a float.
    place: position of the step in its epoch, 0 for the first step and 1 for the last.
  """

  x: Array
  labels: Array
  key: Array
  epoch: Array
  place: Array | float = 0.0


class Prediction(NamedTuple):
  """Predictions for images of one task.

  Attributes:
    aware: `[N, C]` scores of that task's classes, with the task known.
    agnostic: `[N, K]` scores of all classes, with the task unknown; minus infinity for classes not
      seen yet.
    macs: `[N]` multiply-accumulates of each image, with the task known.
    agnostic_macs: `[N]` the same, with the task unknown.
  """

  aware: Array
  agnostic: Array
  macs: Array
  agnostic_macs: Array


class TaskNet(NamedTuple):
  """The network of one task.

  Attributes:
    model: maps images to `([N, F] features, records)`.
    variables: variables of the model.
    classifier: kernel `[F, C]` and bias `[C]` of the linear classifier on the features.
  """

  model: nn.Module
  variables: Mapping[str, Any]
  classifier: tuple[Array, Array]


class TaskData(NamedTuple):
  """Images of a task as arrays.

  Attributes:
    pixels, labels: `[M, H, W, D]` uint8 and `[M]`, the training set.
    validation_pixels, validation_labels: the same for images held out of training.
  """

  pixels: Any
  labels: Any
  validation_pixels: Any
  validation_labels: Any


def _not_augmented(key: Array, pixels: Array) -> Array:
  """Returns pixels as they are."""
  return pixels


@dataclasses.dataclass(frozen=True)
class Problem:
  """The learning problem, the same for all methods.

  Attributes:
    tasks, classes: T and C.
    shape: `(H, W, D)` of an image.
    normalise: maps uint8 pixels to network input.
    axis_name: mapped device axis of the training step.
    batch_size: batch size of passes over a set outside of training.
    augment: `(key, pixels) -> pixels`, the random changes of training, applied before `normalise`.
    own_classes: number of classes of each task, at most C; None for C each. A head has C outputs
      all the same, of which the others are never right.
  """

  tasks: int
  classes: int
  shape: tuple[int, int, int]
  normalise: Callable[[Array], Array]
  axis_name: Hashable | None = None
  batch_size: int = 256
  augment: Callable[[Array, Array], Array] = _not_augmented
  own_classes: tuple[int, ...] | None = None

  def prepare(self, key: Array, pixels: Array) -> Array:
    """Augments and normalises uint8 pixels for training."""
    return self.normalise(self.augment(key, pixels))

  @property
  def all_classes(self) -> int:
    """Returns K, the number of classes in all."""
    return self.tasks * self.classes

  @property
  def present(self) -> np.ndarray:
    """Returns `[T, C]` bool: the outputs of each task's head that stand for a class."""
    own = np.asarray(self.own_classes or (self.classes,) * self.tasks)
    return np.arange(self.classes) < own[:, None]

  def task_of(self, labels: Any) -> Any:
    """Returns the tasks of labels; classes are numbered task by task, C of each."""
    return labels // self.classes

  def in_batches(self, fn: Callable[[Any, Array], Array], state: Any, pixels: Any) -> np.ndarray:
    """Applies a function to a whole set of images in batches.

    Args:
      fn: `(state, x) -> [N, ...]`, over network inputs x.
      state: any tree, passed on to `fn`.
      pixels: uint8 `[M, H, W, D]`.
    Returns:
      `[M, ...]`, a NumPy array.
    """

    # `state` is an argument: as a closure its arrays would be compiled in as constants.
    @jax.jit
    def run(state, pixels):
      """Applies the function to one batch of `[N, H, W, D]` pixels."""
      return fn(state, self.normalise(pixels))

    # `padded_batches` takes a labelled set; the labels are not read.
    images = Images(np.asarray(pixels), np.zeros(len(pixels)), ())
    results = []
    for (batch, _), count in padded_batches(images, self.batch_size):
      # The last batch is padded to the full size: only its first `count` results are of images.
      results.append(np.asarray(run(state, batch))[:count])
    return np.concatenate(results)


class Footprint(NamedTuple):
  """Storage of a learner.

  Attributes:
    params: number of parameters that the network of all tasks learnt so far needs.
    memory_mb: 10**6 bytes kept next to the parameters from task to task.
    relevant: units that each task needs, by layer, `[T, units]` bool; for methods whose tasks own
      units.
  """

  params: int
  memory_mb: float
  relevant: Mapping[str, np.ndarray] = {}


def footprint(learner: LearnerState) -> Footprint:
  """Measures a learner whose memory holds no part of its network."""
  return Footprint(tree_size(learner.params), tree_megabytes(learner.memory))


def tree_size(tree: Any) -> int:
  """Counts the numbers in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(tree))


def tree_megabytes(tree: Any) -> float:
  """Measures the size of a tree of arrays in 10**6 bytes."""
  return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


def stack_tasks(tree: Any, tasks: int) -> Any:
  """Repeats each array T times, one entry per task: `[T, ...]`."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (tasks, *x.shape)), tree)


def put_task(stacked: Any, task: int | Array, tree: Any) -> Any:
  """Replaces one task's entry in a stacked tree.

  Args:
    stacked: arrays `[T, ...]`.
    task: index of the entry.
    tree: its new arrays `[...]`.
  """
  return jax.tree.map(lambda all_tasks, x: all_tasks.at[task].set(x), stacked, tree)


def task_entry(stacked: Any, task: int | Array) -> Any:
  """Returns one task's arrays `[...]` of a stacked tree."""
  return jax.tree.map(lambda x: x[task], stacked)


def first_tasks(stacked: Any, count: int) -> Any:
  """Returns the entries of the first `count` tasks of a stacked tree."""
  return jax.tree.map(lambda x: x[:count], stacked)


def _unchanged_gradient(grads, learner, batch):
  """Returns the gradient as it is."""
  return grads


def _unchanged_update(updates, grads, learner):
  """Returns the updates and the memory as they are."""
  return updates, learner.memory


def _unlimited(learner):
  """Accepts every next task."""


@dataclasses.dataclass(frozen=True)
class Method:
  """A continual-learning method; the module docstring has the signatures.

  Attributes:
    init, loss, end_task, predict: the four functions that every method defines.
    gradient: `(grads, learner, batch) -> grads`, before the optimiser.
    update: `(updates, grads, learner) -> (updates, memory)`, after the optimiser.
    footprint: `learner -> Footprint`.
    cumulative: whether task t is trained on the images of all tasks up to t.
    simultaneous: whether all tasks are learnt at once. Every step then sees the same number of
      images of each, those of task t at positions t, T + t, 2 T + t, ..., and only the last row of
      the table is filled.
    pretrain_step: `(learner, pixels, labels) -> (learner, metrics)`, a step of the phase before
      each task's own training; None without one.
    check_capacity: raises a ValueError if the next task cannot be learnt.
    task_net: `(learner, task) -> TaskNet`, the gated network of a learnt task; None for methods
      without gates per task.
  """

  init: Callable[[Array], InitialState]
  loss: Callable[[Any, LearnerState, Batch], StepLoss]
  end_task: Callable[[LearnerState, TaskData, Array], LearnerState]
  predict: Callable[[LearnerState, Array, Array, int], Prediction]
  gradient: Callable[[Any, LearnerState, Batch], Any] = _unchanged_gradient
  update: Callable[[Any, Any, LearnerState], tuple[Any, Any]] = _unchanged_update
  footprint: Callable[[LearnerState], Footprint] = footprint
  cumulative: bool = False
  simultaneous: bool = False
  pretrain_step: (
    Callable[[LearnerState, Array, Array], tuple[LearnerState, Mapping[str, Array]]] | None
  ) = None
  check_capacity: Callable[[LearnerState], None] = _unlimited
  task_net: Callable[[LearnerState, Any], TaskNet] | None = None


@dataclasses.dataclass(frozen=True)
class Network:
  """An ungated network with one output per class, which most methods train.

  Attributes:
    model: maps images to `([N, K] logits, records)`.
    problem: the learning problem.
    macs: multiply-accumulates of one image.
    scope: classes that compete in the cross-entropy: `own`, those of the example's task; `seen`,
      all so far.
  """

  model: nn.Module
  problem: Problem
  macs: int
  scope: str = "own"

  def init(self, key: Array) -> tuple[Any, Any]:
    """Initialises parameters and running statistics."""
    # Parameters do not depend on the number of images: one is enough.
    variables = self.model.init(key, jnp.zeros((1, *self.problem.shape)))
    # A model without BatchNorm has no statistics.
    return variables["params"], variables.get("batch_stats", {})

  def logits(self, params: Any, batch_stats: Any, x: Array) -> Array:
    """Computes `[N, K]` logits in evaluation."""
    return self.model.apply({"params": params, "batch_stats": batch_stats}, x)[0]

  def logits_of(self, learner: LearnerState, x: Array) -> Array:
    """Computes a learner's `[N, K]` logits in evaluation."""
    return self.logits(learner.params, learner.batch_stats, x)

  def train_logits(
    self, params: Any, batch_stats: Any, x: Array, *, key: Array
  ) -> tuple[Array, Any]:
    """Computes `[N, K]` logits in training, and the new statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    (logits, _), new = self.model.apply(
      variables, x, train=True, mutable=["batch_stats"], rngs={GATE_RNG: key}
    )
    # A model without BatchNorm has no such collection.
    return logits, new.get("batch_stats", {})

  def visible(self, labels: Array, task: Array, scope: str | None = None) -> Array:
    """Returns `[N, K]` bool: the classes that compete for examples with these labels.

    Args:
      labels: `[N]`.
      task: the task being learnt, from 0.
      scope: as in the class; its own by default.
    """
    of_class = self.problem.task_of(jnp.arange(self.problem.all_classes))
    if (scope or self.scope) == "own":
      return of_class == self.problem.task_of(labels)[:, None]
    # All classes up to this task, the same for every example.
    return jnp.broadcast_to(of_class <= task, (len(labels), self.problem.all_classes))

  def seen_with(self, labels: Array) -> Array:
    """Returns `[N, K]` bool: the classes seen by the end of each label's task."""
    of_class = self.problem.task_of(jnp.arange(self.problem.all_classes))
    return of_class <= self.problem.task_of(labels)[:, None]

  def cross_entropy(
    self, logits: Array, labels: Array, task: Array, scope: str | None = None
  ) -> Array:
    """Computes the `[N]` cross-entropies over the visible classes."""
    # A logit of minus infinity takes a class out of the softmax and gives it no gradient.
    competing = jnp.where(self.visible(labels, task, scope), logits, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(competing, labels)

  def loss(self, params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the batch's cross-entropy: fine-tuning's loss, and most others' first term."""
    logits, batch_stats = self.train_logits(params, learner.batch_stats, batch.x, key=batch.key)
    cross_entropy = jnp.mean(self.cross_entropy(logits, batch.labels, learner.task))
    return cross_entropy, ({"cross_entropy": cross_entropy}, batch_stats)

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts with the task known and unknown, from the same logits."""
    return self.prediction(self.logits(learner.params, learner.batch_stats, x), task, seen)

  def prediction(self, scores: Array, task: Array, seen: int) -> Prediction:
    """Builds both predictions from `[N, K]` scores."""
    classes = self.problem.classes
    # `task` is traced, so that one program serves all tasks: the slice must be dynamic.
    aware = jax.lax.dynamic_slice_in_dim(scores, task * classes, classes, axis=1)
    # Classes of later tasks have untrained outputs and must not win.
    agnostic = jnp.where(jnp.arange(scores.shape[1]) < seen * classes, scores, -jnp.inf)
    # The network is ungated: both predictions cost the same for every image.
    macs = jnp.full(len(scores), float(self.macs))
    return Prediction(aware, agnostic, macs=macs, agnostic_macs=macs)
