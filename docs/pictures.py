"""Draws the pictures of these pages from finished runs, into docs/pictures.

    gating-jax --config=configs/digits_resnet20.py --workdir=runs/digits
    gating-jax --config=configs/split_digits.py --workdir=runs/split_digits
    gating-jax --config=configs/composed_timegate.py --workdir=runs/timegate
    python docs/pictures.py runs/digits runs/split_digits runs/timegate

Most are taken from the runs' own pages. The gates over images are drawn here, with fewer gates than
a page has. Without run directories it draws the pictures of tables alone.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from gating_jax import load_run
from gating_jax.data import augment, image_sets
from gating_jax.ops.relaxations import threshold_gate
from gating_jax.reports.images import draw_image_rows
from gating_jax.training import settings

DOCS = Path(__file__).parent
# Pictures of a run's page, by the beginning of their captions.
DIGITS = {
  "Gates of each layer": "gates_of_layers",
  "The same tests, score against cost": "score_against_cost",
  "Fraction of each class": "gates_and_classes",
}
TASKS = {"Filters": "tasks_and_units", "Accuracy on each task": "accuracies_of_tasks"}
VIDEOS = {"Chosen segments": "timeline", "scene 3, activity 2": "one_video"}
# Rows of the table of selections: the label, and the side of it at which the point lies.
_SELECTIONS = {
  "heavy net on all segments": ("heavy net on all segments", "right"),
  "gate with attention, to 50 %": ("gate, to 50 %", "left"),
  "gate with attention, to 25 %": ("gate, to 25 %", "left"),
  "uniform, 4 segments": ("evenly spaced", "right"),
  "light net's confidence (SCSampler), 3 segments": ("light net's confidence", "left"),
  "early exit in time (FrameExit)": ("early exit in time", "left"),
  "light net alone": ("light net alone", "left"),
  "oracle, 4 segments": ("oracle", "right"),
}
_BLUE, _GREEN, _ORANGE = "#4c78a8", "#2a9d6f", "#f2a541"
_GATES, _IMAGES = 6, 9  # rows and columns of the gates over images
_COLOURS = 64  # of a picture; fewer make smaller files


def write_picture(name: str, png: bytes) -> None:
  """Writes one picture with few colours."""
  image = Image.open(io.BytesIO(png)).convert("RGB")
  small = image.quantize(_COLOURS, dither=Image.Dither.NONE)
  small.save(DOCS / "pictures" / f"{name}.png", optimize=True)


def write_figure(name: str, figure: Figure) -> None:
  """Writes one matplotlib figure."""
  file = io.BytesIO()
  figure.savefig(file, dpi=130)
  write_picture(name, file.getvalue())


def copy_pictures(workdir: Path, names: dict[str, str]) -> None:
  """Copies the pictures with these captions from a run's page."""
  page = (workdir / "report.html").read_text()
  for tag in re.findall(r"<img [^>]*>", page):
    caption = html.unescape(re.search(r'alt="([^"]*)"', tag)[1])
    data = re.search(r'base64,([^"]*)"', tag)[1]
    for begins, name in list(names.items()):
      if caption.startswith(begins):
        write_picture(name, base64.b64decode(data))
        del names[begins]
  if names:
    raise ValueError(f"the page of {workdir} has no picture with the captions {sorted(names)}")


def draw_gates_over_images(workdir: Path) -> Figure:
  """Draws, for one gate of every other layer, the test images that open it with most certainty."""
  model, variables, config = load_run(workdir)
  data = config.data
  test = image_sets.load(settings.source_of(data, data.test_split), data.image_size)
  pixels, _ = test.read(np.arange(len(test)))
  _, records = jax.jit(model.apply)(variables, augment.normalise(pixels, data.mean, data.std))
  rows, labels = [], []
  spread = np.linspace(0, len(records) - 1, _GATES).astype(int)
  for layer in spread:
    rates = np.mean(threshold_gate(records[layer].logits), axis=0)
    # Of the gates that are open for enough images, the one that is open least.
    gate = int(np.argmin(np.where(rates * len(pixels) > _IMAGES, rates, np.inf)))
    order = np.argsort(-np.asarray(records[layer].logits)[:, gate])
    rows.append(pixels[order[:_IMAGES]])
    labels.append(f"layer {layer + 1}, gate {gate}\nopen for {100 * rates[gate]:.0f} %")
  return draw_image_rows(rows, labels)


def rows_of_table(page: str, line: str) -> list[list[str]]:
  """Returns the cells of the first table behind a line of a page, without its first row."""
  text = (DOCS / page).read_text()
  lines = iter(text.split(line, maxsplit=1)[1].splitlines())
  table = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
  rows = itertools.takewhile(lambda line: line.startswith("|"), table)
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
  # The second row is the line below the names of the columns.
  return cells[2:]


def new_axes(*, x: str, y: str) -> tuple[Figure, Axes]:
  """Returns a figure with one plot, and its axes with these labels."""
  figure = Figure(figsize=(6, 3.4), layout="constrained")
  axes = figure.subplots()
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def draw_accuracy_against_macs() -> Figure:
  """Draws ungated and gated nets after 100 epochs of CIFAR-10, two seeds each."""
  rows = rows_of_table("results/images.md", "**Does length decide?**")
  figure, axes = new_axes(x="million multiply-accumulates of a test image", y="test accuracy (%)")
  for kind, colour, marker in (("ungated", _BLUE, "o"), ("gated", _GREEN, "s")):
    chosen = [row for row in rows if row[0].startswith(f"{kind}, ")]
    macs = [float(row[5]) for row in chosen]
    accuracies = np.array([[float(seed) for seed in row[1].split(", ")] for row in chosen])
    axes.plot(macs, accuracies.mean(axis=1), color=colour, label=kind)
    for seed in accuracies.T:
      axes.plot(macs, seed, marker, color=colour, markersize=5, alpha=0.7)
  axes.legend(frameon=False, loc="lower right")
  return figure


def draw_trained_net_made_cheaper() -> Figure:
  """Draws nets made of a trained one, at three fractions of its MACs, two seeds each."""
  rows = rows_of_table("results/images.md", "## Worlds: a trained net made cheaper")
  percent = [float(row[0]) for row in rows]
  figure, axes = new_axes(x="MACs, % of the trained net's", y="test accuracy (%)")
  kinds = (("gated", _GREEN, "s"), ("pruned", _ORANGE, "^"), ("narrower", _BLUE, "o"))
  for column, (kind, colour, marker) in enumerate(kinds, start=1):
    accuracies = np.array([[float(seed) for seed in row[column].split(", ")] for row in rows])
    axes.plot(percent, accuracies.mean(axis=1), color=colour, label=kind)
    for seed in accuracies.T:
      axes.plot(percent, seed, marker, color=colour, markersize=5, alpha=0.7)
  axes.set_xticks(percent)
  axes.legend(frameon=False, loc="lower right")
  return figure


def draw_speed_against_open() -> Figure:
  """Draws how much faster the native kernel is, by the fraction of channels that are open."""
  rows = rows_of_table("results/inference.md", "### The native kernel")
  chosen = ("1 x 32 x 16", "1 x 64 x 32", "8 x 64 x 16", "64 x 16 x 32")
  figure, axes = new_axes(x="open channels (%)", y="times as fast as XLA")
  for row in rows:
    if row[0] not in chosen:
      continue
    # Where a case was measured twice, the first.
    speeds = [float(cell.split(", ")[0]) for cell in row[1:4]]
    images, channels, side = row[0].split(" x ")
    noun = "image" if images == "1" else "images"
    label = f"{images} {noun}, {channels} channels of {side} × {side}"
    axes.plot((100, 50, 25), speeds, "o-", markersize=5, label=label)
  axes.set(xlim=(105, 20), ylim=(0, None), xticks=(100, 50, 25))
  axes.axhline(1, color="#8a8a8a", linewidth=0.8, linestyle="--")
  axes.legend(frameon=False, loc="upper left", fontsize=8.5)
  return figure


def draw_selections() -> Figure:
  """Draws accuracy against MACs of the ways to choose segments of the embedded videos."""
  rows = rows_of_table("results/video.md", "## Long videos: the embedded task")
  figure, axes = new_axes(x="MACs, % of the heavy net on all segments", y="test accuracy (%)")
  for name, _, mean, macs, *_ in rows:
    if name not in _SELECTIONS:
      continue
    label, side = _SELECTIONS[name]
    x, y = float(macs.removesuffix(" %")), float(mean)
    gated = name.startswith("gate")
    axes.plot(x, y, "s" if gated else "o", color=_GREEN if gated else _BLUE)
    shift = 1.5 if side == "left" else -1.5
    axes.text(x + shift, y, label, ha=side, va="center", fontsize=8.5)
  axes.set(xlim=(0, 102), ylim=(0, 110))
  return figure


def draw_bars(table: list[list[str]], names: Mapping[int, str], *, x: str) -> Figure:
  """Draws times of a table, a bar for each of these columns."""
  figure, axes = new_axes(x=x, y="")
  figure.set_size_inches(6, max(3.4, 0.55 * len(table)))
  places = np.arange(len(table))
  height = 0.8 / len(names)
  for i, (column, name) in enumerate(names.items()):
    # A cell may have a unit and a ratio behind its time.
    times = [float(row[column].split()[0].replace(",", "")) for row in table]
    offset = (i - (len(names) - 1) / 2) * height
    colour = (_GREEN, _BLUE, _ORANGE)[i]
    bars = axes.barh(places + offset, times, height=0.9 * height, color=colour, label=name)
    axes.bar_label(bars, fmt="{:,g}", padding=3, fontsize=8.5)
  axes.set_yticks(places, [row[0].replace(", ", "\n") for row in table])
  axes.margins(x=0.12)
  axes.invert_yaxis()
  figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=8.5)
  return figure


def rows_of_gpu() -> list[list[str]]:
  """Returns the table of the Pallas kernel on a GPU, with shape and open channels in one cell."""
  rows, shape = rows_of_table("accelerators.md", "Measured on one NVIDIA H200"), ""
  for row in rows:
    # A shape stands in the first of its rows.
    shape = row[0].partition(" / ")[0] or shape
    row[0] = f"{shape}, {row[1]} open"
  return rows


def main(*workdirs: Path) -> None:
  """Draws the pictures of tables, and those of the runs of digits, tasks and videos if given."""
  (DOCS / "pictures").mkdir(exist_ok=True)
  write_figure("accuracy_against_macs", draw_accuracy_against_macs())
  write_figure("trained_net_made_cheaper", draw_trained_net_made_cheaper())
  write_figure("speed_against_open", draw_speed_against_open())
  write_figure("selections_of_segments", draw_selections())
  milliseconds = "milliseconds for value and gradient"
  ways = {2: "exchange='all_to_all'", 1: "exchange='gather'"}
  table = rows_of_table("results/suite.md", "## The loss: devices")
  write_figure("exchange", draw_bars(table, ways, x=milliseconds))
  losses = {1: "ours", 2: "plain autodiff", 3: "the authors' PyTorch loss"}
  table = rows_of_table("results/suite.md", "## The loss: time")
  write_figure("time_of_the_loss", draw_bars(table, losses, x=milliseconds))
  convolutions = {4: "our kernel", 2: "dense"}
  bars = draw_bars(rows_of_gpu(), convolutions, x="microseconds for both convolutions of a block")
  write_figure("kernel_on_gpu", bars)
  if not workdirs:
    return
  digits, tasks, videos = workdirs
  copy_pictures(digits, dict(DIGITS))
  copy_pictures(tasks, dict(TASKS))
  copy_pictures(videos, dict(VIDEOS))
  write_picture("gates_and_prior", (digits / "gates.png").read_bytes())
  write_figure("gates_over_images", draw_gates_over_images(digits))


if __name__ == "__main__":
  main(*map(Path, sys.argv[1:]))
