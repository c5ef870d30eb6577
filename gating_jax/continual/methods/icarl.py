"""iCaRL: classification by the nearest mean of exemplars, on distilled features.

    L = mean over images of
        sum_{c of this task} BCE(s_c, [c = y])  +  sum_{c of earlier tasks} BCE(s_c, s*_c)

The mean is over the batch and the exemplars drawn with it; s are the sigmoid outputs, and s* those
at the end of the last task. After a task the exemplars of a class are chosen by herding: each
brings the mean of the exemplars so far closest to that of the class,

    p_k = argmin_x |mu - (f(x) + sum_{j < k} f(p_j)) / k|

An image has the class whose exemplars' mean is nearest to its features f, of norm 1. The head is
for training only.

Axes: N or M images, S slots, K classes, C of a task, F features.
Reference: Rebuffi et al., "iCaRL: Incremental classifier and representation learning", 2017.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.continual import replay_memory
from gating_jax.continual.method import (
  Batch,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Network,
  Prediction,
  Problem,
  StepLoss,
  TaskData,
  Variables,
)
from gating_jax.types import AnyArray, Array, Records


class Headed(nn.Module):
  """A network of features with a linear head of `classes` logits.

  Attributes:
    body: maps `[N, H, W, D]` images to `([N, F], records)`.
    classes: outputs of the head.
  """

  body: nn.Module
  classes: int

  def setup(self):
    """Creates the head."""
    self.head = nn.Dense(self.classes)

  def __call__(self, x: Array, train: bool = False) -> tuple[Array, Records]:
    features, records = self.body(x, train)
    return self.head(features), records

  def unit_features(self, x: Array) -> Array:
    """Computes `[N, F]` features of norm 1, in evaluation."""
    return _unit(self.body(x)[0])


class IcarlMemory(MemoryNode):
  """The memory of the method.

  Attributes:
    exemplars: images of all classes so far, those of a class in the order of their choice.
    means: `[K, F]`, of the exemplars of each class.
    has_mean: `[K]` bool; classes to come have no mean, and cannot be chosen.
    teacher: the network after the last task.
  """

  exemplars: replay_memory.ReplayMemory
  means: Array
  has_mean: Array
  teacher: Variables


def icarl(network: Network, replay: replay_memory.ReplaySettings) -> Method:
  """Makes the method, for a network whose model is `Headed`.

  Args:
    network: to train.
    replay: sizes of the memory and of each draw.
  Raises:
    ValueError: fewer images than classes.
  """
  least = network.problem.all_classes
  if replay.images < least:
    raise ValueError(
      f"images must be at least {least}, one exemplar per class; got {replay.images}"
    )
  return _Icarl(network, replay).method()


@dataclasses.dataclass(frozen=True)
class _Icarl:
  """The functions of the method, over an `IcarlMemory`."""

  network: Network
  replay: replay_memory.ReplaySettings

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.predict,
    )

  @property
  def problem(self) -> Problem:
    """Returns the learning problem."""
    return self.network.problem

  def init(self, key: Array) -> InitialState:
    """Initialises the network and a memory without exemplars."""
    params, batch_stats = self.network.init(key)
    # The kernel of the head is `[F, K]`.
    width = params["head"]["kernel"].shape[0]
    memory = IcarlMemory(
      exemplars=replay_memory.empty(self.replay.images, self.problem.shape),
      means=jnp.zeros((self.problem.all_classes, width)),
      has_mean=jnp.zeros(self.problem.all_classes, bool),
      teacher=Variables(params, batch_stats),
    )
    return InitialState(params, batch_stats, memory)

  def loss(self, params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the loss on the batch and on exemplars: new classes plus old ones."""
    network, problem = self.network, self.problem
    noise, drawing = jax.random.split(batch.key)
    drawn = replay_memory.draw_inputs(
      learner.memory.exemplars,
      key=drawing,
      batch=batch,
      problem=problem,
      count=self.replay.batch_size,
    )
    x = jnp.concatenate([batch.x, drawn.x])
    labels = jnp.concatenate([batch.labels, drawn.labels])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, key=noise)
    # s*: the outputs at the end of the last task, on the same images.
    teacher = learner.memory.teacher
    taught = network.logits(teacher.params, teacher.batch_stats, x)
    new, old = sigmoid_losses(logits, taught, labels, task=learner.task, classes=problem.classes)
    return new + old, ({"cross_entropy": new, "distillation": old}, batch_stats)

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Chooses the task's exemplars by herding, and computes all means again."""
    problem = self.problem
    ranked = self._herded(learner, data)
    exemplars = replay_memory.keep_first(
      learner.memory.exemplars, np.asarray(data.pixels)[ranked], np.asarray(data.labels)[ranked]
    )
    # The features of all classes have changed with this task, so all means are computed again.
    of_exemplars = problem.in_batches(self._features, learner, exemplars.pixels)
    means, has_mean = class_means(of_exemplars, exemplars.labels, problem.all_classes)
    memory = IcarlMemory(
      exemplars=exemplars,
      means=means,
      has_mean=has_mean,
      # The outputs s* of the next task's loss.
      teacher=Variables(learner.params, learner.batch_stats),
    )
    return learner.replace(memory=memory)

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the class of the nearest mean for `[N, H, W, D]` images."""
    memory = learner.memory
    scores = nearest_mean(self._features(learner, x), memory.means, memory.has_mean)
    return self.network.prediction(scores, task, seen)

  def _features(self, learner: LearnerState, x: Array) -> Array:
    """Computes `[N, F]` features of norm 1, in evaluation."""
    variables = {"params": learner.params, "batch_stats": learner.batch_stats}
    unit: Any = self.network.model.apply(variables, x, method="unit_features")
    return unit

  def _herded(self, learner: LearnerState, data: TaskData) -> np.ndarray:
    """Returns the positions of the exemplars of each class, the first chosen first."""
    labels = np.asarray(data.labels)
    of_images = self.problem.in_batches(self._features, learner, data.pixels)
    # A class has at most so many slots.
    classes = (int(learner.task) + 1) * self.problem.classes
    slots = math.ceil(self.replay.images / classes)
    ranked = []
    for label in np.unique(labels):
      of_class = np.flatnonzero(labels == label)
      ranked.append(of_class[herd(of_images[of_class], slots)])
    return np.concatenate(ranked)


def sigmoid_losses(
  logits: Array, teacher: Array, labels: Array, task: Array, classes: int
) -> tuple[Array, Array]:
  """Computes the two sums of the loss, as means over images.

  Args:
    logits, teacher: `[N, K]` of the network and of the network after the last task.
    labels: `[N]`.
    task: the task being learnt, from 0.
    classes: C.
  Returns:
    two scalars, for the classes of this task and of earlier ones.
  """
  # Classes are numbered task by task.
  of_class = jnp.arange(logits.shape[1]) // classes

  def mean_sum(target, counted):
    """Sums over some classes, then averages over images, as in the paper's loss."""
    each = optax.sigmoid_binary_cross_entropy(logits, target)
    return jnp.mean(jnp.sum(each, axis=-1, where=counted))

  # - sum_(new y) [delta(y = y_n) log g_y + delta(y != y_n) log(1 - g_y)]
  new = mean_sum(jax.nn.one_hot(labels, logits.shape[1]), of_class == task)
  # The same for earlier classes, with the teacher's outputs as targets: distillation.
  old = mean_sum(jax.nn.sigmoid(teacher), of_class < task)
  return new, old


def herd(features: np.ndarray, count: int) -> np.ndarray:
  """Returns the positions of images whose running mean stays closest to that of all.

  Args:
    features: `[M, F]` of the images of a class.
    count: largest number of positions.

  >>> herd(np.array([[0.0], [4.0], [5.0], [11.0]]), 3).tolist()
  [2, 1, 3]
  """
  # float64, since small differences of distances decide.
  features = np.asarray(features, np.float64)
  mean, total, chosen = features.mean(axis=0), np.zeros(features.shape[1]), []
  left = np.ones(len(features), bool)
  square = np.sum(features**2, axis=1)
  for k in range(1, min(count, len(features)) + 1):
    # |k mu - total - f|^2 without |k mu - total|^2, which is the same for all f.
    gap = square - 2 * features @ (k * mean - total)
    chosen.append(int(np.argmin(np.where(left, gap, np.inf))))
    # An image is an exemplar once.
    left[chosen[-1]] = False
    total += features[chosen[-1]]
  return np.array(chosen)


def class_means(features: AnyArray, labels: AnyArray, classes: int) -> tuple[Array, Array]:
  """Computes the means of each class's features.

  Args:
    features: `[S, F]`.
    labels: `[S]`; slots of label -1 are ignored.
    classes: K.
  Returns:
    `[K, F]` of norm 1, and `[K]` bool, whether a class has any features.
  """
  member = jax.nn.one_hot(labels, classes)
  # A sum, not a mean: with norm 1 the number of exemplars does not matter.
  return _unit(member.T @ features), jnp.any(member > 0, axis=0)


def nearest_mean(features: Array, means: Array, has_mean: Array) -> Array:
  """Computes scores: minus the squared distance to each mean.

  Args:
    features: `[N, F]`.
    means: `[K, F]`.
    has_mean: `[K]` bool; a class without a mean has minus infinity.
  Returns:
    `[N, K]`.
  """
  # `[N, 1, F]` minus `[K, F]`: every image with every mean.
  distance = jnp.sum(jnp.square(features[:, None] - means), axis=-1)
  return jnp.where(has_mean, -distance, -jnp.inf)


def _unit(x: Array) -> Array:
  """Scales vectors, `[..., F]`, to norm 1."""
  # Features of 0 have no direction and stay 0.
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
