"""Where the variables of networks for long videos come from: checkpoints, the first training, or another run.

A whole network names its nets `light` and `heavy`; those that were trained before it are taken under these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gating_jax.layers.gate import GATE_NAME
from gating_jax.layers.segment_gate import CONCEPTS
from gating_jax.paths import user_path
from gating_jax.training import devices, hosts, rundir, steps
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.video import evaluate
from gating_jax.video.build import LIGHT, Phase, VideoExperiment
from gating_jax.video.concepts import find_concepts

PRETRAIN_DIR = "pretrain"
_CONCEPT_SEGMENTS = 20_000  # that concepts are found from, at most


def restore(phase: Phase, path: Path, seed: int, *, read_only: bool = False) -> tuple[int, Any]:
  """The newest checkpoint's step and state, or step 0 and a fresh state."""
  state = steps.init_state(phase.model, phase.optimiser, seed, phase.shapes)
  directory = path / rundir.CHECKPOINT_DIR
  if not hosts.any_of(directory.exists()):  # before any process makes it
    return 0, devices.replicate(state)
  checkpoints = Checkpoints(directory, read_only=read_only)
  try:
    return checkpoints.restore(state, devices.replicated_sharding()) or (
      0,
      devices.replicate(state),
    )
  finally:
    checkpoints.close()


def trained_nets(experiment: VideoExperiment, path: Path) -> Any:
  """The variables of both nets, from this run or the one named by `pretrained`."""
  if experiment.pretraining is None:
    raise ValueError("pretrain.epochs must be those of the pretrained run; got 0")
  path = user_path(experiment.config.pretrained or path) / PRETRAIN_DIR
  if not path.is_dir():
    raise rundir.RunDirError(
      f"pretrained must be a run directory in which nets were trained; {path} does not exist"
    )
  step, state = restore(experiment.pretraining, path, experiment.config.seed, read_only=True)
  if step != experiment.pretraining.settings.total_steps:
    raise rundir.RunDirError(
      f"{path} must hold nets trained for {experiment.pretraining.settings.total_steps} steps; "
      f"its newest checkpoint is of step {step}"
    )
  return of_state(state)


def begin(
  experiment: VideoExperiment, state: steps.TrainState, nets: Any, train: Any
) -> steps.TrainState:
  """A fresh state with what the first training found: nets, if they go on being trained, and concepts."""
  params, batch_stats = dict(state.params), dict(state.batch_stats)
  if nets is not None and experiment.config.training == "end_to_end":
    trained = devices.replicate(nets_of(experiment, nets))
    params |= trained["params"]
    batch_stats |= trained["batch_stats"]
  if experiment.model.selection == "gate":
    features = (
      train
      if experiment.config.training == "two_stage"
      else evaluate.extract_features(
        experiment, {"params": params, "batch_stats": batch_stats}, ("light",)
      )
    )
    seen = features.arrays["light"][
      features.arrays["valid"] & (features.arrays["weight"] > 0)[:, None]
    ]
    seen = seen[
      np.random.default_rng(experiment.config.seed).permutation(len(seen))[:_CONCEPT_SEGMENTS]
    ]
    concepts = find_concepts(
      seen, experiment.config.model.gate.concepts, seed=experiment.config.seed
    )
    gate = params[GATE_NAME]
    params[GATE_NAME] = {
      **gate,
      CONCEPTS: {"kernel": devices.replicate(np.ascontiguousarray(concepts.T))},
    }
  return state.replace(params=params, batch_stats=batch_stats)


def whole(experiment: VideoExperiment, state: steps.TrainState, nets: Any) -> dict[str, Any]:
  """The variables of the whole network."""
  variables = of_state(state)
  if experiment.config.training == "end_to_end":
    return variables
  return variables | {
    kind: {**variables[kind], **tree} for kind, tree in nets_of(experiment, nets).items()
  }


def nets_of(experiment: VideoExperiment, nets: Any) -> dict[str, Any]:
  """The trained variables under the names that the whole network gives them."""
  if nets is None:  # those for features made elsewhere have none
    return {}
  alone = experiment.config.model.selection == LIGHT
  places = {"heavy": "light" if alone else "heavy"} | (
    {} if experiment.model.light is None else {"light": "light"}
  )
  return {
    kind: {place: tree[name] for place, name in places.items() if name in tree}
    for kind, tree in nets.items()
  }


def of_state(state: steps.TrainState) -> dict[str, Any]:
  """The variables of what a phase has trained."""
  return {"params": state.params, "batch_stats": state.batch_stats}
