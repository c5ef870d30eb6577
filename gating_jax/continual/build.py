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

    These are all tasks, or only the last one where all are learnt at once.
    """
    count = len(self.tasks)
    return range(count - 1, count) if self.method.simultaneous else range(count)

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
    classes, count = self.tasks[0].train.class_names, self.problem.classes
    names = []
    for task in range(len(self.tasks)):
      names.append(", ".join(classes[task * count : (task + 1) * count]))
    return names

  def phases(self, task: int) -> list[loop.LoopSettings]:
    """Returns settings of the pretraining and the training of a task's stage."""
    first = self.first_step(task)

    def until(end):
      """Returns the settings of a phase that ends with this step."""
      return loop.LoopSettings(
        end, log_every=self.config.log_every, checkpoint_every=self.config.checkpoint_every
      )

    # The last step of a stage ends the task and is no training step.
    training = until(first + self.steps_per_task - 1)
    if not self.pretrain_steps:
      return [training]
    return [until(first + self.pretrain_steps), training]

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

      def untested():
        """Creates a part of the table: each needs a buffer of its own, to be donated."""
        # float32 as in `test_tasks`: another type would compile the step again for the second task.
        return jnp.full((len(self.tasks),) * 2, jnp.nan, jnp.float32)

      return LearnerState(
        step=jnp.zeros((), jnp.int32),
        task=jnp.zeros((), jnp.int32),
        params=start.params,
        batch_stats=start.batch_stats,
        opt_state=self.optimiser.init(start.params),
        memory=start.memory,
        table=Table(*[untested() for _ in Table._fields]),
      )

    return init(self.key(0))


def build(
  config: ml_collections.ConfigDict, outlines: Sequence[Outline] | None = None
) -> ContinualExperiment:
  """Checks every setting, then reads the data.

  Args:
    config: of continual learning.
    outlines: of the tasks' training sets, to be used in place of the data.
  Raises:
    ValueError: a setting breaks its rule; the message names the field.
    DatasetNotPreparedError: the data set is not on disk.
  """
  data, training = config.data, config.optim
  _check(config)
  if outlines is None:
    sequence = _read_tasks(config)
  else:
    # An outline has the length and the shape of a set: enough for every check.
    sequence = tuple(image_sets.Task(train=each, validation=each, test=each) for each in outlines)
  shape = sequence[0].train.shape
  settings.check_channels(data, shape[-1])
  # The smallest task sets the steps of an epoch, the same for all tasks.
  smallest = min(len(task.train) for task in sequence)
  if training.batch_size > smallest:
    raise ValueError(
      f"optim.batch_size must be at most {smallest}, the training images of the smallest task; "
      f"got {training.batch_size}"
    )
  problem = _build_problem(config, tasks=len(sequence), shape=shape)
  method = build_method(config, problem)
  # A step of pretraining takes one batch for each update of the critic.
  pretrain_batch = config.generator.batch_size * config.generator.critic_steps
  if method.pretrain_step and pretrain_batch > smallest:
    raise ValueError(
      f"generator.batch_size times generator.critic_steps must be at most {smallest}, the training "
      f"images of the smallest task; got {pretrain_batch}"
    )
  per_epoch = smallest // training.batch_size
  # The network without gates is what costs are compared with; at test time one head runs.
  dense = build_network(config, problem, classes=problem.classes, gated=False)
  return ContinualExperiment(
    config=config,
    tasks=sequence,
    problem=problem,
    method=method,
    dense_macs=model_summary(dense, problem.shape).macs,
    dense_macs_reduced=reduced_macs(dense, problem.shape),
    optimiser=_build_optimiser(config, per_epoch),
    steps_per_epoch=per_epoch,
  )


def _read_tasks(config: ml_collections.ConfigDict) -> tuple[image_sets.Task, ...]:
  """Reads the data set and splits it into tasks."""
  data = config.data

  def load(split):
    """Reads one split."""
    names = settings.feature_names(data)
    return image_sets.load(data.name, split, data.data_dir, data.image_size, *names)

  train, test = load(data.train_split), load(data.test_split)
  with settings.named("tasks"):
    return image_sets.make_tasks(train, test, **config.tasks)


def _build_problem(
  config: ml_collections.ConfigDict, *, tasks: int, shape: tuple[int, int, int]
) -> Problem:
  """Builds the learning problem of so many tasks with images of this shape."""
  data = config.data

  def normalise(pixels):
    """Maps uint8 pixels to network input."""
    return augment.normalise(pixels, data.mean, data.std)

  def crop_and_flip(key, pixels):
    """Changes pixels at random, as in training."""
    return augment.crop_and_flip(
      key, pixels, pad=data.crop_padding, flip=data.flip, axis_name=devices.AXIS
    )

  return Problem(
    tasks=tasks,
    classes=config.tasks.classes_per_task,
    shape=shape,
    axis_name=devices.AXIS,
    normalise=normalise,
    batch_size=config.optim.eval_batch_size,
    augment=crop_and_flip,
  )


def _build_optimiser(
  config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.GradientTransformation:
  """Builds the optimiser of one task."""
  training = config.optim
  with settings.named("optim"):
    rate = optim.learning_rate(
      training.schedule,
      training.learning_rate,
      training.epochs * steps_per_epoch,
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
  return optax.chain(optax.clip_by_global_norm(training.grad_clip_norm), sgd)


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
  return None


def _episodic(config, problem):
  return episodic(problem, _from_section(ReplaySettings, config, "replay"))


def _generative(config, problem):
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
  fields, gate = dict(config.generator.gates), dict(config.model.gate)
  # The section holds settings of the gates and of their protection.
  for name in ("initial_open", "noise_scale"):
    gate[name] = fields.pop(name)
  with settings.named("generator.gates"):
    generator = _generator(config, problem, GateSettings(**gate))
    protection = protections.gated(generator, problem.tasks, ProtectionSettings(**fields))
  return _shared_generative(config, problem, generator=generator, protection=protection)


def _masked_generative(config, problem):
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
  # Replay shows all classes so far, so all of them compete.
  net, rehearsal = _classifier(config, problem, "seen"), _masked_generative(config, problem)
  with settings.named("dgm"):
    return dgm(net, rehearsal, real_weight=config.dgm.real_weight)


def _from_section(make, config, section, *args, without=()):
  """Calls `make(*args, **config[section])`, without some of the section's fields."""
  fields = {name: value for name, value in config[section].items() if name not in without}
  with settings.named(section):
    return make(*args, **fields)


def _wgan(config):
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
  # HAT's masks are gates without an input: one parameter per unit.
  model = build_network(
    config, problem, classes=None, gated=True, context="none", relaxation="sigmoid"
  )
  counts = model_summary(model, problem.shape)
  return _from_section(hat, config, "hat", model, problem, counts)


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
  gates = _from_section(TaskGatesSettings, config, "gates")
  return multitask_gates(model, problem, model_summary(model, problem.shape), settings=gates)


def _multitask_norms(config, problem):
  model = build_network(config, problem, classes=None, gated=False)
  return multitask_norms(model, problem, model_summary(model, problem.shape))


def _plain(make, *, scope="own", section=None, memory=False):
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
      given.append(_from_section(ReplaySettings, config, "replay"))
    return _from_section(make, config, section, *given) if section else make(*given)

  return build


def _classifier(config, problem, scope):
  """Builds an ungated network with an output for every class."""
  model = build_network(config, problem, classes=problem.all_classes, gated=False)
  return Network(model, problem, model_summary(model, problem.shape).macs, scope=scope)


REHEARSALS = {
  "none": _no_rehearsal,
  "episodic": _episodic,
  "generative": _generative,
  "gated_generative": _gated_generative,
  "masked_generative": _masked_generative,
}


def _icarl(config, problem):
  # iCaRL needs the features, and the head for its training.
  body = build_network(config, problem, classes=None, gated=False)
  model = icarl.Headed(body, problem.all_classes)
  # The loss of iCaRL is its own: the scope is not read.
  net = Network(model, problem, model_summary(model, problem.shape).macs, scope="seen")
  return icarl.icarl(net, _from_section(ReplaySettings, config, "replay"))


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
  if model.name in VGGS:
    gating = "channel" if gated else "none"
    return vgg(model.name, classes, norm=model.norm, gating=gating, **fields)
  # `all_channels` also gates the outputs of a block: without that a task would own none of them.
  gating = "all_channels" if gated else "none"
  return resnet(model.name, classes, stem="cifar", gating=gating, **fields)


def _check_norm(model: ml_collections.ConfigDict) -> None:
  if model.name not in VGGS and not model.norm:
    raise ValueError(f"model.norm must be True for {model.name}, which has BatchNorm; got False")
