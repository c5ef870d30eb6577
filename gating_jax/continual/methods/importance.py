"""Methods that hold the parameters that mattered to earlier tasks: EWC, online EWC and SI.

The loss has a penalty on the squared distance to earlier parameters, the anchors, with one weight
per parameter: its importance.

Elastic weight consolidation: importance for the predictions of earlier tasks.

    ewc          total = cross-entropy + lambda/2 sum_(s < t) sum_i F_si (theta_i - theta*_si)^2
    online_ewc   total = cross-entropy + lambda/2 sum_i F_i (theta_i - theta*_i)^2,
                 F <- gamma F + F_t after task t

theta*_t are the parameters at the end of task t (online: of the last one), and F_t the diagonal of
its Fisher matrix,

    F_ti = mean_n (d log p(y_n | x_n) / d theta_i)^2,

a mean over examples, in evaluation, among the classes of the task: the heads of other tasks are
left out.

The y_n are drawn from the network's own p(y | x_n): this makes F the Fisher matrix. With the true
labels, as in much code, F is of second order in the uncertainty of the network and nearly 0 where
the task is learnt.

The penalty is stiff: a step diverges if learning rate x lambda x F_i exceeds 2 (1 + momentum).
Where gradients are clipped, it oscillates around the anchor instead, and the network learns little.

Synaptic intelligence: importance from each parameter's path through earlier tasks.

    total    = cross-entropy + c sum_i Omega_i (theta_i - theta*_i)^2, without 1/2
    omega_i <- omega_i - g_i dtheta_i                                        at every step
    Omega_i <- Omega_i + max(omega_i, 0) / ((theta_i - theta*_i)^2 + xi),
    omega_i <- 0                                                             after every task

The importance is each parameter's part in the decrease of the loss along its path. g is the
gradient of the cross-entropy alone, dtheta the whole step of the optimiser, and theta* the
parameters at the end of the last task; for small steps sum_i omega_i is the decrease of the
cross-entropy. A parameter whose path increased the loss counts as unimportant for that task.

Axes: N examples, T tasks.
Reference: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017,
equation 3; Schwarz et al., "Progress & compress", 2018, section 4 (online EWC); Zenke, Poole and
Ganguli, "Continual learning through synaptic intelligence", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gating_jax.continual.method import (
  Batch,
  InitialState,
  LearnerState,
  MemoryNode,
  Method,
  Network,
  StepLoss,
  TaskData,
  put_task,
)
from gating_jax.types import Array


def ewc(network: Network, *, strength: float, examples: int) -> Method:
  """Makes EWC with one Fisher diagonal and one anchor per task.

  Args:
    network: to train.
    strength: lambda, >= 0.
    examples: largest number of a task's images in the mean of its Fisher diagonal, >= 1.
  Raises:
    ValueError: a setting breaks its rule.
  """

  def keep(memory, task, of_task):
    """Stores the task's Fisher diagonal and anchor in its slot."""
    # A slot per task: the diagonals of earlier tasks are kept as they are.
    return put_task(memory, task, of_task)

  slots = network.problem.tasks
  return _consolidation(network, keep, slots=slots, strength=strength, examples=examples)


def online_ewc(network: Network, *, strength: float, decay: float, examples: int) -> Method:
  """Makes EWC with one running Fisher diagonal and the latest parameters as only anchor.

  Args:
    network, strength, examples: as in `ewc`.
    decay: gamma in [0, 1]; 1 forgets nothing.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not 0 <= decay <= 1:
    raise ValueError(f"decay must be in [0, 1]; got {decay}")

  def keep(memory, task, of_task):
    """Adds the Fisher diagonal to the decayed one and replaces the anchor."""
    in_slot = jax.tree.map(lambda x: x[None], of_task)
    # F <- gamma F + F_t
    fisher = jax.tree.map(lambda old, new: decay * old + new, memory.fisher, in_slot.fisher)
    return in_slot.replace(fisher=fisher)

  return _consolidation(network, keep, slots=1, strength=strength, examples=examples)


def fisher_diagonal(
  log_prob: Callable[[Any, Array, Array], Array], params: Any, x: Array, labels: Array
) -> Any:
  """Computes mean_n (d log_prob(params, x_n, y_n) / d params)^2.

  One example follows the other, so that the memory needed is that of one gradient.

  Args:
    log_prob: of one example, a scalar.
    params: any tree.
    x, labels: `[N, ...]`.
  Returns:
    a tree like `params`.

  >>> log_prob = lambda p, x, y: p * x
  >>> float(fisher_diagonal(log_prob, jnp.array(2.0), jnp.array([1.0, 3.0]), jnp.zeros(2)))
  5.0
  """

  def add(total, example):
    """Adds the squared gradient of one example."""
    grads = jax.grad(log_prob)(params, *example)
    return jax.tree.map(lambda t, g: t + g**2, total, grads), None

  total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, params), (x, labels))
  # F_ti: the mean over examples.
  return jax.tree.map(lambda t: t / len(x), total)


class EwcMemory(MemoryNode):
  """The memory of EWC and online EWC, or what one task adds to it.

  Attributes:
    anchor: theta*, parameters at the end of a task.
    fisher: diagonals of Fisher matrices, like `anchor`.
  """

  anchor: Any
  fisher: Any


def _consolidation(
  network: Network,
  keep: Callable[[EwcMemory, int, EwcMemory], EwcMemory],
  *,
  slots: int,
  strength: float,
  examples: int,
) -> Method:
  """Makes EWC from a rule that keeps Fisher diagonals and anchors.

  Args:
    network: to train.
    keep: `(memory, task, of_task) -> memory`, adds what belongs to the task that ends.
    slots: number of anchors; the arrays of the memory are `[slots, ...]`, 0 until a task has ended.
    strength, examples: as in `ewc`.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not strength >= 0:
    raise ValueError(f"strength must be >= 0; got {strength}")
  if examples < 1:
    raise ValueError(f"examples must be >= 1; got {examples}")

  def init(key):
    """Initialises the network, with empty slots for Fisher diagonals and anchors."""
    params, batch_stats = network.init(key)

    def empty():
      """Creates empty slots: each use needs arrays of its own, as a step donates its buffers."""
      return jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), params)

    return InitialState(params, batch_stats, EwcMemory(anchor=empty(), fisher=empty()))

  def penalty(params, memory):
    """Computes the penalty over all slots, a scalar."""
    # lambda/2 sum_s sum_i F_si (theta_i - theta*_si)^2; slots without a task have F = 0.
    return strength / 2 * weighted_distance(params, memory.anchor, memory.fisher)

  def end_task(learner, data, key):
    """Keeps the task's Fisher diagonal and its final parameters."""
    # The importance is for this task's predictions, so it is measured where the training has ended.
    fisher = _fisher_of_task(network, learner, data, key=key, examples=examples)
    of_task = EwcMemory(anchor=learner.params, fisher=fisher)
    return learner.replace(memory=keep(learner.memory, int(learner.task), of_task))

  return Method(init, anchored_loss(network, penalty), end_task, predict=network.predict)


def _fisher_of_task(
  network: Network, learner: LearnerState, data: TaskData, *, key: Array, examples: int
) -> Any:
  """Computes the Fisher diagonal of the task that ends, on at most so many of its images."""
  choice, drawing = jax.random.split(key)
  # A random subset, since the first images need not be like the rest.
  chosen = np.asarray(jax.random.permutation(choice, len(data.labels)))[:examples]
  # The labels only say which head an image belongs to.
  pixels, labels, task = data.pixels[chosen], data.labels[chosen], learner.task

  @jax.jit
  def diagonal(params, batch_stats, pixels, labels):
    """Computes the Fisher diagonal on `[N, H, W, D]` pixels with `[N]` labels."""

    def log_prob(params, x, label):
      """Returns the log-probability of one image's label, a scalar."""
      logits = network.logits(params, batch_stats, x[None])
      # log p(y | x) is minus the cross-entropy, in the task's own head whatever the network's
      # scope.
      return -network.cross_entropy(logits, label[None], task, scope="own")[0]

    return fisher_diagonal(log_prob, params, x=network.problem.normalise(pixels), labels=labels)

  logits = network.problem.in_batches(network.logits_of, learner, pixels)
  # y_n ~ p(y | x_n) among the classes of the task.
  own = network.visible(jnp.asarray(labels), task, scope="own")
  drawn = jax.random.categorical(drawing, jnp.where(own, logits, -jnp.inf))
  return diagonal(learner.params, learner.batch_stats, pixels=pixels, labels=drawn)


class SiMemory(MemoryNode):
  """The memory of SI; each field is a tree like the parameters.

  Attributes:
    path: omega, the path integral of the current task so far.
    importance: Omega.
    anchor: theta*.
  """

  path: Any
  importance: Any
  anchor: Any


def si(network: Network, *, strength: float, damping: float) -> Method:
  """Makes synaptic intelligence.

  Args:
    network: to train.
    strength: c, >= 0.
    damping: xi > 0, the squared distance below which a shorter path no longer gives more
      importance.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not strength >= 0:
    raise ValueError(f"strength must be >= 0; got {strength}")
  if not damping > 0:
    raise ValueError(f"damping must be > 0; got {damping}")

  def init(key):
    """Initialises the network, with a path and importance of 0."""
    params, batch_stats = network.init(key)
    # A step donates its buffers: no two of these may be one buffer.
    memory = SiMemory(
      path=jax.tree.map(jnp.zeros_like, params),
      importance=jax.tree.map(jnp.zeros_like, params),
      anchor=jax.tree.map(jnp.copy, params),
    )
    return InitialState(params, batch_stats, memory)

  def penalty(params, memory):
    """Computes the penalty on the distance to the anchor, a scalar."""
    return strength * weighted_distance(params, memory.anchor, memory.importance)

  def update(updates, grads, learner):
    """Adds the step to the path; the updates stay the same."""
    memory = learner.memory
    # At the parameters before the step, as `grads`.
    of_penalty = jax.grad(penalty)(learner.params, memory)
    path = jax.tree.map(_extend_path, memory.path, grads, of_penalty, updates)
    return updates, memory.replace(path=path)

  def end_task(learner, data, key):
    """Adds the task's path to the importance and moves the anchor."""
    memory, params = learner.memory, learner.params

    def add(importance, path, p, anchor):
      """Adds the path of one array."""
      # Omega_i <- Omega_i + max(omega_i, 0) / ((theta_i - theta*_i)^2 + xi)
      return importance + jnp.maximum(path, 0) / ((p - anchor) ** 2 + damping)

    memory = SiMemory(
      path=jax.tree.map(jnp.zeros_like, memory.path),
      importance=jax.tree.map(add, memory.importance, memory.path, params, memory.anchor),
      anchor=jax.tree.map(jnp.copy, params),
    )
    return learner.replace(memory=memory)

  return Method(
    init, anchored_loss(network, penalty), end_task, predict=network.predict, update=update
  )


def _extend_path(path: Array, grad: Array, of_penalty: Array, update: Array) -> Array:
  """Adds the step of one array: omega_i <- omega_i - g_i dtheta_i."""
  # g is the gradient of the cross-entropy alone: that of the penalty is subtracted.
  return path - (grad - of_penalty) * update


def weighted_distance(params: Any, anchor: Any, weight: Any) -> Array:
  """Computes sum_i w_i (theta_i - theta*_i)^2 over three trees.

  Args:
    params: theta.
    anchor, weight: theta* and w, like `params`; a leading axis of several anchors is summed over.
  Returns:
    a scalar.

  >>> params, anchor = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([0.0, 5.0])}
  >>> float(weighted_distance(params, anchor, {"a": jnp.array([4.0, 2.0])}))
  22.0
  """

  def distance(p, a, w):
    """Sums over one array; a leading axis of anchors broadcasts against the parameters."""
    return jnp.sum(w * (p - a) ** 2)

  return jnp.asarray(optax.tree.sum(jax.tree.map(distance, params, anchor, weight)))


def anchored_loss(
  network: Network, penalty: Callable[[Any, Any], Array]
) -> Callable[[Any, LearnerState, Batch], StepLoss]:
  """Makes the `loss` of a method: the network's cross-entropy plus a penalty.

  Args:
    network: to train.
    penalty: `(params, memory) -> scalar`.
  """

  def loss(params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the cross-entropy plus the penalty, a scalar."""
    cross_entropy, (terms, batch_stats) = network.loss(params, learner, batch)
    terms = {**terms, "penalty": penalty(params, learner.memory)}
    return cross_entropy + terms["penalty"], (terms, batch_stats)

  return loss
