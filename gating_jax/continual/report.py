"""Pictures, histograms and the page of a continual-learning run.

Axes: T tasks, N images of a task, U gated units of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gating_jax import programmes
from gating_jax.analysis import statistics
from gating_jax.continual import compile, metrics
from gating_jax.continual.build import ContinualExperiment
from gating_jax.continual.method import LearnerState
from gating_jax.continual.training import TaskPredictions
from gating_jax.data.image_sets import Images, padded_batches
from gating_jax.models.summary import layer_names
from gating_jax.reports import conclusion, frame, page, score_parts, tables, tasks
from gating_jax.reports import images as image_pictures
from gating_jax.reports import predictions as prediction_tables
from gating_jax.reports.text import format_percent, plain
from gating_jax.training import hosts, rundir
from gating_jax.training.journal import Journal

# Test images of each task that gates are shown for.
_LOOKED_AT = 400
# The largest numbers drawn.
_UNITS, _IMAGES, _TASKS = 6, 8, 6


def write_pictures(
  experiment: ContinualExperiment,
  learner: LearnerState,
  run_dir: rundir.RunDir,
  journal: Journal,
  step: int,
) -> None:
  """Writes the pictures of the result to files and to TensorBoard.

  Args:
    experiment: of the run.
    learner: after one task or more.
    run_dir: for the files.
    journal: for TensorBoard.
    step: of the learner.
  """
  # The captions are for the page.
  for name, (_, figure) in _pictures(experiment, learner).items():
    path = run_dir.path / f"{name}.png"
    page.save_figure(figure, path)
    journal.write_picture(step, f"pictures/{name}", path)


def list_predictions(
  experiment: ContinualExperiment, of_tasks: Sequence[TaskPredictions]
) -> prediction_tables.Predictions:
  """Returns the predictions for the test images of all tasks learnt, task by task."""
  names = experiment.tasks[0].train.class_names
  columns = {name: [] for name in ("image", "task", "class", "task known", "task unknown")}
  right = []
  for number, task in enumerate(of_tasks, start=1):
    file_names = experiment.tasks[number - 1].test.file_names
    columns["image"] += file_names or [str(image) for image in range(len(task.labels))]
    columns["task"] += [str(number)] * len(task.labels)
    columns["class"] += [names[c] for c in task.labels]
    columns["task known"] += [names[c] for c in task.known]
    columns["task unknown"] += [names[c] for c in task.chosen]
    right.append(np.asarray(task.chosen) == np.asarray(task.labels))
  terms = {
    "image": "its file, or its number among the test images of its task, from 0",
    "task": "the number of its task, from 1",
    "task known": "the likeliest class of the task's own",
    "task unknown": "the likeliest class of all tasks learnt, of which the last column speaks",
  }
  return prediction_tables.Predictions(columns, np.concatenate(right), terms)


def make_histograms(
  experiment: ContinualExperiment,
) -> Callable[[LearnerState, int], dict[str, np.ndarray]]:
  """Makes the histograms of a task's gates, on its first test images.

  Units that the task does not use have probability 0.

  Returns:
    `(learner, task) -> ` counts for `Journal.write_histograms`; empty for a method without gates
      per task.
  """
  task_net = experiment.method.task_net
  if task_net is None:
    return _no_histograms
  look = _make_look(experiment)
  image = jax.ShapeDtypeStruct((1, *experiment.problem.shape), np.float32)

  def records_of(learner, x):
    """Returns the records of the gates for images `[N, H, W, D]`."""
    # Layers have the same names for every task.
    net = task_net(learner, 0)
    return net.model.apply(net.variables, x)[1]

  def histograms(learner, task):
    """Returns the histogram counts of a task's gates, by name."""
    logits = look(learner, task).logits
    # Names need shapes alone.
    names = layer_names(jax.eval_shape(records_of, learner, image))
    # A gate is open in evaluation where its log-odds are positive.
    rates = [np.mean(of_layer > 0, axis=0) for of_layer in logits]
    return statistics.layer_histograms(names, logits, rates, group=f"gates/task{task + 1:02d}")

  return histograms


def _no_histograms(learner: LearnerState, task: int) -> dict[str, np.ndarray]:
  """Returns the histograms of a method without gates: none."""
  return {}


class _Look(NamedTuple):
  """Gates of a task on its first test images.

  Attributes:
    pixels: `[N, H, W, D]` uint8.
    logits: log-odds of the gates, `[N, units]` of each layer.
  """

  pixels: np.ndarray
  logits: list[np.ndarray]


def _make_look(experiment: ContinualExperiment) -> Callable[[LearnerState, int], _Look]:
  """Makes a function that looks at the gates of a task; one program serves all tasks.

  Returns:
    `(learner, task) -> _Look`.
  """
  task_net, problem = experiment.method.task_net, experiment.problem
  assert task_net is not None  # which has been checked

  @jax.jit
  def run(learner, pixels, task):
    """Returns the log-odds of a task's gates, `[N, units]` of each layer."""
    net = task_net(learner, task)
    # `task` is traced, so that one program serves all tasks.
    outputs: Any = net.model.apply(net.variables, problem.normalise(pixels))
    _, records = outputs
    # Log-odds, not gates: histograms and rankings need more than 0 and 1.
    return tuple(record.logits for record in records)

  def look(learner, task):
    """Returns a task's first test images `[N, H, W, D]` and the log-odds of its gates."""
    test = experiment.tasks[task].test
    pixels, labels = test.read(np.arange(min(_LOOKED_AT, len(test))))
    images = Images(pixels, labels, ())
    by_batch = []
    for (pixels, _), count in padded_batches(images, problem.batch_size):
      logits = run(learner, pixels, np.int32(task))
      # The last batch is padded: only its first `count` images are real.
      by_batch.append([np.asarray(of_layer)[:count] for of_layer in logits])
    by_layer = jax.tree.map(lambda *parts: np.concatenate(parts), *by_batch)
    return _Look(images.pixels, by_layer)

  return look


def write_report(
  experiment: ContinualExperiment,
  learner: LearnerState,
  run_dir: rundir.RunDir,
  step: int,
  *,
  notice: str = "",
  predictions: Sequence[TaskPredictions] | None = None,
) -> None:
  """Writes the page of a run.

  Every process of a job computes the contents, and one process writes.

  Args:
    experiment: of the run.
    learner: after one task or more.
    run_dir: of the run.
    step: of the learner.
    notice: first line of the page, such as that the run has failed.
    predictions: as in `metrics.collect_result`.
  """
  config = experiment.config
  result = metrics.collect_result(experiment, learner, predictions)
  around = frame.read_surroundings(
    run_dir,
    config,
    step=step,
    not_compiled=conclusion.refusal(compile.check_compilable, experiment),
  )
  pictures = {}
  for name, (caption, figure) in _pictures(experiment, learner).items():
    # Pictures grow with the number of tasks, and may be wider than the page.
    scrolls = figure.get_figwidth() > page.WIDTH
    pictures[name] = page.embed_figure(figure, caption, scrolls=scrolls, terms=_TERMS[name])
  # The picture at the top of the page.
  shown = "filters" if "filters" in pictures else "accuracies"
  learnt = int(learner.task) * experiment.problem.classes
  names = [name for name in experiment.tasks[0].train.class_names[:learnt] if name]
  sections = [
    _result_section(result),
    # With the task unknown: with it known, tasks are not confused.
    *score_parts.confusion_section(result["task_agnostic"], names, "image"),
  ]
  if predictions is not None:
    listed = list_predictions(experiment, predictions)
    sections.append(prediction_tables.make_section(listed, "image"))
  for name, picture in pictures.items():
    if name != shown:
      sections.append(page.Section(name.capitalize(), parts=[picture]))
  if experiment.method.task_net is not None:
    sections.append(_one_gate_across_tasks(experiment, learner))
  configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
  sections += [
    frame.run_times_section("image", around),
    frame.settings_section(configured),
    frame.about_section(around),
  ]
  begin = page.Opening(
    _numbers(result, around),
    pictures[shown],
    frame.why_no_baseline(around, programmes.PROGRAMMES[config.experiment].how),
    notice=notice,
  )
  # The contents need all processes, and are complete here.
  hosts.on_writer(
    lambda: page.write_page(
      run_dir.report,
      f"{config.method} on {config.data.name}, task by task",
      sections,
      subtitle=f"{run_dir.path.name}, step {step:,}, "
      f"{int(learner.task)} of {len(experiment.tasks)} tasks learnt",
      opening=begin,
    )
  )


def _result_section(result: Mapping[str, Any]) -> page.Section:
  """Returns the tables of the result, and why some numbers are not there."""
  parts = []
  for table in tables.task_tables(result):
    parts.append(page.Table(*table, terms=_COLUMNS + _measures(table)))
  parts.append(tables.defined_table(tables.task_rows(result)))
  reasons = " ".join(f"{reason}." for reason in tables.task_reasons(result))
  return page.Section("Result", reasons, parts)


_COLUMNS = (
  ("when learnt", "accuracy on the task's test images just after it was learnt, in %"),
  ("at the end", "the same after the last task learnt"),
)
_TASK = "classes that are learnt together; tasks are in the order of learning"
_TERMS = {
  "accuracies": (
    ("tested on task", "the task of the test images"),
    ("after learning task", "the last task that was learnt before this test"),
    (
      "accuracy",
      "fraction of the task's test images whose most likely class is the true one, in %",
    ),
  ),
  "filters": (
    ("task", _TASK),
    ("filters", "gated units of the layer"),
    ("reused from older tasks", "used by the task, owned by an older one"),
    (
      "new with this task",
      "first used by the task, which owns them: later tasks cannot change them",
    ),
    (
      "older tasks', not used",
      "not needed by the task: its gates for them are closed, and they are not computed",
    ),
    ("free", "available to later tasks"),
  ),
  "overlap": (
    ("task", _TASK),
    ("intersection over union", "units that both tasks use, in % of those that either uses"),
  ),
}


def _measures(table: tuple[list[str], list[list[str]]]) -> tuple[tuple[str, str], ...]:
  """Returns definitions of a table's first column, and of its rows that are no tasks."""
  (first, *_), rows = table
  knows = "knows" if first.startswith("task-aware") else "must infer"
  known = (first, f"on each task's test images, by a network that {knows} the task of an image")
  measures: list[tuple[str, str]] = [known]
  for name, *_ in rows:
    # Other rows are tasks, named by their classes.
    if name in tables.TASK_MEANINGS:
      measures.append((name, tables.TASK_MEANINGS[name]))
  return tuple(measures)


def _numbers(result: Mapping[str, Any], around: frame.Surroundings) -> list[page.Number]:
  """Returns the large numbers at the top, with the task known."""
  aware = result["task_aware"]["average_accuracy"]
  macs, dense = result["task_aware_macs"], result["dense_macs"]
  count = len(result["task_names"])
  agnostic = 100 * result["task_agnostic"]["average_accuracy"]
  score = frame.score_number(
    "accuracy, task known",
    aware,
    key="task_aware.average_accuracy",
    around=around,
    meaning="Fraction of test images classified correctly with the task known; mean over the "
    f"{count} tasks learnt. With the task unknown: {agnostic:.2f} %.",
  )
  return [
    score,
    frame.macs_number(macs / dense, executed=macs, dense=dense, noun="image", around=around),
    frame.run_time_number("image", around),
  ]


class _Picture(NamedTuple):
  """A figure and its caption."""

  caption: str
  figure: Any


def _pictures(experiment: ContinualExperiment, learner: LearnerState) -> dict[str, _Picture]:
  """Draws the pictures; returns them by name."""
  names, learnt, table = experiment.task_names, int(learner.task), learner.table
  pictures = {
    "accuracies": _Picture(
      "Accuracy on each task after each task was learnt, with the task known and unknown.",
      tasks.draw_accuracies(np.asarray(table.aware), np.asarray(table.agnostic), task_names=names),
    )
  }
  # Rows of later tasks use no unit yet.
  relevant, use = {}, {}
  for layer, units in experiment.method.footprint(learner).relevant.items():
    relevant[layer] = units[:learnt]
    use[layer] = metrics.filter_use(units[:learnt])
  if relevant:
    pictures["filters"] = _Picture(
      "Filters that each task reuses, takes, does not use and leaves free, layer by layer.",
      tasks.draw_filters(use, task_names=names[:learnt]),
    )
    pictures["overlap"] = _Picture(
      "Fraction of the units used by either of two tasks that both of them use.",
      tasks.draw_overlap(metrics.unit_overlap(relevant), task_names=names[:learnt]),
    )
  return pictures


def _one_gate_across_tasks(experiment: ContinualExperiment, learner: LearnerState) -> page.Section:
  """Shows filters that many tasks use, and the images of each task that open them most.

  Every task has its own gate for a filter.
  """
  learnt, look = int(learner.task), _make_look(experiment)
  looks = [look(learner, task) for task in range(learnt)]
  # The gates of all layers side by side, in one array per task.
  logits = [np.concatenate(of_task.logits, axis=1) for of_task in looks]
  layers, names = experiment.method.footprint(learner).relevant, []
  for layer, of_layer in zip(layers, looks[0].logits, strict=True):
    names += [f"{layer}, unit {i}" for i in range(of_layer.shape[1])]
  # `[T, U]`: how often each task opens each unit.
  rates = np.stack([np.mean(of_task > 0, axis=0) for of_task in logits])
  # A point for every task that uses the unit, and up to 1/4 more where its gate opens for half of
  # the images.
  score = np.sum(rates > 0.01, axis=0) + np.sum(rates * (1 - rates), axis=0)
  parts = []
  for unit in np.argsort(-score, kind="stable")[:_UNITS]:
    # The same bound as in the score: a gate that opens for 1 % or less has no images to show.
    users = np.flatnonzero(rates[:, unit] > 0.01)[:_TASKS]
    if not len(users):
      continue
    rows, labels = [], []
    for task in users:
      most_open = np.argsort(-logits[task][:, unit], kind="stable")[:_IMAGES]
      rows.append(looks[task].pixels[most_open])
      name = plain(experiment.task_names[task], 20)
      labels.append(f"{name}\nopen: {format_percent(float(rates[task, unit]), 0)}")
    parts.append(
      page.embed_figure(
        image_pictures.draw_image_rows(rows, labels), f"{plain(names[unit], 60)}.", photo=True
      )
    )
  return page.Section(
    "One gate across tasks",
    "Filters that most tasks use, but not for all images. Each task has its own gate for a "
    "filter. A row shows the task's test images that open the gate most, and the fraction of the "
    "task's test images for which it is open, in %.",
    parts,
  )
