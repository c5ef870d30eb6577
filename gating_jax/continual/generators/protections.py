"""Protections of earlier tasks in a generator of images: frozen filters, or HAT's masks.

`gated`: task-gated networks, with gates per task and no forgetting. After a task a unit is relevant
if its gate opens often enough, over many fresh latents. The gates of the other units are closed
permanently. The filters of relevant units are frozen, by masking their updates; all other filters
are initialised again. Then the images of the task are the same, bit for bit, whatever is learnt
later. A task may use the filters of earlier tasks; where a layer has no free filter left it uses
only these.

`masked`: HAT, with a learnt mask over channels for every task. The equations are those of
`methods.hat`, with two differences. The slope s rises once, over all steps of a task's training.
Since Adam moves a parameter by about its learning rate whatever the gradient, embeddings move ten
times as far.

Axes: T tasks, U gated units of the generator.
Reference: Abati et al., 2020, section 3.2, of classifiers; Ostapenko et al., "Learning to remember:
a synaptic plasticity driven framework for continual learning", CVPR 2019.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.continual import shared_net, units
from gating_jax.continual.generators import shared as shared_generator
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import MemoryNode
from gating_jax.continual.methods import hat
from gating_jax.models.generator import Generator
from gating_jax.types import Array, Tree

# Latents per batch, and batches, that show which gates a task opens.
_PROBES, _PROBE_BATCHES = 250, 40
# Factor on HAT's updates of embeddings.
_EMBEDDING_RATE = 10.0


class FrozenFilters(MemoryNode):
  """The state of `gated`.

  Attributes:
    frozen: mask of the shared parameters, as `units.nothing_frozen` makes it.
    relevant: `[T, U]` bool, the units that each task needs.
  """

  frozen: Tree
  relevant: Array


def gated(
  generator: Generator, tasks: int, gates: units.ProtectionSettings
) -> shared_generator.Protection:
  """Makes the protection by frozen filters; the patience of `gates` is in steps.

  Args:
    generator: for all tasks.
    tasks: T.
    gates: how tasks are gated and protected.
  """
  records = shared_generator.trace_records(generator)

  def init(shared):
    """Creates the state before any task: no filter is frozen."""
    relevant = jnp.zeros((tasks, units.count_units(records)), bool)
    return FrozenFilters(units.nothing_frozen(shared, records), relevant)

  def begin(state, shared, fresh, key):
    """Returns a task's initial parameters: frozen filters, and fresh ones elsewhere."""
    return fresh._replace(shared=units.reinitialise_free(state.frozen, shared, fresh.shared))

  def training(state, step):
    """Returns the hooks of a training step: masked updates and the gates' penalty."""
    # A generator does not grow: all units are available.
    available = np.ones(state.relevant.shape[1], bool)
    # An empty tree slows nothing.
    free = jax.tree.map(jnp.logical_not, state.frozen) if gates.protect_updates else {}

    def penalty(records):
      """Returns the weighted fraction of open gates."""
      return gates.sparsity_weight(step) * units.open_share(records, available)

    def mask(updates, params):
      """Zeroes the updates of frozen filters."""
      return shared_generator.slow_updates(updates, free)

    return wgan.GeneratorHooks(records_loss=penalty, update=mask)

  def finish(state, task, params, batch_stats, key):
    """Freezes the filters of relevant units and closes the other gates of the task."""
    own = params.own
    variables = {"params": shared_net.merge(params.shared, own), "batch_stats": batch_stats}
    # On latents of its own, since a generator has no validation images.
    relevant = open_rates(generator, variables, key) > gates.threshold
    if gates.shut_gates:
      own = units.close_gates(own, records, relevant)
    state = FrozenFilters(
      frozen=units.freeze(state.frozen, records, relevant),
      relevant=state.relevant.at[task].set(relevant),
    )
    return state, own

  return shared_generator.Protection(init, begin, training=training, finish=finish)


def open_rates(generator: Generator, variables: Tree, key: Array) -> np.ndarray:
  """Computes the fraction of latents for which each gate opens.

  Args:
    generator: for all tasks.
    variables: of one task.
    key: PRNG key of the latents, which are as many for each class, to within one.
  Returns:
    `[U]`.
  """
  # Batch by batch, in memory for one batch.
  counts = np.zeros(units.count_units(shared_generator.trace_records(generator)), np.float32)
  for i in range(_PROBE_BATCHES):
    counts += np.asarray(_count_opened(generator, variables, jax.random.fold_in(key, i)))
  return counts / (_PROBES * _PROBE_BATCHES)


@functools.partial(jax.jit, static_argnums=0)
def _count_opened(generator: Generator, variables: Tree, key: Array) -> Array:
  """Counts the latents of a batch for which each gate opens, `[U]`."""
  # The classes in turn: each has an equal part in the rates.
  labels = jnp.arange(_PROBES) % generator.classes
  z = wgan.draw_latents(key, _PROBES, generator.latent)
  outputs: Any = generator.apply(variables, z, labels)
  _, records = outputs
  return jnp.sum(units.join_gates(records), axis=0)


class UsedUnits(MemoryNode):
  """The state of `masked`.

  Attributes:
    masks: `[T, U]`, those of the tasks learnt; 0 for tasks to come.
  """

  masks: Array


def masked(
  generator: Generator, tasks: int, *, steps: int, steepness: float, sparsity: float
) -> shared_generator.Protection:
  """Makes the protection by masks.

  Args:
    generator: with gates that are sigmoids of parameters.
    tasks: T.
    steps: of the training on each task.
    steepness, sparsity: as in `hat.hat`.
  Raises:
    ValueError: a setting breaks its rule.
  """
  hat.check_settings(steepness, sparsity)
  records = shared_generator.trace_records(generator)

  def init(shared):
    """Creates the state before any task: masks `[T, U]` of 0."""
    return UsedUnits(jnp.zeros((tasks, units.count_units(records))))

  def begin(state, shared, fresh, key):
    """Returns a task's initial parameters: the shared filters and drawn embeddings."""
    return shared_net.Parts(shared, hat.draw_embeddings(fresh.own, key))

  def training(state, step):
    """Returns the hooks of a training step, at this step's slope."""
    # The slope rises once, over all steps of the training.
    s = hat.slope(jnp.minimum(1, step / max(1, steps - 1)), steepness)
    # a^{<t}: the masks of later tasks are still 0.
    used = jnp.max(state.masks, axis=0)

    def view(params):
      """Returns the parameters with which the generator makes the masks of this slope."""
      return hat.at_slope(params, s)

    def penalty(records):
      """Returns the weighted regulariser of the masks."""
      return sparsity * hat.regulariser(hat.join_masks(records), used)

    def gradient(grads, params):
      """Compensates the gradients of embeddings for the slope."""
      return hat.compensate_gradients(grads, params, s=s, steepness=steepness)

    def update(updates, params):
      """Limits the embeddings and scales shared updates by their plasticity."""
      # The limits apply after the factor on the updates.
      updates = hat.limit_embeddings(
        hat.change_embeddings(lambda u: _EMBEDDING_RATE * u, updates), params
      )
      shared = shared_generator.split(updates, records).shared
      free = hat.plasticity(shared, records, used=used, started=jnp.ones(()))
      return shared_generator.slow_updates(updates, free)

    return wgan.GeneratorHooks(view=view, records_loss=penalty, gradient=gradient, update=update)

  def finish(state, task, params, batch_stats, key):
    """Keeps the task's mask `[U]` at the largest slope."""
    # a^t = sigmoid(s_max e^t): the mask that the task keeps is almost binary.
    mask = jax.nn.sigmoid(steepness * hat.join_embeddings(params.own, records))
    return UsedUnits(state.masks.at[task].set(mask)), params.own

  def view(params):
    """Returns the parameters with which the generator makes the masks of the largest slope."""
    return hat.at_slope(params, steepness)

  return shared_generator.Protection(
    init=init, begin=begin, training=training, finish=finish, view=view
  )
