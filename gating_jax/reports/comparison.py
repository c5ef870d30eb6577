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
from gating_jax.reports.opening import example, short
from gating_jax.reports.times import Times, number

TITLE = "Comparison of runs"
_MISSING = "–"
_LETTERS = 40  # of a cell in a terminal
_COLOURS = ("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#f2a541", "#7a5195", "#17a3b8", "#9d6b53")
_MARKERS = "os^Dvp*"
_UNGATED = "#5b5b5b"
_NAMED, _MOST_LINES = 12, 10  # points that have their name beside them; settings that a point shows


@dataclasses.dataclass(frozen=True)
class Run:
  """One run; nested mappings are flat, their names joined by dots.

  Attributes:
    name: unlike that of any other run.
    config: its settings.
    result: what it ended with; None while it has not.
    lines: of its journal: numbers, each with `step` and `split`.
    ungated: whether its network has no gates, a baseline to others.
    times: what `--mode=compile` measured of it; None before.
  """

  name: str
  config: Mapping[str, Any]
  result: Mapping[str, Any] | None
  lines: Sequence[Mapping[str, Any]]
  ungated: bool = False
  times: Times | None = None

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


def content(runs: Sequence[Run]) -> tuple[page.Opening, list[page.Section]]:
  """What the page begins with, and what follows."""
  names, costs = [run.name for run in runs], _costs(runs)
  text = "" if all(run.result for run in runs) else "Of runs that are not finished, the newest test."
  rows = _results(runs)
  made = [page.Section("Results", text, [page.Table(["measure", *names], rows, terms=_defined(rows))], open=True)]
  if len(runs) > 1:
    differences = _differences(runs)
    text = "The settings in which runs differ. Those that only one kind of experiment has are left out."
    made.append(page.Section("Configs", text if differences else "The configs do not differ.",
                             [page.Table(["setting", *names], differences, numeric=False)] if differences else [],
                             open=True))
  if costs[1:]:
    made.append(page.Section("Score and cost", "To the upper left is better.", costs[1:]))
  if courses := _courses(runs):
    made.append(page.Section("During training", "", courses))
  return page.Opening(_numbers(runs), costs[0] if costs else None, _which(runs)), made


_TERMS = {  # of rows of results, by how their names begin
    "state": "whether the run has come to its end",
    "last step": "the newest one that anything is known of, in updates of the parameters",
    "mean IoU": "intersection over union, mean over classes, on the test set",
    "accuracy": "on the test set; of a sequence of tasks the mean over tasks at the end",
    "mean average precision": "mean over classes, on the test set",
    "forgetting": "mean over all tasks but the last of how far the accuracy ends below the best it once was",
    "MACs": "multiply-accumulate operations of one image or video, mean over the test set, gate networks included",
    "share": "MACs in % of those of the run's own network without gates",
    "parameters": "trained numbers of the network; those of gates are counted besides",
    "gates": "open for 1 to 99 % of the test set (conditional), for more, for less, or decided by noise (at random)",
    "units that two tasks share": "in % of those that either uses, mean over pairs of tasks",
    "segments chosen": "in % of a video's segments, mean over videos",
    "seconds": "of the training since it was last started or resumed",
}


def _defined(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
  """Terms of the rows that are there."""
  runs = ("columns", "the runs, by the names of their directories; a dash is where a run has no such number")
  return [runs, *((start, meaning) for start, meaning in _TERMS.items()
                  if any(name.startswith(start) for name, *_ in rows))]


class _Pair(NamedTuple):
  """The best gated run of a kind, and the best ungated one where there is one."""

  score: _Score
  gated: Run
  ungated: Run | None


def _best(runs: Sequence[Run]) -> _Pair | None:
  """Of the first kind of experiment and score that a gated run has; kinds with an ungated run come first."""
  pairs = []
  for experiment, score in itertools.product(dict.fromkeys(run.experiment for run in runs), _SCORES):
    scored = [run for run in runs if run.experiment == experiment and {score.macs, score.share} <= run.numbers.keys()]
    best = lambda ungated: max((run for run in scored if run.ungated == ungated),  # noqa: B023
                               key=lambda run: run.numbers[score.share], default=None)  # noqa: B023
    if gated := best(False):
      pairs.append(_Pair(score, gated, best(True)))
  return min(pairs, key=lambda pair: pair.ungated is None, default=None)


def _which(runs: Sequence[Run]) -> str:
  """Which runs the large numbers are of."""
  pair = _best(runs)
  if pair is None:
    return ""
  text = f"The numbers are of {plain(pair.gated.name, 60)}, the gated run with the highest {pair.score.label}"
  if pair.ungated is None:
    return f"{text}. None of these runs is ungated, so there is no baseline to compare it with."
  return f"{text}, next to {plain(pair.ungated.name, 60)}, the best ungated one."


def _numbers(runs: Sequence[Run]) -> list[page.Number]:
  """The large ones; none where no run is gated."""
  pair = _best(runs)
  if pair is None:
    return []
  score, mine, theirs = pair.score, pair.gated.numbers, pair.ungated.numbers if pair.ungated else None
  noun, none = example(pair.gated.experiment), "ungated: none among these runs"
  name = f"{score.label[:1].upper()}{score.label[1:]}"
  if theirs is None:
    spent = page.Number(f"MACs per {noun}", short(mine[score.macs]), none, _MACS)
    return [page.Number(name, f"{100 * mine[score.share]:.2f} %", none, "On the test set."), spent,
            _time(pair.gated, None)]
  ratio = 100 * mine[score.macs] / theirs[score.macs] if theirs[score.macs] else 0.0
  return [
      page.Number(name, f"{100 * mine[score.share]:.2f} %", f"ungated: {100 * theirs[score.share]:.2f} %",
                  "On the test set."),
      page.Number("MACs", f"{ratio:.1f} %", f"ungated: 100 %, {short(theirs[score.macs])} per {noun}",
                  f"{_MACS} Here {short(mine[score.macs])}, in % of those of the ungated run."),
      _time(pair.gated, pair.ungated)]


_MACS = "Multiply-accumulate operations, mean over the test set, gate networks included."


def _time(gated: Run, ungated: Run | None) -> page.Number:
  """Milliseconds of an example, next to the ungated run's, or else to its own network without gates."""
  noun = example(gated.experiment)
  found = dataclasses.replace(number(gated.times, noun), command="", place="")
  if gated.times is None:
    return dataclasses.replace(found, meaning=f"Time of one {noun}, as --mode=compile of a run measures it.")
  if ungated is None or ungated.times is None:
    return found
  return dataclasses.replace(found, baseline=f"ungated: {number(ungated.times, noun).value}")


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
    if points:
      pictures.append(_cost(runs, points, score, experiment))
  return pictures


def _cost(
    runs: Sequence[Run], points: Mapping[int, tuple[float, float]], score: _Score, experiment: str
) -> page.Picture:
  """Runs as named points, the ungated ones joined by a line."""
  figure, axes = _axes(len(points))
  family = sorted(point for i, point in points.items() if runs[i].ungated)
  if family:
    axes.plot(*zip(*family, strict=True), label="ungated networks", color=_UNGATED, linewidth=1.5, zorder=1)
  for i, point in points.items():
    colour = _UNGATED if runs[i].ungated else _COLOURS[i % len(_COLOURS)]
    axes.plot(*point, label=plain(runs[i].name, 50), color=colour, linewidth=0, marker=_MARKERS[i % len(_MARKERS)],
              markersize=8, markerfacecolor="white" if runs[i].ungated else colour)
    if len(points) <= _NAMED:
      axes.annotate(plain(runs[i].name, 24), point, xytext=(8, 7), textcoords="offset points", fontsize=8.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1})
  noun = example(experiment)
  article = "an" if noun == "image" else "a"
  _label(figure, axes, f"MACs of {article} {noun}", f"{score.label} (%)", margin=0.18)
  line = " The line joins the ungated networks." if len(family) > 1 else ""
  caption = (f"{_kind(experiment)}: {score.label} against multiply-accumulates.{line} To the upper left is better; "
             "point at a run to see how its config differs.")
  return dataclasses.replace(
      page.pictured(figure, caption, terms=[
          (score.label, "on the test set, in %"),
          ("MACs", f"multiply-accumulate operations of {article} {noun}, mean over the test set, with gate networks")]),
      points=_hover(runs, points, score, figure, axes))


def _hover(
    runs: Sequence[Run], points: Mapping[int, tuple[float, float]], score: _Score, figure: Any, axes: Any
) -> list[page.Point]:
  """What is said of each run where it is pointed at: its numbers, and its values of the settings that differ."""
  figure.draw_without_rendering()  # the layout decides where points are
  width, height = figure.bbox.size
  differences, found = _differences([runs[i] for i in points]), []
  for place, (i, (spent, share)) in enumerate(points.items(), 1):
    x, y = axes.transData.transform((spent, share))
    lines = [f"{score.label}: {share:.2f} %", f"MACs: {short(spent)}"]
    settings = [f"{name}: {plain(values[place - 1], 60)}" for name, *values in differences[:_MOST_LINES]]
    if len(differences) > _MOST_LINES:
      settings.append(f"and {len(differences) - _MOST_LINES} settings more")
    found.append(page.Point(round(100 * x / width, 2), round(100 * (1 - y / height), 2), plain(runs[i].name, 60),
                            lines + settings))
  return found


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
  shown = {i: points for i, points in lines.items() if points}
  figure, axes = _axes(len(shown))
  for i, points in shown.items():
    axes.plot(*zip(*points, strict=True), label=plain(runs[i].name, 50), color=_COLOURS[i % len(_COLOURS)],
              linewidth=1.3, marker=_MARKERS[i % len(_MARKERS)] if marked else None, markersize=6)
  _label(figure, axes, xlabel, ylabel, margin=0.08)
  meaning = "mean over training examples, in nats" if ylabel == "cross-entropy" else "on the test set"
  return page.pictured(figure, caption, terms=[(xlabel, "updates of the parameters so far"), (ylabel, meaning)])


def _axes(runs: int) -> tuple[Any, Any]:
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(page.WIDTH, 3.4 + 0.2 * runs), layout="constrained")
  return figure, figure.subplots()


def _label(figure: Any, axes: Any, xlabel: str, ylabel: str, *, margin: float) -> None:
  from matplotlib.ticker import EngFormatter

  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
  axes.ticklabel_format(axis="y", useOffset=False)
  axes.margins(margin)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower left", frameon=False)
