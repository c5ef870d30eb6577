"""Properties of every loaded run."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest

from gating_jax import load_run, terminal
from gating_jax.data import image_sets, scenes, streaming
from gating_jax.video import sets

READERS = (
  (image_sets, "load"),
  (image_sets, "count_images"),
  (streaming, "open_stream"),
  (scenes, "make_scenes"),
  (scenes, "open_scenes"),
  (sets, "open_set"),
)


def loaded(workdir):
  """Runs `load_run` without data; its config must be the run's and its arrays on the host."""
  with pytest.MonkeyPatch.context() as patch:
    for module, reader in READERS:
      patch.delattr(module, reader)
    # Even a short time is told.
    patch.setattr(terminal, "_AFTER", 0.0)
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
      model, variables, config = load_run(workdir)
  # It belongs to the user's program.
  assert not written.getvalue()
  assert json.loads(config.to_json()) == json.loads((workdir / "config.json").read_text())
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
  return model, variables, config
