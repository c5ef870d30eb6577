import io

import numpy as np
import pytest
from PIL import Image

from gating_jax.reports import images as image_pictures
from gating_jax.reports import page


def rows(*counts, channels=3):
  return [np.full((count, 4, 6, channels), 200, np.uint8) for count in counts]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("counts", [(1,), (8, 3, 8), (0, 2)])
def test_rows_of_any_length_are_drawn(counts, channels):
  file, captions = io.BytesIO(), [["$x$ <script>\n"] * count for count in counts]
  figure = image_pictures.draw_image_rows(
    rows(*counts, channels=channels), ["two\nlines"] * len(counts), captions
  )
  assert figure.get_figwidth() == page.WIDTH
  page.save_figure(figure, file)
  picture = np.asarray(Image.open(file).convert("L"))
  assert (picture == 200).mean() > 0.02


def test_no_rows_are_refused():
  with pytest.raises(ValueError, match="rows must hold at least one row of images; got none"):
    image_pictures.draw_image_rows([], [])


NAMES = ("background", "road", "$sky$")


def draw_scenes(path, count=2, colours=1, change=0):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 10, 16, colours), np.uint8)
  truth = rng.choice([0, 1, 2, 255], (count, 10, 16)).astype(np.uint8)
  predicted = rng.integers(0, 3, (count, 10, 16))
  predicted[0, 0] = (predicted[0, 0] + change) % 3
  figure = image_pictures.draw_scenes(
    images,
    truth=truth,
    predicted=predicted,
    mac_ratios=rng.random(count),
    class_names=NAMES,
  )
  page.save_figure(figure, path)
  with Image.open(path) as picture:
    assert picture.format == "PNG"
    return picture.size, np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(("count", "colours"), [(1, 3), (3, 1)])
def test_a_picture_has_a_column_for_each_scene(tmp_path, count, colours):
  (width, _), pixels = draw_scenes(tmp_path / "scenes.png", count, colours)
  assert width == round(1.6 * count * page.DPI)
  known = {tuple(colour) for colour in pixels.reshape(-1, 3)}
  assert {(31, 119, 180), (174, 199, 232), (255, 127, 14), (208, 212, 217)} <= known, (
    "three classes, and no class"
  )


def test_another_prediction_changes_the_lowest_row_alone(tmp_path):
  _, one = draw_scenes(tmp_path / "one.png")
  _, other = draw_scenes(tmp_path / "other.png", change=1)
  changed = np.flatnonzero((one != other).any(axis=(1, 2)))
  assert changed.size > 0
  assert changed.min() > len(one) * 0.5
