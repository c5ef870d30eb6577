import pytest
from matplotlib.figure import Figure
from PIL import Image

from gating_jax.reports import text as report_text


@pytest.mark.parametrize(
  ("name", "letters", "expected"),
  [
    ("plain", 5, "plain"),
    ("plain", 4, "pla…"),
    ("plain", 0, "…"),
    ("a\tb\x1b\udcff", 9, "a?b??"),
    (7, 3, "7"),
    ("日本\u3000語 l\u2019été\u00a0", 20, "日本 語 l\u2019été "),
    ("می\u200cخواهم", 9, "می\u200cخواهم"),
    ("a\u202eb\u2028", 9, "a?b?"),
  ],
)
def test_plain(name, letters, expected):
  assert report_text.plain(name, letters) == expected


def test_texts_of_a_saved_figure_are_drawn_as_they_are(tmp_path):
  figure = Figure()
  axes = figure.subplots()
  axes.set_xticks([0, 1], ["$x$", r"$\frac{$"])
  axes.set(title="$x$", ylabel="切")
  axes.plot([0, 1], label="$x$")
  texts = [*axes.get_xticklabels()[:1], axes.title, *axes.legend().get_texts()]
  as_formulas = [text.get_window_extent().width for text in texts]
  report_text.save(figure, tmp_path / "names.png")
  for text, formula in zip(texts, as_formulas, strict=True):
    assert text.get_text() == "$x$"
    assert text.get_window_extent().width > 2 * formula
  with Image.open(tmp_path / "names.png") as picture:
    assert picture.format == "PNG"
