"""Runs of the command `gating-jax`, several at a time, for tables of benchmarks.

Each has its own folder and output. A command that is repeated resumes where it was stopped, and
does nothing where its run has ended.
"""

import concurrent.futures
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from gating_jax.training.journal import read_lines

COMMAND = (sys.executable, "-m", "gating_jax.cli")


class SideBySide:
  """Runs of a table, `jobs` at a time, until `minutes` have passed."""

  def __init__(self, jobs, minutes):
    self.jobs, self.end = jobs, time.monotonic() + 60 * minutes
    self.lock, self.running = threading.Lock(), set()
    self.env = dict(os.environ)
    # Several jobs share the device's memory.
    if jobs > 1:
      self.env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

  def gather(self, submit):
    """Returns the results of all runs by their keys.

    Args:
      submit: takes the pool of workers, and returns the futures by key. Runs that others wait for
        come first, so that no worker waits for a run without a worker.
    """
    with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
      futures = submit(pool)
      try:
        return {key: future.result() for key, future in futures.items()}
      # Also Ctrl-C: running jobs are asked to stop, none is started.
      except BaseException:
        self.end = 0
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running):
          process.terminate()
        raise

  def has_time(self):
    """Returns whether a run may be started."""
    return time.monotonic() < self.end

  def tell(self, text):
    """Prints a line."""
    with self.lock:
      print(text, flush=True)

  def finish(self, folder, command):
    """Finishes a run while there is time, and returns whether it has its result.

    Without time for the job, which compares configs, a result counts where this command began the
    run.
    """
    result = folder / "result.json"
    if self.has_time() and self._call(folder, command):
      return result.exists()
    return not self.has_time() and result.exists() and _began(folder, command)

  def _call(self, folder, command):
    """Runs a job and returns True on success.

    A finished run of this config is not repeated; one of another config is an error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.txt").open("a") as output:
      print(*command, file=output, flush=True)
      process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=self.env
      )
      self.running.add(process)
      left = self.end - time.monotonic()
      try:
        process.wait(None if left == float("inf") else max(0, left))
      except subprocess.TimeoutExpired:
        pass
      finally:
        # Time is up, or a signal ends this program; the job saves its state.
        if process.poll() is None:
          process.terminate()
          process.wait()
        self.running.discard(process)
    return process.returncode == 0


def _began(folder, command):
  """Returns whether a run was begun by a command, the first line of its output."""
  file = Path(f"{folder}.txt")
  if not file.exists():
    return False
  with file.open() as output:
    return output.readline() == f"{' '.join(map(str, command))}\n"


def folder_name(name):
  """Returns a row's name as that of a folder."""
  return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def field_flags(parser, options, own):
  """Returns the flags of the command for options of a benchmark that set fields of the config.

  Args:
    parser: reports an error.
    options: such as `--optim.batch_size=64`.
    own: fields that every run has its own of.
  """
  flags = []
  for option in options:
    if not re.fullmatch(r"--[a-z_.]+=.+", option):
      parser.error(
        f"an option must be one of those above, or --FIELD=VALUE of the config; got {option!r}"
      )
    field = option.removeprefix("--")
    if field.partition("=")[0] in own:
      parser.error(
        f"FIELD must not be one of {', '.join(own)}, which every run has its own of; got {field!r}"
      )
    flags.append(f"--config.{field}")
  return flags


def training_accuracy(folder):
  """Returns the mean over the last twentieth of the training's steps; None without such lines."""
  lines = [line for line in read_lines(folder / "metrics.jsonl") if line["split"] == "train"]
  last = [line["accuracy"] for line in lines if line["step"] > 0.95 * lines[-1]["step"]]
  return statistics.fmean(last) if last else None
