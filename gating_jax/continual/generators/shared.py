"""One generator of images for all tasks, with shared gated filters.

Each task has its own gates and its own layer of pixels. A `Protection` defines how a task's gates
train and how its filters are protected: `protections.gated` or `protections.masked`.

Axes: N images, T tasks, C classes of a task.
Reference: Abati et al., 2020, who leave it to others; Ostapenko et al., 2019; Gulrajani et al.,
2017 (WGAN-GP).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gating_jax.continual import shared_net
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import Batch, Problem, TaskData, tree_megabytes
from gating_jax.continual.rehearsal import (
  Memory,
  Rehearsal,
  Replay,
  check_images,
  generated,
  replay_of_all,
)
from gating_jax.models.generator import Critic, Generator
from gating_jax.types import Array, Records

Tree = Any


@dataclasses.dataclass(frozen=True)
class Protection:
  """The protection of tasks, as pure functions over a state of its own.

  Parameters are in two parts, as of `split`.

  Attributes:
    init: `shared -> state`, before any task.
    begin: `(state, shared, fresh, key) -> params`, the initial parameters of a task, made from
      `fresh` ones and from the shared filters after the earlier tasks.
    training: `(state, step) -> ` keywords of `wgan.make_train_step`.
    finish: `(state, task, params, batch_stats, key) -> (state, own)`, for a task whose generator is
      trained.
    view: maps whole parameters to those that the generator runs with, in evaluation.
  """

  init: Callable[[Tree], Tree]
  begin: Callable[[Tree, Tree, Tree, Array], Tree]
  training: Callable[[Tree, Array], Mapping[str, Any]]
  finish: Callable[[Tree, int, Tree, Tree, Array], tuple[Tree, Tree]]
  view: Callable[[Tree], Tree] = lambda params: params


def shared_generative(
  problem: Problem,
  generator: Generator,
  settings: wgan.WganSettings,
  protection: Protection,
  *,
  images: int,
  replayed: int,
  seed: int,
) -> Rehearsal:
  """Makes a rehearsal by one generator, trained on each task before the task itself.

  As in `rehearsal.generative`, all recalled images are generated, `images` of every task in equal
  parts of its classes.

  Args:
    problem: the learning problem.
    generator: gated, and conditional on the classes of one task.
    settings: of its training.
    protection: of earlier tasks.
    images, replayed, seed: as in `rehearsal.generative`.
  Raises:
    ValueError: fewer `images` than classes of a task.
  """
  check_images(images, problem)
  shared = _Shared(problem, generator, settings, protection, images, replayed, seed)
  return Rehearsal(
    shared.init, shared.replay, shared.recall, shared.keep, shared.megabytes, shared.pretrain_step
  )


def records(generator: Generator) -> Records:
  """Returns the records of one image, as shapes."""
  z, label = (
    jax.ShapeDtypeStruct((1, generator.latent), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  return jax.eval_shape(lambda *x: generator.init_with_output(jax.random.key(0), *x), z, label)[0][
    1
  ]


def split(params: Tree, records: Records) -> dict[str, Tree]:
  """Splits parameters into the filters that gates switch, and the rest.

  Args:
    params: of the generator.
    records: as of `records`.
  Returns:
    `{"shared", "own"}`.
  """
  writers = {writer for r in records for writer in r.writers}
  return shared_net.split(params, lambda path: path[:-1] in writers)


def slowed(updates: Tree, free: Tree) -> Tree:
  """Multiplies updates by how far each parameter may move.

  Args:
    updates: any tree.
    free: factors by the same paths; updates without one stay.
  """
  # `free` may lack paths, so the trees cannot be mapped together.
  flat, free = (traverse_util.flatten_dict(tree) for tree in (updates, free))
  return traverse_util.unflatten_dict(
    {path: u * free[path] if path in free else u for path, u in flat.items()}
  )


@dataclasses.dataclass(frozen=True)
class _Shared:
  """The functions of the rehearsal.

  Memory: `own`, every task's parameters and statistics, `[T, ...]`; `protection`, its state;
  `training`, the state of the current task's training, which also holds the shared filters.
  """

  problem: Problem
  generator: Generator
  settings: wgan.WganSettings
  protection: Protection
  images: int
  replayed: int
  seed: int

  def init(self, key: Array) -> Memory:
    """Initialises the memory for all tasks."""
    fresh = self._fresh(0)
    shared = self._split(fresh.average)["shared"]
    protection = self.protection.init(shared)
    training = self._begun(fresh, protection, shared, 0)
    # Initial values for all tasks; each is replaced when its task ends.
    own = {"params": self._split(training.average)["own"], "batch_stats": training.batch_stats}
    return {
      "own": shared_net.stack(own, self.problem.tasks),
      "protection": protection,
      "training": training,
    }

  def pretrain_step(
    self, memory: Memory, pixels: Array, labels: Array
  ) -> tuple[Memory, Mapping[str, Array]]:
    """Trains the generator for one step on `[N, H, W, D]` pixels and `[N]` labels."""
    state = memory["training"]
    step = wgan.make_train_step(
      self.generator,
      self._critic,
      self.settings,
      seed=self.seed,
      axis_name=self.problem.axis_name,
      # The keywords depend on the step, as slope and penalty do.
      **self.protection.training(memory["protection"], state.step),
    )
    training, metrics = step(state, pixels, labels)
    return {**memory, "training": training}, metrics

  def replay(self, memory: Memory, batch: Batch, task: Array, key: Array) -> Replay:
    """Generates images of all tasks so far for one training batch."""
    state = memory["training"]
    params = self._split(state.average)
    # The current task has no entry of its own until it ends.
    each = shared_net.put(
      memory["own"], task, {"params": params["own"], "batch_stats": state.batch_stats}
    )
    make = lambda own, z, labels: wgan.to_pixels(
      self.generator.apply(self._variables(params["shared"], own), z, labels)[0]
    )
    return replay_of_all(
      make, each, self.problem, task, key, count=self.replayed, latent=self.generator.latent
    )

  def recall(self, memory: Memory, data: TaskData, task: int, key: Array):
    """Generates pixels `[N, H, W, D]` and labels `[N]` of all tasks up to this one."""
    memory = self._with_this(memory, task)
    shared = self._split(memory["training"].average)["shared"]

    each = (
      self._variables(shared, jax.tree.map(lambda x, t=t: x[t], memory["own"]))
      for t in range(task + 1)
    )
    return generated(self.generator, each, key, self.images)

  def keep(self, memory: Memory, data: TaskData, task: int, key: Array) -> Memory:
    """Returns the memory with the ended task, and a fresh training state for the next."""
    memory = self._with_this(memory, task)
    # Filters of ended tasks are protected: the current shared part serves all of them.
    shared = self._split(memory["training"].average)["shared"]
    return {
      **memory,
      # A fresh optimiser and critic for the next task; only the filters are passed on.
      "training": self._begun(self._fresh(task + 1), memory["protection"], shared, task + 1),
    }

  def megabytes(self, memory: Memory, learnt: int) -> float:
    """Returns the size, in 10**6 bytes, of the part needed after `learnt` tasks."""
    # The rest of the training state is needed only while a task is learnt.
    own = jax.tree.map(lambda x: x[:learnt], memory["own"])
    return tree_megabytes(
      (self._split(memory["training"].average)["shared"], own, memory["protection"])
    )

  @property
  def _critic(self) -> Critic:
    return Critic(width=self.generator.width, classes=self.generator.classes)

  def _split(self, params: Tree) -> dict[str, Tree]:
    return split(params, records(self.generator))

  def _variables(self, shared: Tree, own: Tree) -> Tree:
    """Returns the variables of one task's generator, in evaluation."""
    return {
      "params": self.protection.view(shared_net.merge(shared, own["params"])),
      "batch_stats": own["batch_stats"],
    }

  def _key(self, task: int) -> Array:
    return jax.random.fold_in(jax.random.key(self.seed), task)

  def _fresh(self, task: int) -> wgan.WganState:
    return wgan.init_state(
      # T seeds belong to the seed of a run: every task has its own.
      self.generator,
      self._critic,
      self.settings,
      self.seed * self.problem.tasks + task,
    )

  def _begun(
    self, fresh: wgan.WganState, protection: Tree, shared: Tree, task: int
  ) -> wgan.WganState:
    """Returns the state with which a task begins, from the shared filters after earlier tasks."""
    params = self.protection.begin(protection, shared, self._split(fresh.average), self._key(task))
    params = shared_net.merge(params["shared"], params["own"])
    # A copy: a step donates its buffers, and none may be donated twice.
    return fresh.replace(generator=params, average=jax.tree.map(jnp.copy, params))

  def _with_this(self, memory: Memory, task: int) -> Memory:
    """Returns the memory with the ending task among those that are kept."""
    state = memory["training"]
    protection, own = self.protection.finish(
      memory["protection"], task, self._split(state.average), state.batch_stats, self._key(task)
    )
    own = shared_net.put(memory["own"], task, {"params": own, "batch_stats": state.batch_stats})
    return {**memory, "own": own, "protection": protection}
