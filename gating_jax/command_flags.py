"""Flags of the command `gating-jax`: their definitions, its help, and errors of its arguments."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from gating_jax import __version__, config_files, programmes
from gating_jax.checks import near, one_of

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
# Messages of Python and absl about the text of a value, and those of the command.
_VALUE_ERRORS = {
  r"invalid literal for int\(\) with base 10: (.+)": r"must be a whole number; got \1",
  r"could not convert string to float: (.+)": r"must be a number; got \1",
  r"Failed to parse '(.*)' as a ConfigDict: .+": (
    r"is a section, whose fields are set one by one, --config.SECTION.FIELD=VALUE; got '\1'"
  ),
  r"\('Non-boolean argument to boolean flag', (.+)\)": r"must be true or false; got \1",
}
_HELP_FLAGS = ("h", "help", "?", "helpshort")
# The texts that absl takes for True.
_TRUE = ("", "true", "t", "1", "yes", "y")

BARE = """\
gating-jax trains networks that decide, per input, what they compute, and shows what they learnt.
An example, about two minutes:  gating-jax --config=configs/digits_resnet20.py --workdir=runs/digits
More examples, all modes, configs and flags:  gating-jax --help"""
_HELP = """\
gating-jax trains networks that decide, per input, what they compute, and shows what they learnt.

Examples, one for each programme. No downloads are needed: the data ship with scikit-learn.
{examples}
The same command resumes a run that was stopped; without --workdir, it trains a new run.
Then, for a trained run:
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


class _OrNone(flags.ArgumentParser):
  """Parser for the value of a field, which may be None."""

  def __init__(self, parser: flags.ArgumentParser):
    self._parser = parser

  def parse(self, given):
    """Parses a value as the field's own parser does, unless it is None."""
    return None if given == "None" else self._parser.parse(given)


# Parsers of flags such as --config.model.gate.share=0.5.
for _kind, _parser in (
  (float, flags.FloatParser()),
  (int, flags.IntegerParser()),
  (bool, flags.BooleanParser()),
  (str, flags.ArgumentParser()),
):
  config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))
CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "A config file or its name, as above. Required to train; the other modes use that of the run.",
)
# DEFINE_config_file takes no parser, so this one replaces its own.
flags.FLAGS[CONFIG.name].parser = _ConfigParser()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The run directory: a new one, or one to resume; by default, to train, a new one such as "
  "runs/digits-1. To compare runs, several, separated by commas.",
)
MODE = flags.DEFINE_string("mode", "train", "What to do, as above.")
SMOKE = flags.DEFINE_bool(
  "smoke",
  False,
  "Trains on little data for a few steps, to check within a minute that a config works from end "
  "to end; needs its own run directory.",
)
PAGE = flags.DEFINE_string(
  "page", None, "The page that --mode=compare writes, by default comparison.html."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "For a job of several processes: host:port of process 0, or auto on Cloud TPU or Slurm.",
)
PROCESSES = flags.DEFINE_integer(
  "processes", None, "The number of processes of the job.", lower_bound=1
)
PROCESS = flags.DEFINE_integer(
  "process", None, "The number of this process, from 0.", lower_bound=0
)


def answer(given: Sequence[str]) -> str | None:
  """Returns the text that arguments ask for, of help or the version; None where they do not."""
  asked = set()
  for argument in given:
    flag, _, value = argument.partition("=")
    if flag.startswith("-") and value.lower() in _TRUE:
      asked.add(flag.removeprefix("-").removeprefix("-"))
  if "helpfull" in asked:
    return f"{help_text()}\n\nAll flags, with those of libraries:\n{flags.FLAGS.get_help()}"
  if asked.intersection(_HELP_FLAGS):
    return help_text()
  return version_text() if "version" in asked else None


def help_text() -> str:
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
  module = flags.FLAGS.find_module_defining_flag(WORKDIR.name) or ""
  return flags.FLAGS.flags_by_module_dict()[module]


def version_text() -> str:
  """Returns the versions of this package, Python and JAX."""

  python, jax_version = sys.version.split()[0], metadata.version("jax")
  return f"gating-jax {__version__}, Python {python}, JAX {jax_version}"


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags with absl.

  Raises:
    ValueError: with one line for any error.
  """
  try:
    rest = flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    raise ValueError(_unknown_flag(error.flagname)) from error
  except flags.Error as error:
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    for pattern, rule in _VALUE_ERRORS.items():
      message = re.sub(pattern, rule, message)
    raise ValueError(message) from error
  # ml_collections raises these for a field that the config does not have.
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(_unknown_field(argv) or str(error)) from error
  _take_away_values()
  return rest


def _take_away_values() -> None:
  """Sets those fields to None for which a flag says None.

  Raises:
    ValueError: a field that must have a value.
  """
  if CONFIG.value is None:
    return
  for path, value in config_flags.get_override_values(flags.FLAGS[CONFIG.name]).items():
    # The parser of tuples makes a tuple of anything.
    if value is not None and value != (None,):
      continue
    *sections, field = path.split(".")
    holder = functools.reduce(operator.getitem, sections, CONFIG.value)
    # Placeholders may be None; fields with a default of their own may not.
    held = dict(holder.items(preserve_field_references=True))[field]
    if not isinstance(held, ml_collections.FieldReference):
      raise ValueError(f"--{CONFIG.name}.{path} must have a value; got None")
    holder[field] = None


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
    section, path = CONFIG.value, "config"
    for part in override.split(".")[1:]:
      if not hasattr(section, "keys"):
        return f"--{override}: {path} has no fields; its value is {section!r}"
      try:
        one_of(f"--{override}: the field", part, section.keys())
      except ValueError as error:
        return str(error)
      section, path = section[part], f"{path}.{part}"
  return None


def find_misuse(argv: list[str]) -> str | None:
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
    one_of("--mode", MODE.value, MODES)
  except ValueError as error:
    return str(error)
  if WORKDIR.value == "":
    return f"--{WORKDIR.name} must be given, such as --{WORKDIR.name}=runs/digits"
  if WORKDIR.value is None and (reason := _why_workdir()):
    return f"--{WORKDIR.name} must be given {reason}, such as --{WORKDIR.name}=runs/digits"
  if MODE.value == COMPARE:
    if CONFIG.value is not None:
      return f"--config must not be given with --mode={COMPARE}, which reads those of the runs"
    for flag in (COORDINATOR, PROCESSES, PROCESS):
      if flag.value is not None:
        return (
          f"--{flag.name} must not be given with --mode={COMPARE}, which is one process; got "
          f"{flag.value}"
        )
  elif PAGE.value is not None:
    return (
      f"--page requires --mode={COMPARE}; got --mode={MODE.value}, whose page is report.html of "
      "the run"
    )
  if not COORDINATOR.value:
    for flag in (PROCESSES, PROCESS):
      if flag.value is not None:
        return (
          f"--{flag.name} requires --{COORDINATOR.name}, such as "
          f"--{COORDINATOR.name}=localhost:1234"
        )
  if SMOKE.value and MODE.value != "train":
    return (
      f"--smoke requires --mode=train; got --mode={MODE.value}, which uses a run that is trained"
    )
  if CONFIG.value is None and MODE.value == "train":
    return "--config must be given to train, such as --config=digits"
  return None


def _why_workdir() -> str | None:
  """Returns why --workdir cannot be left out; None where a new one can be chosen."""
  if MODE.value == COMPARE:
    return f"with --mode={COMPARE}, which reads the runs there"
  if MODE.value != "train":
    return f"with --mode={MODE.value}, which reads the run there"
  # Each process, and each restart of a job, would choose its own.
  if COORDINATOR.value:
    return f"with --{COORDINATOR.name}, since all processes of a job share it"
  return None


def make_workdir() -> str:
  """Makes a new run directory, `runs/digits-1` for `--config=digits:epochs=3`; returns its path.

  Commands that start together make different ones. Raises a ValueError where none can be made.
  """
  given = config_flags.get_config_filename(flags.FLAGS[CONFIG.name])
  _, variant = config_files.find(given)
  name = Path(given if variant is None else given.removesuffix(f":{variant}")).name
  path = Path("runs", name.removesuffix(".py"))
  numbers = itertools.count(1)
  while True:
    workdir = f"{path}-{next(numbers)}"
    try:
      os.makedirs(workdir)
      return workdir
    # Also a link to nothing.
    except FileExistsError:
      continue
    except OSError as error:
      raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}") from error
