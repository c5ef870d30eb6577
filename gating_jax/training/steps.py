"""Training and evaluation steps: pure functions of (state, arrays).

They are for one device or, by an axis name, for several.

Axes: B examples on this device, K steps of one call, M resident examples, G gates of the whole
network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from gating_jax.layers.gate import GATE_RNG, NOISE, gate_controls
from gating_jax.models.summary import layer_names
from gating_jax.ops.collectives import mean_over_devices
from gating_jax.ops.macs import executed_macs
from gating_jax.terminal import working
from gating_jax.training import devices
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.types import Array

# `(state, step) -> (state, metrics [K])`: the steps of one call, of which `step` is the first.
Advance = Callable[[Any, int], tuple[Any, Mapping[str, Array]]]
# The name of Flax's own PRNG stream for dropout.
DROPOUT_RNG = "dropout"
# Numbers folded into the key of a step. Runs depend on them: they must not change.
AUGMENT_STREAM, GATE_STREAM, DROPOUT_STREAM = range(3)


class TrainState(struct.PyTreeNode):
  """All that training changes; with the seed it determines the rest of the run."""

  step: Array
  params: Any
  batch_stats: Any
  opt_state: Any


def init_state(
  model: nn.Module, optimiser: optax.GradientTransformation, seed: int, shapes: Any
) -> TrainState:
  """Initialises a fresh state.

  Args:
    model: the model to train.
    optimiser: its optimiser.
    seed: the seed of the parameters.
    shapes: `(H, W, D)` for images, or the tree of shapes that the model takes, without examples.
  Returns:
    the state of step 0.
  """
  # rbg: with the default generator, XLA compiles an unrolled threefry for each of hundreds of
  # parameters.
  key = jax.random.key(seed, impl="rbg")

  @jax.jit
  def init(key):
    """Returns the state of step 0, initialised on one example of zeros."""
    inputs = jax.tree.map(
      lambda shape: jnp.zeros((1, *shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    variables = model.init(key, inputs)
    params = variables["params"]
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=variables.get("batch_stats", {}),
      opt_state=optimiser.init(params),
    )

  return init(key)


def make_train_step(
  model: nn.Module,
  optimiser: optax.GradientTransformation,
  objective: Callable,
  prepare: Callable[[Array, Any], Any],
  *,
  seed: int,
  axis_name: Hashable | None = None,
  noise_scale: optax.Schedule | None = None,
  share: optax.Schedule | None = None,
  softness: optax.Schedule | None = None,
  method: str | None = None,
  teach: Callable[[Any, Any], Array] | None = None,
) -> Callable:
  """Returns a training step: `(state, inputs, targets) -> (state, metrics)`.

  `inputs` and `targets` are trees of arrays `[B, ...]`, the examples on this device, such as uint8
  pixels and labels. Metrics are scalars over the whole batch. All randomness is a function of
  `seed` and `state.step`.

  Args:
    model: the model to train.
    optimiser: its optimiser.
    objective: `(outputs, targets, records, step, axis_name)`, returns the loss and named terms.
    prepare: `(key, inputs)`, augments and normalises.
    seed: the seed of the run.
    axis_name: the axis over which the batch is spread; None for one device.
    noise_scale: from step to number, replaces the model's own scale for all its gates.
    share: likewise, the fraction of gates that quantiles open.
    softness: likewise, the temperature at which kernels are mixed.
    method: of the model, whose outputs are fitted; by default its `__call__`.
    teach: `(variables, prepared inputs) -> outputs` of a trained network. The step then takes its
      variables as a fourth argument, and the objective its outputs, `taught`.
  Returns:
    the step.
  """

  def step(
    state: TrainState, inputs: Any, targets: Any, teacher: Any = None
  ) -> tuple[TrainState, dict[str, Array]]:
    """Takes one step on examples `[B, ...]`; returns the new state and scalar metrics."""
    # A key of the step number, not one in the state: a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    prepared = prepare(jax.random.fold_in(key, AUGMENT_STREAM), inputs)
    # The teacher sees the same augmented examples.
    lesson = {} if teach is None else {"taught": teach(teacher, prepared)}
    rngs = {
      GATE_RNG: jax.random.fold_in(key, GATE_STREAM),
      DROPOUT_RNG: jax.random.fold_in(key, DROPOUT_STREAM),
    }

    def loss(params):
      """Returns the loss of a step; next to it, its metrics and the new BatchNorm statistics."""
      variables = {"params": params, "batch_stats": state.batch_stats}
      controls = {"noise_scale": noise_scale, "share": share, "softness": softness}
      # Those that are scheduled, at this step.
      controls = {name: at(state.step) for name, at in controls.items() if at is not None}
      if controls:
        variables[NOISE] = gate_controls(params, **controls)
      (outputs, records), updates = model.apply(
        variables, prepared, train=True, method=method, mutable=["batch_stats"], rngs=rngs
      )
      total, terms = objective(outputs, targets, records, state.step, axis_name, **lesson)
      metrics = {"loss": total, **terms}
      for name, record in zip(layer_names(records), records, strict=True):
        # A soft gate counts as open above 0.
        metrics[f"gate_rate/{name}"] = jnp.mean(record.gates > 0)
      if noise_scale is not None:
        metrics["gates/noise_scale"] = jnp.asarray(noise_scale(state.step), jnp.float32)
      if share is not None:
        metrics["gates/share"] = jnp.asarray(share(state.step), jnp.float32)
      return total, (metrics, updates.get("batch_stats", {}))

    differentiate = value_and_grad_over_devices(loss, axis_name=axis_name, has_aux=True)
    (_, (metrics, batch_stats)), grads = differentiate(state.params)
    metrics = mean_over_devices(metrics, axis_name)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # For the check that all values are finite: a step can spoil them after a finite loss.
    metrics["state_norm"] = optax.tree.norm((params, batch_stats))
    after = TrainState(
      step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    )
    return after, metrics

  return step


def resident_steps(step: Callable) -> Callable:
  """Returns K training steps over a data set that is resident on the devices.

  The result is `(state, (inputs [M, ...], targets [M, ...]), indices [B, K]) -> (state, metrics
  [K])`. Further arguments are passed on to every step.
  """

  def run(state, dataset, indices, *constants):
    """Takes K steps on the examples at `indices` `[B, K]`; returns metrics `[K]`."""

    def take_step(state, index):
      """Takes one step on the examples at `index` `[B]`."""
      examples = jax.tree.map(lambda x: x[index], dataset)
      return step(state, *examples, *constants)

    return _scan(take_step, state, indices.T)

  return run


def streamed_steps(step: Callable) -> Callable:
  """Returns K training steps over batches from the host.

  The result is `(state, (inputs [B, K, ...], targets [B, K, ...])) -> (state, metrics [K])`.
  Further arguments are passed on to every step.
  """

  def run(state, batch, *constants):
    """Takes K steps on `batch`, trees of `[B, K, ...]`; returns metrics `[K]`."""

    def take_step(state, examples):
      """Takes one step on a tree of `[B, ...]`."""
      return step(state, *examples, *constants)

    # Batches have the examples first, to be spread over devices; the scan runs over axis 0.
    return _scan(take_step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batch))

  return run


def image_scores(logits: Array, labels: Array) -> dict[str, Array]:
  """Computes for each image, `[B]`: `predicted` class, whether it is `correct`, `cross_entropy`.

  Args:
    logits: `[B, K]`.
    labels: `[B]` integers.
  """
  predicted = jnp.argmax(logits, -1)
  return {
    "predicted": predicted,
    "correct": predicted == labels,
    "cross_entropy": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
  }


def make_eval_step(
  model: nn.Module,
  normalise: Callable[[Array], Array],
  scores: Callable[..., dict[str, Array]] = image_scores,
) -> Callable:
  """Returns an evaluation step, `(state, pixels, labels) -> results` for each example.

  It needs no key and draws no noise. Results are those of `scores(logits, labels)` and, for a gated
  net, `[B]` `macs` (of its gated part), with `gates` and `gate_logits` `[B, G]`.

  Args:
    model: the model to test.
    normalise: from pixels to network input.
    scores: `(logits, labels)`, returns named results `[B, ...]`.
  Returns:
    the step.
  """

  def step(state: TrainState, pixels: Array, labels: Array) -> dict[str, Array]:
    """Scores pixels `[B, H, W, D]` by their labels; returns results `[B, ...]`."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs: Any = model.apply(variables, normalise(pixels))
    logits, records = outputs
    results = scores(logits, labels)
    if records:
      results["macs"] = executed_macs(records)
      results["gates"] = jnp.concatenate([r.gates for r in records], axis=-1) > 0
      results["gate_logits"] = jnp.concatenate([r.logits for r in records], axis=-1)
    return results

  return step


def _scan(body: Callable, state: Any, batches: Any) -> tuple[Any, Any]:
  """Runs `lax.scan`, without a loop for a single step."""
  # XLA on CPU runs the bodies of loops on fewer threads.
  first = jax.tree.leaves(batches)[0]
  if first.shape[0] > 1:
    return lax.scan(body, state, batches)
  state, metrics = body(state, jax.tree.map(lambda x: x[0], batches))
  return state, jax.tree.map(lambda x: jnp.asarray(x)[None], metrics)


def map_steps(
  make_steps: Callable[[nn.Module], Callable],
  model: nn.Module,
  full: nn.Module | None,
  *,
  args: Sequence[str],
  backend: str,
) -> Callable:
  """Maps a model's training steps over all devices: `(state, ...) -> (state, metrics [K])`.

  Args:
    make_steps: returns the steps of a model.
    model: the model to train.
    full: the same model with the whole backward pass, where `model` may hold fewer units than are
      open, see `or_in_full`; None otherwise.
    args, backend: as in `map_over_devices`; the state is the first argument.
  Returns:
    the steps, compiled at their first call.
  """

  def mapped(model, donate):
    """Returns the steps of `model`, mapped over devices; donates the buffers at `donate`."""
    return devices.map_over_devices(
      make_steps(model),
      args=args,
      results=(devices.REPLICATED, devices.REPLICATED),
      backend=backend,
      donate=donate,
    )

  if full is None:
    return mapped(model, (0,))
  # The state's buffers are given away only where no second pass may need them again.
  return or_in_full(mapped(model, ()), mapped(full, (0,)))


@dataclasses.dataclass(frozen=True)
class MappedSteps:
  """A model's training steps over all devices, on either source of examples.

  Attributes:
    make_step: returns the training step of a model.
    model, full, backend: as in `map_steps`.
    constants: trees that every step takes after its examples, the same for all of them.
  """

  make_step: Callable[[nn.Module], Callable]
  model: nn.Module
  full: nn.Module | None
  backend: str
  constants: tuple[Any, ...] = ()

  def on_stream(self, batches: Iterator[Any]) -> Advance:
    """Returns the steps on batches from the host, `[B, K, ...]` each.

    The stream keeps its own place: it must begin at the step from which training continues.
    """
    run = map_steps(
      lambda model: streamed_steps(self.make_step(model)),
      self.model,
      self.full,
      args=(devices.REPLICATED, devices.BATCH, *self._places),
      backend=self.backend,
    )
    constants = devices.replicate(self.constants)
    begun = False

    def advance(state, _):
      """Takes the steps of one call on the next batch."""
      nonlocal begun
      if not begun:
        begun = True
        # Workers start with the first batch, and files are opened.
        with working("reading the first batch", "up to a minute"):
          batch = next(batches)
      else:
        batch = next(batches)
      return run(state, batch, *constants)

    return advance

  def on_resident(self, examples: Any, indices: Callable[[int], np.ndarray]) -> Advance:
    """Returns the steps on a set that is copied to every device once.

    Args:
      examples: the set, a tree of `[M, ...]`.
      indices: from the step of a call to the examples of its steps, `[B, K]`.
    """
    examples = devices.replicate(examples)
    run = map_steps(
      lambda model: resident_steps(self.make_step(model)),
      self.model,
      self.full,
      args=(devices.REPLICATED, devices.REPLICATED, devices.BATCH, *self._places),
      backend=self.backend,
    )
    constants = devices.replicate(self.constants)
    return lambda state, step: run(state, examples, indices(step), *constants)

  @property
  def _places(self) -> tuple[str, ...]:
    """Returns how the constants are mapped over devices: each has all of them."""
    return (devices.REPLICATED,) * len(self.constants)


def or_in_full(skipping: Callable, full: Callable) -> Callable:
  """Combines steps without the backward pass of closed units and the same steps in full.

  The full steps run where more units are open than the first ones hold. Both are `(state, ...) ->
  (state, metrics [K])`. The first ones leave `state` as it was, to be used again, and their
  gradients are NaN where they do not hold what is open, see `open_backward`. The choice is a
  function of the arguments alone, so that a restart repeats it. The metric `in_full` is 1 where the
  full steps ran.

  Args:
    skipping: the steps without the backward pass of closed units.
    full: the steps with the whole backward pass.
  Returns:
    steps of the same form.
  """
  compiled = False

  def in_full(state, *batch):
    """Runs the full steps; the first call, in the midst of a training, compiles them."""
    nonlocal compiled
    if compiled:
      return full(state, *batch)
    compiled = True
    with working(
      "compiling the training step with its full backward pass",
      "up to a minute or two on a CPU, once",
    ):
      return full(state, *batch)

  def run(state: Any, *batch: Any) -> tuple[Any, dict[str, Any]]:
    """Runs `skipping`, and `full` where a gradient is NaN; returns metrics `[K]`."""
    after, metrics = skipping(state, *batch)
    # A gradient of NaN marks a step that held too few units: the whole call is repeated in full.
    missed = not np.isfinite(jax.device_get(metrics["gradient_norm"])).all()
    if missed:
      after, metrics = in_full(state, *batch)
    # `[K]`, as all metrics: the steps of one call run in full together.
    return after, {
      **metrics,
      "in_full": np.full(metrics["gradient_norm"].shape, missed, np.float32),
    }

  return run
