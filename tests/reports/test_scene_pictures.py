import numpy as np
import pytest
from PIL import Image

from gating_jax.reports import scene_pictures, scene_table, text

NAMES = ("background", "road", "$sky$")


def draw(path, count=2, colours=1, change=0):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 10, 16, colours), np.uint8)
  truth = rng.choice([0, 1, 2, 255], (count, 10, 16)).astype(np.uint8)
  predicted = rng.integers(0, 3, (count, 10, 16))
  predicted[0, 0] = (predicted[0, 0] + change) % 3
  text.save(scene_pictures.draw(images, truth, predicted, rng.random(count), NAMES), path)
  with Image.open(path) as picture:
    assert picture.format == "PNG"
    return picture.size, np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize(("count", "colours"), [(1, 3), (3, 1)])
def test_a_picture_has_a_column_for_each_scene(tmp_path, count, colours):
  (width, _), pixels = draw(tmp_path / "scenes.png", count, colours)
  assert width == round(1.6 * count * 150)
  known = {tuple(colour) for colour in pixels.reshape(-1, 3)}
  assert {(31, 119, 180), (174, 199, 232), (255, 127, 14), (208, 212, 217)} <= known, (
    "three classes, and no class"
  )


def test_another_prediction_changes_the_lowest_row_alone(tmp_path):
  _, one = draw(tmp_path / "one.png")
  _, other = draw(tmp_path / "other.png", change=1)
  changed = np.flatnonzero((one != other).any(axis=(1, 2)))
  assert changed.size > 0
  assert changed.min() > len(one) * 0.5


def test_table():
  result = {
    "mean_iou": 0.7123,
    "accuracy": 0.9,
    "cross_entropy": 0.1,
    "images": 1200,
    "params": 1000,
    "gate_params": 0,
    "ungated_macs": 5000,
    "macs": 5000,
    "mac_ratio": 1.0,
    "head_macs": 2000,
    "iou/background": 0.9,
    "iou/a name that is much too long": 0.5246,
  }
  lines = dict(scene_table.rows(result))
  assert lines["mean IoU"] == "71.23 %  (2 classes, 1,200 scenes)"
  assert lines["MACs of the head, always run"] == "2,000"
  assert lines["IoU of a name that is much…"] == "52.5 %"
