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
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import traverse_util

from gating_jax.continual import shared_net
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import (
  Batch,
  MemoryNode,
  Problem,
  TaskData,
  Variables,
  first_tasks,
  put_task,
  stack_tasks,
  task_entry,
  tree_megabytes,
)
from gating_jax.continual.rehearsal import (
  Rehearsal,
  ReplayedImages,
  check_images,
  generate_tasks,
  replay_of_all,
)
from gating_jax.continual.units import gated_layers
from gating_jax.models.generator import Critic, Generator
from gating_jax.types import Array, Path, Records, Tree


class BeginTask(Protocol):
  """Makes the initial parameters of a task."""

  def __call__(
    self, state: Tree, shared: Tree, fresh: shared_net.Parts, key: Array
  ) -> shared_net.Parts: ...


class FinishTask(Protocol):
  """Protects a task whose generator is trained; returns the state and the own parameters."""

  def __call__(
    self, state: Tree, task: int, params: shared_net.Parts, batch_stats: Tree, key: Array
  ) -> tuple[Tree, Tree]: ...


@dataclasses.dataclass(frozen=True)
class Protection:
  """The protection of tasks, as pure functions over a state of its own.

  Parameters are in two parts, as `split` returns them.

  Attributes:
    init: `shared -> state`, before any task.
    begin: `(state, shared, fresh, key) -> params`, the initial parameters of a task, made from
      `fresh` ones and from the shared filters after the earlier tasks.
    training: `(state, step) -> ` hooks of the generator's training in this step.
    finish: `(state, task, params, batch_stats, key) -> (state, own)`, for a task whose generator is
      trained.
    view: maps whole parameters to those that the generator runs with, in evaluation.
  """

  init: Callable[[Tree], Tree]
  begin: BeginTask
  training: Callable[[Tree, Array], wgan.GeneratorHooks]
  finish: FinishTask
  view: Callable[[Tree], Tree] = wgan.unchanged


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
  shared = _SharedGenerator(
    problem,
    generator,
    settings=settings,
    protection=protection,
    images=images,
    replayed=replayed,
    seed=seed,
  )
  return Rehearsal.of_methods(shared)


def trace_records(generator: Generator) -> Records:
  """Returns the records of one image, as shapes."""
  z = jax.ShapeDtypeStruct((1, generator.latent), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)

  def init(z, label):
    """Returns the generator's output and its fresh variables."""
    return generator.init_with_output(jax.random.key(0), z, label)

  # Abstract: only shapes are computed, so that it may be called in a traced step.
  (_, records), _ = jax.eval_shape(init, z, label)
  return records


def split(params: Tree, records: Records) -> shared_net.Parts:
  """Splits parameters into the filters that gates switch, and the rest.

  Args:
    params: of the generator.
    records: as `trace_records` returns them.
  """
  gated = gated_layers(records)
  # The last name of a path is the kernel or the bias, the rest is the layer.
  return shared_net.split(params, lambda path: path[:-1] in gated)


def slow_updates(updates: Tree, free: Tree) -> Tree:
  """Multiplies updates by how far each parameter may move.

  Args:
    updates: any tree.
    free: factors by the same paths; updates without one stay.
  """
  flat: dict[Path, Any] = traverse_util.flatten_dict(updates)
  factors: dict[Path, Any] = traverse_util.flatten_dict(free)
  # `free` may lack paths, so the trees cannot be mapped at once.
  for path, factor in factors.items():
    flat[path] = flat[path] * factor
  return traverse_util.unflatten_dict(flat)


class SharedGeneratorMemory(MemoryNode):
  """The memory of the rehearsal.

  Attributes:
    own: variables of every task, `[T, ...]`.
    protection: state of the protection.
    training: state of the current task's training, which also holds the shared filters.
  """

  own: Variables
  protection: Any
  training: wgan.WganState


@dataclasses.dataclass(frozen=True)
class _SharedGenerator:
  """The functions of the rehearsal."""

  problem: Problem
  generator: Generator
  settings: wgan.WganSettings
  protection: Protection
  images: int
  replayed: int
  seed: int

  def init(self, key: Array) -> SharedGeneratorMemory:
    """Initialises the memory for all tasks."""
    fresh = self._fresh(0)
    shared = self._split(fresh.average).shared
    protection = self.protection.init(shared)
    # Initial values for all tasks; each is replaced when its task ends.
    training = self._begin(fresh, protection, shared, task=0)
    own = Variables(self._split(training.average).own, training.batch_stats)
    return SharedGeneratorMemory(stack_tasks(own, self.problem.tasks), protection, training)

  def pretrain_step(
    self, memory: SharedGeneratorMemory, pixels: Array, labels: Array
  ) -> tuple[SharedGeneratorMemory, Mapping[str, Array]]:
    """Trains the generator for one step on `[N, H, W, D]` pixels and `[N]` labels."""
    state = memory.training
    step = wgan.make_wgan_step(
      self.generator,
      self._critic,
      self.settings,
      seed=self.seed,
      # The hooks depend on the step, as slope and penalty do.
      hooks=self.protection.training(memory.protection, state.step),
      axis_name=self.problem.axis_name,
    )
    training, metrics = step(state, pixels, labels)
    return memory.replace(training=training), metrics

  def replay(
    self, memory: SharedGeneratorMemory, batch: Batch, task: Array, key: Array
  ) -> ReplayedImages:
    """Generates images of all tasks so far for one training batch."""
    state = memory.training
    params = self._split(state.average)
    # The current task has no entry of its own until it ends.
    own = put_task(memory.own, task, Variables(params.own, state.batch_stats))

    def generate(own, z, labels):
      """Generates uint8 pixels `[N, H, W, D]` from latents and `[N]` labels."""
      variables = self._variables(params.shared, own)
      return wgan.to_pixels(self.generator.apply(variables, z, labels)[0])

    return replay_of_all(
      generate,
      own,
      self.problem,
      task=task,
      key=key,
      count=self.replayed,
      latent=self.generator.latent,
    )

  def recall(self, memory: SharedGeneratorMemory, data: TaskData, task: int, key: Array):
    """Generates pixels `[N, H, W, D]` and labels `[N]` of all tasks up to this one."""
    memory = self._with_ending(memory, task)
    shared = self._split(memory.training.average).shared

    def variables_of(task):
      """Returns the variables of one task's generator."""
      return self._variables(shared, task_entry(memory.own, task))

    return generate_tasks(self.generator, variables_of, tasks=task + 1, images=self.images, key=key)

  def keep(
    self, memory: SharedGeneratorMemory, data: TaskData, task: int, key: Array
  ) -> SharedGeneratorMemory:
    """Returns the memory with the ended task, and a fresh training state for the next."""
    memory = self._with_ending(memory, task)
    # Filters of ended tasks are protected: the current shared part serves all of them.
    shared = self._split(memory.training.average).shared
    # A fresh optimiser and critic for the next task; only the filters are passed on.
    fresh = self._fresh(task + 1)
    training = self._begin(fresh, memory.protection, shared, task=task + 1)
    return memory.replace(training=training)

  def megabytes(self, memory: SharedGeneratorMemory, learnt: int) -> float:
    """Returns the size, in 10**6 bytes, of the part needed after `learnt` tasks."""
    # The rest of the training state is needed only while a task is learnt.
    shared = self._split(memory.training.average).shared
    return tree_megabytes((shared, first_tasks(memory.own, learnt), memory.protection))

  @property
  def _critic(self) -> Critic:
    """Returns the critic, which is of the generator's width."""
    return Critic(width=self.generator.width, classes=self.generator.classes)

  def _split(self, params: Tree) -> shared_net.Parts:
    """Splits parameters into shared filters and the rest."""
    return split(params, trace_records(self.generator))

  def _variables(self, shared: Tree, own: Variables) -> Tree:
    """Returns the variables of one task's generator, in evaluation."""
    # The protection may hold gates in another form than the generator runs them with.
    params = self.protection.view(shared_net.merge(shared, own.params))
    return {"params": params, "batch_stats": own.batch_stats}

  def _key(self, task: int) -> Array:
    """Returns the key of a task's protection."""
    return jax.random.fold_in(jax.random.key(self.seed), task)

  def _fresh(self, task: int) -> wgan.WganState:
    """Initialises the training of a task."""
    # T seeds belong to the seed of a run: every task has its own.
    seed = self.seed * self.problem.tasks + task
    return wgan.init_state(self.generator, self._critic, self.settings, seed=seed)

  def _begin(
    self, fresh: wgan.WganState, protection: Tree, shared: Tree, *, task: int
  ) -> wgan.WganState:
    """Returns the state with which a task begins, from the shared filters after earlier tasks."""
    params = self.protection.begin(
      protection, shared, fresh=self._split(fresh.average), key=self._key(task)
    )
    params = shared_net.merge(params.shared, params.own)
    # A copy: a step donates its buffers, and none may be donated twice.
    return fresh.replace(generator=params, average=jax.tree.map(jnp.copy, params))

  def _with_ending(self, memory: SharedGeneratorMemory, task: int) -> SharedGeneratorMemory:
    """Returns the memory with the ending task among those that are kept."""
    state = memory.training
    protection, params = self.protection.finish(
      memory.protection,
      task,
      params=self._split(state.average),
      batch_stats=state.batch_stats,
      key=self._key(task),
    )
    # `finish` may close gates: its `params` are the own parameters to keep.
    own = put_task(memory.own, task, Variables(params, state.batch_stats))
    return memory.replace(own=own, protection=protection)
