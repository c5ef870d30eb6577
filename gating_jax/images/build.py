"""Construction of an image experiment from its config.

Every setting is checked before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.data import augment, image_sets, streaming, unions
from gating_jax.layers.blocks import BIAS, GATINGS, KERNELS, SHORTCUTS
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
from gating_jax.models.resnets import RESNETS, resnet
from gating_jax.models.summary import ModelCounts, model_summary, solve_share
from gating_jax.models.vggs import VGGS, is_dense_name, vgg
from gating_jax.programmes import UNGATED_NETS
from gating_jax.training import devices, loop, optim, rundir, settings
from gating_jax.training.objectives import (
  REDUCTIONS,
  REGULARISERS,
  SCOPES,
  SPARSITIES,
  WITH_SPARSITY,
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
# Gatings of whole classifiers, which exclude gates of units and their settings.
EXITS, EXPERTS = CLASSIFIER_GATINGS = ("exits", "experts")
# Of an ungated network whose channels have scales: squeeze-and-excitation.
SCALE = "scale"
# Of mixed kernels, where the config has none: their number, the temperature at the start, and the
# fraction of training at which it has fallen to 1.
_KERNEL_COUNT, _SOFTNESS, _SOFTNESS_END = 4, 30.0, 0.25
# What the importance of a trained network's units is for: to begin gates with, or to prune it by.
PRIOR, PRUNE = IMPORTANCE_FORMS = ("prior", "prune")
# Of the loss that compares a network with its teacher, where the config has none.
_TEMPERATURE = 4.0
# End of the schedule of the gates' share, where the config has none.
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
    share: share of gates that quantiles open, likewise.
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

  def competing(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits that are compared: with a head a set, those of an image's own set."""
    if scope_of(self.config) == "source":
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
  data = config.data
  check_config(
    config,
    choices={
      "data.loader": LOADERS,
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
  fit = fit_classes
  if config.model.gating == EXITS:
    fit = functools.partial(fit_exits, exit_weights=config.loss.exit_weights)
  experiment = assemble(
    config,
    lambda: _count_training(config),
    open_train=lambda: _open(config, data.train_split, training=True),
    open_test=lambda: _open(config, data.test_split, training=False),
    network=network,
    fit=fit,
    outlines=outlines,
  )
  if not unions.is_union(data.name):
    return experiment
  class_sources = tuple(unions.class_sources(data.name, experiment.test.class_names).tolist())
  objective = experiment.objective
  if scope_of(config) == "source":
    own = functools.partial(fit_sources, class_sources=class_sources)
    objective = dataclasses.replace(objective, fit=own)
  return dataclasses.replace(
    experiment,
    objective=objective,
    source_names=unions.source_names(data.name),
    class_sources=class_sources,
  )


def scope_of(config: Config) -> str:
  """Returns which classes compete in the cross-entropy: `all`, or those of the `source`."""
  # Older configs have no such field.
  return config.loss.get("scope") or "all"


def _count_training(config: Config) -> int:
  """Counts the training images of an epoch, without reading them."""
  data = config.data
  source = settings.source_of(data, data.train_split)
  if unions.is_union(data.name):
    return _shares(config, unions.open_union(source).sizes).per_epoch
  return image_sets.count_images(source)


def _shares(config: Config, sizes: Sequence[int]) -> image_sets.EqualShares:
  """Returns how the sets of a union come into batches, by the numbers of their images.

  Raises:
    ValueError: a set has no image, of which no batch could have its share.
  """
  for name, size in zip(unions.source_names(config.data.name), sizes, strict=True):
    if not size:
      raise ValueError(
        "data.train_split must have images of every set of a union; got "
        f"{config.data.train_split!r}, which has none of {name}"
      )
  return unions.shares_of(sizes, config.data.get("images_per_set"))


def _sizes(config: Config, opened: image_sets.Images | streaming.Stream) -> list[int]:
  """Returns the number of images of each set of an opened union."""
  if isinstance(opened, streaming.Stream):
    union: Any = opened.source
    return list(union.sizes)
  name = config.data.name
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
  if static := (config.model.get("importance") or {}).get("static_layers"):
    optimiser = optim.frozen(optimiser, functools.partial(_is_static, static))
  noise_scale = _noise_schedule(config.model, total)
  # Its settings are checked before the data are opened.
  _share_schedule(config.model, total)
  # The outlines are those of the training set, then of the test set.
  test: Any = outlines[-1] if outlines else open_test()
  settings.check_channels(data, test.shape[-1])
  classes = len(test.class_names)
  of_model = _at_equal_macs(config.model, classes, test.shape, network)
  share = _share_schedule(of_model, total)
  model = network(of_model, classes)
  # The same network without the limit, for batches that open more than it holds.
  full = None
  if config.model.backward_share < 1:
    unlimited = ml_collections.ConfigDict({**config.model, "backward_share": 1.0})
    full = network(unlimited, classes)
  counts = model_summary(model, test.shape)
  _check_layers("optim.frozen_layers", training.get("frozen_layers"), model, test.shape)
  _check_layers("model.importance.static_layers", static, model, test.shape)
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
      # Older configs have no such field.
      gate_weight_decay=training.get("gate_weight_decay") or 0.0,
      gate_lr_multiplier=training.gate_lr_multiplier,
    )

  # Older configs have no fields for freezing.
  epochs = training.get("freeze_epochs")
  with settings.named("optim"):
    rate = optim.configured_rate(training, total)
    if not epochs:
      return make(rate)
    return optim.frozen_at_first(
      make,
      rate,
      is_frozen=functools.partial(_is_frozen, training.get("frozen_layers")),
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
  # Older configs have no such section.
  section = loss.get("distillation") or {}
  if not section.get("coefficient"):
    return None
  return Distillation(section["coefficient"], section.get("temperature") or _TEMPERATURE)


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
  field: str, names: Sequence[str] | None, model: nn.Module, shape: tuple[int, ...]
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
  network: Callable[[Config, int], nn.Module],
) -> Config:
  """Returns the section `config.model` with the share that its gates may open.

  With `equal_inner_width`, that is the share at which an image costs as much as in the ungated
  network of this inner width, gate networks included. Without it, the section as it is.

  Raises:
    ValueError: no share costs as much.
  """
  # Older configs have no such field.
  inner = model.get("equal_inner_width")
  if inner is None:
    return model
  ungated = ml_collections.ConfigDict(
    {**model, "gating": "none", "inner_width": inner, "backward_share": 1.0}
  )
  macs = model_summary(network(ungated, classes), shape).macs
  with settings.named("model.equal_inner_width"):
    share = solve_share(network(model, classes), shape, macs)
  field = "initial_open" if model.gate.context == "random" else "share"
  return ml_collections.ConfigDict({**model, "gate": {**model.gate, field: share}})


def _share_schedule(model: Config, total: int) -> optax.Schedule | None:
  """Returns the share of gates that quantiles open, from step to number; None for a fixed one."""
  # Older configs have no such section.
  schedule = model.get("dense_first") or {}
  form = schedule.get("form")
  if form is None:
    return None
  start, end = schedule.get("start"), schedule.get("end")
  with settings.named("model.dense_first"):
    return optim.transition(
      1.0,
      settings.gate_settings(model.gate).share,
      ramp_start=0.0 if start is None else start,
      ramp_end=_SHARE_END if end is None else end,
      total_steps=total,
      form=form,
    )


def _softness_schedule(model: Config, total: int) -> optax.Schedule | None:
  """Returns the temperature at which kernels are mixed, from step to number; None without any."""
  if model.gating != KERNELS:
    return None
  section = model.get("kernels") or {}
  end = section.get("end")
  with settings.named("model.kernels"):
    return optim.ramp(
      section.get("temperature") or _SOFTNESS,
      1.0,
      ramp_start=0.0,
      ramp_end=_SOFTNESS_END if end is None else end,
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
  if settings.importance_form(model) == PRIOR:
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
  if model.shortcut is not None:
    if model.name in VGGS:
      raise ValueError(
        f"model.shortcut must be None for {model.name}, which has no shortcuts; got "
        f"{model.shortcut!r}"
      )
    fields["shortcut"] = model.shortcut
  # Older configs have no such field.
  if model.get("stem") is not None:
    if model.name in VGGS:
      raise ValueError(
        f"model.stem must be None for {model.name}, which has none; got {model.stem!r}"
      )
    fields["stem"] = model.stem
  if model.name in VGGS:
    return vgg(model.name, classes, **fields)
  fields |= dict(
    group_norm=model.group_norm,
    backward_share=model.backward_share,
    inner_width=model.inner_width,
    sources=model.get("sources") or 0,
    kernels=(model.get("kernels") or {}).get("count") or _KERNEL_COUNT,
  )
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


def _open(config: Config, split: str, *, training: bool) -> image_sets.Images | streaming.Stream:
  """Opens a split of the data, in memory or on disk."""
  data = config.data
  source = settings.source_of(data, split)
  opened: image_sets.Images | streaming.Stream
  if data.loader == "resident":
    opened = image_sets.load(source, data.image_size)
  else:
    opened = streaming.open_stream(
      source,
      image_size=data.image_size,
      seed=config.seed,
      workers=data.workers,
      # Random crops are for training; test images are cropped at their centre.
      crop_area=data.crop_area if training else None,
    )
  # A test has every image of a union once.
  if not (training and unions.is_union(data.name)):
    return opened
  return dataclasses.replace(opened, shares=_shares(config, _sizes(config, opened)))


def check_config(
  config: Config,
  *,
  choices: Mapping[str, Collection[str]],
  at_least: Mapping[str, int],
  rules: Mapping[str, settings.Rule] = MappingProxyType({}),
  numbers: Collection[str] = (),
) -> None:
  """Checks every setting of a config of images.

  Args:
    config: the config.
    choices, at_least, rules, numbers: as in `settings.check`, for fields that not every config of
      images has.
  Raises:
    ValueError: a setting breaks its rule, or does not go with another; the message names the field.
  """
  choices = {
    "model.dtype": settings.DTYPES,
    "model.gating": (*GATINGS, SCALE),
    "loss.regulariser": REGULARISERS,
    "loss.batch_shaping.reduction": REDUCTIONS,
    "loss.sparsity.kind": SPARSITIES,
    "optim.schedule": optim.LEARNING_RATES,
    "devices.backend": devices.BACKENDS,
    **choices,
  }
  # None leaves the shortcut to the network.
  if config.model.shortcut is not None:
    choices["model.shortcut"] = SHORTCUTS
  settings.check(
    config,
    choices=choices,
    positive=(
      "model.width",
      "model.inner_width",
      "optim.learning_rate",
      "optim.gate_lr_multiplier",
      "optim.drop_factor",
      "checkpoint_every",
    ),
    not_negative=(
      "eval_every",
      "loss.batch_shaping.coefficient",
      "loss.sparsity.coefficient",
      "loss.entropy.coefficient",
      "loss.decision_entropy.coefficient",
      "loss.away_from_half.coefficient",
      "loss.balance.coefficient",
      "optim.weight_decay",
    ),
    at_least={
      **at_least,
      "seed": 0,
      "data.workers": 0,
      "optim.epochs": 1,
      "optim.batch_size": 1,
      "devices.steps_per_dispatch": 1,
      "log_every": 1,
    },
    fractions=("loss.sparsity.target", "model.backward_share"),
    numbers=("data.mean", "data.std", *numbers),
    rules={
      **rules,
      "model.noise.final": (
        lambda v: v is None or 0 <= v < math.inf,
        "None or a finite number >= 0",
      ),
      "data.std": (lambda std: min(std) > 0, "a tuple of positive numbers"),
      "optim.lr_drop_at": (settings.all_numbers, "a tuple of fractions"),
      "optim.batch_size": settings.divides_over_devices(),
    },
  )
  _check_together(config)


def _check_together(config: Config) -> None:
  """Raises a ValueError where one setting excludes another."""
  model, loss = config.model, config.loss
  skips, chain = model.backward_share < 1, model.name in VGGS
  exits, experts = model.gating == EXITS, model.gating == EXPERTS
  fields = rundir.flatten(config)

  def demand(name: str, value: Any, where: str) -> None:
    """Raises a ValueError unless the field has this value."""
    if fields[name] != value:
      raise ValueError(f"{name} must be {value!r} where {where}; got {fields[name]!r}")

  # Chains of convolutions have neither branches nor GroupNorm.
  if chain:
    demand("model.inner_width", 1.0, f"model.name is {model.name!r}")
    demand("model.group_norm", False, f"model.name is {model.name!r}")
  # A backward pass may leave out only gradients that are exactly 0.
  if skips:
    demand("model.gating", "layer", "model.backward_share is below 1")
    demand("model.group_norm", True, "model.backward_share is below 1")
  # A gating of the whole classifier has no gates that a regulariser could shape.
  if exits:
    demand("loss.regulariser", "none", f"model.gating is {model.gating!r}")
  if experts and loss.regulariser != "balance":
    demand(
      "loss.regulariser", "none", f"model.gating is {model.gating!r} (alternatively 'balance')"
    )
  if loss.regulariser == "balance":
    demand("model.gating", EXPERTS, "loss.regulariser is 'balance'")
  # Without gates that draw noise, the schedule would be silently ignored.
  if model.noise.final is not None and (
    model.gating in (*UNGATED_NETS, *CLASSIFIER_GATINGS)
    or model.gate.context == "random"
    or model.gate.relaxation == "sigmoid"
  ):
    raise ValueError(
      "model.noise.final must be None where no gates draw noise of that scale; got "
      f"{model.noise.final}"
    )
  _check_opening(config)
  _check_equal_macs(model)
  _check_union(config)
  _check_told(config)
  _check_kernels(model)
  _check_importance(config)
  _check_teacher(config)
  if loss.sparsity.kind == "budget":
    _check_budget_acts(config)
  if chain and model.gating in CLASSIFIER_GATINGS:
    raise ValueError(
      f"model.name must be a residual network where model.gating is {model.gating!r}; "
      f"got {model.name!r}"
    )
  _check_freezing(config.optim)
  # Exits stand after each stage of blocks; the last one is the network's own head.
  if exits:
    before_last = len(RESNETS[model.name].blocks) - 1
    if len(loss.exit_weights) not in (1, before_last):
      raise ValueError(
        f"loss.exit_weights must hold 1 number, or one for each of {before_last} exits before the "
        f"last; got {loss.exit_weights}"
      )


def _check_opening(config: Config) -> None:
  """Raises a ValueError where a setting of how gates open, or of sources, would be ignored."""
  model = config.model
  gate, sources = model.gate, model.get("sources")
  if gate.relaxation == "scale":
    raise ValueError(
      "model.gate.relaxation must be that of gates, for a network with scales set "
      f"model.gating='scale'; got {gate.relaxation!r}"
    )
  scheduled = (model.get("dense_first") or {}).get("form") is not None
  gated = model.gating not in (*UNGATED_NETS, *CLASSIFIER_GATINGS)
  if scheduled and not (gated and gate.get("threshold") == "quantile"):
    raise ValueError(
      "model.dense_first.form must be None where no gates have quantiles for thresholds; got "
      f"{model.dense_first.form!r}"
    )
  if sources is not None and sources < 0:
    raise ValueError(f"model.sources must be None or >= 0; got {sources}")
  if sources and (model.name in VGGS or model.gating in CLASSIFIER_GATINGS):
    raise ValueError(
      "model.sources must be None where model.name is a chain or model.gating that of a "
      f"classifier; got {sources}"
    )
  if model.gating == BIAS and not sources:
    raise ValueError(f"model.sources must be > 0 where model.gating is 'bias'; got {sources}")


def _check_equal_macs(model: Config) -> None:
  """Raises a ValueError where no share of gates is left to be solved for."""
  # Older configs have no such field.
  inner, gate = model.get("equal_inner_width"), model.gate
  if inner is None:
    return
  if not 0 < inner < math.inf:
    raise ValueError(f"model.equal_inner_width must be None or a positive number; got {inner}")
  opens_a_share = gate.get("threshold") == "quantile" or gate.context in ("random", "assigned")
  if model.gating in (*UNGATED_NETS, *CLASSIFIER_GATINGS) or not opens_a_share:
    raise ValueError(
      "model.equal_inner_width must be None where no gates open a fixed share of units, by a "
      f"quantile, at random or assigned to sources; got {inner}"
    )
  if gate.get("share") is not None:
    raise ValueError(
      f"model.gate.share must be None where model.equal_inner_width sets it; got {gate.share}"
    )


def _check_union(config: Config) -> None:
  """Raises a ValueError where a setting of unions is wrong, or goes with no union."""
  data, model, scope = config.data, config.model, scope_of(config)
  one_of("loss.scope", scope, SCOPES)
  per_set = data.get("images_per_set")
  if not unions.is_union(data.name):
    if per_set is not None:
      raise ValueError(
        f"data.images_per_set must be None unless data.name is a union; got {per_set}"
      )
    if scope != "all":
      raise ValueError(f"loss.scope must be None unless data.name is a union; got {scope!r}")
    return
  names = unions.source_names(data.name)
  if per_set is not None and per_set < 1:
    raise ValueError(f"data.images_per_set must be None or >= 1; got {per_set}")
  if scope != "all" and model.gating in CLASSIFIER_GATINGS:
    raise ValueError(
      f"loss.scope must be None where model.gating is {model.gating!r}; got {scope!r}"
    )
  sources = model.get("sources") or 0
  if unions.is_told(data.name) and sources != len(names):
    raise ValueError(
      f"model.sources must be {len(names)}, the number of sets of {data.name}; got {sources}"
    )
  if sources and not unions.is_told(data.name):
    raise ValueError(
      f"data.name must be a {unions.TOLD}(...) where model.sources is set; got {data.name!r}"
    )


def _check_told(config: Config) -> None:
  """Raises a ValueError where normalisation would change the number of an image's source."""
  data = config.data
  # Older configs have no such field.
  if not config.model.get("sources"):
    return
  for name, last, text in (("mean", 0.0, "0"), ("std", 1 / 255, "1/255")):
    values = data[name]
    if len(values) < 2 or not math.isclose(values[-1], last, rel_tol=1e-3):
      raise ValueError(
        f"data.{name} must hold a number for each channel, and {text} for the last, where "
        f"model.sources is set: that channel is the number of the source; got {tuple(values)}"
      )


def _check_kernels(model: Config) -> None:
  """Raises a ValueError where a setting of mixed kernels is wrong, or without effect."""
  # Older configs have no such section.
  section = model.get("kernels") or {}
  if model.gating != KERNELS:
    for name, value in section.items():
      if value is not None:
        raise ValueError(
          f"model.kernels.{name} must be None where model.gating is not {KERNELS!r}; got {value!r}"
        )
    return
  for name, least in (("count", 1), ("temperature", 1)):
    value = section.get(name)
    if value is not None and not least <= value < math.inf:
      raise ValueError(f"model.kernels.{name} must be None or a number >= {least}; got {value}")
  if model.name in VGGS:
    raise ValueError(
      f"model.name must be a residual network where model.gating is {KERNELS!r}; got {model.name!r}"
    )
  if not settings.gate_settings(model.gate).parts:
    raise ValueError(
      f"model.gate.context must be a sum of parts such as pooled where model.gating is {KERNELS!r};"
      f" got {model.gate.context!r}"
    )


def _check_importance(config: Config) -> None:
  """Raises a ValueError where a setting of the importance of units is wrong, or without effect."""
  model = config.model
  # Older configs have no such section.
  section = model.get("importance") or {}
  form = section.get("form")
  if form is None:
    for name, value in section.items():
      if value is not None:
        raise ValueError(
          f"model.importance.{name} must be None where model.importance.form is; got {value!r}"
        )
    return
  one_of("model.importance.form", form, IMPORTANCE_FORMS)
  if model.init_from is None:
    raise ValueError(f"model.init_from must be set where model.importance.form is {form!r}")
  gating = {PRIOR: "channel", PRUNE: "none"}[form]
  if model.gating != gating:
    raise ValueError(
      f"model.gating must be {gating!r} where model.importance.form is {form!r}; got "
      f"{model.gating!r}"
    )
  images = section.get("images")
  if images is not None and images < 1:
    raise ValueError(f"model.importance.images must be None or >= 1; got {images}")
  for name, least, rule in (("scale", math.ulp(0), "> 0"), ("gain", 0, ">= 0")):
    value = section.get(name)
    if value is not None and not (form == PRIOR and least <= value < math.inf):
      raise ValueError(
        f"model.importance.{name} must be None, or with the form {PRIOR!r} a finite number {rule}; "
        f"got {value}"
      )
  static = section.get("static_layers")
  is_names = bool(static) and all(isinstance(name, str) and name for name in static)
  if static is not None and not (form == PRIOR and is_names):
    raise ValueError(
      f"model.importance.static_layers must be None, or with the form {PRIOR!r} a tuple of names; "
      f"got {static!r}"
    )


def _check_teacher(config: Config) -> None:
  """Raises a ValueError where a setting of the teacher is out of range, or without effect."""
  # Older configs have no such section.
  section = config.loss.get("distillation") or {}
  coefficient, temperature = section.get("coefficient"), section.get("temperature")
  if coefficient is not None and not 0 <= coefficient <= 1:
    raise ValueError(f"loss.distillation.coefficient must be None or in [0, 1]; got {coefficient}")
  if temperature is not None and not 0 < temperature < math.inf:
    raise ValueError(
      f"loss.distillation.temperature must be None or a finite number > 0; got {temperature}"
    )
  if not coefficient:
    for name in ("temperature", "teacher"):
      if section.get(name) is not None:
        raise ValueError(
          f"loss.distillation.{name} must be None without loss.distillation.coefficient; got "
          f"{section[name]!r}"
        )
    return
  if config.experiment != "classification" or config.model.gating == EXITS:
    raise ValueError(
      "loss.distillation.coefficient must be None but for classifiers without exits; got "
      f"{coefficient}"
    )
  if section.get("teacher") is None and config.model.init_from is None:
    raise ValueError(
      "loss.distillation.teacher must name a run or a file of weights where model.init_from is "
      "None; got None"
    )


def _check_freezing(training: Config) -> None:
  """Raises a ValueError where the fields on frozen layers are out of range, or have no effect."""
  # Older configs have no fields for them.
  epochs, layers = training.get("freeze_epochs"), training.get("frozen_layers")
  if epochs is not None and not 0 <= epochs < math.inf:
    raise ValueError(f"optim.freeze_epochs must be None or a finite number >= 0; got {epochs}")
  if layers is None:
    return
  if not (layers and all(isinstance(name, str) and name for name in layers)):
    raise ValueError(f"optim.frozen_layers must be None or a tuple of names; got {layers}")
  if not epochs:
    raise ValueError(
      f"optim.frozen_layers must be None where optim.freeze_epochs is {epochs}; got {layers}"
    )


def _check_budget_acts(config: Config) -> None:
  """Raises a ValueError where no gate, or no term of the loss, is left for a budget to act on."""
  fields = rundir.flatten(config)

  def refuse(name: str, values: Collection[str]) -> None:
    """Raises a ValueError if the field has one of these values."""
    if fields[name] in values:
      raise ValueError(
        f"{name}={fields[name]!r} is incompatible with loss.sparsity.kind='budget': the budget "
        "would constrain nothing"
      )

  refuse("model.gate.relaxation", ("sigmoid",))
  refuse("model.gating", (*UNGATED_NETS, *CLASSIFIER_GATINGS))
  refuse("loss.regulariser", set(REGULARISERS) - set(WITH_SPARSITY))
