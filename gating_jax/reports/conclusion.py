"""Closing lines of every mode: what was made, the main numbers, and the next command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.checks import printable
from gating_jax.paths import quoted
from gating_jax.reports import surroundings
from gating_jax.timing import CHOSEN, MASKED, UNGATED
from gating_jax.training import rundir

_LINES = 12
# The outcomes of gates, in the order in which they are shown.
_OUTCOMES = ("conditional", "always_open", "always_closed", "random_dropout")
# What a compiled network does, by its strategy.
_WAYS = {MASKED: "computing everything", CHOSEN: "skipping, each part in its fastest way"}
# By mode: what it does, and for how long.
_NEXT = {
  "compile": "times programs that skip closed units; some minutes",
  "export": "writes files that run without this package; some minutes",
  "report": "writes the page of the newest checkpoint",
}


def text(done: str, rows: Sequence[tuple[str, str]], then: Sequence[str] = ()) -> str:
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


def following(path: Path, modes: Sequence[str]) -> list[str]:
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
    times = surroundings.read_times(path)
    return times is not None and times.of(_newest_step(path))
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


def gates(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of MACs per image and of gate outcomes, from the result of a run on images."""
  # A net without gates has no gate outcomes.
  rows = []
  if "mac_ratio" in result:
    ratio = f"{100 * result['mac_ratio']:.1f} % of the ungated net's, gate networks included"
    rows.append(("MACs per image", f"{result['macs']:,.0f}, {ratio}"))
  if "gates" in result:
    counts = [f"{result[outcome]} {outcome.replace('_', ' ')}" for outcome in _OUTCOMES]
    rows.append(("gates", f"{result['gates']}: {', '.join(counts)}"))
  return rows


def times(timings: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
  """Returns a row for each table of `--mode=compile`: the strategy that is used, and its speed.

  Args:
    timings: by title, rows with the fields of `inference.compiled.Timing`.
  """
  found = []
  for title, rows in timings.items():
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
    way = _WAYS.get(chosen["strategy"], f"skipping ({chosen['strategy']})")
    faster = ungated["seconds"] / chosen["seconds"]
    text = (
      f"{1e3 * chosen['seconds']:.2f} ms by {way}; ungated {1e3 * ungated['seconds']:.2f} ms, "
      f"{faster:.2f} x"
    )
    found.append((title, text))
  return found
