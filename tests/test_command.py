"""What the command says and returns, within this process; `test_cli.py` has what needs processes of its own."""

import re
import shutil

import jax
import pytest

from gating_jax.models import resnet
from tests.helpers import ROOT, tiny_cli
from tests.helpers.command import run_command

CONFIG = f"--config={ROOT / 'configs' / 'digits_resnet20.py'}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.lerning_rate=1", "got 'lerning_rate'. Did you mean 'learning_rate'"),
        ("--config.modle.gating=none", "got 'modle'. Did you mean 'model'"),
        ("--config.model.gating=chanel", "model.gating must be one of .*; got 'chanel'. Did you mean 'channel'"),
        ("--config.loss.sparsity.kind=l2", "must be one of budget, l0, macs, target_rate; got 'l2'"),
        ("--config.optim.epochs=ten", "config.optim.epochs.*ten"),
        ("--config.optim.batch_size=100000", "optim.batch_size must be at most 1437, .* got 100000"),
        ("--mode=trian", "train.evaluate.report"),
        ("--wrokdir=elsewhere", "Did you mean: workdir"),
        ("evaluate", "unknown arguments .*evaluate"),
        ("--config=configs/digits_resnet21.py", "digits_resnet21"),
        ("--config=configs/digits_resnet20.py:epoch=3", "a variant must be one of .*'epochs'.*; got 'epoch=3'"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_compiled(argument, message, tmp_path, caplog, monkeypatch):
  monkeypatch.chdir(ROOT)
  with jax.log_compiles():
    status, said = run_command(CONFIG, f"--workdir={tmp_path / 'new'}", argument)
  assert status != 0
  assert re.search(message, said), said
  assert "Traceback" not in said
  assert "Finished XLA compilation" not in caplog.text
  assert not (tmp_path / "new").exists()


def test_a_workdir_is_asked_for():
  status, said = run_command(CONFIG)
  assert status != 0
  assert "workdir" in said


def test_a_config_is_asked_for_but_not_to_compare(tmp_path):
  for arguments in ([f"--workdir={tmp_path}"], [CONFIG, f"--workdir={tmp_path}", "--mode=compare"]):
    status, said = run_command(*arguments)
    assert (status, said) == (2, "error: --config must be given, but not with --mode=compare\n")


def test_a_run_is_trained_looked_at_and_compared(tmp_path, monkeypatch):
  monkeypatch.setitem(resnet.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.chdir(tmp_path)
  command = (CONFIG, f"--workdir={tmp_path / 'run'}", "--config.model.name=tiny", "--config.model.gating=none",
             "--config.optim.epochs=1")
  status, said = run_command(*command)
  assert status == 0, said
  accuracy = re.search(r"test accuracy +(\d+\.\d\d %)", said)[1]
  for mode in ("train", "evaluate", "report"):
    status, said = run_command(*command, f"--mode={mode}")
    assert status == 0, said
    assert accuracy in said or mode == "report"
  shutil.copytree(tmp_path / "run", tmp_path / "copy")
  status, said = run_command(f"--workdir={tmp_path / 'run'},{tmp_path / 'copy'}", "--mode=compare")
  assert status == 0, said
  assert f"<td>{accuracy}</td><td>{accuracy}</td>" in (tmp_path / "comparison.html").read_text()
  status, said = run_command(*command, "--config.seed=1")
  assert status == 2
  assert "holds a run of another config" in said


def test_processes_without_a_coordinator_and_a_folder_that_is_a_file_are_named(tmp_path):
  (tmp_path / "file").touch()
  status, said = run_command(CONFIG, f"--workdir={tmp_path / 'run'}", "--processes=2")
  assert (status, said) == (2, "error: coordinator must be given with processes and process; got none\n")
  status, said = run_command(CONFIG, f"--workdir={tmp_path / 'file' / 'run'}")
  assert (status, said) == (2, f"error: workdir {tmp_path}/file/run cannot be written: Not a directory\n")
