"""The command `gating-jax`: absl flags to a run. The only file that reads the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "evaluate")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file such as configs/digits_resnet20.py; its fields can be overridden as "
    "--config.optim.learning_rate=0.05.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: new, or one to go on with.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")


def main() -> None:
  """Entry point."""
  for argument in sys.argv[1:]:
    if argument.startswith(("--config=", "-config=")):  # so that a config file can import its neighbours
      sys.path.insert(0, str(Path(argument.partition("=")[2].partition(":")[0]).absolute().parent.parent))
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(_main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """absl's parsing; a config field that does not exist is a message like any other wrong flag, not a traceback."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def _main(argv: list[str]) -> int:
  if len(argv) > 1:
    print(f"error: unknown arguments {argv[1:]}", file=sys.stderr)
    return 2
  logging.set_verbosity(logging.WARNING)
  from gating_jax.data.sources import DatasetNotPreparedError  # after the flags are checked: these import JAX
  from gating_jax.experiments import classification
  from gating_jax.training.loop import NonFiniteError
  from gating_jax.training.rundir import RunDirError

  try:
    classification.run(_CONFIG.value, Path(_WORKDIR.value), _MODE.value)
  except (ValueError, OSError, DatasetNotPreparedError, NonFiniteError, RunDirError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  main()
