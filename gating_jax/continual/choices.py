"""Methods of continual learning and their networks, built from a config."""

from __future__ import annotations

import functools

import flax.linen as nn
import ml_collections

from gating_jax.continual.generators.gated import gated
from gating_jax.continual.generators.masked import masked
from gating_jax.continual.generators.shared import shared_generative
from gating_jax.continual.generators.wgan import WganSettings
from gating_jax.continual.memory import ReplaySettings
from gating_jax.continual.method import Method, Network, Problem
from gating_jax.continual.methods import agem, icarl, replay
from gating_jax.continual.methods.dgm import dgm
from gating_jax.continual.methods.ewc import ewc, online_ewc
from gating_jax.continual.methods.fine_tuning import fine_tuning
from gating_jax.continual.methods.hat import hat
from gating_jax.continual.methods.lwf import lwf
from gating_jax.continual.methods.multitask import multitask_gates, multitask_norms, multitask_trunk
from gating_jax.continual.methods.progressive import progressive
from gating_jax.continual.methods.si import si
from gating_jax.continual.methods.task_gates import TaskGatesSettings, task_gates
from gating_jax.continual.rehearsal import episodic, generative
from gating_jax.continual.task_inference import RouterSettings
from gating_jax.continual.units import ProtectionSettings
from gating_jax.layers.gate import GateSettings
from gating_jax.models.columns import column
from gating_jax.models.generator import Generator
from gating_jax.models.resnet import resnet
from gating_jax.models.summary import model_summary
from gating_jax.models.vgg import VGGS, vgg
from gating_jax.training import settings


def build(config: ml_collections.ConfigDict, problem: Problem) -> Method:
  """Builds the method that the config names.

  Args:
    config: of the experiment.
    problem: the learning problem.
  Raises:
    ValueError: a setting breaks its rule; the message names the method.
  """
  try:
    return METHODS[config.method](config, problem)
  except ValueError as error:
    raise ValueError(f"method {config.method}: {error}") from error


def _task_gates(config, problem):
  gates = _made(TaskGatesSettings, config, "gates")
  # Layers that grow have their last width from the start: shapes never change.
  model = network(config, problem, classes=None, gated=True, wider=gates.allocated(problem.tasks))
  rehearsal = REHEARSALS[config.router.rehearsal](config, problem)
  of_all = _classifier(config, problem, "seen") if config.router.network else None
  # The section holds the choice of the classifier too.
  router = _made(RouterSettings, config, "router", without=("rehearsal", "network", "distillation"))
  return task_gates(
    model,
    problem,
    model_summary(model, problem.shape),
    gates,
    rehearsal,
    router,
    of_all,
    config.router.distillation,
  )


def _generative(config, problem):
  own, wgan = (
    {name: config.generator[name] for name in ("latent", "width", "images")},
    _wgan(config),
  )
  with settings.named("generator"):
    return generative(problem, wgan, seed=config.seed, replayed=config.replay.batch_size, **own)


def _gated_generative(config, problem):
  fields = dict(config.generator.gates)
  # The section holds settings of the gates and of their protection.
  gate = {name: fields.pop(name) for name in ("initial_open", "noise_scale")}
  with settings.named("generator.gates"):
    generator = _generator(config, problem, GateSettings(**{**config.model.gate, **gate}))
    protection = gated(generator, problem.tasks, ProtectionSettings(**fields))
  return _shared_generative(config, problem, generator, protection)


def _masked_generative(config, problem):
  fields = {name: config.dgm[name] for name in ("steepness", "sparsity")}
  # HAT's masks are gates without an input: one parameter per unit.
  generator = _generator(config, problem, GateSettings(context="none", relaxation="sigmoid"))
  with settings.named("dgm"):
    protection = masked(generator, problem.tasks, steps=config.generator.steps, **fields)
  return _shared_generative(config, problem, generator, protection)


def _dgm(config, problem):
  # Replay shows all classes so far, so all of them compete.
  net, rehearsal = _classifier(config, problem, "seen"), _masked_generative(config, problem)
  with settings.named("dgm"):
    return dgm(net, rehearsal, real=config.dgm.real)


def _made(make, config, section, *args, without=()):
  """Calls `make(*args, **config[section])`, without some of the section's fields."""
  with settings.named(section):
    return make(
      *args, **{name: value for name, value in config[section].items() if name not in without}
    )


def _wgan(config):
  names = ("critic_steps", "penalty", "learning_rate", "average")
  with settings.named("generator"):
    return WganSettings(**{name: config.generator[name] for name in names})


def _generator(config, problem, gate):
  """Builds one generator for all tasks."""
  fields = config.generator
  return Generator(
    problem.shape, fields.latent, fields.width, problem.classes, "channel", gate, problem.axis_name
  )


def _shared_generative(config, problem, generator, protection):
  wgan = _wgan(config)
  with settings.named("generator"):
    return shared_generative(
      problem,
      generator,
      wgan,
      protection,
      images=config.generator.images,
      replayed=config.replay.batch_size,
      seed=config.seed,
    )


def _hat(config, problem):
  # HAT's masks are gates without an input: one parameter per unit.
  model = network(config, problem, classes=None, gated=True, context="none", relaxation="sigmoid")
  return _made(hat, config, "hat", model, problem, model_summary(model, problem.shape))


def _progressive(config, problem):
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
      **kind,
      **config.progressive,
    ),
    problem,
  )


def _multitask_gates(config, problem):
  model = network(config, problem, classes=None, gated=True)
  return multitask_gates(
    model, problem, model_summary(model, problem.shape), _made(TaskGatesSettings, config, "gates")
  )


def _multitask_norms(config, problem):
  model = network(config, problem, classes=None, gated=False)
  return multitask_norms(model, problem, model_summary(model, problem.shape))


def _plain(make, scope="own", section=None, memory=False):
  """Makes the builder of a method that trains one ungated network of all classes.

  Args:
    make: the method, of a network and the settings below.
    scope: classes that compete in the cross-entropy, as in `Network`.
    section: of the config with the method's settings; None for a method without any.
    memory: whether the method has an episodic memory.
  """

  def build(config, problem):
    """Builds the method that a config describes, for a problem."""
    given = [_classifier(config, problem, scope)]
    if memory:
      given.append(_made(ReplaySettings, config, "replay"))
    return _made(make, config, section, *given) if section else make(*given)

  return build


def _classifier(config, problem, scope):
  """Builds an ungated network with an output for every class."""
  model = network(config, problem, classes=problem.all_classes, gated=False)
  return Network(model, problem, model_summary(model, problem.shape).macs, scope)


REHEARSALS = {
  "none": lambda config, problem: None,
  "episodic": lambda config, problem: episodic(problem, _made(ReplaySettings, config, "replay")),
  "generative": _generative,
  "gated_generative": _gated_generative,
  "masked_generative": _masked_generative,
}


def _icarl(config, problem):
  # iCaRL needs the features, and the head for its training.
  model = icarl.Headed(network(config, problem, classes=None, gated=False), problem.all_classes)
  # The loss of iCaRL is its own: the scope is not read.
  net = Network(model, problem, model_summary(model, problem.shape).macs, "seen")
  return icarl.icarl(net, _made(ReplaySettings, config, "replay"))


METHODS = {
  "gates": _task_gates,
  "hat": _hat,
  "multitask_gates": _multitask_gates,
  "progressive": _progressive,
  "fine_tuning": _plain(fine_tuning),
  "joint": _plain(functools.partial(fine_tuning, joint=True), "seen"),
  "ewc": _plain(ewc, section="ewc"),
  "online_ewc": _plain(online_ewc, section="online_ewc"),
  "si": _plain(si, section="si"),
  "lwf": _plain(lwf, section="lwf"),
  "er": _plain(replay.er, "seen", memory=True),
  "derpp": _plain(replay.derpp, "seen", "derpp", memory=True),
  # The scope is the task's own classes, as in the paper, where the task is known.
  "agem": _plain(agem.agem, memory=True),
  "icarl": _icarl,
  "multitask_norms": _multitask_norms,
  "multitask_trunk": _plain(multitask_trunk),
  "dgm": _dgm,
}


def network(
  config: ml_collections.ConfigDict,
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
    gate=GateSettings(**model.gate, **gate),
  )
  # `all_channels` also gates the outputs of a block: without that a task would own none of them.
  if model.name in VGGS:
    return vgg(
      model.name, classes, norm=model.norm, gating="channel" if gated else "none", **fields
    )
  return resnet(
    model.name, classes, stem="cifar", gating="all_channels" if gated else "none", **fields
  )


def _check_norm(model: ml_collections.ConfigDict) -> None:
  if model.name not in VGGS and not model.norm:
    raise ValueError(f"model.norm must be True for {model.name}, which has BatchNorm; got False")
