"""Report of a failed run: the page of its newest checkpoint, with a notice until it is finished."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections

from gating_jax.checks import first_line, printable
from gating_jax.reports import opening, page
from gating_jax.terminal import say, warn
from gating_jax.training import rundir
from gating_jax.training.hosts import PeerError
from gating_jax.training.journal import TENSORBOARD_DIR, write_json
from gating_jax.training.rundir import RunDir

FILE = "failure.json"


@contextlib.contextmanager
def reported(
  run_dir: RunDir, config: ml_collections.ConfigDict, report: Callable[[str], None]
) -> Iterator[None]:
  """Reports a training that fails in the block, and raises the error again.

  The failure is noted in the run directory, and the page of the newest checkpoint is written. With
  several processes no page is written, since they would wait for each other.

  Args:
    run_dir: the run directory.
    config: the config of the run.
    report: writes the page of the newest checkpoint, with this first line.
  """
  try:
    yield
  except Exception as error:
    # A failure before the first step, such as a wrong config, leaves no note. A `PeerError` is the
    # echo of another process' failure, which that process has reported.
    if _has_begun(run_dir) and not isinstance(error, PeerError):
      failure = {"date": _now(), "reason": printable(first_line(error))}
      _record(run_dir, failure)
      # With several processes the test would wait for those that have failed.
      if jax.process_count() == 1:
        _report_failure(run_dir, config, report, _said(failure))
    raise


def notice(run_dir: RunDir) -> str:
  """Returns the page's first line if the run has failed and is not finished; empty otherwise."""
  # A result means that a later start has finished the run; the note of the failure may remain.
  if (run_dir.path / rundir.RESULT_FILE).exists():
    return ""
  try:
    return _said(json.loads((run_dir.path / FILE).read_text("utf-8", "replace")))
  except (OSError, ValueError, TypeError, KeyError):  # no failure, or a damaged note of one
    return ""


def _said(failure: Mapping[str, Any]) -> str:
  return (
    f"This run failed and is not finished: {printable(failure['reason'])} "
    f"({printable(failure['date'])})"
  )


def _has_begun(run_dir: RunDir) -> bool:
  """Checks that a training has opened its journal, which it does just before its first step."""
  # Runs of several nets have a journal for each in folders of their own.
  journals = [run_dir.path / TENSORBOARD_DIR, *run_dir.path.glob(f"*/{TENSORBOARD_DIR}")]
  return any(folder.exists() for folder in journals)


def _record(run_dir: RunDir, failure: Mapping[str, str]) -> None:
  """Notes the failure in place of that of an earlier start."""
  try:
    write_json(run_dir.path / FILE, dict(failure))
  except OSError as error:  # such as a full disk, which may be the failure itself
    warn("the failure could not be recorded: %s", error)


def _report_failure(
  run_dir: RunDir, config: ml_collections.ConfigDict, report: Callable[[str], None], said: str
) -> None:
  """Writes the page of the newest checkpoint, or one without numbers if none can be tested."""
  say("the run failed; writing its report from what there is")
  try:
    report(said)
  except Exception as error:
    configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
    begin = page.Opening(
      text=f"No checkpoint could be tested: {printable(first_line(error))}", notice=said
    )
    try:
      page.write_page(
        run_dir.report,
        str(config.experiment),
        [opening.settings_section(configured)],
        subtitle=run_dir.path.name,
        opening=begin,
      )
    except Exception as last:  # such as a full disk, which may be the failure itself
      warn("the report of the failed run could not be written: %s", last)


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
