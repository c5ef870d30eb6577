"""Runs to compare: read from their directories, and grouped by test set.

Scores on different test sets are not comparable.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax.paths import user_path
from gating_jax.reports import surroundings
from gating_jax.reports.text import plain
from gating_jax.reports.timings import Times
from gating_jax.training import rundir
from gating_jax.training.journal import METRICS_FILE, numbers, read_lines

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, with nested mappings flattened: names are joined by dots.

  Attributes:
    name: unique among the runs.
    config: its settings.
    result: its final numbers; None while it is not finished.
    lines: of its journal: numbers, each with `step` and `split`.
    ungated: its network has no gates, so it is a baseline for others.
    times: measured by `--mode=compile`; None before.
    tested: the settings that define what it learns and is tested on.
    experiment: kind of experiment, from the config.
    tests: lines of the journal with numbers on the test set.
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
    """Returns the kind of experiment, from the config."""
    return self.config["experiment"]

  @property
  def tests(self) -> list[Mapping[str, Any]]:
    """Returns the lines of the journal that hold a test."""
    return [line for line in self.lines if line["split"] == "test"]

  @property
  def numbers(self) -> Mapping[str, Any]:
    """Returns the numbers of the result, or of the newest test if the run is not finished."""
    # A run that has not been tested yet has no numbers.
    return self.result or (self.tests or [{}])[-1]

  @property
  def tested_times(self) -> Times | None:
    """Returns the times if they belong to the step of `numbers`, otherwise None."""
    step = self.numbers.get("step")
    return self.times if self.times and step is not None and self.times.of(step) else None

  @property
  def step(self) -> int:
    """Returns the newest step in the journal or the result."""
    # The 0 is for a run with neither.
    return max(
      [0, *(line["step"] for line in self.lines), *([self.result["step"]] if self.result else [])]
    )


class Score(NamedTuple):
  """A measure of a kind of run: names of its score, a fraction, and of its MACs."""

  label: str
  share: str
  macs: str


# In the order of priority for a group's large numbers.
SCORES = (
  Score("mean IoU", "mean_iou", "macs"),
  Score("accuracy", "accuracy", "macs"),
  Score("mean average precision", "mean_average_precision", "macs"),
  Score("accuracy, task known", "task_aware.average_accuracy", "task_aware_macs"),
  Score("accuracy, task unknown", "task_agnostic.average_accuracy", "task_agnostic_macs"),
)


class Group(NamedTuple):
  """Runs of one kind of experiment that learn, and are tested on, the same data.

  Attributes:
    name: such as `classification on digits`; unique among the groups.
    runs: by their positions among all runs.
    experiment: kind of experiment of the runs.
  """

  name: str
  runs: Mapping[int, Run]

  @property
  def experiment(self) -> str:
    """Returns the kind of experiment of the runs."""
    # The same for all of them, since a group is made by it.
    return next(iter(self.runs.values())).experiment

  def scored(self, score: Score) -> dict[int, Run]:
    """Returns the runs that have the score and its MACs."""
    return {
      i: run for i, run in self.runs.items() if {score.macs, score.share} <= run.numbers.keys()
    }


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Groups runs by what they are tested on, in the order of each group's first run."""
  found = {}
  for i, run in enumerate(runs):
    key = run.experiment, *sorted(run.tested.items())
    # A dictionary keeps the order of insertion, so groups follow the order of their first runs.
    found.setdefault(key, {})[i] = run
  return [
    Group(name, of) for name, of in zip(_names(list(found.values())), found.values(), strict=True)
  ]


def _names(parts: Sequence[Mapping[int, Run]]) -> list[str]:
  """Names each group by experiment and data set, and by settings where these are ambiguous."""
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
  """Returns those settings of a run's test that differ among runs of the same short name."""
  alike = [other.tested for other in others if _short_name(other) == _short_name(run)]
  names = dict.fromkeys(name for tested in alike for name in tested)
  differ = [name for name in names if len({tested.get(name) for tested in alike}) > 1]
  return ", ".join(plain(f"{name} {run.tested.get(name, MISSING)}", 60) for name in differ)


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
  """Returns rows of a setting and its value in each run, for the settings that differ.

  Two runs differ in a setting if both have it with different values, or if they are of the same
  experiment and only one has it.
  """

  # A setting that only another kind of experiment has is no difference: it would fill the table.
  def differ(name, one, other):
    """Returns whether two runs differ in the setting `name`."""
    if name in one.config and name in other.config:
      return one.config[name] != other.config[name]
    return one.experiment == other.experiment and (name in one.config) != (name in other.config)

  names = dict.fromkeys(name for run in runs for name in run.config)
  return [
    [name, *(str(run.config.get(name, MISSING)) for run in runs)]
    for name in names
    if any(differ(name, *pair) for pair in itertools.combinations(runs, 2))
  ]


def split_folders(text: str) -> list[Path]:
  """Splits a text at commas into folders; a name may contain a comma if that folder exists."""
  found, parts = [], text.split(",")
  while parts:
    # Takes the longest name that exists, or else the text before the first comma.
    ends = [end for end in range(len(parts), 1, -1) if user_path(",".join(parts[:end])).is_dir()]
    end = ends[0] if ends else 1
    found.append(user_path(",".join(parts[:end])))
    del parts[:end]
  return found


def unique_names(folders: Sequence[Path]) -> list[str]:
  """Returns each folder's name, with as much of its path in front as makes it unique.

  >>> unique_names([Path("/runs/a/digits"), Path("/runs/b/digits"), Path("/runs/other")])
  ['a/digits', 'b/digits', 'other']
  """
  # Resolved, so that two spellings of the same folder are recognised.
  parts = [folder.resolve().parts for folder in folders]

  def name(mine):
    """Returns the shortest end of the path `mine` that no other path has."""
    for depth in range(1, len(mine) + 1):
      if sum(other[-depth:] == mine[-depth:] for other in parts) == 1:
        return str(Path(*mine[-depth:]))
    raise ValueError(f"workdir must name each folder once; got {Path(*mine)} twice")

  return [name(mine) for mine in parts]


def read_run(folder: Path, name: str) -> Run:
  """Reads a run from its directory.

  Args:
    folder: the run directory.
    name: of the run among those compared.
  Raises:
    RunDirError: the folder holds no run, or a damaged one.
  """
  run_dir = rundir.RunDir(folder)
  # Run directories may be copied or edited by hand, so what the page relies on is checked here.
  config, result = rundir.flatten(run_dir.config()), run_dir.result()
  if not isinstance(config.get("experiment"), str):
    raise rundir.RunDirError(
      f"{folder / rundir.CONFIG_FILE} is damaged: it must name the experiment"
    )
  if result is not None:
    result = numbers(rundir.flatten(result))
    if "step" not in result:
      raise rundir.RunDirError(f"{folder / rundir.RESULT_FILE} is damaged: it must name the step")
  lines = read_lines(folder / METRICS_FILE)
  if not lines:
    raise rundir.RunDirError(
      f"workdir {folder} holds nothing to compare yet: no line in {METRICS_FILE}"
    )
  # The split is a text, and the only one that is kept.
  measured = [{**numbers(line), "split": line["split"]} for line in lines]
  return Run(
    name,
    config,
    result,
    measured,
    ungated=surroundings.is_ungated(config),
    times=surroundings.read_times(folder),
    tested=surroundings.tested_on(config),
  )
