"""WGAN-GP: training of an image generator for rehearsal.

Everything is a pure function of a state, uint8 images and a seed.

Axes: N examples, B examples of an update on this device, S critic updates per step, H and W pixels,
D colour channels.
Reference: Gulrajani et al., "Improved training of Wasserstein GANs", 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

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

# PRNG streams within an update; their numbers are part of what a seed means.
LATENT_STREAM, GATE_STREAM, MIX_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class WganSettings:
  """Settings for the training of a generator.

  The defaults are for a thousand steps on a CPU; the authors have 5 updates and a learning rate of
  1e-4, for many more steps.

  Attributes:
    critic_steps: updates of the critic per update of the generator, >= 1.
    penalty: weight of the gradient penalty, >= 0.
    learning_rate, beta1, beta2: of Adam, for both networks.
    ema_decay: decay per step of the moving average of the generator's parameters, which is sampled
      from, in [0, 1).
  """

  critic_steps: int = 2
  penalty: float = 10.0
  learning_rate: float = 5e-4
  beta1: float = 0.5
  beta2: float = 0.9
  ema_decay: float = 0.99

  def __post_init__(self):
    rules = {
      "critic_steps": (self.critic_steps >= 1, ">= 1"),
      "penalty": (self.penalty >= 0, ">= 0"),
      "learning_rate": (self.learning_rate > 0, "> 0"),
      "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
      "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
      "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
    }
    for name, (holds, rule) in rules.items():
      if not holds:
        raise ValueError(f"{name} must be {rule}; got {getattr(self, name)}")

  def adam(self) -> optax.GradientTransformation:
    """Makes the optimiser of one network."""
    return optax.adam(self.learning_rate, self.beta1, self.beta2)


class WganState(struct.PyTreeNode):
  """Everything that training changes; with the seed and the images it determines the rest.

  Attributes:
    step: steps taken.
    generator, critic: parameters.
    average: the generator's parameters to sample with.
    batch_stats: running statistics for the gates of the generator.
    generator_opt, critic_opt: states of the optimisers.
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
  """Creates a fresh state.

  Args:
    generator, critic: as in `make_wgan_step`.
    settings: of the training.
    seed: of the initial parameters.
  """

  @jax.jit
  def init(key):
    """Initialises the state from a PRNG key."""
    keys = jax.random.split(key)
    labels = jnp.zeros(1, jnp.int32)
    variables = generator.init(keys[0], jnp.zeros((1, generator.latent)), labels)
    params = variables["params"]
    critic_params = critic.init(keys[1], jnp.zeros((1, *generator.shape)), labels)["params"]
    return WganState(
      step=jnp.zeros((), jnp.int32),
      generator=params,
      # The average starts at the parameters themselves, so it needs no correction of its bias.
      average=params,
      batch_stats=variables.get("batch_stats", {}),
      critic=critic_params,
      generator_opt=settings.adam().init(params),
      critic_opt=settings.adam().init(critic_params),
    )

  # A copy: a step donates its buffers, so average and generator must not be one buffer.
  return jax.tree.map(jnp.copy, init(jax.random.key(seed, impl="rbg")))


def unchanged(params: Any) -> Any:
  """Returns parameters as they are."""
  return params


def _first_unchanged(tree, params):
  """Returns gradients or updates as they are."""
  return tree


@dataclasses.dataclass(frozen=True)
class GeneratorHooks:
  """Changes to the training of the generator, not of the critic.

  Attributes:
    view: maps the parameters that are trained to those that the generator runs with.
    records_loss: added to the generator's loss, computed from a gated generator's records.
    gradient: `(grads, params) -> grads`, changes the gradient before the optimiser.
    update: `(updates, params) -> updates`, changes what the optimiser makes of it, for instance to
      leave frozen filters alone.
  """

  view: Callable[[Any], Any] = unchanged
  records_loss: Callable[[Records], Array] | None = None
  gradient: Callable[[Any, Any], Any] = _first_unchanged
  update: Callable[[Any, Any], Any] = _first_unchanged


def make_wgan_step(
  generator: nn.Module,
  critic: nn.Module,
  settings: WganSettings,
  *,
  seed: int,
  hooks: GeneratorHooks = GeneratorHooks(),
  axis_name: Hashable | None = None,
) -> Callable:
  """Makes a step: S updates of the critic, then one of the generator.

  The step is of the kind that `training.steps.resident_steps` and `streamed_steps` repeat. All
  randomness is a function of `seed` and `state.step`.

  Args:
    generator: `(z [N, generator.latent], labels, train) -> (images [N, H, W, D] in [-1, 1],
      records)`.
    critic: `(images, labels) -> scores [N]`.
    settings: as in `init_state`.
    seed: of all randomness.
    hooks: changes to the generator's training.
    axis_name: mapped device axis over which a batch is spread.
  Returns:
    `(state, pixels, labels) -> (state, metrics)`. `pixels` `[B * S, H, W, D]` are uint8 and real,
      `labels` `[B * S]` their classes; update s of the critic takes every S-th image, from the s-th
      on. Metrics are scalars over the whole batch: `critic_loss`, `distance` (the estimate of
      Wasserstein's) and `gradient_penalty`, averages over the S updates, and `generator_loss`.
  """
  return _Training(
    generator, critic, settings=settings, seed=seed, hooks=hooks, axis_name=axis_name
  ).step


class _Images(NamedTuple):
  """Real images.

  Attributes:
    pixels: `[..., H, W, D]` uint8.
    labels: `[...]`.
  """

  pixels: Array
  labels: Array


class _Generated(NamedTuple):
  """Generated images.

  Attributes:
    images: `[N, H, W, D]` in [-1, 1].
    records: of the generator's gates.
    batch_stats: the generator's new running statistics.
  """

  images: Array
  records: Records
  batch_stats: Any


@dataclasses.dataclass(frozen=True)
class _Training:
  """The arguments of `make_wgan_step`."""

  generator: nn.Module
  critic: nn.Module
  settings: WganSettings
  seed: int
  hooks: GeneratorHooks
  axis_name: Hashable | None

  def step(
    self, state: WganState, pixels: Array, labels: Array
  ) -> tuple[WganState, dict[str, Array]]:
    """Takes one step on `[B * S, H, W, D]` pixels and `[B * S]` labels."""
    # By the step alone, so that a resumed training draws the same.
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)
    turns = self.settings.critic_steps
    # Each update of the critic has its own images.
    images = _in_turn(_Images(pixels, labels), turns)

    def update_critic(state, turn):
      """Updates the critic on the images of one turn."""
      number, images = turn
      return self._update_critic(state, images, jax.random.fold_in(key, number))

    state, metrics = lax.scan(update_critic, state, (jnp.arange(turns), images))
    # Keys 0, ..., S - 1 are the critic's. The classes are those of the last update.
    last = jax.tree.map(lambda x: x[-1], images)
    state, more = self._update_generator(
      state, labels=last.labels, count=len(last.pixels), key=jax.random.fold_in(key, turns)
    )
    return state.replace(step=state.step + 1), {**jax.tree.map(jnp.mean, metrics), **more}

  def _generate(
    self, params: Any, state: WganState, *, labels: Array, count: int, key: Array
  ) -> _Generated:
    """Generates images in training mode."""
    latent_key = jax.random.fold_in(key, LATENT_STREAM)
    z = draw_latents(latent_key, count, size=self.generator.latent, axis_name=self.axis_name)
    # Gradients are with respect to `params`, through the view.
    variables = {"params": self.hooks.view(params), "batch_stats": state.batch_stats}
    (images, records), updates = self.generator.apply(
      variables,
      z,
      labels,
      train=True,
      mutable=["batch_stats"],
      rngs={GATE_RNG: jax.random.fold_in(key, GATE_STREAM)},
    )
    return _Generated(images, records, updates.get("batch_stats", {}))

  def _update_critic(
    self, state: WganState, images: _Images, key: Array
  ) -> tuple[WganState, dict[str, Array]]:
    """Updates the critic on real images of one turn and as many generated ones."""
    real, labels = to_unit(images.pixels), images.labels
    # Training mode, as for the generator's update; the new statistics are not kept here.
    fake = self._generate(state.generator, state, labels=labels, count=len(real), key=key).images
    # The penalty is taken at one point between each real image and a generated one.
    mix = _uniform(jax.random.fold_in(key, MIX_STREAM), len(real), self.axis_name)

    def loss(params):
      """Returns the critic's loss, a scalar, and its metrics."""

      def score(images: Array) -> Any:
        """Returns the `[N]` scores of images."""
        return self.critic.apply({"params": params}, images, labels)

      return critic_loss(score, real, fake, mix=mix, penalty=self.settings.penalty)

    (_, metrics), grads = value_and_grad_over_devices(loss, axis_name=self.axis_name, has_aux=True)(
      state.critic
    )
    metrics = mean_over_devices(metrics, self.axis_name)
    updates, opt = self.settings.adam().update(grads, state.critic_opt, state.critic)
    critic = optax.apply_updates(state.critic, updates)
    return state.replace(critic=critic, critic_opt=opt), metrics

  def _update_generator(
    self, state: WganState, *, labels: Array, count: int, key: Array
  ) -> tuple[WganState, dict[str, Array]]:
    """Updates the generator and its average."""

    def loss(params):
      """Returns the generator's loss, a scalar, with its metrics and new statistics."""
      generated = self._generate(params, state, labels=labels, count=count, key=key)
      # The generator's loss: - mean critic(fake), plus that of the gates.
      scores: Any = self.critic.apply({"params": state.critic}, generated.images, labels)
      total = -jnp.mean(scores)
      if self.hooks.records_loss is not None:
        total = total + self.hooks.records_loss(generated.records)
      return total, ({"generator_loss": total}, generated.batch_stats)

    (_, found), grads = value_and_grad_over_devices(loss, axis_name=self.axis_name, has_aux=True)(
      state.generator
    )
    # Running statistics are averaged too, so that all devices keep the same.
    metrics, batch_stats = mean_over_devices(found, self.axis_name)
    grads = self.hooks.gradient(grads, state.generator)
    updates, opt = self.settings.adam().update(grads, state.generator_opt, state.generator)
    params = optax.apply_updates(state.generator, self.hooks.update(updates, state.generator))

    def average(old, new):
      """Moves the average; in this form it stays the same, bit for bit, where `new` does."""
      return old + (1 - self.settings.ema_decay) * (new - old)

    state = state.replace(
      generator=params,
      generator_opt=opt,
      average=jax.tree.map(average, state.average, params),
      batch_stats=batch_stats,
    )
    return state, metrics


def critic_loss(
  critic: Callable[[Array], Array], real: Array, fake: Array, mix: Array, *, penalty: float
):
  """Computes the critic's loss: negative Wasserstein distance and gradient penalty.

      loss = mean critic(fake) - mean critic(real)
             + penalty * gradient_penalty(mix real + (1 - mix) fake)

  The penalty keeps the critic 1-Lipschitz.

  Args:
    critic: maps `[N, ...]` images to `[N]` scores.
    real, fake: `[N, ...]`.
    mix: `[N]` in [0, 1].
    penalty: weight of the gradient penalty.
  Returns:
    the loss, and a dict of it and its parts.
  """
  # The Kantorovich-Rubinstein dual: the largest gap that a 1-Lipschitz critic finds.
  distance = jnp.mean(critic(real)) - jnp.mean(critic(fake))
  # One weight per image, broadcast over its pixels.
  share = mix.reshape(-1, *[1] * (real.ndim - 1))
  # Between real and generated images, where an optimal critic has slope 1.
  steepness = gradient_penalty(critic, share * real + (1 - share) * fake)
  # The critic maximises the distance, so its loss has the opposite sign.
  loss = penalty * steepness - distance
  return loss, {"critic_loss": loss, "distance": distance, "gradient_penalty": steepness}


def gradient_penalty(critic: Callable[[Array], Array], images: Array) -> Array:
  """Computes `mean_n (|d critic(x_n) / d x_n| - 1)^2`, a scalar.

  Where the critic is flat, the gradient of the norm is taken as 0.

  Args:
    critic: maps `[N, ...]` images to `[N]` scores, each of its own image alone.
    images: `[N, ...]`.

  >>> gradient_penalty(lambda x: x @ jnp.array([3.0, 4.0]), jnp.ones((5, 2)))
  Array(16., dtype=float32)
  """
  # Scores of different images are independent, so one gradient of their sum has all.
  slopes = jax.grad(lambda x: jnp.sum(critic(x)))(images)
  squares = jnp.sum(jnp.square(slopes), axis=tuple(range(1, slopes.ndim)))
  steep = squares > 0
  # The root's gradient at 0 is infinite; the inner `where` keeps it out of the chain rule.
  norms = jnp.where(steep, jnp.sqrt(jnp.where(steep, squares, 1.0)), 0.0)
  return jnp.mean(jnp.square(norms - 1))


def draw_latents(key: Array, n: int, size: int, *, axis_name: Hashable | None = None) -> Array:
  """Draws standard normal latents.

  An example's latent depends on its position in the whole batch, not on the number of devices.

  Args:
    key: PRNG key, the same on all devices.
    n: examples on this device.
    size: of a latent.
    axis_name: mapped device axis, if any.
  Returns:
    `[n, size]`.
  """
  return jax.vmap(lambda key: jax.random.normal(key, (size,)))(example_keys(key, n, axis_name))


def to_unit(pixels: Array) -> Array:
  """Converts uint8 pixels to float32 in [-1, 1]."""
  # 0 becomes -1 and 255 becomes 1, the range of the generator's tanh.
  return pixels.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Array) -> Array:
  """Converts images back to uint8: the inverse of `to_unit`, rounded and clipped.

  >>> to_pixels(to_unit(jnp.array([0, 1, 128, 255], jnp.uint8)))
  Array([  0,   1, 128, 255], dtype=uint8)
  """
  return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _uniform(key: Array, n: int, axis_name: Hashable | None) -> Array:
  """Draws `[n]` numbers in [0, 1), each by its example's position in the whole batch."""
  return jax.vmap(jax.random.uniform)(example_keys(key, n, axis_name))


def _in_turn(tree: Any, steps: int) -> Any:
  """Deals `[B * steps, ...]` out in turn to `[steps, B, ...]`.

  So every device has its part of each update's images.
  """
  for x in jax.tree.leaves(tree):
    if x.shape[0] % steps:
      raise ValueError(
        f"images must be a multiple of the {steps} updates of the critic; got {x.shape[0]}"
      )
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0), tree)
