"""Task inference: a layer on the features of all streams, or one network of all classes.

Either classifier is trained together with the stream of the current task, on the batch and the
rehearsed images. Its parameters are called `router`.

Axes: N images, B of a batch, R rehearsed, T tasks, S <= T seen, C classes of a task, F features of
a stream.
Reference: Abati et al., 2020, section 3.4; Menon et al., "Long-tail learning via logit adjustment",
2021.

The task classifier, from the pooled features of all tasks' streams to an image's task.

    z = Dense_T(ReLU(Dense_64(concatenated features)))

It has rows and columns for all tasks from the start; those of later tasks are left out. So it
widens task by task and keeps its weights. It is trained together with the current task, whose
stream it shapes. At the end of the task, when no stream changes any more, it is trained alone on
their features.

Axes: N or M images, T tasks, S <= T tasks seen, F features of a stream.
Reference: Abati et al., 2020, section 3.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gating_jax.continual import replay_memory
from gating_jax.continual.method import Batch, LearnerState, Network, TaskData
from gating_jax.continual.rehearsal import Rehearsal, Replay
from gating_jax.continual.shared_net import SharedNet, TaskForward
from gating_jax.types import Array

Tree = Any
# Softens the softmax of the distillation loss.
TEMPERATURE = 2.0


class Loss(NamedTuple):
  """Additions to a stream's loss.

  Attributes:
    total: scalar to add to the loss.
    terms: metrics by name.
    batch_stats: `{"router": new running statistics}`; empty for a classifier without any.
  """

  total: Array
  terms: Mapping[str, Array]
  batch_stats: Mapping[str, Tree]


class TaskInference(NamedTuple):
  """Results of task inference.

  Attributes:
    task: `[N]`, the inferred task of each image.
    scores: `[S, N, C]` to add to each stream's log-probabilities, or a scalar 0.
    macs: `[N]` multiply-accumulates of the classifier and of the streams that run.
  """

  task: Array
  scores: Array
  macs: Array


@dataclasses.dataclass(frozen=True)
class FeatureClassifier:
  """A `router` on the pooled features of all streams; all of them run.

  Attributes:
    net: the network of the streams.
    rehearsal: memory of images of earlier tasks.
    settings: of the router.
  """

  net: SharedNet
  rehearsal: Rehearsal
  settings: TaskClassifierSettings

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Initialises parameters, and statistics as in `Loss`."""
    _, features = self.net.shapes
    return init(key, self.net.problem.tasks, features, self.settings.hidden), {}

  def streamed(self, batch: Batch, replayed: Replay) -> Array:
    """Returns the current stream's input in a step: batch and rehearsed images, mixed."""
    return replay_memory.mix(batch.x, replayed.x)

  def loss(
    self,
    params: Tree,
    learner: LearnerState,
    batch: Batch,
    replayed: Replay,
    stream: TaskForward,
    key: Array,
  ) -> Loss:
    """Computes the loss on the stream's input; no earlier task gets a gradient."""
    x, labels = _mixed(batch, replayed)

    def earlier(task, features):
      """Fills in the features of one earlier task; the array is `[N, T, F]`."""
      own = jax.tree.map(lambda tree: tree[task], learner.memory["own"])
      return features.at[:, task].set(
        # Parameters of the learner, not those being differentiated: a constant for the gradient.
        self.net.of_task(learner.params, learner.batch_stats, own, x).features
      )

    of_all = jnp.zeros((len(x), self.net.problem.tasks, stream.features.shape[-1]))
    of_all = (
      # Features of later tasks stay 0 and do not compete.
      lax.fori_loop(0, learner.task, earlier, of_all).at[:, learner.task].set(stream.features)
    )
    each = cross_entropy(
      params["router"], of_all, labels // self.net.problem.classes, learner.task + 1
    )
    loss = _weighted(each, batch, replayed, replayed.batch_weight)
    return Loss(loss, {"task_cross_entropy": loss}, {})

  def update(self, updates: Tree, task: Array) -> Tree:
    """Keeps those of a step's updates that serve tasks seen."""
    return of_seen(updates, task + 1)

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> Tree:
    """Returns the parameters after a task: trained alone on images of all tasks so far."""
    recalling, training = jax.random.split(key)
    problem, seen = self.net.problem, int(learner.task) + 1
    pixels, labels = self.rehearsal.recall(learner.memory["rehearsal"], data, seen - 1, recalling)

    def features(learner, x):
      """Computes the features of all tasks seen, `[N, S, F]`."""
      own = jax.tree.map(lambda tree: tree[:seen], learner.memory["own"])
      # `in_batches` joins along the first axis: images before tasks.
      return jnp.moveaxis(
        self.net.side_by_side(learner.params, learner.batch_stats, own, x).features, 0, 1
      )

    features = problem.in_batches(features, learner, pixels)
    return train(
      learner.params["router"], features, labels // problem.classes, training, self.settings
    )

  def infer_task(
    self, learner: LearnerState, x: Array, stream: TaskForward, macs: Array
  ) -> TaskInference:
    """Infers the tasks of images.

    Args:
      learner: with the router's parameters.
      x: `[N, H, W, D]`, not read.
      stream: of all tasks seen, for these images.
      macs: `[S, N]` of the streams.
    """
    features = jnp.moveaxis(stream.features, 0, 1)
    _, seen, width = features.shape
    task = jnp.argmax(scores(learner.params["router"], features), axis=-1)
    return TaskInference(
      task, jnp.zeros(()), macs.sum(0) + float(classifier_macs(seen, width, self.settings.hidden))
    )


@dataclasses.dataclass(frozen=True)
class NetworkClassifier:
  """An ungated network of all classes, q(c|x), as the task classifier.

      t*    = argmax_t sum_(c in t) q(c|x)
      class = argmax_(c in t*) log q(c|x) + log p_t*(c|x)
      loss  = CE(q, c) + w CE(softmax(q_t / 2), softmax(p_t / 2))

  Only the stream of t* is needed. The second term of the loss is over logits of the current task t,
  on its batch: it teaches the stream and not the network, which has all tasks to learn from. In the
  first term every image has the same weight; where the batch has no weight, every rehearsed image.
  In training q is shifted by the logarithm of each class's frequency relative to equal frequencies,
  which the test has.

  Attributes:
    rehearsal: memory of images of earlier tasks.
    network: of all classes.
    distillation: w.
  """

  rehearsal: Rehearsal
  network: Network
  distillation: float

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Initialises parameters, and statistics as in `Loss`."""
    params, batch_stats = self.network.init(key)
    return params, {"router": batch_stats}

  def streamed(self, batch: Batch, replayed: Replay) -> Array:
    """Returns the current stream's input in a step: the batch alone."""
    return batch.x

  def loss(
    self,
    params: Tree,
    learner: LearnerState,
    batch: Batch,
    replayed: Replay,
    stream: TaskForward,
    key: Array,
  ) -> Loss:
    """Computes the loss on batch and rehearsed images in one pass."""
    x, labels = _mixed(batch, replayed)
    of_all, batch_stats = self.network.train_logits(
      params["router"], learner.batch_stats["router"], x, key
    )
    # Every image has the same weight, in the batch or replayed; a weight of 0 or 1 leaves out one
    # of the two and stays.
    weight = replayed.batch_weight
    even = jnp.where((weight > 0) & (weight < 1), len(batch.x) / len(x), weight)
    # Logit adjustment (Menon et al.): log(actual / fair frequency), for classes of the current task
    # and of the earlier ones.
    of_class = jnp.arange(of_all.shape[1]) // self.network.problem.classes
    shift = jnp.where(
      of_class == learner.task, _log_ratio(even, weight), _log_ratio(1 - even, 1 - weight)
    )
    loss = _weighted(
      self.network.cross_entropy(of_all + shift, labels, learner.task), batch, replayed, even
    )
    # The second term: distillation on the batch alone, without a gradient for the network.
    of_batch, _ = replay_memory.part(of_all, len(batch.x), len(replayed.x))
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
    """Keeps all of a step's updates."""
    return updates

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> Tree:
    """Returns the parameters after a task, unchanged."""
    return learner.params["router"]

  def infer_task(
    self, learner: LearnerState, x: Array, stream: TaskForward, macs: Array
  ) -> TaskInference:
    """Infers the tasks of images.

    Args:
      learner: with the network's parameters and statistics.
      x: `[N, H, W, D]`.
      stream: of all tasks seen, for these images.
      macs: `[S, N]` of the streams.
    """
    seen, _, classes = stream.logits.shape
    of_all = self.network.logits(learner.params["router"], learner.batch_stats["router"], x)[
      :, : seen * classes
    ]
    scores = jax.nn.log_softmax(of_all).reshape(len(x), seen, classes).swapaxes(0, 1)
    # t* = argmax_t sum_(c in t) q(c|x). Only that stream would run, so only its cost counts.
    task = jnp.argmax(jax.nn.logsumexp(scores, axis=-1), axis=0)
    return TaskInference(
      task, scores, jnp.take_along_axis(macs, task[None], axis=0)[0] + self.network.macs
    )


TaskClassifier = FeatureClassifier | NetworkClassifier


def _mixed(batch: Batch, replayed: Replay) -> tuple[Array, Array]:
  return tuple(
    replay_memory.mix(*pair) for pair in ((batch.x, replayed.x), (batch.labels, replayed.labels))
  )


def _weighted(each: Array, batch: Batch, replayed: Replay, weight: Array) -> Array:
  """Averages `[B + R]` mixed losses, with this weight on the mean of the batch."""
  of_batch, of_replay = map(jnp.mean, replay_memory.part(each, len(batch.x), len(replayed.x)))
  return weight * of_batch + (1 - weight) * of_replay


def _log_ratio(share: Array, fair: Array) -> Array:
  """Computes log(share / fair), and 0 where `fair` is 0."""
  return jnp.log(jnp.where(fair > 0, share / jnp.where(fair > 0, fair, 1), 1))


@dataclasses.dataclass(frozen=True)
class TaskClassifierSettings:
  """Settings of the task classifier and its rehearsal.

  Attributes:
    hidden: width of the hidden layer, >= 1.
    steps, batch_size, learning_rate: of the training after each task, by Adam, on batches with all
      tasks in equal parts; steps and batch size >= 1, the rate > 0.
  """

  hidden: int
  steps: int
  batch_size: int
  learning_rate: float

  def __post_init__(self):
    for name in ("hidden", "steps", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
    if not self.learning_rate > 0:
      raise ValueError(f"learning_rate must be > 0; got {self.learning_rate}")


def init(key: Array, tasks: int, features: int, hidden: int) -> dict[str, Any]:
  """Initialises the parameters.

  Args:
    key: PRNG key.
    tasks: T.
    features: F, of each stream.
    hidden: width of the hidden layer.
  """
  first, second = jax.random.split(key)
  he = jax.nn.initializers.he_normal()
  return {
    "hidden": {
      # Initialised for the fan-in of one stream, then cut into a block per task.
      "kernel": he(first, (features, tasks * hidden))
      .reshape(features, tasks, hidden)
      .swapaxes(0, 1),
      "bias": jnp.zeros(hidden),
    },
    "out": {"kernel": he(second, (hidden, tasks)), "bias": jnp.zeros(tasks)},
  }


def scores(params: Any, features: Array) -> Array:
  """Computes the task logits.

  Args:
    params: as of `init`.
    features: `[N, S, F]` of the first S tasks.
  Returns:
    `[N, S]`.
  """
  seen, hidden, out = features.shape[1], params["hidden"], params["out"]
  # z = Dense_T(ReLU(Dense_64(concatenated features))): a sum over tasks of blocks is a product with
  # the concatenation.
  h = jax.nn.relu(jnp.einsum("nsf,sfh->nh", features, hidden["kernel"][:seen]) + hidden["bias"])
  return h @ out["kernel"][:, :seen] + out["bias"][:seen]


def cross_entropy(params: Any, features: Array, tasks: Array, seen: Array) -> Array:
  """Computes the cross-entropies over the tasks seen.

  Args:
    params: as of `init`.
    features: `[N, T, F]`, zeros for tasks not seen.
    tasks: `[N]`, the task of each image.
    seen: number of tasks seen.
  Returns:
    `[N]`.
  """
  # Later tasks have logits too, from features of 0.
  competing = jnp.arange(features.shape[1]) < seen
  return optax.softmax_cross_entropy_with_integer_labels(
    jnp.where(competing, scores(params, features), -jnp.inf), tasks
  )


def of_seen(updates: Any, seen: Array) -> Any:
  """Zeroes the updates of weights that serve tasks not seen yet.

  These weights keep their initial values, with weight decay too.

  Args:
    updates: a tree like the parameters.
    seen: number of tasks seen.
  """
  served = jnp.arange(updates["out"]["bias"].shape[0]) < seen
  return {
    "hidden": {
      **updates["hidden"],
      "kernel": jnp.where(served[:, None, None], updates["hidden"]["kernel"], 0),
    },
    "out": jax.tree.map(lambda u: jnp.where(served, u, 0), updates["out"]),
  }


def classifier_macs(seen: int, features: int, hidden: int) -> int:
  """Counts the multiply-accumulates of one image.

  Args:
    seen: number of tasks seen.
    features: F, of each stream.
    hidden: width of the hidden layer.
  """
  return seen * features * hidden + hidden * seen


def train(
  params: Any, features: np.ndarray, tasks: np.ndarray, key: Array, settings: TaskClassifierSettings
) -> Any:
  """Trains on batches with all tasks in equal parts, by cross-entropy.

  Args:
    params: as of `init`.
    features: `[M, S, F]` of images of every task seen.
    tasks: `[M]`, the task of each.
    key: PRNG key of the batches.
    settings: of the training.
  Returns:
    the new parameters; the same for a single task.
  Raises:
    ValueError: a task without an image.
  """
  seen = features.shape[1]
  # Sorted by task, images of a task are a range, from which a position can be drawn.
  order = np.argsort(tasks, kind="stable")
  counts = np.bincount(tasks, minlength=seen)
  # With one task the loss is constant.
  if seen == 1:
    return params
  if counts.min() == 0:
    raise ValueError(
      f"every task needs an image to rehearse; got {counts.tolist()} images by task: keep more"
    )
  return _train(params, features[order], counts, np.cumsum(counts) - counts, key, settings)


@jax.jit(static_argnums=5)
def _train(params, features, counts, firsts, key, settings):
  # Separate from the steps of the task, hence an optimiser of its own.
  optimiser = optax.adam(settings.learning_rate)

  def step(state, key):
    """Takes one optimiser step on a random batch with all tasks in equal parts."""
    params, opt_state = state
    which, where = jax.random.split(key)
    task = jax.random.randint(which, (settings.batch_size,), 0, len(counts))
    # A task, then one of its images: tasks have equal parts however many images each has.
    place = jax.random.uniform(where, (settings.batch_size,)) * counts[task]
    # Rounding may bring u times count up to count itself.
    x = features[firsts[task] + jnp.minimum(place.astype(jnp.int32), counts[task] - 1)]
    loss = lambda p: jnp.mean(cross_entropy(p, x, task, len(counts)))
    updates, opt_state = optimiser.update(jax.grad(loss)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = lax.scan(
    step, (params, optimiser.init(params)), jax.random.split(key, settings.steps)
  )
  return params
