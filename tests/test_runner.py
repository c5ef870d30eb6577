import contextlib
import fcntl
import importlib
import json
import os
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import ml_collections
import pytest

from gating_jax import programmes, runner
from gating_jax.training import loop, outlines, stopping
from gating_jax.training.checkpoints import Checkpoints
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


@pytest.fixture
def unopened(monkeypatch):
  """A function that returns the run function and the example config of a programme.

  Its data must not be opened.
  """

  def unopened(name):
    row = programmes.PROGRAMMES[name]
    module = importlib.import_module(row.module)
    monkeypatch.setattr(module, "build", lambda config: pytest.fail("the data were opened"))
    return module.run, importlib.import_module(f"configs.{row.example.config}").get_config()

  return unopened


@pytest.mark.parametrize("name", programmes.PROGRAMMES)
def test_what_is_wrong_with_a_run_directory_is_found_before_the_data_are_opened(
  name, unopened, tmp_path
):
  run, config = unopened(name)
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match="mode must be one of .*; got 'trian'"):
    run(config, workdir, "trian")
  with pytest.raises(RunDirError, match="holds no run"):
    run(config, workdir, "report")
  (tmp_path / "notes").touch()
  with pytest.raises(RunDirError, match="must be a run directory or new"):
    run(config, tmp_path, "train")
  with pytest.raises(RunDirError, match="cannot be written: Not a directory"):
    run(config, tmp_path / "notes" / "run", "train")
  assert not workdir.exists()
  workdir.mkdir()
  (workdir / "config.json").write_text(config.to_json())
  for mode in ("evaluate", "report", "compile"):
    with pytest.raises(RunDirError, match="in .*run/checkpoints yet"):
      run(config, workdir, mode)
  (workdir / "result.json").write_text("{}")
  other = config.copy_and_resolve_references()
  other.seed = 1234
  with pytest.raises(RunDirError, match="another config.*\n.*seed: .* there, 1234 here"):
    run(other, workdir, "train")
  with (workdir / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RunDirError, match="is in use by another process"):
      run(config, workdir, "train")


@pytest.mark.parametrize(
  ("name", "field", "made", "message"),
  [
    ("classification", "model.init_from", (), "model.init_from must name a run directory; .*other"),
    (
      "classification",
      "model.init_from",
      ("config.json",),
      "model.init_from must name a run with a checkpoint; .*other has none",
    ),
    (
      "long_video",
      "pretrained",
      (),
      "pretrained must be a run directory .*other/pretrain has none",
    ),
  ],
)
def test_a_run_to_start_from_is_looked_for_before_the_data_are_opened(
  name, field, made, message, unopened, tmp_path
):
  run, config = unopened(name)
  for file in made:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_text(config.to_json())
  config.update_from_flattened_dict({field: str(tmp_path / "other")})
  with pytest.raises(RunDirError, match=message):
    run(config, tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_stopped_by_ctrl_c_ends_in_an_interrupt_after_its_checkpoint(
  number, at, tmp_path, capsys, ctrl_c
):
  def advance(state, step):
    if step == at:
      os.kill(os.getpid(), number)
    return state, {"loss": jnp.ones(1)}

  def take_steps():
    with runner.Training(tmp_path, {"w": jnp.ones(1)}, 4) as training:
      training.begin("a toy")
      return training.run(advance, loop.LoopSettings(total_steps=4), watch=lambda step, means: ())

  if number == signal.SIGINT:
    with pytest.raises(stopping.Interrupted):
      take_steps()
  else:
    # A request at the last step has nothing left to stop.
    assert take_steps() == (at == 3)
  stopped = number == signal.SIGINT or at < 3
  assert ("stopped as asked; a checkpoint is saved" in capsys.readouterr().out) == stopped
  assert (tmp_path / "checkpoints" / str(at + 1)).is_dir()


def test_a_checkpoint_beyond_the_steps_of_the_config_is_refused(tmp_path):
  fresh = {"w": jnp.ones(1)}
  with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
    checkpoints.save(5, fresh)
  with runner.Training(tmp_path, fresh, 5) as training:
    assert training.step == 5
  message = "holds a checkpoint of step 5, beyond the 4 of this config"
  with pytest.raises(RunDirError, match=f"^{tmp_path} {message}$"):
    runner.Training(tmp_path, fresh, 4)


def test_a_training_has_no_journal_before_it_begins(tmp_path):
  with runner.Training(tmp_path, {"w": jnp.ones(1)}, 4) as training:
    with pytest.raises(ValueError, match="a training has no journal before it begins"):
      training.say("too early")
    training.begin("a toy")
    assert training.journal is not None


class _WithClasses(StandIn):
  """A programme whose data have these classes."""

  class_names = ("0", "10", "2")


def test_a_run_is_refused_where_its_data_have_other_classes_than_at_its_beginning(tmp_path):
  written = []
  programme = _WithClasses(CONFIG, train=written.append, test=written.append)
  runner.run(programme, tmp_path, "train")
  sets = [SimpleNamespace(in_epoch=3, class_names=programme.class_names)]
  outlines.write_outlines(tmp_path, sets)
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  for mode in ("train", "evaluate"):
    runner.run(programme, tmp_path, mode)
  programme.class_names = ("0", "2", "10")
  for mode in ("train", "evaluate"):
    with pytest.raises(RunDirError, match="number 1 is the first that differs: .10. and .2."):
      runner.run(programme, tmp_path, mode)
  assert len(written) == 3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"examples": -1}, "examples must be an integer >= 0; it has -1"),
    ({"examples": True}, "examples must be an integer >= 0; it has True"),
    ({"class_names": "ab"}, "class_names must be texts; it has 'ab'"),
    ({"shapes": [3]}, r"shapes must be a section; it has \(3,\)"),
    ({"shape": [8, 0]}, r"a shape must be of integers >= 1; it has \(8, 0\)"),
  ],
)
def test_a_damaged_outline_of_the_data_is_named(tmp_path, changes, message):
  outlines.write_outlines(tmp_path, [outlines.Outline(3, ("a", "b"), (8, 8, 1))])
  (kept,) = outlines.read_outlines(tmp_path)
  assert (kept.examples, kept.class_names, kept.shape) == (3, ("a", "b"), (8, 8, 1))
  file = tmp_path / outlines.DATA_FILE
  (fields,) = json.loads(file.read_text())["sets"]
  file.write_text(json.dumps({"sets": [fields | changes]}))
  with pytest.raises(RunDirError, match=f"{file.name} is damaged: {message}$"):
    outlines.read_outlines(tmp_path)
