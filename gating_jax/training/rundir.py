"""Run directories: one config, one run.

A run is resumed by the same config and refused to any other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_collections

from gating_jax import config_files
from gating_jax.checks import check_storable, user_path
from gating_jax.config_files import Config
from gating_jax.training import hosts
from gating_jax.training.journal import TEMPORARY, write_json

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
REPORT_FILE = "report.html"
CHECKPOINT_DIR = "checkpoints"
_LOCK_FILE = ".lock"
# Fields that change nothing in a training: it may be resumed with others.
_FREE_IN_TRAINING = ("data.workers", "data.cache", "data.cache_gb")
# Fields that change nothing in a run that is only tested.
_FREE_IN_TESTS = (*_FREE_IN_TRAINING, "data.test_split")
# A folder for files that are being written, next to their final place.
_STAGED = ".staged"


class RunDirError(Exception):
  """The error of a directory that cannot be used for this run; nothing in it was changed."""


class RunDir:
  """The run directory at `path`, which need not exist yet; `open_run` makes and locks it."""

  def __init__(self, path: Path):
    self.path = path

  @property
  def checkpoints(self) -> Path:
    """Returns the folder of the checkpoints."""
    return self.path / CHECKPOINT_DIR

  @property
  def report(self) -> Path:
    """Returns the path of the report's page."""
    return self.path / REPORT_FILE

  def exists(self) -> bool:
    """Returns whether there is a run."""
    return (self.path / CONFIG_FILE).exists()

  def has_checkpoint(self) -> bool:
    """Returns whether there is a checkpoint, which may be damaged."""
    folder = self.checkpoints
    # While a checkpoint is written, its name is more than its step.
    return folder.is_dir() and any(file.name.isdigit() for file in folder.iterdir())

  def has_progress(self) -> bool:
    """Returns whether there is anything that another config's run would spoil."""
    # At any depth and with any suffix: damaged checkpoints are kept next to their folder.
    return (self.path / RESULT_FILE).exists() or any(self.path.glob(f"**/{CHECKPOINT_DIR}*/*"))

  def result(self) -> dict[str, Any] | None:
    """Returns the result that `finish` wrote, or None while the run is not finished."""
    file = self.path / RESULT_FILE
    return _read(file) if file.exists() else None

  @contextlib.contextmanager
  def reading_result(self) -> Iterator[None]:
    """Turns errors of the block, which reads the result's entries, into one that names the file."""
    try:
      yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise RunDirError(
        f"{self.path / RESULT_FILE} is damaged: it lacks an entry, or has one of another kind "
        f"({type(error).__name__}: {error}); without it, the same command ends the run again"
      ) from error

  def config(self) -> dict[str, Any]:
    """Returns the config that the run began with, with the present names of its fields.

    Fields that are newer than the run have the value that stands for how it was trained. Raises
    RunDirError where there is no run.
    """
    if not self.exists():
      raise RunDirError(f"workdir {self.path} holds no run: it has no {CONFIG_FILE}")
    fields = _read(self.path / CONFIG_FILE)
    config_files.rename_fields(fields)
    config_files.add_newer_fields(fields)
    return fields

  def finish(self, result: Mapping[str, Any]) -> None:
    """Writes the result, which marks the run as finished."""
    hosts.on_writer(write_json, self.path / RESULT_FILE, dict(result))


def existing_run(path: Path, config: Config, *, only_tested: bool = False) -> RunDir:
  """Returns the run of `config` at `path`, to read while it may be training.

  Args:
    path: the run directory.
    config: the config to compare with that of the run.
    only_tested: whether the run is tested and nothing in its directory is written, so that its
      test split may be another.
  Raises:
    RunDirError: there is no run, or one of another config.
  """
  run_dir = RunDir(user_path(path))
  free = _FREE_IN_TESTS if only_tested else _FREE_IN_TRAINING
  _compare(run_dir.path, run_dir.config(), json.loads(config.to_json()), free=free)
  return run_dir


@contextlib.contextmanager
def open_run(path: Path, config: Config) -> Iterator[RunDir]:
  """Opens the run of `config` at `path` exclusively: no other job can until the block ends.

  Args:
    path: a directory; made, with its parents, if missing.
    config: written into a new directory, or over that of a run that has saved nothing yet;
      otherwise compared.
  Raises:
    ValueError: checkpoints cannot be written below the path, see `checks.check_storable`.
    RunDirError: the directory holds another config's run (the message shows the difference), or
      something that is no run; is in use by another process; or cannot be written.
  """
  path = user_path(path)
  check_storable("workdir", path)
  with contextlib.ExitStack() as held:
    # Only the writer holds the lock, for the whole job.
    hosts.on_writer(held.enter_context, _locked(path, json.loads(config.to_json())))
    yield RunDir(path)


def check_usable(path: Path, config: Config) -> None:
  """Raises the errors of `open_run` that show without changing anything."""
  path = user_path(path)
  check_storable("workdir", path)
  hosts.on_writer(_check_usable, path, json.loads(config.to_json()))


def _check_usable(path: Path, mine: Mapping[str, Any]) -> None:
  """Raises a RunDirError where a run of this config could not be opened; changes nothing."""
  _check_is_run(path)
  with _naming_workdir(path):
    above = path.absolute()
    # A missing folder is made in the nearest one that is there.
    while not os.path.lexists(above):
      above = above.parent
    if not above.is_dir():
      raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(above, os.W_OK | os.X_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    lock = path / _LOCK_FILE
    if lock.exists():
      with lock.open() as held:
        _hold(held, _in_use(path))
  run_dir = RunDir(path)
  if run_dir.exists() and run_dir.has_progress():
    _compare(path, run_dir.config(), mine, free=_FREE_IN_TRAINING)


def _check_is_run(path: Path) -> None:
  """Raises a RunDirError where there is something at the path that is no run."""
  if path.exists() and not path.is_dir():
    raise RunDirError(f"workdir must be a run directory or new; {path} is no directory")
  if path.exists() and not RunDir(path).exists() and not _is_blank(path):
    raise RunDirError(
      f"workdir must be a run directory or new; {path} exists and has no {CONFIG_FILE}"
    )


def _in_use(path: Path) -> str:
  """Returns the error for a run directory that another process has locked."""
  return f"workdir {path} is in use by another process"


@contextlib.contextmanager
def _naming_workdir(path: Path) -> Iterator[None]:
  """Names the run directory in errors of the block, which opens or makes it."""
  try:
    yield
  except OSError as error:
    raise RunDirError(f"workdir {path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _locked(path: Path, mine: Mapping[str, Any]) -> Iterator[None]:
  """Holds the directory, with this config written or found in it."""
  _check_is_run(path)
  with _naming_workdir(path):
    path.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process, however that ends.
    lock = (path / _LOCK_FILE).open("w")
  with lock:
    _hold(lock, _in_use(path))
    run_dir = RunDir(path)
    # Compared under the lock: another job may just have begun a run here.
    if run_dir.exists() and run_dir.has_progress():
      _compare(path, run_dir.config(), mine, free=_FREE_IN_TRAINING)
    else:
      write_json(path / CONFIG_FILE, mine)
    yield


def _hold(file: IO[str] | int, message: str) -> None:
  """Locks an open file or directory until it is closed.

  Raises RunDirError where another process holds it.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise RunDirError(message) from None


@contextlib.contextmanager
def staged(path: Path, names: Sequence[str]) -> Iterator[Path]:
  """Yields a folder for files of these names; when the block ends, all of them move to `path`.

  They are moved all or none; names that the block has not made are left out. The next call,
  whatever its names, clears away what an interrupted one left or, if all was written, moves it into
  place.

  Args:
    path: a directory.
    names: names of the files and folders to write.
  Raises:
    RunDirError: one of the names is in `path`; or another process is writing there in this way.
  """
  aside = path / _STAGED
  # The folder itself is locked, so that no lock file stays in it.
  handle = os.open(path, os.O_RDONLY)
  try:
    _hold(handle, f"{path} is being written to by another process")
    # An earlier call ended between its last write and the move: it is completed first.
    if (aside / "whole").exists():
      _move(aside, path)
    _check_free(path, names)
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "made").mkdir(parents=True)
    try:
      yield aside / "made"
    # Ctrl-C included: a block that fails leaves nothing.
    except BaseException:
      shutil.rmtree(aside)
      raise
    # From here on everything is written, and an interrupted move can be completed.
    (aside / "whole").touch()
    _move(aside, path)
  finally:
    os.close(handle)


def _move(aside: Path, path: Path) -> None:
  """Moves the files of a block that has ended to their place."""
  files = list((aside / "made").iterdir()) if (aside / "made").exists() else []
  # Checked again: the names may have been taken since the block began.
  _check_free(path, [file.name for file in files])
  for file in files:
    file.rename(path / file.name)
  shutil.rmtree(aside)


def _check_free(path: Path, names: Sequence[str]) -> None:
  """Raises a RunDirError where one of the names is taken."""
  for name in names:
    if (path / name).exists():
      raise RunDirError(f"{path / name} exists; rename it or delete it to write it again")


def flatten(tree: Mapping[str, Any] | Config, prefix: str = "") -> dict[str, Any]:
  """Flattens nested mappings or configs into one mapping, with names joined by dots.

  Args:
    tree: the outermost mapping.
    prefix: the beginning of all names, such as `optim.`.

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


def with_tuples(value: Any) -> Any:
  """Returns the value with tuples for the lists of JSON; configs have no lists."""
  if isinstance(value, dict):
    return {name: with_tuples(part) for name, part in value.items()}
  return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def _is_blank(path: Path) -> bool:
  """Returns whether `path` is a folder that is empty but for traces of a start killed at once."""
  return path.is_dir() and {f.name for f in path.iterdir()} <= {_LOCK_FILE, CONFIG_FILE + TEMPORARY}


def _read(file: Path) -> dict[str, Any]:
  """Reads a JSON object. Raises RunDirError where the file holds none."""
  try:
    found = json.loads(file.read_text())
  # RecursionError: a damaged file may nest deeper than Python can follow.
  except (ValueError, RecursionError) as error:
    raise RunDirError(f"{file} is damaged: it must hold JSON ({error})") from None
  if not isinstance(found, dict):
    raise RunDirError(f"{file} is damaged: it must hold a JSON object; got {type(found).__name__}")
  return found


def _compare(
  path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], *, free: Sequence[str]
) -> None:
  """Raises a RunDirError where configs differ, in other fields than those in `free`.

  A field that is None equals one that an older config lacks. Fields that are newer than the run
  do not count where they are of a method that neither config names.
  """
  # `get` gives None for an absent field, so that it equals one that is None.
  theirs, mine = flatten(theirs), flatten(mine)
  skipped, methods = set(free), (theirs.get("method"), mine.get("method"))
  for section, field in config_files.NEWER_FIELDS:
    if section not in methods:
      skipped.add(f"{section}.{field}")
  differences = ""
  for name in sorted((theirs.keys() | mine.keys()) - skipped):
    if theirs.get(name) != mine.get(name):
      there, here = theirs.get(name, "(absent)"), mine.get(name, "(absent)")
      differences += f"\n  {name}: {there!r} there, {here!r} here"
  if differences:
    raise RunDirError(
      f"workdir {path} holds a run of another config; choose another workdir or use its config. "
      f"Differences:{differences}"
    )
