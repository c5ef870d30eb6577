"""The gate: a tiny network that looks at a feature map and decides, per example, which units run.

One that looks at nothing is a parameter per unit: a mask for all examples. With hard concrete gates that is L0
regularisation, by which units close for good.

Axes: N examples, H and W pixels, D input channels, C gated units.
Reference: Veit and Belongie, 2018; Bejnordi et al., 2020, section 3; Serra et al., 2018 (masks); Louizos et al., 2018,
"Learning sparse neural networks through L0 regularization".
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gating_jax.checks import one_of, shown
from gating_jax.ops import arguments, collectives, relaxations
from gating_jax.ops.precision import float_dtype
from gating_jax.types import Array, GateRecord, Path, Records

GATE_NAME = "gate"  # every gate module is called this inside its block
LOGITS = ("head", "logits")  # path, inside the gate, of the layer that makes its logits
GATE_RNG = "gate"  # the name of the PRNG stream for the gates' noise
NOISE = "noise"  # the collection that sets the noise of gates for one pass, see `noise_scales`
CONTEXTS = ("pooled", "none", "random")
_SCALE = "scale"
RELAXATIONS = ("straight_through", "hard_concrete", "sigmoid")


def is_gate_path(path: Sequence[str]) -> bool:
  """True for the path of a gate network's module or parameter."""
  return GATE_NAME in path


def noise_scales(params: Mapping[str, Any], scale: float | Array) -> dict[str, Any]:
  """The collection `noise`, by which every gate takes `scale` in place of its settings' `noise_scale`.

  So that it may be traced: `model.apply({"params": params, NOISE: noise_scales(params, scale)}, x, train=True, ...)`.

  >>> noise_scales({"block1": {"conv": 0, "gate": {"logits": 0}}}, 0.25)
  {'block1': {'gate': {'scale': 0.25}}}
  """
  arguments.instance("params", params, Mapping, "a tree of parameters")
  paths = (path for path in traverse_util.flatten_dict(params) if is_gate_path(path))
  return traverse_util.unflatten_dict(
    {(*path[: path.index(GATE_NAME) + 1], _SCALE): scale for path in paths}
  )


@dataclasses.dataclass(frozen=True)
class GateSettings:
  """How gates are built and sampled.

  Attributes:
    hidden: width of the gate network's hidden layer.
    initial_open: P(open) that the last bias starts from, in (0, 1).
    temperature: of the backward pass, > 0.
    noise_scale: multiplies the logistic noise of training; 1 makes P(open) = sigmoid(logit).
    context: what a channel gate sees: `pooled`, the mean over pixels; `none`: its logits are parameters; or `random`:
      nothing is learnt, and gates are drawn at the rate `initial_open` in training and evaluation.
    relaxation: of channel gates: `straight_through`, sampled in training and 0/1; `hard_concrete`, sampled in training
      and in [0, 1], with exact zeros also in evaluation; or `sigmoid`, the probability itself, never sampled.
    block: adjacent channels that share one gate. A layer of fewer has one; else its channels must be a multiple, so
      that all gates of a layer cost the same.
  """

  hidden: int = 16
  initial_open: float = 0.85
  temperature: float = relaxations.DEFAULT_TEMPERATURE
  noise_scale: float = 1.0
  context: str = "pooled"
  relaxation: str = "straight_through"
  block: int = 1

  def __post_init__(self):
    arguments.whole_number("gate hidden", self.hidden)
    arguments.whole_number("gate block", self.block)
    arguments.number("gate initial_open", self.initial_open, "in (0, 1)", lambda v: 0 < v < 1)
    arguments.number("gate temperature", self.temperature, "> 0", lambda v: 0 < v < math.inf)
    arguments.number("gate noise_scale", self.noise_scale, ">= 0", lambda v: 0 <= v < math.inf)
    one_of("gate context", self.context, CONTEXTS)
    one_of("gate relaxation", self.relaxation, RELAXATIONS)
    if self.context == "random" and self.relaxation != "straight_through":
      raise ValueError(
        f"gate relaxation must be straight_through where context is random; got {self.relaxation!r}"
      )

  @property
  def initial_logit(self) -> float:
    """The log-odds of `initial_open`."""
    return math.log(self.initial_open / (1 - self.initial_open))

  @property
  def drawn_noise_scale(self) -> float:
    """s, where a gate of training is open with probability sigmoid(logit / s); 0 where none is drawn."""
    if self.relaxation == "sigmoid":
      return 0.0
    return 1.0 if self.context == "random" else self.noise_scale

  def channels_per_gate(self, channels: int) -> int:
    """How many adjacent channels of a layer of so many share a gate."""
    size = min(self.block, channels)
    if channels % size:
      raise ValueError(
        f"gate block must divide a layer's channels or exceed them; got {self.block} for {channels} "
        "channels"
      )
    return size


def check_gate_settings(name: str, settings: object) -> None:
  """Raises a TypeError unless `settings` are `GateSettings`."""
  arguments.instance(name, settings, GateSettings, "GateSettings, such as GateSettings(hidden=16)")


class GateHead(nn.Module):
  """Pooled features to one logit per unit: mean over pixels, Dense, BatchNorm, ReLU, Dense. Computes in float32.

  `[N, H, W, D]` or `[N, D]` to `[N, units]`. In training a batch without an example is a ValueError: its mean is NaN,
  which BatchNorm would keep.
  """

  units: int
  settings: GateSettings = GateSettings()
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    s = self.settings
    check_gate_settings("settings", s)
    arguments.whole_number("units", self.units)
    check_examples(x, train)
    x = x.astype(jnp.float32)
    context = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
    h = nn.Dense(s.hidden, use_bias=False, name="hidden")(context)
    h = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
    )(h)
    bias = nn.initializers.constant(s.initial_logit)
    return nn.Dense(self.units, bias_init=bias, name="logits")(nn.relu(h))


def check_examples(x: Array, train: bool) -> None:
  """Raises a TypeError or ValueError unless x is `[N, ..., D]` real features; in training N is at least 1."""
  arguments.real_array("x", x)
  if np.ndim(x) < 2 or (train and x.shape[0] == 0):
    rule = "[N, ..., D], in training with at least one example"
    raise ValueError(f"x must be {rule}; got shape {np.shape(x)}")


class Switched(NamedTuple):
  """Channels that gates switch: how many, what one of them costs alone and with one of those before, and what
  `GateRecord` says of them."""

  channels: int
  macs_per_channel: int
  macs_per_pair: int = 0
  writers: tuple[Path, ...] = ()
  readers: tuple[Path, ...] = ()


class ChannelGate(nn.Module):
  """Gates of one or more groups of channels, from one `GateHead`, from a parameter per unit, or by chance.

  Called with `[N, H, W, D]` it returns one `GateRecord` per group. With `train=True` gates are sampled and need a PRNG
  stream named `gate`; the noise of an example depends on its place in the whole batch, not on the device it is on.
  """

  groups: tuple[Switched, ...]
  settings: GateSettings = GateSettings()
  axis_name: Hashable | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Records:
    self._check()
    check_examples(x, train)
    sizes = [self.settings.channels_per_gate(group.channels) for group in self.groups]
    units = [group.channels // size for group, size in zip(self.groups, sizes, strict=True)]
    logits = self._logits(x, sum(units), train)
    probs, gates = jax.nn.sigmoid(logits), self._gates(logits, train)
    parts = [jnp.split(a, np.cumsum(units)[:-1], axis=-1) for a in (logits, probs, gates)]
    return tuple(
      GateRecord(*part, *macs, *group[3:], self.path)
      for *part, macs, group in zip(
        *parts, self._macs(sizes, x.shape[-1]), self.groups, strict=True
      )
    )

  def _check(self):
    what = "a tuple of Switched, one per group of channels"
    if isinstance(self.groups, Switched) or not isinstance(self.groups, tuple) or not self.groups:
      raise TypeError(f"groups must be {what}; got {shown(self.groups)}")
    for i, group in enumerate(self.groups):
      arguments.instance(
        f"groups[{i}]",
        group,
        Switched,
        "Switched, such as Switched(channels=32, macs_per_channel=0)",
      )
      arguments.whole_number(f"groups[{i}].channels", group.channels)
      arguments.number(
        f"groups[{i}].macs_per_channel", group.macs_per_channel, ">= 0", lambda v: v >= 0
      )
      arguments.number(f"groups[{i}].macs_per_pair", group.macs_per_pair, ">= 0", lambda v: v >= 0)
    check_gate_settings("settings", self.settings)

  def _macs(self, sizes: list[int], inputs: int) -> list[tuple[int, int]]:
    """What one gate of each group costs, alone and with one of the group before; before the first is the input."""
    before = [
      self.settings.channels_per_gate(inputs) if self.groups[0].macs_per_pair else 1,
      *sizes,
    ]
    return [
      (size * group.macs_per_channel, size * b * group.macs_per_pair)
      for group, size, b in zip(self.groups, sizes, before, strict=False)
    ]

  def _logits(self, x: Array, units: int, train: bool) -> Array:
    """`[N, units]` log-odds of being open."""
    s = self.settings
    if s.context == "pooled":
      return GateHead(units, s, self.axis_name, name="head")(x, train)
    start = nn.initializers.constant(s.initial_logit)
    if s.context == "none":
      logits = self.param("logits", start, (units,), jnp.float32)
    else:
      logits = jnp.full(units, s.initial_logit, jnp.float32)
    return jnp.broadcast_to(logits, (x.shape[0], units))

  def _gates(self, logits: Array, train: bool) -> Array:
    s = self.settings
    if s.context == "random":
      rate = jnp.float32(s.initial_open)  # whose type is that of the draw
      draw = lambda key, row: jax.random.bernoulli(key, rate, row.shape).astype(row.dtype)
      return self._drawn(draw, logits, train)
    if s.relaxation == "sigmoid":
      return jax.nn.sigmoid(logits)
    sample, at_rest = relaxations.straight_through_gate, relaxations.threshold_gate
    if s.relaxation == "hard_concrete":
      logits = relaxations.hard_concrete_location(logits, s.temperature)
      sample, at_rest = relaxations.hard_concrete, relaxations.hard_concrete_mean
    if not train:
      return at_rest(logits)
    scale = self.get_variable(NOISE, _SCALE, s.noise_scale)
    return self._drawn(
      lambda key, row: sample(key, row, s.temperature, noise_scale=scale), logits, train
    )

  def _drawn(self, sample: Callable[[Array, Array], Array], logits: Array, train: bool) -> Array:
    """Each example's `sample(key, logits)`. Evaluation has no key: its draws are the same in every batch."""
    if train:
      keys = collectives.example_keys(self.make_rng(GATE_RNG), logits.shape[0], self.axis_name)
    else:
      key = jax.random.fold_in(jax.random.key(0), zlib.crc32("/".join(self.path).encode()))
      keys = collectives.example_keys(key, logits.shape[0], None)
    return jax.vmap(sample)(keys, logits)


def apply_gates(x: Array, gates: Array) -> Array:
  """Switches channels: `[N, H, W, C]` features times `[N, C / b]` gates, each of which has b adjacent channels.

  In the type of the features; in float32 where they are whole numbers, which relaxed gates do not leave whole.

  Raises:
    ValueError: the shapes do not belong together.
    TypeError: one of them is no array, such as a `GateRecord` in place of its `gates`.

  >>> apply_gates(jnp.ones((1, 1, 1, 4)), jnp.array([[1.0, 0.0]])).ravel()
  Array([1., 1., 0., 0.], dtype=float32)
  """
  arguments.real_array("x", x)
  arguments.real_array("gates", gates)
  x, gates = jnp.asarray(x), jnp.asarray(gates)
  x = x.astype(float_dtype(x))
  units = gates.shape[-1] if gates.ndim == 2 else 0
  if units == 0 or x.ndim < 2 or gates.shape[0] != x.shape[0] or x.shape[-1] % units:
    raise ValueError(
      "gates must be [N, C / b] for x's N examples and C channels, b of them to a gate; "
      f"got gates {gates.shape}, x {x.shape}"
    )
  gates = jnp.repeat(gates, x.shape[-1] // gates.shape[1], axis=1)
  return x * gates.reshape(gates.shape[0], *[1] * (x.ndim - 2), gates.shape[1]).astype(x.dtype)
