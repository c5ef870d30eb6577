"""Comparison of run directories of any experiments, finished or not, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gating_jax.paths import user_path
from gating_jax.progress import say, working
from gating_jax.reports import compared_runs, comparison, conclusion, opening, page, surroundings
from gating_jax.training import provenance, rundir
from gating_jax.training.journal import METRICS_FILE, numbers, read_lines


def run(folders: Sequence[Path], page_file: Path) -> None:
  """Prints the comparison and writes its page.

  Args:
    folders: run directories, at least one.
    page_file: a new file, or the page of an earlier comparison.
  Raises:
    RunDirError: a folder holds no run, or a damaged one.
    ValueError: a folder is given twice, or `page_file` holds something else.
  """
  with working("reading the runs and drawing the comparison", "up to a minute"):
    runs = [_read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    # Checked before anything is drawn; never overwrites another file, such as a run's own page.
    if page_file.exists() and not _is_comparison(page_file):
      raise ValueError(
        f"page must be new or the page of an earlier comparison; {page_file} is neither"
      )
    begin, sections = comparison.content(runs)
    sections.append(_about(folders, runs))
    page.write(page_file, comparison.TITLE, sections, ", ".join(run.name for run in runs), begin)
  say(comparison.render(runs))
  say(f"\npage: {page_file}")
  rows = [(run.name, _summary(run)) for run in runs]
  say(
    conclusion.text(
      f"Compared {len(runs)} runs.",
      [("page", str(page_file)), *rows],
      [f"open {page_file} in a browser"],
    )
  )


def folders(text: str) -> list[Path]:
  """Splits a text at commas into folders; a name may contain a comma if that folder exists."""
  found, parts = [], text.split(",")
  while parts:
    # Takes the longest name that exists, or else the text before the first comma.
    ends = [end for end in range(len(parts), 1, -1) if user_path(",".join(parts[:end])).is_dir()]
    end = ends[0] if ends else 1
    found.append(user_path(",".join(parts[:end])))
    del parts[:end]
  return found


def names(folders: Sequence[Path]) -> list[str]:
  """Returns each folder's name, with as much of its path in front as makes it unique.

  >>> names([Path("/runs/a/digits"), Path("/runs/b/digits"), Path("/runs/other")])
  ['a/digits', 'b/digits', 'other']
  """
  # Resolved, so that two spellings of the same folder are recognised.
  parts = [folder.resolve().parts for folder in folders]

  def name(mine):
    """Returns the shortest end of the path `mine` that no other path has."""
    for depth in range(1, len(mine) + 1):
      if sum(other[-depth:] == mine[-depth:] for other in parts) == 1:
        return str(Path(*mine[-depth:]))
    raise ValueError(f"workdir must name each folder once; got {Path(*mine)} twice")

  return [name(mine) for mine in parts]


def _read(folder: Path, name: str) -> compared_runs.Run:
  run_dir = rundir.RunDir(folder)
  # Run directories may be copied or edited by hand, so what the page relies on is checked here.
  config, result = rundir.flatten(run_dir.config()), run_dir.result()
  if not isinstance(config.get("experiment"), str):
    raise rundir.RunDirError(
      f"{folder / rundir.CONFIG_FILE} is damaged: it must name the experiment"
    )
  if result is not None:
    result = numbers(rundir.flatten(result))
    if "step" not in result:
      raise rundir.RunDirError(f"{folder / rundir.RESULT_FILE} is damaged: it must name the step")
  lines = read_lines(folder / METRICS_FILE)
  if not lines:
    raise rundir.RunDirError(
      f"workdir {folder} holds nothing to compare yet: no line in {METRICS_FILE}"
    )
  # The split is a text, and the only one that is kept.
  measured = [{**numbers(line), "split": line["split"]} for line in lines]
  return compared_runs.Run(
    name,
    config,
    result,
    measured,
    ungated=surroundings.is_ungated(config),
    times=surroundings.read_times(folder),
    tested=surroundings.tested_on(config),
  )


def _about(folders: Sequence[Path], runs: Sequence[compared_runs.Run]) -> page.Section:
  """Returns the section on when, and by which command, the runs and the page were made."""
  return opening.about_several(
    {
      run.name: (provenance.read_starts(folder), run.config.get("seed"))
      for folder, run in zip(folders, runs, strict=True)
    },
    provenance.describe(),
  )


def _summary(run: compared_runs.Run) -> str:
  """Summarises the scores and MACs of a run in one line."""
  if run.result is None:
    return "not finished"
  # By their names in results, which differ between kinds of experiment; a run has some of them.
  names = {
    "accuracy": "accuracy",
    "mean_iou": "mean IoU",
    "mean_average_precision": "mean average precision",
    "task_aware.average_accuracy": "accuracy, task known",
    "mac_ratio": "MACs of the ungated net",
  }
  found = [
    f"{words} {100 * run.result[name]:.2f} %" for name, words in names.items() if name in run.result
  ]
  return ", ".join(found)


def _is_comparison(file: Path) -> bool:
  # The title is near the beginning; the rest may be megabytes of pictures.
  return (
    file.is_file() and f"<title>{comparison.TITLE}</title>".encode() in file.read_bytes()[:2000]
  )
