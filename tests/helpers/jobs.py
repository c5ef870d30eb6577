"""Runs of the command `gating-jax` with tiny networks, alone or as jobs of `launch/local.sh`."""

import os
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest

from tests.helpers import ROOT, environment, tiny_cli
from tests.helpers.command import run_command

PROGRAM = f"{sys.executable} {ROOT / 'tests' / 'helpers' / 'tiny_cli.py'}"
STEPS_PER_EPOCH = 5
TRAINING = {
  "model.name": "tiny",
  "optim.batch_size": 280,
  "optim.epochs": 1,
  "optim.learning_rate": 0.05,
}


def arguments(workdir, config="digits_resnet20", **changes):
  settings = [f"--config.{name}={value}" for name, value in changes.items()]
  return [f"--config={ROOT / 'configs' / config}.py", *settings, f"--workdir={workdir}"]


def launched(workdir, variables=(), out=None, **changes):
  """Starts a job of two processes with four devices each.

  Its output is in `out`, by default next to `workdir`.
  """
  out = out or workdir.with_suffix(".out")
  with out.open("w") as file:
    job = subprocess.Popen(
      ["bash", str(ROOT / "launch" / "local.sh"), "2", *arguments(workdir, **changes)],
      stdout=file,
      stderr=subprocess.STDOUT,
      cwd=ROOT,
      env={
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DEVICES": "4",
        "GATING_JAX": PROGRAM,
        **dict(variables),
      },
    )
  job.out = out
  return job


def finished(job):
  """Returns the exit status of a job and its output."""
  try:
    status = job.wait(300)
  finally:
    job.terminate()
  return status, job.out.read_text()


def wait_until(holds, job):
  """Waits until `holds()` is true while the job runs."""
  until = time.monotonic() + 200
  while not holds():
    assert job.poll() is None, job.out.read_text()
    assert time.monotonic() < until
    time.sleep(0.001)


def alone(*arguments, devices):
  """Returns the output of one process with so many devices."""
  done = subprocess.run(
    [*PROGRAM.split(), *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    env=environment(devices),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def here(*arguments):
  """Returns the output of the command in this process, on the eight devices of the tests."""
  with pytest.MonkeyPatch.context() as patch:
    tiny_cli.register(patch.setitem)
    status, said = run_command(*arguments)
  assert status == 0, said
  return said


def processes_of(job):
  """Returns the process numbers of a running job, the coordinator's first."""
  found = subprocess.run(
    ["pgrep", "-P", str(job.pid), "-f", "tiny_cli"], capture_output=True, text=True, check=False
  )
  return [int(line) for line in found.stdout.split()]


def saved_steps(workdir):
  """Returns the steps of the complete checkpoints of a run, in order."""
  return sorted(int(f.name) for f in (workdir / "checkpoints").glob("*") if f.name.isdigit())


def saved_state(workdir, step=None):
  """Returns the arrays of a checkpoint of a run by name; by default of the newest."""
  step = saved_steps(workdir)[-1] if step is None else step
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state")
