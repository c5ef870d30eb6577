"""Run of a task sequence with any method, in a run directory.

Reference: Abati et al., 2020.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gating_jax.continual import compile, report, training
from gating_jax.continual.build import ContinualExperiment, build
from gating_jax.continual.method import LearnerState, TaskData
from gating_jax.data import batches, image_sets
from gating_jax.data.image_sets import Images
from gating_jax.reports import conclusion, failing, tables
from gating_jax.terminal import TRAINING, Pace, lasting, say, working
from gating_jax.training import closed_gates, devices, hosts, loop, rundir
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal

# The name of pretraining in messages: no other phase comes before the training on a task.
_PRETRAINING = "generator's training step"


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """Runs a mode of continual learning.

  `train` resumes from the newest checkpoint and learns all tasks; `evaluate` tests the newest
  checkpoint; `compile` times networks that skip closed gates; `report` writes the page.

  Args:
    config: of the experiment.
    workdir: run directory.
    mode: one of the four.
  """
  with working("opening the data", "minutes for large sets"):
    experiment = build(config)
  failing.run_mode(
    workdir,
    config,
    mode,
    render=functools.partial(_render_finished, experiment, workdir),
    train=functools.partial(_train, experiment),
    evaluate=functools.partial(_evaluate, experiment),
    report=functools.partial(_report, experiment),
    compile=functools.partial(_compile, experiment),
  )


def _evaluate(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> None:
  """Tests the newest checkpoint on all tasks that it has learnt."""
  step, learner = newest(experiment, run_dir)
  say(f"checkpoint of step {step}")
  done = f"Tested the checkpoint of step {step:,} of"
  # Within a task the parameters are those of the task being learnt: only the table has results.
  if step % experiment.steps_per_task:
    say(
      "a task is being learnt; the results are those of the earlier tasks, measured at the end of "
      "the last of them"
    )
  else:
    with working(
      f"testing on the images of {int(learner.task)} tasks",
      "programs are compiled first, up to a minute",
    ):
      learner = test_tasks(learner, make_evaluate(experiment), int(learner.task))
  result = report.summary(experiment, learner)
  say(tables.render_tasks(result))
  say(_conclude(experiment, run_dir.path, result, done))


def _report(experiment: ContinualExperiment, run_dir: rundir.RunDir, notice: str = "") -> None:
  """Writes the page of the newest checkpoint, with the tests that followed each task."""
  step, learner = newest(experiment, run_dir)
  with working("drawing the report", "up to a minute"):
    report.write(experiment, learner, run_dir, step, notice)
  result = report.summary(experiment, learner)
  say(f"report of the checkpoint of step {step}: {run_dir.report}")
  say(
    _conclude(
      experiment, run_dir.path, result, f"Wrote the page of the checkpoint of step {step:,} of"
    )
  )


def _compile(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> None:
  step, learner = newest(experiment, run_dir)
  hosts.on_writer(lambda: compile.run(experiment, run_dir, step, learner))


def _render_finished(experiment: ContinualExperiment, path: Path, result: Mapping[str, Any]) -> str:
  return (
    f"{tables.render_tasks(result)}\n{_conclude(experiment, path, result, 'A finished run of')}"
  )


def _conclude(
  experiment: ContinualExperiment, path: Path, result: Mapping[str, Any], done: str
) -> str:
  """Returns the last message of a mode that tests the learner."""
  config, learnt = experiment.config, len(result["task_names"])
  rows = []
  for name, words in (("task_aware", "task known"), ("task_agnostic", "task unknown")):
    if name in result:
      forgotten, accuracy = result[name]["forgetting"], result[name]["average_accuracy"]
      rows.append(
        (
          f"accuracy, {words}",
          f"{100 * accuracy:.2f} %, mean of {learnt} tasks"
          + ("" if forgotten is None else f"; forgetting: {100 * forgotten:z.2f} points"),
        )
      )
  macs, dense = result["task_aware_macs"], result["dense_macs"]
  rows.append(
    (
      "MACs per image, task known",
      f"{macs:,.0f}, {100 * macs / dense:.1f} % of the net without gates",
    )
  )
  rows.append(("run directory:", str(path)))
  if (path / rundir.REPORT_FILE).exists():
    rows.append(("page", f"{path / rundir.REPORT_FILE}, for a browser"))
  modes = [] if conclusion.refusal(compile.check, experiment) else ["compile"]
  of = f"{config.method} on {config.data.name}, {learnt} of {len(experiment.tasks)} tasks"
  return conclusion.text(f"{done} {of}.", rows, conclusion.following(path, modes))


def newest(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> tuple[int, LearnerState]:
  """Restores the newest checkpoint.

  Args:
    experiment: of the run.
    run_dir: with the checkpoints.
  Returns:
    its step and learner.
  Raises:
    RunDirError: no task is learnt yet.
  """
  with working("loading the newest checkpoint"):
    # Another process may be training in this directory.
    checkpoints = Checkpoints(run_dir.checkpoints, read_only=True)
    try:
      step, learner = _restore(experiment, checkpoints)
    finally:
      checkpoints.close()
  if not int(learner.task):
    raise rundir.RunDirError(f"no task has been learnt in {run_dir.checkpoints} yet")
  return step, learner


def _train(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> None:
  started, total = time.monotonic(), experiment.total_steps
  rundir.write_outlines(run_dir.path, [task.train for task in experiment.tasks])
  with working("making the network", "up to half a minute"):
    checkpoints = Checkpoints(run_dir.checkpoints)
    step, learner = _restore(experiment, checkpoints)
  if step:
    say(f"resuming from the checkpoint of step {step} in {run_dir.path}")
  journal, watch = Journal(run_dir.path, step, total), closed_gates.watch_tasks()
  advance, end_stage = make_advance(experiment), _make_end_stage(experiment, journal)
  pace = Pace(
    journal.say, total, lambda step: {_PRETRAINING: _pretrain_steps_left(experiment, step)}
  )
  config, tell = experiment.config, lambda text: journal.say(step, text)
  journal.say(step, f"{config.method} on {config.data.name}, {len(experiment.tasks)} tasks")
  try:
    # A resumed run has learnt some tasks already.
    for task in (t for t in experiment.stages if t >= int(learner.task)):
      # Fails before the training of a task that cannot be learnt.
      experiment.method.check_capacity(learner)
      run, first = advance(task), experiment.first_step(task) + experiment.pretrain_steps
      for phase in experiment.phases(task):
        program = TRAINING if phase.total_steps > first else _PRETRAINING
        if step < phase.total_steps:
          learner, step = loop.train(
            learner,
            step,
            pace(run, program),
            settings=phase,
            checkpoints=checkpoints,
            journal=journal,
            watch=watch,
          )
        if step < phase.total_steps:
          journal.say(
            step, "stopped as asked; a checkpoint is saved, run the same command to resume"
          )
          return
      # The loop has ended at the last training step; the step that ends the stage is made here.
      learner, step = end_stage(learner, task, step)
      checkpoints.save(step, learner)
    with working("drawing pictures", "up to a minute", tell):
      hosts.on_writer(lambda: report.draw(experiment, learner, run_dir, journal, step))
  finally:
    journal.close()
    checkpoints.close()
  with working("writing the report", "up to a minute"):
    result = report.summary(experiment, learner)
    report.write(experiment, learner, run_dir, step)
  result |= {"step": step, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  run_dir.finish(result)
  say(tables.render_tasks(result))
  say(
    _conclude(
      experiment, run_dir.path, result, f"Trained for {lasting(time.monotonic() - started)}:"
    )
  )


def _pretrain_steps_left(experiment: ContinualExperiment, step: int) -> int:
  """Counts the pretraining steps of all stages from this step on."""
  ended, within = divmod(step, experiment.steps_per_task)
  return experiment.pretrain_steps * (len(experiment.stages) - ended) - min(
    within, experiment.pretrain_steps
  )


def _make_end_stage(
  experiment: ContinualExperiment, journal: Journal
) -> Callable[[LearnerState, int, int], tuple[LearnerState, int]]:
  """Makes the last step of a stage, which ends its task and tests all tasks so far.

  Returns:
    `(learner, task, step) -> (learner, step)`.
  """
  evaluate, histograms = make_evaluate(experiment), report.make_histograms(experiment)

  def end_stage(learner, task, step):
    """Ends the stage, logs its results, and returns the learner and the next step."""
    with working(
      f"ending task {task + 1} of {len(experiment.tasks)} and testing on all tasks so far",
      "up to a minute",
      functools.partial(journal.say, step),
    ):
      learner = finish_task(experiment, learner, task, evaluate)
      # The gates of all tasks change at once where tasks are learnt together.
      ended = range(task + 1) if experiment.method.simultaneous else [task]
      counts = {name: values for t in ended for name, values in histograms(learner, t).items()}
      free = report.free_units(experiment.method.footprint(learner), task + 1)
    step += 1
    found = report.scores(learner)
    journal.write(
      step,
      "test",
      found | {f"free_units/{layer}": float(count) for layer, (count, _) in free.items()},
    )
    journal.write_histograms(step, "test", counts)
    aware, agnostic = (found[f"task_{name}.average_accuracy"] for name in ("aware", "agnostic"))
    journal.say(
      step,
      f"after task {task + 1}: accuracy {100 * aware:.2f} % with the task known, "
      f"{100 * agnostic:.2f} % without"
      + "".join(
        f"\n  free units, {layer}: {count} of {units}" for layer, (count, units) in free.items()
      ),
    )
    return learner, step

  return end_stage


def _restore(experiment: ContinualExperiment, checkpoints: Checkpoints) -> tuple[int, LearnerState]:
  """Returns the newest checkpoint's step and learner, or 0 and a fresh learner."""
  fresh = experiment.fresh()
  return checkpoints.restore(fresh, devices.replicated_sharding()) or (0, devices.replicate(fresh))


def make_advance(
  experiment: ContinualExperiment,
) -> Callable[[int], Callable[[LearnerState, int], tuple[LearnerState, Any]]]:
  """Makes the training steps of each stage, on all devices.

  Returns:
    `task -> (learner, step) -> (learner, metrics)`, for the stage that ends with this task.
  """
  config = experiment.config
  step = training.make_step(
    experiment.method,
    experiment.optimiser,
    experiment.problem.prepare,
    seed=config.seed,
    steps_per_epoch=experiment.steps_per_epoch,
    axis_name=devices.AXIS,
  )
  # Mapped once, not for each task: one program serves all of them.
  run = devices.map_over_devices(
    step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )

  pretrain_step = experiment.method.pretrain_step and devices.map_over_devices(
    experiment.method.pretrain_step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )

  def of_task(task):
    """Makes the steps of the stage that ends with this task."""
    sets, begin = training_sets(experiment, task), experiment.first_step(task)
    # The stage begins with the pretraining; schedules count from the first step of the training.
    first = begin + experiment.pretrain_steps
    # Every task has a number of its own below T, so that no two runs or tasks share an order.
    seed, process = config.seed * len(experiment.tasks), (jax.process_index(), jax.process_count())

    def batch(at, size):
      """Reads this process's part of a batch: pixels `[B, H, W, D]` and labels `[B]`."""
      read = lambda number, images: images.read(
        batches.indices(seed + number, at, 1, size, len(images), process)[:, 0]
      )
      return tuple(
        # `Method.simultaneous`: task t at positions t, T + t, 2 T + t, ...
        map(
          image_sets.interleave, zip(*(read(*numbered) for numbered in sets.items()), strict=True)
        )
      )

    def advance(learner, step):
      """Takes one step, of the pretraining or of the training."""
      if step < first:
        learner, metrics = pretrain_step(
          learner, *batch(step - begin, experiment.pretrain_batch_size)
        )
      else:
        learner, metrics = run(
          learner, *batch(step - first, config.optim.batch_size), np.int32(first)
        )
      return learner, {name: value[None] for name, value in metrics.items()}

    return advance

  return of_task


def training_sets(experiment: ContinualExperiment, task: int) -> dict[int, Images]:
  """Returns the training sets of the stage that ends with this task.

  Args:
    experiment: of the run.
    task: the last task of the stage.
  Returns:
    sets by number; every batch has the same number of images of each.
  """
  first = 0 if experiment.method.cumulative or experiment.method.simultaneous else task
  sets = [t.train for t in experiment.tasks[first : task + 1]]
  return dict(enumerate(sets)) if experiment.method.simultaneous else {task: image_sets.join(sets)}


def finish_task(
  experiment: ContinualExperiment, learner: LearnerState, task: int, evaluate: Callable
) -> LearnerState:
  """Ends a stage: ends its task, tests all tasks so far and prepares for the next one.

  Args:
    experiment: of the run.
    learner: at the end of the stage's training.
    task: the last task of the stage.
    evaluate: as of `make_evaluate`.
  Returns:
    the learner with which the next stage begins.
  """
  ended = experiment.tasks if experiment.method.simultaneous else experiment.tasks[task : task + 1]
  data = TaskData(
    *(
      array
      for part in ("train", "validation")
      for array in image_sets.join([getattr(t, part) for t in ended]).read(slice(None))
    )
  )
  learner = experiment.method.end_task(learner, data, experiment.key(task + 1))
  learner = learner.replace(
    step=learner.step + 1,
    task=jnp.full_like(learner.task, task + 1),
    opt_state=experiment.optimiser.init(learner.params),
  )
  # The step donates its buffers: arrays that a method keeps twice need one each.
  learner = jax.tree.map(jnp.copy, learner)
  return test_tasks(devices.replicate(learner), evaluate, task + 1)


def test_tasks(learner: LearnerState, evaluate: Callable, learnt: int) -> LearnerState:
  """Tests all tasks learnt, and fills the table's row of the last one.

  Args:
    learner: that has learnt the tasks.
    evaluate: as of `make_evaluate`.
    learnt: number of tasks learnt.
  Returns:
    the learner with the new table.
  """
  rows = [evaluate(learner, task, learnt) for task in range(learnt)]
  table = learner.table._make(
    np.asarray(
      column.at[learnt - 1, :learnt].set(np.asarray([row[name] for row in rows], np.float32))
    )
    for name, column in learner.table._asdict().items()
  )
  return learner.replace(table=devices.replicate(table))


def make_evaluate(
  experiment: ContinualExperiment,
) -> Callable[[LearnerState, int, int], dict[str, float]]:
  """Makes the test of one task.

  Returns:
    `(learner, task, seen) -> ` the entries of the table for the test images of `task`.
  """
  config, method, problem = experiment.config, experiment.method, experiment.problem

  # Shapes depend on the number of tasks seen: each has its own program, and only the newest is
  # needed.
  @functools.lru_cache(maxsize=1)
  def mapped(seen):
    """Makes the test of one batch after so many tasks, on all devices."""

    def test(learner, pixels, labels, task):
      """Tests `[B, H, W, D]` pixels with `[B]` labels; each result is `[B]`."""
      p = method.predict(learner, problem.normalise(pixels), task, seen)
      chosen = jnp.argmax(p.agnostic, axis=-1)
      return {
        "aware": jnp.argmax(p.aware, axis=-1) == labels - task * problem.classes,
        "agnostic": chosen == labels,
        # Classes are numbered task by task.
        "task": chosen // problem.classes == task,
        "macs": p.macs,
        "agnostic_macs": p.agnostic_macs,
      }

    return devices.map_over_devices(
      test,
      args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
      results=devices.BATCH,
      backend=config.devices.backend,
    )

  def evaluate(learner, task, seen):
    """Returns the mean results on the test images of `task`."""
    run, parts = mapped(seen), []
    for batch, count in batches.padded_batches(experiment.tasks[task].test, problem.batch_size):
      results = hosts.allgather(run(learner, *hosts.local_shard(batch), np.int32(task)))
      # The last batch is padded: only its first `count` images are new.
      parts.append({name: np.asarray(x)[:count] for name, x in results.items()})
    return {
      # float64: a float32 mean of MACs loses digits.
      name: float(np.concatenate([p[name] for p in parts]).mean(dtype=np.float64))
      for name in parts[0]
    }

  return evaluate
