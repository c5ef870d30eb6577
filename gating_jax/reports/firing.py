"""Picture of gate statistics: open rates, and probabilities against the prior.

Axes: N examples, G gates.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy import special

from gating_jax.ops.priors import Prior


def draw(path: Path | BinaryIO, logits: np.ndarray, open_rates: np.ndarray, prior: Prior) -> None:
  """Writes a PNG of two histograms and the empirical CDFs.

  The histograms show open rates and open probabilities; the CDFs are drawn with the prior's.

  Args:
    path: of the PNG file, or an open binary file.
    logits: `[N, G]` log-odds of the gates on some test images.
    open_rates: `[G]` fraction of test images for which each gate is open.
    prior: its CDF is drawn next to the empirical ones.
  """
  from matplotlib.figure import Figure  # imports slowly

  # In float64: in float32 the sigmoid is exactly 1 from a logit of 17 on.
  probs = special.expit(logits.astype(np.float64))
  figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
  rates, values, cdfs = figure.subplots(1, 3)
  rates.hist(open_rates, bins=np.linspace(0, 1, 41), color="tab:blue")
  rates.set(
    title=f"How often each of {len(open_rates)} gates is open",
    xlabel="fraction of test images",
    ylabel="gates",
  )
  values.hist(probs.ravel(), bins=np.linspace(0, 1, 41), density=True, color="tab:green")
  values.set(title=f"Open probabilities on {len(probs)} images", xlabel="P(open)", ylabel="density")
  _draw_cdfs(cdfs, probs, prior)
  figure.savefig(path)


def _draw_cdfs(axes, probs: np.ndarray, prior: Prior) -> None:
  n, gates = probs.shape
  # The expected CDF at the i-th of n sorted samples, i / (n + 1), as in the batch-shaping loss.
  level = np.arange(1, n + 1) / (n + 1)
  # At most 60 single gates and 500 points of the pooled CDF: more could not be distinguished.
  for gate in np.unique(np.linspace(0, gates - 1, min(gates, 60)).astype(int)):
    axes.plot(np.sort(probs[:, gate]), level, color="tab:gray", linewidth=0.5, alpha=0.5)
  pooled = np.sort(probs.ravel())
  shown = np.linspace(0, pooled.size - 1, 500).astype(int)
  axes.plot(
    pooled[shown],
    (shown + 1) / (pooled.size + 1),
    color="tab:green",
    linewidth=2,
    label="all gates together",
  )
  x = np.linspace(0, 1, 500)
  axes.plot(
    x,
    np.asarray(prior.cdf(x.astype(np.float32))),
    color="tab:red",
    linewidth=2,
    label=f"prior {prior.name}",
  )
  axes.set(
    title="Empirical CDF of single gates (grey)",
    xlabel="P(open)",
    ylabel="fraction of images",
    ylim=(0, 1),
  )
  axes.legend(loc="upper left")
