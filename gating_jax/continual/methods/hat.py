"""HAT: hard attention to the task, a learnt mask over channels for every task.

    a^t = sigmoid(s e^t)                                                                     mask, e^t an embedding
    s   = 1/s_max + (s_max - 1/s_max) b,  b from 0 to 1 over the steps of an epoch; s_max in evaluation
    a^{<=t} = max(a^{<=t-1}, a^t),  at s_max                                                 what tasks so far use
    L   = cross-entropy + c sum a^t (1 - a^{<t}) / sum (1 - a^{<t})                          over all units
    update of a weight between i and j: times 1 - min(a^{<t}_j, a^{<t}_i)
    gradient of e: times (s_max / s) (cosh(s e) + 1) / (cosh(e) + 1)                         undoes the slope

Convolutions are shared; BatchNorm and head every task has for itself. The running statistics of training are over all
s, so they are taken anew at s_max when a task ends.

Axes: N examples, T tasks, C classes of a task, U gated units of the network.
Reference: Serra et al., "Overcoming catastrophic forgetting with hard attention to the task", 2018.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.continual import shared_net
from gating_jax.continual.method import (
  Batch,
  Holdings,
  Learner,
  Method,
  Prediction,
  Problem,
  Start,
  TaskData,
  tree_megabytes,
  tree_size,
)
from gating_jax.continual.units import by_record, layer_name
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.summary import ModelCounts
from gating_jax.types import Array, Records

EMBEDDING_LIMIT = 6.0
EXPONENT_LIMIT = 50.0  # of the compensation's cosh, as in the authors' code
_SETTLING_BATCHES = 50  # 0.9^50 = 0.5 % is left of the statistics before
Tree = Any


def hat(
  model: nn.Module, problem: Problem, counts: ModelCounts, *, steepness: float, sparsity: float
) -> Method:
  """The method.

  Args:
    model: from images to `([N, F] features, records)`, its gates the sigmoids of parameters, its records naming their
      writers, and the readers whose inputs are those channels alone.
    problem: what it learns.
    counts: of the model.
    steepness: s_max.
    sparsity: c.
  """
  check(steepness, sparsity)
  return _Hat(shared_net.SharedNet(model, problem), counts, steepness, sparsity).method()


def check(steepness: float, sparsity: float) -> None:
  """Raises ValueError for settings that cannot be."""
  if not steepness >= 1:
    raise ValueError(f"steepness must be >= 1; got {steepness}")
  if not sparsity >= 0:
    raise ValueError(f"sparsity must be >= 0; got {sparsity}")


def slope(place: Array, steepness: float) -> Array:
  """s at a place in an epoch, from 1/s_max at its first step to s_max at its last.

  >>> [float(slope(place, 4.0)) for place in (0.0, 0.5, 1.0)]
  [0.25, 2.125, 4.0]
  """
  return 1 / steepness + (steepness - 1 / steepness) * place


def compensation(e: Array, s: Array, steepness: float) -> Array:
  """`(s_max / s) (cosh(s e) + 1) / (cosh(e) + 1)`, elementwise, `s e` clipped at 50: what the gradient of e is times.

  >>> print(compensation(0.0, 2.0, 400.0))
  200.0
  """
  exponent = jnp.clip(s * e, -EXPONENT_LIMIT, EXPONENT_LIMIT)
  return steepness / s * (jnp.cosh(exponent) + 1) / (jnp.cosh(e) + 1)


def regulariser(masks: Array, used: Array) -> Array:
  """`sum a (1 - a^{<t}) / sum (1 - a^{<t})` of `[U]` masks: the share that a task takes of what is left.

  >>> print(regulariser(jnp.array([1.0, 0.5, 0.0]), jnp.array([1.0, 0.0, 0.0])))
  0.25
  """
  left = 1 - used
  return jnp.sum(masks * left) / jnp.maximum(jnp.sum(left), jnp.finfo(left.dtype).tiny)


def plasticity(shared: Tree, records: Records, used: Array, started: Array) -> Tree:
  """How far each shared parameter may move: `1 - min(a_out, a_in)`, in shapes that broadcast over it.

  Args:
    shared: parameters of convolutions.
    records: the gates' writers and readers.
    used: `[U]`, a^{<t}.
    started: 1 where there is a task before, else 0: so much do tasks use what no mask switches.
  """
  out, into = {}, {}
  for record, units in zip(records, by_record(used, records), strict=True):
    out |= dict.fromkeys(record.writers, units)
    into |= dict.fromkeys(record.readers, units)

  def free(path, leaf):
    a_out = out.get(path[:-1], started)
    if path[-1] == "kernel":
      a_in = into.get(path[:-1], jnp.ones(()))
      return 1 - jnp.minimum(a_out, a_in[..., None])
    return 1 - a_out

  flat = traverse_util.flatten_dict(shared)
  return traverse_util.unflatten_dict({path: free(path, leaf) for path, leaf in flat.items()})


def of_embeddings(change: Callable[..., Array], tree: Tree, *others: Tree) -> Tree:
  """`tree` with `change` made to each embedding, and to the arrays of the same place in `others`."""
  flat, *others = (traverse_util.flatten_dict(t) for t in (tree, *others))
  return traverse_util.unflatten_dict(
    {
      path: change(leaf, *(other[path] for other in others)) if is_gate_path(path) else leaf
      for path, leaf in flat.items()
    }
  )


def drawn(params: Tree, key: Array) -> Tree:
  """Parameters with embeddings that are standard normal."""
  keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
  return of_embeddings(lambda e: jax.random.normal(next(keys), e.shape), params)


def compensated(grads: Tree, params: Tree, s: Array, steepness: float) -> Tree:
  """Gradients with those of embeddings freed of the slope."""
  return of_embeddings(lambda grad, e: grad * compensation(e, s, steepness), grads, params)


def limited(updates: Tree, params: Tree) -> Tree:
  """Updates that leave every embedding within its limits."""
  return of_embeddings(
    lambda u, e: jnp.clip(e + u, -EMBEDDING_LIMIT, EMBEDDING_LIMIT) - e, updates, params
  )


def embeddings(params: Tree, records: Records) -> Array:
  """`[U]`, a task's."""
  flat = traverse_util.flatten_dict(params)
  return jnp.concatenate([flat[*gate, "logits"] for gate in dict.fromkeys(r.gate for r in records)])


def at_slope(params: Tree, s: Array | float) -> Tree:
  """Parameters of which the network makes the masks `sigmoid(s e)`."""
  return of_embeddings(lambda e: s * e, params)


def masks(records: Records) -> Array:
  """`[U]`; they are the same for all examples."""
  return jnp.concatenate([r.gates[0] for r in records])


@dataclasses.dataclass(frozen=True)
class _Hat:
  """The functions of the method, over the parameters and statistics of `SharedNet`.

  Memory: `own`, every task's embeddings, BatchNorm and head, `[T, ...]`; `used` `[U]`, the cumulative mask.
  """

  net: shared_net.SharedNet
  counts: ModelCounts
  steepness: float
  sparsity: float

  def method(self) -> Method:
    return Method(
      self.init, self.loss, self.end_task, self.predict, self.gradient, self.update, self.holdings
    )

  def init(self, key: Array) -> Start:
    params, batch_stats = self._fresh(key)
    records, _ = self.net.shapes
    own = {"params": params["own"], "batch_stats": batch_stats["own"]}
    return Start(
      params,
      batch_stats,
      {
        "own": shared_net.stack(own, self.net.problem.tasks),
        "used": jnp.zeros(sum(r.gates.shape[-1] for r in records)),
      },
    )

  def loss(
    self, params: Tree, learner: Learner, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Tree]]:
    s = slope(batch.place, self.steepness)
    logits, _, records, batch_stats = self.net.apply(
      at_slope(params, s), learner.batch_stats, batch.x, train=True
    )
    terms = shared_net.head_terms(logits, batch.labels, learner.task, self.net.problem)
    taken = regulariser(masks(records), learner.memory["used"])
    return terms["cross_entropy"] + self.sparsity * taken, (
      {**terms, "sparsity": taken},
      batch_stats,
    )

  def gradient(self, grads: Tree, learner: Learner, batch: Batch) -> Tree:
    s = slope(batch.place, self.steepness)
    return compensated(grads, learner.params, s, self.steepness)

  def update(self, updates: Tree, grads: Tree, learner: Learner) -> tuple[Tree, Tree]:
    # Not the gradient: momentum of the steps before, and weight decay, would move what it no longer moves.
    free = plasticity(
      updates["shared"], self.net.shapes[0], learner.memory["used"], jnp.float32(learner.task > 0)
    )
    updates = {**updates, "shared": jax.tree.map(jnp.multiply, updates["shared"], free)}
    return limited(updates, learner.params), learner.memory

  def end_task(self, learner: Learner, data: TaskData, key: Array) -> Learner:
    fresh_key, settle_key = jax.random.split(key)
    batch_stats = self._settled(learner, data.pixels, settle_key)
    own = {"params": learner.params["own"], "batch_stats": batch_stats["own"]}
    masks = jax.jit(self._masks_at_rest)(learner.params, batch_stats)
    fresh, fresh_stats = self._fresh(fresh_key)
    memory = {
      "own": shared_net.put(learner.memory["own"], int(learner.task), own),
      "used": jnp.maximum(learner.memory["used"], masks),
    }
    return learner.replace(
      params={**learner.params, "own": fresh["own"]},
      memory=memory,
      batch_stats={**batch_stats, "own": fresh_stats["own"]},
    )

  def predict(self, learner: Learner, x: Array, task: Array, seen: int) -> Prediction:
    own = jax.tree.map(lambda tree: tree[:seen], learner.memory["own"])
    own["params"] = at_slope(own["params"], self.steepness)
    stream = self.net.side_by_side(learner.params, learner.batch_stats, own, x)
    macs = shared_net.macs(stream, self.counts, self.net.problem.classes)
    return shared_net.prediction(self.net.problem, stream.logits, task, macs, macs.sum(0))

  def holdings(self, learner: Learner) -> Holdings:
    learnt, records = int(learner.task), self.net.shapes[0]
    own = jax.tree.map(lambda x: x[:learnt], learner.memory["own"]["params"])
    masks = (
      jax.vmap(lambda own: embeddings(own["net"], records))(learner.memory["own"]["params"]) > 0
    )
    return Holdings(
      tree_size((learner.params["shared"], own)),
      tree_megabytes(learner.memory["used"]),
      dict(zip(map(layer_name, records), map(np.asarray, by_record(masks, records)), strict=True)),
    )

  def _fresh(self, key: Array) -> tuple[Tree, Tree]:
    params, batch_stats = self.net.fresh(key)
    return drawn(params, jax.random.fold_in(key, 0)), batch_stats

  def _masks_at_rest(self, params: Tree, batch_stats: Tree) -> Array:
    x = jnp.zeros((1, *self.net.problem.shape))
    return masks(self.net.apply(at_slope(params, self.steepness), batch_stats, x).records)

  def _settled(self, learner: Learner, pixels: Array, key: Array) -> Tree:
    """The running statistics at s_max."""
    net = dataclasses.replace(self.net, model=self.net.model.clone(axis_name=None))
    params, size = (
      at_slope(learner.params, self.steepness),
      min(len(pixels), net.problem.batch_size),
    )

    @jax.jit
    def step(batch_stats, pixels):
      return net.apply(params, batch_stats, net.problem.normalise(pixels), train=True).batch_stats

    batch_stats = learner.batch_stats
    for places in np.asarray(jax.random.choice(key, len(pixels), (_SETTLING_BATCHES, size))):
      batch_stats = step(batch_stats, np.asarray(pixels)[places])
    return batch_stats
