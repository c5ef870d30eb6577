"""HAT: hard attention to the task, a learnt mask over channels for every task.

    a^t = sigmoid(s e^t)                                              mask, e^t an embedding
    s   = 1/s_max + (s_max - 1/s_max) b                               b from 0 to 1 over an epoch
    a^{<=t} = max(a^{<=t-1}, a^t),  at s_max                          used by the tasks so far
    L   = cross-entropy + c sum a^t (1 - a^{<t}) / sum (1 - a^{<t})   over all units
    update of a weight between i and j: times 1 - min(a^{<t}_j, a^{<t}_i)
    gradient of e: times (s_max / s) (cosh(s e) + 1) / (cosh(e) + 1)  undoes the slope

In evaluation s is s_max. Convolutions are shared; each task has its own BatchNorm and head. The
running statistics of training are over all s, so they are computed again at s_max when a task ends.

Axes: N examples, T tasks, C classes of a task, U gated units of the network.
Reference: Serra et al., "Overcoming catastrophic forgetting with hard attention to the task", 2018.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.continual import shared_net
from gating_jax.continual.method import (
  Batch,
  Footprint,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Prediction,
  Problem,
  StepLoss,
  TaskData,
  Variables,
  first_tasks,
  put_task,
  stack_tasks,
  tree_megabytes,
  tree_size,
)
from gating_jax.continual.shared_net import NET, OWN, SHARED
from gating_jax.continual.units import count_units, layer_name, record_places
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.summary import ModelCounts
from gating_jax.types import Array, Path, Records, Tree

EMBEDDING_LIMIT = 6.0
# Limit of the compensation's cosh, as in the authors' code.
EXPONENT_LIMIT = 50.0
# 0.9^50 = 0.5 % of the old statistics is left.
_SETTLING_BATCHES = 50


def hat(
  model: nn.Module, problem: Problem, counts: ModelCounts, *, steepness: float, sparsity: float
) -> Method:
  """Makes the method.

  Args:
    model: maps images to `([N, F] features, records)`. Its gates are sigmoids of parameters; its
      records name their writers, and the readers whose inputs are those channels alone.
    problem: the learning problem.
    counts: of the model.
    steepness: s_max, >= 1.
    sparsity: c, >= 0.
  Raises:
    ValueError: a setting breaks its rule.
  """
  check_settings(steepness, sparsity)
  net = shared_net.SharedNet(model, problem)
  return _Hat(net, counts, steepness=steepness, sparsity=sparsity).method()


def check_settings(steepness: float, sparsity: float) -> None:
  """Raises ValueError unless `steepness` >= 1 and `sparsity` >= 0."""
  if not steepness >= 1:
    raise ValueError(f"steepness must be >= 1; got {steepness}")
  if not sparsity >= 0:
    raise ValueError(f"sparsity must be >= 0; got {sparsity}")


def slope(place: Array, steepness: float) -> Array:
  """Computes s, from 1/s_max at the first step of an epoch to s_max at the last.

  Args:
    place: position in the epoch, in [0, 1].
    steepness: s_max.

  >>> [float(slope(place, 4.0)) for place in (0.0, 0.5, 1.0)]
  [0.25, 2.125, 4.0]
  """
  return 1 / steepness + (steepness - 1 / steepness) * place


def compensation(e: Array, s: Array, steepness: float) -> Array:
  """Computes the factor on the gradient of e, elementwise.

      (s_max / s) (cosh(s e) + 1) / (cosh(e) + 1),   s e clipped at 50

  Args:
    e: embeddings.
    s: slope of the step.
    steepness: s_max.

  >>> print(compensation(0.0, 2.0, 400.0))
  200.0
  """
  exponent = jnp.clip(s * e, -EXPONENT_LIMIT, EXPONENT_LIMIT)
  return steepness / s * (jnp.cosh(exponent) + 1) / (jnp.cosh(e) + 1)


def regulariser(masks: Array, used: Array) -> Array:
  """Computes `sum a (1 - a^{<t}) / sum (1 - a^{<t})`, over all units.

  This is the fraction that a task takes of the units left.

  Args:
    masks: `[U]`, a of the task.
    used: `[U]`, a^{<t}.
  Returns:
    a scalar.

  >>> print(regulariser(jnp.array([1.0, 0.5, 0.0]), jnp.array([1.0, 0.0, 0.0])))
  0.25
  """
  left = 1 - used
  # Without any unit left the numerator is 0, and so is the result.
  return jnp.sum(masks * left) / jnp.maximum(jnp.sum(left), jnp.finfo(left.dtype).tiny)


def plasticity(shared: Tree, records: Records, used: Array, started: Array) -> Tree:
  """Computes how far each shared parameter may move, `1 - min(a_out, a_in)`.

  Args:
    shared: parameters of convolutions.
    records: the gates' writers and readers.
    used: `[U]`, a^{<t}.
    started: 1 after the first task, else 0: the use of parameters that no mask switches.
  Returns:
    a tree of factors that broadcast over the parameters.
  """
  out, into = {}, {}
  # A record's units are the outputs of its writers, and the inputs of its readers.
  for record, place in record_places(records):
    out |= dict.fromkeys(record.writers, used[place])
    into |= dict.fromkeys(record.readers, used[place])

  def free(path, _):
    """Returns the factors of one parameter, which broadcast over it."""
    a_out = out.get(path[:-1], started)
    if path[-1] == "kernel":
      # Inputs that no mask switches are in full use.
      a_in = into.get(path[:-1], jnp.ones(()))
      # The last two axes of a kernel are its inputs and outputs.
      return 1 - jnp.minimum(a_out, a_in[..., None])
    return 1 - a_out

  return traverse_util.path_aware_map(free, shared)


def change_embeddings(change: Callable[..., Array], tree: Tree, *others: Tree) -> Tree:
  """Changes the embeddings of a tree, and nothing else.

  Args:
    change: of an embedding and of the arrays at the same path in `others`.
    tree, others: trees with the same paths.
  """
  flat: dict[Path, Any] = traverse_util.flatten_dict(tree)
  flat_others: list[dict[Path, Any]] = [traverse_util.flatten_dict(other) for other in others]
  for path, leaf in flat.items():
    if is_gate_path(path):
      flat[path] = change(leaf, *[other[path] for other in flat_others])
  return traverse_util.unflatten_dict(flat)


def draw_embeddings(params: Tree, key: Array) -> Tree:
  """Draws embeddings from a standard normal distribution."""
  # A key per parameter, whether it is an embedding or not: as many as any tree may need.
  keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
  return change_embeddings(lambda e: jax.random.normal(next(keys), e.shape), params)


def compensate_gradients(grads: Tree, params: Tree, *, s: Array, steepness: float) -> Tree:
  """Multiplies the gradients of embeddings by `compensation`, which undoes the slope.

  Args:
    grads, params: trees with the same paths.
    s: slope of the step.
    steepness: s_max.
  """

  def compensate(grad, e):
    """Multiplies the gradient of one embedding."""
    return grad * compensation(e, s, steepness)

  return change_embeddings(compensate, grads, params)


def limit_embeddings(updates: Tree, params: Tree) -> Tree:
  """Changes updates to keep every embedding within its limits."""

  def limit(update, e):
    """Returns the update that ends within the limits."""
    return jnp.clip(e + update, -EMBEDDING_LIMIT, EMBEDDING_LIMIT) - e

  return change_embeddings(limit, updates, params)


def join_embeddings(params: Tree, records: Records) -> Array:
  """Returns the `[U]` embeddings of a task.

  Args:
    params: of the network, with the task's gates.
    records: of the network.
  """
  flat: dict[Path, Any] = traverse_util.flatten_dict(params)
  # One gate module may decide for several records; its embeddings count once.
  gates = dict.fromkeys(record.gate for record in records)
  return jnp.concatenate([flat[*gate, "logits"] for gate in gates])


def at_slope(params: Tree, s: Array | float) -> Tree:
  """Multiplies the embeddings by s: the network then makes the masks `sigmoid(s e)`."""
  return change_embeddings(lambda e: s * e, params)


def join_masks(records: Records) -> Array:
  """Returns the `[U]` masks, which are the same for all examples."""
  return jnp.concatenate([record.gates[0] for record in records])


class HatMemory(MemoryNode):
  """The memory of the method.

  Attributes:
    own: embeddings, BatchNorm and head of every task, `[T, ...]`.
    used: `[U]`, the cumulative mask a^{<=t}.
  """

  own: Variables
  used: Array


@dataclasses.dataclass(frozen=True)
class _Hat:
  """The functions of the method, over `SharedNet`'s parameters and statistics and a `HatMemory`."""

  net: shared_net.SharedNet
  counts: ModelCounts
  steepness: float
  sparsity: float

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.predict,
      gradient=self.gradient,
      update=self.update,
      footprint=self.footprint,
    )

  @property
  def records(self) -> Records:
    """Returns the records of the network, as shapes."""
    return self.net.shapes[0]

  def init(self, key: Array) -> InitialState:
    """Initialises parameters and statistics, and a cumulative mask `[U]` of 0."""
    params, batch_stats = self._fresh(key)
    own = stack_tasks(shared_net.own_part(params, batch_stats), self.net.problem.tasks)
    return InitialState(params, batch_stats, HatMemory(own, jnp.zeros(count_units(self.records))))

  def loss(self, params: Tree, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the cross-entropy plus the regulariser, at this step's slope."""
    s = slope(jnp.asarray(batch.place), self.steepness)
    # The gates are sigmoids of their embeddings: s e in place of e makes the masks of this step.
    forward = self.net.apply(at_slope(params, s), learner.batch_stats, batch.x, train=True)
    terms = shared_net.head_terms(
      forward.logits, batch.labels, task=learner.task, problem=self.net.problem
    )
    terms["sparsity"] = regulariser(join_masks(forward.records), learner.memory.used)
    total = terms["cross_entropy"] + self.sparsity * terms["sparsity"]
    return total, (terms, forward.batch_stats)

  def gradient(self, grads: Tree, learner: LearnerState, batch: Batch) -> Tree:
    """Compensates the gradients of embeddings for the slope."""
    s = slope(jnp.asarray(batch.place), self.steepness)
    return compensate_gradients(grads, learner.params, s=s, steepness=self.steepness)

  def update(self, updates: Tree, grads: Tree, learner: LearnerState) -> tuple[Tree, HatMemory]:
    """Scales shared updates by their plasticity and limits the embeddings."""
    # The update, not the gradient: momentum and weight decay would still move used weights.
    free = plasticity(
      updates[SHARED],
      self.records,
      used=learner.memory.used,
      started=jnp.float32(learner.task > 0),
    )
    updates = {**updates, SHARED: jax.tree.map(jnp.multiply, updates[SHARED], free)}
    return limit_embeddings(updates, learner.params), learner.memory

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Stores the task's own part and adds its mask to the cumulative one."""
    fresh_key, settle_key = jax.random.split(key)
    # Before the task's part is stored: evaluation normalises by these statistics.
    batch_stats = self._settled(learner, data.pixels, settle_key)
    own = shared_net.own_part(learner.params, batch_stats)
    # At s_max, as in evaluation.
    mask = jax.jit(self._mask_at_rest)(learner.params, batch_stats)
    fresh, fresh_stats = self._fresh(fresh_key)
    memory = HatMemory(
      own=put_task(learner.memory.own, int(learner.task), own),
      # a^{<=t} = max(a^{<=t-1}, a^t)
      used=jnp.maximum(learner.memory.used, mask),
    )
    return learner.replace(
      params={**learner.params, OWN: fresh[OWN]},
      memory=memory,
      batch_stats={**batch_stats, OWN: fresh_stats[OWN]},
    )

  def predict(self, learner: LearnerState, x: Array, task: Array, seen: int) -> Prediction:
    """Predicts the classes of `[N, H, W, D]` images at the largest slope."""
    own = first_tasks(learner.memory.own, seen)
    # Embeddings are kept without the slope, which belongs to the pass.
    own = own.replace(params=at_slope(own.params, self.steepness))
    forward = self.net.run_tasks(learner, own, x)
    macs = shared_net.forward_macs(forward, self.counts, self.net.problem.classes)
    return shared_net.prediction(
      self.net.problem, forward.logits, task=task, macs=macs, agnostic_macs=macs.sum(0)
    )

  def footprint(self, learner: LearnerState) -> Footprint:
    """Measures the storage of the tasks learnt so far, and the units they use."""
    kept = learner.memory.own.params
    # All tasks learnt are in `kept`; the part for the next one does not count.
    learnt = first_tasks(kept, int(learner.task))
    # At s_max a unit is in use where its embedding is positive.
    used = jax.vmap(lambda net: join_embeddings(net, self.records))(kept[NET]) > 0
    relevant = {}
    for record, place in record_places(self.records):
      relevant[layer_name(record)] = np.asarray(used[:, place])
    return Footprint(
      params=tree_size((learner.params[SHARED], learnt)),
      memory_mb=tree_megabytes(learner.memory.used),
      relevant=relevant,
    )

  def _fresh(self, key: Array) -> tuple[Tree, Tree]:
    """Initialises parameters and statistics, with drawn embeddings."""
    params, batch_stats = self.net.fresh(key)
    return draw_embeddings(params, jax.random.fold_in(key, 0)), batch_stats

  def _mask_at_rest(self, params: Tree, batch_stats: Tree) -> Array:
    """Returns the `[U]` mask of the current task at s_max."""
    x = jnp.zeros((1, *self.net.problem.shape))
    return join_masks(self.net.apply(at_slope(params, self.steepness), batch_stats, x).records)

  def _settled(self, learner: LearnerState, pixels: Array, key: Array) -> Tree:
    """Computes the running statistics at s_max."""
    # Outside of the mapped step there is no device axis.
    net = dataclasses.replace(self.net, model=self.net.model.clone(axis_name=None))
    params = at_slope(learner.params, self.steepness)

    @jax.jit
    def step(batch_stats, pixels):
      """Returns the running statistics after one batch of `[N, H, W, D]` pixels."""
      return net.apply(params, batch_stats, net.problem.normalise(pixels), train=True).batch_stats

    # Batches of one size: one program.
    size = min(len(pixels), net.problem.batch_size)
    chosen = jax.random.choice(key, len(pixels), (_SETTLING_BATCHES, size))
    batch_stats, on_host = learner.batch_stats, np.asarray(pixels)
    for of_batch in np.asarray(chosen):
      batch_stats = step(batch_stats, on_host[of_batch])
    return batch_stats
