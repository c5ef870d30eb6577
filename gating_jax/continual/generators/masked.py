"""HAT in a generator of images, with a learnt mask over channels for every task.

The equations are those of `hat`, with two differences. The slope s rises once, over all steps of a
task's training. Since Adam moves a parameter by about its learning rate whatever the gradient,
embeddings move ten times as far.

Axes: T tasks, U gated units of the generator.
Reference: Ostapenko et al., "Learning to remember: a synaptic plasticity driven framework for
continual learning", CVPR 2019.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gating_jax.continual.generators import shared as shared_generator
from gating_jax.continual.methods import hat
from gating_jax.models.generator import Generator

_EMBEDDING_RATE = 10.0


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
