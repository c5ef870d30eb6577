"""A picture of how segments were chosen, narrow enough for a phone.

Axes: S valid segments of all videos, M videos.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_WIDTH, _BINS = 5.0, 20  # inches; of histograms


def draw_shares(probs: np.ndarray, shares: np.ndarray, correct: np.ndarray | None = None) -> Any:
  """A figure: histograms of probabilities of segments and of the share that is chosen of a video.

  Args:
    probs: `[S]` in [0, 1].
    shares: `[M]` of each video's segments.
    correct: `[M]` whether each video was classified correctly; None where that means nothing.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure, bins = Figure(figsize=(_WIDTH, 4.2), layout="constrained"), np.linspace(0, 1, _BINS + 1)
  segments, videos = figure.subplots(2, 1, sharex=True)
  segments.hist(probs, bins=bins, color="tab:green")
  segments.set(xlabel="probability of a segment", ylabel="segments")
  segments.tick_params(labelbottom=True)
  if correct is None:
    videos.hist(shares, bins=bins, color="tab:blue")
  else:
    videos.hist([shares[correct], shares[~correct]], bins=bins, stacked=True, color=["tab:blue", "tab:orange"],
                label=["classified correctly", "wrongly"])
    videos.legend(frameon=False)
  videos.set(xlabel="share of a video's segments chosen", ylabel="videos")
  for axes in (segments, videos):
    axes.spines[["top", "right"]].set_visible(False)
  return figure
