"""A run directory: one config, one run. It is continued by the same config and refused to any other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_collections

from gating_jax.checks import one_of
from gating_jax.paths import check_storable, user_path
from gating_jax.progress import say
from gating_jax.training import hosts, provenance
from gating_jax.training.journal import TEMPORARY, write_json

CONFIG_FILE, RESULT_FILE, REPORT_FILE, CHECKPOINT_DIR, _LOCK_FILE = (
  "config.json",
  "result.json",
  "report.html",
  "checkpoints",
  ".lock",
)
_STAGED = ".staged"


class RunDirError(Exception):
  """The directory cannot be used for this run; nothing in it was changed."""


class RunDir:
  """An open run directory, `path`."""

  def __init__(self, path: Path):
    self.path = path

  @property
  def checkpoints(self) -> Path:
    return self.path / CHECKPOINT_DIR

  @property
  def report(self) -> Path:
    return self.path / REPORT_FILE

  def has_progress(self) -> bool:
    """Whether there is anything that another config's run would spoil."""
    return (self.path / RESULT_FILE).exists() or any(self.path.glob(f"**/{CHECKPOINT_DIR}*/*"))

  def result(self) -> dict[str, Any] | None:
    """What `finish` wrote, or None while the run is not finished."""
    file = self.path / RESULT_FILE
    return _read(file) if file.exists() else None

  def config(self) -> dict[str, Any]:
    """What the run was begun with. Raises RunDirError where there is no run."""
    file = self.path / CONFIG_FILE
    if not file.exists():
      raise RunDirError(f"workdir {self.path} holds no run: it has no {CONFIG_FILE}")
    return _read(file)

  def finish(self, result: Mapping[str, Any]) -> None:
    """Marks the run as finished."""
    hosts.written(lambda: write_json(self.path / RESULT_FILE, dict(result)))


def existing_run(path: Path, config: ml_collections.ConfigDict) -> RunDir:
  """The run of `config` at `path`, to look at while it may be training. Raises RunDirError as `open_run` does."""
  run_dir = RunDir(user_path(path))
  _compare(run_dir.path, run_dir.config(), json.loads(config.to_json()))
  return run_dir


@contextlib.contextmanager
def open_run(path: Path, config: ml_collections.ConfigDict) -> Iterator[RunDir]:
  """Opens the run of `config` at `path`, alone: no other job can until the block ends.

  Args:
    path: a directory; made, with its parents, if missing.
    config: written into a new directory, or over that of a run that has saved nothing yet; else compared.
  Raises:
    ValueError: a path below which checkpoints cannot be written, see `paths.check_storable`.
    RunDirError: the directory holds another config's run (the message shows the difference), or something that is no
      run; is in use by another process; or cannot be written.
  """
  path = user_path(path)
  check_storable("workdir", path)
  with contextlib.ExitStack() as held:
    hosts.written(lambda: held.enter_context(_locked(path, json.loads(config.to_json()))))
    yield RunDir(path)


@contextlib.contextmanager
def _locked(path: Path, mine: Mapping[str, Any]) -> Iterator[None]:
  """Holds the directory, with this config written or found in it."""
  file = path / CONFIG_FILE
  if path.exists() and not file.exists() and not _is_blank(path):
    raise RunDirError(
      f"workdir must be a run directory or new; {path} exists and has no {CONFIG_FILE}"
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / _LOCK_FILE).open("w")
  except OSError as error:
    raise RunDirError(f"workdir {path} cannot be written: {error.strerror}") from error
  with lock:
    _hold(lock, f"workdir {path} is in use by another process")
    run_dir = RunDir(path)
    if file.exists() and run_dir.has_progress():
      _compare(path, run_dir.config(), mine)
    else:
      write_json(file, mine)
    yield


def _hold(file: IO[str] | int, message: str) -> None:
  """Locks an open file or directory until it is closed. Raises RunDirError where another process holds it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise RunDirError(message) from None


@contextlib.contextmanager
def staged(path: Path, names: Sequence[str]) -> Iterator[Path]:
  """A folder to write files and folders of these names in; when the block ends they are in `path`, all of them or none.

  What of them the block has not made is left out. What an end half-way leaves, the next call, whatever its names,
  clears away or, if all was written, moves into place.

  Args:
    path: a directory.
    names: of what will be there.
  Raises:
    RunDirError: one of them is in `path`; or another process is writing there in this way.
  """
  aside = path / _STAGED
  handle = os.open(path, os.O_RDONLY)
  try:
    _hold(handle, f"{path} is being written to by another process")
    if (aside / "whole").exists():
      _move(aside, path)
    _check_free(path, names)
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "made").mkdir(parents=True)
    try:
      yield aside / "made"
    except BaseException:
      shutil.rmtree(aside)
      raise
    (aside / "whole").touch()
    _move(aside, path)
  finally:
    os.close(handle)


def _move(aside: Path, path: Path) -> None:
  files = list((aside / "made").iterdir()) if (aside / "made").exists() else []
  _check_free(path, [file.name for file in files])
  for file in files:
    file.rename(path / file.name)
  shutil.rmtree(aside)


def _check_free(path: Path, names: Sequence[str]) -> None:
  for name in names:
    if (path / name).exists():
      raise RunDirError(f"{path / name} exists; rename it or take it away to make it anew")


def run_mode(
  path: Path,
  config: ml_collections.ConfigDict,
  mode: str,
  *,
  train: Callable[[RunDir], None],
  render: Callable[[Mapping[str, Any]], str],
  **others: Callable[[RunDir], None],
) -> None:
  """Does what `mode` asks for: `train` goes on from wherever the run directory stands, the others look at one that is
  there.

  A finished run is not trained again; `render` shows its result. Raises ValueError for a mode that this kind of run
  does not have.
  """
  one_of("mode", mode, ("train", *others))
  if mode != "train":
    others[mode](existing_run(path, config))
    return
  with open_run(path, config) as run_dir:
    if (result := run_dir.result()) is None:
      hosts.written(lambda: provenance.record_start(run_dir.path))
      train(run_dir)
    else:
      say(
        f"{path} holds a finished run of this config; nothing was trained or changed. Its result:"
      )
      say(render(result))


def flatten(
  tree: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = ""
) -> dict[str, Any]:
  """Nested mappings or configs as one mapping, names joined by dots.

  >>> flatten({"optim": {"epochs": 3}, "seed": 0})
  {'optim.epochs': 3, 'seed': 0}
  """
  flat = {}
  for name, value in tree.items():
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat


def _is_blank(path: Path) -> bool:
  """Whether `path` is a folder with nothing in it, but for what a start that was killed at once left there."""
  return path.is_dir() and {f.name for f in path.iterdir()} <= {_LOCK_FILE, CONFIG_FILE + TEMPORARY}


def _read(file: Path) -> dict[str, Any]:
  try:
    found = json.loads(file.read_text())
  except ValueError as error:
    raise RunDirError(f"{file} is damaged: it must hold JSON ({error})") from None
  if not isinstance(found, dict):
    raise RunDirError(f"{file} is damaged: it must hold a JSON object; got {type(found).__name__}")
  return found


def _compare(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
  """Raises a RunDirError where configs differ; a field that is None and one that an older config lacks are the same."""
  theirs, mine = flatten(theirs), flatten(mine)
  lines = [
    f"  {name}: {theirs.get(name, '(absent)')!r} there, {mine.get(name, '(absent)')!r} here"
    for name in sorted(theirs.keys() | mine.keys())
    if theirs.get(name) != mine.get(name)
  ]
  if lines:
    raise RunDirError(
      f"workdir {path} holds a run of another config; name another workdir, or use its config. Difference:\n"
      + "\n".join(lines)
    )
