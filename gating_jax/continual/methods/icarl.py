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

from collections.abc import Mapping
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
  Method,
  Network,
  Prediction,
  TaskData,
)
from gating_jax.types import Array, Records


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


def icarl(network: Network, replay: replay_memory.ReplaySettings) -> Method:
  """Makes the method, for a network whose model is `Headed`.

  Memory: `exemplars`, a `replay_memory.ReplayMemory`; `means` `[K, F]`, of the exemplars of each class;
  `has_mean` `[K]`; `teacher`, parameters and statistics after the last task.

  Args:
    network: to train.
    replay: sizes of the memory and of each draw.
  Raises:
    ValueError: fewer images than classes.
  """
  problem, model = network.problem, network.model
  if replay.images < problem.all_classes:
    raise ValueError(
      f"images must be at least {problem.all_classes}, one exemplar per class; got {replay.images}"
    )

  def features(learner: LearnerState, x: Array) -> Array:
    """Computes `[N, F]` features of norm 1, in evaluation."""
    return model.apply(
      {"params": learner.params, "batch_stats": learner.batch_stats}, x, method="unit_features"
    )

  def init(key: Array) -> InitialState:
    """Initialises the network and a memory without exemplars."""
    params, batch_stats = network.init(key)
    return InitialState(
      params,
      batch_stats,
      {
        "exemplars": replay_memory.empty(replay.images, problem.shape),
        "means": jnp.zeros((problem.all_classes, params["head"]["kernel"].shape[0])),
        # Classes to come have no mean, and cannot be chosen.
        "has_mean": jnp.zeros(problem.all_classes, bool),
        "teacher": {"params": params, "batch_stats": batch_stats},
      },
    )

  def loss(
    params: Any, learner: LearnerState, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Any]]:
    """Computes the loss on the batch and on exemplars: new classes plus old ones."""
    noise, drawing = jax.random.split(batch.key)
    x, labels, _, _ = replay_memory.draw_inputs(
      learner.memory["exemplars"], drawing, batch, problem, replay.batch_size
    )
    x, labels = jnp.concatenate([batch.x, x]), jnp.concatenate([batch.labels, labels])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, noise)
    # s*: the outputs at the end of the last task, on the same images.
    teacher = network.logits(**learner.memory["teacher"], x=x)
    new, old = sigmoid_losses(logits, teacher, labels, learner.task, problem.classes)
    return new + old, ({"cross_entropy": new, "distillation": old}, batch_stats)

  def end_task(learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Chooses the task's exemplars by herding, and computes all means again."""
    labels, of_images = np.asarray(data.labels), problem.in_batches(features, learner, data.pixels)
    # Rounded up: a class has at most so many slots.
    each = -(-replay.images // ((int(learner.task) + 1) * problem.classes))
    places = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    order = np.concatenate([p[herd(of_images[p], each)] for p in places])
    exemplars = replay_memory.keep_first(
      learner.memory["exemplars"], np.asarray(data.pixels)[order], labels[order]
    )
    # The features of all classes have changed with this task, so all means are computed again.
    means, has_mean = class_means(
      problem.in_batches(features, learner, exemplars.pixels), exemplars.labels, problem.all_classes
    )
    teacher = {"params": learner.params, "batch_stats": learner.batch_stats}
    return learner.replace(
      memory={"exemplars": exemplars, "means": means, "has_mean": has_mean, "teacher": teacher}
    )

  def predict(learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the class of the nearest mean for `[N, H, W, D]` images."""
    scores = nearest_mean(features(learner, x), learner.memory["means"], learner.memory["has_mean"])
    return network.prediction(scores, task, seen)

  return Method(init, loss, end_task, predict)


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
  of_class = jnp.arange(logits.shape[1]) // classes
  # A sum over classes, then a mean over images, as in the paper's loss.
  mean_sum = lambda target, counted: jnp.mean(
    jnp.sum(optax.sigmoid_binary_cross_entropy(logits, target), axis=-1, where=counted)
  )
  return (
    mean_sum(jax.nn.one_hot(labels, logits.shape[1]), of_class == task),
    mean_sum(jax.nn.sigmoid(teacher), of_class < task),
  )


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


def class_means(features: Array, labels: Array, classes: int) -> tuple[Array, Array]:
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
  distance = jnp.sum(jnp.square(features[:, None] - means), axis=-1)
  return jnp.where(has_mean, -distance, -jnp.inf)


def _unit(x: Array) -> Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
