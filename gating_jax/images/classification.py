"""Training and tests of gated image classifiers in a run directory.

Other tasks on labelled images, such as segmentation, run by the same functions.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from gating_jax.analysis import outcomes
from gating_jax.data import augment, streaming
from gating_jax.data import images as in_memory
from gating_jax.images import compile, export, pretrained
from gating_jax.images.build import Experiment, build
from gating_jax.images.task import Task, conclude, write_files, write_report
from gating_jax.progress import Pace, lasting, say, working
from gating_jax.reports import failing, tables
from gating_jax.training import (
  devices,
  evaluation,
  gate_watch,
  hosts,
  loop,
  outlines,
  rundir,
  steps,
)
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal
from gating_jax.training.steps import map_steps

# Folded into the key, so that cutting out does not repeat the random numbers of crops.
_CUT_OUT = 1


def _augment(experiment: Experiment, key: jax.Array, pixels: jax.Array) -> jax.Array:
  data = experiment.config.data
  pixels = augment.crop_and_flip(key, pixels, pad=data.pad, flip=data.flip, axis_name=devices.AXIS)
  return augment.cut_out(
    jax.random.fold_in(key, _CUT_OUT),
    experiment.normalise(pixels),
    size=data.cutout,
    axis_name=devices.AXIS,
  )


# The task of a classifier; segmentation replaces most of its fields.
TASK = Task(
  prepare=_augment,
  scores=steps.image_scores,
  summarise=lambda _, sums, images: evaluation.summarise(sums, images),
  rows=tables.rows,
)


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """Runs a mode for a classifier in a run directory.

  `train` trains to the end from wherever the run directory stands; `evaluate` tests its newest
  checkpoint, `report` writes a page of it, `export` writes it as files that run without this
  package, and `compile` times programs that skip its closed gates.

  Args:
    config: the config of the run.
    workdir: the run directory.
    mode: one of these modes.
  """
  with working("opening the data", "minutes for large sets"):
    experiment = build(config)
  if mode == "train" and config.model.init_from is not None:
    pretrained.check(config)
  run_task(TASK, experiment, workdir, mode, export=export.run, compile=compile.run)


def run_task(
  task: Task, experiment: Experiment, workdir: Path, mode: str, **of_newest: Callable[..., None]
) -> None:
  """Runs a mode for any task.

  Args:
    task: the task of the experiment.
    experiment: the experiment to run.
    workdir: the run directory.
    mode: `train`, `evaluate`, `report` or a name in `of_newest`.
    of_newest: further modes, functions of `(experiment, run_dir, step, variables)` that write
      something of the newest checkpoint.
  """
  failing.run_mode(
    workdir,
    experiment.config,
    mode,
    render=functools.partial(_render_finished, task, experiment, workdir),
    train=functools.partial(_train, task, experiment),
    evaluate=functools.partial(_evaluate, task, experiment),
    report=functools.partial(_report, task, experiment),
    **{name: functools.partial(_make, make, experiment) for name, make in of_newest.items()},
  )


def _render_finished(
  task: Task, experiment: Experiment, path: Path, result: Mapping[str, Any]
) -> str:
  return f"{task.render(result)}\n{conclude(task, experiment, path, result, 'A finished run of')}"


def _make(make: Callable[..., None], experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, state = newest(experiment, run_dir)
  # Without the optimiser's state, which only training needs.
  variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
  hosts.on_writer(lambda: make(experiment, run_dir, step, variables))


def _evaluate(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, _, result, *_ = _test_newest(task, experiment, run_dir)
  say(f"checkpoint of step {step}")
  say(task.render(result))
  say(
    conclude(task, experiment, run_dir.path, result, f"Tested the checkpoint of step {step:,} of")
  )


def _report(task: Task, experiment: Experiment, run_dir: rundir.RunDir, notice: str = "") -> None:
  step, state, *tested = _test_newest(task, experiment, run_dir)
  with working("drawing the report", "about half a minute"):
    # Only the writer draws: the others would compute pictures that nobody sees.
    drawn = task.draw(experiment, state) if hosts.is_writer() else {}
    hosts.on_writer(lambda: write_report(task, experiment, run_dir, step, *tested, drawn, notice))
  say(f"report of the checkpoint of step {step}: {run_dir.report}")
  say(
    conclude(
      task,
      experiment,
      run_dir.path,
      tested[0],
      f"Wrote the page of the checkpoint of step {step:,} of",
    )
  )


def _test_newest(
  task: Task, experiment: Experiment, run_dir: rundir.RunDir
) -> tuple[int, Any, dict[str, Any], evaluation.ImageBehaviour, evaluation.GateBehaviour | None]:
  """Tests the newest checkpoint; returns its step and state, and the results of `make_test`."""
  step, state = newest(experiment, run_dir)
  with working(
    f"testing on {len(experiment.test):,} {task.noun}s",
    "the program is compiled first, up to a minute",
  ):
    result, images, gates = make_test(experiment, task)(state)
  if gates is not None:
    result["layers"] = outcomes.by_layer(gates.diagnosis, experiment.counts.gate_layers)
  return step, state, result, images, gates


def newest(experiment: Experiment, run_dir: rundir.RunDir) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and state. Raises RunDirError where there is none."""
  with working("loading the newest checkpoint"):
    # The run may be training, so nothing in it is changed.
    checkpoints = Checkpoints(run_dir.checkpoints, read_only=True)
    try:
      step, state = _restore(experiment, checkpoints)
    finally:
      checkpoints.close()
  if not step:
    raise rundir.RunDirError(f"no checkpoint in {run_dir.checkpoints} yet")
  return step, state


def _train(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  started, total = time.monotonic(), experiment.settings.total_steps
  with working(
    "opening the data and making the network", "up to half a minute, more for large sets"
  ):
    train = experiment.open_train()
    # Kept in the run directory, so that the model can be loaded without its data.
    outlines.write(run_dir.path, [train, experiment.test])
    checkpoints = Checkpoints(run_dir.checkpoints)
    first_step, state = _restore(experiment, checkpoints)
  # A resumed run has its own parameters; only a fresh one starts from those of another.
  if first_step:
    say(f"resuming from the checkpoint of step {first_step} in {run_dir.path}")
  elif experiment.config.model.init_from is not None:
    state = pretrained.start(experiment, state)
  journal = Journal(run_dir.path, first_step, total)
  test = make_test(experiment, task)
  layers, pace = experiment.counts.gate_layers, Pace(journal.say, total)
  journal.say(
    first_step, f"{task.title(experiment)}, tested on {len(experiment.test):,} {task.noun}s"
  )

  def evaluate(state, step):
    """Tests a state; writes the result to the journal and prints its score."""
    with working(
      f"testing on {len(experiment.test):,} {task.noun}s", tell=functools.partial(journal.say, step)
    ):
      result, images, gates = test(state)
    journal.write(step, "test", result)
    if gates is not None:
      journal.write_histograms(step, "test", evaluation.histograms(gates, layers))
    journal.say(step, f"test {task.score[1]} {100 * result[task.score[0]]:.2f} %")
    return result, images, gates

  try:
    advance = pace(make_advance(experiment, train, first_step, task))
    state, step = loop.train(
      state,
      first_step,
      advance,
      settings=experiment.settings,
      checkpoints=checkpoints,
      journal=journal,
      evaluate=evaluate,
      watch=gate_watch.of_images(experiment.config),
    )
    if step < total:
      journal.say(step, "stopped as asked; a checkpoint is saved, run the same command to resume")
      return
    result, images, gates = evaluate(state, step)
    if gates is not None:
      result |= {
        "batch_shaping_reduction": experiment.objective.reduction,
        "layers": outcomes.by_layer(gates.diagnosis, layers),
      }
    with working("drawing the report", "about half a minute", functools.partial(journal.say, step)):
      hosts.on_writer(
        lambda: write_files(task, experiment, run_dir, state, journal, step, result, images, gates)
      )
  finally:
    journal.close()
    checkpoints.close()
  result |= {"step": step, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  # The result marks the run as finished, so it is written after all other files.
  run_dir.finish(result)
  say(task.render(result))
  say(
    conclude(
      task, experiment, run_dir.path, result, f"Trained for {lasting(time.monotonic() - started)}:"
    )
  )


def _restore(experiment: Experiment, checkpoints: Checkpoints) -> tuple[int, Any]:
  """Returns the newest checkpoint's step and state, or step 0 and a fresh state."""
  state = steps.init_state(
    experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape
  )
  # The fresh state also gives a checkpoint its structure and shapes.
  return checkpoints.restore(state, devices.replicated_sharding()) or (0, devices.replicate(state))


def make_advance(
  experiment: Experiment, train: Any, first_step: int, task: Task = TASK
) -> Callable[[Any, int], tuple[Any, Any]]:
  """Returns `(state, step) -> (state, metrics)` over all devices, fed by the config's loader.

  Args:
    experiment: the experiment to train.
    train: its training set.
    first_step: the step from which training continues.
    task: the task of the experiment.
  Returns:
    a function that takes `steps_per_dispatch` steps; metrics are `[steps_per_dispatch]`.
  """
  config = experiment.config
  k, batch = config.devices.steps_per_dispatch, config.optim.batch_size
  process = (jax.process_index(), jax.process_count())
  make_step = lambda model: steps.make_train_step(
    model,
    experiment.optimiser,
    experiment.objective,
    functools.partial(task.prepare, experiment),
    seed=config.seed,
    axis_name=devices.AXIS,
    noise_scale=experiment.noise_scale,
  )
  mapped = lambda several, args: map_steps(
    lambda model: several(make_step(model)),
    experiment.model,
    experiment.full,
    args=args,
    backend=config.devices.backend,
  )
  if isinstance(train, streaming.Stream):
    # The stream begins at `first_step`, so that a resumed run sees the batches it would have seen.
    stream = train.batches(batch, first_step, k, experiment.settings.total_steps, process)
    run = mapped(steps.streamed_steps, (devices.REPLICATED, devices.BATCH))
    return lambda state, _: run(state, next(stream))
  # A small set is copied to every device once; a call sends indices alone.
  images = devices.replicate((train.pixels, train.labels))
  run = mapped(steps.resident_steps, (devices.REPLICATED, devices.REPLICATED, devices.BATCH))
  return lambda state, at: run(
    state, images, in_memory.indices(config.seed, at, k, batch, len(train), process)
  )


def make_test(
  experiment: Experiment, task: Task = TASK
) -> Callable[
  [Any], tuple[dict[str, Any], evaluation.ImageBehaviour, evaluation.GateBehaviour | None]
]:
  """Returns a test, `state -> evaluation.evaluate` on every test image once.

  The result includes the budget where there is one. The program is compiled at the first call only.

  Args:
    experiment: the experiment to test.
    task: the task of the experiment.
  """
  config = experiment.config
  run = devices.map_over_devices(
    steps.make_eval_step(experiment.model, experiment.normalise, task.scores),
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=devices.BATCH,
    backend=config.devices.backend,
  )

  def test(state):
    """Returns the result of a state, with the behaviour of images and of gates."""
    result, images, gates = evaluation.evaluate(
      # Each process runs its part of a batch, and all see the whole result.
      lambda *batch: hosts.allgather(run(state, *hosts.local_shard(batch))),
      in_memory.cover(experiment.test, config.optim.batch_size),
      experiment.counts,
      functools.partial(task.summarise, experiment),
      classes=task.classes(experiment),
      # For the outcomes of gates: with noise, a gate may be drawn open and closed for the same
      # image.
      noise_scale=experiment.drawn_noise_scale(int(state.step)),
    )
    if gates is not None and experiment.objective.prices_budget:
      result["budget"] = experiment.objective.target
    return result, images, gates

  return test
