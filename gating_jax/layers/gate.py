"""The gate: a small network that reads a feature map and decides, per example, which units run.

A gate without an input is one parameter per unit: a mask for all examples. With hard concrete gates
this is L0 regularisation, which closes units permanently.

Thresholds are 0, or quantiles of a layer's logits, which open a given fraction of its gates in
every batch. `shift_thresholds` moves them after training: one net then serves several budgets.

Gates with a prior begin the same for all examples, as static pruning by that prior would be.

Axes: N examples, H and W pixels, D input channels, C gated units.
Reference: Veit and Belongie, 2018; Bejnordi et al., 2020, section 3; Serra et al., 2018 (masks);
  Louizos et al., 2018, "Learning sparse neural networks through L0 regularization"; Hu et al.,
  "Squeeze-and-excitation networks", 2018 (scales).
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
from gating_jax.layers.context import (
  GLANCE_NAME,
  NOTHING_SHARED,
  PARTS,
  SHARED_PARTS,
  Shared,
  context_of,
  shared_part,
)
from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives, quantiles, relaxations
from gating_jax.ops.arguments import float_dtype
from gating_jax.ops.macs import UnitMacs
from gating_jax.types import AnyArray, Array, GateRecord, Path, Records

# Name of every gate module inside its block; `is_gate_path` recognises gates by it.
GATE_NAME = "gate"
# Path, inside the gate, of the layer that makes its logits.
LOGITS = ("head", "logits")
# Name of the PRNG stream for the gates' noise.
GATE_RNG = "gate"
# Collection that sets the noise and the fraction of open gates for one pass; see `gate_controls`.
NOISE = "noise"
# Log-odds of a gate that never opens, set as its bias, without a kernel. Such a gate is neither
# normalised nor ranked.
SHUT = -1e3
# Gatings of networks whose only gates are those of channels.
CHANNEL_GATINGS = ("none", "channel")
# Contexts that are no sum of parts: nothing is read.
_ALONE = ("none", "random", "assigned")
CONTEXTS = (*PARTS, *_ALONE)
RELAXATIONS = ("straight_through", "hard_concrete", "sigmoid", "scale")
THRESHOLDS = ("zero", "quantile")
# Names in the collection `noise`.
_SCALE, _SHARE, _SOFTNESS = "scale", "share", "softness"
# Names in `batch_stats`: of the running mean of thresholds, and of what `shift_thresholds` adds.
THRESHOLD, SHIFT = "threshold", "shift"
# Names in `params` of gates that have a prior: what is added to their logits, and the factor of
# the outputs of a gate network.
PRIOR, GAIN = "prior", "gain"
# Decay of the running mean of thresholds, as of BatchNorm's statistics.
_MOMENTUM = 0.9
# Log-odds, up to the sign, of gates that are assigned.
_DECIDED = 20.0


def is_gate_path(path: Sequence[str]) -> bool:
  """Returns True for the path of a gate network's module or parameter, or of a glance's."""
  return GATE_NAME in path or GLANCE_NAME in path


def gate_controls(
  params: Mapping[str, Any],
  *,
  noise_scale: ArrayLike | None = None,
  share: ArrayLike | None = None,
  softness: ArrayLike | None = None,
) -> dict[str, Any]:
  """Returns the collection `noise`, which replaces settings of every gate for one pass.

      model.apply({"params": params, NOISE: gate_controls(params, share=0.5)}, x, train=True, ...)

  Args:
    params: the model's parameters, from which the paths of the gates are taken.
    noise_scale: replaces the setting of that name; a number or a traced scalar; None leaves it.
    share: likewise, the fraction of gates that a quantile opens.
    softness: likewise, T of `KernelWeights`, which is 1 otherwise.

  >>> gate_controls({"block1": {"conv": 0, "gate": {"logits": 0}}}, share=0.5)
  {'block1': {'gate': {'share': 0.5}}}
  """
  arguments.instance("params", params, Mapping, rule="a tree of parameters")
  values = {}
  for name, value in ((_SCALE, noise_scale), (_SHARE, share), (_SOFTNESS, softness)):
    if value is not None:
      values[name] = value
  controls = {}
  for path in traverse_util.flatten_dict(params):
    if GATE_NAME in path:
      # Many parameters lie under one gate; the same key for all of them leaves one entry.
      gate = path[: path.index(GATE_NAME) + 1]
      controls |= {(*gate, name): value for name, value in values.items()}
  return traverse_util.unflatten_dict(controls)


@former_positional("shift")
def shift_thresholds(variables: Mapping[str, Any], *, shift: float | Array) -> dict[str, Any]:
  """Returns variables of a model in which all thresholds of its gates are moved.

      open where z > theta + shift,   for every layer of gates with `threshold="quantile"`

  A shift above 0 closes gates, one below 0 opens them: one trained net has a curve of accuracy
  against MACs. It acts in evaluation alone, and shifts add up. The weight of an open unit stays
  that of training, 2 sigmoid(z - theta), so that units which training has left closed count less
  than 1. The argument is not changed.

  Args:
    variables: `params` and `batch_stats` of any model, or of several, stacked.
    shift: in units of the logits; may be traced.
  Raises:
    ValueError: no gate has a threshold.
    TypeError: variables that are no mapping.

  >>> stats = {"block1": {"gate": {"threshold": jnp.float32(0.5)}}}
  >>> moved = shift_thresholds({"batch_stats": stats}, shift=1.0)
  >>> print(moved["batch_stats"]["block1"]["gate"]["shift"])
  1.0
  """
  arguments.instance("variables", variables, Mapping, rule="a mapping with params and batch_stats")
  flat: dict[Path, Any] = traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))
  moved = {}
  for path, leaf in flat.items():
    if path[-1] == THRESHOLD and GATE_NAME in path:
      own = (*path[:-1], SHIFT)
      before = jnp.asarray(flat.get(own, jnp.zeros(jnp.shape(leaf), jnp.float32)))
      moved[own] = before + jnp.asarray(shift, before.dtype)
  if not moved:
    raise ValueError(
      "variables must have thresholds of gates, those of threshold='quantile'; got none"
    )
  return {**variables, "batch_stats": traverse_util.unflatten_dict({**flat, **moved})}


@dataclasses.dataclass(frozen=True)
class GateSettings:
  """Settings of how gates are built, normalised, opened and sampled.

  From the logits z of a gate network to the gates g of one layer:

      z <- s BatchNorm(z)                     normalise s > 0, without scale and offset
      v  = gain z,   z <- v + prior           prior: two parameters of each gate
      z <- z - theta                          threshold; what records have as logits
      a  = 1[z + noise > 0]                   relaxation
      g  = a w,   w = 2 sigmoid(z)            weighted; otherwise w = 1
                  w = 2 sigmoid(v)            weighted, with a prior

  Attributes:
    hidden: width of the gate network's hidden layer.
    initial_open: P(open) from which the last bias starts, in (0, 1). Gates that are normalised, or
      whose threshold is a quantile, do not depend on it.
    temperature: of the relaxation, > 0; with `straight_through` it affects only the backward pass.
    noise_scale: multiplies the logistic noise of training; 1 makes P(open) = sigmoid(logit).
    context: input of a channel gate. One or several, joined by `+`, of `pooled`, the mean over
      pixels; `moments`, mean and deviation; `grid`, means of 2 x 2 quarters; `glance`, a light look
      at the whole image, the same for all gates; `told`, the number of the image's source, where
      the network has `sources`. Or `none`: no input, the logits are parameters; `random`: nothing
      is learnt, and gates are drawn at the rate `initial_open` in training and evaluation;
      `assigned`: nothing is learnt, and each source has a fixed, random set of open gates, `share`
      of all.
    relaxation: of channel gates. `straight_through`: sampled in training, and 0/1; `hard_concrete`:
      sampled in training and in [0, 1], with exact zeros also in evaluation; `sigmoid`: the
      probability itself, never sampled; `scale`: 2 sigmoid(z), which multiplies channels and never
      closes one, as in squeeze-and-excitation. A network with scales is an ungated one: it has no
      records.
    block: adjacent channels that share one gate. A layer of fewer channels has one gate; otherwise
      its channels must be a multiple of the block, for equal costs of all its gates.
    normalise: s, 0 or more. 0: logits as they are; otherwise s BatchNorm(z) of each gate, over the
      batch and all devices.
    threshold: `zero`; or `quantile`: theta is the (1 - share) quantile of the layer's logits over
      batch and gates, see `ops.quantiles.open_threshold`, and in evaluation its running mean. The
      gates of a layer are all those of one gate network.
    prior: whether each gate has a prior and a gain, learnt from 0. With a gain of 0 a gate is the
      same for all examples: open where its prior is above the threshold, with a weight of exactly
      1. It becomes conditional as far as its gain leaves 0. `analysis.with_prior` sets both.
    share: fraction in (0, 1] of a layer's gates that the quantile opens; see `gate_controls` for
      one that changes in training.
    weighted: whether an open unit counts w = 2 sigmoid(z), and a closed one exactly 0. w is 1 or
      more unless noise, a shift of the threshold, or a prior has opened the unit. The gradient
      through w is exact for open units; the straight-through gradient only decides.
  Raises:
    ValueError: a field out of range, or one that is incompatible with another.
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
  normalise: float = 0.0
  threshold: str = "zero"
  share: float = 1.0
  weighted: bool = False
  prior: bool = False

  def __post_init__(self):
    check_sampling(self)
    arguments.whole_number("gate block", self.block)
    arguments.number("gate normalise", self.normalise, ">= 0", holds=lambda v: 0 <= v < math.inf)
    arguments.number("gate share", self.share, "in (0, 1]", holds=lambda v: 0 < v <= 1)
    arguments.instance("gate weighted", self.weighted, bool, rule="True or False")
    arguments.instance("gate prior", self.prior, bool, rule="True or False")
    _check_context(self.context)
    one_of("gate relaxation", self.relaxation, RELAXATIONS)
    one_of("gate threshold", self.threshold, THRESHOLDS)
    if self.context == "random" and self.relaxation != "straight_through":
      raise ValueError(
        f"gate relaxation must be straight_through if context is random; got {self.relaxation!r}"
      )
    self._check_together()

  def _check_together(self) -> None:
    """Raises a ValueError where a setting would be ignored, or makes no sense with another."""

    def refuse(name: str, is_set: bool, rule: str, why: str) -> None:
      """Raises a ValueError if the setting has another value than the rule's."""
      if is_set:
        raise ValueError(f"gate {name} must be {rule} {why}; got {getattr(self, name)!r}")

    learnt = self.context not in ("random", "assigned")
    hard = self.relaxation == "straight_through"
    quantile = self.threshold == "quantile"
    if self.context == "none":
      # The same logits for all examples have no deviation, and are a prior themselves.
      refuse("normalise", self.normalise > 0, "0", why="if context is none")
      refuse("prior", self.prior, "False", why="if context is none")
    for name, is_set, rule in (
      ("normalise", self.normalise > 0, "0"),
      ("threshold", quantile, "zero"),
      ("weighted", self.weighted, "False"),
      ("prior", self.prior, "False"),
    ):
      if not learnt:
        refuse(name, is_set, rule, why=f"if context is {self.context}")
      if not hard:
        refuse(name, is_set, rule, why=f"if relaxation is {self.relaxation}")
    if not quantile and self.context != "assigned":
      refuse(
        "share", self.share < 1, "1", why="unless threshold is quantile or context is assigned"
      )
    if self.relaxation == "scale" and self.context in _ALONE:
      refuse("context", True, "a sum of parts such as pooled", why="if relaxation is scale")
    if self.context == "assigned":
      refuse("relaxation", not hard, "straight_through", why="if context is assigned")

  @property
  def parts(self) -> tuple[str, ...]:
    """Returns the parts of the context, some of `PARTS`; none where a gate reads nothing."""
    return () if self.context in _ALONE else tuple(self.context.split("+"))

  @property
  def shared_parts(self) -> tuple[str, ...]:
    """Returns the parts of the context that the network computes once for all gates."""
    parts = ("told",) if self.context == "assigned" else self.parts
    return tuple(part for part in parts if part in SHARED_PARTS)

  @property
  def decides(self) -> bool:
    """Returns whether gates close units; False for scales, which only multiply them."""
    return self.relaxation != "scale"

  @property
  def initial_logit(self) -> float:
    """Returns the log-odds of `initial_open`; 0 for scales, which begin at 1."""
    if not self.decides:
      return 0.0
    return math.log(self.initial_open / (1 - self.initial_open))

  @property
  def drawn_noise_scale(self) -> float:
    """Returns s such that a gate in training is open with probability sigmoid(logit / s).

    It is 0 where gates are not sampled.
    """
    if self.relaxation in ("sigmoid", "scale"):
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


def _check_context(context: object) -> None:
  """Raises an error unless a context is one of those that stand alone, or a sum of parts."""
  parts = context.split("+") if isinstance(context, str) else [context]
  for part in parts:
    one_of("gate context", part, PARTS if len(parts) > 1 else CONTEXTS)
  if len(set(parts)) < len(parts):
    raise ValueError(f"gate context must name each part once; got {context!r}")


def check_sampling(gate: Any) -> None:
  """Raises an error unless the fields that settings of all gates have are in their range."""
  arguments.whole_number("gate hidden", gate.hidden)
  arguments.number("gate initial_open", gate.initial_open, "in (0, 1)", holds=lambda v: 0 < v < 1)
  arguments.number("gate temperature", gate.temperature, "> 0", holds=lambda v: 0 < v < math.inf)
  arguments.number("gate noise_scale", gate.noise_scale, ">= 0", holds=lambda v: 0 <= v < math.inf)


def check_gate_settings(name: str, settings: object) -> None:
  """Raises a TypeError unless `settings` are `GateSettings`."""
  arguments.instance(
    name, settings, GateSettings, rule="GateSettings, such as GateSettings(hidden=16)"
  )


class GateHead(nn.Module):
  """Context to one logit per unit: Dense, BatchNorm, ReLU, Dense.

  `[N, H, W, D]` or `[N, D]` to `[N, units]`, computed in float32. The context is the mean over
  pixels, or the one that the settings name. In training a batch without examples is a ValueError:
  its mean is NaN, which BatchNorm would keep. `shared` holds what the network computes for all its
  gates.

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
  def __call__(self, x: Array, train: bool = False, shared: Shared = NOTHING_SHARED) -> Array:
    s = self.settings
    check_gate_settings("settings", s)
    arguments.whole_number("units", self.units)
    check_examples(x, train)
    # A decision near 0 must not depend on the rounding of bfloat16.
    x = x.astype(jnp.float32)
    # Settings without a context to read are those of other gates, as in a mixture of experts.
    context = context_of(x, s.parts or ("pooled",), shared)
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

  Called with `[N, H, W, D]`, it returns one `GateRecord` per group, in which gates are >= 0 and a
  unit is open where its gate is above 0. With `train=True` gates are sampled and need a PRNG stream
  named `gate`. The noise of an example depends on its place in the whole batch, not on its device.
  `shared` holds the parts of the context that the network computes once, such as a `Glance`.

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
  def __call__(self, x: Array, train: bool = False, shared: Shared = NOTHING_SHARED) -> Records:
    self._check()
    check_examples(x, train)
    units = [self._units(group.channels) for group in self.groups]
    # One head decides on the units of all groups, which are then split.
    trained, weighing = self._relative(self._logits(x, sum(units), train, shared=shared), train)
    logits = self._shifted(trained, train)
    # Before the splits: the order in which the logits' gradients add up is that of these lines.
    probs, gates = jax.nn.sigmoid(logits), self._gates(logits, train)
    if self.settings.weighted:
      # g = a w: closed gates are exactly 0, whatever w is. A shift changes a alone.
      gates = gates * (2 * jax.nn.sigmoid(weighing))
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
      cost = UnitMacs(group.macs_per_channel, group.macs_per_pair).of_gate(size, before)
      record = GateRecord(
        logits=logits_of[i],
        probs=probs_of[i],
        gates=gates_of[i],
        macs_per_unit=cost.alone,
        macs_per_pair=cost.per_pair,
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
      arguments.instance(f"groups[{i}]", group, GatedChannels, rule=rule)
      arguments.whole_number(f"groups[{i}].channels", group.channels)
      for cost in ("macs_per_channel", "macs_per_pair"):
        value = getattr(group, cost)
        arguments.number(f"groups[{i}].{cost}", value, ">= 0", holds=lambda v: v >= 0)
    check_gate_settings("settings", self.settings)

  def _relative(self, logits: Array, train: bool) -> tuple[Array, Array]:
    """Returns the logits `[N, units]` relative to the threshold, and those of weights."""
    s = self.settings
    if not s.normalise and s.threshold == "zero" and not s.prior:
      return logits, logits
    # Gates that are closed permanently stay closed, without a deviation or a place among others.
    # They have exactly this value, which no kernel arrives at: other low logits have a place.
    counts, z = logits != SHUT, logits
    if s.normalise:
      norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=_MOMENTUM,
        use_bias=False,
        use_scale=False,
        axis_name=self.axis_name,
        name="normalised",
      )
      z = float(s.normalise) * norm(z)
    weighing = None
    if s.prior:
      # The prior only opens: a unit that all examples open is the one of the network without gates.
      weighing = self._parameter(GAIN, z) * z
      z = weighing + self._parameter(PRIOR, z)
    if s.threshold == "quantile":
      z = z - self._quantile(z, counts, train)
    relative = jnp.where(counts, z, logits)
    return relative, relative if weighing is None else jnp.where(counts, weighing, logits)

  def _parameter(self, name: str, z: Array) -> Array:
    """Returns a parameter of each gate that is learnt from 0, as `[1, units]` for `[N, units]`."""
    return self.param(name, nn.initializers.zeros, z.shape[-1:], jnp.float32)[None]

  def _shifted(self, logits: Array, train: bool) -> Array:
    """Returns the logits of evaluation relative to a threshold that has been moved, if it has."""
    shift = self.get_variable("batch_stats", SHIFT)
    if train or shift is None:
      return logits
    return logits - shift

  def _quantile(self, z: Array, counts: Array, train: bool) -> Array:
    """Returns the threshold of a batch in training, and the running mean of such in evaluation.

    Args:
      z: `[N, units]` logits.
      counts: `[N, units]`, whether a logit is ranked.
      train: whether the batch is one of training.
    """
    kept = self.variable("batch_stats", THRESHOLD, lambda: jnp.zeros((), jnp.float32))
    if not train:
      return kept.value
    # The collection, where it is given, has priority over the settings.
    share = self.get_variable(NOISE, _SHARE, self.settings.share)
    found = quantiles.open_threshold(
      z, share=share, axis_name=self.axis_name, weights=counts.astype(z.dtype)
    )
    if not self.is_initializing():
      kept.value = _MOMENTUM * kept.value + (1 - _MOMENTUM) * found
    return found

  def _logits(self, x: Array, units: int, train: bool, shared: Shared) -> Array:
    """Returns the `[N, units]` log-odds of being open."""
    s = self.settings
    if s.parts:
      return GateHead(units, s, self.axis_name, name="head")(x, train, shared)
    if s.context == "assigned":
      return self._assigned(units, shared)
    start = nn.initializers.constant(s.initial_logit)
    if s.context == "none":
      logits = self.param("logits", start, (units,), jnp.float32)
    else:
      logits = jnp.full(units, s.initial_logit, jnp.float32)
    return jnp.broadcast_to(logits, (x.shape[0], units))

  def _assigned(self, units: int, shared: Shared) -> Array:
    """Returns log-odds `[N, units]` that open the same gates for all examples of a source."""
    told, rows = shared_part(shared, "told"), []
    for source in range(told.shape[-1]):
      # Sets of layers and of sources differ, and are the same in every process.
      seed = (zlib.crc32("/".join(self.path).encode()), source)
      order = np.random.default_rng(seed).permutation(units)
      rows.append(order < max(1, round(self.settings.share * units)))
    table = np.where(np.stack(rows), _DECIDED, -_DECIDED).astype(np.float32)
    return jnp.asarray(table)[jnp.argmax(told, axis=-1)]

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
    if not s.decides:
      return 2 * jax.nn.sigmoid(logits)
    sample, at_rest = relaxations.straight_through_gate, relaxations.threshold_gate
    if s.relaxation == "hard_concrete":
      # So that sigmoid(logit) is P(gate > 0) for this relaxation too.
      logits = relaxations.hard_concrete_location(logits, temperature=s.temperature)
      sample, at_rest = relaxations.hard_concrete, relaxations.hard_concrete_mean
    if not train:
      return at_rest(logits)
    # The collection, where it is given, has priority over the settings.
    scale = self.get_variable(NOISE, _SCALE, s.noise_scale)

    def draw_around(key, row):
      """Draws the gates of one example from its logits, `[units]`."""
      return sample(key, row, temperature=s.temperature, noise_scale=scale)

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


class KernelWeights(nn.Module):
  """Weights of mixed kernels, from one `GateHead` for all convolutions of a block.

      pi = softmax(z / T),   T = 1 unless `gate_controls` sets it

  `[N, H, W, D]` to one `[N, K]` for each convolution, in float32. A large T makes all kernels learn
  at first.

  Reference: Chen et al., "Dynamic convolution", 2020, section 3.3 (a softmax that is flat early).
  """

  convolutions: int
  kernels: int
  settings: GateSettings = GateSettings()
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, x: Array, train: bool = False, shared: Shared = NOTHING_SHARED
  ) -> tuple[Array, ...]:
    head = GateHead(self.convolutions * self.kernels, self.settings, self.axis_name, name="head")
    softness = self.get_variable(NOISE, _SOFTNESS, 1.0)
    # A softness of any floating type leaves the weights in float32.
    logits, softness = arguments.aligned(head(x, train, shared), softness)
    logits = logits / softness
    weights = []
    for z in jnp.split(logits, self.convolutions, axis=-1):
      weights.append(jax.nn.softmax(z, axis=-1))
    return tuple(weights)


def decisions(records: Records, settings: GateSettings) -> Records:
  """Returns the records of gates that decide; none of scales, with which a network is ungated."""
  return records if settings.decides else ()


def apply_gates(x: Array, gates: AnyArray) -> Array:
  """Switches channels: `[N, H, W, C]` features times `[N, C / b]` gates of b channels each.

  The b channels of a gate are adjacent. The result has the type of the features; float32 if they
  are whole numbers, which relaxed gates do not keep whole.

  Args:
    x: `[N, H, W, C]` features, or of any number of axes between the first and the last.
    gates: `[N, C / b]`, one for b adjacent channels.
  Returns:
    The gated features, of the shape of `x`.
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
