import io

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from gating_jax.reports import page
from gating_jax.reports import tasks as task_pictures

NAN = np.nan
AWARE = np.array([[0.9, NAN, NAN], [0.7, 0.04, NAN], [0.9996, 0.5, 1.0]])
AGNOSTIC = np.array([[0.9, 0.0, 0.0], [0.5, 0.3, 0.0], [0.25, 0.125, 0.6]])
REUSED, NEW, OLDER, FREE = task_pictures._PARTS.values()


def drawn(function, *args, **options):
  """Returns the figure, as it is written."""
  figure = function(*args, **options)
  file = io.BytesIO()
  page.save_figure(figure, file)
  assert Image.open(file).format == "PNG"
  return figure


def panels(figure):
  """Returns the axes with a title: the others are colour bars."""
  return [axes for axes in figure.axes if axes.get_title()]


def numbers(axes):
  """Returns the texts of the cells, by row and column."""
  return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}


def labels(texts):
  return [text.get_text() for text in texts]


def test_accuracies_stand_one_below_the_other_in_per_cent():
  figure = drawn(
    task_pictures.draw_accuracies, AWARE, AGNOSTIC, task_names=["0, 1", "2, 3", "4, 5"]
  )
  aware, agnostic = panels(figure)
  assert aware.get_title() == "task known (task-aware)"
  assert agnostic.get_title() == "task not known (task-agnostic)"
  assert numbers(aware) == {
    (0, 0): "90.0",
    (1, 0): "70.0",
    (1, 1): "4.0",
    (2, 0): "100",
    (2, 1): "50.0",
    (2, 2): "100",
  }
  assert numbers(agnostic)[2, 1] == "12.5"
  assert len(numbers(agnostic)) == 9
  for axes, values in ((aware, AWARE), (agnostic, AGNOSTIC)):
    np.testing.assert_allclose(axes.images[0].get_array().filled(NAN), 100 * values)
    assert axes.images[0].get_clim() == (0, 100)
    assert (
      labels(axes.get_xticklabels()) == labels(aware.get_yticklabels()) == ["0, 1", "2, 3", "4, 5"]
    )
    assert axes.get_xlabel() == "tested on task"
  assert aware.get_ylabel() == "after learning task"
  assert aware.get_position().y0 > agnostic.get_position().y1
  assert figure.axes[-1].get_xlabel() == "accuracy (%)"


def test_numbers_are_readable_on_every_colour_and_unknown_cells_are_empty():
  ladder = np.append(np.linspace(0, 1, 24), NAN).reshape(5, 5)
  (axes,) = panels(drawn(task_pictures.draw_accuracies, ladder))
  assert len(axes.texts) == 24
  linear = lambda colour: [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(colour)[:3]
  ]
  luminance = lambda colour: np.dot([0.2126, 0.7152, 0.0722], linear(colour))
  for text, value in zip(axes.texts, ladder.flat, strict=False):
    low, high = sorted((luminance(text.get_color()), luminance(axes.images[0].cmap(value))))
    assert (high + 0.05) / (low + 0.05) > 4.2, value


@pytest.mark.thin(3)
@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 20])
def test_cells_hold_their_numbers(tasks):
  figure = drawn(
    task_pictures.draw_accuracies,
    np.full((tasks, tasks), 0.888),
    np.full((tasks, tasks), 0.888),
    task_names=["m" * 40] * tasks,
  )
  for axes in panels(figure):
    cell = axes.get_window_extent().width / tasks
    assert len(axes.texts) == tasks**2
    assert max(text.get_window_extent().width for text in axes.texts) < 0.95 * cell
    inside = figure.bbox
    for text in (*axes.get_xticklabels(), axes.title, axes.xaxis.label):
      box = text.get_window_extent()
      assert box.x0 >= inside.x0
      assert box.x1 <= inside.x1
      assert box.y0 >= inside.y0
      assert box.y1 <= inside.y1
  widths = [label.get_window_extent().width for label in axes.get_xticklabels()]
  assert tasks == 1 or max(widths) < cell


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_figures_of_few_tasks_are_as_wide_as_a_phone_and_their_panels_fill_them(tasks):
  ones, counts = (
    np.ones((tasks, tasks)),
    (np.eye(tasks, dtype=int)[0], np.zeros(tasks, int), np.ones(tasks, int)),
  )
  for figure in (
    drawn(task_pictures.draw_accuracies, ones, ones),
    drawn(task_pictures.draw_overlap, ones),
    drawn(task_pictures.draw_filters, {f"conv{i}": counts for i in range(3)}),
  ):
    assert figure.get_figwidth() == pytest.approx(page.WIDTH)
    places = [axes.get_position() for axes in panels(figure)]
    assert max(p.x1 for p in places) - min(p.x0 for p in places) > 0.7


def test_overlap_is_drawn_with_its_unit():
  figure = drawn(task_pictures.draw_overlap, np.array([[1, 0.125], [0.125, 1]]))
  (axes,) = panels(figure)
  assert numbers(axes) == {(0, 0): "100", (0, 1): "12.5", (1, 0): "12.5", (1, 1): "100"}
  assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ["1", "2"]
  assert figure.axes[-1].get_xlabel() == "intersection over union (%)"


# Of 5 units, new, reused, free.
COUNTS = (
  np.array([2, 1, 0]),
  np.array([0, 1, 2]),
  np.array([3, 2, 2]),
)


def test_a_bar_stacks_what_a_task_reuses_takes_does_not_use_and_leaves_free():
  (axes,) = panels(drawn(task_pictures.draw_filters, {"conv1": COUNTS}, task_names="abc"))
  bars = [
    (round(b.get_x() + b.get_width() / 2), b.get_facecolor(), b.get_y(), b.get_height())
    for b in axes.patches
  ]
  of = lambda colour: [(y, height) for _, c, y, height in sorted(bars) if c == to_rgba(colour)]
  assert of(REUSED) == [(0, 0), (0, 1), (0, 2)]
  assert of(NEW) == [(0, 2), (1, 1), (2, 0)]
  assert of(OLDER) == [(2, 0), (2, 1), (2, 1)]
  assert of(FREE) == [(2, 3), (3, 2), (3, 2)]
  assert axes.get_ylim() == (0, 5)
  assert axes.get_title() == "conv1\n2 of 5 free"
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("task", "filters")
  assert labels(axes.get_xticklabels()) == ["a", "b", "c"]


def test_the_legend_names_the_colours():
  (legend,) = drawn(task_pictures.draw_filters, {"conv1": COUNTS}).legends
  assert [
    (text.get_text(), patch.get_facecolor())
    for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
  ] == [
    ("reused from older tasks", to_rgba(REUSED)),
    ("new with this task", to_rgba(NEW)),
    ("older tasks', not used", to_rgba(OLDER)),
    ("free", to_rgba(FREE)),
  ]


@pytest.mark.thin(3)
@pytest.mark.parametrize("layers", [1, 3, 4, 5, 7, 13, 20])
def test_every_layer_has_its_panel_and_tasks_are_named_below_the_lowest(layers):
  shown = panels(drawn(task_pictures.draw_filters, {f"conv{i}": COUNTS for i in range(layers)}))
  assert [axes.get_title().split("\n")[0] for axes in shown] == [f"conv{i}" for i in range(layers)]
  for axes in shown:
    below = [
      other
      for other in shown
      if other.get_position().x0 == pytest.approx(axes.get_position().x0, abs=0.02)
      and other.get_position().y1 < axes.get_position().y0
    ]
    assert labels(axes.get_xticklabels()) == ([""] * 3 if below else ["1", "2", "3"])


def test_a_layer_that_has_grown_has_higher_bars():
  grown = (np.array([4, 3]), np.array([0, 1]), np.array([0, 2]))
  (axes,) = panels(drawn(task_pictures.draw_filters, {"conv": grown}))
  free = [b for b in axes.patches if b.get_facecolor() == to_rgba(FREE)]
  assert [b.get_y() + b.get_height() for b in free] == [4, 9]
  assert axes.get_ylim() == (0, 9)
  assert axes.get_title() == "conv\n2 of 9 free"


def test_names_are_drawn_as_they_are():
  names = [
    r"$\frac{$",
    "<script>",
    "_x",
    "two\nlines",
    "切る",
    "\udcff",
    "",
    "%^{}\\",
    "$x$",
    "a" * 300,
  ]
  shown = [
    "$\\frac{$",
    "<script>",
    "_x",
    "two?lines",
    "切る",
    "?",
    "",
    "%^{}\\",
    "$x$",
    "a" * 19 + "…",
  ]
  ten = np.eye(10)
  counts = (np.eye(10, dtype=int)[0], np.zeros(10, int), np.ones(10, int))
  for figure in (
    drawn(task_pictures.draw_accuracies, ten, ten, task_names=names),
    drawn(task_pictures.draw_overlap, ten, task_names=names),
    drawn(task_pictures.draw_filters, dict.fromkeys(names[:7], counts), task_names=names),
  ):
    for axes in panels(figure)[-1:]:
      assert labels(axes.get_xticklabels()) == shown
      assert not any(label.get_parse_math() for label in axes.get_xticklabels())


@pytest.mark.parametrize(
  ("function", "args", "message"),
  [
    (
      task_pictures.draw_accuracies,
      (np.zeros((2, 3)),),
      r"aware must be \[T, T\], T = 2; got \(2, 3\)",
    ),
    (task_pictures.draw_accuracies, (np.zeros((0, 0)),), r"aware must be \[T, T\]; got \(0, 0\)"),
    (
      task_pictures.draw_accuracies,
      (AWARE, AGNOSTIC[:2, :2]),
      r"agnostic must be \[T, T\], T = 3; got \(2, 2\)",
    ),
    (task_pictures.draw_accuracies, (100 * AWARE,), r"aware must be in \[0, 1\] or NaN; got 90.0"),
    (
      task_pictures.draw_overlap,
      (np.array([[1, -0.5], [0, 1]]),),
      r"overlap must be in \[0, 1\] or NaN; got -0.5",
    ),
    (task_pictures.draw_overlap, (np.float64(1),), r"overlap must be \[T, T\]; got \(\)"),
    (task_pictures.draw_filters, ({},), "layers must hold at least one layer; got none"),
    (
      task_pictures.draw_filters,
      ({"a": COUNTS, "b": tuple(c[:2] for c in COUNTS)},),
      r"layers must all have counts of the same tasks; got \[3, 2\] tasks",
    ),
    (
      task_pictures.draw_filters,
      ({"a": COUNTS[:2]},),
      r"layers\['a'\] must be \(new, reused, free\), each \[T\]; got \[\(3,\), \(3,\)\]",
    ),
    (
      task_pictures.draw_filters,
      ({"a": (COUNTS[0], COUNTS[1][:2], COUNTS[2])},),
      r"layers\['a'\] must be \(new, reused, free\), each \[T\]; got \[\(3,\), \(2,\), \(3,\)\]",
    ),
  ],
)
def test_what_cannot_be_drawn_is_named(function, args, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    function(*args)


@pytest.mark.parametrize(
  ("counts", "dtype"),
  [
    ((2, 1, 0), None),
    ((2, 1, 0), np.uint32),
    ((0.5, 0, 0), None),
    ((2, 0, -1), None),
    ((NAN, 0, 0), None),
  ],
)
def test_what_are_no_counts_is_named(counts, dtype):
  layer = tuple(np.array([c], dtype) for c in counts)
  values = r"new \[{}\], reused \[{}\], free \[{}\]".format(*counts)
  rule = r"layers\['a'\] must be whole counts >= 0, reused at most what older tasks took"
  with pytest.raises(ValueError, match=f"^{rule}; got {values}$"):
    task_pictures.draw_filters({"a": layer})


def test_every_task_needs_its_name():
  for function, arrays in (
    (task_pictures.draw_accuracies, AWARE),
    (task_pictures.draw_filters, {"a": COUNTS}),
  ):
    with pytest.raises(ValueError, match="^task_names must name each of 3 tasks; got 2 names$"):
      function(arrays, task_names="ab")
