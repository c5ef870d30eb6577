"""Tasks on labelled images, and the files of a run: pictures, a table of gates, the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from gating_jax.images import compile
from gating_jax.images import report as image_report
from gating_jax.images.build import Experiment
from gating_jax.reports import conclusion, gate_table, surroundings, tables, text
from gating_jax.reports import gates as gate_pictures
from gating_jax.training import evaluation, rundir, steps
from gating_jax.training.journal import HISTOGRAMS_FILE, METRICS_FILE, Journal, read_lines


@dataclasses.dataclass(frozen=True)
class Task:
  """Definition of a task: the use of labels in training, tests and reports.

  Attributes:
    prepare: `(experiment, key, uint8 pixels) -> network input`, augmented.
    scores: `(logits, labels) -> results` of each image, as in `steps.make_eval_step`.
    summarise: as in `evaluation.evaluate`, after the experiment.
    rows: the result as names and values, for people.
    noun: the name of an example.
    score: key of the score among the result's numbers, and its name.
    classes: number of classes of images, for the gates' information on them; None where an image
      has no class of its own.
    draw: `(experiment, state) -> {file name: (figure, caption)}`, further pictures.
  """

  prepare: Callable[[Experiment, jax.Array, jax.Array], jax.Array]
  scores: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  summarise: Callable[[Experiment, Mapping[str, Any], int], dict[str, float]]
  rows: Callable[[Mapping[str, Any]], list[tuple[str, str]]]
  noun: str = "image"
  score: tuple[str, str] = ("accuracy", "accuracy")
  classes: Callable[[Experiment], int | None] = lambda experiment: len(experiment.test.class_names)
  draw: Callable[[Experiment, steps.TrainState], Mapping[str, tuple[Any, str]]] = lambda *_: {}

  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    return tables.lines(self.rows(result), result.get("layers"))

  def title(self, experiment: Experiment) -> str:
    """Describes the model and the data set."""
    model = experiment.config.model
    gates = {"none": "without gates", "exits": "with early exits", "experts": "with experts"}
    return (
      f"{model.name} {gates.get(model.gating, f'with {model.gating} gates')} on "
      f"{experiment.config.data.name}"
    )


def conclude(
  task: Task, experiment: Experiment, path: Path, result: Mapping[str, Any], done: str
) -> str:
  """Returns the closing lines of a mode that tests the network.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    path: the run directory.
    result: the result of the test.
    done: the beginning of a sentence about the network.
  """
  rows = [task.rows(result)[0], *conclusion.gates(result), ("run directory:", str(path))]
  report = path / rundir.REPORT_FILE
  # The page is written when a run ends, or by --mode=report.
  if report.exists():
    rows.append(("page", f"{report}, for a browser"))
  modes = []
  # Only modes that work on this model are proposed.
  if not conclusion.refusal(compile.check, experiment.model) and compile.skips(experiment.model):
    modes = (
      ["compile", "export"] if experiment.config.experiment == "classification" else ["compile"]
    )
  return conclusion.text(
    f"{done} {task.title(experiment)}.", rows, conclusion.following(path, modes)
  )


def write_files(
  task: Task,
  experiment: Experiment,
  run_dir: rundir.RunDir,
  state: Any,
  journal: Journal,
  step: int,
  result: Mapping[str, Any],
  images: evaluation.ImageBehaviour,
  gates: evaluation.GateBehaviour | None,
) -> None:
  """Writes the pictures, a file of gates and the report of a run that has ended.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    run_dir: the run directory.
    state: the state after training.
    journal: receives the pictures.
    step: the last step.
    result, images, gates: results of the test, as of `evaluation.evaluate`.
  """
  drawn, names = task.draw(experiment, state), []
  for name, (figure, _) in drawn.items():
    text.save(figure, run_dir.path / name)
    names.append(name)
  if gates is not None:
    gate_pictures.draw(
      run_dir.path / "gates.png",
      gates.logits,
      gates.diagnosis.open_rates,
      experiment.objective.prior,
    )
    gate_table.write(run_dir.path / "gates.csv", gates.diagnosis, experiment.counts.gate_layers)
    names.append("gates.png")
  # TensorBoard shows the pictures too.
  for name in names:
    journal.write_picture(step, f"pictures/{Path(name).stem}", run_dir.path / name)
  write_report(task, experiment, run_dir, step, result, images, gates, drawn)


def _numbered(names: Sequence[str], line: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a line of `histograms.jsonl` with the number of each layer in place of its name.

  Figures use this form, and older runs have it.
  """
  renamed = {}
  for key, value in line.items():
    group, _, rest = key.partition("/")
    layer, _, measure = rest.rpartition("/")
    renamed[f"{group}/layer{names.index(layer):02d}/{measure}" if layer in names else key] = value
  return renamed


def write_report(
  task: Task,
  experiment: Experiment,
  run_dir: rundir.RunDir,
  step: int,
  result: Mapping[str, Any],
  images: evaluation.ImageBehaviour,
  gates: evaluation.GateBehaviour | None,
  drawn: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
  notice: str = "",
) -> None:
  """Writes `report.html` of the state of `step`.

  Args:
    task: the task of the run.
    experiment: the experiment of the run.
    run_dir: the run directory.
    step: the step of the state.
    result, images, gates: results of the test, as of `evaluation.evaluate`.
    drawn: the pictures of `task.draw`.
    notice: the first line of the page; empty for none.
  """
  config, counts, total = experiment.config, experiment.counts, experiment.settings.total_steps
  kind = surroundings.KINDS[config.experiment]
  # The journal may have later tests than this state, written after its checkpoint.
  before = lambda file: [
    line
    for line in read_lines(run_dir.path / file)
    if line["split"] == "test" and line["step"] < step
  ]
  histograms = evaluation.histograms(gates, counts.gate_layers) if gates is not None else {}
  # Names of modules are long, so figures number the layers.
  numbered = functools.partial(_numbered, [name for name, _ in counts.gate_layers])
  # The page shows a prior only where it acts on the gates.
  pulled = config.loss.regulariser == "batch_shaping" and config.loss.batch_shaping.coefficient > 0
  image_report.write(
    run_dir.report,
    image_report.ImageRun(
      title=f"{config.model.name} on {config.data.name}",
      subtitle=f"{run_dir.path.name}, step {step:,} of {total:,}, gates: {config.model.gating}",
      noun=task.noun,
      rows=task.rows(result),
      score=task.score,
      # This test comes last: outside training the journal does not have it.
      tests=[*before(METRICS_FILE), {"step": step, **result}],
      histograms=[*map(numbered, [*before(HISTOGRAMS_FILE), {"step": step, **histograms}])],
      macs=counts.macs,
      images=images,
      gates=gates,
      layers=counts.gate_layers,
      # The classes of pixels are no classes of scenes.
      class_names=experiment.test.class_names if task.classes(experiment) else None,
      prior=experiment.objective.prior if pulled else None,
      config=[(name, str(value)) for name, value in rundir.flatten(config).items()],
      read=lambda index: experiment.test.read(index)[0],
      pictures=list(drawn.values()),
      around=surroundings.read(
        run_dir,
        config,
        kind,
        step=step,
        not_compiled=conclusion.refusal(compile.check, experiment.model),
      ),
      how=kind.how,
      notice=notice,
    ),
  )
