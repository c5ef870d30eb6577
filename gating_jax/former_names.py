"""Former names and forms of arguments, which functions still take, with a warning."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable)


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
