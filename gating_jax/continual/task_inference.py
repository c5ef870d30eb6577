"""What tells tasks apart when the task is unknown: a layer on the features of all streams, or a network of all classes.

Either is trained beside the stream of the task being learnt, on the batch and what is rehearsed with it. Its parameters
are called `router`.

Axes: N images, B of a batch, R rehearsed, T tasks, S <= T seen, C classes of a task, F features of a stream.
Reference: Abati et al., 2020, section 3.4; Menon et al., "Long-tail learning via logit adjustment", 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gating_jax.continual import memory, router
from gating_jax.continual.method import Batch, Learner, Network, TaskData
from gating_jax.continual.rehearsal import Rehearsal, Replay
from gating_jax.continual.shared_net import SharedNet, Stream
from gating_jax.types import Array

Tree = Any
TEMPERATURE = 2.0  # of what a network teaches


class Loss(NamedTuple):
  """What is added to a stream's loss; its terms, and `{"router": new running statistics}` of a classifier with any."""

  total: Array
  terms: Mapping[str, Array]
  batch_stats: Mapping[str, Tree]


class Told(NamedTuple):
  """The task of each image, `[N]`; scores to add to each stream's, `[S, N, C]` or 0; MACs of classifier and streams,
  `[N]`."""

  task: Array
  scores: Array
  macs: Array


@dataclasses.dataclass(frozen=True)
class OfFeatures:
  """`router` on the pooled features of all streams, which all run."""

  net: SharedNet
  rehearsal: Rehearsal
  settings: router.RouterSettings

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Parameters, and statistics as of `Loss`."""
    _, features = self.net.shapes
    return router.init(key, self.net.problem.tasks, features, self.settings.hidden), {}

  def streamed(self, batch: Batch, replayed: Replay) -> Array:
    """What the stream of the task sees in a step."""
    return memory.mix(batch.x, replayed.x)

  def loss(
    self, params: Tree, learner: Learner, batch: Batch, replayed: Replay, stream: Stream, key: Array
  ) -> Loss:
    """Of what the stream saw; it moves nothing of earlier tasks."""
    x, labels = _mixed(batch, replayed)

    def earlier(task, features):
      own = jax.tree.map(lambda tree: tree[task], learner.memory["own"])
      return features.at[:, task].set(
        self.net.of_task(learner.params, learner.batch_stats, own, x).features
      )

    of_all = jnp.zeros((len(x), self.net.problem.tasks, stream.features.shape[-1]))
    of_all = (
      lax.fori_loop(0, learner.task, earlier, of_all).at[:, learner.task].set(stream.features)
    )
    each = router.cross_entropy(
      params["router"], of_all, labels // self.net.problem.classes, learner.task + 1
    )
    loss = _weighted(each, batch, replayed, replayed.batch_weight)
    return Loss(loss, {"task_cross_entropy": loss}, {})

  def update(self, updates: Tree, task: Array) -> Tree:
    """What of a step's updates is taken."""
    return router.of_seen(updates, task + 1)

  def end_task(self, learner: Learner, data: TaskData, key: Array) -> Tree:
    """Its parameters after a task: trained by itself on images of all tasks so far."""
    recalling, training = jax.random.split(key)
    problem, seen = self.net.problem, int(learner.task) + 1
    pixels, labels = self.rehearsal.recall(learner.memory["rehearsal"], data, seen - 1, recalling)

    def features(learner, x):
      own = jax.tree.map(lambda tree: tree[:seen], learner.memory["own"])
      return jnp.moveaxis(
        self.net.side_by_side(learner.params, learner.batch_stats, own, x).features, 0, 1
      )

    features = problem.in_batches(features, learner, pixels)
    return router.train(
      learner.params["router"], features, labels // problem.classes, training, self.settings
    )

  def tell(self, learner: Learner, x: Array, stream: Stream, macs: Array) -> Told:
    """Of images and all their streams, which take `[S, N]` MACs."""
    features = jnp.moveaxis(stream.features, 0, 1)
    _, seen, width = features.shape
    task = jnp.argmax(router.scores(learner.params["router"], features), axis=-1)
    return Told(
      task, jnp.zeros(()), macs.sum(0) + float(router.macs(seen, width, self.settings.hidden))
    )


@dataclasses.dataclass(frozen=True)
class OfNetwork:
  """An ungated network of all classes, q(c|x): t* = argmax_t sum_(c in t) q(c|x), so that one stream alone runs.

      class = argmax_(c in t*) log q(c|x) + log p_t*(c|x)
      loss  = CE(q, c) + w CE(softmax(q_t / 2), softmax(p_t / 2)),   of logits of the task t being learnt, on its batch

  Of the first term every image counts the same (where the batch has no weight, every rehearsed one), and q is shifted
  in training by the logarithm of how much more often a class comes than it would if all came as often, as in the test.
  The second term teaches the stream, and not the network, which has all tasks to learn from.
  """

  rehearsal: Rehearsal
  network: Network
  distillation: float

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Parameters, and statistics as of `Loss`."""
    params, batch_stats = self.network.init(key)
    return params, {"router": batch_stats}

  def streamed(self, batch: Batch, replayed: Replay) -> Array:
    """What the stream of the task sees in a step: nothing rehearsed."""
    return batch.x

  def loss(
    self, params: Tree, learner: Learner, batch: Batch, replayed: Replay, stream: Stream, key: Array
  ) -> Loss:
    """Of batch and rehearsed images in one pass."""
    x, labels = _mixed(batch, replayed)
    of_all, batch_stats = self.network.train_logits(
      params["router"], learner.batch_stats["router"], x, key
    )
    weight = replayed.batch_weight
    even = jnp.where((weight > 0) & (weight < 1), len(batch.x) / len(x), weight)
    of_class = jnp.arange(of_all.shape[1]) // self.network.problem.classes
    shift = jnp.where(
      of_class == learner.task, _log_ratio(even, weight), _log_ratio(1 - even, 1 - weight)
    )
    loss = _weighted(
      self.network.cross_entropy(of_all + shift, labels, learner.task), batch, replayed, even
    )
    of_batch, _ = memory.part(of_all, len(batch.x), len(replayed.x))
    classes = stream.logits.shape[-1]
    taught = lax.stop_gradient(
      lax.dynamic_slice_in_dim(of_batch, learner.task * classes, classes, axis=1)
    )
    distillation = jnp.mean(
      optax.softmax_cross_entropy(stream.logits / TEMPERATURE, jax.nn.softmax(taught / TEMPERATURE))
    )
    return Loss(
      loss + self.distillation * distillation,
      {"class_cross_entropy": loss, "distillation": distillation},
      {"router": batch_stats},
    )

  def update(self, updates: Tree, task: Array) -> Tree:
    """What of a step's updates is taken: all."""
    return updates

  def end_task(self, learner: Learner, data: TaskData, key: Array) -> Tree:
    """Its parameters after a task: as they are."""
    return learner.params["router"]

  def tell(self, learner: Learner, x: Array, stream: Stream, macs: Array) -> Told:
    """Of images and all their streams, which take `[S, N]` MACs."""
    seen, _, classes = stream.logits.shape
    of_all = self.network.logits(learner.params["router"], learner.batch_stats["router"], x)[
      :, : seen * classes
    ]
    scores = jax.nn.log_softmax(of_all).reshape(len(x), seen, classes).swapaxes(0, 1)
    task = jnp.argmax(jax.nn.logsumexp(scores, axis=-1), axis=0)
    return Told(task, scores, jnp.take_along_axis(macs, task[None], axis=0)[0] + self.network.macs)


TaskClassifier = OfFeatures | OfNetwork


def _mixed(batch: Batch, replayed: Replay) -> tuple[Array, Array]:
  return tuple(
    memory.mix(*pair) for pair in ((batch.x, replayed.x), (batch.labels, replayed.labels))
  )


def _weighted(each: Array, batch: Batch, replayed: Replay, weight: Array) -> Array:
  """The mean of `[B + R]` losses, mixed, of which the batch's count `weight`."""
  of_batch, of_replay = map(jnp.mean, memory.part(each, len(batch.x), len(replayed.x)))
  return weight * of_batch + (1 - weight) * of_replay


def _log_ratio(share: Array, fair: Array) -> Array:
  """0 where there is nothing to share."""
  return jnp.log(jnp.where(fair > 0, share / jnp.where(fair > 0, fair, 1), 1))
