"""Jobs of several processes, as `launch/local.sh` starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny
import tiny_cli

from configs.digits_resnet20 import get_config
from gating_jax.experiments import classification
from gating_jax.models import resnet
from gating_jax.training import devices, hosts, steps
from gating_jax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parent.parent
STEPS_PER_EPOCH = 5
TRAINING = {"model.name": "tiny", "optim.batch_size": 280, "optim.epochs": 1, "optim.learning_rate": 0.05}
PROGRAM = f"{sys.executable} {ROOT / 'tests' / 'tiny_cli.py'}"


def arguments(workdir, config="digits_resnet20", **changes):
  settings = [f"--config.{name}={value}" for name, value in changes.items()]
  return [f"--config={ROOT / 'configs' / config}.py", *settings, f"--workdir={workdir}"]


def launched(workdir, environment=(), **changes):
  """A started job of two processes of four devices; what it prints is in `workdir`'s `.out` neighbour."""
  with workdir.with_suffix(".out").open("w") as out:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "local.sh"), "2", *arguments(workdir, **changes)], stdout=out,
        stderr=subprocess.STDOUT, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICES": "4", "GATING_JAX": PROGRAM, **dict(environment)})


def alone(*arguments, devices=8):
  """What one process of so many devices prints."""
  done = subprocess.run(
      [*PROGRAM.split(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
      env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"})
  assert done.returncode == 0, done.stderr
  return done.stdout


def finished(job, workdir):
  """The exit status of a job and what it printed."""
  try:
    status = job.wait(300)
  finally:
    job.terminate()
  return status, workdir.with_suffix(".out").read_text()


@pytest.fixture
def final_state(monkeypatch):
  """`(workdir, **changes) -> ` the state of the newest checkpoint of a finished run of so many epochs."""
  monkeypatch.setitem(resnet.RESNETS, "tiny", tiny_cli.TINY)

  def read(workdir, **changes):
    config = get_config()
    config.update_from_flattened_dict(changes)
    built = classification.build(config)
    like = jax.eval_shape(lambda: steps.init_state(built.model, built.optimiser, 0, built.test.shape))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step, state = checkpoints.restore(like, devices.replicated_sharding())
    checkpoints.close()
    assert step == STEPS_PER_EPOCH * config.optim.epochs
    return state

  return read


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
def test_two_processes_of_four_devices_do_what_one_of_eight_does(tmp_path, final_state, backend):
  changes = TRAINING | {"devices.backend": backend}
  status, said = finished(launched(tmp_path / "two", **changes), tmp_path / "two")
  assert status == 0, said
  assert said.count("run directory:") == 1  # one of them speaks
  alone(*arguments(tmp_path / "one", **changes))
  two = final_state(tmp_path / "two", **changes)
  assert tiny.relative_gap(two.params, final_state(tmp_path / "one", **changes).params) < 1e-5
  assert {f.name for f in (tmp_path / "two").iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}
  lines = lambda run: (tmp_path / run / "metrics.jsonl").read_text().count("\n")
  assert lines("two") == lines("one")
  evaluated = alone(*arguments(tmp_path / "two", **changes), "--mode=evaluate", devices=1)
  assert f"checkpoint of step {STEPS_PER_EPOCH}" in evaluated


@pytest.mark.slow
def test_two_processes_learn_tasks_as_one_does(tmp_path):
  changes = {"config": "split_digits", "model.width": 0.05, "tasks.count": 2, "optim.epochs": 1, "router.steps": 20,
             "gates.when_full": "reuse"}
  status, said = finished(launched(tmp_path / "two", {"DEVICES": "1"}, **changes), tmp_path / "two")
  assert status == 0, said
  alone(*arguments(tmp_path / "one", **changes), devices=2)
  two, one = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("two", "one"))
  for kind in ("task_aware", "task_agnostic"):
    assert two[kind]["accuracies"][0] == pytest.approx(one[kind]["accuracies"][0], abs=0.03)
    assert two[kind]["accuracies"][1] == pytest.approx(one[kind]["accuracies"][1], abs=0.03)
  assert two["task_aware_macs"] == pytest.approx(one["task_aware_macs"], rel=0.02)
  assert two["free_units"] == one["free_units"]


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_end_and_the_job_goes_on_to_the_same_end(tmp_path, final_state):
  changes = TRAINING | {"optim.epochs": 16, "checkpoint_every": 5}
  quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
  status, said = finished(launched(quiet, **changes), quiet)
  assert status == 0, said
  job = launched(disturbed, {"RESTARTS": "1"}, **changes)
  until = time.time() + 200
  while not any(f.name.isdigit() for f in (disturbed / "checkpoints").glob("*")):
    assert job.poll() is None, disturbed.with_suffix(".out").read_text()
    assert time.time() < until
    time.sleep(0.05)
  peers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
  assert len(peers) == 2
  os.kill(int(peers[-1]), signal.SIGKILL)
  killed = time.time()
  while any(Path(f"/proc/{peer}").exists() for peer in peers):
    assert time.time() - killed < 30
    time.sleep(0.05)
  status, said = finished(job, disturbed)
  assert status == 0, said
  assert "starting it again, from its newest checkpoint (1 of 1)" in said
  assert "going on from the checkpoint of step" in said
  assert tiny.bit_equal(final_state(disturbed, **changes), final_state(quiet, **changes))


@pytest.mark.slow
def test_a_job_that_cannot_begin_ends_on_all_with_the_reason_of_one(tmp_path):
  workdir = tmp_path / "mine"
  workdir.mkdir()
  (workdir / "letter.txt").write_text("not a run")
  status, said = finished(launched(workdir, **TRAINING), workdir)
  assert status == 1
  assert said.count("exists and has no config.json") == 1
  assert [f.name for f in workdir.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("processes", "process", "message"),
    [(2, 2, r"process must be in 0, ..., processes - 1, .*; got process 2, processes 2"),
     (None, 0, "both given with a coordinator; got process 0, processes None")])
def test_processes_that_make_no_job_are_refused(processes, process, message):
  with pytest.raises(ValueError, match=message):
    hosts.connect("localhost:1", processes, process)


@pytest.mark.parametrize("arguments", [(), ("0", "--workdir=x"), ("two", "--workdir=x"), ("2",)])
def test_the_launcher_says_how_it_is_used(arguments):
  told = subprocess.run(["bash", str(ROOT / "launch" / "local.sh"), *arguments], capture_output=True, text=True,
                        check=False)
  assert told.returncode == 2
  assert "Usage: bash launch/local.sh [--dry-run] N" in told.stderr


@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [(("local.sh", "--dry-run", "2"), {"DEVICES": "4", "GATING_JAX": "gating-jax", "XLA_FLAGS": ""},
      "env XLA_FLAGS=--xla_force_host_platform_device_count=4 gating-jax --workdir=a\\ b "
      "--coordinator=localhost:PORT --processes=2 --process=1"),
     (("slurm.sh", "--dry-run"), {"SLURM_SUBMIT_DIR": "/home/me/gating_jax"},
      "srun --kill-on-bad-exit=1 /home/me/gating_jax/.venv/bin/gating-jax --workdir=a\\ b --coordinator=auto"),
     (("tpu.sh", "--dry-run"), {"NAME": "pod", "ZONE": "z"},
      "gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all")])
def test_a_dry_run_prints_what_would_be_done(script, environment, expected):
  told = subprocess.run(["bash", str(ROOT / "launch" / script[0]), *script[1:], "--workdir=a b"], capture_output=True,
                        text=True, env={**os.environ, **environment}, check=True)
  assert expected in told.stdout
