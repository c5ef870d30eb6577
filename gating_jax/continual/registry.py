"""Registry of the methods of continual learning, and of rehearsals: a builder for each name.

A builder, `(config, problem) -> ` the method or rehearsal, reads its sections of the config and
builds the networks that it needs. docs/extend/continual_method.md says how to add a method.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn

from gating_jax.config_files import Config
from gating_jax.continual.generators import protections
from gating_jax.continual.generators.shared import shared_generative
from gating_jax.continual.generators.wgan import WganSettings
from gating_jax.continual.method import Method, Network, Problem
from gating_jax.continual.methods import icarl, replay
from gating_jax.continual.methods.dgm import dgm
from gating_jax.continual.methods.hat import hat
from gating_jax.continual.methods.importance import ewc, online_ewc, si
from gating_jax.continual.methods.lwf import fine_tuning, lwf
from gating_jax.continual.methods.multitask import multitask_gates, multitask_norms, multitask_trunk
from gating_jax.continual.methods.progressive import progressive
from gating_jax.continual.methods.task_gates import TaskGatesSettings, task_gates
from gating_jax.continual.rehearsal import episodic, generative
from gating_jax.continual.replay_memory import ReplaySettings
from gating_jax.continual.task_inference import TaskClassifierSettings
from gating_jax.continual.units import ProtectionSettings
from gating_jax.layers.gate import GateSettings
from gating_jax.models.columns import column
from gating_jax.models.generator import Generator
from gating_jax.models.resnets import resnet
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import VGGS, vgg
from gating_jax.training import settings


def build_method(config: Config, problem: Problem) -> Method:
  """Builds the method that the config names.

  Args:
    config: of the experiment.
    problem: the learning problem.
  Raises:
    ValueError: a setting breaks its rule; the message names the method.
  """
  try:
    return METHODS[config.method](config, problem)
  # A message names a setting; several methods have settings of the same name.
  except ValueError as error:
    raise ValueError(f"method {config.method}: {error}") from error


def _task_gates(config, problem):
  """Builds task-gated networks, with the task classifier that the config asks for."""
  gates = _from_section(TaskGatesSettings, config, "gates")
  # Layers that grow have their last width from the start: shapes never change.
  model = build_network(
    config, problem, classes=None, gated=True, wider=gates.allocated(problem.tasks)
  )
  rehearsal = REHEARSALS[config.router.rehearsal](config, problem)
  network = _classifier(config, problem, "seen") if config.router.network else None
  # The section holds the choice of the classifier too.
  classifier_settings = _from_section(
    TaskClassifierSettings, config, "router", without=("rehearsal", "network", "distillation")
  )
  return task_gates(
    model,
    problem,
    model_summary(model, problem.shape),
    settings=gates,
    rehearsal=rehearsal,
    classifier_settings=classifier_settings,
    network=network,
    distillation=config.router.distillation,
  )


def _no_rehearsal(config, problem):
  """Returns None: no task classifier is trained."""


def _episodic(config, problem):
  """Builds a rehearsal by stored images."""
  return episodic(problem, _from_section(ReplaySettings, config, "replay"))


def _generative(config, problem):
  """Builds a rehearsal by one generator per task."""
  fields, wgan = config.generator, _wgan(config)
  with settings.named("generator"):
    return generative(
      problem,
      wgan,
      images=fields.images,
      replayed=config.replay.batch_size,
      latent=fields.latent,
      width=fields.width,
      seed=config.seed,
    )


def _gated_generative(config, problem):
  """Builds a rehearsal by one generator, whose filters are frozen task by task."""
  fields, gate = dict(config.generator.gates), {}
  # The section holds settings of the gates and of their protection.
  for name in ("initial_open", "noise_scale"):
    gate[name] = fields.pop(name)
  with settings.named("generator.gates"):
    generator = _generator(config, problem, settings.gate_settings(config.model.gate, **gate))
    protection = protections.gated(generator, problem.tasks, ProtectionSettings(**fields))
  return _shared_generative(config, problem, generator=generator, protection=protection)


def _masked_generative(config, problem):
  """Builds a rehearsal by one generator with HAT's masks."""
  # HAT's masks are gates without an input: one parameter per unit.
  generator = _generator(config, problem, GateSettings(context="none", relaxation="sigmoid"))
  with settings.named("dgm"):
    protection = protections.masked(
      generator,
      problem.tasks,
      steps=config.generator.steps,
      steepness=config.dgm.steepness,
      sparsity=config.dgm.sparsity,
    )
  return _shared_generative(config, problem, generator=generator, protection=protection)


def _dgm(config, problem):
  """Builds DGM: a classifier and a masked generator."""
  # Replay shows all classes so far, so all of them compete.
  net, rehearsal = _classifier(config, problem, "seen"), _masked_generative(config, problem)
  with settings.named("dgm"):
    return dgm(net, rehearsal, real_weight=config.dgm.real_weight)


def _from_section(make, config, section, *args, without=()):
  """Calls `make(*args, **config[section])`, without some of the section's fields."""
  # The optimiser clips, not the method.
  left_out = {*without, "grad_clip_norm"}
  fields = {name: value for name, value in config[section].items() if name not in left_out}
  with settings.named(section):
    return make(*args, **fields)


def _wgan(config):
  """Reads the settings of a generator's training."""
  fields = config.generator
  with settings.named("generator"):
    return WganSettings(
      critic_steps=fields.critic_steps,
      penalty=fields.penalty,
      learning_rate=fields.learning_rate,
      ema_decay=fields.ema_decay,
    )


def _generator(config, problem, gate):
  """Builds one generator for all tasks."""
  fields = config.generator
  # Labels are the classes within a task; the task's own gates and pixel layer say which task.
  return Generator(
    problem.shape,
    latent=fields.latent,
    width=fields.width,
    classes=problem.classes,
    gating="channel",
    gate=gate,
    axis_name=problem.axis_name,
  )


def _shared_generative(config, problem, *, generator, protection):
  """Builds a rehearsal by one generator, for a protection."""
  wgan = _wgan(config)
  with settings.named("generator"):
    return shared_generative(
      problem,
      generator,
      settings=wgan,
      protection=protection,
      images=config.generator.images,
      replayed=config.replay.batch_size,
      seed=config.seed,
    )


def _hat(config, problem):
  """Builds HAT, on a network whose gates are its masks."""
  # HAT's masks are gates without an input: one parameter per unit.
  model = build_network(
    config, problem, classes=None, gated=True, context="none", relaxation="sigmoid"
  )
  counts = model_summary(model, problem.shape)
  return _from_section(hat, config, "hat", model, problem, counts)


def _progressive(config, problem):
  """Builds progressive networks, a column per task."""
  model = config.model
  _check_norm(model)
  # The images are small, hence the stem for CIFAR.
  kind = dict(norm=model.norm) if model.name in VGGS else dict(stem="cifar")
  return progressive(
    column(
      model.name,
      problem.classes,
      width=model.width,
      dtype=settings.DTYPES[model.dtype],
      axis_name=problem.axis_name,
      alpha=config.progressive.alpha,
      **kind,
    ),
    problem,
  )


def _multitask_gates(config, problem):
  """Builds multi-task learning with gates, BatchNorm and head per task."""
  model = build_network(config, problem, classes=None, gated=True)
  gates = _from_section(TaskGatesSettings, config, "gates")
  return multitask_gates(model, problem, model_summary(model, problem.shape), settings=gates)


def _multitask_norms(config, problem):
  """Builds multi-task learning with BatchNorm and head per task."""
  model = build_network(config, problem, classes=None, gated=False)
  return multitask_norms(model, problem, model_summary(model, problem.shape))


def _plain(make, *, scope="own", section=None, memory=False):
  """Makes the builder of a method that trains one ungated network of all classes.

  Args:
    make: the method, of a network and the settings below.
    scope: classes that compete in the cross-entropy, as in `Network`.
    section: of the config with the method's settings; None for a method without any.
    memory: whether the method has a replay memory.
  """

  def build(config, problem):
    """Builds the method that a config describes, for a problem."""
    given: list[Any] = [_classifier(config, problem, scope)]
    if memory:
      given.append(_from_section(ReplaySettings, config, "replay"))
    return _from_section(make, config, section, *given) if section else make(*given)

  return build


def _classifier(config, problem, scope):
  """Builds an ungated network with an output for every class."""
  # Outputs for classes to come are there from the start: shapes never change.
  model = build_network(config, problem, classes=problem.all_classes, gated=False)
  return Network(model, problem, model_summary(model, problem.shape).macs, scope=scope)


def _icarl(config, problem):
  """Builds iCaRL, on a network with a head that is for training only."""
  # iCaRL needs the features, and the head for its training.
  body = build_network(config, problem, classes=None, gated=False)
  model = icarl.Headed(body, problem.all_classes)
  # The loss of iCaRL is its own: the scope is not read.
  net = Network(model, problem, model_summary(model, problem.shape).macs, scope="seen")
  return icarl.icarl(net, _from_section(ReplaySettings, config, "replay"))


def build_network(
  config: Config,
  problem: Problem,
  *,
  classes: int | None,
  gated: bool,
  wider: float = 1.0,
  **gate,
) -> nn.Module:
  """Builds the network of the config.

  Args:
    config: of the experiment.
    problem: the learning problem.
    classes: outputs; None for a network that ends at its features.
    gated: whether it has gates.
    wider: factor on the config's width.
    **gate: additions to the config's gate settings.
  """
  model = config.model
  _check_norm(model)
  fields = dict(
    width=model.width * wider,
    dtype=settings.DTYPES[model.dtype],
    axis_name=problem.axis_name,
    gate=settings.gate_settings(model.gate, **gate),
  )
  if model.name in VGGS:
    gating = "channel" if gated else "none"
    return vgg(model.name, classes, norm=model.norm, gating=gating, **fields)
  # `all_channels` also gates the outputs of a block: without that a task would own none of them.
  gating = "all_channels" if gated else "none"
  return resnet(model.name, classes, stem="cifar", gating=gating, **fields)


def gradient_clip(config: Config) -> float:
  """Returns the largest norm of the gradient: that of the method's section, else that of `optim`.

  Methods differ in the gradients that they clip. HAT multiplies those of its embeddings by its
  compensation, s_max^2 and more: clipped to a norm of 1, those of all weights would nearly vanish.

  Args:
    config: of the experiment.
  Raises:
    ValueError: the norm is not positive; the message names the field.
  """
  section = CLIPPING_SECTIONS.get(config.method)
  own = None if section is None else config[section].grad_clip_norm
  if own is None:
    return config.optim.grad_clip_norm
  if not own > 0:
    raise ValueError(f"{section}.grad_clip_norm must be positive, or None; got {own!r}")
  return own


def _check_norm(model: Config) -> None:
  """Raises ValueError for a network without BatchNorm that must have it."""
  if model.name not in VGGS and not model.norm:
    raise ValueError(f"model.norm must be True for {model.name}, which has BatchNorm; got False")


# By `router.rehearsal` of a config.
REHEARSALS = {
  "none": _no_rehearsal,
  "episodic": _episodic,
  "generative": _generative,
  "gated_generative": _gated_generative,
  "masked_generative": _masked_generative,
}
# Section of a config that may hold a method's own limit on the gradient, by `method`.
CLIPPING_SECTIONS = {
  "hat": "hat",
  "progressive": "progressive",
  "ewc": "ewc",
  "online_ewc": "online_ewc",
  "si": "si",
  "lwf": "lwf",
  "derpp": "derpp",
  "er": "replay",
  "agem": "replay",
  "icarl": "replay",
}
# By `method` of a config.
METHODS = {
  "gates": _task_gates,
  "hat": _hat,
  "multitask_gates": _multitask_gates,
  "progressive": _progressive,
  "fine_tuning": _plain(fine_tuning),
  "joint": _plain(functools.partial(fine_tuning, joint=True), scope="seen"),
  "ewc": _plain(ewc, section="ewc"),
  "online_ewc": _plain(online_ewc, section="online_ewc"),
  "si": _plain(si, section="si"),
  "lwf": _plain(lwf, section="lwf"),
  "er": _plain(replay.er, scope="seen", memory=True),
  "derpp": _plain(replay.derpp, scope="seen", section="derpp", memory=True),
  # The scope is the task's own classes, as in the paper, where the task is known.
  "agem": _plain(replay.agem, memory=True),
  "icarl": _icarl,
  "multitask_norms": _multitask_norms,
  "multitask_trunk": _plain(multitask_trunk),
  "dgm": _dgm,
}
