import ml_collections
import pytest

from gating_jax import runner
from gating_jax.training.rundir import RunDirError
from tests.helpers.programmes import StandIn

CONFIG = ml_collections.ConfigDict({"seed": 0})


def test_only_training_opens_the_run(tmp_path):
  called = []
  programme = StandIn(
    CONFIG,
    train=lambda run: called.append(("train", run.path)),
    test=lambda path: called.append(("evaluate", path)),
    report=lambda run, notice: called.append(("report", run.path)),
  )
  modes = ("train", "evaluate", "report")
  for mode in modes:
    if mode != "train":
      with pytest.raises(RunDirError, match="holds no run"):
        runner.run(programme, tmp_path / "run", mode)
      assert not (tmp_path / "run").exists()
  for mode in modes:
    runner.run(programme, tmp_path / "run", mode)
  assert called == [(mode, tmp_path / "run") for mode in modes]


def test_other_kinds_of_runs_name_the_modes_they_have(tmp_path):
  with pytest.raises(ValueError, match="mode must be one of evaluate, report, train; got 'export'"):
    runner.run(StandIn(CONFIG), tmp_path, "export")
