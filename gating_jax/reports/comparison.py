"""Several runs side by side: what they score and cost, where their configs differ, how they learnt.

Nothing is read here; see `experiments.compare`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gating_jax.reports import page
from gating_jax.reports.lettering import columns, plain

TITLE = "Comparison of runs"
_MISSING = "–"
_LETTERS = 40  # of a cell in a terminal
_COLOURS = ("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#f2a541", "#5b5b5b", "#17a3b8", "#9d6b53")
_MARKERS = "os^Dvp*"


@dataclasses.dataclass(frozen=True)
class Run:
  """One run; nested mappings are flat, their names joined by dots.

  Attributes:
    name: unlike that of any other run.
    config: its settings.
    result: what it ended with; None while it has not.
    lines: of its journal: numbers, each with `step` and `split`.
  """

  name: str
  config: Mapping[str, Any]
  result: Mapping[str, Any] | None
  lines: Sequence[Mapping[str, Any]]

  @property
  def experiment(self) -> str:
    return self.config["experiment"]

  @property
  def tests(self) -> list[Mapping[str, Any]]:
    return [line for line in self.lines if line["split"] == "test"]

  @property
  def numbers(self) -> Mapping[str, Any]:
    """Those of the result, or of the newest test."""
    return self.result or (self.tests or [{}])[-1]

  @property
  def step(self) -> int:
    """The last one that anything is known of."""
    return max([0, *(line["step"] for line in self.lines), *([self.result["step"]] if self.result else [])])


class _Score(NamedTuple):
  """What a kind of run is measured by: a share, and what it takes."""

  label: str
  share: str
  macs: str


_SCORES = (
    _Score("mean IoU", "mean_iou", "macs"),
    _Score("accuracy", "accuracy", "macs"),
    _Score("mean average precision", "mean_average_precision", "macs"),
    _Score("accuracy, task known", "task_aware.average_accuracy", "task_aware_macs"),
    _Score("accuracy, task unknown", "task_agnostic.average_accuracy", "task_agnostic_macs"),
)


def render(runs: Sequence[Run]) -> str:
  """Both tables for a terminal."""
  shown = lambda rows: "\n".join(columns([[plain(cell, _LETTERS) for cell in row] for row in rows]))
  names = [run.name for run in runs]
  differences = _differences(runs)
  text = [shown([["", *names], *_results(runs)])]
  if len(runs) > 1:
    text.append(shown([["config", *names], *differences]) if differences else "The configs do not differ.")
  return "\n\n".join(text)


def sections(runs: Sequence[Run]) -> list[page.Section]:
  """What the page shows."""
  names = [run.name for run in runs]
  text = "" if all(run.result for run in runs) else "Of runs that are not finished, the newest test."
  made = [page.Section("Results", text, [page.Table(["", *names], _results(runs))])]
  if len(runs) > 1:
    differences = _differences(runs)
    text = "The settings in which runs differ. Those that only one kind of experiment has are left out."
    made.append(page.Section("Configs", text if differences else "The configs do not differ.",
                             [page.Table(["setting", *names], differences, numeric=False)] if differences else []))
  if costs := _costs(runs):
    made.append(page.Section("Score and cost", "To the upper left is better.", costs))
  if courses := _courses(runs):
    made.append(page.Section("During training", "", courses))
  return made


def _results(runs: Sequence[Run]) -> list[list[str]]:
  """Rows of a name and a cell for each run, those that say something of any."""
  rows = [["state", *("finished" if run.result is not None else "not finished" for run in runs)],
          ["last step", *(f"{run.step:,}" for run in runs)]]
  for name, text in _measures().items():
    cells = [text(run.numbers) for run in runs]
    if any(cell is not None for cell in cells):
      rows.append([name, *(_MISSING if cell is None else cell for cell in cells)])
  return rows


def _measures() -> dict[str, Callable[[Mapping[str, Any]], str | None]]:
  """What is said of a run's numbers, by name; None where they do not tell."""
  def text(form, *names):
    def cell(numbers):
      values = [numbers.get(name) for name in names]
      return None if None in values else form(*values)
    return cell

  percent = lambda share: f"{100 * share:z.2f} %"
  ratio = lambda part, whole: f"{100 * part / whole:.1f} %" if whole else None
  count = lambda number, gates: f"{number:,.0f} of {gates:,.0f}"
  whole = lambda number: f"{number:,.0f}"
  return {
      **{score.label: text(percent, score.share) for score in _SCORES},
      "forgetting, task known": text(percent, "task_aware.forgetting"),
      "forgetting, task unknown": text(percent, "task_agnostic.forgetting"),
      "MACs": text(whole, "macs"),
      "share of the dense net's": text(lambda share: f"{100 * share:.1f} %", "mac_ratio"),
      "MACs, task known": text(whole, "task_aware_macs"),
      "share, task known": text(ratio, "task_aware_macs", "dense_macs"),
      "MACs, task unknown": text(whole, "task_agnostic_macs"),
      "share, task unknown": text(ratio, "task_agnostic_macs", "dense_macs"),
      "parameters": text(whole, "params"),
      "parameters of gates, besides": text(whole, "gate_params"),
      "gates conditional": text(count, "conditional", "gates"),
      "gates always open": text(count, "always_open", "gates"),
      "gates always closed": text(count, "always_closed", "gates"),
      "gates at random": text(count, "random_dropout", "gates"),
      "units that two tasks share": text(percent, "mean_gate_overlap"),
      "segments chosen": text(percent, "share"),
      "seconds since the last start": text(whole, "seconds_since_last_start"),
  }


def _differences(runs: Sequence[Run]) -> list[list[str]]:
  """Rows of a setting and its value in each run.

  A setting counts where two runs that have it differ, or only one of two of the same experiment has it.
  """
  def differ(name, one, other):
    if name in one.config and name in other.config:
      return one.config[name] != other.config[name]
    return one.experiment == other.experiment and (name in one.config) != (name in other.config)

  names = dict.fromkeys(name for run in runs for name in run.config)
  return [[name, *(str(run.config.get(name, _MISSING)) for run in runs)] for name in names
          if any(differ(name, *pair) for pair in itertools.combinations(runs, 2))]


def _costs(runs: Sequence[Run]) -> list[page.Picture]:
  """For each kind of experiment and score, the runs by their multiply-accumulates."""
  pictures = []
  for experiment, score in itertools.product(dict.fromkeys(run.experiment for run in runs), _SCORES):
    points = {i: (run.numbers[score.macs], 100 * run.numbers[score.share]) for i, run in enumerate(runs)
              if run.experiment == experiment and {score.macs, score.share} <= run.numbers.keys()}
    example = "a video" if experiment == "long_video" else "an image"
    if points:
      pictures.append(_picture(
          runs, {i: [point] for i, point in points.items()}, f"MACs of {example}", f"{score.label} (%)",
          f"{_kind(experiment)}: {score.label} against multiply-accumulates."))
  return pictures


def _courses(runs: Sequence[Run]) -> list[page.Picture]:
  """For each kind of experiment, its scores at the tests during training, and its cross-entropy on training data."""
  pictures = []
  for experiment in dict.fromkeys(run.experiment for run in runs):
    own = {i: run for i, run in enumerate(runs) if run.experiment == experiment}
    for score in _SCORES:
      lines = {i: [(t["step"], 100 * t[score.share]) for t in run.tests if score.share in t] for i, run in own.items()}
      if any(len(points) > 1 for points in lines.values()):
        pictures.append(_picture(runs, lines, "step", f"{score.label} (%)",
                                 f"{_kind(experiment)}: {score.label} at each test during training."))
    lines = {i: [(line["step"], line["cross_entropy"]) for line in run.lines
                 if line["split"] == "train" and "cross_entropy" in line] for i, run in own.items()}
    if any(len(points) > 1 for points in lines.values()):
      pictures.append(_picture(runs, lines, "step", "cross-entropy", f"{_kind(experiment)}: mean cross-entropy on "
                               "training data.", marked=False))
  return pictures


def _kind(experiment: str) -> str:
  return plain(experiment, 30).replace("_", " ").capitalize()


def _picture(
    runs: Sequence[Run], lines: Mapping[int, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, caption: str, *,
    marked: bool = True,
) -> page.Picture:
  """Points of runs, by their place, joined by lines, and below them whose they are."""
  from matplotlib.figure import Figure  # imports slowly
  from matplotlib.ticker import EngFormatter

  shown = {i: points for i, points in lines.items() if points}
  joined = any(len(points) > 1 for points in shown.values())
  figure = Figure(figsize=(page.WIDTH, 3.2 + 0.2 * len(shown)), layout="constrained")
  axes = figure.subplots()
  for i, points in shown.items():
    axes.plot(*zip(*points, strict=True), label=plain(runs[i].name, 50), color=_COLOURS[i % len(_COLOURS)],
              linewidth=1.3 if joined else 0, marker=_MARKERS[i % len(_MARKERS)] if marked else None, markersize=6)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
  axes.margins(0.08)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower left", frameon=False)
  return page.pictured(figure, caption)
