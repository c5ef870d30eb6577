"""Scores, cost and gates of each source of a test set that has several, such as a union of sets.

Axes: M images, K classes, S sources, G gates.
Reference: Miller, 1955 (the bias of information, see `analysis.outcomes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.analysis import outcomes, scores


class ImageOutcomes(NamedTuple):
  """Results of a test on images of several sources.

  Attributes:
    labels, predicted: `[M]` classes.
    macs: `[M]` multiply-accumulates of each image.
    class_rates: `[K, G]` fraction of each class's images for which each gate is open, NaN for a
      class without images; None without gates.
  """

  labels: np.ndarray
  predicted: np.ndarray
  macs: np.ndarray
  class_rates: np.ndarray | None = None


def score_sources(
  tested: ImageOutcomes,
  names: Sequence[str],
  class_sources: np.ndarray,
  *,
  ungated_macs: int,
  known: bool = False,
) -> dict[str, Any]:
  """Returns the entries of a result about its sources.

  Args:
    tested: of the whole test set.
    names: S names.
    class_sources: `[K]` number of the source of each class.
    ungated_macs: of the network with every gate open, without gate networks.
    known: whether the source of an image was known, so that only its own classes competed.
  Returns:
    `sets`, by name: `images`, `accuracy` with its interval, `macs` and `mac_ratio`; unless sources
      are known `recognised`, the fraction of images that are taken for a class of their own source;
      and with gates `mean_open`, the fraction of open ones;
    `mean_set_accuracy` and `mean_set_macs`, the means over sources, whatever their numbers of
      images;
    with gates `set_overlap`, `[S, S]` of `open_overlap`, `mean_set_overlap` over pairs of sources,
      and `source_information`, bits of a gate about the source, mean over gates.

  >>> labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
  >>> tested = ImageOutcomes(labels, predicted, macs=np.array([10.0, 20, 40, 40]))
  >>> found = score_sources(tested, ["a", "b"], np.array([0, 1]), ungated_macs=50)
  >>> [(entry["accuracy"], entry["macs"]) for entry in found["sets"].values()]
  [(0.5, 15.0), (1.0, 40.0)]
  """
  of_images, of_predicted = class_sources[tested.labels], class_sources[tested.predicted]
  right = tested.labels == tested.predicted
  sets, accuracies = {}, []
  for source, name in enumerate(names):
    own = of_images == source
    images = int(np.count_nonzero(own))
    # A split may leave a source without images.
    if not images:
      continue
    correct = int(np.count_nonzero(right & own))
    macs = float(tested.macs[own].mean())
    accuracies.append(correct / images)
    sets[name] = {
      "images": images,
      "accuracy": correct / images,
      **scores.interval_entries("accuracy", scores.fraction_interval(correct, images)),
      "macs": macs,
      "mac_ratio": macs / ungated_macs,
    }
    if not known:
      sets[name]["recognised"] = float(np.mean(of_predicted[own] == source))
  found: dict[str, Any] = {
    "sets": sets,
    "mean_set_accuracy": float(np.mean(accuracies)),
    "mean_set_macs": float(np.mean([entry["macs"] for entry in sets.values()])),
  }
  if tested.class_rates is not None:
    found |= _score_gates(tested, tested.class_rates, names, class_sources=class_sources, sets=sets)
  return found


def open_overlap(rates: np.ndarray, others: np.ndarray) -> float:
  """Computes the overlap of the gates that two sources open, in [0, 1].

      sum_g min(p_g, q_g) / sum_g max(p_g, q_g)

  It is 1 where both open every gate equally often, and 0 where none is open for both; for rates of
  0 and 1, the fraction of the gates of either that both have. It is 0 where no gate is open.

  Args:
    rates, others: `[G]` open rates of each gate.

  >>> open_overlap(np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]))
  0.3333333333333333
  """
  either = float(np.maximum(rates, others).sum())
  return float(np.minimum(rates, others).sum()) / either if either else 0.0


def _score_gates(
  tested: ImageOutcomes,
  class_rates: np.ndarray,
  names: Sequence[str],
  *,
  class_sources: np.ndarray,
  sets: dict[str, Any],
) -> dict[str, Any]:
  """Returns the entries about gates, and adds the open ones to those of `sets`."""
  examples = np.bincount(tested.labels, minlength=len(class_sources))
  opened = np.nan_to_num(class_rates) * examples[:, None]
  of_source = np.zeros((len(names), class_rates.shape[1]))
  np.add.at(of_source, class_sources, opened)
  images = np.bincount(class_sources, weights=examples, minlength=len(names))
  rates = of_source / np.maximum(images, 1)[:, None]
  for source, name in enumerate(names):
    if name in sets:
      sets[name]["mean_open"] = float(rates[source].mean())
  overlap, pairs = np.eye(len(names)), []
  for i in range(len(names)):
    for j in range(i):
      overlap[i, j] = overlap[j, i] = open_overlap(rates[i], rates[j])
      if images[i] and images[j]:
        pairs.append(overlap[i, j])
  found: dict[str, Any] = {"set_overlap": overlap.tolist()}
  if pairs:
    found["mean_set_overlap"] = float(np.mean(pairs))
    information = outcomes.class_information(of_source, images)
    found["source_information"] = float(np.mean(information))
  return found
