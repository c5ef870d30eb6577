"""Networks of other runs, as their newest checkpoints have them."""

from __future__ import annotations

import jax

from gating_jax.config_files import Config
from gating_jax.images.build import Experiment, build
from gating_jax.training import outlines
from gating_jax.training.checkpoints import Checkpoint, restore_newest
from gating_jax.training.rundir import RunDir


def restore_network(config: Config, run_dir: RunDir) -> tuple[Experiment, Checkpoint | None]:
  """Builds the experiment of a run, and restores the variables of its network.

  The run keeps outlines of its data, so that they need not be there. Those of a run of an earlier
  version, which keeps none, are opened.

  Args:
    config: the config of the run.
    run_dir: its run directory.
  Returns:
    the experiment; and the newest checkpoint with `params` and `batch_stats` for its state, or None
    where there is none.
  Raises:
    ValueError, DatasetNotPreparedError: as in `build`.
    RunDirError: the outlines are damaged.
    CheckpointError: there are checkpoints, and none can be read.
  """
  experiment = build(config, outlines.read_outlines(run_dir.path))
  # Shapes are enough to restore, so no state is initialised.
  found = restore_newest(run_dir.checkpoints, jax.eval_shape(experiment.init_state))
  if found is None:
    return experiment, None
  variables = {"params": found.state.params, "batch_stats": found.state.batch_stats}
  return experiment, Checkpoint(found.step, variables)
