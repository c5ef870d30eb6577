"""The classifier of tasks: from the pooled features of all tasks' streams to the task an image belongs to.

    z = Dense_T(ReLU(Dense_64(concatenated features)))

It has rows and columns for all tasks from the start, of which those of tasks to come are left out: so it widens task by
task and keeps its weights. It is trained together with the task being learnt, whose stream it shapes, and when that is
over and no stream changes any more, by itself on their features.

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
  """How the classifier of tasks is rehearsed.

  Attributes:
    hidden: width of its hidden layer.
    steps, batch_size, learning_rate: of its training after each task, by Adam, on batches of all tasks in equal parts.
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
  """Parameters for T tasks of F features."""
  first, second = jax.random.split(key)
  he = jax.nn.initializers.he_normal()
  return {
    "hidden": {
      "kernel": he(first, (features, tasks * hidden))
      .reshape(features, tasks, hidden)
      .swapaxes(0, 1),
      "bias": jnp.zeros(hidden),
    },
    "out": {"kernel": he(second, (hidden, tasks)), "bias": jnp.zeros(tasks)},
  }


def scores(params: Any, features: Array) -> Array:
  """`[N, S, F]` features of the first S tasks to `[N, S]` logits."""
  seen, hidden, out = features.shape[1], params["hidden"], params["out"]
  h = jax.nn.relu(jnp.einsum("nsf,sfh->nh", features, hidden["kernel"][:seen]) + hidden["bias"])
  return h @ out["kernel"][:, :seen] + out["bias"][:seen]


def cross_entropy(params: Any, features: Array, tasks: Array, seen: Array) -> Array:
  """`[N]`, of `[N, T, F]` features, zeros for tasks not seen, and the `[N]` tasks of the images."""
  competing = jnp.arange(features.shape[1]) < seen
  return optax.softmax_cross_entropy_with_integer_labels(
    jnp.where(competing, scores(params, features), -jnp.inf), tasks
  )


def of_seen(updates: Any, seen: Array) -> Any:
  """Updates of what serves the first `seen` tasks; the rest waits as it was made, weight decay or not."""
  served = jnp.arange(updates["out"]["bias"].shape[0]) < seen
  return {
    "hidden": {
      **updates["hidden"],
      "kernel": jnp.where(served[:, None, None], updates["hidden"]["kernel"], 0),
    },
    "out": jax.tree.map(lambda u: jnp.where(served, u, 0), updates["out"]),
  }


def macs(seen: int, features: int, hidden: int) -> int:
  """Multiply-accumulates of one image."""
  return seen * features * hidden + hidden * seen


def train(
  params: Any, features: np.ndarray, tasks: np.ndarray, key: Array, settings: RouterSettings
) -> Any:
  """Cross-entropy over batches with as many images of every task.

  Args:
    features: `[M, S, F]` of images of every task seen.
    tasks: `[M]`, the task of each.
  """
  seen = features.shape[1]
  order = np.argsort(tasks, kind="stable")
  counts = np.bincount(tasks, minlength=seen)
  if seen == 1:
    return params
  if counts.min() == 0:
    raise ValueError(
      f"every task must have an image to rehearse; got {counts.tolist()} of each: keep more images"
    )
  return _train(params, features[order], counts, np.cumsum(counts) - counts, key, settings)


@jax.jit(static_argnums=5)
def _train(params, features, counts, firsts, key, settings):
  optimiser = optax.adam(settings.learning_rate)

  def step(state, key):
    params, opt_state = state
    which, where = jax.random.split(key)
    task = jax.random.randint(which, (settings.batch_size,), 0, len(counts))
    place = jax.random.uniform(where, (settings.batch_size,)) * counts[task]
    x = features[firsts[task] + jnp.minimum(place.astype(jnp.int32), counts[task] - 1)]
    loss = lambda p: jnp.mean(cross_entropy(p, x, task, len(counts)))
    updates, opt_state = optimiser.update(jax.grad(loss)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, _), _ = lax.scan(
    step, (params, optimiser.init(params)), jax.random.split(key, settings.steps)
  )
  return params
