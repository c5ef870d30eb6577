"""Trains and evaluates a gated image classifier, or whatever else is learnt from labelled images, in a run directory.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from gating_jax.data import augment, batches, resident, streaming
from gating_jax.experiments.build import Experiment, build
from gating_jax.layers.gate import GateSettings
from gating_jax.reports import firing, gate_table, image_report, page, table
from gating_jax.training import devices, diagnosis, evaluation, hosts, loop, rundir, steps
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal, read_journal


@dataclasses.dataclass(frozen=True)
class Task:
  """What the labels of images mean for training, for the test and for who reads its result.

  Attributes:
    prepare: `(experiment, key, uint8 pixels) -> network input`, augmented.
    scores: `(logits, labels) -> results` of each image, as in `steps.make_eval_step`.
    summarise: as in `evaluation.evaluate`.
    headline: the result in a line, its numbers by name.
    render: the result as a table.
    classes: how many there are of images, for what gates tell of them; None where an image has none of its own.
    pictures: further ones, by name: `(experiment, state, file)` writes a PNG.
  """

  prepare: Callable[[Experiment, jax.Array, jax.Array], jax.Array]
  scores: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  summarise: Callable[[Experiment, Mapping[str, Any], int], dict[str, float]]
  headline: str
  render: Callable[[Mapping[str, Any]], str]
  classes: Callable[[Experiment], int | None] = lambda experiment: len(experiment.test.class_names)
  pictures: Mapping[str, Callable[[Experiment, steps.TrainState, Any], None]] = dataclasses.field(default_factory=dict)


def _crop_and_flip(experiment: Experiment, key: jax.Array, pixels: jax.Array) -> jax.Array:
  data = experiment.config.data
  pixels = augment.crop_and_flip(key, pixels, pad=data.pad, flip=data.flip, axis_name=devices.AXIS)
  return experiment.normalise(pixels)


TASK = Task(
    prepare=_crop_and_flip,
    scores=steps.image_scores,
    summarise=lambda _, sums, images: evaluation.summarise(sums, images),
    headline="test accuracy {accuracy:.4f}",
    render=table.render)


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """`train` trains to the end from wherever the run directory stands; `evaluate` tests its newest checkpoint, `report`
  writes a page of it."""
  run_task(TASK, build(config), workdir, mode)


def run_task(task: Task, experiment: Experiment, workdir: Path, mode: str) -> None:
  """The same for any task."""
  rundir.run_mode(workdir, experiment.config, mode, render=task.render,
                  train=functools.partial(_train, task, experiment),
                  evaluate=functools.partial(_evaluate, task, experiment),
                  report=functools.partial(_report, task, experiment))


def _evaluate(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, _, result, _ = _test_newest(task, experiment, run_dir)
  print(f"checkpoint of step {step}")
  print(task.render(result))


def _report(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  step, state, result, gates = _test_newest(task, experiment, run_dir)
  write_report(task, experiment, run_dir, step, state, result, gates)
  print(f"report of the checkpoint of step {step}: {run_dir.report}")


def write_report(
    task: Task, experiment: Experiment, run_dir: rundir.RunDir, step: int, state: steps.TrainState,
    result: Mapping[str, Any], gates: evaluation.GateBehaviour | None,
) -> None:
  """Writes the run's page; `result` has `layers` where anything is gated."""
  sections = [page.Section("Result", parts=[page.Listing(task.render(result))])]
  if gates is not None:
    tests = [line for line in read_journal(run_dir.path) if line["split"] == "test" and line["step"] <= step]
    sections += image_report.gate_sections(
        gates, result, prior=experiment.objective.prior, layers=experiment.counts.gate_layers,
        read=experiment.test.read, class_names=experiment.test.class_names if task.classes(experiment) else None,
        history=tests)
  sections += [page.Section(title, parts=[page.drawn(functools.partial(draw, experiment, state), title)])
               for title, draw in task.pictures.items()]
  page.write(run_dir.report, f"{experiment.config.model.name} on {experiment.config.data.name}", sections,
             f"{run_dir.path.name}, step {step}")


def _test_newest(
    task: Task, experiment: Experiment, run_dir: rundir.RunDir
) -> tuple[int, Any, dict[str, Any], evaluation.GateBehaviour | None]:
  """The newest checkpoint's step and state, its result on the test images and what its gates did."""
  checkpoints = Checkpoints(run_dir.checkpoints, read_only=True)
  try:
    step, state = _restore(experiment, checkpoints)
  finally:
    checkpoints.close()
  if not step:
    raise rundir.RunDirError(f"no checkpoint in {run_dir.checkpoints} yet")
  result, gates = make_test(experiment, task)(state)
  if gates is not None:
    result["layers"] = diagnosis.by_layer(gates.diagnosis, experiment.counts.gate_layers)
  return step, state, result, gates


def _train(task: Task, experiment: Experiment, run_dir: rundir.RunDir) -> None:
  started, total = time.monotonic(), experiment.settings.total_steps
  train = experiment.open_train()
  checkpoints = Checkpoints(run_dir.checkpoints)
  first_step, state = _restore(experiment, checkpoints)
  if first_step:
    print(f"going on from the checkpoint of step {first_step} in {run_dir.path}")
  journal = Journal(run_dir.path, first_step, total)
  test = make_test(experiment, task)

  def evaluate(state, step):
    result, gates = test(state)
    journal.write(step, "test", result)
    journal.say(step, task.headline.format(**result))
    return result, gates

  try:
    advance = make_advance(experiment, train, first_step, task)
    state, step = loop.train(state, first_step, advance, settings=experiment.settings, checkpoints=checkpoints,
                             journal=journal, evaluate=evaluate)
    if step < total:
      journal.say(step, "stopped as asked; a checkpoint is saved, the same command goes on from here")
      return
    result, gates = evaluate(state, step)
  finally:
    journal.close()
    checkpoints.close()
  if gates is not None:
    layers, found = experiment.counts.gate_layers, gates.diagnosis
    hosts.written(lambda: firing.draw(
        run_dir.path / "gates.png", gates.logits, found.open_rates, experiment.objective.prior))
    hosts.written(lambda: gate_table.write(run_dir.path / "gates.csv", found, layers))
    result |= {"batch_shaping_reduction": experiment.objective.reduction, "layers": diagnosis.by_layer(found, layers)}
  for name, draw in task.pictures.items():
    hosts.written(functools.partial(draw, experiment, state, run_dir.path / f"{name}.png"))
  hosts.written(lambda: write_report(task, experiment, run_dir, step, state, result, gates))
  result |= {"step": step, "seconds_since_last_start": round(time.monotonic() - started, 1)}
  run_dir.finish(result)
  print(task.render(result))
  print(f"run directory: {run_dir.path}")


def _restore(experiment: Experiment, checkpoints: Checkpoints) -> tuple[int, Any]:
  """The newest checkpoint's step and state, or step 0 and a fresh state."""
  state = steps.init_state(experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape)
  return checkpoints.restore(state, devices.replicated_sharding()) or (0, devices.replicate(state))


def make_advance(
    experiment: Experiment, train: Any, first_step: int, task: Task = TASK
) -> Callable[[Any, int], tuple[Any, Any]]:
  """`(state, step) -> (state, metrics)` over all devices, with the data where its loader wants it."""
  config = experiment.config
  k, batch = config.devices.steps_per_dispatch, config.optim.batch_size
  process = (jax.process_index(), jax.process_count())
  step = steps.make_train_step(
      experiment.model, experiment.optimiser, experiment.objective, functools.partial(task.prepare, experiment),
      seed=config.seed, axis_name=devices.AXIS)
  mapped = lambda fn, args: devices.map_over_devices(
      fn, args=args, results=(devices.REPLICATED, devices.REPLICATED), backend=config.devices.backend, donate=(0,))
  if isinstance(train, streaming.Stream):
    stream = train.batches(batch, first_step, k, experiment.settings.total_steps, process)
    run = mapped(steps.streamed_steps(step), (devices.REPLICATED, devices.BATCH))
    return lambda state, _: run(state, next(stream))
  images = devices.replicate((train.pixels, train.labels))
  run = mapped(steps.resident_steps(step), (devices.REPLICATED, devices.REPLICATED, devices.BATCH))
  return lambda state, at: run(state, images, resident.indices(config.seed, at, k, batch, len(train), process))


def make_test(
    experiment: Experiment, task: Task = TASK
) -> Callable[[Any], tuple[dict[str, Any], evaluation.GateBehaviour | None]]:
  """`state -> evaluation.evaluate` on every test image once, with the budget where there is one; compiled at its first
  call only."""
  config = experiment.config
  run = devices.map_over_devices(
      steps.make_eval_step(experiment.model, experiment.normalise, task.scores),
      args=(devices.REPLICATED, devices.BATCH, devices.BATCH), results=devices.BATCH, backend=config.devices.backend)
  noise_scale = GateSettings(**config.model.gate).drawn_noise_scale

  def test(state):
    result, gates = evaluation.evaluate(
        lambda *batch: hosts.whole(run(state, *hosts.share(batch))),
        batches.cover(experiment.test, config.optim.batch_size), experiment.counts,
        functools.partial(task.summarise, experiment), classes=task.classes(experiment),
        noise_scale=noise_scale)
    if gates is not None and experiment.objective.prices_budget:
      result["budget"] = experiment.objective.target
    return result, gates

  return test
