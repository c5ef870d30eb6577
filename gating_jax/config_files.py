"""Config files by path or by short name, wherever the package is installed.

The folder `configs` stands at the top of the repository, to be read and copied; a wheel has it as
`gating_jax/configs`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Collection, Iterator, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import ml_collections

from gating_jax import programmes
from gating_jax.checks import near, user_path
from gating_jax.terminal import warn

# Config files import their shared parts under this name.
_PACKAGE = "configs"

# Fields that had another name in an earlier version: (section, old name) -> new name.
RENAMED_FIELDS = {
  ("data", "pad"): "crop_padding",
  ("data", "cutout"): "cutout_size",
  ("optim", "drops"): "lr_drop_at",
  ("optim", "clip"): "grad_clip_norm",
  ("optim", "gate_multiplier"): "gate_lr_multiplier",
  ("noise", "start"): "ramp_start",
  ("noise", "full"): "ramp_end",
  ("sparsity", "start"): "ramp_start",
  ("sparsity", "full"): "ramp_end",
  ("batch_shaping", "end"): "fade_end",
  ("generator", "average"): "ema_decay",
  ("dgm", "real"): "real_weight",
  ("model", "share"): "segment_fraction",
}


# Fields that are newer than some runs and whose default is not None, with the value that stands for
# how those were trained. `completed` adds these, and those whose default is None.
NEWER_FIELDS = {("hat", "grad_clip_norm"): None}


class Config(Protocol):
  """A config or a section of one, as `ml_collections.ConfigDict` is.

  Type checkers learn here that a field can be of any type. From the code of ConfigDict they infer
  that a field is a string, a number, a list or None, and refuse `config.model.name`.
  """

  def __getattr__(self, name: str, /) -> Any: ...

  def __getitem__(self, key: str, /) -> Any: ...

  def __setattr__(self, name: str, value: Any, /) -> None: ...

  def __setitem__(self, key: str, value: Any, /) -> None: ...

  def __delitem__(self, key: str, /) -> None: ...

  def __contains__(self, key: str, /) -> bool: ...

  def __iter__(self) -> Iterator[str]: ...

  def __len__(self) -> int: ...

  def keys(self) -> Collection[str]: ...


def folder() -> Path:
  """Returns the folder of the configs that come with the package."""
  here = Path(__file__).parent
  installed = here / _PACKAGE
  return installed if installed.is_dir() else here.parent / _PACKAGE


def packaged() -> dict[str, str]:
  """Returns the first docstring line of each packaged config, by name.

  Modules that configs share are left out.
  """
  found = {}
  for name in _names(folder()):
    # Parsed, not imported: --help must not run the configs.
    tree = ast.parse((folder() / f"{name}.py").read_text(encoding="utf-8"))
    found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
  return found


def load_config(given: str) -> Config:
  """Loads the config that `given` names.

  The file may import its neighbours: the folder above its own joins the import path permanently.

  Args:
    given: a path or name as in `locate`, with an optional variant after a colon, `digits:epochs=3`.
  Returns:
    the config.
  Raises:
    ValueError: there is no such config, or its file gives none.
  """
  path, variant = find(given)
  import_shared(path)
  return check(path, variant)


def find(given: str) -> tuple[Path, str | None]:
  """Returns the file that `given` names, and its variant or None.

  A colon may stand in a path: the longest beginning that is a file is the path. Raises ValueError
  as `locate` does.
  """
  parts = given.split(":")
  for end in range(len(parts), 0, -1):
    path = user_path(":".join(parts[:end]))
    # Path.is_file raises where a variant is longer than a file name can be.
    if os.path.isfile(path):
      return path, ":".join(parts[end:]) if end < len(parts) else None
  # Without a file, `locate` raises. Its error names the whole path where `.py` shows its end.
  if ".py:" in given:
    name = given.partition(".py:")[0] + ".py"
  elif given.endswith(".py"):
    name = given
  else:
    name = parts[0]
  variant = given[len(name) + 1 :] if len(given) > len(name) else None
  return locate(name), variant


def locate(given: str) -> Path:
  """Returns the file of a config.

  Args:
    given: a path; or the name of a packaged config, `digits_resnet20`; or a prefix of exactly one
      name, `dig`.
  Returns:
    the path of the file, which exists.
  Raises:
    ValueError: there is no such file, or several names begin with `given`.
  """
  path = user_path(given)
  if os.path.isfile(path):
    return path
  if os.path.isdir(path) and str(path.parent) != ".":
    raise ValueError(f"config must be a file; {given} is a folder")
  names = _names(folder())
  # configs/NAME.py, as the docs write it, is found from any folder.
  if str(path.parent) in (".", _PACKAGE):
    name = path.name.removesuffix(".py")
    found = [name] if name in names else []
    # The beginning of a name is enough, but a file is named whole.
    if name and not found and path.suffix != ".py":
      found = [other for other in names if other.startswith(name)]
    if len(found) == 1:
      return folder() / f"{found[0]}.py"
    if found:
      raise ValueError(f"config must be one name; {given!r} could be {' or '.join(found)}")
  if close := _near(path, names):
    raise ValueError(
      f"config must be a file or a name that --help lists; got {given!r}. "
      f"Did you mean {' or '.join(close)}?"
    )
  raise ValueError(f"config must be a file, or one of {', '.join(names)}; got {given!r}")


def _names(where: Path) -> list[str]:
  """Returns the names of the config files in a folder, sorted."""
  files = sorted(where.glob("*.py"))
  # Modules that configs only share have no get_config.
  return [file.stem for file in files if b"def get_config(" in file.read_bytes()]


def _near(path: Path, names: list[str]) -> list[str]:
  """Returns names close to the given one: in the same folder, else among packaged configs.

  They are written as the path is.
  """
  name = path.name.removesuffix(".py")
  neighbours = []
  if path.suffix == ".py" and path.parent.is_dir():
    neighbours = near(name, _names(path.parent), count=3)
  close = neighbours or near(name, names, count=3)
  # A single word of a name is too far from the whole name, so words are compared.
  if not close:
    close = [other for other in names if near(name, other.split("_"))]
  if path.suffix == ".py" and (neighbours or str(path.parent) in (".", _PACKAGE)):
    parent = path.parent if neighbours else Path(_PACKAGE)
    close = [str(parent / f"{other}.py") for other in close]
  return close


def import_shared(path: Path) -> None:
  """Lets a config file import its neighbours, and `configs` from the package."""
  above = path.absolute().parent.parent
  # Appended: nothing in that folder may hide an installed package.
  sys.path.append(str(above))
  if _PACKAGE in sys.modules:
    return
  # Neighbours come first; what they lack is taken from the package's own folder.
  places = [str(above / _PACKAGE), str(folder())]
  spec = importlib.util.spec_from_file_location(
    _PACKAGE, folder() / "__init__.py", submodule_search_locations=places
  )
  assert spec is not None  # as for every file that ends with .py
  sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)


def rename_fields(fields: Config | MutableMapping[str, Any], section: str = "") -> list[str]:
  """Gives fields of an earlier version their present names, in place, in all sections.

  Args:
    fields: a config, or its fields as JSON has them.
    section: the name of `fields` within a larger config.
  Returns:
    a line for each renamed field, `optim.drops is now optim.lr_drop_at`.
  """
  lines = []
  for name in list(fields):
    value = fields[name]
    if isinstance(value, (MutableMapping, ml_collections.ConfigDict)):
      lines += rename_fields(value, name)
    new = RENAMED_FIELDS.get((section, name))
    if new is not None:
      fields[new] = value
      del fields[name]
      lines.append(f"{section}.{name} is now {section}.{new}")
  return lines


def completed(config: Any) -> Config:
  """Returns a copy of a config of any version, with every field that is newer than it.

  Whoever reads it need not ask whether it has them. The copy is locked where the config is.

  Args:
    config: a ConfigDict of a whole config.
  """
  # One that is frozen could not be completed.
  if isinstance(config, ml_collections.FrozenConfigDict):
    config = config.as_configdict()
  # References stay references, which know the types of fields that are None.
  config = copy.deepcopy(config)
  default = base(config.get("experiment"))
  if default is not None:
    add_unset_fields(config, default)
  with config.unlocked():
    add_newer_fields(config)
  return config


def add_newer_fields(fields: Any) -> None:
  """Gives a config, or its fields as JSON has them, those `NEWER_FIELDS` whose section it has."""
  for (section, name), value in NEWER_FIELDS.items():
    held = fields.get(section)
    if isinstance(held, (MutableMapping, ml_collections.ConfigDict)) and name not in held:
      held[name] = value


def add_unset_fields(config: Config, default: Config) -> None:
  """Gives a config of an earlier version the fields whose default is None, in place.

  Args:
    config: a config or a section of one.
    default: every field with its default, as `base` returns them.
  """
  with config.unlocked():
    for name, value in default.items():
      # Also a section that the config sets to None.
      lacks = name not in config or (_is_section(value) and config[name] is None)
      if lacks and is_unset(value):
        # A reference keeps the type that the field has once it is set.
        config[name] = default.get_ref(name) if value is None else value
      elif _is_section(value) and _is_section(config.get(name)):
        add_unset_fields(config[name], value)


def is_unset(default: Any) -> bool:
  """Returns whether a default is None, or a section of nothing else.

  A config may lack such a field: it is newer than the config.
  """
  if _is_section(default):
    return all(map(is_unset, default.values()))
  return default is None


def _is_section(value: Any) -> bool:
  return isinstance(value, ml_collections.ConfigDict)


def rename_override(argument: str) -> str:
  """Returns a command-line argument with the present name of the field that it sets.

  >>> rename_override("--config.optim.drops=(0.5,)")
  '--config.optim.lr_drop_at=(0.5,)'
  """
  flag, equals, value = argument.partition("=")
  parts = flag.split(".")
  if len(parts) < 3 or parts[0].lstrip("-") != "config":
    return argument
  section, name = parts[-2:]
  parts[-1] = RENAMED_FIELDS.get((section, name), name)
  return ".".join(parts) + equals + value


def base(experiment: Any) -> Config | None:
  """Returns every field of a config of a programme with its default; None for an unknown one."""
  row = programmes.find_row(experiment)
  if row is None:
    return None
  module, function = row.base
  with _own_package():
    return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), function)()


@contextlib.contextmanager
def _own_package() -> Iterator[None]:
  """Makes `configs` the package's own folder inside the block, and restores it afterwards.

  The caller may have imported a package `configs` of its own.
  """
  theirs, path = _forget_package(), list(sys.path)
  import_shared(folder() / "__init__.py")
  try:
    yield
  finally:
    _forget_package()
    sys.modules.update(theirs)
    sys.path[:] = path


def _forget_package() -> dict[str, ModuleType]:
  """Takes a package `configs` and its modules out of those that are imported, and returns them."""
  removed = {}
  for name in list(sys.modules):
    if name.partition(".")[0] == _PACKAGE:
      removed[name] = sys.modules.pop(name)
  return removed


def check(path: Path, variant: str | None) -> Config:
  """Runs a config file and returns its config.

  Args:
    path: the file.
    variant: its argument, such as `epochs=3`; None for none.
  Returns:
    the ConfigDict that its `get_config` returns.
  Raises:
    ValueError: the file cannot be run, or gives no config; the message says why, in one line.
  """
  arguments = () if variant is None else (variant,)
  try:
    module = _run(path)
    if not hasattr(module, "get_config"):
      raise ValueError("it has no function get_config, so it is no config")
    config = module.get_config(*arguments)
  except ValueError as error:
    raise ValueError(f"config {path}: {error}") from error
  # A config file is code: it can raise anything.
  except Exception as error:
    raise ValueError(
      f"config {path}{_line(path, error)}: {type(error).__name__}: {error}"
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f"config {path}: get_config must return a ConfigDict; got {type(config).__name__}"
    )
  # One that is frozen could get no other names.
  if isinstance(config, ml_collections.FrozenConfigDict):
    thawed: Any = config.as_configdict()
    config = thawed
  experiment: Any = config.get("experiment")
  if not isinstance(experiment, str):
    raise ValueError(f"config {path}: the field experiment must name one; got {experiment!r}")
  for line in rename_fields(config):
    warn("config %s: %s", path, line)
  return completed(config)


def _run(path: Path) -> ModuleType:
  """Runs a config file as a module."""
  spec = importlib.util.spec_from_file_location("config_file", path)
  if spec is None or spec.loader is None:
    raise ValueError("a config file must end with .py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _line(path: Path, error: Exception) -> str:
  """Returns the line of the file that raised, `, line 3`; empty if none did."""
  line = ""
  for frame in traceback.extract_tb(error.__traceback__):
    # The last frame in this file is the innermost: the line at fault.
    if frame.filename == str(path):
      line = f", line {frame.lineno}"
  return line
