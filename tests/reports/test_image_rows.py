import numpy as np
import pytest
from PIL import Image

from gating_jax.reports import image_rows


def rows(*counts, channels=3):
  return [np.full((count, 4, 6, channels), 200, np.uint8) for count in counts]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("counts", [(1,), (8, 3, 8), (0, 2)])
def test_rows_of_any_length_are_drawn(tmp_path, counts, channels):
  path, captions = tmp_path / "rows.png", [["$x$ <script>\n"] * count for count in counts]
  image_rows.draw(path, rows(*counts, channels=channels), ["two\nlines"] * len(counts), captions)
  picture = np.asarray(Image.open(path).convert("L"))
  assert picture.shape[1] == 715
  assert (picture == 200).mean() > 0.02


def test_no_rows_are_refused(tmp_path):
  with pytest.raises(ValueError, match="rows must hold at least one row of images; got none"):
    image_rows.draw(tmp_path / "rows.png", [], [])
