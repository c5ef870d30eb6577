"""Provenance of a run: the time, command, code and machine of each start.

A run that is resumed has several starts. The file is human-readable; nothing depends on it, and an
old run has none.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gating_jax import timing
from gating_jax.checks import quoted
from gating_jax.training.journal import write_json

FILE = "provenance.json"
_PACKAGES = ("gating-jax", "jax", "jaxlib", "flax", "optax", "numpy")
# Starts to keep: the first one and the newest.
_MOST_STARTS = 50


def record_start(path: Path) -> None:
  """Adds a start, now and by this process, to those of the run directory `path`.

  A file that cannot be written is skipped, since a run is worth more than its provenance.
  """
  starts = [*read_starts(path), describe()]
  if len(starts) > _MOST_STARTS:
    # The first start shows how the run began.
    starts = [starts[0], *starts[1 - _MOST_STARTS :]]
  with contextlib.suppress(OSError):
    write_json(path / FILE, {"starts": starts})


def read_starts(path: Path) -> list[dict[str, Any]]:
  """Reads the starts of the run directory `path`, oldest first; none if missing or damaged."""
  try:
    starts = json.loads((path / FILE).read_text("utf-8", "replace"))["starts"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return []
  if not isinstance(starts, list):
    return []
  return [start for start in starts if isinstance(start, dict)]


def describe() -> dict[str, Any]:
  """Describes this process as a start: date, command, commit, versions, hardware and devices."""
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": _command(),
    "commit": _commit(),
    "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
    "hardware": timing.device(),
    "devices": jax.device_count(),
    "processes": jax.process_count(),
  }


def _command() -> str:
  """Returns the command that started this process, for a shell to run again."""
  typed = sys.orig_argv
  # Their path belongs to this installation, so the command's name stands for it.
  if Path(sys.argv[0]).name in ("gating-jax", "__main__.py", "cli.py"):
    typed = ["gating-jax", *sys.argv[1:]]
  return " ".join(map(quoted, typed))


def _versions(packages: Sequence[str]) -> dict[str, str]:
  """Returns the versions of the packages that are installed."""
  found = {}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _commit() -> str | None:
  """Returns the commit that this package is checked out at; None where it is installed.

  It is marked where files differ from the commit.
  """
  root = Path(__file__).parents[2]
  # Otherwise git would name the commit of a project that this package is installed in.
  if not (root / ".git").exists():
    return None
  # Tags are excluded: the output is the hash, with the mark.
  describe_hash = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
  command = ["git", "-C", str(root), *describe_hash]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip() or None
