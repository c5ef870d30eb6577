"""Large numbers of a run's page, next to its ungated baseline's, and the section about the run.

This module reads no files; `reports.surroundings` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gating_jax.reports import glossary, page, timings
from gating_jax.reports.text import plain
from gating_jax.reports.timings import Times

_NOT_RECORDED = "not recorded"


@dataclasses.dataclass(frozen=True)
class Baseline:
  """An ungated run to compare with.

  Attributes:
    name: of its run directory.
    numbers: its result, with nested names joined by dots.
  """

  name: str
  numbers: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """The context of a run's page, in addition to its result.

  Attributes:
    baseline: the ungated run to compare with; None where there is none.
    ungated: the run is such a baseline itself.
    step: of the page; None if the page has none.
    times: measured by `--mode=compile`, of any step; None before.
    not_compiled: why that mode refuses the run; empty where it accepts it.
    starts: of the run, as `training.provenance` describes them; empty for an old run.
    report: the same for the process that writes the page; None leaves it out.
    seed: of the run.
    workdir: its directory, as it was given.
  """

  baseline: Baseline | None = None
  ungated: bool = False
  step: int | None = None
  times: Times | None = None
  not_compiled: str = ""
  starts: Sequence[Mapping[str, Any]] = ()
  report: Mapping[str, Any] | None = None
  seed: int | None = None
  workdir: str = ""


def score_number(
  name: str, value: float, key: str, around: Surroundings, meaning: str
) -> page.Number:
  """Returns the score of a run as a large number.

  Args:
    name: of the score.
    value: in [0, 1].
    key: name of the score in the baseline's numbers.
    around: the run's surroundings.
    meaning: a sentence that defines the score.
  """
  baseline = _baseline(key, around)
  # Without a baseline the page says so in its place, so that the score never stands alone.
  if baseline is None:
    compared = (
      "this run is ungated: it is a baseline" if around.ungated else "ungated: no baseline found"
    )
  else:
    gap = 100 * (value - baseline)
    compared = f"ungated: {100 * baseline:.2f} %"
    meaning += (
      f" The ungated baseline is the run “{plain(around.baseline.name, 60)}”; this one "
      f"is {abs(gap):.2f} points {'above' if gap >= 0 else 'below'} it."
    )
  # `capitalize` would write "mean IoU" as "Mean iou".
  return page.Number(name[:1].upper() + name[1:], f"{100 * value:.2f} %", compared, meaning)


def macs_number(
  ratio: float, executed: float, dense: float, noun: str, around: Surroundings
) -> page.Number:
  """Returns a run's MACs as a fraction of the ungated network's, as a large number.

  Args:
    ratio: fraction of the ungated network's MACs.
    executed, dense: MACs per example of this network and of the ungated one.
    noun: word for an example, such as `image`.
    around: the run's surroundings.
  """
  baseline = "this run is ungated" if around.ungated else "ungated: 100 %"
  return page.Number(
    "MACs",
    f"{100 * ratio:.1f} %",
    f"{baseline}, {format_count(dense)} per {noun}",
    f"Multiply-accumulate operations per {noun}, {format_count(executed)}, in % of those of the ungated "
    "network; mean over the test set, gate networks included.",
  )


def time_number(noun: str, around: Surroundings) -> page.Number:
  """Returns the milliseconds per example as a large number."""
  return timings.time_number(
    around.times, noun, step=around.step, workdir=around.workdir, refused=around.not_compiled
  )


def times_section(noun: str, around: Surroundings) -> page.Section:
  """Returns the section of times of each way to run the network."""
  return timings.times_section(around.times, noun, step=around.step, refused=around.not_compiled)


def example_noun(experiment: Any) -> str:
  """Returns the word for an example of a kind of experiment.

  >>> example_noun("segmentation")
  'scene'
  """
  return {"long_video": "video", "segmentation": "scene"}.get(experiment, "image")


def format_count(count: float) -> str:
  """Formats a large count with three digits.

  >>> format_count(40_551_040), format_count(999), format_count(1_234)
  ('40.6 M', '999', '1.23 k')
  """
  for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if count >= size:
      return f"{count / size:.3g} {letter}"
  return f"{count:.3g}"


def about_section(around: Surroundings) -> page.Section:
  """Returns the section on the origin of the run: command, commit, versions, hardware."""
  # An old run directory records no start: its rows say "not recorded".
  starts = list(around.starts)
  first = starts[0] if starts else {}
  rows = [
    ("started", _text(first.get("date"))),
    ("command", _text(first.get("command"))),
    (
      "commit",
      _text(
        first.get("commit"),
        "not recorded (the package is not run from a checkout)" if starts else "",
      ),
    ),
    ("versions", _versions(first.get("versions"))),
    ("seed", _text(around.seed)),
    ("hardware", _hardware(first)),
    ("run directory", _text(around.workdir)),
  ]
  # A run may be resumed by another command or on other hardware.
  for i, start in enumerate(starts[1:], 1):
    rows.append((f"resumed ({i})", f"{_text(start.get('date'))}, {_hardware(start)}"))
  if around.report is not None:
    rows += [
      ("page written", _text(around.report.get("date"))),
      ("by", _text(around.report.get("command"))),
      ("with commit", _text(around.report.get("commit"))),
      ("on", _hardware(around.report)),
    ]
  text = (
    ""
    if starts
    else "This run directory has no record of when, by which command and on what it was started."
  )
  return page.Section(
    "About this run", text, [page.Table(("what", "value"), rows, numeric=False, terms=_ABOUT)]
  )


def about_runs_section(
  runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], Any]], report: Mapping[str, Any]
) -> page.Section:
  """Returns the section on the origin of several runs, and of the page.

  Args:
    runs: starts and seed of each run, by its name.
    report: the process that writes the page.
  """
  # A row for each run, and a last one for the page.
  rows = []
  for name, (starts, seed) in runs.items():
    first = starts[0] if starts else {}
    rows.append(
      [
        name,
        _text(first.get("date")),
        _text(first.get("command")),
        _text(first.get("commit")),
        _text(seed),
        _hardware(first),
        _versions(first.get("versions")),
      ]
    )
  rows.append(
    [
      "this page",
      _text(report.get("date")),
      _text(report.get("command")),
      _text(report.get("commit")),
      "–",
      _hardware(report),
      _versions(report.get("versions")),
    ]
  )
  header = ("run", "started", "command", "commit", "seed", "hardware", "versions")
  return page.Section(
    "About these runs", "", [page.Table(header, rows, numeric=False, terms=_ABOUT)]
  )


_ABOUT = (
  ("started", "the date of the first start, in UTC"),
  ("commit", "of the code; “dirty” where files differ from it"),
  ("hardware", "what JAX computed on, and how many devices and processes there were"),
)


def _baseline(key: str, around: Surroundings) -> float | None:
  """Returns the baseline's number; None where there is none."""
  # A baseline of an older version may lack the number.
  found = None if around.baseline is None else around.baseline.numbers.get(key)
  return found if isinstance(found, (int, float)) else None


def why_no_baseline(around: Surroundings, how: str) -> str:
  """Explains how to train a missing baseline; empty where there is one, or none is needed.

  Args:
    around: the run's surroundings.
    how: to train the baseline, such as `the variant gates=none of its config`.
  """
  if around.ungated or around.baseline is not None:
    return ""
  return (
    "No ungated baseline: next to this run directory there is no finished run of the same config "
    f"without gates. Train one there ({how}), then write this page again (mode report)."
  )


def _text(value: Any, absent: str = "") -> str:
  return plain(value, 500) if value not in (None, "") else absent or _NOT_RECORDED


def _versions(versions: Any) -> str:
  if not isinstance(versions, Mapping) or not versions:
    return _NOT_RECORDED
  return plain(", ".join(f"{name} {version}" for name, version in versions.items()), 500)


def _hardware(start: Mapping[str, Any]) -> str:
  if not start.get("hardware"):
    return _NOT_RECORDED
  devices, processes = start.get("devices"), start.get("processes")
  return plain(f"{start['hardware']}; devices: {devices}, processes: {processes}", 500)


def settings_section(rows: Sequence[tuple[str, str]]) -> page.Section:
  """Returns the section of a run's settings."""
  return page.Section("Settings", parts=[glossary.settings_table(rows)])
