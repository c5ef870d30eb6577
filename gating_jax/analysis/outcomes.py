"""What became of each gate: always open, always closed, random dropout or conditional, and how much it tells.

Information is in bits. What the noise of training lets through of the input decides between a random and a conditional
gate, and not what the noise-free gate says: a logit that hardly leaves 0 is a coin in training, whatever its sign.

Axes: N examples, K classes, G gates of the network.
Reference: Bejnordi et al., 2020 (the outcomes); Miller, 1955, "Note on the bias of information estimates".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

OUTCOMES = ("always_open", "always_closed", "random_dropout", "conditional")
ALWAYS_OPEN, ALWAYS_CLOSED = 0.99, 0.01  # more, or less, than this share of examples
DISAGREEMENT = 0.2  # share of examples on which two draws differ: that of P(open) from 0.11 to 0.89 for all examples
INFORMATION = 0.05  # bits about the input: that of P(open) which varies by 0.13 around 1/2


@dataclasses.dataclass(frozen=True)
class Tally:
  """Sums over examples; `+` joins those of two batches.

  Attributes:
    examples: `[K]` of each class.
    opened: `[K, G]` how many of them opened each gate in evaluation.
    probs, entropies, disagreements: `[G]` of the open probability, its entropy, and the probability that two draws of
      the noise differ.
  """

  examples: np.ndarray
  opened: np.ndarray
  probs: np.ndarray
  entropies: np.ndarray
  disagreements: np.ndarray

  def __add__(self, other: Tally) -> Tally:
    return Tally(
      *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
    )


def tally(gates: np.ndarray, probs: np.ndarray, labels: np.ndarray, classes: int) -> Tally:
  """The sums of one batch.

  Args:
    gates: `[N, G]` whether each gate is open in evaluation.
    probs: `[N, G]` probability that it is under the noise of training; see `open_probs`.
    labels: `[N]` integers below `classes`.
  """
  member = np.arange(classes)[:, None] == labels
  probs = probs.astype(np.float64)
  return Tally(
    examples=member.sum(axis=1),
    opened=member.astype(np.int64) @ gates.astype(np.int64),
    probs=probs.sum(axis=0),
    entropies=_entropy(probs).sum(axis=0),
    disagreements=np.sum(2 * probs * (1 - probs), axis=0),
  )


def open_probs(logits: np.ndarray, noise_scale: float) -> np.ndarray:
  """P(logit + noise_scale * L > 0) of logistic L, in float64; without noise 0 or 1.

  >>> open_probs(np.array([-1.0, 2.0]), 0.0)
  array([0., 1.])
  """
  logits = logits.astype(np.float64)
  return special.expit(logits / noise_scale) if noise_scale else (logits > 0).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """Of each gate, `[G]`.

  Attributes:
    open_rates: share of examples for which it is open in evaluation.
    disagreement: share of examples on which two draws of the noise of training are expected to differ.
    input_information: bits that a gate drawn with this noise has about the input.
    class_information: bits that the gate of evaluation has about the class; see `class_information`. None where all
      examples are of one class.
    outcomes: `[G]` positions in `OUTCOMES`; see `outcomes`.
    floor: bits by which chance alone raises an uncorrected estimate of the class information, on average.
  """

  open_rates: np.ndarray
  disagreement: np.ndarray
  input_information: np.ndarray
  class_information: np.ndarray | None
  outcomes: np.ndarray
  floor: float


def diagnose(sums: Tally) -> Diagnosis:
  """What the sums over a whole set say of each gate."""
  n = sums.examples.sum()
  open_rates, disagreement = sums.opened.sum(axis=0) / n, sums.disagreements / n
  information = np.maximum(_entropy(sums.probs / n) - sums.entropies / n, 0)
  return Diagnosis(
    open_rates,
    disagreement,
    information,
    class_information(sums.opened, sums.examples) if len(sums.examples) > 1 else None,
    outcomes(open_rates, disagreement, information),
    information_floor(sums.examples),
  )


def outcomes(
  open_rates: np.ndarray, disagreement: np.ndarray, information: np.ndarray
) -> np.ndarray:
  """Positions in `OUTCOMES`, the first of these rules that holds:

      random dropout   < 0.05 bits about the input, and two draws differ on >= 20 % of examples or some are open
      always open      open on > 99 % of examples
      always closed    open on < 1 % of examples
      conditional      any other

  where some are open if that is neither of the two after it.

  >>> found = outcomes(np.array([1.0, 1.0, 0.0, 0.5]), np.array([0.4, 0.0, 0.0, 0.3]), np.array([0.0, 0.0, 0.0, 0.5]))
  >>> [OUTCOMES[i] for i in found]
  ['random_dropout', 'always_open', 'always_closed', 'conditional']
  """
  is_open, is_closed = open_rates > ALWAYS_OPEN, open_rates < ALWAYS_CLOSED
  random = (information < INFORMATION) & ((disagreement >= DISAGREEMENT) | ~(is_open | is_closed))
  return np.select([random, is_open, is_closed], [2, 0, 1], 3)


def class_information(opened: np.ndarray, examples: np.ndarray) -> np.ndarray:
  """Mutual information of gates and the class, `[G]` bits, less what chance alone adds on average; at least 0.

      I = H(open) - sum_k P(k) H(open | k) - (K' - 1) / (2 N log 2)

  K' classes occur. A gate that never or always opens has none, and nothing is taken off.

  Args:
    opened: `[K, G]` examples of each class for which each gate is open.
    examples: `[K]` of each class.

  >>> class_information(np.array([[500, 250], [0, 250]]), np.array([500, 500])).round(3)
  array([0.999, 0.   ])
  """
  n, total = examples.sum(), opened.sum(axis=0)
  within = _entropy(opened / np.maximum(examples, 1)[:, None])
  information = _entropy(total / n) - examples @ within / n
  varies = (total > 0) & (total < n)
  return np.maximum(information - information_floor(examples) * varies, 0)


def information_floor(examples: np.ndarray) -> float:
  """Mean of the uncorrected estimate for a gate that knows nothing of the class: `(K' - 1) / (2 N log 2)` bits."""
  return float((np.count_nonzero(examples) - 1) / (2 * examples.sum() * np.log(2)))


def summary(found: Diagnosis) -> dict[str, Any]:
  """How many gates came out how, and means over gates, as plain numbers."""
  counts = np.bincount(found.outcomes, minlength=len(OUTCOMES))
  means = ("disagreement", "input_information", "class_information")
  return {
    "gates": len(found.outcomes),
    "mean_open": float(np.mean(found.open_rates)),
    **dict(zip(OUTCOMES, counts.tolist(), strict=True)),
    **{
      name: float(np.mean(getattr(found, name)))
      for name in means
      if getattr(found, name) is not None
    },
  }


def by_layer(found: Diagnosis, layers: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
  """`summary` of each layer, given their names and numbers of gates, in the order of the gates."""
  rows, end = [], 0
  for name, size in layers:
    part, end = slice(end, end + size), end + size
    arrays = {k: v[part] for k, v in vars(found).items() if isinstance(v, np.ndarray)}
    rows.append({"layer": name, **summary(dataclasses.replace(found, **arrays))})
  return rows


def _entropy(p: np.ndarray) -> np.ndarray:
  return (special.entr(p) + special.entr(1 - p)) / np.log(2)
