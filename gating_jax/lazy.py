"""Public names of a package that are imported at their first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


def lazy_names(
  package: str,
  names: Mapping[str, Sequence[str]],
  renamed: Mapping[str, str] | None = None,
  submodules: Collection[str] = (),
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """Returns `__getattr__` and `__dir__` of a package that imports its names at their first use.

  Args:
    package: `__name__` of the package.
    names: the public names, by the module that defines them. No submodule of the package may have
      one of these names: Python would set the module as the attribute.
    renamed: the name of today, by each former one; a former name works and warns.
    submodules: modules of the package that are its attributes without an import by the user.
  """
  homes = {name: module for module, defined in names.items() for name in defined}
  former = renamed or {}

  def __getattr__(name: str) -> Any:
    """Imports a public name at its first use; a former one warns with the name of today."""
    if name in submodules:
      # Python itself sets the module as the attribute.
      return importlib.import_module(f"{package}.{name}")
    today = former.get(name, name)
    if today not in homes:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    if name in former:
      message = f"{package}.{name} is now called {package}.{today}"
      warnings.warn(message, DeprecationWarning, stacklevel=2)
    value = getattr(importlib.import_module(homes[today]), today)
    # Python asks no more for a name that the package has. A former one is not kept: it warns again.
    setattr(sys.modules[package], today, value)
    return value

  def __dir__() -> list[str]:
    """Returns the names of the package, with those that are not imported yet."""
    return sorted({*vars(sys.modules[package]), *homes, *submodules})

  return __getattr__, __dir__
