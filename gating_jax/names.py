"""Names that are imported at their first use (PEP 562), and former names, which work and warn."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable)


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


def former_keyword(old: str, new: str) -> Callable[[Function], Function]:
  """Decorates a function so that it takes a keyword by its former name, too, and warns."""

  def decorate(function: Function) -> Function:
    """Returns the function that takes both names."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
      """Calls the function with the name of today."""
      if old in keywords:
        if new in keywords:
          raise TypeError(f"{new} must be given once; got it as {old}, its former name, too")
        warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=2)
        keywords[new] = keywords.pop(old)
      return function(*args, **keywords)

    # Type checkers see the function of today.
    return cast(Function, call)

  return decorate


def former_positional(*names: str, stacklevel: int = 2) -> Callable[[Function], Function]:
  """Decorates a function so that it takes keywords by position, too, after its arrays, and warns.

  Args:
    names: the keywords, in their former order.
    stacklevel: 2, and 1 more for each decorator around this one, so that the caller is warned.
  """

  def decorate(function: Function) -> Function:
    """Returns the function that takes both."""
    parameters = inspect.signature(function).parameters.values()
    arrays = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
      """Calls the function with what it takes by keyword today."""
      former = args[arrays:]
      taken = names[: len(former)]
      # Too many arguments, or one that is given twice, are errors of the function itself.
      if not former or len(former) > len(names) or not keywords.keys().isdisjoint(taken):
        return function(*args, **keywords)
      given = dict(zip(taken, former, strict=True))
      today = ", ".join(f"{name}=..." for name in given)
      message = f"{function.__name__} takes {today} by keyword"
      warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
      return function(*args[:arrays], **given, **keywords)

    # Type checkers see the function of today.
    return cast(Function, call)

  return decorate
