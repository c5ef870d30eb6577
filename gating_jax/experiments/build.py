"""From a config of image classification to its parts, every setting checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from gating_jax.checks import one_of
from gating_jax.data import augment, sources, streaming
from gating_jax.layers.blocks import GATINGS, SHORTCUTS
from gating_jax.layers.gate import GateSettings
from gating_jax.models.counts import ModelCounts, count
from gating_jax.models.resnet import RESNETS, ResNet, resnet
from gating_jax.ops.priors import beta
from gating_jax.training import devices, loop, optim, schedules
from gating_jax.training.objectives import REDUCTIONS, SPARSITIES, ImageObjective

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LOADERS = ("resident", "streaming")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config describes. `open_train` reads the training set; the test set is at hand."""

  config: ml_collections.ConfigDict
  open_train: Callable[[], sources.Images | streaming.Stream]
  test: sources.Images | streaming.Stream
  model: ResNet
  counts: ModelCounts
  optimiser: optax.GradientTransformation
  objective: ImageObjective
  settings: loop.LoopSettings

  def normalise(self, pixels: jax.Array) -> jax.Array:
    """uint8 pixels to network input."""
    return augment.normalise(pixels, self.config.data.mean, self.config.data.std)


def build(config: ml_collections.ConfigDict) -> Experiment:
  """Checks every setting, then opens the data. Raises ValueError naming the field, or `DatasetNotPreparedError`."""
  data, training, loss, dispatch = config.data, config.optim, config.loss, config.devices.steps_per_dispatch
  _check(config)
  settings = dict(width=config.model.width, gating=config.model.gating, gate=GateSettings(**config.model.gate),
                  dtype=DTYPES[config.model.dtype], axis_name=devices.AXIS)
  if config.model.shortcut is not None:
    settings["shortcut"] = config.model.shortcut
  prior = beta(loss.batch_shaping.a, loss.batch_shaping.b)
  read = _opener(config)
  examples = sources.size(data.name, data.train_split, data.data_dir)
  if training.batch_size > examples:
    raise ValueError(f"optim.batch_size must be at most {examples}, the number of training images; "
                     f"got {training.batch_size}")
  per_epoch = examples // training.batch_size
  total = math.ceil(training.epochs * per_epoch / dispatch) * dispatch
  optimiser = optim.sgd(
      schedules.learning_rate(training.schedule, training.learning_rate, total, warmup=training.warmup,
                              drops=training.drops, factor=training.drop_factor),
      momentum=training.momentum, weight_decay=training.weight_decay)
  shaping, sparsity = loss.batch_shaping, loss.sparsity
  coefficients = dict(
      batch_shaping_coefficient=schedules.fade_out(shaping.coefficient, shaping.end, total),
      sparsity_coefficient=schedules.fade_in(sparsity.coefficient, sparsity.start, sparsity.full, total))
  test = read(data.test_split, training=False)
  channels = test.shape[-1]
  for name, value in (("data.mean", data.mean), ("data.std", data.std)):
    if len(value) not in (1, channels):
      raise ValueError(f"{name} must hold 1 number, or one for each of {channels} channels; got {tuple(value)}")
  model = resnet(config.model.name, classes=len(test.class_names), **settings)
  counts = count(model, test.shape)
  return Experiment(
      config=config,
      open_train=lambda: read(data.train_split, training=True),
      test=test,
      model=model,
      counts=counts,
      optimiser=optimiser,
      objective=ImageObjective(
          prior=prior, reduction=shaping.reduction, sparsity=sparsity.kind, target=sparsity.target,
          fixed_macs=counts.macs - counts.gated, **coefficients),
      settings=loop.LoopSettings(
          total_steps=total,
          steps_per_dispatch=dispatch,
          log_every=config.log_every,
          checkpoint_every=max(1, round(config.checkpoint_every * per_epoch)),
          eval_every=max(1, round(config.eval_every * per_epoch)) if config.eval_every else 0))


def _opener(config: ml_collections.ConfigDict) -> Callable[..., Any]:
  data = config.data
  if data.loader == "resident":
    return lambda split, training: sources.load(data.name, split, data.data_dir)
  return lambda split, training: streaming.open_stream(
      data.name, split, data.data_dir, image_size=data.image_size, seed=config.seed, workers=data.workers,
      crop_area=data.crop_area if training else None)


def _check(config: ml_collections.ConfigDict) -> None:
  choices = {
      "data.loader": LOADERS,
      "model.name": RESNETS,
      "model.dtype": DTYPES,
      "model.gating": GATINGS,
      "loss.batch_shaping.reduction": REDUCTIONS,
      "loss.sparsity.kind": SPARSITIES,
      "optim.schedule": schedules.LEARNING_RATES,
      "devices.backend": devices.BACKENDS,
  }
  positive = ("model.width", "optim.learning_rate", "optim.drop_factor", "checkpoint_every")
  not_negative = ("eval_every", "loss.batch_shaping.coefficient", "loss.sparsity.coefficient", "optim.weight_decay")
  counts = {"seed": 0, "data.pad": 0, "data.image_size": 0, "data.workers": 0, "optim.epochs": 1,
            "optim.batch_size": 1, "devices.steps_per_dispatch": 1, "log_every": 1}
  fields = dict(_flatten(config))
  for name, allowed in choices.items():
    one_of(name, fields[name], allowed)
  if config.model.shortcut is not None:
    one_of("model.shortcut", config.model.shortcut, SHORTCUTS)
  rules = [(name, 0 < fields[name] < math.inf, "a positive finite number") for name in positive]
  rules += [(name, 0 <= fields[name] < math.inf, "a finite number >= 0") for name in not_negative]
  rules += [(name, fields[name] >= least, f">= {least}") for name, least in counts.items()]
  rules += [
      ("loss.sparsity.target", 0 < fields["loss.sparsity.target"] <= 1, "in (0, 1]"),
      ("data.mean", _numbers(fields["data.mean"]), "a tuple of numbers"),
      ("data.std", _numbers(fields["data.std"]) and min(fields["data.std"]) > 0, "a tuple of positive numbers"),
      ("optim.drops", _numbers(fields["optim.drops"], empty=True), "a tuple of fractions"),
      ("optim.batch_size", fields["optim.batch_size"] % jax.device_count() == 0,
       f"a multiple of the {jax.device_count()} devices"),
  ]
  for name, holds, rule in rules:
    if not holds:
      raise ValueError(f"{name} must be {rule}; got {fields[name]!r}")


def _numbers(values: Any, empty: bool = False) -> bool:
  return (isinstance(values, tuple) and (empty or len(values) > 0)
          and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values))


def _flatten(config: ml_collections.ConfigDict, prefix: str = ""):
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value
