"""The task classifier, from the pooled features of all tasks' streams to an image's task.

    z = Dense_T(ReLU(Dense_64(concatenated features)))

It has rows and columns for all tasks from the start; those of later tasks are left out. So it
widens task by task and keeps its weights. It is trained together with the current task, whose
stream it shapes. At the end of the task, when no stream changes any more, it is trained alone on
their features.

Axes: N or M images, T tasks, S <= T tasks seen, F features of a stream.
Reference: Abati et al., 2020, section 3.4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gating_jax.types import Array


@dataclasses.dataclass(frozen=True)
class RouterSettings:
  """Settings of the task classifier and its rehearsal.

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


def init(key: Array, tasks: int, features: int, hidden: int) -> dict[str, Any]:
  """Initialises the parameters.

  Args:
    key: PRNG key.
    tasks: T.
    features: F, of each stream.
    hidden: width of the hidden layer.
  """
  first, second = jax.random.split(key)
  he = jax.nn.initializers.he_normal()
  return {
    "hidden": {
      # Initialised for the fan-in of one stream, then cut into a block per task.
      "kernel": he(first, (features, tasks * hidden))
      .reshape(features, tasks, hidden)
      .swapaxes(0, 1),
      "bias": jnp.zeros(hidden),
    },
    "out": {"kernel": he(second, (hidden, tasks)), "bias": jnp.zeros(tasks)},
  }


def scores(params: Any, features: Array) -> Array:
  """Computes the task logits.

  Args:
    params: as of `init`.
    features: `[N, S, F]` of the first S tasks.
  Returns:
    `[N, S]`.
  """
  seen, hidden, out = features.shape[1], params["hidden"], params["out"]
  # z = Dense_T(ReLU(Dense_64(concatenated features))): a sum over tasks of blocks is a product with
  # the concatenation.
  h = jax.nn.relu(jnp.einsum("nsf,sfh->nh", features, hidden["kernel"][:seen]) + hidden["bias"])
  return h @ out["kernel"][:, :seen] + out["bias"][:seen]


def cross_entropy(params: Any, features: Array, tasks: Array, seen: Array) -> Array:
  """Computes the cross-entropies over the tasks seen.

  Args:
    params: as of `init`.
    features: `[N, T, F]`, zeros for tasks not seen.
    tasks: `[N]`, the task of each image.
    seen: number of tasks seen.
  Returns:
    `[N]`.
  """
  # Later tasks have logits too, from features of 0.
  competing = jnp.arange(features.shape[1]) < seen
  return optax.softmax_cross_entropy_with_integer_labels(
    jnp.where(competing, scores(params, features), -jnp.inf), tasks
  )


def of_seen(updates: Any, seen: Array) -> Any:
  """Zeroes the updates of weights that serve tasks not seen yet.

  These weights keep their initial values, with weight decay too.

  Args:
    updates: a tree like the parameters.
    seen: number of tasks seen.
  """
  served = jnp.arange(updates["out"]["bias"].shape[0]) < seen
  return {
    "hidden": {
      **updates["hidden"],
      "kernel": jnp.where(served[:, None, None], updates["hidden"]["kernel"], 0),
    },
    "out": jax.tree.map(lambda u: jnp.where(served, u, 0), updates["out"]),
  }


def macs(seen: int, features: int, hidden: int) -> int:
  """Counts the multiply-accumulates of one image.

  Args:
    seen: number of tasks seen.
    features: F, of each stream.
    hidden: width of the hidden layer.
  """
  return seen * features * hidden + hidden * seen


def train(
  params: Any, features: np.ndarray, tasks: np.ndarray, key: Array, settings: RouterSettings
) -> Any:
  """Trains on batches with all tasks in equal parts, by cross-entropy.

  Args:
    params: as of `init`.
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
  return _train(params, features[order], counts, np.cumsum(counts) - counts, key, settings)


@jax.jit(static_argnums=5)
def _train(params, features, counts, firsts, key, settings):
  # Separate from the steps of the task, hence an optimiser of its own.
  optimiser = optax.adam(settings.learning_rate)

  def step(state, key):
    """Takes one optimiser step on a random batch with all tasks in equal parts."""
    params, opt_state = state
    which, where = jax.random.split(key)
    task = jax.random.randint(which, (settings.batch_size,), 0, len(counts))
    # A task, then one of its images: tasks have equal parts however many images each has.
    place = jax.random.uniform(where, (settings.batch_size,)) * counts[task]
    # Rounding may bring u times count up to count itself.
    x = features[firsts[task] + jnp.minimum(place.astype(jnp.int32), counts[task] - 1)]
    loss = lambda p: jnp.mean(cross_entropy(p, x, task, len(counts)))
    updates, opt_state = optimiser.update(jax.grad(loss)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = lax.scan(
    step, (params, optimiser.init(params)), jax.random.split(key, settings.steps)
  )
  return params
