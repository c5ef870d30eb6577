"""Trains and evaluates a gated image classifier: binds data, model, objective and run directory.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gating_jax.checks import one_of
from gating_jax.data import augment, batches, resident, sources, streaming
from gating_jax.layers.gate import GateSettings
from gating_jax.models.counts import ModelCounts, count
from gating_jax.models.resnet import ResNet, resnet
from gating_jax.ops.priors import beta
from gating_jax.reports import firing, table
from gating_jax.training import devices, evaluation, loop, optim, schedules, steps
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import Journal
from gating_jax.training.objectives import ImageObjective
from gating_jax.training.rundir import RunDir, open_run

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LOADERS = ("resident", "streaming")


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """`train` trains to the end from wherever the run directory stands; `evaluate` tests its newest checkpoint."""
  experiment = build(config)
  with open_run(workdir, config, create=mode == "train") as run_dir:
    if mode == "evaluate":
      _, step, state = _restore(experiment, run_dir, must_exist=True)
      print(f"checkpoint of step {step}")
      print(table.render(_test(experiment, state)[0]))
    elif (result := run_dir.result()) is not None:
      print(f"{workdir} holds a finished run of this config; nothing was trained or changed. Its result:")
      print(table.render(result))
    else:
      _train(experiment, run_dir)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config describes, checked and built; nothing is compiled yet."""

  config: ml_collections.ConfigDict
  train: sources.Images | streaming.Stream
  test: sources.Images | streaming.Stream
  model: ResNet
  counts: ModelCounts
  optimiser: optax.GradientTransformation
  objective: ImageObjective
  total_steps: int
  steps_per_epoch: int


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Checks every setting and reads the data. Raises ValueError, or `DatasetNotPreparedError`."""
  data, training, gate, loss = config.data, config.optim, config.model.gate, config.loss
  one_of("data.loader", data.loader, LOADERS)
  one_of("model.dtype", config.model.dtype, DTYPES)
  one_of("devices.backend", config.devices.backend, devices.BACKENDS)
  if training.batch_size < 1 or training.batch_size % jax.device_count():
    raise ValueError(f"optim.batch_size must be a positive multiple of the {jax.device_count()} devices; "
                     f"got {training.batch_size}")
  settings = dict(width=config.model.width, gating=config.model.gating, gate=GateSettings(**gate),
                  dtype=DTYPES[config.model.dtype], axis_name=devices.AXIS)
  if config.model.shortcut is not None:
    settings["shortcut"] = config.model.shortcut
  if training.epochs < 1:
    raise ValueError(f"optim.epochs must be >= 1; got {training.epochs}")
  prior = beta(loss.batch_shaping.a, loss.batch_shaping.b)
  resnet(config.model.name, classes=2, **settings)  # a wrong name fails before data is read
  if data.loader == "resident":
    train = sources.load(data.name, data.train_split, data.data_dir)
    test = sources.load(data.name, data.test_split, data.data_dir)
  else:
    opened = functools.partial(streaming.open_stream, data.name, data_dir=data.data_dir, image_size=data.image_size,
                               seed=config.seed, workers=data.workers)
    train = opened(split=data.train_split, crop_area=data.crop_area)
    test = opened(split=data.test_split)
  model = resnet(config.model.name, classes=len(test.class_names), **settings)
  counts = count(model, test.shape)
  steps_per_epoch = len(train) // training.batch_size
  if not steps_per_epoch:
    raise ValueError(f"optim.batch_size must be at most {len(train)}, the number of training images; "
                     f"got {training.batch_size}")
  k = config.devices.steps_per_dispatch
  total = -(-training.epochs * steps_per_epoch // k) * k
  return Experiment(
      config=config,
      train=train,
      test=test,
      model=model,
      counts=counts,
      optimiser=optim.sgd(
          schedules.learning_rate(training.schedule, training.learning_rate, total, warmup=training.warmup,
                                  drops=training.drops, factor=training.drop_factor),
          momentum=training.momentum, weight_decay=training.weight_decay),
      objective=ImageObjective(
          prior=prior,
          reduction=loss.batch_shaping.reduction,
          sparsity=loss.sparsity.kind,
          target=loss.sparsity.target,
          batch_shaping_coefficient=schedules.fade_out(loss.batch_shaping.coefficient, loss.batch_shaping.end, total),
          sparsity_coefficient=schedules.fade_in(
              loss.sparsity.coefficient, loss.sparsity.start, loss.sparsity.full, total),
          fixed_macs=counts.fixed),
      total_steps=total,
      steps_per_epoch=steps_per_epoch)


def _train(experiment: Experiment, run_dir: RunDir) -> None:
  config, started = experiment.config, time.time()
  checkpoints, first_step, state = _restore(experiment, run_dir)
  if first_step:
    print(f"going on from the checkpoint of step {first_step} in {run_dir.path}")
  per_epoch = experiment.steps_per_epoch
  settings = loop.LoopSettings(
      total_steps=experiment.total_steps,
      steps_per_dispatch=config.devices.steps_per_dispatch,
      log_every=config.log_every,
      checkpoint_every=max(1, round(config.checkpoint_every * per_epoch)),
      eval_every=round(config.eval_every * per_epoch))
  journal = Journal(run_dir.path, first_step, experiment.total_steps)

  def evaluate(state, step):
    result, _ = _test(experiment, state)
    journal.write(step, "test", result)
    journal.say(step, f"test accuracy {result['accuracy']:.4f}")

  try:
    advance = make_advance(experiment, first_step)
    state, step = loop.train(state, first_step, advance, settings=settings, checkpoints=checkpoints,
                             journal=journal, evaluate=evaluate)
    if step < experiment.total_steps:
      journal.say(step, "stopped by SIGTERM; a checkpoint is saved, the same command goes on from here")
      return
    result, gates = _test(experiment, state)
    journal.write(step, "test", result)
  finally:
    journal.close()
    checkpoints.close()
  if gates is not None:
    firing.draw(run_dir.path / "gates.png", gates.logits, gates.open_rates, experiment.objective.prior)
  result = {**result, "step": step, "seconds": round(time.time() - started, 1)}
  run_dir.finish(result)
  print(table.render(result))
  print(f"run directory: {run_dir.path}")


def _restore(experiment: Experiment, run_dir: RunDir, must_exist: bool = False) -> tuple[Checkpoints, int, Any]:
  checkpoints = Checkpoints(run_dir.checkpoints)
  state = steps.init_state(experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape)
  found = checkpoints.restore(state, devices.replicated_sharding())
  if found is None:
    if must_exist:
      raise FileNotFoundError(f"no readable checkpoint in {run_dir.checkpoints}: was the run trained?")
    return checkpoints, 0, devices.replicate(state)
  return checkpoints, *found


def make_advance(experiment: Experiment, first_step: int) -> Callable:
  """`(state, step) -> (state, metrics)` over all devices, with the data where its loader wants it."""
  config, data = experiment.config, experiment.config.data
  k, batch = config.devices.steps_per_dispatch, config.optim.batch_size
  process = (jax.process_index(), jax.process_count())

  def prepare(key, pixels):
    pixels = augment.crop_and_flip(key, pixels, pad=data.pad, flip=data.flip, axis_name=devices.AXIS)
    return augment.normalise(pixels, data.mean, data.std)

  step = steps.make_train_step(experiment.model, experiment.optimiser, experiment.objective, prepare,
                               seed=config.seed, axis_name=devices.AXIS)
  mapped = lambda fn, args: devices.map_over_devices(
      fn, args=args, results=(devices.REPLICATED, devices.REPLICATED), backend=config.devices.backend, donate=(0,))
  if data.loader == "streaming":
    stream = experiment.train.batches(batch, first_step, k, experiment.total_steps, process)
    run = mapped(steps.streamed_steps(step), (devices.REPLICATED, devices.BATCH))
    return lambda state, _: run(state, next(stream))
  images = devices.replicate((experiment.train.pixels, experiment.train.labels))
  run = mapped(steps.resident_steps(step), (devices.REPLICATED, devices.REPLICATED, devices.BATCH))
  return lambda state, at: run(
      state, images, resident.indices(config.seed, at, k, batch, len(experiment.train), process))


def _test(experiment: Experiment, state: Any) -> tuple[dict[str, Any], evaluation.GateBehaviour | None]:
  config, data = experiment.config, experiment.config.data
  step = steps.make_eval_step(experiment.model, lambda pixels: augment.normalise(pixels, data.mean, data.std))
  run = devices.map_over_devices(
      step, args=(devices.REPLICATED, devices.BATCH, devices.BATCH), results=devices.BATCH,
      backend=config.devices.backend)
  return evaluation.evaluate(
      lambda pixels, labels: run(state, pixels, labels),
      batches.cover(experiment.test, config.optim.batch_size), experiment.counts)
