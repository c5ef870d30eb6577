"""A test set's score: accuracy, multiply-accumulates and what the gates do, every image counted once.

Axes: M test images, B images of a batch, G gates of the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gating_jax.models.counts import ModelCounts

ALWAYS_OPEN = 0.99
ALWAYS_CLOSED = 0.01
_KEPT_EXAMPLES = 2048


@dataclasses.dataclass(frozen=True)
class GateBehaviour:
  """What gates did: `open_rates` `[G]`, share of images; `logits` `[<= 2048, G]`, of the first images."""

  open_rates: np.ndarray
  logits: np.ndarray


def evaluate(
    run: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
    batches: Iterable[tuple[tuple[np.ndarray, np.ndarray], int]],
    counts: ModelCounts,
) -> tuple[dict[str, float], GateBehaviour | None]:
  """Runs a model over a test set.

  Args:
    run: `(pixels [B, ...], labels [B]) -> results`, those of `steps.make_eval_step`.
    batches: `((pixels, labels), valid)`; what follows the first `valid` examples is filling.
    counts: of the model.
  Returns:
    `(result, behaviour)`: numbers, and for a gated net what its gates did.
  """
  sums: dict[str, np.ndarray | float] = {}
  images, logits = 0, []
  for (pixels, labels), valid in batches:
    part = {name: np.asarray(values)[:valid] for name, values in run(pixels, labels).items()}
    if "gate_logits" in part and images < _KEPT_EXAMPLES:
      logits.append(part["gate_logits"])
    for name in ("correct", "cross_entropy", "macs", "gates"):
      if name in part:
        sums[name] = sums.get(name, 0) + np.sum(part[name], axis=0, dtype=np.float64)
    images += valid
  means = {name: total / images for name, total in sums.items()}
  result = {
      "accuracy": float(means["correct"]),
      "cross_entropy": float(means["cross_entropy"]),
      "images": images,
      "params": counts.params,
      "gate_params": counts.gate_params,
      "ungated_macs": counts.macs,
      "macs": counts.macs,
      "mac_ratio": 1.0,
  }
  if "gates" not in means:
    return result, None
  macs, open_rates = counts.fixed + float(means["macs"]), means["gates"]
  result |= {
      "macs": macs,
      "mac_ratio": macs / counts.macs,
      "gates": counts.gates,
      "mean_open": float(np.mean(open_rates)),
      **dataclasses.asdict(gate_counts(open_rates)),
  }
  return result, GateBehaviour(open_rates, np.concatenate(logits)[:_KEPT_EXAMPLES])


@dataclasses.dataclass(frozen=True)
class GateCounts:
  """How many gates are open on more than 99 % of images, on fewer than 1 %, and in between."""

  always_open: int
  always_closed: int
  conditional: int


def gate_counts(open_rates: np.ndarray) -> GateCounts:
  """Sorts gates by their open rate over a test set.

  Args:
    open_rates: `[G]` shares of images, in [0, 1].

  >>> gate_counts(np.array([1.0, 0.995, 0.99, 0.5, 0.0]))
  GateCounts(always_open=2, always_closed=1, conditional=2)
  """
  always_open = int(np.sum(open_rates > ALWAYS_OPEN))
  always_closed = int(np.sum(open_rates < ALWAYS_CLOSED))
  return GateCounts(always_open, always_closed, len(open_rates) - always_open - always_closed)
