import dataclasses
import io

import numpy as np
import pytest

from gating_jax.images import report
from gating_jax.reports import frame, images, page
from gating_jax.reports import gates as gate_pictures
from tests.helpers import report_data


@pytest.fixture(autouse=True)
def unsaved(monkeypatch):
  """Draws pictures without pixels, which take most of the time."""
  monkeypatch.setattr(page, "save_figure", lambda figure, file: None)


def section(run, title):
  (found,) = [s for s in report.make_sections(run) if s.title.startswith(title)]
  return found


def captions(found):
  return [part.caption for part in found.parts if isinstance(part, page.EmbeddedPicture)]


@pytest.fixture
def drawn(monkeypatch):
  """The brightest pixel of each image, and the text, of every picture of images."""
  calls, draw = [], images.draw_images

  def record(pixels, texts):
    calls.append((pixels.max(axis=(1, 2, 3)).tolist(), list(texts)))
    return draw(pixels, texts)

  monkeypatch.setattr(images, "draw_images", record)
  return calls


def test_a_selective_gate_is_shown_with_the_images_that_open_it(drawn):
  found = section(report_data.run(), "The most selective gates")
  assert found.text.startswith(
    "Of 5 gates, 1 are open for some images but fewer than 10 %. Below are those of each layer "
    "that are open least, 1 gates of 1 layer, layer by layer"
  )
  assert captions(found) == [
    "Layer 01 stage2/conv1, gate 0: open for 3.3 % of images; 5 % of “$b$”, 5 % of “a class of a "
    "v…”."
  ]
  assert drawn[:1] == [([4 * 11, 4 * 7], ["a class of a v…", "$b$"])]


def test_where_no_gate_is_selective_those_open_least_are_shown(drawn, monkeypatch):
  monkeypatch.setattr(
    report_data, "LOGITS", np.where(np.arange(5) == 3, np.float32(-5), report_data.LOGITS)
  )
  found = section(report_data.run(), "The most selective gates")
  assert (
    "0 are open for some images but fewer than 10 %. Below are those of each layer" in found.text
  )
  assert [caption.partition(":")[0] for caption in captions(found)] == [
    "Layer 00 stage1/conv1, gate 2",
    "Layer 01 stage2/conv1, gate 1",
  ]
  assert drawn[0][0] == [0, 12, 24, 36, 48, 60, 72, 84], "of equal logits the first images"


def test_gates_of_a_layer_that_are_open_least_are_shown_but_rare_ones_last():
  rates = np.array([1.0, 0.0, 0.05, 0.004, 0.5, 0.01, 0.009, 0.0999, 0.1])
  of_one_layer = lambda rates, shown: report._selected(np.array(rates), [len(rates)])[
    :shown
  ].tolist()
  assert of_one_layer(rates, 9) == [2, 3, 5, 6, 7]
  assert of_one_layer([0.3, 1.0, 0.2], 9) == [0, 2]
  assert of_one_layer([0.0, 1.0], 9) == []


def test_selective_gates_of_several_layers_are_shown():
  found = report._selected(
    np.r_[np.full(40, 0.02), np.full(40, 0.05), 0.5, np.full(3, 0.09)], [40, 40, 1, 3]
  )
  assert found.tolist() == [0, 1, 2, 3, 4, 40, 41, 42, 43, 81, 82, 83]
  many = report._selected(np.full(50, 0.05), [1] * 50)
  assert (len(many), many[0], many[-1]) == (12, 0, 49)
  rare = report._selected(np.r_[0.001, np.full(20, 0.05)], [21])
  assert 0 not in rare


def test_the_easiest_and_hardest_images_have_their_class_loss_and_macs(drawn):
  section(report_data.run(), "Easiest and hardest")
  (easy, easy_texts), (hard, hard_texts) = drawn[-2:]
  assert easy == [4 * i for i in range(8)]
  assert hard == [4 * i for i in range(59, 51, -1)]
  # Gates 0, 2 and 4: 450 MACs are ungated.
  assert easy_texts[0] == "<script>alert(…\nright\n0 · 0.00075 M"
  assert hard_texts[0] == "a class of a v…\n→ $b$\n59 · 0.00065 M"


def test_what_gates_tell_of_the_class(monkeypatch):
  seen = {}
  bars, table = gate_pictures.draw_class_bars, gate_pictures.draw_class_map
  monkeypatch.setattr(
    gate_pictures, "draw_class_bars", lambda *args: seen.update(bars=args) or bars(*args)
  )
  monkeypatch.setattr(
    gate_pictures, "draw_class_map", lambda *args: seen.update(map=args) or table(*args)
  )
  section(report_data.run(), "Gates and classes")
  rates, names, classes = seen["map"]
  assert names[0] == "00:2", "is open for class 0 alone"
  np.testing.assert_allclose(rates[0], [1, 0, 0])
  assert "01:1" in names
  assert not {"00:0", "00:1"} & set(names), "are the same for all images"
  # H(1/3) without the bits that chance adds
  assert seen["bars"][1][0] == "00:2: 0.89 bits, open for 33 %"
  assert list(classes) == list(report_data.CLASSES)


def test_classes_beyond_those_that_fit_the_map_are_counted(monkeypatch):
  run, counted = report_data.run(), " of 3 classes, the 2 whose rates differ most. Similar gates"
  assert counted not in captions(report._classes(run))[0]
  monkeypatch.setattr(gate_pictures, "MOST_CLASSES", 2)
  assert counted in captions(report._classes(run))[0]


def test_sections_that_make_no_sense_are_left_out_or_say_so():
  titles = lambda run: [s.title for s in report.make_sections(run)]
  assert titles(report_data.run()) == [
    "Result",
    "Score and multiply-accumulates",
    "Gates of each layer",
    "Gates over training",
    "The most selective gates, and the images that open them",
    "Gates and classes",
    "Easiest and hardest images",
    "Predictions",
    "Time",
    "Settings",
    "About this run",
  ]
  assert titles(report_data.run("scenes")) == [
    "Result",
    "Score and multiply-accumulates",
    "Some scenes",
    "Gates of each layer",
    "Gates over training",
    "The most selective gates, and the scenes that open them",
    "Easiest and hardest scenes",
    "Time",
    "Settings",
    "About this run",
  ]
  ungated = report_data.run("ungated")
  assert titles(ungated) == [
    "Result",
    "Score and multiply-accumulates",
    "Easiest and hardest images",
    "Predictions",
    "Time",
    "Settings",
    "About this run",
  ]
  assert "This network has no gates" in report.make_opening(ungated).text
  assert section(ungated, "Score").text == "Every image takes the same multiply-accumulates: 1,000."
  once = report_data.run(tests=[report_data.run().tests[-1]])
  assert "tested once" in section(once, "Score").text
  assert len(captions(section(once, "Score"))) == 1


def test_easy_and_hard_are_quarters_by_loss_wherever_they_stand():
  run = report_data.run()
  result = run.tests[-1]
  easy, hard = (result[f"macs_of_quarter{quarter}"] for quarter in (1, 4))
  said = (
    f"The hardest quarter of images takes {100 * (1 - hard / easy):.1f} % fewer MACs than the "
    f"easiest ({hard:.3g} and {easy:.3g})."
  )
  assert hard < easy
  assert section(run, "Score").text.startswith(said)
  assert said in section(run, "Easiest and hardest").text
  assert [run.images.macs[quarter].mean() for quarter in report._quarters(run)] == [
    result[f"macs_of_quarter{i}"] for i in range(1, 5)
  ]


def test_easy_and_hard_images_may_take_as_many_macs():
  run = report_data.run()
  same = dataclasses.replace(run.images, macs=np.full(60, 500.0))
  assert report._on_hard(dataclasses.replace(run, images=same)).startswith(
    "The hardest quarter of images takes as many MACs as the easiest (500 and 500)."
  )


def test_a_network_without_gates_has_no_behaviour_of_gates():
  assert report_data.run().gated is not None
  with pytest.raises(ValueError, match="the network has no gates"):
    _ = report_data.run("ungated").gated


def test_large_numbers_stand_next_to_the_ungated_baseline():
  around = frame.Surroundings(baseline=frame.Baseline("dense", {"accuracy": 0.75}))
  run = report_data.run(how="gates=none", around=around)
  begin = report.make_opening(run)
  accuracy, macs, time = begin.numbers
  assert (accuracy.value, accuracy.baseline) == ("66.67 %", "ungated: 75.00 %")
  assert (
    "The ungated baseline is the run “dense”; this one is 8.33 points below it." in accuracy.meaning
  )
  assert (macs.value, macs.baseline) == ("62.2 %", "ungated: 100 %, 1 k per image")
  assert (time.value, time.baseline) == ("–", "not measured, nor was the ungated network")
  assert begin.text == ""
  without = report.make_opening(report_data.run(how="gates=none"))
  assert without.numbers[0].baseline == "ungated: no baseline found"
  assert without.text.startswith(
    "No ungated baseline: next to this run directory there is no finished run"
  )


def test_the_page_escapes_what_the_data_set_says():
  run = report_data.run()
  html = page.render_page(run.title, report.make_sections(run), subtitle=run.subtitle)
  assert "<script" not in html
  assert "tiny on &lt;b&gt;" in html
  assert "&lt;i&gt;digits" in html


@pytest.mark.parametrize(
  ("layers", "classes", "gates"),
  [pytest.param(100, 1000, 60, marks=pytest.mark.slow), (1, 2, 1), (30, 41, 2)],
)
def test_pictures_of_many_and_few_are_as_wide_and_not_too_tall(layers, classes, gates):
  rng = np.random.default_rng(0)
  names = gate_pictures.layer_names([("a_very_long_name_of_a/layer", 4)] * layers)
  counts = {
    f"gates/layer{i:02d}/{m}": rng.integers(0, 9, 40)
    for i in range(layers)
    for m in ("probs", "open_rates")
  }
  history, rates = [{"step": 10 * i, **counts} for i in range(3)], rng.random((gates, classes))
  texts = [f"class {i}" for i in range(classes)]
  figures = [
    gate_pictures.draw_histograms(history, names, "probs"),
    gate_pictures.draw_cdfs(history, names, None),
    gate_pictures.draw_class_map(rates, ["00:1"] * gates, texts),
    gate_pictures.draw_class_bars(rates[:6], ["one"] * min(gates, 6), texts),
  ]
  for figure in figures:
    width, height = figure.get_size_inches()
    assert (width, height < 16) == (5, True)
    page.save_figure(figure, io.BytesIO())
  assert len(figures[0].axes) == -(-min(layers, 24) // 3) * 3
  assert len(figures[2].axes[0].get_xticklabels()) == min(classes, 40)


def test_the_class_map_keeps_the_classes_that_differ_most():
  rates = np.full((3, 50), 0.5)
  rates[:, 45] = 0, 1, 0
  figure = gate_pictures.draw_class_map(rates, ["a", "b", "c"], [f"class {i}" for i in range(50)])
  assert "class 45" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_large_images_are_made_small():
  rng = np.random.default_rng(0)
  figure = images.draw_images(rng.integers(0, 256, (2, 300, 600, 3), np.uint8), ["a", "b"])
  assert [axes.images[0].get_array().shape for axes in figure.axes[:2]] == [(64, 128, 3)] * 2


def test_every_test_image_has_its_class_prediction_loss_and_macs():
  run = report_data.run()
  found = report.predict_images(run.images, report_data.CLASSES)
  assert found.header() == ["image", "class", "prediction", "loss", "MACs", "right"]
  assert len(found.rows()) == len(run.images.macs)
  np.testing.assert_array_equal(found.right, run.images.correct)
  row, first = found.rows()[0], int(run.images.labels[0])
  assert row[:2] == ["0", report_data.CLASSES[first]]
  assert float(row[4]) == pytest.approx(run.images.macs[0], abs=0.5)
  assert report.predict_images(report_data.run("scenes").images, report_data.CLASSES) is None
