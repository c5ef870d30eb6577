"""Files of an older version, commit 88397c1: its exports load, and its runs are resumed.

`fixtures/version_88397c1.zip` was written by that version: an export of a gated net with its
answers, a run that was cut back to step 5, and the journal of the same run to its end at step 10.
"""

import json
import zipfile

import numpy as np
import pytest

from gating_jax.inference.export import load_exported
from tests.helpers import ROOT, tiny_cli
from tests.helpers.command import run_command


@pytest.fixture
def written(tmp_path):
  """The files of the older version."""
  with zipfile.ZipFile(ROOT / "tests/fixtures/version_88397c1.zip") as files:
    files.extractall(tmp_path)
  return tmp_path


def read_journal(file):
  """Returns the training's lines of a journal, by step."""
  lines = map(json.loads, file.read_text().splitlines())
  return {line["step"]: line for line in lines if line["split"] == "train"}


def test_an_export_computes_what_it_did(written):
  expected = np.load(written / "expected.npz")
  loaded = load_exported(written / "export")
  outputs, (logits,) = loaded(expected["images"])
  np.testing.assert_allclose(outputs, expected["logits"], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(logits > 0, expected["gates"])
  assert np.all(np.std(expected["gates"], axis=0) > 0)
  assert loaded.card["accuracy"] == 0.5


@pytest.mark.slow
def test_a_run_is_resumed_and_ends_as_it_did(written, monkeypatch):
  tiny_cli.register(monkeypatch.setitem)
  run = written / "run"
  settings = json.loads((run / "config.json").read_text())
  given = {"model.name": "tiny", "checkpoint_every": 1.0, "log_every": 1}
  given |= {f"optim.{name}": settings["optim"][name] for name in ("epochs", "batch_size")}
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  status, said = run_command("--config=digits", *flags, f"--workdir={run}", "--mode=train")
  assert status == 0, said
  assert "resuming from the checkpoint of step 5" in said
  found, expected = read_journal(run / "metrics.jsonl"), read_journal(written / "metrics.jsonl")
  assert list(found) == list(range(1, 11))
  for step in range(6, 11):
    for name, value in expected[step].items():
      if name != "split":
        # The older version numbered layers.
        now = name.replace("layer00", "stage1_block1/conv1")
        # Another processor rounds in another way.
        assert found[step][now] == pytest.approx(value, rel=1e-3, abs=1e-4), (step, name)
  result = json.loads((run / "result.json").read_text())
  assert result["images"] == 360
