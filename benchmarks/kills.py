"""Kill test: a short training on two processes, killed at random and restarted.

    python benchmarks/kills.py [--kills=20] [--seed=0] [--epochs=400] [--workdir=folder]

One process is killed again and again, and `launch/local.sh` restarts the job. The process and the
time since its start are random. Prints for each kill the steps taken, the newest checkpoint and the
steps lost; and at the end whether the parameters, and everything else that was saved, are bit-equal
to the undisturbed run's.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
STEPS_PER_EPOCH = 5
# Seconds from the processes' start to a kill; they need about 8 to their first step.
LONGEST = 15.0
GOING_ON = re.compile(r"resuming from the checkpoint of step (\d+) ")


def main():
  """Trains with kills and without, and compares the two."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0, help="of the processes and moments")
  parser.add_argument(
    "--epochs", type=int, default=400, help="of five steps, with a checkpoint after each"
  )
  parser.add_argument("--workdir", type=Path, help="a new folder; default: a temporary one")
  args = parser.parse_args()
  folder = args.workdir or Path(tempfile.mkdtemp(prefix="kills-"))
  folder.mkdir(parents=True, exist_ok=True)

  began = time.monotonic()
  finish(launch(folder / "quiet", args.epochs, restarts=0), folder / "quiet")
  print(
    f"{os.cpu_count()} cores; undisturbed: {args.epochs * STEPS_PER_EPOCH} steps in "
    f"{time.monotonic() - began:.0f} s, start included",
    flush=True,
  )
  began = time.monotonic()
  disturb(folder / "disturbed", args)
  equal = same(saved(folder / "quiet"), saved(folder / "disturbed"))
  print(
    f"{args.kills} kills, seed {args.seed}, {time.monotonic() - began:.0f} s: what was saved last "
    f"is {'bit-equal' if equal else 'NOT EQUAL'} to the undisturbed run's"
  )
  sys.exit(not equal)


def disturb(workdir, args):
  """Runs the training with its kills until it is finished; prints a line for each kill."""
  moments = random.Random(args.seed)
  job = launch(workdir, args.epochs, restarts=args.kills)
  print(f"{'kill':>4}{'process':>9}{'after':>9}{'step':>7}{'checkpoint':>12}{'steps lost':>12}")
  killed, newest = [], [0]
  for number in range(1, args.kills + 1):
    began, clock = start_of(job, killed), time.time()
    process, after = moments.randrange(2), moments.uniform(0, LONGEST)
    time.sleep(max(0.0, began + after - time.monotonic()))
    killed = processes(job)
    os.kill(killed[process], signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in killed):
      time.sleep(0.01)
    # 0 means that it was killed before its first step.
    step = reached(workdir, clock) or newest[-1]
    newest.append(max(checkpoints(workdir), default=0))
    print(
      f"{number:>4}{process:>9}{after:>7.1f} s{step:>7}{newest[-1]:>12}"
      f"{max(0, step - newest[-1]):>12}",
      flush=True,
    )
  finish(job, workdir)
  attempts = workdir.with_suffix(".out").read_text().split("; starting it again")
  assert len(attempts) == args.kills + 1
  for said, checkpoint in zip(attempts, newest, strict=True):
    # A process that was killed at its start has not printed this.
    for step in GOING_ON.findall(said):
      assert int(step) == checkpoint, (
        f"went on from {step} and not from the newest checkpoint, {checkpoint}"
      )


def launch(workdir, epochs, restarts):
  """Starts a training of two processes."""
  settings = {
    "model.name": "simple_cnn",
    "model.width": 0.1,
    "optim.batch_size": 280,
    "optim.epochs": epochs,
    "optim.learning_rate": 0.05,
    "log_every": 1,
  }
  with workdir.with_suffix(".out").open("w") as out:
    return subprocess.Popen(
      [
        "bash",
        str(ROOT / "launch" / "local.sh"),
        "2",
        f"--config={ROOT / 'configs' / 'digits_resnet20.py'}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        f"--workdir={workdir}",
      ],
      stdout=out,
      stderr=subprocess.STDOUT,
      env={
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **os.environ,
        "DEVICES": "2",
        "GATING_JAX": f"{sys.executable} -m gating_jax.cli",
        "PYTHONPATH": str(ROOT),
        "RESTARTS": str(restarts),
      },
    )


def finish(job, workdir):
  """Waits for the end of a training; ends this program if it failed."""
  if job.wait(1800):
    raise SystemExit(workdir.with_suffix(".out").read_text())


def processes(job):
  """Returns the numbers of the two processes of a job; fewer while it is starting them."""
  listed = subprocess.run(
    ["pgrep", "-P", str(job.pid), "-f", "gating_jax.cli"],
    capture_output=True,
    text=True,
    check=False,
  )
  return [int(line) for line in listed.stdout.split()]


def start_of(job, before):
  """Waits for the processes after those, and returns the time of their start."""
  while len(found := processes(job)) < 2 or set(found) & set(before):
    if job.poll() is not None:
      raise SystemExit("the training ended before its last kill; give it more --epochs")
    time.sleep(0.01)
  return time.monotonic()


def reached(workdir, since):
  """Returns the last step in the journal, which a start rewrites; 0 if no start has since then."""
  file = workdir / "metrics.jsonl"
  if not file.exists() or file.stat().st_mtime < since:
    return 0
  return max(
    (json.loads(line)["step"] for line in file.read_text().splitlines() if line.endswith("}")),
    default=0,
  )


def checkpoints(workdir):
  """Returns the steps of a run's checkpoints."""
  return [int(f.name) for f in (workdir / "checkpoints").glob("*") if f.name.isdigit()]


def saved(workdir):
  """Returns the arrays of the last checkpoint."""
  step = max(checkpoints(workdir))
  with ocp.StandardCheckpointer() as reader:
    return step, reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state")


def same(a, b):
  """Returns whether two checkpoints are the same, bit for bit."""
  (step, a), (other_step, b) = a, b
  leaves, others = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
  return (
    step == other_step
    and len(leaves) == len(others)
    and all(
      path == other_path and x.dtype == y.dtype and x.tobytes() == y.tobytes()
      for (path, x), (other_path, y) in zip(leaves, others, strict=True)
    )
  )


if __name__ == "__main__":
  main()
