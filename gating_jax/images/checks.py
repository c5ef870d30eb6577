"""Checks of the settings of images before data are opened, and the names that they allow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.data import unions
from gating_jax.layers.blocks import BIAS, GATINGS, KERNELS, SHORTCUTS
from gating_jax.models.resnets import RESNETS
from gating_jax.models.vggs import VGGS
from gating_jax.programmes import UNGATED_NETS
from gating_jax.training import devices, optim, rundir, settings
from gating_jax.training.objectives import (
  REDUCTIONS,
  REGULARISERS,
  SCOPES,
  SPARSITIES,
  WITH_SPARSITY,
)

# Gatings of whole classifiers, which exclude gates of units and their settings.
EXITS, EXPERTS = CLASSIFIER_GATINGS = ("exits", "experts")
# Squeeze-and-excitation: an ungated network that scales its channels.
SCALE = "scale"
# Values of `model.importance.form`: gates begin with the importance of a trained network's units,
# or the network is pruned by it.
PRIOR, PRUNE = IMPORTANCE_FORMS = ("prior", "prune")


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
      "data.workers": (lambda v: v is None or v >= 0, "None or >= 0"),
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
  _check_importance(model)
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
  gate, sources = model.gate, model.sources
  if gate.relaxation == "scale":
    raise ValueError(
      "model.gate.relaxation must be that of gates, for a network with scales set "
      f"model.gating='scale'; got {gate.relaxation!r}"
    )
  gated = model.gating not in (*UNGATED_NETS, *CLASSIFIER_GATINGS)
  if model.dense_first.form is not None and not (gated and gate.threshold == "quantile"):
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
  """Raises a ValueError where no fraction of gates is left to be solved for."""
  inner, gate = model.equal_inner_width, model.gate
  if inner is None:
    return
  if not 0 < inner < math.inf:
    raise ValueError(f"model.equal_inner_width must be None or a positive number; got {inner}")
  opens_a_share = gate.threshold == "quantile" or gate.context in ("random", "assigned")
  if model.gating in (*UNGATED_NETS, *CLASSIFIER_GATINGS) or not opens_a_share:
    raise ValueError(
      "model.equal_inner_width must be None where no gates open a fixed fraction of units, by a "
      f"quantile, at random or assigned to sources; got {inner}"
    )
  if gate.share is not None:
    raise ValueError(
      f"model.gate.share must be None where model.equal_inner_width sets it; got {gate.share}"
    )


def _check_union(config: Config) -> None:
  """Raises a ValueError where a setting of unions is wrong, or goes with no union."""
  data, model, scope = config.data, config.model, config.loss.scope or "all"
  one_of("loss.scope", scope, SCOPES)
  # Scenes have no such field.
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
  sources = model.sources or 0
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
  if not config.model.sources:
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
  if model.gating != KERNELS:
    _demand_none("model.kernels", model.kernels, f"where model.gating is not {KERNELS!r}")
    return
  for name in ("count", "temperature"):
    value = model.kernels[name]
    if value is not None and not 1 <= value < math.inf:
      raise ValueError(f"model.kernels.{name} must be None or a number >= 1; got {value}")
  if model.name in VGGS:
    raise ValueError(
      f"model.name must be a residual network where model.gating is {KERNELS!r}; got {model.name!r}"
    )
  if not settings.gate_settings(model.gate).parts:
    raise ValueError(
      f"model.gate.context must be a sum of parts such as pooled where model.gating is {KERNELS!r};"
      f" got {model.gate.context!r}"
    )


def _check_importance(model: Config) -> None:
  """Raises a ValueError where a setting of the importance of units is wrong, or without effect."""
  section = model.importance
  form = section.form
  if form is None:
    _demand_none("model.importance", section, "where model.importance.form is")
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
  images = section.images
  if images is not None and images < 1:
    raise ValueError(f"model.importance.images must be None or >= 1; got {images}")
  for name, least, rule in (("scale", math.ulp(0), "> 0"), ("gain", 0, ">= 0")):
    value = section[name]
    if value is not None and not (form == PRIOR and least <= value < math.inf):
      raise ValueError(
        f"model.importance.{name} must be None, or with the form {PRIOR!r} a finite number {rule}; "
        f"got {value}"
      )
  static = section.static_layers
  is_names = bool(static) and all(isinstance(name, str) and name for name in static)
  if static is not None and not (form == PRIOR and is_names):
    raise ValueError(
      f"model.importance.static_layers must be None, or with the form {PRIOR!r} a tuple of names; "
      f"got {static!r}"
    )


def _check_teacher(config: Config) -> None:
  """Raises a ValueError where a setting of the teacher is out of range, or without effect."""
  section = config.loss.distillation
  coefficient, temperature = section.coefficient, section.temperature
  if coefficient is not None and not 0 <= coefficient <= 1:
    raise ValueError(f"loss.distillation.coefficient must be None or in [0, 1]; got {coefficient}")
  if temperature is not None and not 0 < temperature < math.inf:
    raise ValueError(
      f"loss.distillation.temperature must be None or a finite number > 0; got {temperature}"
    )
  if not coefficient:
    others = {"temperature": temperature, "teacher": section.teacher}
    _demand_none("loss.distillation", others, "without loss.distillation.coefficient")
    return
  if config.experiment != "classification" or config.model.gating == EXITS:
    raise ValueError(
      "loss.distillation.coefficient must be None except for classifiers without exits; got "
      f"{coefficient}"
    )
  if section.teacher is None and config.model.init_from is None:
    raise ValueError(
      "loss.distillation.teacher must name a run or a file of weights where model.init_from is "
      "None; got None"
    )


def _demand_none(section: str, fields: Mapping[str, Any] | Config, where: str) -> None:
  """Raises a ValueError unless the fields of a section are None, `where` they have no effect."""
  for name, value in fields.items():
    if value is not None:
      raise ValueError(f"{section}.{name} must be None {where}; got {value!r}")


def _check_freezing(training: Config) -> None:
  """Raises a ValueError where the fields on frozen layers are out of range, or have no effect."""
  epochs, layers = training.freeze_epochs, training.frozen_layers
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
