"""What every loaded run keeps to."""

import json

import jax
import numpy as np

from gating_jax import load_run


def loaded(workdir):
  """`load_run`, its config that of the run and its arrays on the host."""
  model, variables, config = load_run(workdir)
  assert json.loads(config.to_json()) == json.loads((workdir / "config.json").read_text())
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
  return model, variables, config
