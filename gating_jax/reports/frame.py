"""Frame of a run's page: the large numbers at its top, and the sections on the run at its end.

They show the surroundings of the run, which are read from run directories: its ungated baseline,
its times and its starts. All of them are optional: the page of an old, copied or damaged directory
is written without them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax import config_files, programmes
from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.programmes import ProgrammeRow
from gating_jax.reports import measured_times, page
from gating_jax.reports.measured_times import Times
from gating_jax.reports.text import capitalise, format_count, format_percent, plain
from gating_jax.training import hosts, provenance, rundir
from gating_jax.training.journal import read_json

_NOT_RECORDED = "not recorded"
_LETTERS = 500  # in a cell, at most
_SETTINGS = (
  (
    "setting",
    "a field of the config, its sections joined by dots; the comments in the config files "
    "explain each",
  ),
  ("value", "the one that this run was started with"),
)
_ABOUT = (
  ("started", "the date of the first start, in UTC"),
  ("command", "what was typed at the first start"),
  ("commit", "of the code; “dirty” where files differ from it"),
  ("seed", "of all that is random"),
  ("versions", "of Python and of libraries"),
  ("hardware", "what JAX computed on, and how many devices and processes there were"),
)
_MOST_NEIGHBOURS = 500  # directories that are read
# A baseline may differ in these whatever the experiment: they change no result, or only its noise.
_ALWAYS_IGNORED = ("seed", "devices.", "log_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Baseline:
  """An ungated run to compare with.

  Attributes:
    name: of its run directory.
    numbers: its result, with nested names joined by dots.
  """

  name: str
  numbers: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """The context of a run's page, in addition to its result, as `read_surroundings` fills it.

  Attributes:
    baseline: the ungated run to compare with; None where there is none.
    ungated: the run is such a baseline itself.
    step: of the page; None if the page has none.
    times: measured by `--mode=compile`, of any step; None before.
    not_compiled: why that mode refuses the run; empty where it accepts it.
    starts: of the run, as `training.provenance` describes them; empty for an old run.
    report: the same for the process that writes the page; None leaves it out.
    seed: of the run.
    workdir: its directory, as it was given.
  """

  baseline: Baseline | None = None
  ungated: bool = False
  step: int | None = None
  times: Times | None = None
  not_compiled: str = ""
  starts: Sequence[Mapping[str, Any]] = ()
  report: Mapping[str, Any] | None = None
  seed: int | None = None
  workdir: str = ""


@dataclasses.dataclass(frozen=True)
class Origin:
  """A run's origin.

  Attributes:
    name: of the run.
    starts: of the run, as `training.provenance` describes them.
    seed: of the run.
  """

  name: str
  starts: Sequence[Mapping[str, Any]]
  seed: Any


def is_ungated(config: Mapping[str, Any]) -> bool:
  """Checks that a flat config belongs to a network that computes the same for every example."""
  row = programmes.find_row(config.get("experiment"))
  return row is not None and row.is_ungated(config)


def tested_on(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the fields of a flat config that define the run's data, without those that are None."""
  row = programmes.find_row(config.get("experiment"))
  names = ("experiment", *(row.tested if row else ()))
  return {name: str(config[name]) for name in names if config.get(name) is not None}


def read_surroundings(
  run_dir: rundir.RunDir,
  config: Config,
  *,
  step: int,
  not_compiled: str = "",
) -> Surroundings:
  """Reads the surroundings of a run.

  Processes that do not write read no files: they return the values of the config.

  Args:
    run_dir, config: of the run.
    step: of the page.
    not_compiled: why `--mode=compile` refuses the run; empty where it accepts it.
  """
  row = programmes.PROGRAMMES[config.experiment]
  # By way of JSON, as the configs of other runs are read: tuples are lists in both.
  mine = rundir.flatten(json.loads(config.to_json()))
  # An ungated run that is no baseline, such as a progressive net, is compared like a gated one.
  ungated = _is_baseline(mine, row)
  around = Surroundings(
    ungated=ungated,
    step=step,
    not_compiled=not_compiled,
    seed=mine.get("seed"),
    workdir=str(run_dir.path),
  )
  if not hosts.is_writer():
    return around
  return dataclasses.replace(
    around,
    baseline=None if ungated else find_baseline(run_dir.path, mine, row),
    times=measured_times.read_times(run_dir.path),
    starts=provenance.read_starts(run_dir.path),
    report=provenance.describe(),
  )


class _Neighbour(NamedTuple):
  """A neighbour that may be the baseline; the least one is the best.

  Attributes:
    position: of its kind in the row's baselines, the best first.
    other_seed: its seed differs from the run's.
    name: of its folder, so that the choice is the same on every file system.
    folder: the run directory.
  """

  position: int
  other_seed: bool
  name: str
  folder: Path


def find_baseline(path: Path, mine: Mapping[str, Any], row: ProgrammeRow) -> Baseline | None:
  """Finds the ungated run that a run started from, or a finished neighbour without gates.

  A start that is gated, or was tested on something else, is no baseline. A neighbour must have the
  same config but for its gates.

  Args:
    path: the run directory.
    mine: its flat config.
    row: of its programme.
  Returns:
    The baseline; None where there is none.
  """
  # Weights from an ungated run make it the natural baseline: the same net before it got gates.
  start = mine.get("model.init_from")
  if isinstance(start, str):
    folder = user_path(start)
    theirs = _read_config(folder)
    if is_ungated(theirs) and tested_on(theirs) == tested_on(mine):
      found = _read_baseline(folder)
      if found:
        return found
  candidates = []
  for folder in _neighbours(path):
    theirs = _read_config(folder)
    if _is_baseline(theirs, row) and _differ_in_gates_alone(mine, theirs, row):
      position = row.baselines.index(theirs[row.field])
      other_seed = theirs.get("seed") != mine.get("seed")
      candidates.append(_Neighbour(position, other_seed, folder.name, folder=folder))
  # The best candidate may be unfinished; then the next one is taken.
  for candidate in sorted(candidates):
    found = _read_baseline(candidate.folder)
    if found:
      return found
  return None


def _is_baseline(config: Mapping[str, Any], row: ProgrammeRow) -> bool:
  """Checks that pages may compare with the run of a flat config."""
  return config.get(row.field) in row.baselines and row.is_ungated(config)


def _read_config(folder: Path) -> dict[str, Any]:
  """Reads the flat config of a run; empty where it is missing or damaged."""
  found = read_json(folder / rundir.CONFIG_FILE)
  if not isinstance(found, dict):
    return {}
  config_files.rename_fields(found)
  return rundir.flatten(found)


def _neighbours(path: Path) -> list[Path]:
  """Returns the other run directories in the same folder, sorted by name."""
  path, folders = path.resolve(), []
  try:
    for folder in path.parent.iterdir():
      if folder != path and (folder / rundir.CONFIG_FILE).is_file():
        folders.append(folder)
  except OSError:
    return []
  # Sorted first, so that the limit drops the same directories on every file system.
  return sorted(folders)[:_MOST_NEIGHBOURS]


def _differ_in_gates_alone(
  mine: Mapping[str, Any], theirs: Mapping[str, Any], row: ProgrammeRow
) -> bool:
  """Checks that two flat configs have the same values, but for fields that a baseline may change.

  A field that an older config lacks counts as None.
  """
  ignored = (row.field, *row.ignored, *_ALWAYS_IGNORED)
  for name in {**mine, **theirs}:
    # `startswith` takes a whole section for a name that ends with a dot.
    if name.startswith(ignored):
      continue
    if mine.get(name) != theirs.get(name):
      return False
  return True


def _read_baseline(folder: Path) -> Baseline | None:
  """Reads a finished run as a baseline; None where it is not finished or damaged."""
  result = read_json(folder / rundir.RESULT_FILE)
  if not isinstance(result, dict):
    return None
  return Baseline(folder.name, rundir.flatten(result))


def score_number(
  name: str, value: float, *, key: str, around: Surroundings, meaning: str
) -> page.Number:
  """Returns the score of a run as a large number.

  Args:
    name: of the score.
    value: in [0, 1].
    key: name of the score in the baseline's numbers.
    around: the run's surroundings.
    meaning: a sentence that defines the score.
  """
  baseline = _baseline(key, around)
  # Without a baseline the page says so in its place, so that the score never stands alone.
  if baseline is None and around.ungated:
    compared = "this run is ungated: it is a baseline"
  elif baseline is None or around.baseline is None:
    compared = "ungated: no baseline found"
  else:
    compared = f"ungated: {format_percent(baseline, 2)}"
    gap = 100 * (value - baseline)
    side = "above" if gap >= 0 else "below"
    meaning += (
      f" The ungated baseline is the run “{plain(around.baseline.name, 60)}”; this one "
      f"is {abs(gap):.2f} points {side} it."
    )
  return page.Number(capitalise(name), format_percent(value, 2), compared, meaning=meaning)


def _baseline(key: str, around: Surroundings) -> float | None:
  """Returns the baseline's number; None where there is none."""
  # A baseline of an older version may lack the number.
  found = None if around.baseline is None else around.baseline.numbers.get(key)
  return found if isinstance(found, (int, float)) else None


def why_no_baseline(around: Surroundings, how: str) -> str:
  """Explains how to train a missing baseline; empty where there is one, or none is needed.

  Args:
    around: the run's surroundings.
    how: to train the baseline, such as `the variant gates=none of its config`.
  """
  if around.ungated or around.baseline is not None:
    return ""
  return (
    "No ungated baseline: next to this run directory there is no finished run of the same config "
    f"without gates. Train one there ({how}), then write this page again (mode report)."
  )


def macs_number(
  ratio: float, *, executed: float, dense: float, noun: str, around: Surroundings
) -> page.Number:
  """Returns a run's MACs as a fraction of the ungated network's, as a large number.

  Args:
    ratio: fraction of the ungated network's MACs.
    executed, dense: MACs per example of this network and of the ungated one.
    noun: word for an example, such as `image`.
    around: the run's surroundings.
  """
  baseline = "this run is ungated" if around.ungated else "ungated: 100 %"
  meaning = (
    f"Multiply-accumulate operations per {noun}, {format_count(executed)}, in % of those of the "
    "ungated network; mean over the test set, gate networks included."
  )
  compared = f"{baseline}, {format_count(dense)} per {noun}"
  return page.Number("MACs", format_percent(ratio, 1), compared, meaning=meaning)


def run_time_number(noun: str, around: Surroundings) -> page.Number:
  """Returns the milliseconds per example as a large number."""
  return measured_times.time_number(
    around.times, noun, step=around.step, workdir=around.workdir, refused=around.not_compiled
  )


def run_times_section(noun: str, around: Surroundings) -> page.Section:
  """Returns the section of times of each way to run the network."""
  return measured_times.times_section(
    around.times, noun, step=around.step, refused=around.not_compiled
  )


def refresh_times(path: Path) -> bool:
  """Writes new times of `--mode=compile` into the run's page.

  Returns:
    True if there is a page of the same step.
  """
  found = measured_times.read_times(path)
  if found is None:
    return False
  noun = programmes.example_noun(_read_config(path).get("experiment"))
  number = measured_times.time_number(found, noun, step=found.step, workdir=str(path))
  section = measured_times.times_section(found, noun, step=found.step)
  return page.fill_page(path / rundir.REPORT_FILE, [number, section])


def settings_section(rows: Sequence[tuple[str, str]]) -> page.Section:
  """Returns the section of a run's settings."""
  table = page.Table(("setting", "value"), rows, numeric=False, terms=_SETTINGS)
  return page.Section("Settings", parts=[table])


def about_section(around: Surroundings) -> page.Section:
  """Returns the section on the origin of the run: command, commit, versions, hardware."""
  # An old run directory records no start: its rows say "not recorded".
  starts = list(around.starts)
  first = starts[0] if starts else {}
  no_commit = "not recorded (the package is not run from a checkout)" if starts else _NOT_RECORDED
  rows = [
    ("started", _text(first.get("date"))),
    ("command", _text(first.get("command"))),
    ("commit", _text(first.get("commit"), no_commit)),
    ("versions", _versions(first.get("versions"))),
    ("seed", _text(around.seed)),
    ("hardware", _hardware(first)),
    ("run directory", _text(around.workdir)),
  ]
  # A run may be resumed by another command or on other hardware.
  for i, start in enumerate(starts[1:], 1):
    rows.append((f"resumed ({i})", f"{_text(start.get('date'))}, {_hardware(start)}"))
  if around.report is not None:
    rows += [
      ("page written", _text(around.report.get("date"))),
      ("by", _text(around.report.get("command"))),
      ("with commit", _text(around.report.get("commit"))),
      ("on", _hardware(around.report)),
    ]
  text = ""
  if not starts:
    text = "This run directory has no record of when, by which command and on what it was started."
  table = page.Table(("what", "value"), rows, numeric=False, terms=_ABOUT)
  return page.Section("About this run", text, [table])


def about_runs_section(origins: Sequence[Origin], report: Mapping[str, Any]) -> page.Section:
  """Returns the section on the origin of several runs, and of the page.

  Args:
    origins: of each run.
    report: the process that writes the page.
  """
  rows = []
  for origin in origins:
    first = origin.starts[0] if origin.starts else {}
    rows.append(_about_row(origin.name, first, _text(origin.seed)))
  # The last row is about the process that writes the page, which has no seed.
  rows.append(_about_row("this page", report, "–"))
  header = ("run", "started", "command", "commit", "seed", "hardware", "versions")
  table = page.Table(header, rows, numeric=False, terms=_ABOUT)
  return page.Section("About these runs", "", [table])


def _about_row(name: str, start: Mapping[str, Any], seed: str) -> list[str]:
  """Returns the row of a run, or of the page, from its first start."""
  return [
    name,
    _text(start.get("date")),
    _text(start.get("command")),
    _text(start.get("commit")),
    seed,
    _hardware(start),
    _versions(start.get("versions")),
  ]


def _text(value: Any, absent: str = _NOT_RECORDED) -> str:
  """Returns a value of a record as a cell; `absent` where the record lacks it."""
  return absent if value in (None, "") else plain(value, _LETTERS)


def _versions(versions: Any) -> str:
  """Returns the versions of a record as a cell."""
  # A record that was edited by hand may hold anything.
  if not isinstance(versions, Mapping) or not versions:
    return _NOT_RECORDED
  return plain(", ".join(f"{name} {version}" for name, version in versions.items()), _LETTERS)


def _hardware(start: Mapping[str, Any]) -> str:
  """Returns the hardware of a start as a cell."""
  if not start.get("hardware"):
    return _NOT_RECORDED
  devices, processes = start.get("devices"), start.get("processes")
  return plain(f"{start['hardware']}; devices: {devices}, processes: {processes}", _LETTERS)
