"""Task-gated networks: gate networks per task choose filters, which are then frozen.

The convolutions are shared. Each task has its own gate networks, BatchNorm and head. After a task:

1. A unit is relevant if its gate opens often enough on the task's validation images. The gates of
the other units are closed permanently, so that no test image of the task can open a filter that no
longer belongs to the task.
2. The filters of relevant units are frozen, by masking their updates; all other filters are
initialised again.

Then the task's logits are the same, bit for bit, whatever is learnt later.

Axes: N examples, T tasks, C classes of a task, F features, U gated units of the network.
Reference: Abati et al., "Conditional channel gated networks for task-aware continual learning",
CVPR 2020.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.continual import shared_net, units
from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Network,
  Prediction,
  Problem,
  StepLoss,
  TaskData,
  TaskNet,
  Variables,
  first_tasks,
  put_task,
  stack_tasks,
  tree_megabytes,
  tree_size,
)
from gating_jax.continual.rehearsal import Rehearsal, make_pretrain_step
from gating_jax.continual.shared_net import NET, OWN, SHARED
from gating_jax.continual.task_inference import (
  ROUTER,
  FeatureClassifier,
  NetworkClassifier,
  RehearsedBatch,
  TaskClassifier,
  TaskClassifierSettings,
)
from gating_jax.layers.gate import GATE_RNG
from gating_jax.models.summary import ModelCounts
from gating_jax.ops.penalties import closed_share
from gating_jax.training.closed_gates import CLOSED
from gating_jax.types import AnyArray, Array, Tree

WHEN_FULL = ("error", "reuse", "grow")


@dataclasses.dataclass(frozen=True)
class TaskGatesSettings(units.ProtectionSettings):
  """Settings for gating and protection: patience in epochs, relevance on validation images.

  Attributes:
    when_full: what happens if a layer has no free unit for the next task: `error`; `reuse`, the old
      units alone; `grow`, by the fraction `growth` of its first width.
    growth: see `allocated`, >= 0. Units that a layer has not grown to yet are closed. Convolutions
      without gates, as the stem of a residual network, have their last width from the start.
    own_norms: BatchNorm for every task, the third protection.
  """

  when_full: str = "error"
  growth: float = 0.25
  own_norms: bool = True

  def __post_init__(self):
    super().__post_init__()
    one_of("when_full", self.when_full, WHEN_FULL)
    if not self.growth >= 0:
      raise ValueError(f"growth must be >= 0; got {self.growth}")

  def allocated(self, tasks: int) -> float:
    """Returns the factor on the initial width that the network must be made with."""
    return 1 + self.growth * (tasks - 1) if self.when_full == "grow" else 1.0


class FullLayerError(ValueError):
  """A layer without a free unit for the next task; the message names settings that help."""


class TaskMemory(MemoryNode):
  """The memory of the method without a task classifier.

  Attributes:
    own: variables of every task, `[T, ...]`; entries of tasks to come are initial values.
    frozen: mask of the shared parameters that never change, as `units.nothing_frozen` makes it.
    relevant: `[T, U]` bool, the units that each task needs.
    available: `[U]` bool, the units that the current task may use.
  """

  own: Variables
  frozen: Tree
  relevant: Array
  available: Array


class RehearsedTaskMemory(TaskMemory):
  """The memory of the method with a task classifier.

  Attributes:
    rehearsal: memory of the task classifier's rehearsal.
  """

  rehearsal: Any


def task_gates(
  model: nn.Module,
  problem: Problem,
  counts: ModelCounts,
  settings: TaskGatesSettings,
  *,
  rehearsal: Rehearsal | None = None,
  classifier_settings: TaskClassifierSettings | None = None,
  network: Network | None = None,
  distillation: float = 0.0,
) -> Method:
  """Makes the method.

  Args:
    model: maps images to `([N, F] features, records)`, its records with writers.
    problem: the learning problem.
    counts: of the model, as wide as it may grow.
    settings: of gates and protection.
    rehearsal: memory for the task classifier, for task inference. With None there is no classifier,
      and the class with the highest probability of all heads is taken.
    classifier_settings: of a classifier on the features of all tasks' networks.
    network: of all classes, to be the task classifier instead; see
      `task_inference.NetworkClassifier`. It is trained together with the tasks' networks, under one
      bound on the gradient's norm.
    distillation: w, the weight with which such a network teaches that of the current task, >= 0.
  Raises:
    ValueError: a network without rehearsal, rehearsal without a network or `classifier_settings`,
      or a negative `distillation`.
  """
  if not distillation >= 0:
    raise ValueError(f"distillation must be >= 0; got {distillation}")
  net = shared_net.SharedNet(model, problem, settings.own_norms)
  classifier = None
  if network is not None:
    if rehearsal is None:
      raise ValueError(
        "a network for task inference needs images of earlier tasks; got no rehearsal"
      )
    classifier = NetworkClassifier(rehearsal, network, distillation)
  elif rehearsal is not None:
    if classifier_settings is None:
      raise ValueError("rehearsal without a network needs classifier_settings; got None")
    classifier = FeatureClassifier(net, rehearsal, classifier_settings)
  return _TaskGates(net, counts, settings, classifier=classifier).method()


@dataclasses.dataclass(frozen=True)
class _TaskGates:
  """The functions of the method, over parameters and statistics of `SharedNet` and a `TaskMemory`.

  With a task classifier, its parameters and statistics are at `ROUTER`.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  settings: TaskGatesSettings
  classifier: TaskClassifier | None

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    rehearsal = self.classifier.rehearsal if self.classifier is not None else None
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.predict,
      update=self.update,
      footprint=self.footprint,
      check_capacity=self.check_capacity,
      pretrain_step=make_pretrain_step(rehearsal, self.problem),
      task_net=self.task_net,
    )

  @property
  def problem(self) -> Problem:
    """Returns the learning problem."""
    return self.net.problem

  def init(self, key: Array) -> InitialState:
    """Initialises parameters, statistics and memory."""
    records, _ = self.net.shapes
    # The network has its last width; layers begin with a part of it.
    available = units.first_units(records, self.settings.allocated(self.problem.tasks))
    net_key, classifier_key, rehearsal_key = jax.random.split(key, 3)
    params, batch_stats = self._fresh(net_key, available)
    memory = TaskMemory(
      own=stack_tasks(shared_net.own_part(params, batch_stats), self.problem.tasks),
      frozen=units.nothing_frozen(params[SHARED], records),
      relevant=jnp.zeros((self.problem.tasks, len(available)), bool),
      available=available,
    )
    if self.classifier is not None:
      rehearsal = self.classifier.rehearsal.init(rehearsal_key)
      memory = RehearsedTaskMemory(**vars(memory), rehearsal=rehearsal)
      params[ROUTER], of_classifier = self.classifier.init(classifier_key)
      batch_stats |= of_classifier
    return InitialState(params, batch_stats, memory)

  def loss(self, params: Tree, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the loss of the current task's network and of the task classifier."""
    noise, drawing = jax.random.split(batch.key)
    x, memory = batch.x, learner.memory
    if self.classifier is not None:
      replay = self.classifier.rehearsal.replay
      rehearsed = RehearsedBatch(batch, replay(memory.rehearsal, batch, learner.task, key=drawing))
      x = self.classifier.forward_input(rehearsed)
    forward = self.net.apply(params, learner.batch_stats, x, train=True, rngs={GATE_RNG: noise})
    logits, records, batch_stats = forward.logits, forward.records, forward.batch_stats
    # Where the network saw rehearsed images too, the head's loss is still on the batch alone.
    if len(x) > len(batch.x):
      (logits, records), _ = rehearsed.separate((logits, records))
    terms = shared_net.head_terms(logits, batch.labels, task=learner.task, problem=self.problem)
    terms["sparsity"] = units.open_share(records, memory.available)
    terms[CLOSED] = closed_share(records, axis_name=self.problem.axis_name, of=memory.available)
    # L = cross-entropy + lambda_s (fraction of open gates), once the patience is over.
    total = terms["cross_entropy"] + self.settings.sparsity_weight(batch.epoch) * terms["sparsity"]
    if self.classifier is None:
      return total, (terms, batch_stats)
    of_classifier = self.classifier.loss(params, learner, rehearsed, forward=forward, key=noise)
    terms |= of_classifier.terms
    batch_stats = batch_stats | of_classifier.batch_stats
    return total + of_classifier.total, (terms, batch_stats)

  def update(self, updates: Tree, grads: Tree, learner: LearnerState) -> tuple[Tree, TaskMemory]:
    """Zeroes the updates of frozen filters and of later tasks' classifier weights."""
    updates = dict(updates)
    if self.classifier is not None:
      # Weights of later tasks keep their initial values.
      updates[ROUTER] = self.classifier.update(updates[ROUTER], learner.task)
    if self.settings.protect_updates:
      # The update, not the gradient: momentum and weight decay would still move frozen filters.
      updates[SHARED] = jax.tree.map(
        lambda update, frozen: jnp.where(frozen, 0, update),
        updates[SHARED],
        learner.memory.frozen,
      )
    return updates, learner.memory

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Freezes the relevant filters, closes the other gates and prepares the next task."""
    task, memory = int(learner.task), learner.memory
    records, _ = self.net.shapes
    relevant = self._open_rates(learner, data.validation_pixels) > self.settings.threshold
    available = self._units_of_next_task(memory, relevant, task)
    own = shared_net.own_part(learner.params, learner.batch_stats)
    if self.settings.shut_gates:
      # Step 1: no image opens the gate of an irrelevant unit any more.
      own = own.replace(params=self._with_gates_shut(own.params, relevant))
    # Step 2: the rest of the shared filters starts from fresh values.
    frozen = units.freeze(memory.frozen, records, relevant)
    fresh_key, classifier_key = jax.random.split(key)
    fresh, fresh_stats = self._fresh(fresh_key, available)
    # Irrelevant filters are free for the next task, and start as any fresh filter does.
    shared = units.reinitialise_free(frozen, learner.params[SHARED], fresh[SHARED])
    learner = learner.replace(
      params={**learner.params, SHARED: shared, OWN: fresh[OWN]},
      batch_stats={**learner.batch_stats, OWN: fresh_stats[OWN]},
      memory=memory.replace(
        own=put_task(memory.own, task, own),
        frozen=frozen,
        relevant=memory.relevant.at[task].set(relevant),
        available=jnp.asarray(available),
      ),
    )
    if self.classifier is None:
      return learner
    return self._rehearse(self.classifier, learner, data, key=classifier_key)

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images, with the task known and unknown."""
    forward = self.net.run_tasks(learner, first_tasks(learner.memory.own, seen), x)
    macs = shared_net.forward_macs(forward, self.counts, self.problem.classes)
    if self.classifier is None:
      agnostic_macs, scores = macs.sum(0), None
    else:
      inferred = self.classifier.infer_task(learner, x, forward=forward, macs=macs)
      agnostic_macs = inferred.macs
      # Only classes of the inferred task compete.
      chosen = (jnp.arange(seen)[:, None] == inferred.task)[..., None]
      # log q(c|x) + log p_t*(c|x), or log p_t*(c|x) alone, as the classifier has it.
      scores = jax.nn.log_softmax(forward.logits) + inferred.scores
      scores = jnp.where(chosen, scores, -jnp.inf)
    return shared_net.prediction(
      self.problem,
      forward.logits,
      task=task,
      macs=macs,
      agnostic_macs=agnostic_macs,
      scores=scores,
    )

  def footprint(self, learner: LearnerState) -> Footprint:
    """Measures the storage of the tasks learnt so far, and the units they need."""
    learnt, memory, records = int(learner.task), learner.memory, self.net.shapes[0]
    # Entries of later tasks are initial values, and nothing needs them.
    own = first_tasks(memory.own, learnt)
    # The own part in `params` is for the next task.
    others = {name: tree for name, tree in learner.params.items() if name != OWN}
    # Filters not grown to yet do not count.
    unallocated = units.unallocated_params(
      learner.params[SHARED], records, np.asarray(memory.available)
    )
    rehearsed_mb = 0.0
    if self.classifier is not None:
      rehearsed_mb = self.classifier.rehearsal.megabytes(memory.rehearsal, learnt)
    return Footprint(
      params=tree_size((own.params, others)) - unallocated,
      memory_mb=tree_megabytes((memory.frozen, memory.relevant)) + rehearsed_mb,
      relevant=units.used_by(memory.relevant, memory.available, records),
    )

  def task_net(self, learner: LearnerState, task: Array) -> TaskNet:
    """Returns the gated network of a learnt task."""
    return self.net.task_net(learner, learner.memory.own, task)

  def _rehearse(
    self, classifier: TaskClassifier, learner: LearnerState, data: TaskData, *, key: Array
  ) -> LearnerState:
    """Ends the training of the task classifier and keeps what is rehearsed later."""
    training, keeping = jax.random.split(key)
    trained = classifier.end_task(learner, data, training)
    kept = classifier.rehearsal.keep(learner.memory.rehearsal, data, int(learner.task), key=keeping)
    return learner.replace(
      params={**learner.params, ROUTER: trained}, memory=learner.memory.replace(rehearsal=kept)
    )

  def _fresh(self, key: Array, available: AnyArray) -> tuple[Tree, Tree]:
    """Returns the initial state of the next task, which can use the available units."""
    params, batch_stats = self.net.fresh(key)
    return {**params, OWN: self._with_gates_shut(params[OWN], available)}, batch_stats

  def _with_gates_shut(self, own: Tree, kept: AnyArray) -> Tree:
    """Returns a task's own parameters, with the gates of all but the kept units closed."""
    return {**own, NET: units.close_gates(own[NET], self.net.shapes[0], kept)}

  def _open_rates(self, learner: LearnerState, pixels: Array) -> np.ndarray:
    """Computes the fraction of images for which each gate of the current task opens, `[U]`."""

    def gates_of(learner, x):
      """Returns the gates of the current task, `[N, U]`."""
      return units.join_gates(self.net.apply(learner.params, learner.batch_stats, x).records)

    return self.problem.in_batches(gates_of, learner, pixels).mean(axis=0, dtype=np.float64)

  def _units_of_next_task(self, memory: TaskMemory, relevant: np.ndarray, task: int) -> np.ndarray:
    """Returns the units of the next task.

    These are the units of this task, and more in a layer that is full, if it may grow.
    """
    available = np.asarray(memory.available)
    # After the last task nothing needs room.
    if task + 1 == self.problem.tasks or self.settings.when_full != "grow":
      return available
    records, used = self.net.shapes[0], np.asarray(memory.relevant).any(0) | relevant
    return units.grow_layers(
      records,
      available,
      units.full_layers(records, used, available),
      growth=self.settings.growth,
      allocated=self.settings.allocated(self.problem.tasks),
    )

  def check_capacity(self, learner: LearnerState) -> None:
    """Raises FullLayerError if some layer has no free unit for the next task.

    There is no error after the last task, or with `when_full="reuse"`.
    """
    records, task = self.net.shapes[0], int(learner.task)
    used = np.asarray(learner.memory.relevant.any(0))
    full = units.full_layers(records, used, np.asarray(learner.memory.available))
    # Nothing to learn, room everywhere, or old units allowed as the only ones.
    if task == self.problem.tasks or not full or self.settings.when_full == "reuse":
      return
    names = ", ".join(units.layer_name(records[i]) for i in full)
    raise FullLayerError(
      f"after task {task} of {self.problem.tasks} no unit is free for the next task in {names}; in "
      "a new workdir, a larger model.width or gates.sparsity, a lower gates.patience or a higher "
      "gates.threshold leave more units free; gates.when_full=grow adds units, and "
      "gates.when_full=reuse uses the old ones alone"
    )
