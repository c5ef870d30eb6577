"""The parts of an experiment on long videos, built from a config.

Every setting is checked before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from gating_jax.checks import one_of
from gating_jax.config_files import Config, completed
from gating_jax.data import composed
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.layers.blocks import BIAS, GATINGS, KERNELS
from gating_jax.layers.segment_gate import (
  CONCEPTS,
  SEGMENT_CONTEXTS,
  SEGMENT_RELAXATIONS,
  SegmentGateSettings,
)
from gating_jax.models.summary import VideoCounts, video_summary
from gating_jax.models.timegate import POOLINGS, SELECTIONS, SegmentClassifier, SegmentNet
from gating_jax.models.video_backbones import (
  HEAVY_NETS,
  LIGHT_NETS,
  FeaturePool,
  heavy_net,
  light_net,
)
from gating_jax.ops import selection
from gating_jax.training import devices, loop, optim, rundir, settings
from gating_jax.training.objectives import (
  REDUCTIONS,
  SPARSITIES,
  GatePenalties,
  ImageObjective,
  check_budget,
)
from gating_jax.training.outlines import Outline
from gating_jax.video import sets
from gating_jax.video.objectives import (
  SCOPES,
  SEGMENT_SPARSITIES,
  SET,
  SegmentObjective,
  VideoObjective,
)

TRAININGS = ("two_stage", "end_to_end")
TARGETS = ("units", "label")
# Selections that take a known number of segments.
COUNTED = ("uniform", "random", "oracle", "confidence")
# The selection by which the light net takes the heavy one's place, and sees every segment.
LIGHT = "light"


@dataclasses.dataclass(frozen=True)
class Phase:
  """One training: a model, its objective and its length.

  Attributes:
    name: its name.
    model: the network that is trained.
    optimiser, objective: they update and score it.
    prepare: `(key, inputs)` to the inputs of the model.
    shapes: shapes of a video's inputs, by name.
    batch_size: videos of a step.
    settings: settings of the training loop.
    full: the model with the backward pass of everything, where its own may hold too little; else
      None.
  """

  name: str
  model: nn.Module
  optimiser: optax.GradientTransformation
  objective: Callable
  prepare: Callable[[jax.Array, Mapping[str, jax.Array]], Mapping[str, jax.Array]]
  shapes: Any
  batch_size: int
  settings: loop.LoopSettings
  full: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class VideoExperiment:
  """The experiment that a config describes.

  Attributes:
    config: the config.
    train, test: sets of videos.
    model: the whole network.
    counts: its multiply-accumulates.
    reference: those of the heavy net on all segments and the classifier alone; budgets are
      fractions of it.
    shapes: shapes of a video's inputs, by name.
    pretraining: trains both nets as classifiers of single segments; None without.
    training: trains the gate and the classifier: with the nets if `end_to_end`, on their features
      if `two_stage`.
    validation: videos that are held out of training; None without.
  """

  config: Config
  train: VideoArrays | VideoSet
  test: VideoArrays | VideoSet
  model: SegmentNet
  counts: VideoCounts
  reference: VideoCounts
  shapes: Mapping[str, tuple[int, ...]]
  pretraining: Phase | None
  training: Phase
  validation: VideoArrays | VideoSet | None = None

  @functools.cached_property
  def programs(self) -> dict[str, Callable]:
    """Returns the compiled functions of the experiment by name, for `evaluate.compute_over`."""
    return {}

  def prepare(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Converts a batch's arrays to the inputs of the whole network."""
    return sets.network_inputs(inputs, self.config.data, heavy_from=self.heavy_from)

  @property
  def heavy_from(self) -> str:
    """Returns which net, `light` or `heavy`, has the heavy one's place in the network."""
    return heavy_from(self.config.model)


def build(config: Config, outlines: Sequence[Outline] | None = None) -> VideoExperiment:
  """Checks every setting, then opens the data.

  Args:
    config: the config of a run on long videos.
    outlines: of the training and the test set, in place of opening them.
  Raises:
    ValueError: a setting is wrong, or does not fit the data; the message names the field.
  """
  config = completed(config)
  # Settings first: sets may take minutes to open.
  _check(config)
  train: Any
  test: Any
  validation = None
  if outlines:
    # An outline has what is asked of a set here.
    train, test = outlines[0], outlines[-1]
  else:
    train, test = sets.open_set(config, "train"), sets.open_set(config, "test")
    if sets.holds_out(config.data):
      validation = sets.open_set(config, "validation")
  _check_data(config, train)
  source = heavy_from(config.model)
  shapes = sets.network_shapes(train, config.data, heavy_from=source)
  model = _segment_net(config, len(train.class_names))
  # Features come with the cost of the nets that made them: the config has it.
  feature_macs = (
    0 if model.light is None else config.data.light_macs,
    config.data[f"{source}_macs"],
  )
  counts = video_summary(model, shapes, precomputed=feature_macs)
  # The cost of a segment is known only once the heavy net is counted.
  model = model.clone(macs_per_segment=counts.heavy.macs)
  # The baseline of all ratios: every segment by the heavy net, no light net and no gate.
  dense = model.clone(selection="all", light=None, light_head=False, heavy=nets(config)[1])
  reference = video_summary(
    dense, sets.network_shapes(train, config.data), precomputed=(0, config.data.heavy_macs)
  )
  # The heavy net itself, also where the light net takes its place and `counts` are of that.
  check_budget("loss.channels.sparsity", config.loss.channels.sparsity, reference.heavy)
  return VideoExperiment(
    config=config,
    train=train,
    test=test,
    model=model,
    counts=counts,
    reference=reference,
    shapes=shapes,
    pretraining=_pretraining(config, train, counts),
    training=_training(config, train, model=model, counts=counts, shapes=shapes),
    validation=validation,
  )


def heavy_from(model: Config) -> str:
  """Returns which net, `light` or `heavy`, has the heavy one's place in the network."""
  return "light" if model.selection == LIGHT else "heavy"


def nets(config: Config) -> tuple[nn.Module, nn.Module]:
  """Builds the light and the heavy net."""
  light, heavy, dtype = config.model.light, config.model.heavy, settings.DTYPES[config.model.dtype]
  gate = settings.gate_settings(heavy.gate) if heavy.gating != "none" else None
  return (
    light_net(light.name, width=light.width, dtype=dtype, axis_name=devices.AXIS),
    heavy_net(
      heavy.name,
      width=heavy.width,
      stem=heavy.stem,
      gating=heavy.gating,
      gate=gate,
      group_norm=heavy.group_norm,
      dtype=dtype,
      axis_name=devices.AXIS,
    ),
  )


def _segment_net(config: Config, classes: int) -> SegmentNet:
  model, gate = config.model, config.model.gate
  light, heavy = nets(config)
  select, light_head = model.selection, config.loss.light > 0
  # In the heavy net's place, the light net is the only one, and sees every segment.
  if heavy_from(model) == "light":
    heavy, select, light_head = light, "all", False
  # The light net runs only where something reads it: the gate, its confidence or its own loss.
  asked = light_head or select in ("gate", "confidence")
  return SegmentNet(
    classes=classes,
    light=light if asked else None,
    heavy=heavy,
    selection=select,
    share=model.segment_fraction,
    light_head=light_head,
    pooling=model.pooling,
    axis_name=devices.AXIS,
    gate=SegmentGateSettings(
      concepts=gate.concepts,
      context=gate.context,
      relaxation=gate.relaxation,
      hidden=gate.hidden,
      initial_open=gate.initial_open,
      temperature=gate.temperature,
      noise_scale=gate.noise_scale,
    ),
  )


def _pretraining(config: Config, train: Any, counts: VideoCounts) -> Phase | None:
  pretrain = config.pretrain
  if not pretrain.epochs:
    return None
  # One class more for segments without a unit action.
  targets = len(train.unit_names) + 1 if pretrain.target == "units" else len(train.class_names)
  light, heavy = nets(config)
  loops = _loop(config, train, "pretrain")
  total = loops.total_steps
  shapes = sets.network_shapes(train, config.data)

  def prepare(key, inputs):
    """Picks segments of each video `[B, T, ...]`, and returns both nets' inputs `[B * S, ...]`."""
    picked = sets.pick_segments(key, inputs, pretrain.segments_per_video, axis_name=devices.AXIS)
    picked = sets.augment_clips(key, picked, config.data, axis_name=devices.AXIS)
    return sets.network_inputs(picked, config.data)

  return Phase(
    name="pretrain",
    model=SegmentClassifier(targets, light, heavy),
    optimiser=optim.adam(
      optim.learning_rate("cosine", pretrain.learning_rate, total, warmup=0.05),
      weight_decay=pretrain.weight_decay,
    ),
    objective=SegmentObjective(
      target=pretrain.target,
      targets=targets,
      multi_label=train.multi_label,
      channels=_channels(config, counts, total),
    ),
    prepare=prepare,
    # A picked segment is an example of its own: the axis of segments goes.
    shapes={"light": shapes["light"][1:], "heavy": shapes["heavy"][1:]},
    batch_size=pretrain.batch_size,
    settings=loops,
  )


def _training(
  config: Config,
  train: Any,
  *,
  model: SegmentNet,
  counts: VideoCounts,
  shapes: Mapping[str, Any],
) -> Phase:
  loops = _loop(config, train, "optim")
  full = None
  # `two_stage` trains on features, so both nets become a pooling of these.
  if config.training == "two_stage":
    shapes = sets.feature_shapes(model, shapes)
    light = None if model.light is None else FeaturePool()
    model = model.clone(light=light, heavy=FeaturePool())
  elif config.model.skip_backward:
    # A gate may choose more than the capacity: such a step runs the full backward pass.
    full = model if model.selection == "gate" else None
    model = model.clone(backward_capacity=_backward_capacity(config, model, counts.segments))

  def prepare(key, inputs):
    """Returns inputs `[B, T, ...]` of the network, the videos' own or their features."""
    if config.training == "two_stage":
      return inputs
    inputs = sets.augment_clips(key, inputs, config.data, axis_name=devices.AXIS)
    return sets.network_inputs(inputs, config.data, heavy_from=heavy_from(config.model))

  return Phase(
    name="train",
    model=model,
    full=full,
    optimiser=_optimiser(config, loops.total_steps),
    objective=VideoObjective.from_config(
      config.loss,
      loops.total_steps,
      multi_label=train.multi_label,
      gated=model.selection == "gate",
      channels=_channels(config, counts, loops.total_steps),
      scope=config.budget.scope or SET,
    ),
    prepare=prepare,
    shapes=shapes,
    batch_size=config.optim.batch_size,
    settings=loops,
  )


def _backward_capacity(config: Config, model: SegmentNet, segments: int) -> int:
  """Returns the largest number of segments on a device that have a backward pass."""
  videos = config.optim.batch_size // jax.device_count()
  if model.selection == "gate":
    return math.ceil(config.model.backward_share * videos * segments)
  # Other selections take the same number of segments of every full-length video, at most.
  full_length = np.ones((1, segments), bool)
  return videos * int(selection.budget_to_k(full_length, share=model.share)[0])


def _optimiser(config: Config, total: int) -> optax.GradientTransformation:
  """Builds the optimiser of the training after the pretraining, of `total` steps."""
  training, rate = config.optim, optim.configured_rate(config.optim, total)
  if training.kind == "adam":
    optimiser = optim.adam(rate, weight_decay=training.weight_decay)
  else:
    optimiser = optim.sgd(rate, momentum=training.momentum, weight_decay=training.weight_decay)
  # Concepts are found by clustering, and stay as they are unless the config trains them.
  if config.model.gate.trained_concepts:
    return optimiser
  return optim.frozen(optimiser, lambda path: CONCEPTS in path)


def _channels(config: Config, counts: VideoCounts, total: int) -> ImageObjective:
  """Builds the penalties of the heavy net's channel gates."""
  channels = config.loss.channels
  return ImageObjective.from_config(
    channels,
    GatePenalties.from_config(channels, total),
    never_gated_macs=counts.heavy.never_gated_macs,
  )


def _loop(config: Config, train: Any, name: str) -> loop.LoopSettings:
  """Returns the loop's settings of the phase that the section `name` of the config describes."""
  phase = config[name]
  if phase.batch_size > len(train):
    raise ValueError(
      f"{name}.batch_size must be at most {len(train)}, the number of training videos; "
      f"got {phase.batch_size}"
    )
  # Whole batches only: all of them have one shape.
  per_epoch = len(train) // phase.batch_size
  return loop.LoopSettings.from_config(config, epochs=phase.epochs, steps_per_epoch=per_epoch)


def _check(config: Config) -> None:
  """Raises a ValueError where a setting breaks its rule; the message names the field."""
  _check_model(config)
  _check_cache(config.data)
  _check_augmentation(config.data)
  _check_skipped_backward(config)
  _check_sets(config)
  _check_held_out(config)
  _check_training(config)
  _check_together(config)


def _check_model(config: Config) -> None:
  """Checks the settings of the networks."""
  settings.check(
    config,
    choices={
      "model.selection": (*SELECTIONS, LIGHT),
      "model.light.name": LIGHT_NETS,
      "model.heavy.name": HEAVY_NETS,
      # Videos have no sources, and kernels of clips are not mixed.
      "model.heavy.gating": [gating for gating in GATINGS if gating not in (BIAS, KERNELS)],
      "model.pooling": POOLINGS,
      "model.dtype": settings.DTYPES,
      "model.gate.context": SEGMENT_CONTEXTS,
      "model.gate.relaxation": SEGMENT_RELAXATIONS,
    },
    positive=("model.light.width", "model.heavy.width"),
    at_least={},
    fractions=("model.segment_fraction", "model.backward_share"),
    rules={},
  )


def _check_sets(config: Config) -> None:
  """Checks the settings of the data, before any are opened."""
  settings.check(
    config,
    choices={"data.name": sets.SETS, "data.layout": sets.LAYOUTS},
    at_least={
      "data.segments": 1,
      "data.frames": 1,
      "data.size": 1,
      "data.train_videos": 1,
      "data.test_videos": 1,
      "data.workers": 0,
      "data.light_macs": 0,
      "data.heavy_macs": 0,
    },
    numbers=("data.mean", "data.std"),
    rules={"data.std": (lambda std: min(std) > 0, "a tuple of positive numbers")},
  )


def _check_cache(data: Config) -> None:
  """Checks the settings of the cache of frames."""
  if data.cache and data.name != "videos":
    raise ValueError(
      f"data.cache must be None unless data.name is 'videos', which are decoded; got {data.cache!r}"
    )
  gigabytes = data.cache_gb
  if gigabytes is not None and not 0 < gigabytes < math.inf:
    raise ValueError(f"data.cache_gb must be a positive finite number or None; got {gigabytes}")


def _check_augmentation(data: Config) -> None:
  """Checks the settings of the augmentation, each of which may be None."""
  pad, colour = data.crop_padding, data.colour
  if pad is not None and pad < 0:
    raise ValueError(f"data.crop_padding must be >= 0 or None; got {pad}")
  if colour is not None and not 0 <= colour < 1:
    raise ValueError(f"data.colour must be in [0, 1) or None; got {colour}")
  if data.name == "features" and (pad or colour or data.flip):
    raise ValueError(
      "data.crop_padding, data.flip and data.colour must be None for 'features', which have no "
      f"pixels; got {pad}, {data.flip}, {colour}"
    )


def _check_held_out(config: Config) -> None:
  """Checks the settings of the videos that are held out, and of the budget that is set on them."""
  data = config.data
  fraction, split = data.validation, data.validation_split
  if fraction is not None and not 0 < fraction < 1:
    raise ValueError(f"data.validation must be a fraction in (0, 1) or None; got {fraction}")
  if split is not None:
    got = f"got {split!r}"
    if fraction is not None:
      raise ValueError(
        f"data.validation_split must be None if data.validation is {fraction}; {got}"
      )
    # The published sets have splits of their own, without one for validation.
    if data.name == composed.NAME or data.layout != "csv":
      raise ValueError(
        f"data.validation_split must be None unless splits are files, as in layout 'csv'; {got}"
      )
  if config.budget.scope is not None:
    one_of("budget.scope", config.budget.scope, SCOPES)


def _check_training(config: Config) -> None:
  """Checks the settings of both trainings, and of their losses."""
  rules = {
    "optim.lr_drop_at": (settings.all_numbers, "a tuple of fractions"),
    "optim.batch_size": settings.divides_over_devices(),
  }
  if config.pretrain.epochs:
    rules["pretrain.batch_size"] = settings.divides_over_devices()
  settings.check(
    config,
    choices={
      "training": TRAININGS,
      "pretrain.target": TARGETS,
      "loss.sparsity.kind": SEGMENT_SPARSITIES,
      "loss.channels.batch_shaping.reduction": REDUCTIONS,
      "loss.channels.sparsity.kind": SPARSITIES,
      "optim.kind": ("adam", "sgd"),
      "optim.schedule": optim.LEARNING_RATES,
      "devices.backend": devices.BACKENDS,
    },
    positive=(
      "optim.learning_rate",
      "pretrain.learning_rate",
      "optim.drop_factor",
      "checkpoint_every",
    ),
    not_negative=(
      "eval_every",
      "loss.light",
      "loss.sparsity.coefficient",
      "loss.batch_shaping.coefficient",
      "loss.channels.sparsity.coefficient",
      "loss.channels.batch_shaping.coefficient",
      "optim.weight_decay",
      "pretrain.weight_decay",
    ),
    at_least={
      "seed": 0,
      "pretrain.epochs": 0,
      "pretrain.segments_per_video": 1,
      "pretrain.batch_size": 1,
      "optim.epochs": 1,
      "optim.batch_size": 1,
      "devices.steps_per_dispatch": 1,
      "log_every": 1,
    },
    fractions=("loss.sparsity.target", "loss.channels.sparsity.target"),
    rules=rules,
  )


def _check_data(config: Config, train: Any) -> None:
  """Raises a ValueError where the training set lacks what a setting needs."""
  if config.model.selection == "oracle" and "relevant" not in train.shapes:
    raise ValueError(
      "model.selection must not be 'oracle': the data do not mark the relevant segments"
    )
  if config.pretrain.epochs and config.pretrain.target == "units" and "units" not in train.shapes:
    raise ValueError("pretrain.target must be 'label': the data have no unit actions; got 'units'")


def _check_together(config: Config) -> None:
  """Raises a ValueError where one setting needs another."""
  if config.model.selection == "confidence" and not config.loss.light:
    raise ValueError(
      "loss.light must be > 0 if model.selection is 'confidence', which reads the light head; "
      "got 0.0"
    )
  # Trained nets are missing unless the inputs are features, which have no net to train.
  named = {config.model.light.name, config.model.heavy.name}
  if not config.pretrain.epochs and (
    config.pretrained or config.training == "two_stage" and named != {"features"}
  ):
    raise ValueError(
      "pretrain.epochs must be >= 1 if training is 'two_stage' or pretrained is set; got 0"
    )
  # As for images: a budget of channels needs gates to act on.
  if config.loss.channels.sparsity.kind == "budget" and config.model.heavy.gating == "none":
    raise ValueError(
      "model.heavy.gating='none' is incompatible with loss.channels.sparsity.kind='budget': the "
      "budget would constrain nothing"
    )


def _check_skipped_backward(config: Config) -> None:
  """Checks that skipping the backward pass leaves every gradient as it is.

  A gradient is skipped only where it is exactly 0. The number of the other segments must be known,
  since it sets a shape.
  """
  model = config.model
  if not model.skip_backward:
    return
  fields = rundir.flatten(config)

  def demand(name: str, holds: bool, rule: str) -> None:
    """Raises a ValueError that names the field and its rule, unless that holds."""
    if not holds:
      raise ValueError(f"{name} must be {rule} if model.skip_backward is set; got {fields[name]!r}")

  gated = model.selection == "gate"
  counted = f"one of {', '.join(COUNTED)}, gate"
  demand("training", config.training == "end_to_end", "'end_to_end'")
  demand("model.selection", gated or model.selection in COUNTED, counted)
  # BatchNorm would mix segments that have a backward pass with those that have none.
  demand("model.heavy.group_norm", model.heavy.group_norm, "True")
  demand("model.backward_share", not gated or model.backward_share < 1, "< 1")
  demand("model.heavy.gating", model.heavy.gating == "none", "'none'")
