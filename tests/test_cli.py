import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from gating_jax.images import classification
from gating_jax.models import resnets
from gating_jax.training import devices, steps
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import ROOT, environment, pages, tiny, tiny_cli
from tests.helpers.command import run_command

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH, EPOCHS = 11, 40
TRAINING = {"model.name": "tiny", "optim.epochs": EPOCHS, "optim.learning_rate": 0.05}
ENVIRONMENT = environment(devices=1)
CONFIG = f"--config={ROOT / 'configs' / 'digits_resnet20.py'}"


def command(*arguments, program=("-m", "gating_jax.cli")):
  return [
    sys.executable,
    *program,
    CONFIG,
    *arguments,
  ]


def start(workdir, *arguments, **changes):
  """Starts a training of the tiny net; its output goes to `.out` and `.err` next to `workdir`."""
  settings = [f"--config.{name}={value}" for name, value in (TRAINING | changes).items()]
  with workdir.with_suffix(".out").open("w") as out, workdir.with_suffix(".err").open("w") as err:
    return subprocess.Popen(
      command(*settings, f"--workdir={workdir}", *arguments, program=(tiny_cli.__file__,)),
      env=ENVIRONMENT,
      stdout=out,
      stderr=err,
    )


def finish(workdir, *arguments, **changes):
  """Returns `(exit code, stdout, stderr)` of an uninterrupted training."""
  code = start(workdir, *arguments, **changes).wait(300)
  return code, workdir.with_suffix(".out").read_text(), workdir.with_suffix(".err").read_text()


def here(monkeypatch, workdir, *arguments, **changes):
  """Returns the exit status and the output of the same command within this process."""
  tiny_cli.register(monkeypatch.setitem)
  settings = [f"--config.{name}={value}" for name, value in (TRAINING | changes).items()]
  return run_command(CONFIG, *settings, f"--workdir={workdir}", *arguments)


def checkpoints_of(workdir):
  folder = workdir / "checkpoints"
  return (
    sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit()) if folder.exists() else []
  )


def wait_for_checkpoint(process, workdir, after=0):
  """Waits for a checkpoint of a later step than `after`."""
  until = time.time() + 300
  while not any(step > after for step in checkpoints_of(workdir)):
    assert process.poll() is None, workdir.with_suffix(".err").read_text()
    assert time.time() < until, "no checkpoint came"
    time.sleep(0.01)


def final_state(workdir, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  from configs.digits_resnet20 import get_config

  config = get_config()
  config.update_from_flattened_dict(TRAINING)
  built = classification.build(config)
  like = jax.eval_shape(lambda: steps.init_state(built.model, built.optimiser, 0, built.test.shape))
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()


def result(workdir):
  found = json.loads((workdir / "result.json").read_text())
  del found["seconds_since_last_start"]
  return found


def snapshot(workdir):
  """Returns every file's bytes and time of change, except the lock's."""
  return {
    f.relative_to(workdir): (f.read_bytes() if f.is_file() else None, f.stat().st_mtime_ns)
    for f in workdir.rglob("*")
    if f.name != ".lock"
  }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The directory of an uninterrupted run; tests do not change it."""
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  code, out, err = finish(workdir)
  assert code == 0, err
  assert "test accuracy" in out
  return workdir


def test_what_stops_a_process_is_written_in_one_call(tmp_path):
  """Processes of a job then do not write into each other's lines, whatever the buffering."""
  (tmp_path / "file").touch()
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps each write apart
  with ours, theirs:
    process = subprocess.run(
      command(f"--workdir={tmp_path / 'file' / 'run'}"),
      check=False,
      cwd=ROOT,
      timeout=300,
      env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
      stderr=theirs,
    )
    theirs.close()
    written = [call.decode() for call in iter(lambda: ours.recv(10_000), b"")]
  assert process.returncode == 2
  assert f"error: workdir {tmp_path}/file/run cannot be written: Not a directory\n" in written


def test_a_run_leaves_its_files(finished):
  assert {f.name for f in finished.iterdir()} == {
    ".lock",
    "config.json",
    "result.json",
    "metrics.jsonl",
    "predictions.csv",
    "histograms.jsonl",
    "gates.png",
    "gates.csv",
    "report.html",
    "checkpoints",
    "tensorboard",
    "provenance.json",
    "data.json",
  }
  assert checkpoints_of(finished)[-1] == STEPS_PER_EPOCH * EPOCHS
  assert result(finished)["accuracy"] > 0.5
  assert result(finished)["step"] == STEPS_PER_EPOCH * EPOCHS


def test_a_run_killed_twice_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
  workdir, seed = tmp_path / "killed", random.randrange(10**6)
  print(f"seed of the moments of the kills: {seed}")
  moments, reached = random.Random(seed), 0
  for _ in range(2):
    process = start(workdir)
    wait_for_checkpoint(process, workdir, after=reached)
    time.sleep(moments.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (workdir / "result.json").exists()
    assert checkpoints_of(workdir)[-1] > reached
    if reached:
      assert (
        f"resuming from the checkpoint of step {reached} "
        in workdir.with_suffix(".out").read_text()
      )
    reached = checkpoints_of(workdir)[-1]
  assert reached < STEPS_PER_EPOCH * EPOCHS
  code, out, err = finish(workdir)
  assert code == 0, err
  assert f"resuming from the checkpoint of step {reached} " in out
  ours, theirs = final_state(workdir, monkeypatch), final_state(finished, monkeypatch)
  assert ours[0] == theirs[0] == STEPS_PER_EPOCH * EPOCHS
  assert tiny.bit_equal(ours[1], theirs[1])
  assert result(workdir) == result(finished)
  for name in ("histograms.jsonl", "gates.csv", "gates.png"):
    assert (workdir / name).read_bytes() == (finished / name).read_bytes(), name
  assert pages.lasting(workdir) == pages.lasting(finished)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  seen = [(line["split"], line["step"]) for line in lines]
  assert len(seen) == len(set(seen))
  assert seen == sorted(seen, key=lambda one: one[1])


def test_a_run_that_is_stopped_says_so_and_goes_on(finished, tmp_path, monkeypatch, ctrl_c):
  """Ctrl-C alone gives a status that keeps a shell from the next command."""
  workdir, step = tmp_path / "stopped", 0
  for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
    process = start(workdir)
    wait_for_checkpoint(process, workdir, after=step)
    process.send_signal(number)
    assert process.wait(60) == status
    out = workdir.with_suffix(".out").read_text()
    assert "stopped as asked; a checkpoint is saved" in out
    assert not (workdir / "result.json").exists()
    step = checkpoints_of(workdir)[-1]
    assert f"step {step}/{STEPS_PER_EPOCH * EPOCHS}  stopped as asked" in out
    err = workdir.with_suffix(".err").read_text()
    assert ("stopping after this step; Ctrl-C again" in err) == (number == signal.SIGINT)
  code, out, err = finish(workdir)
  assert code == 0, err
  assert f"resuming from the checkpoint of step {step} " in out
  assert tiny.bit_equal(final_state(workdir, monkeypatch)[1], final_state(finished, monkeypatch)[1])


def test_a_finished_run_says_so_and_changes_nothing(finished, monkeypatch):
  before = snapshot(finished)
  code, out = here(monkeypatch, finished)
  assert code == 0, out
  assert "holds a finished run of this config; nothing was trained or changed" in out
  assert f"{100 * result(finished)['accuracy']:.2f} %" in out
  assert snapshot(finished) == before


def test_evaluation_gives_the_result_of_the_training_and_changes_nothing(finished, monkeypatch):
  before = snapshot(finished)
  code, out = here(monkeypatch, finished, "--mode=evaluate")
  assert code == 0, out
  assert f"checkpoint of step {STEPS_PER_EPOCH * EPOCHS}" in out
  assert re.search(rf"test accuracy +{100 * result(finished)['accuracy']:.2f} %", out)
  assert snapshot(finished) == before


def test_a_report_is_written_anew(finished, tmp_path, monkeypatch):
  workdir = tmp_path / "copy"
  shutil.copytree(finished, workdir)
  (workdir / "report.html").unlink()
  before = snapshot(workdir)
  code, out = here(monkeypatch, workdir, "--mode=report")
  assert code == 0, out
  assert (
    f"report of the checkpoint of step {STEPS_PER_EPOCH * EPOCHS}: {workdir / 'report.html'}" in out
  )
  report = (workdir / "report.html").read_text()
  assert f"{100 * result(finished)['accuracy']:.2f} %" in report
  assert "Gates and classes</h2>" in report
  assert {name: value for name, value in snapshot(workdir).items() if name in before} == before


def test_runs_are_compared_without_a_config(finished, tmp_path, monkeypatch):
  before = snapshot(finished)
  other = tmp_path / "finished"
  shutil.copytree(finished, other)
  monkeypatch.chdir(tmp_path)
  code, out = run_command("--mode=compare", f"--workdir={finished},{other}")
  assert code == 0, out
  accuracy = f"{100 * result(finished)['accuracy']:.2f} %"
  assert re.search(rf"accuracy +{accuracy} +{accuracy}\n", out)
  assert f"{tmp_path.name}/finished" in out
  assert f"<td>{accuracy}</td><td>{accuracy}</td>" in (tmp_path / "comparison.html").read_text()
  assert snapshot(finished) == before
  code, out = here(monkeypatch, tmp_path / "new", "--mode=compare")
  assert (code, out.count("--config must not be given with --mode=compare")) == (2, 1)


def test_another_config_is_refused(finished, monkeypatch):
  before = snapshot(finished)
  code, err = here(monkeypatch, finished, **{"optim.momentum": 0.5})
  assert code != 0
  assert f"workdir {finished} holds a run of another config" in err
  assert "optim.momentum: 0.9 there, 0.5 here" in err
  assert "Traceback" not in err
  assert snapshot(finished) == before


_INTERRUPTED = """
from gating_jax import cli
from gating_jax.images import classification
def interrupted(*_):
  print("before")
  raise KeyboardInterrupt
classification.run = interrupted
cli.main()
"""


@pytest.mark.parametrize(
  ("mode", "said"),
  [("train", "resumes from the newest checkpoint, if there is one"), ("export", "starts over")],
)
def test_ctrl_c_says_what_the_same_command_does_next(mode, said, tmp_path):
  done = subprocess.run(
    command(f"--workdir={tmp_path}", f"--mode={mode}", program=("-c", _INTERRUPTED)),
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert (done.returncode, done.stdout) == (130, "before\n")
  assert done.stderr == f"interrupted; the same command {said}\n"
