"""Learns a sequence of tasks by any method, in a run directory.

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
from gating_jax.continual.method import Learner, TaskData
from gating_jax.data import batches, tasks
from gating_jax.data import images as in_memory
from gating_jax.data.tfds import Images
from gating_jax.progress import TRAINING, Pace, lasting, say, working
from gating_jax.reports import conclusion, failing, task_table
from gating_jax.training import devices, gate_watch, hosts, loop, outlines, rundir
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal

_PRELUDE = "generator's training step"  # as people are told of it: nothing else comes before the training on a task


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """`train` learns all tasks from wherever the run directory stands; `evaluate` tests its newest checkpoint, and
  `compile` times what skips closed gates."""
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
  """Tests what the newest checkpoint holds on all tasks it has learnt."""
  step, learner = newest(experiment, run_dir)
  say(f"checkpoint of step {step}")
  done = f"Tested the checkpoint of step {step:,} of"
  if step % experiment.steps_per_task:
    say(
      "a task is being learnt; the results are those of the tasks before it, when the last of them ended"
    )
  else:
    with working(
      f"testing on the images of {int(learner.task)} tasks",
      "programs are compiled first, up to a minute",
    ):
      learner = test_tasks(learner, make_evaluate(experiment), int(learner.task))
  result = report.summary(experiment, learner)
  say(task_table.render(result))
  say(_conclude(experiment, run_dir.path, result, done))


def _report(experiment: ContinualExperiment, run_dir: rundir.RunDir, notice: str = "") -> None:
  """Writes the page of what the newest checkpoint holds, with the tests that followed each task."""
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
  hosts.written(lambda: compile.run(experiment, run_dir, step, learner))


def _render_finished(experiment: ContinualExperiment, path: Path, result: Mapping[str, Any]) -> str:
  return f"{task_table.render(result)}\n{_conclude(experiment, path, result, 'A finished run of')}"


def _conclude(
  experiment: ContinualExperiment, path: Path, result: Mapping[str, Any], done: str
) -> str:
  """What a mode that tests the learner ends with."""
  config, learnt = experiment.config, len(result["task_names"])
  rows = []
  for name, words in (("task_aware", "task known"), ("task_agnostic", "task unknown")):
    if name in result:
      forgotten, accuracy = result[name]["forgetting"], result[name]["average_accuracy"]
      rows.append(
        (
          f"accuracy, {words}",
          f"{100 * accuracy:.2f} %, mean of {learnt} tasks"
          + ("" if forgotten is None else f"; forgotten: {100 * forgotten:z.2f} points"),
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


def newest(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> tuple[int, Learner]:
  """The newest checkpoint's step and learner. Raises RunDirError where no task is learnt yet."""
  with working("loading the newest checkpoint"):
    checkpoints = Checkpoints(run_dir.checkpoints, read_only=True)
    try:
      step, learner = _restore(experiment, checkpoints)
    finally:
      checkpoints.close()
  if not int(learner.task):
    raise rundir.RunDirError(f"no task is learnt in {run_dir.checkpoints} yet")
  return step, learner


def _train(experiment: ContinualExperiment, run_dir: rundir.RunDir) -> None:
  started, total = time.monotonic(), experiment.total_steps
  outlines.write(run_dir.path, [task.train for task in experiment.tasks])
  with working("making the network", "up to half a minute"):
    checkpoints = Checkpoints(run_dir.checkpoints)
    step, learner = _restore(experiment, checkpoints)
  if step:
    say(f"going on from the checkpoint of step {step} in {run_dir.path}")
  journal, watch = Journal(run_dir.path, step, total), gate_watch.of_tasks()
  advance, end_stage = make_advance(experiment), _make_end_stage(experiment, journal)
  pace = Pace(journal.say, total, lambda step: {_PRELUDE: _prelude_steps_left(experiment, step)})
  config, tell = experiment.config, lambda text: journal.say(step, text)
  journal.say(step, f"{config.method} on {config.data.name}, {len(experiment.tasks)} tasks")
  try:
    for task in (t for t in experiment.stages if t >= int(learner.task)):
      experiment.method.check_room(learner)
      run, first = advance(task), experiment.first_step(task) + experiment.prelude_steps
      for phase in experiment.phases(task):
        program = TRAINING if phase.total_steps > first else _PRELUDE
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
            step, "stopped as asked; a checkpoint is saved, the same command goes on from here"
          )
          return
      learner, step = end_stage(learner, task, step)
      checkpoints.save(step, learner)
    with working("drawing pictures", "up to a minute", tell):
      hosts.written(lambda: report.draw(experiment, learner, run_dir, journal, step))
  finally:
    journal.close()
    checkpoints.close()
  with working("writing the report", "up to a minute"):
    result = report.summary(experiment, learner)
    report.write(experiment, learner, run_dir, step)
  result |= {"step": step, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  run_dir.finish(result)
  say(task_table.render(result))
  say(
    _conclude(
      experiment, run_dir.path, result, f"Trained for {lasting(time.monotonic() - started)}:"
    )
  )


def _prelude_steps_left(experiment: ContinualExperiment, step: int) -> int:
  """Of the preludes of all stages, the steps from this one on."""
  ended, within = divmod(step, experiment.steps_per_task)
  return experiment.prelude_steps * (len(experiment.stages) - ended) - min(
    within, experiment.prelude_steps
  )


def _make_end_stage(
  experiment: ContinualExperiment, journal: Journal
) -> Callable[[Learner, int, int], tuple[Learner, int]]:
  """`(learner, task, step) -> (learner, step)`: the last step of the stage that ends with a task, and its test."""
  evaluate, histograms = make_evaluate(experiment), report.make_histograms(experiment)

  def end_stage(learner, task, step):
    with working(
      f"ending task {task + 1} of {len(experiment.tasks)} and testing on all tasks so far",
      "up to a minute",
      functools.partial(journal.say, step),
    ):
      learner = finish_task(experiment, learner, task, evaluate)
      ended = range(task + 1) if experiment.method.together else [task]
      counts = {name: values for t in ended for name, values in histograms(learner, t).items()}
      free = report.free_units(experiment.method.holdings(learner), task + 1)
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


def _restore(experiment: ContinualExperiment, checkpoints: Checkpoints) -> tuple[int, Learner]:
  """The newest checkpoint's step and learner, or step 0 and a fresh one."""
  fresh = experiment.fresh()
  return checkpoints.restore(fresh, devices.replicated_sharding()) or (0, devices.replicate(fresh))


def make_advance(
  experiment: ContinualExperiment,
) -> Callable[[int], Callable[[Learner, int], tuple[Learner, Any]]]:
  """`task -> (learner, step) -> (learner, metrics)`: one step of the stage that ends with that task, on all devices."""
  config = experiment.config
  step = training.make_step(
    experiment.method,
    experiment.optimiser,
    experiment.problem.prepare,
    seed=config.seed,
    steps_per_epoch=experiment.steps_per_epoch,
    axis_name=devices.AXIS,
  )
  run = devices.map_over_devices(
    step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )

  prelude = experiment.method.prelude and devices.map_over_devices(
    experiment.method.prelude,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )

  def of_task(task):
    sets, begin = training_sets(experiment, task), experiment.first_step(task)
    first = begin + experiment.prelude_steps
    seed, process = config.seed * len(experiment.tasks), (jax.process_index(), jax.process_count())

    def batch(at, size):
      read = lambda number, images: images.read(
        in_memory.indices(seed + number, at, 1, size, len(images), process)[:, 0]
      )
      return tuple(
        map(tasks.interleave, zip(*(read(*numbered) for numbered in sets.items()), strict=True))
      )

    def advance(learner, step):
      if step < first:
        learner, metrics = prelude(learner, *batch(step - begin, experiment.prelude_batch_size))
      else:
        learner, metrics = run(
          learner, *batch(step - first, config.optim.batch_size), np.int32(first)
        )
      return learner, {name: value[None] for name, value in metrics.items()}

    return advance

  return of_task


def training_sets(experiment: ContinualExperiment, task: int) -> dict[int, Images]:
  """What the method trains on in the stage that ends with this task, by number; batches are as much of each."""
  first = 0 if experiment.method.cumulative or experiment.method.together else task
  sets = [t.train for t in experiment.tasks[first : task + 1]]
  return dict(enumerate(sets)) if experiment.method.together else {task: tasks.join(sets)}


def finish_task(
  experiment: ContinualExperiment, learner: Learner, task: int, evaluate: Callable
) -> Learner:
  """Ends the stage that ends with this task, tests it and all before it, and makes ready for the next."""
  ended = experiment.tasks if experiment.method.together else experiment.tasks[task : task + 1]
  data = TaskData(
    *(
      array
      for part in ("train", "validation")
      for array in tasks.join([getattr(t, part) for t in ended]).read(slice(None))
    )
  )
  learner = experiment.method.end_task(learner, data, experiment.key(task + 1))
  learner = learner.replace(
    step=learner.step + 1,
    task=jnp.full_like(learner.task, task + 1),
    opt_state=experiment.optimiser.init(learner.params),
  )
  learner = jax.tree.map(
    jnp.copy, learner
  )  # what a method keeps twice needs a buffer each, to be donated
  return test_tasks(devices.replicate(learner), evaluate, task + 1)


def test_tasks(learner: Learner, evaluate: Callable, learnt: int) -> Learner:
  """The learner with the row of its table that follows the last task learnt."""
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
) -> Callable[[Learner, int, int], dict[str, float]]:
  """`(learner, task, seen) -> ` the entries of the table for the test images of `task`."""
  config, method, problem = experiment.config, experiment.method, experiment.problem

  @functools.lru_cache(maxsize=1)  # every further task is another program
  def mapped(seen):
    def test(learner, pixels, labels, task):
      p = method.predict(learner, problem.normalise(pixels), task, seen)
      chosen = jnp.argmax(p.agnostic, axis=-1)
      return {
        "aware": jnp.argmax(p.aware, axis=-1) == labels - task * problem.classes,
        "agnostic": chosen == labels,
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
    run, parts = mapped(seen), []
    for batch, count in batches.cover(experiment.tasks[task].test, problem.batch_size):
      results = hosts.whole(run(learner, *hosts.share(batch), np.int32(task)))
      parts.append({name: np.asarray(x)[:count] for name, x in results.items()})
    return {
      name: float(np.concatenate([p[name] for p in parts]).mean(dtype=np.float64))
      for name in parts[0]
    }

  return evaluate
