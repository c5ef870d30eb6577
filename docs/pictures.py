"""Draws the pictures of these pages from finished runs, into docs/pictures.

    gating-jax --config=configs/digits_resnet20.py --workdir=runs/digits
    gating-jax --config=configs/split_digits.py --workdir=runs/split_digits
    gating-jax --config=configs/composed_timegate.py --workdir=runs/timegate
    python docs/pictures.py runs/digits runs/split_digits runs/timegate

Most are taken from the runs' own pages. The gates over images are drawn here, with fewer gates than
a page has, and the accuracies against MACs are those of a table in docs/results/images.md.
"""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from pathlib import Path

import jax
import numpy as np
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


def draw_accuracy_against_macs() -> Figure:
  """Draws ungated and gated nets after 100 epochs of CIFAR-10, two seeds each."""
  text = (DOCS / "results" / "images.md").read_text()
  table = text.split("**Does length decide?**")[1].split("**The claim")[0]
  rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
  figure = Figure(figsize=(6, 3.4), layout="constrained")
  axes = figure.subplots()
  for kind, colour, marker in (("ungated", "#4c78a8", "o"), ("gated", "#2a9d6f", "s")):
    chosen = [row for row in rows if row[0].startswith(f"{kind}, ")]
    macs = [float(row[5]) for row in chosen]
    accuracies = np.array([[float(seed) for seed in row[1].split(", ")] for row in chosen])
    axes.plot(macs, accuracies.mean(axis=1), color=colour, label=kind)
    for seed in accuracies.T:
      axes.plot(macs, seed, marker, color=colour, markersize=5, alpha=0.7)
  axes.set_xlabel("million multiply-accumulates of a test image")
  axes.set_ylabel("test accuracy (%)")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, loc="lower right")
  return figure


def main(digits: Path, tasks: Path, videos: Path) -> None:
  """Draws all pictures from these three run directories."""
  (DOCS / "pictures").mkdir(exist_ok=True)
  copy_pictures(digits, dict(DIGITS))
  copy_pictures(tasks, dict(TASKS))
  copy_pictures(videos, dict(VIDEOS))
  write_figure("gates_over_images", draw_gates_over_images(digits))
  write_figure("accuracy_against_macs", draw_accuracy_against_macs())


if __name__ == "__main__":
  main(*map(Path, sys.argv[1:]))
