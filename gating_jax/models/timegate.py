"""Networks for long videos: a light net sees all segments, a heavy net only the chosen ones.

A selector chooses the segments. The learned one compares every segment with concepts: typical
features, which `find_concepts` finds before training.

Inputs are a dict: `light` `[B, T, ...]`, the light net's input for each segment (its centre frame);
`heavy` `[B, T, ...]`, the heavy net's (its clip); `valid` `[B, T]`, False where a shorter video was
padded; and for the `oracle`, `relevant` `[B, T]`.

Axes: B videos, T segments, C features, n segments of all videos, k concepts.
Reference: Hussein et al., 2020 (TimeGate); Ghodrati et al., 2021 (FrameExit); Korbar et al., 2019
(SCSampler); Arthur and Vassilvitskii, 2007 (k-means++).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import one_of
from gating_jax.extras import naming_extra
from gating_jax.layers.gate import GATE_NAME, check_examples
from gating_jax.layers.segment_gate import (
  POLICIES,
  Policy,
  SegmentGate,
  SegmentGateSettings,
  deterministic_record,
)
from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives, selection
from gating_jax.ops.arguments import as_float
from gating_jax.ops.compaction import open_backward
from gating_jax.types import AnyArray, Apply, Array, GateRecord, Records

SELECTIONS = ("gate", "confidence", *POLICIES)
# Collection of variables with a threshold that training does not change, by the selection's name.
THRESHOLDS = "thresholds"
POOLINGS = ("max", "mean", "attention")
# Hidden units, Dropout's probability and slope of LeakyReLU in `Classifier`.
_HIDDEN, _DROPOUT, _LEAK = 512, 0.25, 0.2

Inputs = Mapping[str, Array]
Outputs = Mapping[str, Array]


class SegmentNet(nn.Module):
  """Network for long videos that runs its heavy part on chosen segments.

  Called on a batch of videos, it returns `(outputs, records)`. `outputs["logits"]` is
  `[B, classes]`; `outputs["light_logits"]` is `[B, T, classes]`, where the light net has a head.
  The first record is that of the segments, `[B, T]`; those of the heavy net's channels,
  `[B * T, ...]`, follow.

  Attributes:
    classes: number of outputs.
    light, heavy: modules of `[N, ...] -> ([N, C], records)`; `light` may be None where nothing
      reads it.
    selection: `gate`, learned; `confidence`, the light net's largest class probability; or one of
      `POLICIES`. Where the variables have `confidence` in the collection `THRESHOLDS`, segments
      above that probability are chosen, at least one of each video, whatever `share` is.
    share: fraction of the valid segments that a fixed selection takes; see `selection.budget_to_k`.
    light_head: whether the light net also classifies every segment on its own.
    pooling: over the chosen segments: `max`, `mean` or `attention`.
    gate: settings of the learned gate.
    macs_per_segment: MACs of the heavy net for one segment.
    axis_name: mapped device axis over which the batch is spread.
    backward_capacity: largest number of chosen segments in a training batch; the heavy net's
      backward pass runs on no more, see `open_backward`. None: on all. The heavy net must treat
      each clip alone and have no gates.
  Raises:
    TypeError, ValueError: when called, a field or an input of another kind or out of range.

  >>> from gating_jax.models.video_backbones import FeaturePool
  >>> model = SegmentNet(classes=10, light=FeaturePool(), heavy=FeaturePool())
  >>> x, valid = jnp.ones((2, 6, 4)), jnp.ones((2, 6), bool)
  >>> inputs = {"light": x, "heavy": x, "valid": valid}
  >>> (outputs, (record,)), _ = jax.eval_shape(
  ...   lambda: model.init_with_output(jax.random.key(0), inputs)
  ... )
  >>> outputs["logits"].shape, record.gates.shape
  ((2, 10), (2, 6))
  """

  if TYPE_CHECKING:
    apply: ClassVar[Apply[Outputs]]

  classes: int
  light: nn.Module | None
  heavy: nn.Module
  selection: str = "gate"
  share: float = 1.0
  light_head: bool = False
  pooling: str = "max"
  gate: SegmentGateSettings = SegmentGateSettings()
  macs_per_segment: int = 0
  axis_name: str | None = None
  backward_capacity: int | None = None

  def setup(self):
    """Checks the settings and builds the selector, the light head and the classifier."""
    one_of("selection", self.selection, SELECTIONS)
    arguments.whole_number("classes", self.classes)
    arguments.instance(
      "heavy", self.heavy, nn.Module, rule="a network, such as heavy_net('r2plus1d18')"
    )
    if self.light is not None:
      arguments.instance(
        "light", self.light, nn.Module, rule="a network, such as light_net('mobilenet'), or None"
      )
    arguments.instance("gate", self.gate, SegmentGateSettings, rule="SegmentGateSettings")
    # The learned gate and the confidence read the light net's features.
    if self.light is None and (self.light_head or self.selection in ("gate", "confidence")):
      raise ValueError(
        f"light must be a net for selection {self.selection!r} or with a light head; got None"
      )
    if self.selection == "gate":
      self.selector: nn.Module = SegmentGate(
        self.gate, self.macs_per_segment, self.axis_name, name=GATE_NAME
      )
    elif self.selection in POLICIES:
      # A policy has no parameters; `confidence` needs no module at all.
      self.selector = Policy(
        policy=self.selection,
        share=self.share,
        macs_per_unit=self.macs_per_segment,
        axis_name=self.axis_name,
      )
    if self.light_head or self.selection == "confidence":
      # Built only where something reads it: an unused head would have parameters without gradients.
      self.light_classifier = nn.Dense(self.classes)
    self.classifier = Classifier(self.classes, self.pooling, self.axis_name)

  def __call__(self, inputs: Inputs, train: bool = False) -> tuple[Outputs, Records]:
    record, outputs = self.choose(inputs, train)
    _check_input(inputs, "heavy")
    clips = inputs["heavy"].reshape(-1, *inputs["heavy"].shape[2:])
    if train and self.backward_capacity is not None:
      features, records = (
        self._encode_with_open_backward(clips, record.gates.reshape(-1), self.backward_capacity),
        (),
      )
    else:
      features, records = self.encode(clips, train)
    # From `[B T, C]` back to `[B, T, C]`.
    features = features.reshape(*record.gates.shape, features.shape[-1])
    return {**outputs, "logits": self.classifier(features, record.gates, train)}, (record, *records)

  def choose(self, inputs: Inputs, train: bool = False) -> tuple[GateRecord, Outputs]:
    """Chooses segments and returns their record and the logits of the light net's head.

    `inputs["heavy"]` is not read.

    Args:
      inputs: a mapping with `valid` and, where they are used, `light` and `relevant`.
      train: whether gates are drawn and BatchNorm takes the statistics of the batch.
    Returns:
      The record of the segments, `[B, T]`, and `{"light_logits": [B, T, classes]}` or an empty
      dict.
    Raises:
      TypeError: inputs of another kind.
      ValueError: an input is missing or has another number of videos or segments.
    """
    arguments.instance(
      "inputs",
      inputs,
      Mapping,
      rule="a mapping with arrays heavy, valid and, for a light net, light",
    )
    for name in ("valid", *(("light",) if self.light is not None else ())):
      _check_input(inputs, name)
    valid, outputs = jnp.asarray(inputs["valid"]).astype(bool), {}
    if self.light is not None:
      seen = inputs["light"]
      # Both nets see segments as examples, one after the other.
      seen, _ = self.light(seen.reshape(-1, *seen.shape[2:]), train)
      seen = seen.reshape(*valid.shape, seen.shape[-1])
      if self.light_head or self.selection == "confidence":
        outputs["light_logits"] = self.light_classifier(seen)
    if self.selection == "gate":
      return self.selector(seen, valid, train), outputs
    if self.selection == "confidence":
      confidence = jnp.max(jax.nn.softmax(outputs["light_logits"]), axis=-1)
      least = self.get_variable(THRESHOLDS, "confidence")
      if least is None:
        # As many of each video's own segments as `share` asks for; padding is never chosen.
        gates = selection.top_k(confidence, valid, k=selection.budget_to_k(valid, share=self.share))
      else:
        above = (confidence > least).astype(jnp.float32)
        gates = selection.ensure_one_open(above, confidence, valid)
      return deterministic_record(gates, macs_per_unit=self.macs_per_segment), outputs
    return self.selector(valid, inputs.get("relevant"), train), outputs

  def encode(self, clips: Array, train: bool = False) -> tuple[Array, Records]:
    """Runs the heavy net on single segments, `[N, ...]` to `[N, C]`; also returns its records."""
    return self.heavy(clips, train)

  def _encode_with_open_backward(self, clips: Array, gates: AnyArray, capacity: int) -> Array:
    """Runs the heavy net on all segments; its backward pass runs on the open ones alone."""
    # A copy outside this module, since `open_backward` differentiates a pure function.
    variables, heavy = self.heavy.variables, self.heavy.clone(parent=None, name=None)
    # Statistics of a batch depend on all clips; the backward pass sees the open ones only.
    if other := variables.keys() - {"params"}:
      raise ValueError(
        "heavy must process each clip independently if backward_capacity is given: with group_norm "
        f"and without gates; got a net with {sorted(other)}"
      )

    def encode(variables, clips):
      """Runs the heavy net on single segments in training, `[K, ...]` to `[K, C]`."""
      return heavy.apply(variables, clips, True)[0]

    return open_backward(encode, variables, clips, gates=gates, capacity=capacity)

  def classify(self, features: Array, gates: Array) -> Array:
    """Computes the logits `[B, classes]` from `[B, T, C]` features of the chosen segments.

    The features of the other segments may be anything finite.
    """
    return self.classifier(features, gates)


def _check_input(inputs: Inputs, name: str) -> None:
  """Raises a TypeError or ValueError unless `inputs[name]` is `[B, T, ...]`, like `valid`."""
  if name not in inputs:
    raise ValueError(f"inputs must have {name!r}; got {', '.join(inputs)}")
  what = f"inputs[{name!r}]"
  arguments.real_array(what, inputs[name], "[B, T]" if name == "valid" else "")
  shape = np.shape(inputs["valid"])
  # Sizes may be symbols, as in `jax.export`.
  if isinstance(shape[1], int) and not shape[1]:
    raise ValueError(f"inputs must have at least one segment of each video; got {shape} of valid")
  if np.shape(inputs[name])[:2] != shape:
    raise ValueError(
      f"{what} must be [B, T, ...] like valid, {shape}; got shape {np.shape(inputs[name])}"
    )


class Classifier(nn.Module):
  """Classifier of a video: pools chosen segments, then a network with one hidden layer.

  The layers are Dropout, Dense, BatchNorm, LeakyReLU, Dropout, Dense.

  Reference: the head of Hussein et al., 2019 (Timeception's code).
  """

  classes: int
  pooling: str = "max"
  axis_name: str | None = None

  @nn.compact
  def __call__(self, features: Array, gates: AnyArray, train: bool = False) -> Array:
    # Attention weights the chosen segments by the softmax of a score each.
    scores = nn.Dense(1, name="scores")(features)[..., 0] if self.pooling == "attention" else None
    h = pool(features, gates, self.pooling, scores=scores)
    h = Dropout(_DROPOUT, self.axis_name, name="dropout1")(h, train)
    h = nn.Dense(_HIDDEN, name="hidden")(h)
    h = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="norm"
    )(h)
    h = Dropout(_DROPOUT, self.axis_name, name="dropout2")(nn.leaky_relu(h, _LEAK), train)
    return nn.Dense(self.classes, name="logits")(h)


def pool(features: Array, gates: AnyArray, kind: str, scores: Array | None = None) -> Array:
  """Pools the chosen segments of each video to one vector.

  Args:
    features: `[B, T, C]`, finite; those of closed segments do not change the value.
    gates: `[B, T]`, at least one above 0 in every row.
    kind: `max`, `mean` or `attention`.
    scores: `[B, T]` logits of the attention.
  Returns:
    `[B, C]`, at least float32.

  >>> pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1.0, 1.0, 0.0]]), "mean")
  Array([[2.]], dtype=float32)
  """
  one_of("pooling", kind, POOLINGS)
  arguments.real_array("features", features, "[B, T, C]")
  arguments.real_array("gates", gates, "[B, T]")
  if np.shape(features)[:2] != np.shape(gates):
    raise ValueError(
      f"gates must be [B, T] for features [B, T, C]; got {np.shape(gates)}, {np.shape(features)}"
    )
  features = as_float(features)
  weights = jnp.asarray(gates)[..., None].astype(features.dtype)
  open_ = weights > 0
  if kind == "max":
    # Minus infinity and not 0, which could be the maximum of negative features.
    return jnp.max(jnp.where(open_, features * weights, -jnp.inf), axis=1)
  if kind == "attention":
    gates, scores = arguments.one_shape("[B, T]", gates=gates, scores=scores)
    scores = scores[..., None].astype(features.dtype)
    # Softmax is the same for shifted scores; shifted by the largest open one, it is finite.
    top = jnp.max(jnp.where(open_, scores, -jnp.inf), axis=1, keepdims=True)
    # Closed segments have weight 0, but their gates' gradients see the exponential: scores above
    # the largest open one would overflow, and count as if they were equal to it.
    shifted = jnp.where(open_ | (scores < top), scores - top, 0)
    weights = weights * jnp.exp(shifted)
  return jnp.sum(features * weights, axis=1) / jnp.sum(weights, axis=1)


class Dropout(nn.Module):
  """Dropout whose draws do not depend on how the batch is spread over devices.

  The draw of an example depends on its place in the whole batch.
  """

  rate: float
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    arguments.number("rate", self.rate, "in [0, 1)", holds=lambda v: 0 <= v < 1)
    check_examples(x, train)
    if not train or not self.rate:
      return x
    # One key per example; flax's own Dropout has one for the batch of a device.
    keys = collectives.example_keys(self.make_rng("dropout"), x.shape[0], self.axis_name)
    # The draw takes the type of its probability: float32, also with `jax_enable_x64`.
    probability = jnp.float32(1 - self.rate)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, probability, x.shape[1:]))(keys)
    return jnp.where(kept, x / float(1 - self.rate), 0)


class SegmentClassifier(nn.Module):
  """Light and heavy net as classifiers of single segments, to pretrain both.

  `{"light": [N, ...], "heavy": [N, ...]}` to `(outputs, records)`: the outputs `light` and `heavy`
  are logits `[N, targets]`; all other inputs are returned unchanged.

  >>> from gating_jax.models.video_backbones import FeaturePool
  >>> model = SegmentClassifier(targets=5, light=FeaturePool(), heavy=FeaturePool())
  >>> inputs = {"light": jnp.ones((2, 4)), "heavy": jnp.ones((2, 4))}
  >>> (outputs, _), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), inputs))
  >>> outputs["heavy"].shape
  (2, 5)
  """

  targets: int
  light: nn.Module
  heavy: nn.Module

  @nn.compact
  def __call__(self, inputs: Inputs, train: bool = False) -> tuple[Outputs, Records]:
    # The records are those of the heavy net: the light net runs on every segment.
    light, _ = self.light(inputs["light"], train)
    heavy, records = self.heavy(inputs["heavy"], train)
    return {
      **inputs,
      "light": nn.Dense(self.targets, name="light_head")(light),
      "heavy": nn.Dense(self.targets, name="heavy_head")(heavy),
    }, records


@former_positional("k")
@naming_extra()
def find_concepts(features: np.ndarray, *, k: int, seed: int) -> np.ndarray:
  """Computes the centroids of k clusters of features (k-means from one k-means++ start).

  They are means of features as given. Normalise the features first if only directions matter.

  Args:
    features: `[n, C]`, one row per segment of the training videos, from a trained network.
    k: number of concepts; at most the number of distinct rows.
    seed: seed of the start; the answer is a function of the features and the seed.
  Returns:
    `[k, C]` float32.
  Raises:
    ValueError: too few distinct rows, or a row that is not finite, with its index.
    TypeError: features that are no numbers, or k that is no whole one.

  >>> rows = np.array([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
  >>> sorted(find_concepts(rows, k=2, seed=0).tolist())
  [[0.0, 1.0], [9.0, 9.0]]
  """
  # Imported here, as it imports slowly.
  from sklearn.cluster import KMeans

  features = np.asarray(features)
  arguments.real_array("features", features)
  arguments.whole_number("k", k, 0)
  arguments.whole_number("seed", seed, 0)
  # float64: the order in which threads add does not change the float32 answer.
  features = features.astype(np.float64)
  if features.ndim != 2:
    raise ValueError(f"features must be [n, C]; got shape {features.shape}")
  if len(bad := np.flatnonzero(~np.isfinite(features).all(axis=1))):
    raise ValueError(
      f"features must be finite; got {features[bad[0]]} in row {bad[0]} ({len(bad)} such rows)"
    )
  distinct = len(np.unique(features, axis=0))
  if not 1 <= k <= distinct:
    raise ValueError(
      f"k must be in 1 .. {distinct}, the number of distinct features of {len(features)}; got {k}"
    )
  # One seeded start: the same features give the same concepts. Checkers take `n_init` for a text.
  one_start: dict[str, Any] = {"n_init": 1}
  return KMeans(k, random_state=seed, **one_start).fit(features).cluster_centers_.astype(np.float32)
