"""What every mode ends with: in a few lines what was made, the numbers that matter, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.checks import printable
from gating_jax.inference.timings import MASKED, UNGATED

_LINES = 12
_NEXT = {  # by mode, what it leaves in the run directory, and what it does
    "compile": ("compile.json", "times programs that skip what is closed; some minutes"),
    "export": ("export", "writes files that run without this package; some minutes")}


def text(done: str, rows: Sequence[tuple[str, str]], then: Sequence[str] = ()) -> str:
  """The lines, twelve at most, after an empty one.

  Args:
    done: a sentence that says what was made.
    rows: names and values, the most important first; of too many the last are left out.
    then: what may be done next.
  """
  kept = [(printable(name), printable(value)) for name, value in rows][: _LINES - 1 - len(then)]
  width = max((len(name) for name, _ in kept), default=0)
  lines = [printable(done), *(f"  {name:<{width}}  {value}" for name, value in kept)]
  for i, line in enumerate(then):
    lines.append(("next: " if i == 0 else "      ") + printable(line))
  return "\n".join(["", *lines])


def following(path: Path, modes: Sequence[str]) -> list[str]:
  """The commands that may follow for a run: those of these modes that were not called yet, or a comparison.

  What a command does is its comment, so that the line can be copied into a shell.
  """
  run = f"gating-jax --workdir={shlex.quote(str(path))}"
  found = []
  for mode in modes:
    made, does = _NEXT[mode]
    if not (path / made).exists():
      found.append(f"{run} --mode={mode}    # {does}")
  return found or [f"{run},ANOTHER_RUN --mode=compare    # one page for several runs"]


def gates(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What images cost and what gates do, of the result of a run on images."""
  rows = []
  if "mac_ratio" in result:
    ratio = f"{100 * result['mac_ratio']:.1f} % of the ungated net's, gate networks included"
    rows.append(("MACs per image", f"{result['macs']:,.0f}, {ratio}"))
  if "gates" in result:
    kinds = ("conditional", "always_open", "always_closed", "random_dropout")
    counts = [f"{result[kind]} {kind.replace('_', ' ')}" for kind in kinds]
    rows.append(("gates", f"{result['gates']}: {', '.join(counts)}"))
  return rows


def times(timings: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
  """For each table of `--mode=compile`, what runs and how fast it is.

  Args:
    timings: by title, rows with the fields of `inference.timings.Timing`.
  """
  found = []
  for title, rows in timings.items():
    whole = {row["strategy"]: row for row in rows if row["part"] is None}
    chosen = [row for row in whole.values() if row["chosen"]]
    if not chosen or UNGATED not in whole:
      continue
    (row,) = chosen
    ways = {MASKED: "computing everything", "chosen": "skipping, each part in its fastest way"}
    way = ways.get(row["strategy"], f"skipping ({row['strategy']})")
    faster = whole[UNGATED]["seconds"] / row["seconds"]
    found.append((title, f"{1e3 * row['seconds']:.2f} ms by {way}; ungated {1e3 * whole[UNGATED]['seconds']:.2f} ms, "
                         f"{faster:.2f} x"))
  return found
