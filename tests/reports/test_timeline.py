import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from gating_jax.reports import page, timeline
from gating_jax.reports.timeline import TimeLine

INCH = page.DPI
CHOSEN, CLOSED, RELEVANT, NO_UNIT = (
  np.array(ImageColor.getrgb(getattr(timeline, name)))
  for name in ("_CHOSEN", "_CLOSED", "_RELEVANT", "_NO_UNIT")
)


def line(segments, valid=None, seed=0, **truth):
  rng = np.random.default_rng(seed)
  probs = rng.uniform(0.2, 1, segments)
  gates = (rng.random(segments) < 0.4).astype(float)
  valid = np.arange(segments) < (valid or segments)
  return TimeLine(probs=probs, gates=gates, valid=valid, title=f"video {seed}", **truth)


def pixels(tmp_path, lines, **options):
  page.save_figure(timeline.draw_time_lines(lines, **options), tmp_path / "line.png")
  with Image.open(tmp_path / "line.png") as picture:
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB")).astype(int)


def pixels_of(figure):
  file = io.BytesIO()
  page.save_figure(figure, file)
  return np.asarray(Image.open(file).convert("RGB")).astype(int)


def at_segments(picture, inches_down, segments, count=None):
  """Returns the colours at the centres of segments, or of `count` equal parts of the axis."""
  count = count or segments
  columns = (0.75 + 11 * (np.arange(count) + 0.5) / count) * INCH
  return picture[round(inches_down * INCH), columns.astype(int)]


@pytest.mark.parametrize("segments", [1, 2, 16, 64, 128])
def test_every_segment_has_a_bar_in_the_colour_of_its_choice(tmp_path, segments):
  shown = line(segments)
  bars = at_segments(pixels(tmp_path, [shown]), 0.15 + 0.3 + 0.85 * 0.95, segments)
  np.testing.assert_array_equal(bars, np.where(shown.gates[:, None] > 0, CHOSEN, CLOSED))


def test_bars_are_as_high_as_the_probabilities(tmp_path):
  shown = TimeLine(
    np.array([0.0, 0.25, 0.75, 1.0, np.nan]), np.ones(5), np.ones(5, bool), "a title"
  )
  picture = pixels(tmp_path, [shown])[round(0.46 * INCH) : round(1.29 * INCH)]
  columns = (0.75 + 11 * (np.arange(5) + 0.5) / 5) * INCH
  height = (picture[:, columns.astype(int)] == CHOSEN).all(axis=-1).sum(axis=0) / len(picture)
  np.testing.assert_allclose(height, [0, 0.25, 0.75, 1, 0], atol=0.04)


@pytest.mark.parametrize("colours", [1, 3])
def test_chosen_thumbnails_are_bright_and_others_dimmed(tmp_path, colours):
  frames = np.broadcast_to(
    np.arange(0, 160, 10, dtype=np.uint8)[:, None, None, None], (16, 8, 8, colours)
  )
  shown = line(16, thumbnails=frames)
  values = at_segments(pixels(tmp_path, [shown]), 0.15 + 0.3 + 0.3, 16)
  own = 10.0 * np.arange(16)
  expected = np.where(shown.gates > 0, own, 255 - 0.3 * (255 - own))
  assert 0 < shown.gates.sum() < 16
  np.testing.assert_allclose(values, np.repeat(expected[:, None], 3, axis=1), atol=2)


def test_a_long_videos_thumbnail_shows_its_likeliest_chosen_or_middle_segment(tmp_path):
  segments = 48
  frames = np.broadcast_to(
    np.arange(0, 240, 5, dtype=np.uint8)[:, None, None, None], (segments, 8, 8, 1)
  )
  probs, gates = np.full(segments, 0.3), np.zeros(segments)
  gates[[0, 1, 2]], probs[:4] = 1, [0.6, 0.7, 0.6, 0.9]
  shown = np.array([1, 2, *range(5, segments, 2)])
  picture = pixels(tmp_path, [TimeLine(probs, gates, np.ones(segments, bool), "a title", frames)])
  values = at_segments(picture, 0.15 + 0.3 + 0.2, segments, count=24)[:, 0]
  np.testing.assert_allclose(
    values, np.where(gates[shown] > 0, 5 * shown, 255 - 0.3 * (255 - 5 * shown)), atol=1
  )


def test_the_truth_is_aligned_with_the_segments(tmp_path):
  units = np.array([0, 0, -1, 4, 4, 4, -1, 0])
  shown = line(8, relevant=units == 4, units=units)
  picture = pixels(tmp_path, [shown], unit_names=["", "b", "c", "d", ""])
  relevant = at_segments(picture, 0.15 + 0.3 + 0.85 + 0.07 + 0.05, 8)
  np.testing.assert_array_equal(relevant, np.where((units == 4)[:, None], RELEVANT, NO_UNIT))
  colours = at_segments(picture, 0.15 + 0.3 + 0.85 + 0.07 + 0.1 + 0.035 + 0.1, 8)
  assert (colours[units == 0] == colours[0]).all()
  assert (colours[units == 4] == colours[3]).all()
  assert (colours[units < 0] == NO_UNIT).all()
  assert (colours[0] != colours[3]).any()


def test_padding_is_not_drawn(tmp_path):
  truth = {
    "thumbnails": np.random.default_rng(1).integers(0, 255, (9, 6, 8, 3), np.uint8),
    "units": np.arange(9) % 4,
  }
  padded = line(9, valid=5, **truth)
  alone = TimeLine(
    padded.probs[:5],
    padded.gates[:5],
    padded.valid[:5],
    padded.title,
    **{name: values[:5] for name, values in truth.items()},
  )
  np.testing.assert_array_equal(pixels(tmp_path, [padded]), pixels(tmp_path, [alone]))


def test_videos_stand_one_below_the_other(tmp_path):
  first, second = line(4, seed=1), line(30, seed=2)
  both, alone = pixels(tmp_path, [first, second]), pixels(tmp_path, [second])
  extra = len(both) - len(alone)
  assert extra == pytest.approx((0.3 + 0.85 + 0.07 + 0.25) * INCH, abs=1)
  bars = at_segments(both, extra / INCH + 0.15 + 0.3 + 0.85 * 0.95, 30)
  np.testing.assert_array_equal(bars, np.where(second.gates[:, None] > 0, CHOSEN, CLOSED))


def test_without_a_title_nothing_is_written_above(tmp_path):
  titled = line(5)
  untitled = dataclasses.replace(titled, title="")
  with_title, without = pixels(tmp_path, [titled]), pixels(tmp_path, [untitled])
  header = round(0.3 * INCH)
  assert len(with_title) - len(without) == header
  np.testing.assert_array_equal(without[30:], with_title[30 + header :])


@pytest.mark.parametrize("width", [4, 9.5])
def test_figures_are_as_wide_as_they_are_asked_to_be(width):
  first, second = (dataclasses.replace(line(12, seed=seed), title="") for seed in (1, 2))
  for shown, figure in zip(
    (first, second), timeline.draw_each_time_line([first, second], width=width), strict=True
  ):
    assert figure.get_figwidth() == width + 1
    columns = (0.75 + width * (np.arange(12) + 0.5) / 12) * INCH
    bars = pixels_of(figure)[round((0.15 + 0.85 * 0.95) * INCH), columns.astype(int)]
    np.testing.assert_array_equal(bars, np.where(shown.gates[:, None] > 0, CHOSEN, CLOSED))


def test_a_unit_has_one_colour_in_all_figures_and_each_names_its_own():
  ids = [np.array([0, 0, 3, 3]), np.array([3, 3, 5, 5])]
  figures = timeline.draw_each_time_line(
    [dataclasses.replace(line(4), title="", units=units) for units in ids]
  )
  strips = [at_segments(pixels_of(figure), 0.15 + 0.85 + 0.07 + 0.17, 4) for figure in figures]
  np.testing.assert_array_equal(strips[0][2], strips[1][0])
  assert (strips[0][0] != strips[1][2]).any()
  assert [
    [text.get_text() for text in figure.legends[0].get_texts()][2:] for figure in figures
  ] == [["0", "3"], ["3", "5"]]


def test_names_are_drawn_as_they_are(tmp_path):
  names = [
    "$\\frac{$",
    "<script>alert(1)</script>",
    "a" * 300,
    "切る",
    "two\nlines\t",
    "\udcff",
    "",
    "%_^{}\\",
    "$x$",
  ]
  shown = line(len(names), units=np.arange(len(names)))
  plain = pixels(tmp_path, [shown])
  named = pixels(
    tmp_path, [TimeLine(**{**vars(shown), "title": "$\\bad{$" + "b" * 400})], unit_names=names
  )
  assert named.shape[1] == plain.shape[1] == 12 * INCH
  assert (named[-20:, :5] == 255).all()
  assert (named[:40, -5:] == 255).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"gates": np.ones(3)},
      r"gates must be \[T, ...\] like valid; got \(3,\), valid \(4,\) \('clip'\)",
    ),
    (
      {"relevant": np.ones(5, bool)},
      r"relevant must be \[T, ...\] like valid; got \(5,\), valid \(4,\) \('clip'\)",
    ),
    ({"valid": np.zeros(4, bool)}, r"valid must be True for some segment; got none \('clip'\)"),
    (
      {"thumbnails": np.zeros((4, 8, 8, 2), np.uint8)},
      r"thumbnails must be \[T, H, W, D\], D 1 or 3; got \(4, 8, 8, 2\) \('clip'\)",
    ),
    ({"units": np.array([0, 1, 2, 3])}, "unit_names must name every unit; got 3 names, unit 3"),
  ],
)
def test_what_cannot_be_drawn_is_named(change, message):
  arrays = {
    "probs": np.ones(4),
    "gates": np.ones(4),
    "valid": np.ones(4, bool),
    "title": "clip",
  } | change
  with pytest.raises(ValueError, match=f"^{message}$"):
    timeline.draw_time_lines([TimeLine(**arrays)], unit_names="abc")


def test_no_videos_are_no_picture():
  with pytest.raises(ValueError, match="^lines must hold at least one TimeLine; got none$"):
    timeline.draw_time_lines([])


PROBS, SHARES = np.array([0.0, 0.01, 0.99, 1.0, 1.0]), np.array([0.2, 0.2, 0.2, 0.8])


def heights(axes):
  return sorted(
    (round(bar.get_x(), 2), bar.get_height()) for bar in axes.patches if bar.get_height()
  )


def test_segments_and_videos_are_counted():
  figure = timeline.draw_shares(PROBS, SHARES)
  segments, videos = figure.axes
  assert figure.get_figwidth() == page.WIDTH
  assert heights(segments) == [(0, 2), (0.95, 3)]
  assert sum(height for _, height in heights(videos)) == 4
  assert max(height for _, height in heights(videos)) == 3
  assert videos.get_legend() is None


@pytest.mark.parametrize("correct", [[True, True, False, False], [True] * 4])
def test_videos_that_were_classified_correctly_stand_below_the_others(correct):
  correct = np.array(correct)
  videos = timeline.draw_shares(PROBS, SHARES, correct).axes[1]
  right, wrong = (sum(bar.get_height() for bar in bars) for bars in videos.containers)
  assert (right, wrong) == (correct.sum(), (~correct).sum())
  assert [text.get_text() for text in videos.get_legend().get_texts()] == [
    "classified correctly",
    "wrongly",
  ]
