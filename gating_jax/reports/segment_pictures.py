"""A picture of how segments were chosen.

Axes: S valid segments of all videos, M videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from gating_jax.reports.lettering import save


def draw(file: Path | BinaryIO, probs: np.ndarray, shares: np.ndarray, correct: np.ndarray | None = None) -> None:
  """Writes a PNG: histograms of probabilities of segments and of the share that is chosen of a video.

  Args:
    file: of the picture.
    probs: `[S]` in [0, 1].
    shares: `[M]` of each video's segments.
    correct: `[M]` whether each video was classified correctly; None where that means nothing.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure, bins = Figure(figsize=(6.5, 2.8), layout="constrained", dpi=110), np.linspace(0, 1, 21)
  segments, videos = figure.subplots(1, 2)
  segments.hist(probs, bins=bins, color="tab:green")
  segments.set(xlabel="probability of a segment", ylabel="segments")
  if correct is None:
    videos.hist(shares, bins=bins, color="tab:blue")
  else:
    videos.hist([shares[correct], shares[~correct]], bins=bins, stacked=True, color=["tab:blue", "tab:red"],
                label=["correct", "wrong"])
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
  videos.set(xlabel="share of a video's segments chosen", ylabel="videos")
  save(figure, file)
