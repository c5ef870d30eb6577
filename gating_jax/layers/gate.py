"""The gate: a tiny network that looks at a feature map and decides, per example, which units run.

Axes: N examples, H and W pixels, D input channels, C gated units.
Reference: Veit and Belongie, 2018; Bejnordi et al., 2020, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.ops import collectives, relaxations
from gating_jax.types import Array, GateRecord, Records

GATE_NAME = "gate"  # every gate module is called this inside its block
GATE_RNG = "gate"  # the name of the PRNG stream for the gates' noise


def is_gate_path(path: Sequence[str]) -> bool:
  """True for the path of a gate network's module or parameter."""
  return GATE_NAME in path


@dataclasses.dataclass(frozen=True)
class GateSettings:
  """How gates are built and sampled.

  Attributes:
    hidden: width of the gate network's hidden layer.
    initial_open: P(open) that the last bias starts from, in (0, 1).
    temperature: of the backward pass, > 0.
    noise_scale: multiplies the logistic noise of training; 1 makes P(open) = sigmoid(logit).
  """

  hidden: int = 16
  initial_open: float = 0.85
  temperature: float = relaxations.DEFAULT_TEMPERATURE
  noise_scale: float = 1.0

  def __post_init__(self):
    rules = {
        "hidden": (self.hidden >= 1, ">= 1"),
        "initial_open": (0 < self.initial_open < 1, "in (0, 1)"),
        "temperature": (self.temperature > 0, "> 0"),
        "noise_scale": (self.noise_scale >= 0, ">= 0"),
    }
    for name, (holds, rule) in rules.items():
      if not holds:
        raise ValueError(f"gate {name} must be {rule}; got {getattr(self, name)}")


class GateHead(nn.Module):
  """Pooled features to one logit per unit: mean over pixels, Dense, BatchNorm, ReLU, Dense. Computes in float32.

  `[N, H, W, D]` or `[N, D]` to `[N, units]`.
  """

  units: int
  settings: GateSettings = GateSettings()
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    s = self.settings
    x = x.astype(jnp.float32)
    context = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
    h = nn.Dense(s.hidden, use_bias=False, name="hidden")(context)
    h = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm")(h)
    bias = nn.initializers.constant(math.log(s.initial_open / (1 - s.initial_open)))
    return nn.Dense(self.units, bias_init=bias, name="logits")(nn.relu(h))


class ChannelGate(nn.Module):
  """One or more groups of gates that share a `GateHead`.

  Attributes:
    units: gates of each group.
    macs_per_unit, macs_per_pair: what they switch, per group; see `GateRecord`.

  Called with `[N, H, W, D]` it returns one `GateRecord` per group. With `train=True` gates are sampled and need a PRNG
  stream named `gate`; the noise of an example depends on its place in the whole batch, not on the device it is on.
  """

  units: tuple[int, ...]
  macs_per_unit: tuple[int, ...]
  macs_per_pair: tuple[int, ...]
  settings: GateSettings = GateSettings()
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Records:
    head = GateHead(sum(self.units), self.settings, self.axis_name, name="head")
    logits = head(x, train)
    gates = self._sample(logits) if train else relaxations.threshold_gate(logits)
    ends = [sum(self.units[: i + 1]) for i in range(len(self.units))]
    groups = [jnp.split(a, ends[:-1], axis=-1) for a in (logits, jax.nn.sigmoid(logits), gates)]
    return tuple(
        GateRecord(*group) for group in zip(*groups, self.macs_per_unit, self.macs_per_pair, strict=True)
    )

  def _sample(self, logits: Array) -> Array:
    keys = collectives.example_keys(self.make_rng(GATE_RNG), logits.shape[0], self.axis_name)
    sample = lambda key, row: relaxations.straight_through_gate(
        key, row, self.settings.temperature, noise_scale=self.settings.noise_scale)
    return jax.vmap(sample)(keys, logits)


def apply_gates(x: Array, gates: Array) -> Array:
  """Switches channels: `[N, H, W, C]` features times `[N, C]` gates.

  Raises:
    ValueError: the shapes do not belong together.

  >>> apply_gates(jnp.ones((1, 1, 1, 2)), jnp.array([[1.0, 0.0]])).ravel()
  Array([1., 0.], dtype=float32)
  """
  if gates.ndim != 2 or x.ndim < 2 or gates.shape != (x.shape[0], x.shape[-1]):
    raise ValueError(f"gates must be [N, C] like x's examples and channels; got gates {gates.shape}, x {x.shape}")
  return x * gates.reshape(gates.shape[0], *[1] * (x.ndim - 2), gates.shape[1]).astype(x.dtype)
