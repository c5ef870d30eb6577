import numpy as np
import pytest
from PIL import Image

from gating_jax.ops.priors import beta
from gating_jax.reports import gates as gate_pictures
from gating_jax.reports import page


def draw(path, logits):
  figure = gate_pictures.draw_gate_statistics(logits, (logits > 0).mean(axis=0), beta(0.6, 0.4))
  page.save_figure(figure, path)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  ("examples", "gates"),
  [
    (20, 7),
    (1, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((50, 1), (1, 5), (2048, 336))),
  ],
)
def test_a_picture_is_written(tmp_path, examples, gates):
  logits = np.random.default_rng(0).normal(size=(examples, gates)).astype(np.float32)
  draw(tmp_path / "gates.png", logits)
  with Image.open(tmp_path / "gates.png") as picture:
    assert picture.format == "PNG"
    assert picture.size == (13 * page.DPI, 4 * page.DPI)
    pixels = np.asarray(picture.convert("RGB"))
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("logit", [110.0, -110.0, 0.0])
def test_gates_that_are_all_alike_are_drawn(tmp_path, logit):
  draw(tmp_path / "gates.png", np.full((30, 4), logit, np.float32))
  assert (tmp_path / "gates.png").stat().st_size > 1000


def test_other_gates_give_another_picture(tmp_path):
  logits = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
  for name, shift in (("closed.png", -3), ("open.png", 3)):
    draw(tmp_path / name, logits + shift)
  assert (tmp_path / "closed.png").read_bytes() != (tmp_path / "open.png").read_bytes()
