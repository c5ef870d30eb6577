"""Ends of a mode: closing lines on the terminal, and the page of a run that failed.

Closing lines say what was made, the main numbers and the next command. A failed run gets the page
of its newest checkpoint, with a notice that stays until the run is finished.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gating_jax.checks import first_line, printable, quoted
from gating_jax.config_files import Config
from gating_jax.reports import curves, frame, measured_times, page
from gating_jax.reports.text import format_percent
from gating_jax.terminal import say, warn
from gating_jax.timing import CHOSEN, MASKED, UNGATED
from gating_jax.training import hosts, rundir
from gating_jax.training.hosts import PeerError
from gating_jax.training.journal import METRICS_FILE, TENSORBOARD_DIR, read_json, write_json
from gating_jax.training.rundir import RunDir

FAILURE_FILE = "failure.json"

_LINES = 12
# The outcomes of gates, in the order in which they are shown.
_OUTCOMES = ("conditional", "always_open", "always_closed", "random_dropout")
# Actions of a compiled network, by its strategy.
_ACTIONS = {MASKED: "computing everything", CHOSEN: "skipping, each part in its fastest way"}
# The action of each mode, and the time that it takes.
_NEXT = {
  "compile": "times programs that skip closed units; some minutes",
  "export": "writes files that run without this package; some minutes",
  "report": "writes the page of the newest checkpoint",
}


def closing_text(done: str, rows: Sequence[tuple[str, str]], then: Sequence[str] = ()) -> str:
  """Returns an empty line and at most twelve lines of text.

  Args:
    done: a sentence that says what was made.
    rows: names and values, the most important first; the last are dropped if there are too many.
    then: commands that may follow.
  """
  # One line is for `done`, and none of the commands is dropped.
  kept = [(printable(name), value) for name, value in rows[: _LINES - 1 - len(then)]]
  width = max((len(name) for name, _ in kept), default=0)
  lines = ["", printable(done)]
  for name, value in kept:
    lines.append(f"  {name:<{width}}  {printable(value)}")
  margin = "next: "
  for command in then:
    lines.append(margin + printable(command))
    margin = " " * len(margin)
  return "\n".join(lines)


def next_commands(path: Path, modes: Sequence[str]) -> list[str]:
  """Returns the commands of those modes that have no output yet, or else of a comparison.

  Each line ends with a shell comment that describes the command, so it can be pasted as it is.

  Args:
    path: of the run directory.
    modes: that may follow, in this order.
  """
  run = f"gating-jax --workdir={quoted(str(path))}"
  commands = []
  for mode in modes:
    if not _is_done(path, mode):
      commands.append(f"{run} --mode={mode}    # {_NEXT[mode]}")
  return commands or [f"{run},ANOTHER_RUN --mode=compare    # one page for several runs"]


def _is_done(path: Path, mode: str) -> bool:
  """Checks for an export, or for times of the newest checkpoint."""
  # A page is never done: it can be written again after each of the other modes.
  if mode == "compile":
    measured = measured_times.read_times(path)
    return measured is not None and measured.belong_to(_newest_step(path))
  return mode == "export" and (path / "export").exists()


def _newest_step(path: Path) -> int | None:
  """Returns the step of the newest checkpoint; None where there is none."""
  newest = None
  # From the names of folders, without opening a checkpoint.
  for folder in path.glob(f"{rundir.CHECKPOINT_DIR}/*"):
    if folder.name.isdecimal() and (newest is None or int(folder.name) > newest):
      newest = int(folder.name)
  return newest


def refusal(check: Callable[[Any], None], of: Any) -> str:
  """Returns the reason why a mode's `check` refuses a run; empty where it accepts it."""
  try:
    check(of)
  except ValueError as error:
    return str(error)
  return ""


def outcome_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of MACs per image and of gate outcomes, from the result of a run on images."""
  # A net without gates has no gate outcomes.
  rows = []
  if "mac_ratio" in result:
    ratio = f"{format_percent(result['mac_ratio'], 1)} of the ungated net's, gate networks included"
    rows.append(("MACs per image", f"{result['macs']:,.0f}, {ratio}"))
  if "gates" in result:
    counts = [f"{result[outcome]} {outcome.replace('_', ' ')}" for outcome in _OUTCOMES]
    rows.append(("gates", f"{result['gates']}: {', '.join(counts)}"))
  return rows


def time_rows(tables: Mapping[str, measured_times.Rows]) -> list[tuple[str, str]]:
  """Returns a row for each table of `--mode=compile`: the strategy that is used, and its speed.

  Args:
    tables: rows of times, by title.
  """
  found = []
  for title, rows in tables.items():
    chosen = ungated = None
    for row in rows:
      # Rows of single parts are left out: what counts at the end is the whole network.
      if row["part"] is None and row["strategy"] == UNGATED:
        ungated = row
      if row["part"] is None and row["chosen"]:
        chosen = row
    # A table without a row of the ungated network has nothing to compare with.
    if chosen is None or ungated is None:
      continue
    # The choice may be not to skip at all, where skipping is slower.
    way = _ACTIONS.get(chosen["strategy"], f"skipping ({chosen['strategy']})")
    faster = ungated["seconds"] / chosen["seconds"]
    text = (
      f"{1e3 * chosen['seconds']:.2f} ms by {way}; ungated {1e3 * ungated['seconds']:.2f} ms, "
      f"{faster:.2f} x"
    )
    found.append((title, text))
  return found


def conclude_times(
  run_dir: RunDir, step: int, tables: Mapping[str, measured_times.Rows], *, then: Sequence[str] = ()
) -> None:
  """Writes new times into the page of the run, and prints the last lines of `--mode=compile`.

  Args:
    run_dir: of the run.
    step: of the checkpoint that was timed.
    tables: rows of times, by title, as `timings.write_times` returns them.
    then: modes that may follow, next to writing the page again.
  """
  # A page of this step shows the times at once; one of another step must be written again.
  has_times, modes = frame.refresh_times(run_dir.path), []
  if run_dir.report.exists() and not has_times:
    modes.append("report")
  modes += then
  done = f"Timed the checkpoint of step {step:,}: median milliseconds of a call."
  made = ("made", f"{run_dir.path / measured_times.TIMES_FILE}, {measured_times.PICTURE_FILE}")
  say(closing_text(done, [made, *time_rows(tables)], next_commands(run_dir.path, modes)))


@contextlib.contextmanager
def report_failures(
  run_dir: RunDir, config: Config, report: Callable[[str], None]
) -> Iterator[None]:
  """Reports a training that fails in the block, and raises the error again.

  The failure is noted in the run directory, and the page of the newest checkpoint is written. With
  several processes, which would wait for each other, the page has no test.

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
      if hosts.is_writer():
        _report_failure(run_dir, config, report, said=_failure_text(failure))
    raise


def failure_notice(run_dir: RunDir) -> str:
  """Returns the page's first line if the run has failed and is not finished; empty otherwise."""
  # A result means that a later start has finished the run; the note of the failure may remain.
  if (run_dir.path / rundir.RESULT_FILE).exists():
    return ""
  try:
    return _failure_text(read_json(run_dir.path / FAILURE_FILE))
  except (TypeError, KeyError):  # no failure, or a damaged note of one
    return ""


def _failure_text(failure: Mapping[str, Any]) -> str:
  """Returns the notice of a recorded failure."""
  return (
    f"This run failed and is not finished: {printable(failure['reason'])} "
    f"({printable(failure['date'])})"
  )


def _has_begun(run_dir: RunDir) -> bool:
  """Checks that a training has opened its journal, which it does just before its first step."""
  # Runs of several nets have a journal for each, in its own folder.
  journals = [run_dir.path / TENSORBOARD_DIR, *run_dir.path.glob(f"*/{TENSORBOARD_DIR}")]
  return any(folder.exists() for folder in journals)


def _record(run_dir: RunDir, failure: Mapping[str, str]) -> None:
  """Notes the failure in place of that of an earlier start."""
  try:
    write_json(run_dir.path / FAILURE_FILE, dict(failure))
  except OSError as error:  # such as a full disk, which may be the failure itself
    warn("the failure could not be recorded: %s", error)


def _report_failure(
  run_dir: RunDir, config: Config, report: Callable[[str], None], *, said: str
) -> None:
  """Writes the page of the newest checkpoint, or of the journal alone if none can be tested."""
  say("the run failed; writing its report from what there is")
  why = "several processes would wait for each other"
  # The test would wait for processes that have failed.
  if jax.process_count() == 1:
    try:
      report(said)
      return
    except Exception as error:
      why = printable(first_line(error))
  try:
    opening = page.Opening(text=f"No checkpoint could be tested: {why}", notice=said)
    _write_journal(run_dir, config, opening)
  except Exception as last:  # such as a full disk, which may be the failure itself
    warn("the report of the failed run could not be written: %s", last)


def _write_journal(run_dir: RunDir, config: Config, opening: page.Opening) -> None:
  """Writes the page of a run as far as its journal goes."""
  phases = {}
  for file in sorted(run_dir.path.glob(f"**/{METRICS_FILE}")):
    phases[file.parent.name if file.parent != run_dir.path else "training"] = file.parent
  configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
  around = frame.read_surroundings(run_dir, config, step=0)
  sections = [
    curves.make_section(phases),
    frame.settings_section(configured),
    frame.about_section(around),
  ]
  page.write_page(
    run_dir.report,
    str(config.experiment),
    sections,
    subtitle=run_dir.path.name,
    opening=opening,
  )


def _now() -> str:
  """Returns the present time in UTC, to the minute."""
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
