"""Construction of an image experiment from its config.

Every setting is checked before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from gating_jax.config_files import Config, completed
from gating_jax.cores import count_workers
from gating_jax.data import augment, image_sets, streaming, unions
from gating_jax.images.checks import (
  CLASSIFIER_GATINGS,
  EXITS,
  EXPERTS,
  PRIOR,
  SCALE,
  check_config,
)
from gating_jax.layers.blocks import GATINGS, KERNELS
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
from gating_jax.models.resnets import RESNETS, resnet
from gating_jax.models.summary import ModelCounts, model_summary, solve_share
from gating_jax.models.vggs import VGGS, is_dense_name, vgg
from gating_jax.terminal import say
from gating_jax.training import devices, hosts, loop, optim, settings, steps
from gating_jax.training.objectives import (
  Distillation,
  FitLabels,
  GatePenalties,
  ImageObjective,
  check_budget,
  fit_classes,
  fit_exits,
  fit_sources,
  logits_of_source,
)
from gating_jax.training.outlines import Outline

LOADERS = ("resident", "streaming")
# Stands for the first of these where both splits fit into memory, else for the second.
AUTO = "auto"
# Fraction of the free memory that they may take: the copy on a device takes as much again.
_RESIDENT = 0.5
# Fewer images of a folder are decoded before processes that decode have started.
_MANY = 2000
# Defaults of model.kernels.temperature and model.kernels.end.
_SOFTNESS, _SOFTNESS_END = 30.0, 0.25
# Default of loss.distillation.temperature.
_TEMPERATURE = 4.0
# Default of model.dense_first.end.
_SHARE_END = 0.5


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Parts of the run that a config describes.

  Attributes:
    config: the config.
    open_train: reads the training set.
    test: the test set, already open.
    model: the model to train.
    counts: its summary.
    optimiser: its optimiser.
    objective: its objective.
    settings: settings of the training loop.
    noise_scale: noise scale of the gates, from step to number; None for the model's own.
    share: fraction of gates that quantiles open, likewise.
    softness: temperature at which kernels are mixed, from step to number; None without any.
    full: the model with the whole backward pass, where its own leaves something out; else None.
    source_names, class_sources: for a union, the names of its sets, and for each class the place of
      its set among them; otherwise empty.
  """

  config: Config
  open_train: Callable[[], image_sets.Images | streaming.Stream]
  test: image_sets.Images | streaming.Stream
  model: nn.Module
  counts: ModelCounts
  optimiser: optax.GradientTransformation
  objective: ImageObjective
  settings: loop.LoopSettings
  noise_scale: optax.Schedule | None = None
  share: optax.Schedule | None = None
  softness: optax.Schedule | None = None
  full: nn.Module | None = None
  source_names: tuple[str, ...] = ()
  class_sources: tuple[int, ...] = ()

  def init_state(self) -> steps.TrainState:
    """Initialises the state with which training begins."""
    return steps.init_state(self.model, self.optimiser, self.config.seed, shapes=self.test.shape)

  def competing(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits that are compared: with a head a set, those of an image's own set."""
    if self.config.loss.scope == "source":
      return logits_of_source(logits, labels, np.asarray(self.class_sources))
    return logits

  def normalise(self, pixels: jax.Array) -> jax.Array:
    """Normalises uint8 pixels to network input."""
    return augment.normalise(pixels, self.config.data.mean, self.config.data.std)

  def drawn_noise_scale(self, step: int) -> float:
    """Returns the noise scale of the gates in training at a step; 0 where none is drawn."""
    if self.noise_scale is not None:
      return float(np.asarray(self.noise_scale(step)))
    model = self.config.model
    if model.gating in CLASSIFIER_GATINGS:
      return 0.0
    return settings.gate_settings(model.gate).drawn_noise_scale


def build(config: Config, outlines: Sequence[Outline] | None = None) -> Experiment:
  """Builds the experiment of a config of labelled images.

  Every setting is checked first, then the data are opened.

  Args:
    config: the config.
    outlines: of the training and the test set, in place of opening them.
  Raises:
    ValueError: a setting is wrong; the message names the field.
    DatasetNotPreparedError: the data are not where the config says.
  """
  config = completed(config)
  data = config.data
  check_config(
    config,
    choices={
      "data.loader": (*LOADERS, AUTO),
      "model.name": (*RESNETS, *VGGS),
      "model.gating": (*GATINGS, SCALE, *CLASSIFIER_GATINGS),
    },
    at_least={
      "data.crop_padding": 0,
      "data.cutout_size": 0,
      "data.image_size": 0,
      "model.experts.count": 2,
    },
    numbers=("loss.exit_weights",),
    rules={
      "model.exits.threshold": (lambda v: 0 < v < 1, "in (0, 1)"),
      "model.experts.top_k": (
        lambda v: v is None or 1 <= v <= config.model.experts.count,
        "None or in 1 .. model.experts.count",
      ),
    },
  )
  if outlines is None:
    config = _choose_loader(config)
    data = config.data
  fit = fit_classes
  if config.model.gating == EXITS:
    fit = functools.partial(fit_exits, exit_weights=config.loss.exit_weights)
  experiment = assemble(
    config,
    lambda: _count_training(data),
    open_train=lambda: _open(data, data.train_split, config.seed, training=True),
    open_test=lambda: _open(data, data.test_split, config.seed, training=False),
    network=network,
    fit=fit,
    outlines=outlines,
  )
  if not unions.is_union(data.name):
    return experiment
  class_sources = tuple(unions.class_sources(data.name, experiment.test.class_names).tolist())
  objective = experiment.objective
  if config.loss.scope == "source":
    own = functools.partial(fit_sources, class_sources=class_sources)
    objective = dataclasses.replace(objective, fit=own)
  return dataclasses.replace(
    experiment,
    objective=objective,
    source_names=unions.source_names(data.name),
    class_sources=class_sources,
  )


def _choose_loader(config: Config) -> Config:
  """Returns the config with the loader that `auto` stands for, and says which it is and why."""
  data = config.data
  if data.loader != AUTO:
    return config
  # Only the streaming loader crops as these fields say; made images are never read.
  asked = [name for name in ("crop_area", "test_crop") if data.get(name) is not None]
  crops = bool(asked) and data.name not in image_sets.MADE
  needed = 0
  for split in (data.train_split, data.test_split):
    needed += image_sets.decoded_bytes(settings.source_of(data, split), data.image_size)
  # All processes read in the same way, and say why in the same words.
  free = hosts.least_of(_free_memory())
  # Images of a folder may differ in size, which memory alone finds out.
  can_stream = data.image_size or not image_sets.has_folder(data.name)
  streams = hosts.any_of(bool(crops or (can_stream and needed > _RESIDENT * free)))
  if streams or needed:
    size = f"{needed / 1e9:,.1f} GB of {free / 1e9:,.1f} GB that are free"
    how = "read from disk in the training" if streams else "held in memory"
    why = f"since data.{asked[0]} is set" if crops else size
    say(f"data.loader=auto: the images are {how}, {why}")
  chosen = config.copy_and_resolve_references()
  with chosen.unlocked():
    chosen.data.loader = "streaming" if streams else "resident"
    # What is free must not change the images: they are prepared as in memory.
    if streams and not crops:
      chosen.data.test_crop = 1.0 if image_sets.keeps_proportions(data.name) else 0.0
  return chosen.lock()


def _free_memory() -> int:
  """Returns the bytes that are free in memory, of this process or of a device if that has less."""
  free = image_sets.available_memory() // hosts.count_on_host()
  # A CPU device reports none.
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    free = min(free, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
  return free


def _count_training(data: Config) -> int:
  """Counts the training images of an epoch, without reading them."""
  source = settings.source_of(data, data.train_split)
  if unions.is_union(data.name):
    return _shares(data, unions.open_union(source).sizes).per_epoch
  return image_sets.count_images(source)


def _shares(data: Config, sizes: Sequence[int]) -> image_sets.EqualShares:
  """Returns how the sets of a union come into batches, by the numbers of their images.

  Raises:
    ValueError: a set has no image, so no batch could hold its images.
  """
  for name, size in zip(unions.source_names(data.name), sizes, strict=True):
    if not size:
      raise ValueError(
        "data.train_split must have images of every set of a union; got "
        f"{data.train_split!r}, which has none of {name}"
      )
  return unions.shares_of(sizes, data.images_per_set)


def _sizes(name: str, opened: image_sets.Images | streaming.Stream) -> list[int]:
  """Returns the number of images of each set of an opened union."""
  if isinstance(opened, streaming.Stream):
    union: Any = opened.source
    return list(union.sizes)
  # Every image that is in memory has a class.
  of_images = unions.class_sources(name, opened.class_names)[opened.labels]
  return np.bincount(of_images, minlength=len(unions.source_names(name))).tolist()


def assemble(
  config: Config,
  size: Callable[[], int],
  *,
  open_train: Callable[[], Any],
  open_test: Callable[[], Any],
  network: Callable[[Config, int], nn.Module],
  fit: FitLabels = fit_classes,
  train_shape: tuple[int, int, int] | None = None,
  outlines: Sequence[Outline] | None = None,
) -> Experiment:
  """Builds an experiment from checked settings.

  Args:
    config: a config of images and their labels.
    size: returns the number of training images.
    open_train, open_test: read the sets.
    network: `(config.model, classes)` to the model.
    fit: as in `ImageObjective`.
    train_shape: `(H, W, D)` of the training images, where it is not that of the test images.
    outlines: of the training and the test set, which are then not opened here.
  Raises:
    ValueError: a setting does not fit the data; the message names the field.
  """
  data, training = config.data, config.optim
  # Schedules need the number of steps, hence of images, before the images are read.
  examples = len(outlines[0]) if outlines else size()
  if training.batch_size > examples:
    raise ValueError(
      f"optim.batch_size must be at most {examples}, the number of training images; "
      f"got {training.batch_size}"
    )
  # The last, smaller batch of an epoch is left out: a step has one shape.
  per_epoch = examples // training.batch_size
  loops = loop.LoopSettings.from_config(config, epochs=training.epochs, steps_per_epoch=per_epoch)
  total = loops.total_steps
  penalties = GatePenalties.from_config(config.loss, total)
  optimiser = _optimiser(training, total, per_epoch)
  if static := config.model.importance.static_layers:
    optimiser = optim.frozen(optimiser, functools.partial(_is_static, static))
  noise_scale = _noise_schedule(config.model, total)
  # Its settings are checked before the data are opened.
  _share_schedule(config.model, total)
  # The outlines are those of the training set, then of the test set.
  test: Any = outlines[-1] if outlines else open_test()
  settings.check_channels(data, test.shape[-1])
  classes = len(test.class_names)
  of_model = _at_equal_macs(config.model, classes, test.shape, network=network)
  share = _share_schedule(of_model, total)
  model = network(of_model, classes)
  # The same network without the limit, for batches that open more than it holds.
  full = None
  if config.model.backward_share < 1:
    unlimited = ml_collections.ConfigDict({**config.model, "backward_share": 1.0})
    full = network(unlimited, classes)
  counts = model_summary(model, test.shape)
  _check_layers("optim.frozen_layers", training.frozen_layers, model, shape=test.shape)
  _check_layers("model.importance.static_layers", static, model, shape=test.shape)
  # The objective sees training images, whose MACs differ with their size.
  at_training = model_summary(model, train_shape) if train_shape else counts
  check_budget("loss.sparsity", config.loss.sparsity, at_training)
  return Experiment(
    config=config,
    open_train=open_train,
    test=test,
    model=model,
    full=full,
    noise_scale=noise_scale,
    share=share,
    softness=_softness_schedule(config.model, total),
    counts=counts,
    optimiser=optimiser,
    objective=ImageObjective.from_config(
      config.loss,
      penalties,
      never_gated_macs=at_training.never_gated_macs,
      fit=fit,
      distillation=_distillation(config.loss),
    ),
    settings=loops,
  )


def _optimiser(training: Config, total: int, per_epoch: int) -> optax.GradientTransformation:
  """Builds the optimiser that the section `optim` describes.

  Args:
    training: the section.
    total: steps of the training.
    per_epoch: steps of an epoch.
  """

  def make(rate: optax.Schedule) -> optax.GradientTransformation:
    """Makes the optimiser of all parameters."""
    return optim.sgd(
      rate,
      momentum=training.momentum,
      weight_decay=training.weight_decay,
      gate_weight_decay=training.gate_weight_decay or 0.0,
      gate_lr_multiplier=training.gate_lr_multiplier,
    )

  epochs = training.freeze_epochs
  with settings.named("optim"):
    rate = optim.configured_rate(training, total)
    if not epochs:
      return make(rate)
    return optim.frozen_at_first(
      make,
      rate,
      is_frozen=functools.partial(_is_frozen, training.frozen_layers),
      steps=round(epochs * per_epoch),
    )


def _is_static(layers: Sequence[str], path: Sequence[str]) -> bool:
  """Returns whether a parameter is of a gate that stays the same for all images.

  Args:
    layers: beginnings of the names of the layers with such gates.
    path: of the parameter.
  """
  return is_gate_path(path) and path[0].startswith(tuple(layers))


def _distillation(loss: Config) -> Distillation | None:
  """Returns the settings of the term of a teacher; None without one."""
  section = loss.distillation
  if not section.coefficient:
    return None
  return Distillation(section.coefficient, section.temperature or _TEMPERATURE)


def _is_frozen(layers: Sequence[str] | None, path: Sequence[str]) -> bool:
  """Returns whether a parameter is of a frozen layer; gates and exits, which are fresh, never are.

  Args:
    layers: beginnings of the layers' names; None for all but the dense layers at the end.
    path: of the parameter.
  """
  if is_gate_path(path) or path[0].startswith("exit"):
    return False
  return not is_dense_name(path[0]) if layers is None else path[0].startswith(tuple(layers))


def _check_layers(
  field: str, names: Sequence[str] | None, model: nn.Module, *, shape: tuple[int, ...]
) -> None:
  """Raises a ValueError unless each name in a field is the beginning of a layer's name."""
  if names is None:
    return
  image = jax.ShapeDtypeStruct((1, *shape), np.float32)
  layers = sorted(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
  for name in names:
    if not any(layer.startswith(name) for layer in layers):
      raise ValueError(
        f"each of {field} must be the beginning of one of {', '.join(layers)}; got {name!r}"
      )


def _noise_schedule(model: Config, total: int) -> optax.Schedule | None:
  """Returns the noise scale of the gates, from step to number; None for the model's own."""
  noise = model.noise
  if noise.final is None:
    return None
  return optim.ramp(
    model.gate.noise_scale,
    noise.final,
    ramp_start=noise.ramp_start,
    ramp_end=noise.ramp_end,
    total_steps=total,
  )


def _at_equal_macs(
  model: Config,
  classes: int,
  shape: tuple[int, ...],
  *,
  network: Callable[[Config, int], nn.Module],
) -> Config:
  """Returns the section `config.model` with the fraction of gates that may open.

  With `equal_inner_width`, that is the fraction at which an image costs as much as in the ungated
  network of this inner width, gate networks included. Without it, the section as it is.

  Raises:
    ValueError: no fraction costs as much.
  """
  inner = model.equal_inner_width
  if inner is None:
    return model
  ungated = ml_collections.ConfigDict(
    {**model, "gating": "none", "inner_width": inner, "backward_share": 1.0}
  )
  macs = model_summary(network(ungated, classes), shape).macs
  with settings.named("model.equal_inner_width"):
    share = solve_share(network(model, classes), shape, macs=macs)
  field = "initial_open" if model.gate.context == "random" else "share"
  return ml_collections.ConfigDict({**model, "gate": {**model.gate, field: share}})


def _share_schedule(model: Config, total: int) -> optax.Schedule | None:
  """Returns the schedule of the fraction of gates that quantiles open; None for a fixed one."""
  schedule = model.dense_first
  if schedule.form is None:
    return None
  with settings.named("model.dense_first"):
    return optim.transition(
      1.0,
      settings.gate_settings(model.gate).share,
      ramp_start=schedule.start or 0.0,
      ramp_end=_SHARE_END if schedule.end is None else schedule.end,
      total_steps=total,
      form=schedule.form,
    )


def _softness_schedule(model: Config, total: int) -> optax.Schedule | None:
  """Returns the temperature at which kernels are mixed, from step to number; None without any."""
  if model.gating != KERNELS:
    return None
  kernels = model.kernels
  with settings.named("model.kernels"):
    return optim.ramp(
      kernels.temperature or _SOFTNESS,
      1.0,
      ramp_start=0.0,
      ramp_end=_SOFTNESS_END if kernels.end is None else kernels.end,
      total_steps=total,
    )


def network(model: Config, classes: int | None) -> nn.Module:
  """Builds the residual network, or the chain of convolutions, that `config.model` describes.

  Args:
    model: the section `config.model`.
    classes: number of classes; None for a network that another one cuts and extends.
  Raises:
    ValueError: a field does not go with the network.
  """
  gating, gate = model.gating, settings.gate_settings(model.gate)
  if model.importance.form == PRIOR:
    gate = settings.gate_settings(model.gate, prior=True)
  if gating == SCALE:
    # Scales have the place and the networks of gates.
    gating, gate = "channel", settings.gate_settings(model.gate, relaxation="scale")
  fields = dict(
    width=model.width,
    gating=gating,
    gate=gate,
    dtype=settings.DTYPES[model.dtype],
    axis_name=devices.AXIS,
  )
  if model.name in VGGS:
    for name, lacked in (("shortcut", "no shortcuts"), ("stem", "none")):
      if model[name] is not None:
        raise ValueError(
          f"model.{name} must be None for {model.name}, which has {lacked}; got {model[name]!r}"
        )
    return vgg(model.name, classes, **fields)
  fields |= dict(
    group_norm=model.group_norm,
    backward_share=model.backward_share,
    inner_width=model.inner_width,
  )
  # The network has its own values for those that are None.
  own = {
    "shortcut": model.shortcut,
    "stem": model.stem,
    "sources": model.sources,
    "kernels": model.kernels.count,
  }
  fields |= {name: value for name, value in own.items() if value is not None}
  # Exits and experts take the place of gates: the network itself is ungated.
  if model.gating == EXITS:
    return resnet(
      model.name,
      classes,
      kind=EarlyExitNet,
      threshold=model.exits.threshold,
      **{**fields, "gating": "none"},
    )
  if model.gating == EXPERTS:
    return resnet(
      model.name,
      classes,
      kind=ExpertNet,
      experts=model.experts.count,
      top_k=model.experts.top_k,
      **{**fields, "gating": "none"},
    )
  return resnet(model.name, classes, **fields)


def _open(
  data: Config, split: str, seed: int, *, training: bool
) -> image_sets.Images | streaming.Stream:
  """Opens a split of the data, in memory or on disk."""
  source = settings.source_of(data, split)
  opened: image_sets.Images | streaming.Stream
  if data.loader == "resident":
    opened = image_sets.load(source, data.image_size)
  else:
    opened = streaming.open_stream(
      source,
      image_size=data.image_size,
      seed=seed,
      workers=data.workers or 0,
      # Random crops are for training alone.
      crop_area=data.crop_area if training else None,
      # A run of an older version has no such field.
      test_crop=data.get("test_crop"),
    )
    # Processes decode small files several times as fast as threads, but start slowly.
    if data.workers is None and image_sets.has_folder(data.name) and len(opened) >= _MANY:
      opened = dataclasses.replace(opened, workers=count_workers(hosts.count_on_host()))
  # A test has every image of a union once.
  if not (training and unions.is_union(data.name)):
    return opened
  return dataclasses.replace(opened, shares=_shares(data, _sizes(data.name, opened)))
