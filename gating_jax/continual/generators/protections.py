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
from gating_jax.continual.methods import hat
from gating_jax.models.generator import Generator
from gating_jax.types import Array

# Latents per batch, and batches, that show which gates a task opens.
_PROBES, _PROBE_BATCHES = 250, 40
# Factor on HAT's updates of embeddings.
_EMBEDDING_RATE = 10.0
Tree = Any


def gated(
  generator: Generator, tasks: int, gates: units.ProtectionSettings
) -> shared_generator.Protection:
  """Makes the protection; the patience of `gates` is in steps.

  Its state: `frozen`, the mask of shared parameters as of `units.nothing_frozen`; `relevant` `[T,
  U]`.

  Args:
    generator: for all tasks.
    tasks: T.
    gates: how tasks are gated and protected.
  """
  records = shared_generator.records(generator)

  def init(shared):
    """Creates the state before any task: no filter is frozen."""
    return {
      "frozen": units.nothing_frozen(shared, records),
      "relevant": jnp.zeros((tasks, sum(r.gates.shape[-1] for r in records)), bool),
    }

  def begin(state, shared, fresh, key):
    """Returns a task's initial parameters: frozen filters, and fresh ones elsewhere."""
    return {**fresh, "shared": units.reinitialise_free(state["frozen"], shared, fresh["shared"])}

  def training(state, step):
    """Returns the keywords of a training step: masked updates and the gates' penalty."""
    # A generator does not grow: all units are available.
    available = np.ones(state["relevant"].shape[1], bool)
    # An empty tree slows nothing.
    free = jax.tree.map(jnp.logical_not, state["frozen"]) if gates.protect_updates else {}
    return {
      "update": lambda updates, params: shared_generator.slowed(updates, free),
      "records_loss": lambda records: gates.price(step) * units.open_share(records, available),
    }

  def finish(state, task, params, batch_stats, key):
    """Freezes the filters of relevant units and closes the other gates of the task."""
    variables = {
      "params": shared_net.merge(params["shared"], params["own"]),
      "batch_stats": batch_stats,
    }
    # On latents of its own, since a generator has no validation images.
    relevant = open_rates(generator, variables, key) > gates.threshold
    own = units.shut(params["own"], records, relevant) if gates.shut_gates else params["own"]
    return {
      "frozen": units.freeze(state["frozen"], records, relevant),
      "relevant": state["relevant"].at[task].set(relevant),
    }, own

  return shared_generator.Protection(init, begin, training, finish)


def open_rates(generator: Generator, variables: Tree, key: Array) -> np.ndarray:
  """Computes the fraction of latents for which each gate opens.

  Args:
    generator: for all tasks.
    variables: of one task.
    key: PRNG key of the latents, which are as many for each class, to within one.
  Returns:
    `[U]`.
  """
  counts = sum(
    np.asarray(_opened(generator, variables, jax.random.fold_in(key, i)))
    for i in range(_PROBE_BATCHES)
  )
  return counts / (_PROBES * _PROBE_BATCHES)


@functools.partial(jax.jit, static_argnums=0)
def _opened(generator: Generator, variables: Tree, key: Array) -> Array:
  labels = jnp.arange(_PROBES) % generator.classes
  _, records = generator.apply(variables, wgan.latents(key, _PROBES, generator.latent), labels)
  return jnp.sum(units.joined(records), axis=0)


def masked(
  generator: Generator, tasks: int, *, steps: int, steepness: float, sparsity: float
) -> shared_generator.Protection:
  """Makes the protection; its state is `masks` `[T, U]`, 0 for tasks to come.

  Args:
    generator: with gates that are sigmoids of parameters.
    tasks: T.
    steps: of the training on each task.
    steepness, sparsity: as in `hat.hat`.
  Raises:
    ValueError: a setting breaks its rule.
  """
  hat.check(steepness, sparsity)
  records = shared_generator.records(generator)

  def init(shared):
    """Creates the state before any task: masks `[T, U]` of 0."""
    return {"masks": jnp.zeros((tasks, sum(r.gates.shape[-1] for r in records)))}

  def begin(state, shared, fresh, key):
    """Returns a task's initial parameters: the shared filters and drawn embeddings."""
    return {"shared": shared, "own": hat.drawn(fresh["own"], key)}

  def training(state, step):
    """Returns the keywords of a training step, at this step's slope."""
    # The slope rises once, over all steps of the training.
    s = hat.slope(jnp.minimum(1, step / max(1, steps - 1)), steepness)
    # a^{<t}: the masks of later tasks are still 0.
    used = jnp.max(state["masks"], axis=0)

    def update(updates, params):
      """Limits the embeddings and scales shared updates by their plasticity."""
      # The limits apply after the factor on the updates.
      updates = hat.limited(hat.of_embeddings(lambda u: _EMBEDDING_RATE * u, updates), params)
      shared = shared_generator.split(updates, records)["shared"]
      return shared_generator.slowed(updates, hat.plasticity(shared, records, used, jnp.ones(())))

    return {
      "view": lambda params: hat.at_slope(params, s),
      "records_loss": lambda records: sparsity * hat.regulariser(hat.masks(records), used),
      "gradient": lambda grads, params: hat.compensated(grads, params, s, steepness),
      "update": update,
    }

  def finish(state, task, params, batch_stats, key):
    """Keeps the task's mask `[U]` at the largest slope."""
    mask = jax.nn.sigmoid(steepness * hat.embeddings(params["own"], records))
    return {"masks": state["masks"].at[task].set(mask)}, params["own"]

  return shared_generator.Protection(
    init, begin, training, finish, lambda params: hat.at_slope(params, steepness)
  )
