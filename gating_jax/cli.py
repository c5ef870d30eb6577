"""The command `gating-jax`: how it starts a mode, its messages and its exit status."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator

from absl import app, flags, logging

from gating_jax import command_flags, config_files, interrupts, programmes
from gating_jax.checks import first_line, one_of, printable, quoted, user_path
from gating_jax.command_flags import COMPARE, MODES
from gating_jax.extras import missing_extra
from gating_jax.terminal import is_terminal, prepare_streams

__all__ = ["COMPARE", "MODES", "main"]

# The beginning of JAX's error where a device or the host has no memory left.
_EXHAUSTED = "RESOURCE_EXHAUSTED"


def main() -> None:
  """Runs the command; Ctrl-C ends it with one line and status 130."""
  try:
    _run_command()
  except KeyboardInterrupt:
    with contextlib.suppress(OSError):
      # Before the flags are read, nothing has begun.
      if not flags.FLAGS.is_parsed():
        _say("interrupted")
      elif command_flags.MODE.value == "train":
        resumes = "resumes from the newest checkpoint, if there is one"
        _say(f"interrupted; {interrupts.same_command} {resumes}")
      else:
        _say("interrupted; the same command starts over")
      sys.stdout.flush()
    # Exits at once: a computation that still runs can crash the interpreter's own shutdown.
    os._exit(interrupts.STATUS)


def _run_command() -> None:
  """Prints help or the version, or parses the flags and starts a run."""
  # Closed streams are opened first, so that no later file takes their numbers.
  prepare_streams()
  given = sys.argv[1:]
  if not given:
    _say(command_flags.BARE)
    sys.exit(2)
  # Help and version are answered here: absl's own help lists the flags of every library.
  if (text := command_flags.answer(given)) is not None:
    print(text)
    sys.exit(0)
  # In place: ml_collections looks for overrides of fields in sys.argv.
  for place, argument in enumerate(given, start=1):
    sys.argv[place] = config_files.rename_override(argument)
    if sys.argv[place] != argument:
      _say(f"note: {argument} is now {sys.argv[place]}")
  app.run(_main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; prints one line for any error and exits with status 2."""
  try:
    return command_flags.parse_flags(argv)
  except ValueError as error:
    _say(f"error: {error}")
    sys.exit(2)


def _main(argv: list[str]) -> int:
  """Checks the flags, runs the mode and returns the exit status."""
  if message := command_flags.find_misuse(argv):
    _say(f"error: {message}")
    return 2
  logging.set_verbosity(logging.WARNING)
  if is_terminal(sys.stderr):
    _say("loading, a few seconds ...")
  # JAX and all that imports it load for seconds: errors in flags are reported before.
  with interrupts.ending_at_once():
    import jax

    from gating_jax.data.tfds import DatasetNotPreparedError
    from gating_jax.inference.export import ExportError
    from gating_jax.training import hosts
    from gating_jax.training.checkpoints import CheckpointError
    from gating_jax.training.loop import NonFiniteError
    from gating_jax.training.rundir import RunDirError
    from gating_jax.training.stopping import Interrupted

  try:
    _run_mode()
  except (
    ValueError,
    DatasetNotPreparedError,
    NonFiniteError,
    RunDirError,
    CheckpointError,
    ExportError,
  ) as error:
    return _failed(error, 2)
  except (OSError, hosts.PeerError) as error:
    return _failed(error, 1)
  except MemoryError as error:
    return _failed(_memory_text(error), 1)
  except jax.errors.JaxRuntimeError as error:
    if _EXHAUSTED in str(error):
      return _failed(_memory_text(error), 1)
    if not command_flags.COORDINATOR.value:
      raise
    return _failed(f"JAX failed, perhaps because another process of the job ended: {error}", 1)
  except Exception as error:
    if line := missing_extra(error):
      return _failed(line, 2)
    if not command_flags.COORDINATOR.value:
      raise
    return _failed(f"internal error:\n{traceback.format_exc().rstrip()}", 1)
  # The training has said that it stopped, and nothing is computed any more.
  except Interrupted:
    return interrupts.STATUS
  return 0


@contextlib.contextmanager
def _chosen_workdir() -> Iterator[str]:
  """Yields --workdir; without it a new directory, which is removed where the block fails in it.

  One that holds anything stays.
  """
  if command_flags.WORKDIR.value is not None:
    yield command_flags.WORKDIR.value
    return
  workdir = command_flags.make_workdir()
  flag = quoted(f"--{command_flags.WORKDIR.name}={workdir}")
  flags.FLAGS[command_flags.WORKDIR.name].value = workdir
  # What the run keeps as its command resumes it.
  sys.argv.append(f"--{command_flags.WORKDIR.name}={workdir}")
  interrupts.same_command = f"the same command with {flag}"
  print(f"new run directory: {workdir}; to resume this run, add {flag}", flush=True)
  try:
    yield workdir
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.removedirs(workdir)
      if isinstance(error, Exception):
        _say(f"removed {workdir}, in which nothing was written")
    raise


def _run_mode() -> None:
  """Runs the mode: compares runs, or trains or examines the one of --workdir."""
  with interrupts.ending_at_once():
    from gating_jax.reports import compared_runs, comparison
    from gating_jax.training import hosts, settings, smoke

  # None only where a training is to take a new one.
  given, config = command_flags.WORKDIR.value or "", command_flags.CONFIG.value
  if command_flags.MODE.value == COMPARE:
    folders = compared_runs.split_folders(given)
    comparison.compare_runs(folders, user_path(command_flags.PAGE.value or "comparison.html"))
    return
  # All modes but training can do without --config: the run directory keeps it.
  if config is None:
    config = settings.config_of(user_path(given))
  one_of("experiment", config.experiment, programmes.PROGRAMMES)
  with interrupts.ending_at_once():
    module = importlib.import_module(programmes.PROGRAMMES[config.experiment].module)
  if command_flags.COORDINATOR.value:
    hosts.connect(
      command_flags.COORDINATOR.value, command_flags.PROCESSES.value, command_flags.PROCESS.value
    )
  # Only now: it counts devices, after which JAX can join no job.
  compiling = contextlib.nullcontext()
  if command_flags.SMOKE.value:
    config, compiling = smoke.shrink(config), smoke.compiling_quickly()
  # Only one process of a job prints.
  with (
    _chosen_workdir() as workdir,
    compiling,
    contextlib.redirect_stdout(sys.stdout if hosts.is_writer() else None),
  ):
    module.run(config, user_path(workdir), command_flags.MODE.value)


def _memory_text(error: Exception) -> str:
  """Returns the error for memory that ran out, with the settings that need less of it."""
  reason = first_line(error).rstrip(".")
  text = f"out of memory: {reason}; in a new run directory, a smaller optim.batch_size needs less"
  config = command_flags.CONFIG.value
  # Only images have such a loader; the config of an earlier run is not known here.
  if config is None or "loader" in config.get("data", {}):
    text += ", and a data set that does not fit is read from disk with data.loader=streaming"
  return text


def _failed(error: Exception | str, status: int) -> int:
  """Prints the error and returns the exit status; 2 stands for errors that a restart cannot fix."""
  _say("error: " + printable(error, keep="\n"))
  if command_flags.COORDINATOR.value:
    # A normal exit would wait for processes that wait for this one.
    os._exit(status)
  return status


def _say(text: str) -> None:
  """Writes a line to stderr in one call, so that lines of a job's processes do not mix."""
  sys.stderr.write(f"{text}\n")
  sys.stderr.flush()


if __name__ == "__main__":
  main()
