"""The command `gating-jax`: its flags, modes, messages and exit status."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import textwrap
import traceback
from importlib import metadata

from absl import app, flags, logging
from ml_collections import config_flags

from gating_jax import __version__, config_files, interrupts, programmes
from gating_jax.checks import missing_extra, near, one_of, printable, user_path
from gating_jax.terminal import is_terminal, prepare_streams

COMPARE = "compare"
# Each mode with its line in --help; the order is that of the help.
MODES = {
  "train": "trains to completion, resuming a run that was stopped; the default",
  "evaluate": "tests the newest checkpoint",
  "report": "writes report.html of the newest checkpoint",
  "compile": "times programs that skip closed units",
  "export": "writes files that run without this package; image classifiers only",
  "curve": "traces accuracy against MACs of one net, by its gates' thresholds; image classifiers",
  COMPARE: "writes a page that compares runs: --workdir=runs/digits,runs/scenes --mode=compare",
}
# How Python and absl refuse the text of a value, and how the command does.
_VALUE_ERRORS = {
  r"invalid literal for int\(\) with base 10: (.+)": r"must be a whole number; got \1",
  r"could not convert string to float: (.+)": r"must be a number; got \1",
  r"\('Non-boolean argument to boolean flag', (.+)\)": r"must be true or false; got \1",
}
_HELP_FLAGS = {"-h", "-help", "--help", "-?", "--helpshort"}
_VERSION_FLAGS = {"-version", "--version"}

_BARE = """\
gating-jax trains networks that decide, per input, what they compute, and shows what they learnt.
An example, about two minutes:  gating-jax --config=configs/digits_resnet20.py --workdir=runs/digits
More examples, all modes, configs and flags:  gating-jax --help"""
_HELP = """\
gating-jax trains networks that decide, per input, what they compute, and shows what they learnt.

Examples, one for each programme. No downloads are needed: the data ship with scikit-learn.
{examples}
The same command resumes a run that was stopped. Then, for a trained run:
  gating-jax --workdir=runs/digits --mode=compile

Modes:
{modes}

Configs, by path, by name, or by a prefix that only one name has: --config=digits is \
configs/digits_resnet20.py.
{configs}
Variants follow a colon: --config=digits:epochs=3,gates=none. Set a field by its name:
--config.optim.learning_rate=0.05. The files are in {folder}

Flags:
{flags}
  --version: The versions of this package, Python and JAX.
  --helpfull: The flags of libraries as well."""


class _ConfigParser(flags.ArgumentParser):
  """Parser for the value of --config.

  The parser of ml_collections ends a path at its first colon and knows no short names.
  """

  def parse(self, given):
    """Loads the config; raises an error without the flag in front."""
    try:
      return config_files.load_config(given).lock()
    except ValueError as error:
      # absl would put the flag and its value before a ValueError.
      raise flags.Error(str(error)) from error


_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A config file or its name, as above. Required to train; the other modes use that of the run.",
)
# DEFINE_config_file takes no parser, so this one replaces its own.
flags.FLAGS[_CONFIG.name].parser = _ConfigParser()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run directory: a new one, or one to resume; to compare runs, several, separated by commas.",
)
_MODE = flags.DEFINE_string("mode", "train", "What to do, as above.")
_SMOKE = flags.DEFINE_bool(
  "smoke",
  False,
  "Trains on little data for a few steps, to check in a minute or two that a config works from end "
  "to end; needs its own run directory.",
)
_PAGE = flags.DEFINE_string(
  "page", None, "The page that --mode=compare writes, by default comparison.html."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "For a job of several processes: host:port of process 0, or auto on Cloud TPU or Slurm.",
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "The number of processes of the job.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
  "process", None, "The number of this process, from 0.", lower_bound=0
)


def main() -> None:
  """Runs the command; Ctrl-C ends it with one line and status 130."""
  try:
    _run_command()
  except KeyboardInterrupt:
    with contextlib.suppress(OSError):
      # Before the flags are read, nothing has begun.
      if not flags.FLAGS.is_parsed():
        _say("interrupted")
      elif _MODE.value == "train":
        _say("interrupted; the same command resumes from the newest checkpoint, if there is one")
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
    _say(_BARE)
    sys.exit(2)
  # Help and version are answered here: absl's own help lists the flags of every library.
  if _HELP_FLAGS.intersection(given):
    print(_help())
    sys.exit(0)
  if _VERSION_FLAGS.intersection(given):
    print(_version())
    sys.exit(0)
  # In place: ml_collections looks for overrides of fields in sys.argv.
  for place, argument in enumerate(given, start=1):
    sys.argv[place] = config_files.rename_override(argument)
    if sys.argv[place] != argument:
      _say(f"note: {argument} is now {sys.argv[place]}")
  app.run(_main, flags_parser=_parse)


def _help() -> str:
  """Returns the text of --help."""
  examples, modes, configs, own_flags = [], [], [], []
  for name in sorted(programmes.PROGRAMMES):
    config, workdir, about = programmes.PROGRAMMES[name].example
    command = f"gating-jax --config=configs/{config}.py --workdir=runs/{workdir}"
    examples.append(f"  {command:<76}{about}")
  for name, does in MODES.items():
    modes.append(f"  --mode={name:<8}  {does}")
  for name, said in config_files.packaged().items():
    configs.append(f"  {name:<24}{textwrap.shorten(said, 74, placeholder=' ...')}")
  filled = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent="      ")
  for flag in _own_flags():
    own_flags.append(filled.fill(f"--{flag.name}: {flag.help}"))
  return _HELP.format(
    examples="\n".join(examples),
    modes="\n".join(modes),
    configs="\n".join(configs),
    folder=config_files.folder(),
    flags="\n".join(own_flags),
  )


def _own_flags() -> list[flags.Flag]:
  """Returns the flags of this file in their order, without those of libraries."""
  module = flags.FLAGS.find_module_defining_flag(_WORKDIR.name) or ""
  return flags.FLAGS.flags_by_module_dict()[module]


def _version() -> str:
  """Returns the versions of this package, Python and JAX."""

  python, jax_version = sys.version.split()[0], metadata.version("jax")
  return f"gating-jax {__version__}, Python {python}, JAX {jax_version}"


def _parse(argv: list[str]) -> list[str]:
  """Parses flags with absl; prints one line for any error and exits with status 2."""
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    message = _unknown_flag(error.flagname)
  except flags.Error as error:
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    for pattern, rule in _VALUE_ERRORS.items():
      message = re.sub(pattern, rule, message)
  # ml_collections raises these for a field that the config does not have.
  except (AttributeError, KeyError, TypeError) as error:
    message = _unknown_field(argv) or str(error)
  _say(f"error: {message}")
  sys.exit(2)


def _unknown_flag(name: str) -> str:
  """Returns the error message for a flag that does not exist."""
  first, dot, rest = name.partition(".")
  if first == "config":
    return f"--{name} changes a field of --config, which is not given"
  known = [flag.name for flag in _own_flags()]
  close = near(first, [*known, "help", "version"])
  hint = f". Did you mean --{close[0]}{dot}{rest}?" if close else "; see --help"
  return f"there is no flag --{name}{hint}"


def _unknown_field(argv: list[str]) -> str | None:
  """Returns the error for the first override of a field that the config lacks; None without one."""
  overrides, others = [], []
  for argument in argv:
    name = argument.lstrip("-").partition("=")[0]
    if name.startswith("config."):
      overrides.append(name)
    else:
      others.append(argument)
  # ml_collections looks for overrides in sys.argv: without them the config itself can be read.
  sys.argv = others
  flags.FLAGS(sys.argv)
  for override in overrides:
    section = _CONFIG.value
    for part in override.split(".")[1:]:
      try:
        one_of(f"--{override}: the field", part, section.keys())
      except (ValueError, AttributeError) as error:
        return str(error)
      section = section[part]
  return None


def _misused(argv: list[str]) -> str | None:
  """Returns the error for valid flags in an invalid combination; None where they fit together."""
  if len(argv) > 1:
    hint = ""
    # A bare argument that names a config or a mode most likely lacks its flag.
    with contextlib.suppress(ValueError):
      config_files.find(argv[1])
      hint = f". Did you mean --config={argv[1]}?"
    if argv[1] in MODES:
      hint = f". Did you mean --mode={argv[1]}?"
    return f"unknown arguments {argv[1:]}{hint}"
  try:
    one_of("--mode", _MODE.value, MODES)
  except ValueError as error:
    return str(error)
  if not _WORKDIR.value:
    return "--workdir must be given, such as --workdir=runs/digits"
  if _MODE.value == COMPARE:
    if _CONFIG.value is not None:
      return f"--config must not be given with --mode={COMPARE}, which reads those of the runs"
    for flag in (_COORDINATOR, _PROCESSES, _PROCESS):
      if flag.value is not None:
        return (
          f"--{flag.name} must not be given with --mode={COMPARE}, which is one process; got "
          f"{flag.value}"
        )
  elif _PAGE.value is not None:
    return (
      f"--page requires --mode={COMPARE}; got --mode={_MODE.value}, whose page is report.html of "
      "the run"
    )
  if not _COORDINATOR.value:
    for flag in (_PROCESSES, _PROCESS):
      if flag.value is not None:
        return (
          f"--{flag.name} requires --{_COORDINATOR.name}, such as "
          f"--{_COORDINATOR.name}=localhost:1234"
        )
  if _SMOKE.value and _MODE.value != "train":
    return (
      f"--smoke requires --mode=train; got --mode={_MODE.value}, which uses a run that is trained"
    )
  if _CONFIG.value is None and _MODE.value == "train":
    return "--config must be given to train, such as --config=digits"
  return None


def _main(argv: list[str]) -> int:
  """Checks the flags, runs the mode and returns the exit status."""
  if message := _misused(argv):
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
    from gating_jax.training.loop import Interrupted, NonFiniteError
    from gating_jax.training.rundir import RunDirError

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
  except jax.errors.JaxRuntimeError as error:
    if not _COORDINATOR.value:
      raise
    return _failed(f"JAX failed, perhaps because another process of the job ended: {error}", 1)
  except Exception as error:
    if line := missing_extra(error):
      return _failed(line, 2)
    if not _COORDINATOR.value:
      raise
    return _failed(f"internal error:\n{traceback.format_exc()}", 1)
  # The training has said that it stopped, and nothing is computed any more.
  except Interrupted:
    return interrupts.STATUS
  return 0


def _run_mode() -> None:
  """Runs the mode: compares runs, or trains or examines the one of --workdir."""
  with interrupts.ending_at_once():
    from gating_jax.reports import compared_runs, comparison
    from gating_jax.training import hosts, settings, smoke

  given = _WORKDIR.value
  assert given is not None  # which has been checked
  if _MODE.value == COMPARE:
    folders = compared_runs.split_folders(given)
    comparison.compare_runs(folders, user_path(_PAGE.value or "comparison.html"))
    return
  workdir, config = user_path(given), _CONFIG.value
  # All modes but training can do without --config: the run directory keeps it.
  if config is None:
    config = settings.config_of(workdir)
  one_of("experiment", config.experiment, programmes.PROGRAMMES)
  with interrupts.ending_at_once():
    module = importlib.import_module(programmes.PROGRAMMES[config.experiment].module)
  if _COORDINATOR.value:
    hosts.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  # Only now: it counts devices, after which JAX can join no job.
  if _SMOKE.value:
    config = smoke.shrink(config)
  # Only one process of a job prints.
  with contextlib.redirect_stdout(sys.stdout if hosts.is_writer() else None):
    module.run(config, workdir, _MODE.value)


def _failed(error: Exception | str, status: int) -> int:
  """Prints the error and returns the exit status; 2 stands for errors that a restart cannot fix."""
  _say("error: " + printable(error, keep="\n"))
  if _COORDINATOR.value:
    # A normal exit would wait for processes that wait for this one.
    os._exit(status)
  return status


def _say(text: str) -> None:
  """Writes a line to stderr in one call, so that lines of a job's processes do not mix."""
  sys.stderr.write(f"{text}\n")
  sys.stderr.flush()


if __name__ == "__main__":
  main()
