"""Segment gates and policies: which segments of a video run.

A gate sees every segment and its context; a policy needs no training. Every selector maps the light
net's features to one `GateRecord` whose units are the segments.

Axes: B videos, T segments, C features, K concepts.
Reference: Hussein et al., 2020 (TimeGate); Korbar et al., 2019 (SCSampler).
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.checks import one_of
from gating_jax.layers.gate import (
  GATE_RNG,
  GateSettings,
  check_examples,
  check_gate_settings,
  check_sampling,
)
from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives, relaxations, selection
from gating_jax.types import Array, GateRecord

SEGMENT_CONTEXTS = ("none", "attention", "convolution")


def _clipped_sigmoid(key: Array, logits: Array, *, temperature: float, noise_scale: float) -> Array:
  """Computes gates that are not drawn, with the arguments of those that are."""
  return relaxations.clipped_sigmoid(logits)


SEGMENT_RELAXATIONS = {
  "straight_through": relaxations.straight_through_gate,
  "soft": relaxations.binary_concrete,
  "clipped_sigmoid": _clipped_sigmoid,
}
POLICIES = ("all", "uniform", "random", "oracle", "prefix")
# Name of the layer whose kernel has the concepts as its columns.
CONCEPTS = "concepts"
# Segments that the convolution over time sees.
_WINDOW = 7


@dataclasses.dataclass(frozen=True)
class SegmentGateSettings:
  """Settings of how segment gates are built and sampled.

  Attributes:
    concepts: K, number of vectors that segments are compared with.
    context: how a gate sees the other segments: `none`, `attention` or `convolution` over time.
    relaxation: gates of training: `straight_through`, `soft` (binary concrete) or
      `clipped_sigmoid`.
    gate: former way to set the four fields below; it warns.
    hidden, initial_open, temperature, noise_scale: as in `GateSettings`.
  Raises:
    ValueError, TypeError: a field out of range or of another kind.

  >>> SegmentGateSettings(concepts=16, context="none").initial_logit
  0.0
  """

  concepts: int = 128
  context: str = "attention"
  relaxation: str = "straight_through"
  gate: dataclasses.InitVar[GateSettings | None] = None
  hidden: int = 64
  initial_open: float = 0.5
  temperature: float = relaxations.DEFAULT_TEMPERATURE
  noise_scale: float = 1.0

  def __post_init__(self, gate: GateSettings | None):
    if gate is not None:
      check_gate_settings("gate", gate)
      warnings.warn(
        "gate is now given by its fields hidden, initial_open, temperature and noise_scale",
        DeprecationWarning,
        stacklevel=3,
      )
      # Segments have their own contexts and relaxations, and no other field of channels' gates.
      for name in ("normalise", "threshold", "share", "weighted", "prior"):
        unset, value = getattr(GateSettings, name), getattr(gate, name)
        if value != unset:
          raise ValueError(f"gate {name} of segments must be {unset!r}; got {value!r}")
      for name in ("hidden", "initial_open", "temperature", "noise_scale"):
        # The dataclass is frozen.
        object.__setattr__(self, name, getattr(gate, name))
    one_of("gate context", self.context, SEGMENT_CONTEXTS)
    one_of("gate relaxation", self.relaxation, SEGMENT_RELAXATIONS)
    arguments.whole_number("gate concepts", self.concepts)
    check_sampling(self)

  @property
  def initial_logit(self) -> float:
    """Returns the log-odds of `initial_open`."""
    return math.log(self.initial_open / (1 - self.initial_open))


class SegmentGate(nn.Module):
  """A gate per segment, from its and the other segments' similarities with concepts.

      h = Dense(ReLU(BN(x . concepts)));   h = h + context(h);   logit = Dense(ReLU(Dense(h)))

  `[B, T, C]` light features and `valid` `[B, T]` to a `GateRecord` of `[B, T]`. At least one
  segment of every video is open: the likeliest, if no other is. The statistics of training include
  all T segments, padding too: devices with more or less padding then agree with one device that
  holds the whole batch.

  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> gate = SegmentGate(SegmentGateSettings(concepts=4, hidden=8, context="none"))
  >>> x, valid = jnp.ones((2, 6, 3)), jnp.ones((2, 6), bool)
  >>> record, _ = jax.jit(gate.init_with_output)(jax.random.key(0), x, valid)
  >>> record.gates.shape
  (2, 6)
  """

  settings: SegmentGateSettings = SegmentGateSettings()
  macs_per_unit: int = 0
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, valid: Array, train: bool = False) -> GateRecord:
    rule = "SegmentGateSettings, such as SegmentGateSettings(concepts=128)"
    arguments.instance("settings", self.settings, SegmentGateSettings, rule=rule)
    s = self.settings
    check_examples(x, train)
    arguments.real_array("valid", valid, "[B, T]")
    if x.ndim != 3 or valid.shape != x.shape[:2]:
      raise ValueError(
        f"x must be [B, T, C] and valid [B, T]; got x {x.shape}, valid {valid.shape}"
      )
    # x . concepts of the equation, in float32 as all gates.
    similarity = nn.Dense(s.concepts, use_bias=False, name=CONCEPTS)(x.astype(jnp.float32))
    h = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
    )(similarity)
    h = nn.Dense(s.hidden, name="project")(nn.relu(h))
    if s.context == "attention":
      h += Attention(name="context")(h, valid)
    elif s.context == "convolution":
      # The convolution reads zeros in the padding, as beyond the video's ends.
      seen = h * valid[..., None].astype(h.dtype)
      h += nn.Conv(s.hidden, (_WINDOW,), feature_group_count=s.hidden, name="context")(seen)
    h = nn.relu(nn.Dense(s.hidden, name="hidden")(h))
    bias = nn.initializers.constant(s.initial_logit)
    # A scalar per segment; the last axis of length 1 goes.
    logits = nn.Dense(1, bias_init=bias, name="logits")(h)[..., 0]
    gates = self._sample(logits) if train else relaxations.threshold_gate(logits)
    return GateRecord(
      logits=logits,
      probs=jax.nn.sigmoid(logits),
      gates=selection.ensure_one_open(gates, logits, valid),
      macs_per_unit=self.macs_per_unit,
    )

  def _sample(self, logits: Array) -> Array:
    keys = collectives.example_keys(self.make_rng(GATE_RNG), logits.shape[0], self.axis_name)
    s = self.settings
    relax = SEGMENT_RELAXATIONS[s.relaxation]

    def sample(key, row):
      """Draws the gates of one video's segments, `[T]`."""
      return relax(key, row, temperature=s.temperature, noise_scale=s.noise_scale)

    return jax.vmap(sample)(keys, logits)


class Attention(nn.Module):
  """One head of dot-product self-attention over the valid segments, `[B, T, C]` to `[B, T, C]`.

  Reference: Vaswani et al., 2017.
  """

  @nn.compact
  def __call__(self, x: Array, valid: Array) -> Array:
    width = x.shape[-1]
    normed = nn.LayerNorm(name="norm")(x)
    # JAX wants an axis of heads, here of length 1.
    query = nn.Dense(width, name="query")(normed)[:, :, None]
    key = nn.Dense(width, name="key")(normed)[:, :, None]
    value = nn.Dense(width, name="value")(normed)[:, :, None]
    # Padding is seen by no segment.
    seen = jax.nn.dot_product_attention(query, key, value, mask=valid[:, None, None, :])
    return nn.Dense(width, name="out")(seen[:, :, 0])


class Policy(nn.Module):
  """A fixed choice of a fraction of each video's segments.

  `all`: whatever the fraction; `uniform`: evenly spaced; `random`; `oracle`: the relevant ones
  first; `prefix`: the first ones in the order of FrameExit. In training, `prefix` takes a random
  number of them, which teaches a classifier to work with any number.

  Attributes:
    policy: one of `POLICIES`.
    share: fraction of the valid segments in (0, 1], or their number if an int; see
      `selection.budget_to_k`.
    macs_per_unit: MACs of one segment.
    axis_name: mapped device axis of the batch.
  """

  policy: str
  share: float = 1.0
  macs_per_unit: int = 0
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self, valid: Array, relevant: Array | None = None, train: bool = False
  ) -> GateRecord:
    one_of("policy", self.policy, POLICIES)
    k = selection.budget_to_k(valid, share=self.share)
    valid = jnp.asarray(valid)
    if self.policy == "all":
      gates = valid.astype(jnp.float32)
    elif self.policy == "uniform":
      gates = selection.uniform_k(valid, k=k)
    elif self.policy == "random":
      # Evaluation has no PRNG stream: its choice is the same in every run.
      key = self.make_rng(GATE_RNG) if train else jax.random.key(0)
      gates = selection.random_k(key, valid, k=k, axis_name=self.axis_name if train else None)
    elif self.policy == "prefix":
      gates = selection.first_k(valid, k=self._drawn_k(valid) if train else k)
    elif relevant is None:
      raise ValueError("relevant must be given for the oracle, which chooses by it; got None")
    else:
      (relevant,) = arguments.one_shape("[B, T]", relevant=relevant)
      gates = selection.top_k(relevant.astype(jnp.float32), valid, k=k)
    return deterministic_record(gates, macs_per_unit=self.macs_per_unit)

  def _drawn_k(self, valid: Array) -> Array:
    """Returns `[B]` numbers from 1 to each video's number of valid segments."""
    keys = collectives.example_keys(self.make_rng(GATE_RNG), valid.shape[0], self.axis_name)
    counts = jnp.sum(valid, axis=1, dtype=jnp.int32)
    return jax.vmap(lambda key, n: jax.random.randint(key, (), 1, n + 1, jnp.int32))(keys, counts)


@former_positional("macs_per_unit")
def deterministic_record(gates: Array, *, macs_per_unit: int) -> GateRecord:
  """Returns the record of gates that were not sampled: their probabilities are 0 and 1.

  Args:
    gates: `[B, T]`, 0 or 1.
    macs_per_unit: MACs of one segment.
  Raises:
    TypeError: gates that are no real numbers.

  >>> deterministic_record(jnp.array([[1.0, 0.0]]), macs_per_unit=72).logits
  Array([[ inf, -inf]], dtype=float32)
  """
  arguments.real_array("gates", gates)
  gates = jnp.asarray(gates)
  logits = jnp.where(gates > 0, jnp.full_like(gates, jnp.inf), -jnp.inf)
  return GateRecord(logits=logits, probs=gates, gates=gates, macs_per_unit=macs_per_unit)
