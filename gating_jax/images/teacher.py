"""The teacher of a classifier: a trained network whose outputs it is compared with in training.

Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gating_jax.checks import user_path
from gating_jax.images.build import Experiment
from gating_jax.images.start import Weights, restore_network
from gating_jax.models.pretrained import names_weights, read_network, require_classifier
from gating_jax.models.summary import model_summary
from gating_jax.training import settings
from gating_jax.training.rundir import RunDir, RunDirError
from gating_jax.types import Array


class Teacher(NamedTuple):
  """A trained network.

  Attributes:
    source: the run or the file of weights, as the config names it.
    model: a classifier.
    variables: its `params` and `batch_stats`.
    macs: mean MACs of an image, gate networks included.
    accuracy: on its test set, as a fraction; None where a file of weights does not say.
  """

  source: str
  model: nn.Module
  variables: Mapping[str, Any]
  macs: float
  accuracy: float | None

  def teach(self, variables: Mapping[str, Any], images: Array) -> Array:
    """Returns the logits `[N, classes]` of normalised images."""
    logits, _ = self.model.apply(variables, images)
    return logits

  def entries(self, macs: float) -> dict[str, float]:
    """Returns what a result says of the teacher of a network with so many MACs."""
    found = {"teacher_macs": self.macs, "teacher_mac_ratio": macs / self.macs}
    if self.accuracy is not None:
      found["teacher_accuracy"] = self.accuracy
    return found


def load_teacher(experiment: Experiment, weights: Weights | None = None) -> Teacher | None:
  """Loads the teacher that a config names; None where it names none.

  Args:
    experiment: the experiment of the network to train.
    weights: those of the file that `model.init_from` names, where they are read already.
  Raises:
    RunDirError, FileNotFoundError: there is no such run, it is not finished, or there is no file.
    ValueError: the teacher is of other classes, of another order of them, with a head a set, of
      other images, or no classifier.
  """
  config = experiment.config
  if experiment.objective.distillation is None:
    return None
  # The network that this one starts from, unless another is named.
  source = config.loss.distillation.teacher or config.model.init_from
  if names_weights(source):
    known = weights if source == config.model.init_from else None
    teacher = _of_file(source, experiment, known)
  else:
    teacher = _of_run(source, experiment)
  image = jax.ShapeDtypeStruct((1, *experiment.test.shape), jnp.float32)
  try:
    logits = jax.eval_shape(teacher.teach, teacher.variables, image)
  # Flax has its own errors of shapes.
  except Exception as error:
    raise ValueError(
      f"loss.distillation.teacher must take images of shape {experiment.test.shape}; {source} "
      f"does not: {error}"
    ) from None
  classes = len(experiment.test.class_names)
  if logits.shape != (1, classes):
    raise ValueError(
      f"loss.distillation.teacher must have the {classes} classes of the data; the outputs of "
      f"{source} have shape {logits.shape[1:]}"
    )
  return teacher


def _of_file(source: str, experiment: Experiment, weights: Weights | None) -> Teacher:
  """Loads a teacher from a file of weights, which may be read already."""
  model, variables = weights or read_network(source)
  require_classifier(model, source)
  counts = model_summary(model, experiment.test.shape)
  return Teacher(source, model, variables, macs=float(counts.macs), accuracy=None)


def _of_run(source: str, experiment: Experiment) -> Teacher:
  """Loads a teacher from a run directory."""
  config = experiment.config
  run_dir = RunDir(user_path(source))
  result = run_dir.result() if run_dir.exists() else None
  # One that still trains would teach otherwise after a restart.
  if result is None:
    raise RunDirError(f"loss.distillation.teacher must name a finished run; {source} holds none")
  theirs = settings.config_of(run_dir.path)
  if theirs.experiment != config.experiment:
    raise ValueError(
      f"loss.distillation.teacher must name a run of {config.experiment}; {source} is of "
      f"{theirs.experiment}"
    )
  # Its outputs for classes of other sets were never trained.
  if theirs.loss.scope not in (None, "all"):
    raise ValueError(
      "loss.distillation.teacher must name a run whose classes all compete; that of "
      f"{source} has loss.scope={theirs.loss.scope!r}"
    )
  for name in ("mean", "std"):
    if theirs.data[name] != config.data[name]:
      raise ValueError(
        f"loss.distillation.teacher must name a run with data.{name}={config.data[name]}; that of "
        f"{source} has {theirs.data[name]}"
      )
  built, found = restore_network(theirs, run_dir)
  _check_same_data(source, built, experiment)
  if found is None:
    raise RunDirError(f"loss.distillation.teacher must name a run with a checkpoint; got {source}")
  with run_dir.reading_result():
    macs, accuracy = float(result["macs"]), float(result["accuracy"])
  return Teacher(source, built.model, jax.device_get(found.state), macs=macs, accuracy=accuracy)


def _check_same_data(source: str, theirs: Experiment, mine: Experiment) -> None:
  """Raises a ValueError unless a run's outputs are of the same classes, for images of one shape."""
  # Names of files of weights are unknown; those of runs are kept.
  names = itertools.zip_longest(mine.test.class_names, theirs.test.class_names)
  for place, (own, other) in enumerate(names):
    if own != other:
      raise ValueError(
        "loss.distillation.teacher must name a run with the classes of the data, in their order; "
        f"class {place} of the data is {own!r}, and that of {source} is {other!r}"
      )
  if theirs.test.shape != mine.test.shape:
    raise ValueError(
      f"loss.distillation.teacher must name a run on images of shape {mine.test.shape}; those of "
      f"{source} have shape {theirs.test.shape}"
    )
