"""Runs to compare: read from their directories, and grouped by test set.

Scores on different test sets are not comparable.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax import programmes
from gating_jax.checks import user_path
from gating_jax.programmes import Score
from gating_jax.reports import frame, measured_times
from gating_jax.reports.measured_times import Times
from gating_jax.reports.text import plain
from gating_jax.training import provenance, rundir
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
    starts: of the run, as `training.provenance` describes them; empty for an old run.
  """

  name: str
  config: Mapping[str, Any]
  result: Mapping[str, Any] | None
  lines: Sequence[Mapping[str, Any]]
  ungated: bool = False
  times: Times | None = None
  tested: Mapping[str, str] = dataclasses.field(default_factory=dict)
  starts: Sequence[Mapping[str, Any]] = ()

  @property
  def experiment(self) -> str:
    """Returns the name of the programme, from the config."""
    return self.config["experiment"]

  def lines_of(self, split: str) -> list[Mapping[str, Any]]:
    """Returns the lines of the journal of a split, `train` or `test`."""
    return [line for line in self.lines if line["split"] == split]

  @property
  def numbers(self) -> Mapping[str, Any]:
    """Returns the numbers of the result, or of the newest test if the run is not finished."""
    if self.result:
      return self.result
    tests = self.lines_of("test")
    # A run that has not been tested yet has no numbers.
    return tests[-1] if tests else {}

  @property
  def tested_times(self) -> Times | None:
    """Returns the times if they belong to the step of `numbers`, otherwise None."""
    step = self.numbers.get("step")
    if self.times is None or step is None or not self.times.belong_to(step):
      return None
    return self.times

  @property
  def step(self) -> int:
    """Returns the newest step in the journal or the result; 0 for a run with neither."""
    newest = max((line["step"] for line in self.lines), default=0)
    return max(newest, self.result["step"]) if self.result else newest


# In the order of priority for a group's large numbers.
SCORES = programmes.all_scores()


class RunGroup(NamedTuple):
  """Runs of one programme that learn, and are tested on, the same data.

  Attributes:
    name: such as `classification on digits`; unique among the groups.
    runs: at least one.
  """

  name: str
  runs: Sequence[Run]

  @property
  def experiment(self) -> str:
    """Returns the name of the programme of the runs."""
    # The same for all of them, since a group is made by it.
    return self.runs[0].experiment

  def scored(self, score: Score) -> list[Run]:
    """Returns the runs that have the score and its MACs."""
    return [run for run in self.runs if {score.macs, score.key} <= run.numbers.keys()]


class Difference(NamedTuple):
  """A setting in which runs differ, and its value in each run."""

  setting: str
  values: list[str]


def split_folders(text: str) -> list[Path]:
  """Splits a text at commas into folders; a name may contain a comma if that folder exists."""
  folders, parts = [], text.split(",")
  while parts:
    # Takes the longest name that exists, or else the text before the first comma.
    taken = len(parts)
    while taken > 1 and not user_path(",".join(parts[:taken])).is_dir():
      taken -= 1
    folders.append(user_path(",".join(parts[:taken])))
    del parts[:taken]
  return folders


def unique_names(folders: Sequence[Path]) -> list[str]:
  """Returns each folder's name, with as much of its path in front as makes it unique.

  >>> unique_names([Path("/runs/a/digits"), Path("/runs/b/digits"), Path("/runs/other")])
  ['a/digits', 'b/digits', 'other']
  """
  # Resolved, so that two spellings of the same folder are recognised.
  paths = [folder.resolve().parts for folder in folders]
  names = []
  for path in paths:
    names.append(_shortest_unique_end(path, paths))
  return names


def _shortest_unique_end(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> str:
  """Returns the shortest end of a path that no other path has."""
  for depth in range(1, len(path) + 1):
    end = path[-depth:]
    alike = [other for other in paths if other[-depth:] == end]
    if len(alike) == 1:
      return str(Path(*end))
  raise ValueError(f"workdir must name each folder once; got {Path(*path)} twice")


def read_runs(folders: Sequence[Path]) -> list[Run]:
  """Reads runs from their directories, and gives each a unique name.

  Raises:
    RunDirError: a folder holds no run, or a damaged one.
    ValueError: a folder is given twice.
  """
  runs = []
  for folder, name in zip(folders, unique_names(folders), strict=True):
    runs.append(read_run(folder, name))
  return runs


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
  return Run(
    name,
    config,
    result,
    # The split is a text, and the only one that is kept.
    lines=[{**numbers(line), "split": line["split"]} for line in lines],
    ungated=frame.is_ungated(config),
    times=measured_times.read_times(folder),
    tested=frame.tested_on(config),
    starts=provenance.read_starts(folder),
  )


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
  """Groups runs by what they are tested on, in the order of each group's first run."""
  alike = {}
  for run in runs:
    test = (run.experiment, *sorted(run.tested.items()))
    # A dictionary keeps the order of insertion, so groups follow the order of their first runs.
    alike.setdefault(test, []).append(run)
  firsts = [members[0] for members in alike.values()]
  groups = []
  for members in alike.values():
    name = _short_name(members[0])
    # Empty where experiment and data set alone distinguish the group.
    own = _own_settings(members[0], firsts)
    groups.append(RunGroup(f"{name} ({own})" if own else name, members))
  return groups


def _short_name(run: Run) -> str:
  """Returns the programme and the data set of a run, in words."""
  programme = plain(run.experiment, 30).replace("_", " ")
  data = run.tested.get("data.name")
  return programme if data is None else f"{programme} on {plain(data, 30)}"


def _own_settings(run: Run, others: Sequence[Run]) -> str:
  """Returns those settings of a run's test that differ among runs of the same short name."""
  alike, names = [], {}
  for other in others:
    if _short_name(other) == _short_name(run):
      alike.append(other.tested)
      names.update(other.tested)
  own = []
  for name in names:
    values = {tested.get(name) for tested in alike}
    if len(values) > 1:
      own.append(plain(f"{name} {run.tested.get(name, MISSING)}", 60))
  return ", ".join(own)


def differing_settings(runs: Sequence[Run]) -> list[Difference]:
  """Finds the settings in which runs differ.

  Two runs differ in a setting if both have it with different values, or if they are of the same
  experiment and only one has it.
  """
  # A dictionary has each name once, in the order in which the names come.
  names = {}
  for run in runs:
    names.update(run.config)
  differences = []
  for name in names:
    if _differs(name, runs):
      values = [str(run.config.get(name, MISSING)) for run in runs]
      differences.append(Difference(name, values))
  return differences


def _differs(name: str, runs: Sequence[Run]) -> bool:
  """Checks whether any two runs differ in a setting."""
  for one, other in itertools.combinations(runs, 2):
    of_one, of_other = name in one.config, name in other.config
    if of_one and of_other:
      if one.config[name] != other.config[name]:
        return True
    # A setting that only another programme has is no difference: it would fill the table.
    elif (of_one or of_other) and one.experiment == other.experiment:
      return True
  return False
