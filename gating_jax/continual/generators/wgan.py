"""WGAN-GP: training a generator of images that is to be sampled when they are gone.

Everything is a pure function of a state, uint8 images and a seed.

Axes: N examples, B examples of an update on this device, S critic updates per step, H and W pixels, D colour channels.
Reference: Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from gating_jax.layers.gate import GATE_RNG
from gating_jax.ops.collectives import example_keys, mean_over_devices
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.types import Array, Records

LATENT_STREAM, GATE_STREAM, MIX_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class WganSettings:
  """How a generator is trained.

  The defaults are for a thousand steps on a CPU; the authors have 5 updates and a learning rate of 1e-4, for many more.

  Attributes:
    critic_steps: updates of the critic per update of the generator, >= 1.
    penalty: weight of the gradient penalty, >= 0.
    learning_rate, beta1, beta2: of Adam, for both nets.
    average: decay per step of the moving average of the generator's parameters that is sampled, in [0, 1).
  """

  critic_steps: int = 2
  penalty: float = 10.0
  learning_rate: float = 5e-4
  beta1: float = 0.5
  beta2: float = 0.9
  average: float = 0.99

  def __post_init__(self):
    rules = {
      "critic_steps": (self.critic_steps >= 1, ">= 1"),
      "penalty": (self.penalty >= 0, ">= 0"),
      "learning_rate": (self.learning_rate > 0, "> 0"),
      "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
      "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
      "average": (0 <= self.average < 1, "in [0, 1)"),
    }
    for name, (holds, rule) in rules.items():
      if not holds:
        raise ValueError(f"{name} must be {rule}; got {getattr(self, name)}")

  def adam(self) -> optax.GradientTransformation:
    """The optimiser of one net."""
    return optax.adam(self.learning_rate, self.beta1, self.beta2)


class WganState(struct.PyTreeNode):
  """All that training changes; with the seed and the images it determines the rest.

  `average` are the generator's parameters to sample with, `batch_stats` what its gates normalise with.
  """

  step: Array
  generator: Any
  average: Any
  batch_stats: Any
  critic: Any
  generator_opt: Any
  critic_opt: Any


def init_state(
  generator: nn.Module, critic: nn.Module, settings: WganSettings, seed: int
) -> WganState:
  """A fresh state."""

  @jax.jit
  def init(key):
    keys = jax.random.split(key)
    labels = None if generator.classes is None else jnp.zeros(1, jnp.int32)
    variables = generator.init(keys[0], jnp.zeros((1, generator.latent)), labels)
    params = variables["params"]
    critic_params = critic.init(keys[1], jnp.zeros((1, *generator.shape)), labels)["params"]
    return WganState(
      step=jnp.zeros((), jnp.int32),
      generator=params,
      average=params,
      batch_stats=variables.get("batch_stats", {}),
      critic=critic_params,
      generator_opt=settings.adam().init(params),
      critic_opt=settings.adam().init(critic_params),
    )

  # A copy, since the average and the generator must not be one buffer, which a step could not take over.
  return jax.tree.map(jnp.copy, init(jax.random.key(seed, impl="rbg")))


def make_train_step(
  generator: nn.Module,
  critic: nn.Module,
  settings: WganSettings,
  *,
  seed: int,
  view: Callable[[Any], Any] = lambda params: params,
  records_loss: Callable[[Records], Array] | None = None,
  gradient: Callable[[Any, Any], Any] = lambda grads, params: grads,
  update: Callable[[Any, Any], Any] = lambda updates, params: updates,
  axis_name: Hashable | None = None,
) -> Callable:
  """S updates of the critic, then one of the generator: `(state, pixels, labels) -> (state, metrics)`.

  `pixels` `[B * S, H, W, D]` are uint8 and real, `labels` `[B * S]` their classes, unused by unconditional nets; update
  s of the critic takes every S-th, from the s-th on. The step is of the kind that `training.steps.resident_steps` and
  `streamed_steps` repeat. All randomness is a function of `seed` and `state.step`.

  Args:
    generator: `(z [N, generator.latent], labels, train) -> (images [N, H, W, D] in [-1, 1], records)`.
    critic: `(images, labels) -> scores [N]`.
    settings: as for `init_state`.
    view: the parameters that the generator runs with, from those that are trained.
    records_loss: added to the generator's loss, of a gated one's records.
    gradient, update: changes to the generator's gradient before the optimiser sees it, and to what that makes of it,
      such as one that leaves frozen filters alone; both are given the parameters as well.
    axis_name: mapped device axis over which a batch is spread.
  Returns:
    a step, whose metrics are scalars over the whole batch: `critic_loss`, `distance` (the estimate of Wasserstein's),
    `gradient_penalty` of the S updates on average, and `generator_loss`.
  """
  return _Training(
    generator, critic, settings, seed, view, records_loss, gradient, update, axis_name
  ).step


@dataclasses.dataclass(frozen=True)
class _Training:
  """What `make_train_step` is given."""

  generator: nn.Module
  critic: nn.Module
  settings: WganSettings
  seed: int
  view: Callable[[Any], Any]
  records_loss: Callable[[Records], Array] | None
  gradient: Callable[[Any, Any], Any]
  update: Callable[[Any, Any], Any]
  axis_name: Hashable | None

  def step(
    self, state: WganState, pixels: Array, labels: Array | None = None
  ) -> tuple[WganState, dict[str, Array]]:
    key, turns = (
      jax.random.fold_in(jax.random.key(self.seed), state.step),
      self.settings.critic_steps,
    )
    parts = _in_turn((pixels, None if self.generator.classes is None else labels), turns)
    body = lambda state, one: self._update_critic(state, jax.random.fold_in(key, one[0]), *one[1])
    state, metrics = lax.scan(body, state, (jnp.arange(turns), parts))
    n, labels = parts[0].shape[1], jax.tree.map(lambda labels: labels[-1], parts[1])
    state, more = self._update_generator(state, jax.random.fold_in(key, turns), labels, n)
    return state.replace(step=state.step + 1), {**jax.tree.map(jnp.mean, metrics), **more}

  def _fakes(self, params: Any, state: WganState, key: Array, labels: Array | None, n: int):
    z = latents(jax.random.fold_in(key, LATENT_STREAM), n, self.generator.latent, self.axis_name)
    variables = {"params": self.view(params), "batch_stats": state.batch_stats}
    rngs = {GATE_RNG: jax.random.fold_in(key, GATE_STREAM)}
    (images, records), updates = self.generator.apply(
      variables, z, labels, train=True, mutable=["batch_stats"], rngs=rngs
    )
    return images, records, updates.get("batch_stats", {})

  def _update_critic(self, state, key, pixels, labels):
    real = to_unit(pixels)
    fake, *_ = self._fakes(state.generator, state, key, labels, real.shape[0])
    mix = _uniform(jax.random.fold_in(key, MIX_STREAM), real.shape[0], self.axis_name)

    def loss(params):
      score = lambda images: self.critic.apply({"params": params}, images, labels)
      return critic_loss(score, real, fake, mix, penalty=self.settings.penalty)

    (_, metrics), grads = value_and_grad_over_devices(loss, self.axis_name, has_aux=True)(
      state.critic
    )
    metrics = mean_over_devices(metrics, self.axis_name)
    updates, opt = self.settings.adam().update(grads, state.critic_opt, state.critic)
    return state.replace(critic=optax.apply_updates(state.critic, updates), critic_opt=opt), metrics

  def _update_generator(self, state, key, labels, n):
    def loss(params):
      images, records, batch_stats = self._fakes(params, state, key, labels, n)
      adversarial = -jnp.mean(self.critic.apply({"params": state.critic}, images, labels))
      total = adversarial if self.records_loss is None else adversarial + self.records_loss(records)
      return total, ({"generator_loss": total}, batch_stats)

    (_, found), grads = value_and_grad_over_devices(loss, self.axis_name, has_aux=True)(
      state.generator
    )
    metrics, batch_stats = mean_over_devices(found, self.axis_name)
    grads = self.gradient(grads, state.generator)
    updates, opt = self.settings.adam().update(grads, state.generator_opt, state.generator)
    params = optax.apply_updates(state.generator, self.update(updates, state.generator))
    # In this form what does not move stays as it is to the bit.
    average = jax.tree.map(
      lambda a, p: a + (1 - self.settings.average) * (p - a), state.average, params
    )
    return state.replace(
      generator=params, generator_opt=opt, average=average, batch_stats=batch_stats
    ), metrics


def critic_loss(
  critic: Callable[[Array], Array], real: Array, fake: Array, mix: Array, *, penalty: float
):
  """Negative Wasserstein distance by this critic, and the penalty that keeps it 1-Lipschitz.

      loss = mean critic(fake) - mean critic(real) + penalty * gradient_penalty(mix real + (1 - mix) fake)

  Args:
    critic: `[N, ...]` images to `[N]` scores.
    real, fake: `[N, ...]`.
    mix: `[N]` in [0, 1].
  Returns:
    the loss, and a dict of it and its parts.
  """
  distance = jnp.mean(critic(real)) - jnp.mean(critic(fake))
  share = mix.reshape(-1, *[1] * (real.ndim - 1))
  steepness = gradient_penalty(critic, share * real + (1 - share) * fake)
  loss = penalty * steepness - distance
  return loss, {"critic_loss": loss, "distance": distance, "gradient_penalty": steepness}


def gradient_penalty(critic: Callable[[Array], Array], images: Array) -> Array:
  """`mean_n (|d critic(x_n) / d x_n| - 1)^2` over `[N, ...]` images; a scalar.

  Where the critic is flat, the norm's gradient is taken as 0.

  >>> gradient_penalty(lambda x: x @ jnp.array([3.0, 4.0]), jnp.ones((5, 2)))
  Array(16., dtype=float32)
  """
  slopes = jax.grad(lambda x: jnp.sum(critic(x)))(images)
  squares = jnp.sum(jnp.square(slopes), axis=tuple(range(1, slopes.ndim)))
  steep = squares > 0
  norms = jnp.where(steep, jnp.sqrt(jnp.where(steep, squares, 1.0)), 0.0)
  return jnp.mean(jnp.square(norms - 1))


def sample(
  generator: nn.Module, state: WganState, key: Array, n: int, labels: Array | None = None
) -> Array:
  """`[n, H, W, D]` uint8 images from the averaged parameters; `labels` `[n]` for a conditional generator."""
  variables = {"params": state.average, "batch_stats": state.batch_stats}
  images, _ = generator.apply(variables, latents(key, n, generator.latent), labels)
  return to_pixels(images)


def latents(key: Array, n: int, size: int, axis_name: Hashable | None = None) -> Array:
  """`[n, size]` standard normal; an example's depend on its place in the whole batch."""
  return jax.vmap(lambda key: jax.random.normal(key, (size,)))(example_keys(key, n, axis_name))


def to_unit(pixels: Array) -> Array:
  """uint8 pixels to float32 in [-1, 1]."""
  return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Array) -> Array:
  """The inverse of `to_unit`, rounded and clipped.

  >>> to_pixels(to_unit(jnp.array([0, 1, 128, 255], jnp.uint8)))
  Array([  0,   1, 128, 255], dtype=uint8)
  """
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _uniform(key: Array, n: int, axis_name: Hashable | None) -> Array:
  return jax.vmap(jax.random.uniform)(example_keys(key, n, axis_name))


def _in_turn(tree: Any, steps: int) -> Any:
  """`[B * steps, ...]` to `[steps, B, ...]`, dealt out in turn, so that a device's share holds its part of each."""
  for x in jax.tree.leaves(tree):
    if x.shape[0] % steps:
      raise ValueError(
        f"images must be a multiple of the {steps} updates of the critic; got {x.shape[0]}"
      )
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0), tree)
