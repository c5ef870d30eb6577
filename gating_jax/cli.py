"""The command `gating-jax`: absl flags to a run. The only file that reads the command line."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from gating_jax.checks import one_of, printable

COMPARE = "compare"
MODES = ("train", "evaluate", "report", "export", "compile", COMPARE)
EXPERIMENTS = ("classification", "continual", "long_video", "segmentation")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A config file such as configs/digits_resnet20.py; its fields can be overridden as "
    "--config.optim.learning_rate=0.05.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run directory: new, or one to go on with; those to compare are separated by commas.")
_MODE = flags.DEFINE_enum(
    "mode", "train", MODES, "What to do; evaluate, report, export and compile look at a run that is there, compare at "
    "any, without --config.")
_PAGE = flags.DEFINE_string("page", "comparison.html", "The page that --mode=compare writes.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of a job of several processes: host:port of process 0, or auto on Cloud TPU or Slurm.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the job has.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def main() -> None:
  """Entry point."""
  for flag, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
    name, equals, value = flag.partition("=")
    if name.lstrip("-") == "config":  # so that a config file can import its neighbours
      sys.path.append(str(Path((value if equals else following).partition(":")[0]).absolute().parent.parent))
  flags.mark_flag_as_required("workdir")
  app.run(_main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """absl's parsing, with one line for whatever is wrong."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1] if any(line.startswith("Traceback") for line in lines) else " ".join(lines)
  except (AttributeError, KeyError, TypeError) as error:  # a field that the config does not have
    message = _unknown_field(argv) or str(error)
  _say(f"error: {message}")
  sys.exit(2)


def _unknown_field(argv: list[str]) -> str | None:
  """What to say of the first override of a field that the config does not have."""
  overrides = [a.lstrip("-") for a in argv if a.lstrip("-").startswith("config.")]
  sys.argv = [a for a in argv if a.lstrip("-") not in overrides]  # where ml_collections looks for overrides
  flags.FLAGS(sys.argv)
  for override in overrides:
    section = _CONFIG.value
    for part in override.partition("=")[0].split(".")[1:]:
      try:
        one_of(f"--{override.partition('=')[0]}: the field", part, section.keys())
      except (ValueError, AttributeError) as error:
        return str(error)
      section = section[part]
  return None


def _main(argv: list[str]) -> int:
  if len(argv) > 1:
    _say(f"error: unknown arguments {argv[1:]}")
    return 2
  if (_CONFIG.value is None) != (_MODE.value == COMPARE):
    _say(f"error: --config must be given, but not with --mode={COMPARE}")
    return 2
  logging.set_verbosity(logging.WARNING)
  import jax  # after the flags are checked, as what imports it

  from gating_jax.data.sources import DatasetNotPreparedError
  from gating_jax.experiments import classification, compare, continual, long_video, segmentation
  from gating_jax.inference.export import ExportError
  from gating_jax.training import hosts
  from gating_jax.training.checkpoints import CheckpointError
  from gating_jax.training.loop import NonFiniteError
  from gating_jax.training.rundir import RunDirError

  try:
    if _MODE.value == COMPARE:
      compare.run([Path(folder) for folder in _WORKDIR.value.split(",")], Path(_PAGE.value))
      return 0
    one_of("experiment", _CONFIG.value.experiment, EXPERIMENTS)
    if not _COORDINATOR.value and (_PROCESSES.value, _PROCESS.value) != (None, None):
      raise ValueError("coordinator must be given with processes and process; got none")
    if _COORDINATOR.value:
      hosts.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    modules = (classification, continual, long_video, segmentation)
    with contextlib.redirect_stdout(sys.stdout if hosts.is_writer() else None):
      dict(zip(EXPERIMENTS, modules, strict=True))[_CONFIG.value.experiment].run(
          _CONFIG.value, Path(_WORKDIR.value), _MODE.value)
  except (ValueError, DatasetNotPreparedError, NonFiniteError, RunDirError, CheckpointError, ExportError) as error:
    return _failed(error, 2)
  except (OSError, hosts.PeerError) as error:
    return _failed(error, 1)
  except jax.errors.JaxRuntimeError as error:
    if not _COORDINATOR.value:
      raise
    return _failed(f"JAX cannot go on, as when another process of the job is gone: {error}", 1)
  except Exception:
    if not _COORDINATOR.value:
      raise
    return _failed(f"a fault of the program:\n{traceback.format_exc()}", 1)
  except KeyboardInterrupt:
    goes_on = "goes on from the newest checkpoint, if there is one" if _MODE.value == "train" else "begins anew"
    _say(f"interrupted; the same command {goes_on}")
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    os._exit(130)  # at once: what is still being computed can crash the interpreter's own end
  return 0


def _failed(error: Exception | str, status: int) -> int:
  """Says what is wrong in one line, or as many as the error has; 2 is the status of what a restart cannot mend."""
  _say("error: " + printable(error, keep="\n"))
  if _COORDINATOR.value:
    os._exit(status)  # without waiting for processes that wait for this one
  return status


def _say(text: str) -> None:
  """Writes a line to stderr by one call, so that the processes of a job do not write into each other's lines."""
  sys.stderr.write(f"{text}\n")
  sys.stderr.flush()


if __name__ == "__main__":
  main()
