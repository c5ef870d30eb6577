"""Task inference: which task an image belongs to, by a task classifier.

A task classifier is trained together with the network of the current task, on the batch and on
rehearsed images. There are two.

`FeatureClassifier` runs the networks of all tasks and decides by their pooled features:

    z = Dense_T(ReLU(Dense_64(concatenated features)))

It has rows and columns for all tasks from the start; those of later tasks are left out. So it
widens task by task and keeps its weights. At the end of a task, when its network does not change
any more, the classifier is trained alone on the features of all networks.

`NetworkClassifier` is an ungated network of all classes; only the network of the inferred task
runs.

Among a learner's parameters and statistics, those of the task classifier are at `ROUTER`.

Axes: N or M images, B of a batch, R rehearsed, T tasks, S <= T seen, C classes of a task, K classes
in all, F features of a task's network.
Reference: Abati et al., 2020, section 3.4; Menon et al., "Long-tail learning via logit adjustment",
2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gating_jax.continual import replay_memory
from gating_jax.continual.method import (
  Batch,
  LearnerState,
  Network,
  TaskData,
  first_tasks,
  task_entry,
)
from gating_jax.continual.rehearsal import Rehearsal, ReplayedImages
from gating_jax.continual.shared_net import SharedNet, TaskForward
from gating_jax.ops.macs import dense_layer_macs
from gating_jax.types import AnyArray, Array, Tree

# Softens the softmax of the distillation loss.
TEMPERATURE = 2.0
# Key of a task classifier among a learner's parameters and statistics.
ROUTER = "router"


class RehearsedBatch(NamedTuple):
  """The batch of a step and the images that are rehearsed with it.

  Attributes:
    batch: B examples.
    replayed: R examples.
  """

  batch: Batch
  replayed: ReplayedImages

  @property
  def x(self) -> Array:
    """Returns `[B + R, H, W, D]` images, both kinds mixed evenly."""
    return replay_memory.mix(self.batch.x, self.replayed.x)

  @property
  def labels(self) -> Array:
    """Returns the `[B + R]` labels of `x`."""
    return replay_memory.mix(self.batch.labels, self.replayed.labels)

  def separate(self, tree: Tree) -> tuple[Tree, Tree]:
    """Separates arrays `[B + R, ...]` in the order of `x` into `[B, ...]` and `[R, ...]`."""
    return replay_memory.unmix(tree, len(self.batch.x), len(self.replayed.x))

  def weighted_mean(self, each: Array, weight: Array | float) -> Array:
    """Averages `[B + R]` losses in the order of `x`, with this weight on the mean of the batch."""
    of_batch, of_replay = self.separate(each)
    return weight * jnp.mean(of_batch) + (1 - weight) * jnp.mean(of_replay)


class ClassifierLoss(NamedTuple):
  """The part of a task classifier in the loss of a step.

  Attributes:
    total: scalar to add to the loss.
    terms: metrics by name.
    batch_stats: `{ROUTER: new running statistics}`; empty for a classifier without any.
  """

  total: Array
  terms: Mapping[str, Array]
  batch_stats: Mapping[str, Tree]


class TaskInference(NamedTuple):
  """Results of task inference.

  Attributes:
    task: `[N]`, the inferred task of each image.
    scores: `[S, N, C]` to add to the log-probabilities of each task's head, or a scalar 0.
    macs: `[N]` multiply-accumulates of the classifier and of the tasks' networks that run.
  """

  task: Array
  scores: Array
  macs: Array


class TaskClassifier(Protocol):
  """The functions of a task classifier, over a learner with a `RehearsedTaskMemory`.

  Attributes:
    rehearsal: memory of images of earlier tasks.
  """

  @property
  def rehearsal(self) -> Rehearsal: ...

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Initialises parameters, and statistics as in `ClassifierLoss`."""
    ...

  def forward_input(self, rehearsed: RehearsedBatch) -> Array:
    """Returns the images that the current task's network sees in a step."""
    ...

  def loss(
    self,
    params: Tree,
    learner: LearnerState,
    rehearsed: RehearsedBatch,
    *,
    forward: TaskForward,
    key: Array,
  ) -> ClassifierLoss:
    """Computes the classifier's part in the loss of a step.

    Args:
      params: those being differentiated.
      learner: before the step.
      rehearsed: images of the step.
      forward: of the current task's network, on `forward_input`.
      key: PRNG key of the step's noise.
    """
    ...

  def update(self, updates: Tree, task: Array) -> Tree:
    """Changes the optimiser's updates of the classifier in a step of this task's training."""
    ...

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> Tree:
    """Returns the classifier's parameters at the end of a task."""
    ...

  def infer_task(
    self, learner: LearnerState, x: Array, *, forward: TaskForward, macs: Array
  ) -> TaskInference:
    """Infers the tasks of images.

    Args:
      learner: with the classifier's parameters and statistics.
      x: `[N, H, W, D]`.
      forward: of all tasks seen, for these images.
      macs: `[S, N]` of the tasks' networks.
    """
    ...


@dataclasses.dataclass(frozen=True)
class FeatureClassifier:
  """A task classifier on the pooled features of all tasks' networks, all of which run.

  Attributes:
    net: the network of the tasks.
    rehearsal: memory of images of earlier tasks.
    settings: of the classifier.
  """

  net: SharedNet
  rehearsal: Rehearsal
  settings: TaskClassifierSettings

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Initialises the parameters; there are no statistics."""
    _, features = self.net.shapes
    params = init_feature_classifier(
      key, tasks=self.net.problem.tasks, features=features, hidden=self.settings.hidden
    )
    return params, {}

  def forward_input(self, rehearsed: RehearsedBatch) -> Array:
    """Returns batch and rehearsed images, mixed: the classifier sees the features of both."""
    return rehearsed.x

  def loss(
    self,
    params: Tree,
    learner: LearnerState,
    rehearsed: RehearsedBatch,
    *,
    forward: TaskForward,
    key: Array,
  ) -> ClassifierLoss:
    """Computes the cross-entropy over tasks; no earlier task gets a gradient."""
    x, tasks = rehearsed.x, self.net.problem.task_of(rehearsed.labels)

    def add_earlier(task, features):
      """Fills in the features of one earlier task; the array is `[N, T, F]`."""
      own = task_entry(learner.memory.own, task)
      # Parameters of the learner, not those being differentiated: a constant for the gradient.
      return features.at[:, task].set(self.net.run_task(learner, own, x).features)

    # Features of later tasks stay 0 and do not compete.
    features = jnp.zeros((len(x), self.net.problem.tasks, forward.features.shape[-1]))
    features = lax.fori_loop(0, learner.task, add_earlier, features)
    features = features.at[:, learner.task].set(forward.features)
    each = task_cross_entropy(params[ROUTER], features, tasks, seen=learner.task + 1)
    loss = rehearsed.weighted_mean(each, rehearsed.replayed.batch_weight)
    return ClassifierLoss(loss, {"task_cross_entropy": loss}, {})

  def update(self, updates: Tree, task: Array) -> Tree:
    """Keeps those of a step's updates that serve tasks seen."""
    return updates_of_seen(updates, task + 1)

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> Tree:
    """Returns the parameters after a task: trained alone on images of all tasks so far."""
    recalling, training = jax.random.split(key)
    problem, seen = self.net.problem, int(learner.task) + 1
    pixels, labels = self.rehearsal.recall(learner.memory.rehearsal, data, seen - 1, recalling)

    def features_of(learner, x):
      """Computes the features of all tasks seen, `[N, S, F]`."""
      features = self.net.run_tasks(learner, first_tasks(learner.memory.own, seen), x).features
      # `in_batches` joins along the first axis: images before tasks.
      return jnp.moveaxis(features, 0, 1)

    return train_feature_classifier(
      learner.params[ROUTER],
      problem.in_batches(features_of, learner, pixels),
      problem.task_of(labels),
      key=training,
      settings=self.settings,
    )

  def infer_task(
    self, learner: LearnerState, x: Array, *, forward: TaskForward, macs: Array
  ) -> TaskInference:
    """Infers the tasks of images from `forward` alone."""
    # Images before tasks, as the classifier takes them.
    features = jnp.moveaxis(forward.features, 0, 1)
    _, seen, width = features.shape
    task = jnp.argmax(task_scores(learner.params[ROUTER], features), axis=-1)
    # All networks run, whichever task is inferred: their costs add up.
    own_macs = feature_classifier_macs(seen, width, self.settings.hidden)
    return TaskInference(task, jnp.zeros(()), macs.sum(0) + float(own_macs))


@dataclasses.dataclass(frozen=True)
class NetworkClassifier:
  """An ungated network of all classes, q(c|x), as the task classifier.

      t*    = argmax_t sum_(c in t) q(c|x)
      class = argmax_(c in t*) log q(c|x) + log p_t*(c|x)
      loss  = CE(q, c) + w CE(softmax(q_t / 2), softmax(p_t / 2))

  Only the network of t* is needed. The second term of the loss is over logits of the current task
  t, on its batch: it teaches that task's network and not the classifier, which has all tasks to
  learn from. In the first term every image has the same weight; where the batch has no weight,
  every rehearsed image. In training q is shifted by the logarithm of each class's frequency
  relative to equal frequencies, which the test has.

  Attributes:
    rehearsal: memory of images of earlier tasks.
    network: of all classes.
    distillation: w.
  """

  rehearsal: Rehearsal
  network: Network
  distillation: float

  def init(self, key: Array) -> tuple[Tree, Mapping[str, Tree]]:
    """Initialises parameters and statistics."""
    params, batch_stats = self.network.init(key)
    return params, {ROUTER: batch_stats}

  def forward_input(self, rehearsed: RehearsedBatch) -> Array:
    """Returns the batch alone."""
    return rehearsed.batch.x

  def loss(
    self,
    params: Tree,
    learner: LearnerState,
    rehearsed: RehearsedBatch,
    *,
    forward: TaskForward,
    key: Array,
  ) -> ClassifierLoss:
    """Computes the loss on batch and rehearsed images in one pass."""
    x, labels = rehearsed.x, rehearsed.labels
    old_stats = learner.batch_stats[ROUTER]
    logits, batch_stats = self.network.train_logits(params[ROUTER], old_stats, x, key=key)
    # Every image has the same weight, in the batch or replayed; a weight of 0 or 1 leaves out one
    # of the two and stays.
    weight = rehearsed.replayed.batch_weight
    fraction = len(rehearsed.batch.x) / len(x)
    even = jnp.where((weight > 0) & (weight < 1), fraction, weight)
    # Logit adjustment (Menon et al.): log(actual / fair frequency), for classes of the current task
    # and of the earlier ones.
    of_class = self.network.problem.task_of(jnp.arange(logits.shape[1]))
    of_current, of_earlier = _log_ratio(even, weight), _log_ratio(1 - even, 1 - weight)
    shift = jnp.where(of_class == learner.task, of_current, of_earlier)
    # The shift is for training alone: at the test all classes are equally frequent.
    each = self.network.cross_entropy(logits + shift, labels, learner.task)
    loss = rehearsed.weighted_mean(each, even)
    distillation = self._distillation(rehearsed.separate(logits)[0], forward.logits, learner.task)
    return ClassifierLoss(
      loss + self.distillation * distillation,
      {"class_cross_entropy": loss, "distillation": distillation},
      {ROUTER: batch_stats},
    )

  def _distillation(self, of_network: Array, of_task: Array, task: Array) -> Array:
    """Computes CE(softmax(q_t / 2), softmax(p_t / 2)), without a gradient for the network.

    Args:
      of_network: `[B, K]` logits of q.
      of_task: `[B, C]` logits of p_t.
      task: t.
    """
    classes = of_task.shape[-1]
    # The columns of task t among the outputs of all classes.
    taught = lax.dynamic_slice_in_dim(of_network, task * classes, classes, axis=1)
    target = jax.nn.softmax(lax.stop_gradient(taught) / TEMPERATURE)
    return jnp.mean(optax.softmax_cross_entropy(of_task / TEMPERATURE, target))

  def update(self, updates: Tree, task: Array) -> Tree:
    """Keeps all of a step's updates."""
    return updates

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> Tree:
    """Returns the parameters after a task, unchanged."""
    return learner.params[ROUTER]

  def infer_task(
    self, learner: LearnerState, x: Array, *, forward: TaskForward, macs: Array
  ) -> TaskInference:
    """Infers the tasks of images by the classes of the network."""
    seen, _, classes = forward.logits.shape
    logits = self.network.logits(learner.params[ROUTER], learner.batch_stats[ROUTER], x)
    log_probs = jax.nn.log_softmax(logits[:, : seen * classes])
    log_probs = log_probs.reshape(len(x), seen, classes).swapaxes(0, 1)
    # t* = argmax_t sum_(c in t) q(c|x)
    task = jnp.argmax(jax.nn.logsumexp(log_probs, axis=-1), axis=0)
    # Only the network of t* would run, so only its cost counts.
    of_inferred = jnp.take_along_axis(macs, task[None], axis=0)[0]
    return TaskInference(task, log_probs, of_inferred + self.network.macs)


def _log_ratio(fraction: Array | float, fair: Array | float) -> Array:
  """Computes log(fraction / fair), and 0 where `fair` is 0."""
  return jnp.log(jnp.where(fair > 0, fraction / jnp.where(fair > 0, fair, 1), 1))


@dataclasses.dataclass(frozen=True)
class TaskClassifierSettings:
  """Settings of a `FeatureClassifier`.

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


def init_feature_classifier(
  key: Array, *, tasks: int, features: int, hidden: int
) -> dict[str, Any]:
  """Initialises the parameters of a `FeatureClassifier`.

  Args:
    key: PRNG key.
    tasks: T.
    features: F.
    hidden: width of the hidden layer.
  """
  first, second = jax.random.split(key)
  he_normal = jax.nn.initializers.he_normal()
  # Initialised for the fan-in of one task's features, then cut into a block per task.
  blocks = he_normal(first, (features, tasks * hidden)).reshape(features, tasks, hidden)
  return {
    "hidden": {"kernel": blocks.swapaxes(0, 1), "bias": jnp.zeros(hidden)},
    "out": {"kernel": he_normal(second, (hidden, tasks)), "bias": jnp.zeros(tasks)},
  }


def task_scores(params: Any, features: Array) -> Array:
  """Computes the task logits of a `FeatureClassifier`.

  Args:
    params: as `init_feature_classifier` returns them.
    features: `[N, S, F]` of the first S tasks.
  Returns:
    `[N, S]`.
  """
  seen, hidden, out = features.shape[1], params["hidden"], params["out"]
  # z = Dense_T(ReLU(Dense_64(concatenated features))): a sum over tasks of blocks is a product with
  # the concatenation.
  h = jax.nn.relu(jnp.einsum("nsf,sfh->nh", features, hidden["kernel"][:seen]) + hidden["bias"])
  return h @ out["kernel"][:, :seen] + out["bias"][:seen]


def task_cross_entropy(params: Any, features: Array, tasks: Array, *, seen: Array | int) -> Array:
  """Computes the cross-entropies over the tasks seen.

  Args:
    params: as `init_feature_classifier` returns them.
    features: `[N, T, F]`, zeros for tasks not seen.
    tasks: `[N]`, the task of each image.
    seen: number of tasks seen.
  Returns:
    `[N]`.
  """
  # Later tasks have logits too, from features of 0.
  competing = jnp.arange(features.shape[1]) < seen
  logits = jnp.where(competing, task_scores(params, features), -jnp.inf)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tasks)


def updates_of_seen(updates: Any, seen: Array) -> Any:
  """Zeroes the updates of weights that serve tasks not seen yet.

  These weights keep their initial values, with weight decay too.

  Args:
    updates: a tree like the parameters.
    seen: number of tasks seen.
  """
  served = jnp.arange(updates["out"]["bias"].shape[0]) < seen
  # The first kernel has a block per task; the hidden bias serves all tasks and stays.
  kernel = jnp.where(served[:, None, None], updates["hidden"]["kernel"], 0)
  return {
    "hidden": {**updates["hidden"], "kernel": kernel},
    "out": jax.tree.map(lambda update: jnp.where(served, update, 0), updates["out"]),
  }


def feature_classifier_macs(seen: int, features: int, hidden: int) -> int:
  """Counts the multiply-accumulates of one image.

  Args:
    seen: number of tasks seen.
    features: F.
    hidden: width of the hidden layer.
  """
  # The first layer reads the features of all tasks seen; the second has an output for each.
  return dense_layer_macs((seen * features, hidden), (hidden, seen))


def train_feature_classifier(
  params: Any,
  features: np.ndarray,
  tasks: np.ndarray,
  *,
  key: Array,
  settings: TaskClassifierSettings,
) -> Any:
  """Trains on batches with all tasks in equal parts, by cross-entropy.

  Args:
    params: as `init_feature_classifier` returns them.
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
  images = _SortedImages(features[order], counts, np.cumsum(counts) - counts)
  return _train(params, images, key=key, settings=settings)


class _SortedImages(NamedTuple):
  """Images sorted by task.

  Attributes:
    features: `[M, S, F]`.
    counts, firsts: `[S]`, the number of images of each task and the position of its first one.
  """

  features: AnyArray
  counts: AnyArray
  firsts: AnyArray


@jax.jit(static_argnames="settings")
def _train(params, images, *, key, settings):
  """Trains a `FeatureClassifier` by Adam; arguments as in `train_feature_classifier`."""
  # Separate from the steps of the task, hence an optimiser of its own.
  optimiser = optax.adam(settings.learning_rate)
  seen = len(images.counts)

  def step(state, key):
    """Takes one optimiser step on a random batch with all tasks in equal parts."""
    params, opt_state = state
    which, where = jax.random.split(key)
    # A task, then one of its images: tasks have equal parts however many images each has.
    tasks = jax.random.randint(which, (settings.batch_size,), 0, seen)
    counts = images.counts[tasks]
    place = jax.random.uniform(where, (settings.batch_size,)) * counts
    # Rounding may bring u times count up to count itself.
    place = jnp.minimum(place.astype(jnp.int32), counts - 1)
    x = images.features[images.firsts[tasks] + place]

    def loss(params):
      """Returns the mean cross-entropy of the batch."""
      return jnp.mean(task_cross_entropy(params, x, tasks, seen=seen))

    updates, opt_state = optimiser.update(jax.grad(loss)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  initial = (params, optimiser.init(params))
  (params, _), _ = lax.scan(step, initial, jax.random.split(key, settings.steps))
  return params
