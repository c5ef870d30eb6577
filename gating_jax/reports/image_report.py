"""The page of a run on images: what the net scores and costs, what its gates do, and for which images they open.

Axes: M test images, G gates of the network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gating_jax.ops.priors import Prior
from gating_jax.reports import firing, gate_pictures, image_rows
from gating_jax.reports.page import Section, Table, drawn
from gating_jax.training.evaluation import GateBehaviour

SELECTIVE = 0.1  # a gate open for a smaller share of the images than this
_GATES, _IMAGES = 12, 8  # drawn at most
Read = Callable[[np.ndarray], tuple[np.ndarray, Any]]


def gate_sections(
    behaviour: GateBehaviour, result: Mapping[str, Any], *, prior: Prior, layers: Sequence[tuple[str, int]],
    read: Read, class_names: Sequence[str] | None, history: Sequence[Mapping[str, float]],
) -> Iterator[Section]:
  """What a page says of a gated net.

  Args:
    behaviour, result: of `training.evaluation.evaluate`, the latter with its `layers`.
    prior: that the gates were asked to follow.
    layers: name and number of gates of each, in the order of the gates.
    read: from places in the test set to their images and labels.
    class_names: None where an image has no class of its own.
    history: results of the tests during training, the last of this one.
  """
  found = behaviour.diagnosis
  names = [f"{layer}\ngate {i}" for layer, size in layers for i in range(size)]
  yield _costs(behaviour, result, history)
  yield Section(
      "What gates do", "Always open or closed for more than 99 % of test images; random where the noise of training "
      "and not the image decides, as in dropout; conditional otherwise.",
      [drawn(functools.partial(gate_pictures.draw_layers, layers=result["layers"]), "Gates of each layer."),
       drawn(lambda file: firing.draw(file, behaviour.logits, found.open_rates, prior),
             "How often gates are open, their open probabilities, and empirical CDFs beside that of the prior.")])
  yield _selective(found.open_rates, behaviour, names, read, class_names)
  if class_names is not None and found.class_information is not None:
    rates, best = behaviour.class_rates, np.argsort(-found.class_information, kind="stable")[:_GATES]
    rows = [(names[g].replace("\n", ", "), f"{found.class_information[g]:.2f}", f"{100 * found.open_rates[g]:.1f} %",
             ", ".join(f"{class_names[k]} {100 * rates[k, g]:.0f} %" for k in np.argsort(-rates[:, g])[:3]))
            for g in best]
    yield Section(
        "Gates and classes", "Bits that a gate's state tells of the class of the image, chance taken off.",
        [drawn(lambda file: gate_pictures.draw_classes(file, rates, found.class_information, class_names),
               "Each column is a gate, each row a class; bright where the gate is open for most images of the class."),
         Table(("gate", "bits", "open", "open most for"), rows, numeric=False)])
  yield _easy_and_hard(behaviour, result, read, class_names)


def _costs(behaviour: GateBehaviour, result: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> Section:
  shares = behaviour.macs / result["ungated_macs"]
  parts = [drawn(lambda file: gate_pictures.draw_costs(file, shares, behaviour.correct),
                 "Multiply-accumulates of single test images, and accuracy on cheap and on dear ones.")]
  tests = [line for line in history if "accuracy" in line and "mac_ratio" in line]
  if len(tests) > 1:
    macs, accuracies = ([line[name] for line in tests] for name in ("mac_ratio", "accuracy"))
    parts.append(drawn(lambda file: gate_pictures.draw_histories(file, macs, accuracies),
                       f"Accuracy against MACs at {len(tests)} tests during training; red is the end."))
  return Section("Accuracy and cost", "", parts)


def _selective(
    rates: np.ndarray, behaviour: GateBehaviour, names: Sequence[str], read: Read, class_names: Sequence[str] | None
) -> Section:
  """The gates that open least often, of those that open at all."""
  title, opened = "The most selective gates", np.round(rates * len(behaviour.macs)).astype(int)
  enough = min(_IMAGES, max(1, len(behaviour.macs) // 100))
  chosen = [g for g in np.argsort(rates, kind="stable") if opened[g] >= enough and rates[g] < SELECTIVE][:_GATES]
  if not chosen:
    return Section(title, f"No gate opens for under {100 * SELECTIVE:.0f} % of the test images, and for some.")
  rows, captions = [], []
  for g in chosen:
    images, labels = read(behaviour.top_images[: min(_IMAGES, opened[g]), g])
    rows.append(images)
    captions.append([class_names[label] for label in labels] if class_names is not None else [])
  labels = [f"{names[g]}\nopen: {100 * rates[g]:.1f} %" for g in chosen]
  return Section(
      title, f"Gates that open for under {100 * SELECTIVE:.0f} % of the test images, with those that open them most.",
      [drawn(lambda file: image_rows.draw(file, rows, labels, captions if class_names is not None else None),
             "A row for each gate: its layer, its number there, how often it is open.")])


def _easy_and_hard(
    behaviour: GateBehaviour, result: Mapping[str, Any], read: Read, class_names: Sequence[str] | None
) -> Section:
  order = np.argsort(behaviour.losses, kind="stable")
  count = min(_IMAGES, len(order))
  groups = {"easiest": order[:count], "hardest": order[::-1][:count]}
  shown = {name: read(places) for name, places in groups.items()}
  captions = [[f"{100 * behaviour.macs[place] / result['ungated_macs']:.0f} %" + (
      f" {class_names[label]}" if class_names is not None else "")
      for place, label in zip(places, shown[name][1], strict=True)] for name, places in groups.items()]
  labels = [f"{name}\nloss {behaviour.losses[places].mean():.2g}" for name, places in groups.items()]
  return Section(
      "Easy and hard images", "Test images of the least and of the largest loss, with their MACs as a share of the "
      "ungated net's.",
      [drawn(lambda file: image_rows.draw(file, [images for images, _ in shown.values()], labels, captions),
             "Above the easiest, below the hardest.")])
