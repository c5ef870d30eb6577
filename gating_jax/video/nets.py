"""Variables of networks for long videos, from checkpoints, pretraining or another run.

A whole network names its nets `light` and `heavy`; pretrained nets are taken under these names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.data.videos import VideoArrays
from gating_jax.layers.gate import GATE_NAME
from gating_jax.layers.segment_gate import CONCEPTS
from gating_jax.models.timegate import find_concepts
from gating_jax.training import devices, rundir, steps
from gating_jax.training.checkpoints import Checkpoint, restore_newest
from gating_jax.video import evaluate
from gating_jax.video.build import Phase, VideoExperiment

PRETRAIN_DIR = "pretrain"
# Concepts are found from at most so many segments.
_CONCEPT_SEGMENTS = 20_000


def initial_state(phase: Phase, seed: int) -> steps.TrainState:
  """Initialises the state with which a phase begins."""
  return steps.init_state(phase.model, phase.optimiser, seed, shapes=phase.shapes)


def restore(phase: Phase, path: Path, seed: int) -> Checkpoint:
  """Returns the newest checkpoint of a phase, or a fresh state, at step 0."""
  fresh = initial_state(phase, seed)
  found = restore_newest(path / rundir.CHECKPOINT_DIR, fresh)
  return Checkpoint(0, devices.replicate(fresh)) if found is None else found


def trained_nets(experiment: VideoExperiment, path: Path) -> Any:
  """Loads the variables of both nets, from this run or the one named by `pretrained`.

  Raises:
    ValueError: the config has no pretraining.
    RunDirError: the run does not exist, or has not trained the nets to the end.
  """
  if experiment.pretraining is None:
    raise ValueError("pretrain.epochs must be that of the pretrained run; got 0")
  # A finished run keeps what it took from another.
  kept = rundir.RunDir(path / PRETRAIN_DIR).has_checkpoint()
  if experiment.config.pretrained and not kept:
    path = check_pretrained(experiment.config.pretrained)
  path = path / PRETRAIN_DIR
  step, state = restore(experiment.pretraining, path, experiment.config.seed)
  if step != experiment.pretraining.settings.total_steps:
    raise rundir.RunDirError(
      f"{path} must hold nets trained for {experiment.pretraining.settings.total_steps} steps; "
      f"its newest checkpoint is of step {step}"
    )
  return variables_of(state)


def check_pretrained(pretrained: str) -> Path:
  """Returns the run that `pretrained` names. Raises a RunDirError where it has no trained nets."""
  path = user_path(pretrained)
  folder = path / PRETRAIN_DIR
  if not rundir.RunDir(folder).has_checkpoint():
    raise rundir.RunDirError(
      f"pretrained must be a run directory with trained nets; {folder} has none"
    )
  return path


def keep_nets(pretrained: str, path: Path) -> None:
  """Copies the trained nets of another run into this one, which then does without the other."""
  own = path / PRETRAIN_DIR / rundir.CHECKPOINT_DIR
  if own.exists():
    return
  # Complete under its name, whenever this process is killed.
  aside = own.with_name(f"{own.name}.copied")
  shutil.rmtree(aside, ignore_errors=True)
  shutil.copytree(check_pretrained(pretrained) / PRETRAIN_DIR / rundir.CHECKPOINT_DIR, aside)
  aside.replace(own)


def begin_training(
  experiment: VideoExperiment, state: steps.TrainState, nets: Any, *, train: Any
) -> steps.TrainState:
  """Returns a fresh state with the results of pretraining: concepts, and nets that train on."""
  params, batch_stats = dict(state.params), dict(state.batch_stats)
  # In `two_stage` the state holds no nets: it trains on their features.
  if nets is not None and experiment.config.training == "end_to_end":
    trained = devices.replicate(placed_nets(experiment, nets))
    params |= trained["params"]
    batch_stats |= trained["batch_stats"]
  if experiment.model.selection == "gate":
    features = train
    # `two_stage` has computed the features already.
    if experiment.config.training == "end_to_end":
      variables = {"params": params, "batch_stats": batch_stats}
      features = evaluate.extract_features(experiment, variables, ("light",))
    concepts = _concepts_of(features, experiment.config)
    # The gate multiplies features by the concepts, so these are the columns of a kernel.
    kernel = devices.replicate(np.ascontiguousarray(concepts.T))
    params[GATE_NAME] = {**params[GATE_NAME], CONCEPTS: {"kernel": kernel}}
  return state.replace(params=params, batch_stats=batch_stats)


def _concepts_of(features: VideoArrays, config: Config) -> np.ndarray:
  """Finds the concepts, clusters of the light net's features of the training segments."""
  arrays = features.arrays
  # Only real segments of videos that could be read.
  segments = arrays["light"][arrays["valid"] & (arrays["weight"] > 0)[:, None]]
  # A random sample with the run's seed, so that a restart finds the same concepts.
  order = np.random.default_rng(config.seed).permutation(len(segments))
  sample = segments[order[:_CONCEPT_SEGMENTS]]
  return find_concepts(sample, k=config.model.gate.concepts, seed=config.seed)


def whole_network(
  experiment: VideoExperiment, state: steps.TrainState, nets: Any
) -> dict[str, Any]:
  """Returns the variables of the whole network."""
  variables = variables_of(state)
  if experiment.config.training == "end_to_end":
    return variables
  # `two_stage` trained the gate and the classifier alone: the nets join them here.
  for kind, tree in placed_nets(experiment, nets).items():
    variables[kind] = {**variables[kind], **tree}
  return variables


def placed_nets(experiment: VideoExperiment, nets: Any) -> dict[str, Any]:
  """Renames the trained variables as the whole network names them."""
  # Networks on precomputed features have no trained nets.
  if nets is None:
    return {}
  # Maps each slot of the whole network to the trained net that fills it.
  places = {"heavy": experiment.heavy_from}
  if experiment.model.light is not None:
    places["light"] = "light"
  renamed = {}
  # A net without BatchNorm has no `batch_stats`.
  for kind, tree in nets.items():
    renamed[kind] = {place: tree[name] for place, name in places.items() if name in tree}
  return renamed


def variables_of(state: steps.TrainState) -> dict[str, Any]:
  """Returns the variables that a phase has trained."""
  return {"params": state.params, "batch_stats": state.batch_stats}
