"""Context of a run's page, read from run directories: ungated baseline, times, origin of the run.

All of it is optional: the page of an old, copied or damaged directory is written without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax import config_files, experiments
from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.experiments import Kind
from gating_jax.reports import page, timings
from gating_jax.reports.opening import Baseline, Surroundings
from gating_jax.training import hosts, provenance, rundir

TIMES_FILE = "compile.json"
_MOST_NEIGHBOURS = 500  # directories that are read
# A baseline may differ in these whatever the experiment: they change no result, or only its noise.
_ALWAYS_IGNORED = ("seed", "devices.", "log_every", "eval_every", "checkpoint_every")


def is_ungated(config: Mapping[str, Any]) -> bool:
  """Checks that a flat config belongs to a network that computes the same for every example."""
  kind = experiments.kind_of(config.get("experiment"))
  return kind is not None and kind.is_ungated(config)


def tested_on(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the fields of a flat config that define the run's data, without those that are None."""
  kind = experiments.kind_of(config.get("experiment"))
  names = ("experiment", *(kind.tested if kind else ()))
  return {name: str(config[name]) for name in names if config.get(name) is not None}


def read_surroundings(
  run_dir: rundir.RunDir,
  config: Config,
  *,
  step: int,
  not_compiled: str = "",
) -> Surroundings:
  """Reads the surroundings of a run.

  Processes that do not write read no files: they return what the config tells.

  Args:
    run_dir, config: of the run.
    step: of the page.
    not_compiled: why `--mode=compile` refuses the run; empty where it accepts it.
  """
  kind = experiments.KINDS[config.experiment]
  # By way of JSON, as the configs of other runs are read: tuples are lists in both.
  mine = rundir.flatten(json.loads(config.to_json()))
  # An ungated run that is no baseline, such as a progressive net, is compared like a gated one.
  ungated = _is_baseline(mine, kind)
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
    baseline=None if ungated else find_baseline(run_dir.path, mine, kind),
    times=read_times(run_dir.path),
    starts=provenance.read_starts(run_dir.path),
    report=provenance.describe(),
  )


def read_times(path: Path) -> timings.Times | None:
  """Reads the times that `--mode=compile` left in a run directory; None if missing or damaged."""
  return timings.parse_times(_read_json(path / TIMES_FILE))


def refresh_times(path: Path) -> bool:
  """Writes new times of `--mode=compile` into the run's page.

  Returns:
    True if there is a page of the same step.
  """
  found = read_times(path)
  if found is None:
    return False
  noun = experiments.example_noun(_read_config(path).get("experiment"))
  number = timings.time_number(found, noun, step=found.step, workdir=str(path))
  section = timings.times_section(found, noun, step=found.step)
  return page.fill_page(path / rundir.REPORT_FILE, [number, section])


class _Neighbour(NamedTuple):
  """A neighbour that may be the baseline; the least one is the best.

  Attributes:
    kind: position among the kinds of baselines.
    other_seed: its seed differs from the run's.
    name: of its folder, so that the choice is the same on every file system.
    folder: the run directory.
  """

  kind: int
  other_seed: bool
  name: str
  folder: Path


def find_baseline(path: Path, mine: Mapping[str, Any], kind: Kind) -> Baseline | None:
  """Finds the ungated run that a run started from, or a finished neighbour without gates.

  A start that is gated, or was tested on something else, is no baseline. A neighbour must have the
  same config but for its gates.

  Args:
    path: the run directory.
    mine: its flat config.
    kind: of the run.
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
    if _is_baseline(theirs, kind) and _differ_in_gates_alone(mine, theirs, kind):
      position = kind.baselines.index(theirs[kind.field])
      other_seed = theirs.get("seed") != mine.get("seed")
      candidates.append(_Neighbour(position, other_seed, folder.name, folder=folder))
  # The best candidate may be unfinished; then the next one is taken.
  for candidate in sorted(candidates):
    found = _read_baseline(candidate.folder)
    if found:
      return found
  return None


def _is_baseline(config: Mapping[str, Any], kind: Kind) -> bool:
  """Checks that pages may compare with the run of a flat config."""
  return config.get(kind.field) in kind.baselines and kind.is_ungated(config)


def _read_config(folder: Path) -> dict[str, Any]:
  """Reads the flat config of a run; empty where it is missing or damaged."""
  found = _read_json(folder / rundir.CONFIG_FILE)
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


def _differ_in_gates_alone(mine: Mapping[str, Any], theirs: Mapping[str, Any], kind: Kind) -> bool:
  """Checks that two flat configs have the same values, but for fields that a baseline may change.

  A field that an older config lacks counts as None.
  """
  ignored = (kind.field, *kind.ignored, *_ALWAYS_IGNORED)
  for name in {**mine, **theirs}:
    # `startswith` takes a whole section for a name that ends with a dot.
    if name.startswith(ignored):
      continue
    if mine.get(name) != theirs.get(name):
      return False
  return True


def _read_baseline(folder: Path) -> Baseline | None:
  """Reads a finished run as a baseline; None where it is not finished or damaged."""
  result = _read_json(folder / rundir.RESULT_FILE)
  if not isinstance(result, dict):
    return None
  return Baseline(folder.name, rundir.flatten(result))


def _read_json(file: Path) -> Any:
  """Reads a JSON file; None where it is missing or damaged."""
  try:
    return json.loads(file.read_text("utf-8", "replace"))
  # RecursionError: a damaged file may nest deeper than Python can follow.
  except (OSError, ValueError, RecursionError):
    return None
