import io

import numpy as np
import pytest
from PIL import Image

from gating_jax.reports import images, page, text


def rows(*counts, channels=3):
  return [np.full((count, 4, 6, channels), 200, np.uint8) for count in counts]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("counts", [(1,), (8, 3, 8), (0, 2)])
def test_rows_of_any_length_are_drawn(counts, channels):
  file, captions = io.BytesIO(), [["$x$ <script>\n"] * count for count in counts]
  figure = images.draw_rows(
    rows(*counts, channels=channels), ["two\nlines"] * len(counts), captions
  )
  assert figure.get_figwidth() == page.WIDTH
  text.save(figure, file)
  picture = np.asarray(Image.open(file).convert("L"))
  assert (picture == 200).mean() > 0.02


def test_no_rows_are_refused():
  with pytest.raises(ValueError, match="rows must hold at least one row of images; got none"):
    images.draw_rows([], [])
