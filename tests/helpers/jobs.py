"""Runs of the command `gating-jax` in processes of their own, alone or as jobs of `launch/local.sh`."""

import os
import subprocess
import sys
import time

import orbax.checkpoint as ocp

from tests.helpers import ROOT, environment

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
  """A started job of two processes of four devices; what it prints is in `out`, by default `workdir`'s neighbour."""
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
  """The exit status of a job and what it printed."""
  try:
    status = job.wait(300)
  finally:
    job.terminate()
  return status, job.out.read_text()


def wait_until(holds, job):
  """Returns when `holds()` does, while the job runs."""
  until = time.monotonic() + 200
  while not holds():
    assert job.poll() is None, job.out.read_text()
    assert time.monotonic() < until
    time.sleep(0.001)


def alone(*arguments, devices=8, optimised=False):
  """What one process of so many devices prints."""
  done = subprocess.run(
    [*PROGRAM.split(), *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    env=environment(devices, optimised=optimised),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def processes_of(job):
  """The process numbers of a running job's processes, the first of them the coordinator."""
  found = subprocess.run(
    ["pgrep", "-P", str(job.pid), "-f", "tiny_cli"], capture_output=True, text=True, check=False
  )
  return [int(line) for line in found.stdout.split()]


def saved_steps(workdir):
  """The steps of the checkpoints of a run that are whole, in order."""
  return sorted(int(f.name) for f in (workdir / "checkpoints").glob("*") if f.name.isdigit())


def saved_state(workdir, step=None):
  """The arrays of a checkpoint of a run, by default the newest, by name."""
  step = saved_steps(workdir)[-1] if step is None else step
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state")
