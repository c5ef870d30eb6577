"""Diagnosis of each gate: always open, always closed, random dropout or conditional.

Information is in bits. Random and conditional gates differ in the information about the input that
survives the noise of training, not in the noise-free decision: a logit that hardly leaves 0 is a
coin in training, whatever its sign.

Axes: N examples, K classes, G gates of the network.
Reference: Bejnordi et al., 2020 (the outcomes); Miller, 1955, "Note on the bias of information
  estimates".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gating_jax.names import former_positional

OUTCOMES = ("always_open", "always_closed", "random_dropout", "conditional")
# A gate is always open, or always closed, if it opens for more, or less, than this fraction of
# examples.
ALWAYS_OPEN, ALWAYS_CLOSED = 0.99, 0.01
# Fraction of examples on which two draws differ. A P(open) that is the same for all examples
# reaches it between 0.11 and 0.89.
DISAGREEMENT = 0.2
# Bits about the input. A P(open) that varies by 0.13 around 1/2 carries as many.
INFORMATION = 0.05


@dataclasses.dataclass(frozen=True)
class Tally:
  """Sums over examples; `+` joins those of two batches.

  Attributes:
    examples: `[K]` number of examples of each class.
    opened: `[K, G]` number of these for which each gate is open in evaluation.
    probs: `[G]` sum of the open probability.
    entropies: `[G]` sum of the entropy of the open probability, in bits.
    disagreements: `[G]` sum of the probability that two draws of the noise differ.

  >>> batch = tally(np.array([[1, 0]]), np.array([[0.9, 0.2]]), np.array([1]), classes=2)
  >>> (batch + batch).examples
  array([0, 2])
  """

  examples: np.ndarray
  opened: np.ndarray
  probs: np.ndarray
  entropies: np.ndarray
  disagreements: np.ndarray

  def __add__(self, other: Tally) -> Tally:
    return Tally(
      examples=self.examples + other.examples,
      opened=self.opened + other.opened,
      probs=self.probs + other.probs,
      entropies=self.entropies + other.entropies,
      disagreements=self.disagreements + other.disagreements,
    )


@former_positional("classes")
def tally(gates: np.ndarray, probs: np.ndarray, labels: np.ndarray, *, classes: int) -> Tally:
  """Computes the sums of one batch.

  Args:
    gates: `[N, G]` above 0 where a gate is open in evaluation.
    probs: `[N, G]` probability that it is open under the noise of training; see `open_probs`.
    labels: `[N]` integers below `classes`.
    classes: K.
  Returns:
    A `Tally`.

  >>> gates, probs = np.array([[1, 0], [1, 1]]), np.array([[0.9, 0.1], [0.9, 0.6]])
  >>> tally(gates, probs, np.array([0, 1]), classes=2).opened
  array([[1, 0],
         [1, 1]])
  """
  member = np.arange(classes)[:, None] == labels
  # Sums over a whole set of examples need more digits than float32 has.
  probs = probs.astype(np.float64)
  return Tally(
    examples=member.sum(axis=1),
    opened=member.astype(np.int64) @ (gates > 0).astype(np.int64),
    probs=probs.sum(axis=0),
    entropies=_entropy(probs).sum(axis=0),
    disagreements=np.sum(2 * probs * (1 - probs), axis=0),
  )


@former_positional("noise_scale")
def open_probs(logits: np.ndarray, *, noise_scale: float) -> np.ndarray:
  """Computes P(logit + noise_scale * L > 0) of logistic L, in float64; without noise 0 or 1.

  Args:
    logits: `[..., G]` log-odds.
    noise_scale: of the logistic noise L, at least 0.
  Returns:
    Probabilities, of the shape of the logits.

  >>> open_probs(np.array([-1.0, 2.0]), noise_scale=0.0)
  array([0., 1.])
  """
  from scipy import special

  logits = logits.astype(np.float64)
  return special.expit(logits / noise_scale) if noise_scale else (logits > 0).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """The diagnosis of every gate; arrays are `[G]`.

  Attributes:
    open_rates: fraction of examples for which the gate is open in evaluation.
    disagreement: expected fraction of examples on which two draws of the training noise differ.
    input_information: bits that a gate drawn with this noise carries about the input.
    class_information: bits that the evaluation gate carries about the class; see
      `class_information`. None if there is only one class.
    outcomes: positions in `OUTCOMES`; see `outcomes`.
    floor: bits that chance alone adds, on average, to an uncorrected estimate of the class
      information.

  >>> gates, probs = np.array([[1], [0]]), np.array([[0.9], [0.2]])
  >>> sums = tally(gates, probs, np.array([0, 1]), classes=2)
  >>> diagnose(sums).open_rates
  array([0.5])
  """

  open_rates: np.ndarray
  disagreement: np.ndarray
  input_information: np.ndarray
  class_information: np.ndarray | None
  outcomes: np.ndarray
  floor: float


def diagnose(sums: Tally) -> Diagnosis:
  """Diagnoses each gate from the sums over a whole set.

  Args:
    sums: of `tally`, added up over at least one example.
  Returns:
    A `Diagnosis`, whose arrays are `[G]`.

  >>> gates, labels = np.array([[1, 0], [1, 1]] * 50), np.array([0, 1] * 50)
  >>> found = diagnose(tally(gates, gates, labels, classes=2))
  >>> [OUTCOMES[i] for i in found.outcomes]
  ['always_open', 'conditional']
  """
  n = sums.examples.sum()
  open_rates = sums.opened.sum(axis=0) / n
  disagreement = sums.disagreements / n
  # I(gate; input) = H(mean P(open)) - mean H(P(open)). Rounding can make it slightly negative.
  information = np.maximum(_entropy(sums.probs / n) - sums.entropies / n, 0)
  has_classes = len(sums.examples) > 1
  return Diagnosis(
    open_rates=open_rates,
    disagreement=disagreement,
    input_information=information,
    class_information=class_information(sums.opened, sums.examples) if has_classes else None,
    outcomes=outcomes(open_rates, disagreement, information),
    floor=information_floor(sums.examples),
  )


def outcomes(
  open_rates: np.ndarray, disagreement: np.ndarray, information: np.ndarray
) -> np.ndarray:
  """Returns positions in `OUTCOMES`, by the first of these rules that holds.

      random dropout   < 0.05 bits about the input, and two draws differ on >= 20 % of examples
                       or some are open
      always open      open on > 99 % of examples
      always closed    open on < 1 % of examples
      conditional      any other

  "Some are open" means that neither of the next two rules holds.

  >>> rates, disagreement = np.array([1.0, 1.0, 0.0, 0.5]), np.array([0.4, 0.0, 0.0, 0.3])
  >>> found = outcomes(rates, disagreement, np.array([0.0, 0.0, 0.0, 0.5]))
  >>> [OUTCOMES[i] for i in found]
  ['random_dropout', 'always_open', 'always_closed', 'conditional']
  """
  is_open, is_closed = open_rates > ALWAYS_OPEN, open_rates < ALWAYS_CLOSED
  varies = ~(is_open | is_closed)
  random = (information < INFORMATION) & ((disagreement >= DISAGREEMENT) | varies)
  # `np.select` takes the first condition that holds, as the rules ask.
  return np.select([random, is_open, is_closed], [2, 0, 1], 3)


def class_information(opened: np.ndarray, examples: np.ndarray) -> np.ndarray:
  """Computes the mutual information of gate and class, `[G]` bits, less its bias from chance.

      I = H(open) - sum_k P(k) H(open | k) - (K' - 1) / (2 N log 2)

  K' classes occur. The result is at least 0. A gate that never or always opens carries no
  information, and nothing is subtracted.

  Args:
    opened: `[K, G]` examples of each class for which each gate is open.
    examples: `[K]` examples of each class.
  Returns:
    `[G]` bits.

  >>> class_information(np.array([[500, 250], [0, 250]]), np.array([500, 500])).round(3)
  array([0.999, 0.   ])
  """
  n, total = examples.sum(), opened.sum(axis=0)
  # A class without examples has weight 0 below; 1 keeps its quotient finite.
  within = _entropy(opened / np.maximum(examples, 1)[:, None])
  information = _entropy(total / n) - examples @ within / n
  varies = (total > 0) & (total < n)
  return np.maximum(information - information_floor(examples) * varies, 0)


def information_floor(examples: np.ndarray) -> float:
  """Computes the mean uncorrected estimate for a gate that is independent of the class, in bits.

      (K' - 1) / (2 N log 2)

  Here K' classes occur among N examples.

  Args:
    examples: `[K]` examples of each class.
  Returns:
    Bits, a number.

  >>> round(information_floor(np.array([50, 50])), 5)
  0.00721
  """
  return float((np.count_nonzero(examples) - 1) / (2 * examples.sum() * np.log(2)))


def summary(found: Diagnosis) -> dict[str, Any]:
  """Returns the number of gates of each outcome, and means over gates, as plain numbers.

  Args:
    found: of `diagnose`, with G gates.
  Returns:
    `gates`, the number G, and one number for each of `OUTCOMES`; `mean_open`, `disagreement`,
    `input_information` and `class_information`, means over gates; the last is left out where there
    is only one class.

  >>> gates, labels = np.array([[1, 0], [1, 1]] * 50), np.array([0, 1] * 50)
  >>> numbers = summary(diagnose(tally(gates, gates, labels, classes=2)))
  >>> numbers["gates"], numbers["always_open"], numbers["conditional"], numbers["mean_open"]
  (2, 1, 1, 0.75)
  """
  numbers = {"gates": len(found.outcomes), "mean_open": float(np.mean(found.open_rates))}
  for position, outcome in enumerate(OUTCOMES):
    numbers[outcome] = int(np.count_nonzero(found.outcomes == position))
  numbers["disagreement"] = float(np.mean(found.disagreement))
  numbers["input_information"] = float(np.mean(found.input_information))
  # There is none where all examples are of one class.
  if found.class_information is not None:
    numbers["class_information"] = float(np.mean(found.class_information))
  return numbers


def by_layer(found: Diagnosis, layers: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
  """Returns the `summary` of each layer.

  Args:
    found: of `diagnose`, with the gates of one layer after those of another.
    layers: name and number of gates of each layer, in that order.
  Returns:
    The summaries, each with its `layer`.

  >>> gates, labels = np.array([[1, 0], [1, 1]] * 50), np.array([0, 1] * 50)
  >>> found = diagnose(tally(gates, gates, labels, classes=2))
  >>> [(row["layer"], row["mean_open"]) for row in by_layer(found, [("conv1", 1), ("conv2", 1)])]
  [('conv1', 1.0), ('conv2', 0.5)]
  """
  rows, start = [], 0
  for name, size in layers:
    # Gates of a layer are adjacent, so each layer is a slice of every array.
    rows.append({"layer": name, **summary(_select(found, slice(start, start + size)))})
    start += size
  return rows


def _select(found: Diagnosis, gates: slice) -> Diagnosis:
  """Returns the diagnosis of some of the gates."""
  arrays = {}
  for field, values in vars(found).items():
    if isinstance(values, np.ndarray):
      arrays[field] = values[gates]
  return dataclasses.replace(found, **arrays)


def _entropy(p: np.ndarray) -> np.ndarray:
  """Computes the entropy, in bits, of a gate that opens with probability p."""
  # Imported here: `import gating_jax` does without SciPy, which takes a while to load.
  from scipy import special

  # In bits, of a gate that opens with probability p.
  return (special.entr(p) + special.entr(1 - p)) / np.log(2)
