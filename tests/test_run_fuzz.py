import contextlib
import gc
import importlib
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from gating_jax.reports import compared_runs, comparison
from gating_jax.training import devices, settings
from gating_jax.training.checkpoints import CheckpointError, Checkpoints
from gating_jax.training.journal import Journal, read_lines
from gating_jax.training.rundir import RunDir, RunDirError, open_run
from tests.helpers import tiny

# A restore that fails leaves coroutines of orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SECONDS, MEGABYTES = 10, 500
NAMED = (RunDirError, CheckpointError, ValueError)


def state(step):
  return devices.replicate({"w": jnp.arange(300.0) + step, "b": jnp.full((2, 3), step, jnp.int32)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run directory as training leaves it, with two checkpoints."""
  path = tmp_path_factory.mktemp("runs") / "run"
  config = importlib.import_module("configs.digits_resnet20").get_config()
  with open_run(path, config) as run_dir:
    checkpoints, journal = Checkpoints(run_dir.checkpoints), Journal(path, 0, 2)
    for step in (1, 2):
      checkpoints.save(step, state(step))
      journal.write(step, "train", {"loss": 1 / step, "accuracy": 0.5})
      journal.write(step, "test", {"accuracy": 0.5 * step, "mac_ratio": 0.25})
      journal.write_histograms(step, "test", {"gates/layer00/probs": np.arange(40)})
    journal.close()
    checkpoints.close()
    run_dir.finish(
      {"step": 2, "accuracy": 1.0, "macs": 100.5, "layers": [{"name": "conv", "open": 0.5}]}
    )
  return path


def mutate(random, data):
  """Returns the bytes with some flipped, cut off, doubled, zeroed or replaced, or all removed."""
  size = len(data)
  start, end = sorted(random.integers(0, size + 1, 2))
  kind = random.integers(6)
  if kind == 0:
    changed = bytearray(data)
    for place in random.integers(0, max(1, size), random.integers(1, 9)):
      if size:
        changed[place] ^= 1 << random.integers(8)
    return bytes(changed)
  parts = {1: b"", 2: data[start:end] * 2, 3: bytes(end - start), 4: random.bytes(end - start)}
  return data[:start] if kind == 5 else data[:start] + parts[kind] + data[end:]


def read_checkpoint(path):
  checkpoints = Checkpoints(path / "checkpoints", read_only=True)
  try:
    found = checkpoints.restore(jax.eval_shape(lambda: state(0)), devices.replicated_sharding())
  finally:
    checkpoints.close()
  assert found is None or tiny.bit_equal(found[1], state(found[0]))


def read_comparison(path):
  runs = [compared_runs.read_run(path, "run")]
  comparison.render_comparison(runs)


READERS = (
  settings.config_of,
  lambda path: RunDir(path).result(),
  read_checkpoint,
  read_comparison,
  lambda path: read_lines(path / "metrics.jsonl"),
  lambda path: read_lines(path / "histograms.jsonl"),
)


def raised_by(reader, path):
  try:
    reader(path)
  except AssertionError:
    raise
  except Exception as error:
    return error
  return None


def check_readers(run, folder, seed):
  random = np.random.default_rng(seed)
  path = shutil.copytree(run, folder)
  # Small files are changed as often as the many files of checkpoints.
  own = sorted(path.glob("*.json*"))
  files = own if seed % 2 else sorted(f for f in (path / "checkpoints").rglob("*") if f.is_file())
  file = files[random.integers(len(files))]
  if random.integers(12) == 0:
    file.unlink()
  else:
    file.write_bytes(mutate(random, file.read_bytes()))
  for reader in READERS:
    start = time.monotonic()
    error = raised_by(reader, path)
    assert time.monotonic() - start < SECONDS, (seed, file)
    assert error is None or isinstance(error, NAMED), (seed, file, error)
    # One line, and one for each checkpoint where none can be read.
    assert error is None or str(path) in str(error) and len(str(error).splitlines()) <= 4, (
      seed,
      file,
      error,
    )
  shutil.rmtree(path)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
  monkeypatch.setattr(logging, "warning", lambda *_: None)
  yield
  gc.collect()


def test_a_damaged_run_directory_is_read_right_or_named(run, tmp_path):
  for seed in range(6):
    check_readers(run, tmp_path / "run", seed)


@pytest.mark.slow
def test_500_damaged_run_directories_are_read_right_or_named(run, tmp_path):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(500):
    with contextlib.redirect_stdout(None):
      check_readers(run, tmp_path / "run", seed)
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES
