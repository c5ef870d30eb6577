"""Comparison of several runs: scores, costs, differences of config, and learning curves.

This module reads no files; `reports.compare` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gating_jax.reports import comparison_pictures, page
from gating_jax.reports.compared_runs import MISSING, SCORES, Group, Run, Score, differences, groups
from gating_jax.reports.opening import example, short
from gating_jax.reports.text import columns, plain
from gating_jax.reports.times import number

TITLE = "Comparison of runs"
_LETTERS = 40  # of a cell in a terminal


def render(runs: Sequence[Run]) -> str:
  """Renders the results and the settings that differ as text for a terminal."""
  shown = lambda rows: "\n".join(columns([[plain(cell, _LETTERS) for cell in row] for row in rows]))
  # The terminal cuts long cells; the page shows them in full.
  names = [run.name for run in runs]
  text = [shown([["", *names], *_results(runs)])]
  if len(runs) > 1:
    differ = differences(runs)
    text.append(shown([["config", *names], *differ]) if differ else "The configs do not differ.")
  if len(found := groups(runs)) > 1:
    text.append(_apart(found))
  return "\n\n".join(text)


def content(runs: Sequence[Run]) -> tuple[page.Opening, list[page.Section]]:
  """Returns the top of the page and its sections.

  Args:
    runs: in the order of the columns.
  """
  # The group whose numbers mean most comes first, whatever the order of the runs.
  found = sorted(groups(runs), key=_rank)
  names, costs = [run.name for run in runs], comparison_pictures.costs(runs, found)
  text = (
    ""
    if all(run.result for run in runs)
    else "For runs that are not finished, the newest test is shown."
  )
  rows = _results(runs)
  made = [
    page.Section(
      "Results", text, [page.Table(["measure", *names], rows, terms=_defined(rows))], open=True
    )
  ]
  if len(runs) > 1:
    differ = differences(runs)
    text = (
      "The settings in which runs differ. Settings of only one kind of experiment are left out."
    )
    made.append(
      page.Section(
        "Configs",
        text if differ else "The configs do not differ.",
        [page.Table(["setting", *names], differ, numeric=False)] if differ else [],
        open=True,
      )
    )
  # The first picture is at the top of the page.
  if costs[1:]:
    made.append(page.Section("Score and cost", "Upper left is better.", costs[1:]))
  if courses := comparison_pictures.courses(runs, found):
    made.append(page.Section("During training", "", courses))
  said = [_apart(found)] * (len(found) > 1) + [
    _which(group, alone=len(found) == 1) for group in found
  ]
  numbers = [number for group in found for number in _numbers(group, alone=len(found) == 1)]
  return page.Opening(numbers, costs[0] if costs else None, " ".join(filter(None, said))), made


def _apart(found: Sequence[Group]) -> str:
  """States that runs with different test sets are not compared."""
  return (
    f"These runs learn {len(found)} different things: {', '.join(group.name for group in found)}. "
    "Scores are comparable only within each of them."
  )


# Definitions of rows of results, by the beginnings of their names.
_TERMS = {
  "tested on": "the data set; scores on different ones are not comparable",
  "state": "whether the run is finished",
  "last step": "the newest step with a record, in updates of the parameters",
  "mean IoU": "intersection over union, mean over classes, on the test set",
  "accuracy": "on the test set; of a sequence of tasks the mean over tasks at the end",
  "mean average precision": "mean over classes, on the test set",
  "forgetting": "mean over all tasks but the last of the best accuracy minus the final one",
  "MACs": "multiply-accumulate operations of one image or video, mean over the test set, gate "
  "networks included",
  "share": "MACs in % of those of the run's own network without gates",
  "parameters": "trainable parameters of the network; those of gates are counted separately",
  "gates": "open for 1 to 99 % of the test set (conditional), for more, for less, or decided by "
  "noise (at random)",
  "units that two tasks share": "in % of those that either uses, mean over pairs of tasks",
  "segments chosen": "in % of a video's segments, mean over videos",
  "seconds": "of the training since it was last started or resumed",
}


def _defined(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
  """Returns the definitions of the given rows, and of the columns."""
  runs = (
    "columns",
    "the runs, by the names of their directories; a dash means that a run has no such number",
  )
  return [
    runs,
    *(
      (start, meaning)
      for start, meaning in _TERMS.items()
      if any(name.startswith(start) for name, *_ in rows)
    ),
  ]


class _Pair(NamedTuple):
  """The best gated run of a group, and the best ungated one; None where there is none."""

  score: Score
  gated: Run
  ungated: Run | None


def _best(group: Group) -> _Pair | None:
  """Finds the best runs by the first score that gated and ungated runs both have.

  If no score has both, it is the first one of a gated run. Returns None where no run is gated.
  """
  pairs = []
  for score in SCORES:
    scored = group.scored(score).values()
    value = lambda run: run.numbers[score.share]  # noqa: B023
    gated = max((run for run in scored if not run.ungated), key=value, default=None)
    ungated = max((run for run in scored if run.ungated), key=value, default=None)
    if gated:
      pairs.append(_Pair(score, gated, ungated))
  # `min` keeps the first of equals, so the order of `SCORES` decides.
  return min(pairs, key=lambda pair: pair.ungated is None, default=None)


def _rank(group: Group) -> int:
  """Ranks groups: first those with a gated and an ungated run, last those without a gated one."""
  pair = _best(group)
  return 2 if pair is None else int(pair.ungated is None)


def _which(group: Group, *, alone: bool) -> str:
  """States which runs the large numbers belong to."""
  pair = _best(group)
  if pair is None:
    return ""
  of = "The numbers" if alone else f"Those of {group.name}"
  text = (
    f"{of} belong to {plain(pair.gated.name, 60)}, the gated run with the highest "
    f"{pair.score.label}"
  )
  if pair.ungated is None:
    none = "None of these runs" if alone else "None of its runs"
    return f"{text}. {none} is ungated, so there is no baseline to compare it with."
  return f"{text}, next to {plain(pair.ungated.name, 60)}, the best ungated one."


def _numbers(group: Group, *, alone: bool) -> list[page.Number]:
  """Returns a group's large numbers, named by the group unless it is alone.

  A group without a gated run has none.
  """
  pair = _best(group)
  if pair is None:
    return []
  # Several groups share the top of the page, so each number tells its group.
  numbers = _against(pair) if pair.ungated else _without_baseline(pair)
  return (
    numbers
    if alone
    else [dataclasses.replace(number, name=f"{number.name}, {group.name}") for number in numbers]
  )


def _title(score: Score) -> str:
  return f"{score.label[:1].upper()}{score.label[1:]}"


def _without_baseline(pair: _Pair) -> list[page.Number]:
  score, mine, none = pair.score, pair.gated.numbers, "ungated: none among these runs"
  spent = page.Number(
    f"MACs per {example(pair.gated.experiment)}", short(mine[score.macs]), none, _MACS
  )
  return [
    page.Number(_title(score), f"{100 * mine[score.share]:.2f} %", none, "On the test set."),
    spent,
    _time(pair),
  ]


def _against(pair: _Pair) -> list[page.Number]:
  """Returns the large numbers of the gated run, next to those of the ungated run."""
  score, mine, theirs = pair.score, pair.gated.numbers, pair.ungated.numbers
  # In % of the ungated run's MACs, not of this run's own network without gates, which may be wider.
  ratio = 100 * mine[score.macs] / theirs[score.macs] if theirs[score.macs] else 0.0
  return [
    page.Number(
      _title(score),
      f"{100 * mine[score.share]:.2f} %",
      f"ungated: {100 * theirs[score.share]:.2f} %",
      "On the test set.",
    ),
    page.Number(
      "MACs",
      f"{ratio:.1f} %",
      f"ungated: 100 %, {short(theirs[score.macs])} per {example(pair.gated.experiment)}",
      f"{_MACS} Here {short(mine[score.macs])}, in % of those of the ungated run.",
    ),
    _time(pair),
  ]


_MACS = "Multiply-accumulate operations, mean over the test set, gate networks included."


def _time(pair: _Pair) -> page.Number:
  """Returns the milliseconds per example, next to the ungated run's.

  Without times of the ungated run on the same device, the baseline is the gated run's own network
  without gates.
  """
  noun, mine = example(pair.gated.experiment), pair.gated.tested_times
  # A comparison is not filled in later, and its reader runs no command for a single run.
  found = dataclasses.replace(number(mine, noun), command="", place="")
  if mine is None:
    return dataclasses.replace(
      found, meaning=f"Time of one {noun}, as --mode=compile of the tested step measures it."
    )
  theirs = pair.ungated.tested_times if pair.ungated else None
  # Times on different devices are not comparable.
  if theirs is None or theirs.device != mine.device:
    return found
  return dataclasses.replace(found, baseline=f"ungated: {number(theirs, noun).value}")


def _results(runs: Sequence[Run]) -> list[list[str]]:
  """Returns rows of a measure and a cell for each run; rows that no run has are left out."""
  sets = [run.tested.get("data.name") for run in runs]
  rows = [["tested on", *(MISSING if name is None else name for name in sets)]] if any(sets) else []
  rows += [
    ["state", *("finished" if run.result is not None else "not finished" for run in runs)],
    ["last step", *(f"{run.step:,}" for run in runs)],
  ]
  for name, text in _measures().items():
    cells = [text(run.numbers) for run in runs]
    if any(cell is not None for cell in cells):
      rows.append([name, *(MISSING if cell is None else cell for cell in cells)])
  return rows


def _measures() -> dict[str, Callable[[Mapping[str, Any]], str | None]]:
  """Returns, by a row's name, functions from a run's numbers to a cell.

  They return None where the run lacks a number.
  """

  def text(form, *names):
    """Returns a function from a run's numbers to its cell: `form` of those called `names`."""

    def cell(numbers):
      """Returns the cell, or None where a number is missing."""
      # One missing number leaves the whole cell empty.
      values = [numbers.get(name) for name in names]
      return None if None in values else form(*values)

    return cell

  # The format `z` writes -0.00 as 0.00: forgetting may be a rounding error below 0.
  percent = lambda share: f"{100 * share:z.2f} %"
  ratio = lambda part, whole: f"{100 * part / whole:.1f} %" if whole else None
  count = lambda number, gates: f"{number:,.0f} of {gates:,.0f}"
  whole = lambda number: f"{number:,.0f}"
  return {
    **{score.label: text(percent, score.share) for score in SCORES},
    "forgetting, task known": text(percent, "task_aware.forgetting"),
    "forgetting, task unknown": text(percent, "task_agnostic.forgetting"),
    "MACs": text(whole, "macs"),
    "share of the dense net's": text(lambda share: f"{100 * share:.1f} %", "mac_ratio"),
    "MACs, task known": text(whole, "task_aware_macs"),
    "share, task known": text(ratio, "task_aware_macs", "dense_macs"),
    "MACs, task unknown": text(whole, "task_agnostic_macs"),
    "share, task unknown": text(ratio, "task_agnostic_macs", "dense_macs"),
    "parameters": text(whole, "params"),
    "parameters of gates, separately": text(whole, "gate_params"),
    "gates conditional": text(count, "conditional", "gates"),
    "gates always open": text(count, "always_open", "gates"),
    "gates always closed": text(count, "always_closed", "gates"),
    "gates at random": text(count, "random_dropout", "gates"),
    "units that two tasks share": text(percent, "mean_gate_overlap"),
    "segments chosen": text(percent, "share"),
    "seconds since the last start": text(whole, "seconds_since_last_start"),
  }
