"""Runs to be compared, and which of them may be: scores mean nothing next to those on another test set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gating_jax.reports.text import plain
from gating_jax.reports.times import Times

MISSING = "–"


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
    tested: the settings that say what it learns and is tested on.
  """

  name: str
  config: Mapping[str, Any]
  result: Mapping[str, Any] | None
  lines: Sequence[Mapping[str, Any]]
  ungated: bool = False
  times: Times | None = None
  tested: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
  def tested_times(self) -> Times | None:
    """The times, if they are of the step that the numbers are of."""
    step = self.numbers.get("step")
    return self.times if self.times and step is not None and self.times.of(step) else None

  @property
  def step(self) -> int:
    """The last one that anything is known of."""
    return max(
      [0, *(line["step"] for line in self.lines), *([self.result["step"]] if self.result else [])]
    )


class Score(NamedTuple):
  """What a kind of run is measured by: a share, and what it takes."""

  label: str
  share: str
  macs: str


SCORES = (
  Score("mean IoU", "mean_iou", "macs"),
  Score("accuracy", "accuracy", "macs"),
  Score("mean average precision", "mean_average_precision", "macs"),
  Score("accuracy, task known", "task_aware.average_accuracy", "task_aware_macs"),
  Score("accuracy, task unknown", "task_agnostic.average_accuracy", "task_agnostic_macs"),
)


class Group(NamedTuple):
  """Runs of one kind of experiment that learn and are tested on the same.

  Attributes:
    name: such as `classification on digits`, unlike that of any other group.
    runs: by their places among all.
  """

  name: str
  runs: Mapping[int, Run]

  @property
  def experiment(self) -> str:
    return next(iter(self.runs.values())).experiment

  def scored(self, score: Score) -> dict[int, Run]:
    """Those that have the score, and what it takes."""
    return {
      i: run for i, run in self.runs.items() if {score.macs, score.share} <= run.numbers.keys()
    }


def groups(runs: Sequence[Run]) -> list[Group]:
  """The groups of the runs, in the order of their first ones."""
  found = {}
  for i, run in enumerate(runs):
    key = run.experiment, *sorted(run.tested.items())
    found.setdefault(key, {})[i] = run
  return [
    Group(name, of) for name, of in zip(_names(list(found.values())), found.values(), strict=True)
  ]


def _names(parts: Sequence[Mapping[int, Run]]) -> list[str]:
  """What each group is called: its experiment, its data set and, of several on that, the settings that differ."""
  firsts = [next(iter(part.values())) for part in parts]
  names = [_short_name(run) for run in firsts]
  return [
    name if names.count(name) == 1 else f"{name} ({_own(run, firsts)})"
    for run, name in zip(firsts, names, strict=True)
  ]


def _short_name(run: Run) -> str:
  kind = plain(run.experiment, 30).replace("_", " ")
  data = run.tested.get("data.name")
  return kind if data is None else f"{kind} on {plain(data, 30)}"


def _own(run: Run, others: Sequence[Run]) -> str:
  """What a run is tested on where others of the same name are tested on something else."""
  alike = [other.tested for other in others if _short_name(other) == _short_name(run)]
  names = dict.fromkeys(name for tested in alike for name in tested)
  differ = [name for name in names if len({tested.get(name) for tested in alike}) > 1]
  return ", ".join(plain(f"{name} {run.tested.get(name, MISSING)}", 60) for name in differ)


def differences(runs: Sequence[Run]) -> list[list[str]]:
  """Rows of a setting and its value in each run.

  A setting counts where two runs that have it differ, or only one of two of the same experiment has it.
  """

  def differ(name, one, other):
    if name in one.config and name in other.config:
      return one.config[name] != other.config[name]
    return one.experiment == other.experiment and (name in one.config) != (name in other.config)

  names = dict.fromkeys(name for run in runs for name in run.config)
  return [
    [name, *(str(run.config.get(name, MISSING)) for run in runs)]
    for name in names
    if any(differ(name, *pair) for pair in itertools.combinations(runs, 2))
  ]
