"""Training objectives of the networks for long videos.

Axes: B videos, T segments, S picked segments of a video.
Reference: Hussein et al., 2020 (TimeGate).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping

import jax.numpy as jnp
import optax

from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.ops.ecdf import batch_shaping_loss
from gating_jax.ops.penalties import LEAST_RATE
from gating_jax.ops.priors import Prior
from gating_jax.training.closed_gates import SEGMENTS_CLOSED
from gating_jax.training.objectives import GatePenalties, ImageObjective, weighted_mean
from gating_jax.types import AnyArray, Array, Records

SEGMENT_SPARSITIES = ("none", "mean", "target")
# A budget holds for the batch, which stands for the set, or for each video.
SET, VIDEO = "set", "video"
SCOPES = (SET, VIDEO)
Terms = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class VideoObjective:
  """Objective of the whole network.

      total = classification + light * that of single segments
              + gamma_t * batch-shaping + rho_t * sparsity + channels

  Classification is cross-entropy or, for several labels, the mean binary cross-entropy over
  classes.

  Attributes:
    multi_label: whether labels are `[B, classes]` of 0 and 1.
    sparsity: penalty on open gates of segments: `mean`, the open fraction; `target`, its squared
      difference from `target`; or `none`.
    target: fraction in (0, 1].
    sparsity_coefficient, batch_shaping_coefficient: rho_t and gamma_t, from step to number.
    prior: distribution that the segments' open probability should follow over all segments of the
      batch.
    light_coefficient: weight of the light net's own classification of every segment.
    channels: penalties of the heavy net's channel gates.
    scope: what sparsity and batch-shaping hold for: `set`, all segments of the batch together; or
      `video`, each video's own segments, and the mean over videos is taken.
  """

  multi_label: bool
  sparsity: str
  target: float
  sparsity_coefficient: Callable[[Array], Array]
  batch_shaping_coefficient: Callable[[Array], Array]
  prior: Prior
  light_coefficient: float
  channels: ImageObjective
  scope: str = SET

  @classmethod
  def from_config(
    cls,
    loss: Config,
    total_steps: int,
    *,
    multi_label: bool,
    gated: bool,
    channels: ImageObjective,
    scope: str = SET,
  ) -> VideoObjective:
    """Returns the objective that the section `loss` of a config describes.

    Args:
      loss: the section.
      total_steps: steps of the training, for the schedules.
      multi_label: as in the class.
      gated: whether a gate chooses the segments. Fixed selections have no parameters that a
        sparsity penalty could train.
      channels, scope: as in the class.
    """
    return cls(
      **GatePenalties.from_config(loss, total_steps)._asdict(),
      multi_label=multi_label,
      sparsity=loss.sparsity.kind if gated else "none",
      light_coefficient=loss.light,
      channels=channels,
      scope=scope,
    )

  def __post_init__(self):
    one_of("loss.sparsity.kind", self.sparsity, SEGMENT_SPARSITIES)
    one_of("budget.scope", self.scope, SCOPES)

  def __call__(
    self,
    outputs: Mapping[str, Array],
    targets: Mapping[str, Array],
    records: Records,
    step: Array,
    axis_name: Hashable | None = None,
  ) -> tuple[Array, Terms]:
    """Returns `(total, terms)`; the terms are before their coefficients.

    Args:
      outputs: the outputs of `SegmentNet`.
      targets: `label`; `weight` `[B]`, 0 for videos that could not be read; and `valid` `[B, T]`.
      records: the record of the segments, then those of the heavy net's channels.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
    """
    labels, weight, valid = targets["label"], targets["weight"], targets["valid"]
    mean = functools.partial(weighted_mean, axis_name=axis_name)
    # Weighted means over all devices: a device may hold fewer videos that could be read.
    total = mean(label_loss(outputs["logits"], labels, self.multi_label), weight)
    terms = {"classification": total}
    if not self.multi_label:
      terms["accuracy"] = mean(jnp.argmax(outputs["logits"], -1) == labels, weight)
    # Padding, and all segments of a video that could not be read, have weight 0.
    seen = weight[:, None] * valid
    if "light_logits" in outputs and self.light_coefficient:
      # The light term: every segment has the label of its video.
      of_video = jnp.broadcast_to(labels[:, None], (*valid.shape, *labels.shape[1:]))
      terms["light"] = mean(label_loss(outputs["light_logits"], of_video, self.multi_label), seen)
      total += self.light_coefficient * terms["light"]
    segments, *channels = records
    terms["share"] = mean(segments.gates, seen)
    if self.sparsity != "none":
      rho = self.sparsity_coefficient(step)
      # rho_t * sparsity, by the fraction of segments open in this batch, or in each video.
      fractions = terms["share"]
      if self.scope == VIDEO:
        fractions = _fractions_of_videos(segments.gates, valid)
      penalty = fractions
      if self.sparsity == "target":
        penalty = jnp.square(fractions - self.target)
      if self.scope == VIDEO:
        penalty = mean(penalty, weight)
      terms |= {self.sparsity: penalty, f"{self.sparsity}_coefficient": rho}
      total += rho * penalty
    # One segment of every video always runs, so only probabilities show the gate's own rate.
    terms[SEGMENTS_CLOSED] = (mean(segments.probs, seen) < LEAST_RATE).astype(total.dtype)
    gamma = self.batch_shaping_coefficient(step)
    if self.scope == VIDEO:
      shaping = mean(self._shaping_of_videos(segments.logits, valid), weight)
    else:
      shaping = self._shaping(segments.logits, seen, axis_name)
    terms |= {"batch_shaping": shaping, "batch_shaping_coefficient": gamma}
    total += gamma * shaping
    channel_penalty, channel_terms = self.channels.gate_terms(tuple(channels), step, axis_name)
    return total + channel_penalty, terms | _of_channels(channel_terms)

  def _shaping(self, logits: AnyArray, seen: Array, axis_name: Hashable | None) -> Array:
    """Computes the batch-shaping loss of all segments, padding left out.

    They share one gate network, so they are one column.
    """
    return batch_shaping_loss(
      logits.reshape(-1, 1), self.prior, weights=seen.ravel(), axis_name=axis_name
    )[0]

  def _shaping_of_videos(self, logits: AnyArray, valid: Array) -> Array:
    """Computes the batch-shaping loss of each video's own segments, `[B]`, padding left out."""
    # Each video is a column, whose examples are its segments; all of them are on this device.
    weights = valid.T.astype(logits.dtype)
    return batch_shaping_loss(logits.T, self.prior, weights=weights)


def _fractions_of_videos(gates: AnyArray, valid: Array) -> Array:
  """Computes the fraction of each video's own segments that is open, `[B]`."""
  # At least 1, so that a video without a valid segment gives 0.
  segments = jnp.maximum(jnp.sum(valid, axis=1), 1)
  return jnp.sum(gates * valid, axis=1) / segments


@dataclasses.dataclass(frozen=True)
class SegmentObjective:
  """Objective of both nets on single segments.

      total = cross-entropy of the light net + that of the heavy net + penalty of its channel gates

  Attributes:
    target: `units`, the unit action of each segment, with the last class for none, or `label`, the
      video's.
    targets: number of classes.
    multi_label: whether a video may have several labels.
    channels: penalties of the heavy net's channel gates.
  """

  target: str
  targets: int
  multi_label: bool
  channels: ImageObjective

  def __call__(
    self,
    outputs: Mapping[str, Array],
    targets: Mapping[str, Array],
    records: Records,
    step: Array,
    axis_name: Hashable | None = None,
  ) -> tuple[Array, Terms]:
    """Returns `(total, terms)` as `VideoObjective`.

    `outputs["picked"]` `[B, S]` are the segments that the nets saw, `[B * S]` in all.
    """
    picked = outputs["picked"]
    # A segment has one unit action at most, also where a video has several labels.
    multi_label = self.multi_label and self.target == "label"
    if self.target == "units":
      units = jnp.take_along_axis(targets["units"], picked, axis=1)
      # Segments without a unit action have -1, and become the last class.
      labels = jnp.where(units < 0, self.targets - 1, units).ravel()
    else:
      labels = jnp.repeat(targets["label"], picked.shape[1], axis=0)
    # Each picked segment has the weight of its video.
    weight = jnp.repeat(targets["weight"], picked.shape[1])
    terms, accuracies = {}, {}
    for name in ("light", "heavy"):
      logits = outputs[name]
      terms[name] = weighted_mean(label_loss(logits, labels, multi_label), weight, axis_name)
      if not multi_label:
        right = jnp.argmax(logits, -1) == labels
        accuracies[f"{name}_accuracy"] = weighted_mean(right, weight, axis_name)
    penalty, channel_terms = self.channels.gate_terms(records, step, axis_name)
    total = terms["light"] + terms["heavy"] + penalty
    return total, terms | accuracies | _of_channels(channel_terms)


def _of_channels(terms: Terms) -> dict[str, Array]:
  """Names the terms of the heavy net's channel gates apart from those of segments."""
  return {f"channels_{name}": value for name, value in terms.items()}


def label_loss(logits: Array, labels: Array, multi_label: bool) -> Array:
  """Computes the cross-entropy `[...]` of logits `[..., classes]`.

  Args:
    logits: `[..., classes]`.
    labels: integers `[...]`; if `multi_label`, 0/1 `[..., classes]`.
    multi_label: the binary cross-entropy, mean over classes.
  """
  if multi_label:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
