"""Wording of training metrics, as a line for people."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_ACCURACIES = {
  "accuracy": "accuracy",
  "light_accuracy": "accuracy of the light net",
  "heavy_accuracy": "accuracy of the heavy net",
}
_COSTS = {
  "mac_ratio": "MACs",
  "channels_mac_ratio": "MACs of the heavy net",
  "share": "segments chosen",
}
_TERMS = {
  "cross_entropy": "cross-entropy",
  "batch_shaping": "batch-shaping",
  "l0": "L0",
  "macs": "penalty on MACs",
  "mean": "penalty on segments",
  "light": "light net",
  "heavy": "heavy net",
  "task_cross_entropy": "cross-entropy of the task",
}
# Not among the loss's terms; metrics.jsonl and TensorBoard have the norms.
_NOT_SHOWN = ("loss", "gradient_norm", "state_norm")
# Prefixes of the terms of a heavy net's gates, and of the names of layers.
_CHANNELS, _RATES = "channels_", "gate_rate/"


def headline(means: Mapping[str, float]) -> str:
  """Describes metrics: accuracy, loss and its terms, MACs, open gates; those that there are.

  Args:
    means: means of a step's metrics, by name: fractions, except for the losses; terms of the loss
      are before their coefficients.

  >>> means = {"loss": 0.8125, "cross_entropy": 0.5, "batch_shaping": 0.25}
  >>> means |= {"batch_shaping_coefficient": 0.75, "accuracy": 0.875, "mac_ratio": 0.5312}
  >>> means |= {"gate_rate/layer1/conv": 0.5, "gradient_norm": 2.0}
  >>> print(headline(means).replace(" (", "\\n("))
  accuracy 87.5 %, loss 0.8125
  (cross-entropy 0.5, batch-shaping 0.25), MACs 53.1 %, open gates 50.0 %
  """
  percents = lambda words: [
    f"{word} {_percent(means[name])}" for name, word in words.items() if name in means
  ]
  terms = []
  for name, value in means.items():
    known = name in _NOT_SHOWN or name in _ACCURACIES or name in _COSTS
    if not known and "/" not in name and not name.endswith("_coefficient"):
      terms.append(f"{_term(name)} {value:.4g}")
  parts = percents(_ACCURACIES)
  if "loss" in means:
    parts.append(f"loss {means['loss']:.4g}" + (f" ({', '.join(terms)})" if terms else ""))
  else:
    parts += terms
  parts += percents(_COSTS)
  rates = [value for name, value in means.items() if name.startswith(_RATES)]
  # The first rate is that of segments, which "share" has shown.
  if "share" in means:
    rates = rates[1:]
  # A mean over layers, whatever their number of gates.
  if rates:
    parts.append(f"open gates {_percent(float(np.mean(rates)))}")
  return ", ".join(parts)


def _term(name: str) -> str:
  own = name.removeprefix(_CHANNELS)
  words = _TERMS.get(own, own.replace("_", " "))
  return words if own == name else f"{words} of channel gates"


def _percent(fraction: float) -> str:
  return f"{100 * fraction:.1f} %"
