import functools
import importlib
import io
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from gating_jax.analysis import scores
from gating_jax.continual import build as continual_build
from gating_jax.continual import report as continual_report
from gating_jax.images import report as image_report
from gating_jax.models import vggs, video_backbones
from gating_jax.models.resnets import ResNet
from gating_jax.reports import comparison, page
from gating_jax.reports import images as image_pictures
from gating_jax.reports.compared_runs import Run
from gating_jax.training import rundir
from gating_jax.video import build as video_build
from gating_jax.video import report as video_report
from tests.helpers import report_data
from tests.helpers.browser import BROWSER, look_at, printed

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed"),
]


WIDTHS = (390, 800, 1400)
FINE = {"messages": [], "broken": [], "nameless": 0, "wide": [], "scrolls": False, "faint": []}


def check(file, width):
  """Returns the browser's findings at a width, after checking light and dark."""
  found, dark = look_at(file, width), look_at(file, width, dark=True)
  assert {name: found[name] for name in FINE} == FINE
  assert {name: dark[name] for name in FINE} == FINE
  assert (found["dark"], dark["dark"]) == (False, True)
  return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["gated", "ungated", "scenes"])
def test_a_report_loads_and_fits(tmp_path, kind, width):
  run = report_data.run(kind)
  image_report.write_report(tmp_path / "report.html", run)
  found = check(tmp_path / "report.html", width)
  assert found["images"] == {"gated": 12, "ungated": 3, "scenes": 11}[kind]
  assert found["headings"] == [section.title for section in image_report.make_sections(run)]
  assert found["headings"][0] == "Result"
  assert found["shut"] == len(found["headings"])
  assert [number.endswith("%") for number in found["numbers"]] == [True, True, False]
  assert found["height"] < {390: 2600, 800: 1800, 1400: 1600}[width], "what is folded is short"


def test_a_printed_page_has_what_is_folded(tmp_path):
  picture = page.embed_figure(
    image_pictures.draw_image_rows([np.zeros((8, 4, 4, 3), np.uint8)], ["a row"]), "Images."
  )

  def pages(count):
    page.write_page(
      tmp_path / "page.html",
      "A run",
      [page.Section(f"Part {i}", parts=[picture] * 4) for i in range(count)],
    )
    return len(re.findall(rb"/Type\s*/Page\b", printed(tmp_path / "page.html")))

  assert pages(1) == 1
  assert pages(9) >= 3


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_loads_and_fits(tmp_path, width):
  run = lambda name, accuracy, macs, gating: Run(
    name,
    {"experiment": "classification", "model.gating": gating},
    {"step": 9, "accuracy": accuracy, "macs": macs},
    [{"step": step, "split": "test", "accuracy": accuracy} for step in (1, 9)],
    gating == "none",
  )
  runs = [
    run("gated", 0.9, 5e6, "channel"),
    run("a_name_that_is_as_long_as_it_can_be_" * 3, 0.95, 9e6, "none"),
    *(run(f"ungated{i}", 0.9 - i / 30, 1e6 * i, "none") for i in (1, 3)),
  ]
  begin, sections = comparison.page_content(runs)
  page.write_page(
    tmp_path / "page.html", comparison.TITLE, sections, subtitle="some runs", opening=begin
  )
  found = check(tmp_path / "page.html", width)
  assert found["headings"] == ["Results", "Configs", "During training"]
  assert found["images"] == 2


def task_page(folder):
  """Writes the page of a run that has learnt two tasks with a net of two layers."""
  config = importlib.import_module("configs.split_digits").get_config()
  config.update_from_flattened_dict(
    {"model.name": "tiny", "tasks.count": 2, "optim.batch_size": 64}
  )
  experiment = continual_build.build(config)
  learner, tests = experiment.fresh(), np.array([[0.9, np.nan], [0.8, 0.7]])
  memory = learner.memory.replace(relevant=np.arange(16) % 3 > np.array([[0], [1]]))
  learner = learner.replace(task=2, memory=memory, table=learner.table._make([tests] * 5))
  continual_report.write_report(experiment, learner, rundir.RunDir(folder), 10)


def video_page(folder):
  """Writes the page of made choices among the segments of made videos."""
  config = importlib.import_module("configs.composed_timegate").get_config()
  config.update_from_flattened_dict(
    {
      "model.light.name": "tiny",
      "model.heavy.name": "tiny",
      "data.train_videos": 32,
      "data.test_videos": 20,
      "data.segments": 30,
      "pretrain.batch_size": 16,
      "optim.batch_size": 16,
    }
  )
  experiment = video_build.build(config)
  arrays, shape = experiment.test.arrays, (20, 30)
  probs = np.random.default_rng(0).random(shape)
  done = {name: arrays[name] for name in ("valid", "label", "relevant")} | {
    "index": np.arange(20),
    "probs": probs,
    "gates": probs > 0.5,
    "logits": np.eye(16)[arrays["label"] // 2],
  }
  result = {
    "videos": 20,
    "accuracy": 0.5,
    "all_segments_macs": 10**9,
    "macs": 10.0**8,
    "mac_ratio": 0.1,
    "share": 0.5,
    "share_p10": 0.4,
    "share_p90": 0.6,
    "precision": 0.5,
    "recall": 0.5,
    "relevant_share": 0.2,
    "unreadable": 1,
    "missing": 1,
    **scores.score_predictions(
      arrays["label"], arrays["label"] // 2, experiment.test.class_names, trained=np.arange(16)
    ),
  }
  lines = [{"step": i, "split": "train", "loss": 1 / i, "accuracy": 0.1 * i} for i in range(1, 9)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  video_report.write_report(experiment, result, done, rundir.RunDir(folder), 10)


LAST = ["Time", "Settings", "About this run"]
PAGES = {
  "tasks": (task_page, 3 + 6, ["Result", "Accuracies", "Overlap", "One gate across tasks", *LAST]),
  "videos": (
    video_page,
    4 + 6,
    [
      "Result",
      "Confusions of classes",
      "Segments",
      "Time lines",
      "Learning curves",
      "Predictions",
      *LAST,
    ],
  ),
}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_of_tasks_and_videos_load_and_fit(tmp_path, monkeypatch, kind):
  monkeypatch.setitem(vggs.VGGS, "tiny", (8, vggs.POOL, 8))
  tiny = functools.partial(ResNet, classes=None, blocks=(1,), features=4)
  monkeypatch.setitem(video_backbones.LIGHT_NETS, "tiny", tiny)
  monkeypatch.setitem(video_backbones.HEAVY_NETS, "tiny", tiny)
  write, images, headings = PAGES[kind]
  write(tmp_path)
  for width in WIDTHS:
    found = check(tmp_path / "report.html", width)
    assert (found["images"], found["headings"]) == (images, headings)
    # Wider pictures scroll in their own boxes, unshrunk; everything else fits.
    beyond = [w for w in found["widths"] if w > width]
    assert beyond == ([1050] * 6 if kind == "videos" and width < 1050 else [])
    assert min(found["widths"]) > 330
    assert len(found["numbers"]) == 3


@pytest.mark.parametrize(
  ("body", "what"),
  [
    ('<img alt="gone" src="missing.png">', "broken"),
    ('<img alt="gone" src="data:image/png;base64,AAAA">', "broken"),
    ('<script>throw new Error("x")</script>', "messages"),
    ('<script>console.log("x")</script>', "messages"),
    ('<p style="width: 400px">wide</p>', "wide"),
    ('<p style="color: #aaa">faint</p>', "faint"),
    ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', "nameless"),
  ],
)
def test_what_is_wrong_is_seen(tmp_path, body, what):
  (tmp_path / "page.html").write_text(f"<!DOCTYPE html><body>{body}</body>")
  found = look_at(tmp_path / "page.html")
  assert found[what]
  (tmp_path / "page.html").write_text("<!DOCTYPE html><body>fine</body>")
  assert not look_at(tmp_path / "page.html")[what]


def test_all_kinds_of_parts_load_and_fit(tmp_path):
  rows = image_pictures.draw_image_rows([np.zeros((8, 4, 4, 3), np.uint8)], ["a row"])
  file = io.BytesIO()
  page.save_figure(rows, file)
  wide = Figure(figsize=(20, 1))
  page.write_page(
    tmp_path / "page.html",
    "A run " + "of_a_long_name" * 20,
    [
      page.Section(
        "Table", "x" * 300, [page.Table([f"column {i}" for i in range(30)], [["1"] * 30])]
      ),
      page.Section(
        "Pictures",
        parts=[
          page.EmbeddedPicture(file.getvalue(), "Images."),
          page.EmbeddedPicture(file.getvalue(), "Images.", 900),
          page.embed_figure(rows, "Images."),
          page.embed_figure(wide, "Wide.", scrolls=True),
        ],
      ),
    ],
    subtitle="z" * 300,
  )
  found = look_at(tmp_path / "page.html")
  assert found["images"] == 4
  *shrunk, scrolled = found["widths"]
  assert all(330 < width <= 390 - 2 * 14 for width in shrunk)
  assert scrolled == 2000
  assert (found["messages"], found["broken"], found["wide"], found["scrolls"]) == (
    [],
    [],
    [],
    False,
  )


def test_scripts_in_a_page_do_not_run(tmp_path):
  html = page.render_page("A run", [page.Section("One")]).replace(
    "<main>", "<script>nothing.at.all</script><main>"
  )
  (tmp_path / "page.html").write_text(html)
  (said,) = look_at(tmp_path / "page.html")["messages"]
  assert "Content Security Policy" in said
