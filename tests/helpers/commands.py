"""Several commands `gating-jax`, one after the other in one process, which loads JAX but once."""

import importlib
import json
import subprocess
import sys

from tests.helpers import ROOT, environment, tiny_cli
from tests.helpers.command import run_command


def run_one_after_the_other(commands, *, devices, cwd=ROOT, optimised=False):
  """Runs commands, lists of arguments, in a process of so many devices; each must succeed."""
  done = subprocess.run(
    [sys.executable, "-m", __name__],
    input=json.dumps([list(map(str, arguments)) for arguments in commands]),
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
    env=environment(devices, optimised=optimised),
  )
  assert done.returncode == 0, done.stdout + done.stderr


def main():
  """Runs the commands of the standard input until one fails."""
  # Their flags must be there before: a command forgets those that are defined while it runs.
  for name in ("grain", "array_record.python.array_record_data_source"):
    importlib.import_module(name)
  tiny_cli.register()
  for arguments in json.load(sys.stdin):
    status, said = run_command(*arguments)
    print(said)
    if status:
      sys.exit(status)


if __name__ == "__main__":
  main()
