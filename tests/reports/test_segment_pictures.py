import numpy as np
import pytest

from gating_jax.reports import page, segment_pictures

PROBS, SHARES = np.array([0.0, 0.01, 0.99, 1.0, 1.0]), np.array([0.2, 0.2, 0.2, 0.8])


def heights(axes):
  return sorted(
    (round(bar.get_x(), 2), bar.get_height()) for bar in axes.patches if bar.get_height()
  )


def test_segments_and_videos_are_counted():
  figure = segment_pictures.draw_shares(PROBS, SHARES)
  segments, videos = figure.axes
  assert figure.get_figwidth() == page.WIDTH
  assert heights(segments) == [(0, 2), (0.95, 3)]
  assert sum(height for _, height in heights(videos)) == 4
  assert max(height for _, height in heights(videos)) == 3
  assert videos.get_legend() is None


@pytest.mark.parametrize("correct", [[True, True, False, False], [True] * 4])
def test_videos_that_were_classified_correctly_stand_below_the_others(correct):
  correct = np.array(correct)
  videos = segment_pictures.draw_shares(PROBS, SHARES, correct).axes[1]
  right, wrong = (sum(bar.get_height() for bar in bars) for bars in videos.containers)
  assert (right, wrong) == (correct.sum(), (~correct).sum())
  assert [text.get_text() for text in videos.get_legend().get_texts()] == [
    "classified correctly",
    "wrongly",
  ]
