"""The gate: a small network that reads a feature map and decides, per example, which units run.

A gate without an input is one parameter per unit: a mask for all examples. With hard concrete gates
this is L0 regularisation, which closes units permanently.

Axes: N examples, H and W pixels, D input channels, C gated units.
Reference: Veit and Belongie, 2018; Bejnordi et al., 2020, section 3; Serra et al., 2018 (masks);
  Louizos et al., 2018, "Learning sparse neural networks through L0 regularization".
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike

from gating_jax.checks import one_of, shown
from gating_jax.ops import arguments, collectives, relaxations
from gating_jax.ops.arguments import float_dtype
from gating_jax.types import AnyArray, Array, GateRecord, Path, Records

# Name of every gate module inside its block; `is_gate_path` recognises gates by it.
GATE_NAME = "gate"
# Path, inside the gate, of the layer that makes its logits.
LOGITS = ("head", "logits")
# Name of the PRNG stream for the gates' noise.
GATE_RNG = "gate"
# Collection that sets the noise of gates for one pass; see `noise_scales`.
NOISE = "noise"
# Gatings of networks whose only gates are those of channels.
CHANNEL_GATINGS = ("none", "channel")
CONTEXTS = ("pooled", "none", "random")
_SCALE = "scale"
RELAXATIONS = ("straight_through", "hard_concrete", "sigmoid")


def is_gate_path(path: Sequence[str]) -> bool:
  """Returns True for the path of a gate network's module or parameter."""
  return GATE_NAME in path


def noise_scales(params: Mapping[str, Any], scale: ArrayLike) -> dict[str, Any]:
  """Returns the collection `noise`, which replaces the `noise_scale` of every gate's settings.

  Unlike a setting, the scale may be traced:

      model.apply({"params": params, NOISE: noise_scales(params, scale)}, x, train=True, ...)

  Args:
    params: the model's parameters, from which the paths of the gates are taken.
    scale: the noise scale, a number or a traced scalar.

  >>> noise_scales({"block1": {"conv": 0, "gate": {"logits": 0}}}, 0.25)
  {'block1': {'gate': {'scale': 0.25}}}
  """
  arguments.instance("params", params, Mapping, "a tree of parameters")
  scales = {}
  for path in traverse_util.flatten_dict(params):
    if is_gate_path(path):
      # Many parameters lie under one gate; the same key for all of them leaves one entry.
      gate = path[: path.index(GATE_NAME) + 1]
      scales[(*gate, _SCALE)] = scale
  return traverse_util.unflatten_dict(scales)


@dataclasses.dataclass(frozen=True)
class GateSettings:
  """Settings of how gates are built and sampled.

  Attributes:
    hidden: width of the gate network's hidden layer.
    initial_open: P(open) from which the last bias starts, in (0, 1).
    temperature: of the relaxation, > 0; with `straight_through` it affects only the backward pass.
    noise_scale: multiplies the logistic noise of training; 1 makes P(open) = sigmoid(logit).
    context: input of a channel gate. `pooled`: the mean over pixels; `none`: nothing, its logits
      are parameters; `random`: nothing is learnt, and gates are drawn at the rate `initial_open` in
      training and evaluation.
    relaxation: of channel gates. `straight_through`: sampled in training, and 0/1; `hard_concrete`:
      sampled in training and in [0, 1], with exact zeros also in evaluation; `sigmoid`: the
      probability itself, never sampled.
    block: adjacent channels that share one gate. A layer of fewer channels has one gate; otherwise
      its channels must be a multiple of the block, for equal costs of all its gates.
  Raises:
    ValueError: a field out of range, or `context="random"` with another relaxation than
      `straight_through`.
    TypeError: a field of another kind.

  >>> settings = GateSettings(initial_open=0.5, block=8)
  >>> settings.initial_logit, settings.channels_per_gate(32)
  (0.0, 8)
  """

  hidden: int = 16
  initial_open: float = 0.85
  temperature: float = relaxations.DEFAULT_TEMPERATURE
  noise_scale: float = 1.0
  context: str = "pooled"
  relaxation: str = "straight_through"
  block: int = 1

  def __post_init__(self):
    check_sampling(self)
    arguments.whole_number("gate block", self.block)
    one_of("gate context", self.context, CONTEXTS)
    one_of("gate relaxation", self.relaxation, RELAXATIONS)
    if self.context == "random" and self.relaxation != "straight_through":
      raise ValueError(
        f"gate relaxation must be straight_through if context is random; got {self.relaxation!r}"
      )

  @property
  def initial_logit(self) -> float:
    """Returns the log-odds of `initial_open`."""
    return math.log(self.initial_open / (1 - self.initial_open))

  @property
  def drawn_noise_scale(self) -> float:
    """Returns s such that a gate in training is open with probability sigmoid(logit / s).

    It is 0 where gates are not sampled.
    """
    if self.relaxation == "sigmoid":
      return 0.0
    return 1.0 if self.context == "random" else self.noise_scale

  def channels_per_gate(self, channels: int) -> int:
    """Returns the number of adjacent channels that share a gate, in a layer of `channels`.

    Raises:
      ValueError: `block` neither divides the channels nor exceeds them.
    """
    size = min(self.block, channels)
    if channels % size:
      raise ValueError(
        f"gate block must divide a layer's channels or exceed them; got {self.block} for "
        f"{channels} channels"
      )
    return size


def check_sampling(gate: Any) -> None:
  """Raises an error unless the fields that settings of all gates have are in their range."""
  arguments.whole_number("gate hidden", gate.hidden)
  arguments.number("gate initial_open", gate.initial_open, "in (0, 1)", lambda v: 0 < v < 1)
  arguments.number("gate temperature", gate.temperature, "> 0", lambda v: 0 < v < math.inf)
  arguments.number("gate noise_scale", gate.noise_scale, ">= 0", lambda v: 0 <= v < math.inf)


def check_gate_settings(name: str, settings: object) -> None:
  """Raises a TypeError unless `settings` are `GateSettings`."""
  arguments.instance(name, settings, GateSettings, "GateSettings, such as GateSettings(hidden=16)")


class GateHead(nn.Module):
  """Pooled features to one logit per unit: mean over pixels, Dense, BatchNorm, ReLU, Dense.

  `[N, H, W, D]` or `[N, D]` to `[N, units]`, computed in float32. In training a batch without
  examples is a ValueError: its mean is NaN, which BatchNorm would keep.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> head, x = GateHead(units=5), jnp.zeros((2, 8, 8, 3))
  >>> head.apply(head.init(jax.random.key(0), x), x).shape
  (2, 5)
  """

  units: int
  settings: GateSettings = GateSettings()
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    s = self.settings
    check_gate_settings("settings", s)
    arguments.whole_number("units", self.units)
    check_examples(x, train)
    # A decision near 0 must not depend on the rounding of bfloat16.
    x = x.astype(jnp.float32)
    context = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
    # BatchNorm has a bias.
    h = nn.Dense(s.hidden, use_bias=False, name="hidden")(context)
    h = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
    )(h)
    bias = nn.initializers.constant(s.initial_logit)
    return nn.Dense(self.units, bias_init=bias, name="logits")(nn.relu(h))


def check_examples(x: Array, train: bool) -> None:
  """Raises an error unless x is `[N, ..., D]` real features, in training with N at least 1.

  Raises:
    TypeError: x is no array of real numbers.
    ValueError: x has fewer than two axes, or no example in training.
  """
  arguments.real_array("x", x)
  if np.ndim(x) < 2 or (train and x.shape[0] == 0):
    rule = "[N, ..., D], in training with at least one example"
    raise ValueError(f"x must be {rule}; got shape {np.shape(x)}")


class GatedChannels(NamedTuple):
  """A group of channels that gates switch.

  Attributes:
    channels: number of channels.
    macs_per_channel: MACs per example of one channel alone.
    macs_per_pair: MACs of one channel together with one of the group before it; for the first
      group, with one of the record before, that of the block's input.
    writers, readers: as in `GateRecord`.

  >>> GatedChannels(channels=32, macs_per_channel=27)
  GatedChannels(channels=32, macs_per_channel=27, macs_per_pair=0, writers=(), readers=())
  """

  channels: int
  macs_per_channel: int
  macs_per_pair: int = 0
  writers: tuple[Path, ...] = ()
  readers: tuple[Path, ...] = ()


class ChannelGate(nn.Module):
  """Gates of one or more groups of channels: from one `GateHead`, from parameters, or by chance.

  Called with `[N, H, W, D]`, it returns one `GateRecord` per group. With `train=True` gates are
  sampled and need a PRNG stream named `gate`. The noise of an example depends on its place in the
  whole batch, not on its device.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> gate = ChannelGate((GatedChannels(channels=4, macs_per_channel=27),))
  >>> x = jnp.ones((2, 8, 8, 3))
  >>> (record,) = gate.apply(gate.init(jax.random.key(0), x), x)
  >>> record.gates.shape, record.macs_per_unit
  ((2, 4), 27)
  """

  groups: tuple[GatedChannels, ...]
  settings: GateSettings = GateSettings()
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Records:
    self._check()
    check_examples(x, train)
    units = [self._units(group.channels) for group in self.groups]
    # One head decides on the units of all groups, which are then split.
    logits = self._logits(x, sum(units), train)
    # Before the splits: the order in which the logits' gradients add up is that of these lines.
    probs, gates = jax.nn.sigmoid(logits), self._gates(logits, train)
    ends = np.cumsum(units)[:-1]
    logits_of = jnp.split(logits, ends, axis=-1)
    probs_of = jnp.split(probs, ends, axis=-1)
    gates_of = jnp.split(gates, ends, axis=-1)
    records = []
    # Costs per pair are with the record before, so the order of records matters: the first group's
    # are with the record of the block's input.
    before = self.settings.channels_per_gate(x.shape[-1]) if self.groups[0].macs_per_pair else 1
    for i, group in enumerate(self.groups):
      size = self.settings.channels_per_gate(group.channels)
      record = GateRecord(
        logits=logits_of[i],
        probs=probs_of[i],
        gates=gates_of[i],
        macs_per_unit=size * group.macs_per_channel,
        # Two gates, of `size` and of `before` channels, switch size * before pairs of channels.
        macs_per_pair=size * before * group.macs_per_pair,
        writers=group.writers,
        readers=group.readers,
        gate=self.path,
      )
      records.append(record)
      before = size
    return tuple(records)

  def _units(self, channels: int) -> int:
    return channels // self.settings.channels_per_gate(channels)

  def _check(self):
    what = "a tuple of GatedChannels, one per group of channels"
    if (
      isinstance(self.groups, GatedChannels)
      or not isinstance(self.groups, tuple)
      or not self.groups
    ):
      raise TypeError(f"groups must be {what}; got {shown(self.groups)}")
    for i, group in enumerate(self.groups):
      rule = "GatedChannels, such as GatedChannels(channels=32, macs_per_channel=0)"
      arguments.instance(f"groups[{i}]", group, GatedChannels, rule)
      arguments.whole_number(f"groups[{i}].channels", group.channels)
      for cost in ("macs_per_channel", "macs_per_pair"):
        value = getattr(group, cost)
        arguments.number(f"groups[{i}].{cost}", value, ">= 0", lambda v: v >= 0)
    check_gate_settings("settings", self.settings)

  def _logits(self, x: Array, units: int, train: bool) -> Array:
    """Returns the `[N, units]` log-odds of being open."""
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
      # The draw takes the type of its rate: float32, also with `jax_enable_x64`.
      rate = jnp.float32(s.initial_open)

      def draw_at_rate(key, row):
        """Draws the gates of one example, `[units]`."""
        return jax.random.bernoulli(key, rate, row.shape).astype(row.dtype)

      return self._drawn(draw_at_rate, logits, train)
    if s.relaxation == "sigmoid":
      return jax.nn.sigmoid(logits)
    sample, at_rest = relaxations.straight_through_gate, relaxations.threshold_gate
    if s.relaxation == "hard_concrete":
      # So that sigmoid(logit) is P(gate > 0) for this relaxation too.
      logits = relaxations.hard_concrete_location(logits, s.temperature)
      sample, at_rest = relaxations.hard_concrete, relaxations.hard_concrete_mean
    if not train:
      return at_rest(logits)
    # The collection, where it is given, has priority over the settings.
    scale = self.get_variable(NOISE, _SCALE, s.noise_scale)

    def draw_around(key, row):
      """Draws the gates of one example from its logits, `[units]`."""
      return sample(key, row, s.temperature, noise_scale=scale)

    return self._drawn(draw_around, logits, train)

  def _drawn(self, sample: Callable[[Array, Array], Array], logits: Array, train: bool) -> Array:
    """Returns each example's `sample(key, logits)`.

    Evaluation has no key: its draws are the same in every batch.
    """
    if train:
      keys = collectives.example_keys(self.make_rng(GATE_RNG), logits.shape[0], self.axis_name)
    else:
      # Gates of different layers must differ, so the key comes from the module's path. CRC-32 is
      # the same in every process, unlike `hash`.
      key = jax.random.fold_in(jax.random.key(0), zlib.crc32("/".join(self.path).encode()))
      keys = collectives.example_keys(key, logits.shape[0], None)
    return jax.vmap(sample)(keys, logits)


def apply_gates(x: Array, gates: AnyArray) -> Array:
  """Switches channels: `[N, H, W, C]` features times `[N, C / b]` gates of b channels each.

  The b channels of a gate are adjacent. The result has the type of the features; float32 if they
  are whole numbers, which relaxed gates do not keep whole.

  Raises:
    ValueError: the shapes do not fit together.
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
  # One gate per channel, broadcast over all axes between the first and the last.
  gates = jnp.repeat(gates, x.shape[-1] // gates.shape[1], axis=1)
  gates = gates.reshape(gates.shape[0], *[1] * (x.ndim - 2), gates.shape[1])
  return x * gates.astype(x.dtype)
