"""Context of a run's page, read from run directories: ungated baseline, times, origin of the run.

All of it is optional: the page of an old, copied or damaged directory is written without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from gating_jax import config_files
from gating_jax.paths import user_path
from gating_jax.reports import page, timings
from gating_jax.reports.opening import Baseline, Surroundings, example_noun
from gating_jax.training import hosts, provenance, rundir

TIMES_FILE = "compile.json"
_MOST_NEIGHBOURS = 500  # directories that are read
# A baseline may differ in these whatever the experiment: they change no result, or only its noise.
_ALWAYS_IGNORED = ("seed", "devices.", "log_every", "eval_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Kind:
  """Rules for comparing runs of a kind with ungated ones.

  Attributes:
    field: the config's field that says what is gated.
    baselines: its values for ungated networks that pages compare with, the best baseline first.
    ungated: returns True for the flat config of a network that computes the same for every example.
    ignored: further fields, or sections that end with a dot, in which a baseline may differ.
    how: to train a baseline, as a text for readers.
    tested: fields that define what a run is tested on.
  """

  field: str
  baselines: tuple[str, ...]
  ungated: Callable[[Mapping[str, Any]], bool]
  ignored: tuple[str, ...]
  how: str
  tested: tuple[str, ...]


def _has_no_gates(config: Mapping[str, Any]) -> bool:
  return config.get("model.gating") == "none"


def _has_no_task_gates(config: Mapping[str, Any]) -> bool:
  return config.get("method") in _UNGATED_METHODS


def _chooses_nothing(config: Mapping[str, Any]) -> bool:
  """Checks that segments are selected without looking at the video, and no heavy net is gated."""
  return (
    config.get("model.selection") in _BLIND and config.get("model.heavy.gating", "none") == "none"
  )


# Continual methods that compute the same for every image of a task.
_UNGATED_METHODS = (
  "progressive",
  "fine_tuning",
  "joint",
  "ewc",
  "online_ewc",
  "si",
  "lwf",
  "er",
  "derpp",
  "agem",
  "icarl",
  "multitask_norms",
  "multitask_trunk",
  "dgm",
)
# Selections of segments that do not depend on the video.
_BLIND = ("all", "uniform", "random", "light")
# Fields that define the images that a run is tested on.
_IMAGE_SET = ("data.name", "data.test_split", "data.image_feature", "data.label_feature")
IMAGES = Kind(
  field="model.gating",
  baselines=("none",),
  ungated=_has_no_gates,
  ignored=(
    "model.gate.",
    "model.noise.",
    "model.exits.",
    "model.experts.",
    "model.backward_share",
    "model.init_from",
    "loss.",
    "optim.gate_lr_multiplier",
    "data.workers",
    "data.loader",
  ),
  how="the variant gates=none of its config",
  tested=_IMAGE_SET,
)
SCENES = dataclasses.replace(
  IMAGES, tested=("data.name", "data.test_split", "data.size", "data.digits", "data.test_scenes")
)
VIDEOS = Kind(
  field="model.selection",
  baselines=("all",),
  ungated=_chooses_nothing,
  ignored=(
    "model.gate.",
    "model.segment_fraction",
    "model.heavy.gating",
    "model.heavy.gate.",
    "loss.",
    "optim.epochs",
    "optim.gate_lr_multiplier",
    "data.workers",
  ),
  how="the variant selection=all of its config",
  tested=(
    "data.name",
    "data.test_split",
    "data.layout",
    "data.table",
    "data.folder",
    "data.segments",
    "data.test_videos",
    "data.at_most",
  ),
)
TASKS = Kind(
  field="method",
  baselines=("joint", "multitask_trunk", "fine_tuning"),
  ungated=_has_no_task_gates,
  ignored=(
    "gates.",
    "hat.",
    "progressive.",
    "router.",
    "generator.",
    "ewc.",
    "online_ewc.",
    "si.",
    "lwf.",
    "replay.",
    "derpp.",
    "dgm.",
    "model.gate.",
    "optim.gate_lr_multiplier",
  ),
  how="the variant method=joint of its config, which learns all tasks together, or "
  "method=fine_tuning",
  tested=(*_IMAGE_SET, "tasks.classes_per_task", "tasks.count", "tasks.order_seed"),
)


# By the name of the experiment in a config.
KINDS = {"classification": IMAGES, "segmentation": SCENES, "continual": TASKS, "long_video": VIDEOS}


def is_ungated(config: Mapping[str, Any]) -> bool:
  """Checks that a flat config belongs to a network that computes the same for every example."""
  kind = KINDS.get(str(config.get("experiment")))
  return kind is not None and kind.ungated(config)


def tested_on(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the fields of a flat config that define the run's data, without those that are None."""
  kind = KINDS.get(str(config.get("experiment")))
  names = ("experiment", *(kind.tested if kind else ()))
  return {name: str(config[name]) for name in names if config.get(name) is not None}


def read_surroundings(
  run_dir: rundir.RunDir,
  config: ml_collections.ConfigDict,
  kind: Kind,
  *,
  step: int,
  not_compiled: str = "",
) -> Surroundings:
  """Reads the surroundings of a run.

  Processes that do not write read no files: they return what the config tells.

  Args:
    run_dir, config: of the run.
    kind: of the run.
    step: of the page.
    not_compiled: why `--mode=compile` refuses the run; empty where it accepts it.
  """
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
  noun = example_noun(_read_config(path).get("experiment"))
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
  return config.get(kind.field) in kind.baselines and kind.ungated(config)


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
