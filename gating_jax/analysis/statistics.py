"""Statistics of gates and of multiply-accumulates over images: sums, correlations, histograms.

Memory holds one batch and `[U, U]` counts for each group, for any number of images.

Axes: M images, N of a batch, U units of a group.
Reference: Bejnordi et al., 2020, section 5 (always open, always closed, conditional).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np

from gating_jax.analysis.outcomes import ALWAYS_CLOSED, ALWAYS_OPEN

# Bins of a histogram, equal parts of [0, 1].
BINS = 40
_DECILES = range(10, 100, 10)


@dataclasses.dataclass(frozen=True)
class GateStatistics:
  """Opening statistics of one group of units.

  Attributes:
    images: M.
    opened: `[U]` number of images on which each unit is open.
    together: `[U, U]` number of images on which both units are open.
    highest, lowest: `[U]` the largest and the smallest logit seen.

  >>> counter = GateCounter(2)
  >>> counter.add(np.array([[1.0, -1.0], [2.0, 3.0]]))
  >>> counter.result().varies
  array([False,  True])
  """

  images: int
  opened: np.ndarray
  together: np.ndarray
  highest: np.ndarray
  lowest: np.ndarray

  @property
  def open_rates(self) -> np.ndarray:
    """Returns the fraction of images on which each unit is open, `[U]`."""
    return self.opened / self.images

  @property
  def always_open(self) -> np.ndarray:
    """Marks units that are open on more than 99 % of images, `[U]`."""
    return self.open_rates > ALWAYS_OPEN

  @property
  def always_closed(self) -> np.ndarray:
    """Marks units that are open on less than 1 % of images, `[U]`."""
    return self.open_rates < ALWAYS_CLOSED

  @property
  def varies(self) -> np.ndarray:
    """Marks units that are neither always open nor always closed, `[U]`.

    They need not be conditional: noise may open them, too; see `outcomes.outcomes`.
    """
    return ~(self.always_open | self.always_closed)

  @property
  def conditional(self) -> np.ndarray:
    """Returns `varies`, by its former name."""
    warnings.warn("conditional is now called varies", DeprecationWarning, stacklevel=2)
    return self.varies

  @property
  def correlation(self) -> np.ndarray:
    """Computes Pearson's correlation `[U, U]` of open and closed as 1 and 0.

        (P(both) - P(i) P(j)) / sqrt(P(i) (1 - P(i)) P(j) (1 - P(j)))

    It is 0 where a unit never changes.
    """
    rates = self.open_rates
    deviation = np.sqrt(rates * (1 - rates))
    scale = deviation[:, None] * deviation
    covariance = self.together / self.images - rates[:, None] * rates
    # A unit that never changes has no deviation: no division by 0.
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


class GateCounter:
  """Sums over batches for the `GateStatistics` of a group of U units.

  >>> counter = GateCounter(2)
  >>> counter.add(np.array([[1.0, -1.0], [2.0, 3.0]]))
  >>> counter.result().open_rates
  array([1. , 0.5])
  """

  def __init__(self, units: int):
    self._images = 0
    self._opened = np.zeros(units, np.int64)
    self._together = np.zeros((units, units), np.int64)
    self._highest = np.full(units, -np.inf, np.float32)
    self._lowest = np.full(units, np.inf, np.float32)

  def add(self, logits: np.ndarray) -> None:
    """Adds the logits of a batch, `[N, U]`; a unit is open where its logit is above 0."""
    self._images += len(logits)
    # float32 makes the product fast; it is exact up to 2**24 images a batch.
    gates = (logits > 0).astype(np.float32)
    self._opened += gates.sum(axis=0).astype(np.int64)
    # P(both) needs the counts of pairs: a product of 0/1 gates over the batch.
    self._together += (gates.T @ gates).astype(np.int64)
    # Pruning keeps the units that came nearest to opening, those of the highest logits.
    self._highest = np.maximum(self._highest, logits.max(axis=0))
    self._lowest = np.minimum(self._lowest, logits.min(axis=0))

  def result(self) -> GateStatistics:
    """Returns the statistics of all images that were added."""
    return GateStatistics(
      images=self._images,
      opened=self._opened,
      together=self._together,
      highest=self._highest,
      lowest=self._lowest,
    )


def histogram(values: np.ndarray) -> np.ndarray:
  """Counts the values in each of `BINS` equal parts of [0, 1]."""
  return np.histogram(values, BINS, (0, 1))[0]


def layer_histograms(
  names: Sequence[str],
  logits: Sequence[np.ndarray],
  open_rates: Sequence[np.ndarray],
  *,
  group: str = "gates",
) -> dict[str, np.ndarray]:
  """Returns `[BINS]` counts over [0, 1] of each layer's open probabilities and open rates.

  Args:
    names: names of the layers, as `models.summary.layer_names` has them.
    logits: `[N, gates of the layer]` of each layer.
    open_rates: `[gates of the layer]` of each layer.
    group: prefix of the counts' names, such as `gates` for `gates/stage1_block1/conv1/probs`.
  """
  # Imported here: `import gating_jax` does without SciPy, which takes a while to load.
  from scipy import special

  counts = {}
  for layer, z, rates in zip(names, logits, open_rates, strict=True):
    counts[f"{group}/{layer}/probs"] = histogram(special.expit(z))
    counts[f"{group}/{layer}/open_rates"] = histogram(rates)
  return counts


def mac_spread(macs: np.ndarray, losses: np.ndarray) -> dict[str, float]:
  """Computes MACs over images: mean, spread, deciles, and means of four quarters by difficulty.

  Args:
    macs: `[M]`, multiply-accumulates of each image.
    losses: `[M]`, cross-entropy of each image; quarter 1 has the smallest, quarter 4 the largest.
  Returns:
    MACs per image by name, such as `macs_std`, `macs_p90` and `macs_of_quarter1`.

  >>> mac_spread(np.arange(8.0), -np.arange(8.0))["macs_of_quarter1"]
  6.5
  """
  spread = {
    "macs": float(np.mean(macs)),
    "macs_std": float(np.std(macs)),
    "macs_min": float(np.min(macs)),
    "macs_max": float(np.max(macs)),
  }
  for percent in _DECILES:
    spread[f"macs_p{percent}"] = float(np.percentile(macs, percent))
  # A stable sort: images of equal loss keep their order, so that a rerun gives the same quarters.
  by_loss = macs[np.argsort(losses, kind="stable")]
  for number, quarter in enumerate(np.array_split(by_loss, min(4, len(macs))), 1):
    spread[f"macs_of_quarter{number}"] = float(np.mean(quarter))
  return spread
