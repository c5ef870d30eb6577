"""The parts of an experiment, its method and networks, built from a config.

All settings are checked before the data are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from gating_jax.continual.generators import protections
from gating_jax.continual.generators.shared import shared_generative
from gating_jax.continual.generators.wgan import WganSettings
from gating_jax.continual.method import LearnerState, Method, Network, Problem, Table
from gating_jax.continual.methods import icarl, replay
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
from gating_jax.continual.replay_memory import ReplaySettings
from gating_jax.continual.task_inference import TaskClassifierSettings
from gating_jax.continual.units import ProtectionSettings
from gating_jax.data import augment, image_sets
from gating_jax.layers.gate import GateSettings
from gating_jax.models.columns import column
from gating_jax.models.generator import Generator
from gating_jax.models.resnet import RESNETS, resnet
from gating_jax.models.summary import model_summary, reduced_macs
from gating_jax.models.vgg import VGGS, vgg
from gating_jax.training import devices, loop, optim, settings
from gating_jax.training.rundir import Outline


@dataclasses.dataclass(frozen=True)
class ContinualExperiment:
  """An experiment as a config describes it.

  Attributes:
    config: as given.
    tasks: the sequence of tasks, with their images.
    problem: what the method learns.
    method: of continual learning.
    dense_macs, dense_macs_reduced: multiply-accumulates of one image in the network without gates,
      with the head of one task; for the second see `models.summary.reduced_macs`.
    optimiser: fresh for every task.
    steps_per_epoch: steps in an epoch of any task.
  """

  config: ml_collections.ConfigDict
  tasks: tuple[image_sets.Task, ...]
  problem: Problem
  method: Method
  dense_macs: int
  dense_macs_reduced: int
  optimiser: optax.GradientTransformation
  steps_per_epoch: int

  @property
  def pretrain_steps(self) -> int:
    """Returns the steps of the phase before each task's own training."""
    return self.config.generator.steps if self.method.pretrain_step else 0

  @property
  def pretrain_batch_size(self) -> int:
    """Returns the images of one step of pretraining."""
    return self.config.generator.batch_size * self.config.generator.critic_steps

  @property
  def stages(self) -> range:
    """Returns the last task of each stage of learning.

    These are all tasks, or only the last one where all are learnt together.
    """
    return range(len(self.tasks))[-1 if self.method.simultaneous else 0 :]

  @property
  def steps_per_task(self) -> int:
    """Counts the steps of a stage: its pretraining, its training, and one for its end."""
    return self.pretrain_steps + self.steps_per_epoch * self.config.optim.epochs + 1

  @property
  def total_steps(self) -> int:
    """Counts the steps of the whole run."""
    return self.steps_per_task * len(self.stages)

  def first_step(self, task: int) -> int:
    """Returns the first step of the stage that ends with this task."""
    return self.steps_per_task * self.stages.index(task)

  @property
  def task_names(self) -> list[str]:
    """Returns the names of the classes of each task."""
    # Every set has the names of all classes, in the order of learning.
    names, c = self.tasks[0].train.class_names, self.problem.classes
    return [", ".join(names[t * c : (t + 1) * c]) for t in range(len(self.tasks))]

  def phases(self, task: int) -> list[loop.LoopSettings]:
    """Returns settings of the pretraining and the training of a task's stage."""
    first = self.first_step(task)
    # The last step of a stage ends the task and is no training step.
    ends = [first + self.pretrain_steps] * bool(self.pretrain_steps) + [
      first + self.steps_per_task - 1
    ]
    return [
      loop.LoopSettings(
        end, log_every=self.config.log_every, checkpoint_every=self.config.checkpoint_every
      )
      for end in ends
    ]

  def key(self, purpose: int) -> jax.Array:
    """Returns a key of the run that no training step uses."""
    # Training steps fold the step into a key of the default kind: another kind gives other streams.
    return jax.random.fold_in(jax.random.key(self.config.seed, impl="rbg"), purpose)

  def fresh(self) -> LearnerState:
    """Creates a learner that has learnt nothing."""

    # One program is faster than an operation for every parameter.
    @jax.jit
    def init(key):
      """Initialises the learner from a PRNG key."""
      start = self.method.init(key)
      # float32 as in `test_tasks`: another type would compile the step again for the second task.
      table = Table(
        *(jnp.full((len(self.tasks),) * 2, jnp.nan, jnp.float32) for _ in Table._fields)
      )
      return LearnerState(
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        *start[:2],
        self.optimiser.init(start.params),
        start.memory,
        table,
      )

    return init(self.key(0))


def build(
  config: ml_collections.ConfigDict, known: Sequence[Outline] | None = None
) -> ContinualExperiment:
  """Checks every setting, then reads the data.

  Args:
    config: of continual learning.
    known: outlines of the tasks' training sets, to be used in place of the data.
  Raises:
    ValueError: a setting breaks its rule; the message names the field.
    DatasetNotPreparedError: the data set is not on disk.
  """
  data, training = config.data, config.optim
  _check(config)
  if known is None:
    sequence = _read_tasks(config)
  else:
    # An outline has the length and the shape of a set: enough for every check.
    sequence = tuple(image_sets.Task(train=each, validation=each, test=each) for each in known)
  shape = sequence[0].train.shape
  settings.check_channels(data, shape[-1])
  # The smallest task sets the steps of an epoch, the same for all tasks.
  smallest = min(len(task.train) for task in sequence)
  if training.batch_size > smallest:
    raise ValueError(
      f"optim.batch_size must be at most {smallest}, the training images of the smallest task; "
      f"got {training.batch_size}"
    )
  problem = Problem(
    tasks=len(sequence),
    classes=config.tasks.classes_per_task,
    shape=shape,
    axis_name=devices.AXIS,
    normalise=lambda pixels: augment.normalise(pixels, data.mean, data.std),
    batch_size=training.eval_batch_size,
    augment=lambda key, pixels: augment.crop_and_flip(
      key, pixels, pad=data.crop_padding, flip=data.flip, axis_name=devices.AXIS
    ),
  )
  method = build_method(config, problem)
  # A step of pretraining takes one batch for each update of the critic.
  if (
    method.pretrain_step
    and (size := config.generator.batch_size * config.generator.critic_steps) > smallest
  ):
    raise ValueError(
      f"generator.batch_size times generator.critic_steps must be at most {smallest}, the training "
      f"images of the smallest task; got {size}"
    )
  per_epoch = smallest // training.batch_size
  with settings.named("optim"):
    rate = optim.learning_rate(
      training.schedule,
      training.learning_rate,
      training.epochs * per_epoch,
      warmup=training.warmup,
      lr_drop_at=training.lr_drop_at,
      factor=training.drop_factor,
    )
    sgd = optim.sgd(
      rate,
      momentum=training.momentum,
      weight_decay=training.weight_decay,
      # HAT's masks are gate parameters too, and HAT sets their pace itself.
      gate_lr_multiplier=1.0 if config.method == "hat" else training.gate_lr_multiplier,
    )
  # Clips the gradient of the loss alone, before weight decay and momentum.
  optimiser = optax.chain(optax.clip_by_global_norm(training.grad_clip_norm), sgd)
  # The network without gates is what costs are compared with; at test time one head runs.
  dense = build_network(config, problem, classes=problem.classes, gated=False)
  return ContinualExperiment(
    config,
    sequence,
    problem,
    method,
    model_summary(dense, problem.shape).macs,
    reduced_macs(dense, problem.shape),
    optimiser,
    per_epoch,
  )


def _read_tasks(config: ml_collections.ConfigDict) -> tuple[image_sets.Task, ...]:
  data = config.data
  names = settings.feature_names(data)
  train, test = (
    image_sets.load(data.name, split, data.data_dir, data.image_size, *names)
    for split in (data.train_split, data.test_split)
  )
  with settings.named("tasks"):
    return image_sets.make_tasks(train, test, **config.tasks)


def _check(config: ml_collections.ConfigDict) -> None:
  settings.check(
    config,
    choices={
      "method": METHODS,
      "model.name": (*VGGS, *RESNETS),
      "model.dtype": settings.DTYPES,
      "router.rehearsal": REHEARSALS,
      "optim.schedule": optim.LEARNING_RATES,
      "devices.backend": devices.BACKENDS,
    },
    positive=(
      "model.width",
      "optim.learning_rate",
      "optim.gate_lr_multiplier",
      "optim.drop_factor",
      "optim.grad_clip_norm",
    ),
    not_negative=(
      "optim.weight_decay",
      "generator.gates.noise_scale",
      "generator.gates.sparsity",
      "generator.gates.patience",
    ),
    at_least={
      "seed": 0,
      "data.crop_padding": 0,
      "data.image_size": 0,
      "tasks.classes_per_task": 1,
      "tasks.count": 0,
      "replay.batch_size": 1,
      "generator.steps": 1,
      "generator.batch_size": 1,
      "generator.latent": 1,
      "generator.width": 1,
      "optim.epochs": 1,
      "optim.batch_size": 1,
      "optim.eval_batch_size": 1,
      "log_every": 1,
      "checkpoint_every": 1,
    },
    numbers=("data.mean", "data.std"),
    rules={
      "data.std": (lambda std: min(std) > 0, "a tuple of positive numbers"),
      "optim.lr_drop_at": (settings.all_numbers, "a tuple of fractions"),
      # Batches are split evenly over the devices.
      "replay.batch_size": settings.divides_over_devices(),
      "optim.batch_size": settings.divides_over_devices(),
      "optim.eval_batch_size": settings.divides_over_devices(),
      "generator.batch_size": settings.divides_over_devices(),
      "generator.gates.threshold": (lambda value: 0 <= value < 1, "a fraction in [0, 1)"),
      "tasks.order_seed": (lambda seed: seed is None or seed >= 0, "None or >= 0"),
    },
  )


def build_method(config: ml_collections.ConfigDict, problem: Problem) -> Method:
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
  model = build_network(
    config, problem, classes=None, gated=True, wider=gates.allocated(problem.tasks)
  )
  rehearsal = REHEARSALS[config.router.rehearsal](config, problem)
  of_all = _classifier(config, problem, "seen") if config.router.network else None
  # The section holds the choice of the classifier too.
  router = _made(
    TaskClassifierSettings, config, "router", without=("rehearsal", "network", "distillation")
  )
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
    protection = protections.gated(generator, problem.tasks, ProtectionSettings(**fields))
  return _shared_generative(config, problem, generator, protection)


def _masked_generative(config, problem):
  fields = {name: config.dgm[name] for name in ("steepness", "sparsity")}
  # HAT's masks are gates without an input: one parameter per unit.
  generator = _generator(config, problem, GateSettings(context="none", relaxation="sigmoid"))
  with settings.named("dgm"):
    protection = protections.masked(
      generator, problem.tasks, steps=config.generator.steps, **fields
    )
  return _shared_generative(config, problem, generator, protection)


def _dgm(config, problem):
  # Replay shows all classes so far, so all of them compete.
  net, rehearsal = _classifier(config, problem, "seen"), _masked_generative(config, problem)
  with settings.named("dgm"):
    return dgm(net, rehearsal, real_weight=config.dgm.real_weight)


def _made(make, config, section, *args, without=()):
  """Calls `make(*args, **config[section])`, without some of the section's fields."""
  with settings.named(section):
    return make(
      *args, **{name: value for name, value in config[section].items() if name not in without}
    )


def _wgan(config):
  names = ("critic_steps", "penalty", "learning_rate", "ema_decay")
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
  model = build_network(
    config, problem, classes=None, gated=True, context="none", relaxation="sigmoid"
  )
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
  model = build_network(config, problem, classes=None, gated=True)
  return multitask_gates(
    model, problem, model_summary(model, problem.shape), _made(TaskGatesSettings, config, "gates")
  )


def _multitask_norms(config, problem):
  model = build_network(config, problem, classes=None, gated=False)
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
  model = build_network(config, problem, classes=problem.all_classes, gated=False)
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
  model = icarl.Headed(
    build_network(config, problem, classes=None, gated=False), problem.all_classes
  )
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
  "agem": _plain(replay.agem, memory=True),
  "icarl": _icarl,
  "multitask_norms": _multitask_norms,
  "multitask_trunk": _plain(multitask_trunk),
  "dgm": _dgm,
}


def build_network(
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
