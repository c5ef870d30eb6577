"""Gates from log-odds: noisy, relaxed and hard.

Axes: any shape, also without elements; every function is elementwise. `logits` are log-odds that a
unit is open: real numbers, whole ones taken as float32. A temperature or a noise scale is a number,
or an array that broadcasts to them.
Reference: Maddison et al., 2017 (concrete distribution); Louizos et al., 2018 (hard concrete).
"""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import shown
from gating_jax.names import former_positional
from gating_jax.ops import arguments
from gating_jax.ops.arguments import as_float, float_dtype
from gating_jax.types import AnyArray, Array

# Temperature and stretch of Louizos et al., 2018.
DEFAULT_TEMPERATURE = 2 / 3
HARD_CONCRETE_STRETCH = (-0.1, 1.1)


@former_positional("temperature")
def straight_through_gate(
  key: Array,
  logits: AnyArray,
  *,
  temperature: float | Array = DEFAULT_TEMPERATURE,
  noise_scale: float | Array = 1.0,
) -> Array:
  """Samples 0/1 gates whose gradient is that of the binary concrete relaxation.

      forward   1[logit + noise_scale * L > 0],   L ~ Logistic(0, 1),
                so P(open) = sigmoid(logit) at scale 1
      backward  d sigmoid((logit + noise_scale * L) / temperature) / d logit

  Args:
    key: a PRNG key.
    logits: log-odds, any shape.
    temperature: > 0, of the backward pass only.
    noise_scale: multiplies the noise; 0 gives `threshold_gate` with a gradient.
  Returns:
    exactly 0.0 or 1.0, shape and dtype of `logits`.
  Raises:
    ValueError: a temperature or a noise scale that is known and out of range.
    TypeError: `key` is no PRNG key, or another argument no real numbers.

  >>> straight_through_gate(jax.random.key(0), jnp.array([-20.0, 20.0]))
  Array([0., 1.], dtype=float32)

  Reference: Bengio et al., 2013 (straight-through); Bejnordi et al., 2020, section 3.
  """
  return straight_through(_add_logistic(key, logits, noise_scale), temperature=temperature)


@former_positional("temperature")
def straight_through(
  noisy_logits: AnyArray, *, temperature: float | Array = DEFAULT_TEMPERATURE
) -> Array:
  """Steps at 0, with the gradient of `sigmoid(noisy_logits / temperature)`.

  The caller adds the noise.

  Args:
    noisy_logits: log-odds with their noise, any shape.
    temperature: > 0, of the backward pass only.
  Returns:
    Gates 0 and 1, of the shape of the logits.
  Raises:
    ValueError: a temperature that is known and not above 0.
    TypeError: an argument that is no real numbers.

  >>> straight_through(jnp.array([-1.0, 2.0]))
  Array([0., 1.], dtype=float32)
  >>> print(f"{jax.grad(straight_through)(0.0):.4f}")
  0.3750
  """
  noisy_logits, temperature = arguments.aligned(
    _as_logits(noisy_logits), _checked_temperature(temperature)
  )
  # The function of the backward line in `straight_through_gate`.
  soft = jax.nn.sigmoid(noisy_logits / temperature)
  # hard + 0: adding the difference of hard and soft to soft would round away from 0 and 1.
  return threshold_gate(noisy_logits) + (soft - jax.lax.stop_gradient(soft))


@former_positional("temperature")
def binary_concrete(
  key: Array,
  logits: AnyArray,
  *,
  temperature: float | Array = DEFAULT_TEMPERATURE,
  noise_scale: float | Array = 1.0,
) -> Array:
  """Samples relaxed gates in (0, 1).

      sigmoid((logit + noise) / temperature),   so P(gate > 1/2) = sigmoid(logit)

  The probability holds at noise scale 1.

  Args:
    key, logits, temperature, noise_scale: as in `straight_through_gate`.
  Returns:
    Gates in (0, 1), of the shape of the logits.
  Raises:
    ValueError, TypeError: as `straight_through_gate`.

  >>> binary_concrete(jax.random.key(0), jnp.array([-50.0, 50.0])).round(3)
  Array([0., 1.], dtype=float32)
  """
  noisy, temperature = arguments.aligned(
    _add_logistic(key, logits, noise_scale), _checked_temperature(temperature)
  )
  return jax.nn.sigmoid(noisy / temperature)


@former_positional("temperature")
def hard_concrete(
  key: Array,
  logits: AnyArray,
  *,
  temperature: float | Array = DEFAULT_TEMPERATURE,
  noise_scale: float | Array = 1.0,
  stretch: tuple[float, float] = HARD_CONCRETE_STRETCH,
) -> Array:
  """Samples binary concrete gates, stretched to `(low, high)` and clipped to [0, 1].

  Exact zeros and ones have mass. See `hard_concrete_open_prob`, `hard_concrete_mean`.

  Args:
    key, logits, temperature, noise_scale: as in `straight_through_gate`.
    stretch: `(low, high)` with low < 0 and high > 1.
  Returns:
    Gates in [0, 1], of the shape of the logits.
  Raises:
    ValueError, TypeError: an argument out of range or of another kind.

  >>> hard_concrete(jax.random.key(0), jnp.array([-50.0, 50.0]))
  Array([0., 1.], dtype=float32)

  Reference: Louizos et al., 2018, section 2.2.
  """
  low, high = _check_stretch(stretch)
  relaxed = binary_concrete(key, logits, temperature=temperature, noise_scale=noise_scale)
  return jnp.clip(low + (high - low) * relaxed, 0, 1)


@former_positional("temperature")
def hard_concrete_open_prob(
  logits: AnyArray,
  *,
  temperature: float | Array = DEFAULT_TEMPERATURE,
  stretch: tuple[float, float] = HARD_CONCRETE_STRETCH,
) -> Array:
  """Computes P(hard concrete gate > 0), the probability in the L0 term.

      sigmoid(logit - temperature * log(-low / high))

  Args:
    logits: log-odds, any shape.
    temperature: > 0.
    stretch: `(low, high)` with low < 0 and high > 1.
  Returns:
    Probabilities, of the shape of the logits.
  Raises:
    ValueError, TypeError: an argument out of range or of another kind.

  >>> print(f"{hard_concrete_open_prob(0.0):.4f}")
  0.8318
  """
  return jax.nn.sigmoid(_moved(logits, temperature, stretch, sign=-1))


@former_positional("temperature")
def hard_concrete_location(
  open_logits: AnyArray,
  *,
  temperature: float | Array = DEFAULT_TEMPERATURE,
  stretch: tuple[float, float] = HARD_CONCRETE_STRETCH,
) -> Array:
  """Computes the logit (log alpha) of a hard concrete gate from its open log-odds.

  The gate is above 0 with probability `sigmoid(open_logits)`.

  >>> print(f"{hard_concrete_open_prob(hard_concrete_location(0.0)):.4f}")
  0.5000
  """
  return _moved(open_logits, temperature, stretch, sign=1)


def hard_concrete_mean(
  logits: AnyArray, *, stretch: tuple[float, float] = HARD_CONCRETE_STRETCH
) -> Array:
  """Computes the noise-free gate that is used in evaluation.

      clip(low + (high - low) * sigmoid(logit), 0, 1)

  Here (low, high) is `stretch`.

  Args:
    logits: as in `hard_concrete`, any shape.
    stretch: `(low, high)` with low < 0 and high > 1.
  Returns:
    Gates in [0, 1], of the shape of the logits.
  Raises:
    ValueError, TypeError: another stretch.

  >>> hard_concrete_mean(jnp.array([-4.0, 0.0, 4.0])).round(3)
  Array([0. , 0.5, 1. ], dtype=float32)
  """
  low, high = _check_stretch(stretch)
  return jnp.clip(low + (high - low) * jax.nn.sigmoid(_as_logits(logits)), 0, 1)


def clipped_sigmoid(logits: AnyArray, *, slope: float = 0.25) -> Array:
  """Computes the piecewise linear gate `clip(1/2 + slope * logit, 0, 1)`.

  Slope 1/4 is the sigmoid's tangent at 0.

  Args:
    logits: log-odds, any shape.
    slope: > 0.
  Returns:
    Gates in [0, 1], of the shape of the logits.
  Raises:
    ValueError, TypeError: another slope, or logits that are no real numbers.

  >>> clipped_sigmoid(jnp.array([-3.0, 0.0, 1.0, 3.0]))
  Array([0.  , 0.5 , 0.75, 1.  ], dtype=float32)
  """
  arguments.number("slope", slope, "> 0", holds=lambda v: v > 0)
  return jnp.clip(0.5 + float(slope) * _as_logits(logits), 0, 1)


def threshold_gate(logits: AnyArray) -> Array:
  """Computes the evaluation gate: 1 where the logit is above 0, else 0; no gradient, no key.

  Args:
    logits: log-odds, any shape.
  Returns:
    Gates 0 and 1, of the shape of the logits.
  Raises:
    TypeError: logits that are no real numbers.

  >>> threshold_gate(jnp.array([-1.0, 0.0, 2.0]))
  Array([0., 0., 1.], dtype=float32)
  """
  logits = _as_logits(logits)
  # A step has no useful gradient: `straight_through` adds one.
  return jax.lax.stop_gradient((logits > 0).astype(logits.dtype))


def _add_logistic(key: Array, logits: AnyArray, noise_scale: float | Array) -> Array:
  """Returns logits + noise_scale * (log u - log(1 - u)), with u kept off 0 and 1.

  One variable suffices: its law is that of two Gumbels' difference. It is drawn and added in
  float32 at least: a bfloat16 u has 8 bits, so nothing below P(open) = 0.8 % would ever open.
  """
  arguments.prng_key("key", key)
  logits = _as_logits(logits)
  noise_scale = arguments.parameter(
    "noise_scale", noise_scale, "a finite number", holds=np.isfinite
  )
  # Rounded to the type of the logits only once the noise is in.
  wide, noise_scale = arguments.aligned(as_float(logits), noise_scale)
  noise = jax.random.logistic(key, wide.shape, wide.dtype)
  return (wide + noise_scale * noise).astype(logits.dtype)


def _as_logits(logits: AnyArray) -> Array:
  """Returns logits in their own floating-point type, or in float32."""
  arguments.real_array("logits", logits)
  logits = jnp.asarray(logits)
  return logits.astype(float_dtype(logits))


def _checked_temperature(temperature: float | Array) -> float | Array:
  return arguments.parameter("temperature", temperature, "> 0", holds=lambda v: v > 0)


def _moved(
  logits: AnyArray, temperature: float | Array, stretch: tuple[float, float], *, sign: int
) -> Array:
  """Moves logits between the gate that is above 1/2 and the one that is above 0.

  The distance is temperature * log(-low / high); `sign` is the direction.
  """
  low, high = _check_stretch(stretch)
  z, t = arguments.aligned(_as_logits(logits), _checked_temperature(temperature))
  # A stretched gate is above 0 where sigmoid(u / temperature) > -low / (high - low), that is, where
  # u > temperature * log(-low / high).
  return z + sign * t * math.log(-low / high)


def _check_stretch(stretch: tuple[float, float]) -> tuple[float, float]:
  rule = "(low, high) with low < 0 and high > 1"
  is_pair = isinstance(stretch, (tuple, list)) and len(stretch) == 2
  if not is_pair or not all(isinstance(v, numbers.Real) for v in stretch):
    raise TypeError(f"stretch must be {rule}; got {shown(stretch)}")
  # As Python's numbers, which take the type of the logits.
  low, high = map(float, stretch)
  # Otherwise no mass would fall on 0, or on 1.
  if not (low < 0 and high > 1):
    raise ValueError(f"stretch must be {rule}; got {shown(stretch)}")
  return low, high
