"""A run that fails half-way leaves the page of what it has, which says so in its first line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from gating_jax.checks import printable
from gating_jax.reports import opening, page
from gating_jax.training import rundir
from gating_jax.training.rundir import RunDir


def run_mode(
    path: Path,
    config: ml_collections.ConfigDict,
    mode: str,
    *,
    train: Callable[[RunDir], None],
    report: Callable[..., None],
    render: Callable[[Mapping[str, Any]], str],
    **others: Callable[[RunDir], None],
) -> None:
  """`rundir.run_mode`, and where `train` fails, the page of its newest checkpoint.

  The error goes on to the caller. Of several processes, which would wait for each other, none writes this page.

  Args:
    path, config, mode, train, render, others: as in `rundir.run_mode`.
    report: the mode of this name; with `notice=`, what the page says first.
  """
  def train_or_report(run_dir):
    try:
      train(run_dir)
    except Exception as error:
      begun = run_dir.has_progress() or not isinstance(error, (ValueError, rundir.RunDirError))
      if begun and jax.process_count() == 1:
        _report_failure(run_dir, config, report, error)
      raise

  rundir.run_mode(path, config, mode, train=train_or_report, report=report, render=render, **others)


def _report_failure(
    run_dir: RunDir, config: ml_collections.ConfigDict, report: Callable[..., None], error: Exception
) -> None:
  """Writes the page of the newest checkpoint; where there is none, or it cannot be tested, one without numbers."""
  reason = (str(error).splitlines() or [type(error).__name__])[0]
  notice = f"This run failed and is not finished: {printable(reason)}"
  print("the run failed; its report is written as far as it came", flush=True)
  try:
    report(run_dir, notice=notice)
  except Exception as other:
    configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
    text = f"No checkpoint could be tested: {printable((str(other).splitlines() or [type(other).__name__])[0])}"
    try:
      page.write(run_dir.report, str(config.experiment), [opening.settings(configured)], run_dir.path.name,
                 page.Opening(text=text, notice=notice))
    except Exception as last:  # such as a full disk, which the error itself may be about
      logging.warning("no report could be written of the run that failed: %s", last)
