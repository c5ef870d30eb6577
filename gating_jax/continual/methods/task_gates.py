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
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.continual import replay_memory, shared_net, task_inference, units
from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  Method,
  Network,
  Prediction,
  Problem,
  TaskData,
  TaskNet,
  tree_megabytes,
  tree_size,
)
from gating_jax.continual.rehearsal import Rehearsal, make_pretrain_step
from gating_jax.continual.task_inference import FeatureClassifier, NetworkClassifier, TaskClassifier
from gating_jax.layers.gate import GATE_RNG
from gating_jax.models.summary import ModelCounts
from gating_jax.training.closed_gates import CLOSED, closed_share
from gating_jax.types import Array

WHEN_FULL = ("error", "reuse", "grow")
Tree = Any


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


def task_gates(
  model: nn.Module,
  problem: Problem,
  counts: ModelCounts,
  settings: TaskGatesSettings,
  rehearsal: Rehearsal | None = None,
  classifier_settings: task_inference.TaskClassifierSettings | None = None,
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
    router_settings: of a classifier on the features of all streams.
    network: of all classes, to be the task classifier instead; see `task_inference.NetworkClassifier`. It
      is trained together with the streams, under one bound on the gradient's norm.
    distillation: w, the weight with which such a network teaches the current task's stream, >= 0.
  Raises:
    ValueError: a network without rehearsal, rehearsal without a network or `router_settings`, or a
      negative `distillation`.
  """
  if not distillation >= 0:
    raise ValueError(f"distillation must be >= 0; got {distillation}")
  net = shared_net.SharedNet(model, problem, settings.own_norms)
  if network is not None and rehearsal is None:
    raise ValueError("a network for task inference needs images of earlier tasks; got no rehearsal")
  classifier = None
  if network is not None:
    classifier = NetworkClassifier(rehearsal, network, distillation)
  elif rehearsal is not None:
    if classifier_settings is None:
      raise ValueError("rehearsal without a network needs router_settings; got None")
    classifier = FeatureClassifier(net, rehearsal, classifier_settings)
  gates = _TaskGates(net, counts, settings, classifier)
  return Method(
    gates.init,
    gates.loss,
    gates.end_task,
    gates.predict,
    update=gates.update,
    footprint=gates.footprint,
    check_capacity=gates.check_capacity,
    pretrain_step=make_pretrain_step(rehearsal, problem),
    task_net=gates.task_net,
  )


@dataclasses.dataclass(frozen=True)
class _TaskGates:
  """The functions of the method, over parameters and statistics `{"shared", "own"}`.

  Memory: `available` `[U]`, the units that may be used; `own`, every task's parameters and
  statistics, `[T, ...]`; `frozen`, the mask of shared parameters, as a whole or by their last axis;
  `relevant` `[T, U]`. With a task classifier there are also its parameters and statistics,
  `router`, and its memory, `rehearsal`.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  settings: TaskGatesSettings
  classifier: TaskClassifier | None

  @property
  def problem(self) -> Problem:
    """Returns the learning problem."""
    return self.net.problem

  def init(self, key: Array) -> InitialState:
    """Initialises parameters, statistics and memory."""
    records, _ = self.net.shapes
    # The network has its last width; layers begin with a part of it.
    available = units.first_units(records, self.settings.allocated(self.problem.tasks))
    keys = jax.random.split(key, 3)
    params, batch_stats = self._fresh(keys[0], available)
    memory = {
      "own": shared_net.stack(
        {"params": params["own"], "batch_stats": batch_stats["own"]}, self.problem.tasks
      ),
      "frozen": units.nothing_frozen(params["shared"], records),
      "relevant": jnp.zeros((self.problem.tasks, len(available)), bool),
      "available": available,
    }
    if self.classifier is not None:
      memory["rehearsal"] = self.classifier.rehearsal.init(keys[2])
      params["router"], of_classifier = self.classifier.init(keys[1])
      batch_stats |= of_classifier
    return InitialState(params, batch_stats, memory)

  def loss(
    self, params: Tree, learner: LearnerState, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Tree]]:
    """Computes the loss of the current task's stream and of the task classifier."""
    noise, drawing = jax.random.split(batch.key)
    x = batch.x
    if self.classifier is not None:
      replayed = self.classifier.rehearsal.replay(
        learner.memory["rehearsal"], batch, learner.task, drawing
      )
      x = self.classifier.streamed(batch, replayed)
    stream = self.net.apply(params, learner.batch_stats, x, train=True, rngs={GATE_RNG: noise})
    logits, records, batch_stats = stream.logits, stream.records, stream.batch_stats
    # Where the stream saw rehearsed images too, the head's loss is still on the batch alone.
    if len(x) > len(batch.x):
      (logits, records), _ = replay_memory.part((logits, records), len(batch.x), len(replayed.x))
    terms = shared_net.head_terms(logits, batch.labels, learner.task, self.problem)
    available = learner.memory["available"]
    terms["sparsity"] = units.open_share(records, available)
    terms[CLOSED] = closed_share(records, axis_name=self.problem.axis_name, of=available)
    # L = cross-entropy + lambda_s (fraction of open gates), once the patience is over.
    total = terms["cross_entropy"] + self.settings.price(batch.epoch) * terms["sparsity"]
    if self.classifier is not None:
      more = self.classifier.loss(params, learner, batch, replayed, stream, noise)
      total, terms, batch_stats = (
        total + more.total,
        terms | more.terms,
        batch_stats | more.batch_stats,
      )
    return total, (terms, batch_stats)

  def update(self, updates: Tree, grads: Tree, learner: LearnerState) -> tuple[Tree, Tree]:
    """Zeroes the updates of frozen filters and of later tasks' classifier weights."""
    updates = dict(updates)
    if self.classifier is not None:
      # Weights of later tasks keep their initial values.
      updates["router"] = self.classifier.update(updates["router"], learner.task)
    if self.settings.protect_updates:
      # The update, not the gradient: momentum and weight decay would still move frozen filters.
      still = lambda u, frozen: jnp.where(frozen, 0, u)
      updates["shared"] = jax.tree.map(still, updates["shared"], learner.memory["frozen"])
    return updates, learner.memory

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Freezes the relevant filters, closes the other gates and prepares the next task."""
    task, memory = int(learner.task), learner.memory
    records, _ = self.net.shapes
    relevant = self._open_rates(learner, data.validation_pixels) > self.settings.threshold
    available = self._make_room(memory, relevant, task)
    own = learner.params["own"]
    if self.settings.shut_gates:
      # Step 1: no image opens the gate of an irrelevant unit any more.
      own = {**own, "net": units.shut(own["net"], records, relevant)}
    # Step 2: the rest of the shared filters starts from fresh values.
    frozen = units.freeze(memory["frozen"], records, relevant)
    own_key, key = jax.random.split(key)
    fresh, fresh_stats = self._fresh(own_key, available)
    # Irrelevant filters are free for the next task, and start as any fresh filter does.
    shared = units.reinitialise_free(frozen, learner.params["shared"], fresh["shared"])
    memory = memory | {
      "own": shared_net.put(
        memory["own"], task, {"params": own, "batch_stats": learner.batch_stats["own"]}
      ),
      "frozen": frozen,
      "relevant": memory["relevant"].at[task].set(relevant),
      "available": jnp.asarray(available),
    }
    learner = learner.replace(
      params={**learner.params, "shared": shared, "own": fresh["own"]},
      memory=memory,
      batch_stats={**learner.batch_stats, "own": fresh_stats["own"]},
    )
    return learner if self.classifier is None else self._rehearse(learner, data, key)

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images, with the task known and unknown."""
    stream = self._streams(learner, x, seen)
    macs = shared_net.macs(stream, self.counts, self.problem.classes)
    if self.classifier is None:
      return shared_net.prediction(self.problem, stream.logits, task, macs, macs.sum(0))
    inferred = self.classifier.infer_task(learner, x, stream, macs)
    # Only classes of the inferred task compete.
    chosen = (jnp.arange(seen)[:, None] == inferred.task)[..., None]
    # log q(c|x) + log p_t*(c|x), or log p_t*(c|x) alone, as the classifier has it.
    scores = jnp.where(chosen, jax.nn.log_softmax(stream.logits) + inferred.scores, -jnp.inf)
    return shared_net.prediction(self.problem, stream.logits, task, macs, inferred.macs, scores)

  def footprint(self, learner: LearnerState) -> Footprint:
    """Measures the storage of the tasks learnt so far, and the units they need."""
    learnt, memory, records = int(learner.task), learner.memory, self.net.shapes[0]
    # Entries of later tasks are initial values, and nothing needs them.
    own, shared = jax.tree.map(lambda x: x[:learnt], memory["own"]), learner.params["shared"]
    images = 0.0
    if self.classifier is not None:
      images = self.classifier.rehearsal.megabytes(memory["rehearsal"], learnt)
    return Footprint(
      # The own part in `params` is for the next task; filters not grown to yet do not count.
      params=tree_size((own["params"], {k: v for k, v in learner.params.items() if k != "own"}))
      - units.unallocated_params(shared, records, np.asarray(memory["available"])),
      memory_mb=tree_megabytes((memory["frozen"], memory["relevant"])) + images,
      relevant=units.used_by(memory["relevant"], memory["available"], records),
    )

  def task_net(self, learner: LearnerState, task: Array) -> TaskNet:
    """Returns the gated network of a learnt task."""
    return self.net.net_of(learner.params, learner.batch_stats, learner.memory["own"], task)

  def _rehearse(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Ends the training of the task classifier and keeps what is rehearsed later."""
    memory, task = learner.memory, int(learner.task)
    of_classifier, keeping = jax.random.split(key)
    trained = self.classifier.end_task(learner, data, of_classifier)
    kept = self.classifier.rehearsal.keep(memory["rehearsal"], data, task, keeping)
    return learner.replace(
      params={**learner.params, "router": trained}, memory={**memory, "rehearsal": kept}
    )

  def _fresh(self, key: Array, available: Array) -> tuple[Tree, Tree]:
    """Returns the initial state of the next task, which can use the available units."""
    params, batch_stats = self.net.fresh(key)
    net = units.shut(params["own"]["net"], self.net.shapes[0], available)
    return {**params, "own": {**params["own"], "net": net}}, batch_stats

  def _streams(self, learner: LearnerState, x: Array, seen: int) -> shared_net.TaskForward:
    """Runs all tasks learnt, as `SharedNet.side_by_side` does."""
    own = jax.tree.map(lambda tree: tree[:seen], learner.memory["own"])
    return self.net.side_by_side(learner.params, learner.batch_stats, own, x)

  def _open_rates(self, learner: LearnerState, pixels: Array) -> np.ndarray:
    """Computes the fraction of images for which each gate of the current task opens, `[U]`."""
    gates = lambda learner, x: units.joined(
      self.net.apply(learner.params, learner.batch_stats, x).records
    )
    return self.problem.in_batches(gates, learner, pixels).mean(axis=0, dtype=np.float64)

  def _make_room(self, memory: Mapping[str, Any], relevant: np.ndarray, task: int) -> np.ndarray:
    """Returns the units of the next task.

    These are the units of this task, and more in a layer that is full, if it may grow.
    """
    available = np.asarray(memory["available"])
    # After the last task nothing needs room.
    if task + 1 == self.problem.tasks or self.settings.when_full != "grow":
      return available
    records, used = self.net.shapes[0], np.asarray(memory["relevant"]).any(0) | relevant
    full = units.full_layers(records, used, available)
    return units.grown(
      records,
      available,
      full,
      growth=self.settings.growth,
      allocated=self.settings.allocated(self.problem.tasks),
    )

  def check_capacity(self, learner: LearnerState) -> None:
    """Raises FullLayerError if some layer has no free unit for the next task.

    There is no error after the last task, or with `when_full="reuse"`.
    """
    records, task = self.net.shapes[0], int(learner.task)
    full = units.full_layers(
      records,
      *(np.asarray(x) for x in (learner.memory["relevant"].any(0), learner.memory["available"])),
    )
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
