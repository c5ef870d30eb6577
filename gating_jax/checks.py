"""Messages for bad settings: the argument, the rule, the value, and what may have been meant; texts of any origin."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable, Sequence

import jax

_CLOSE = 0.7  # twice the letters that two names share in their order, of the letters of both
_LONGEST, _MOST = 60, 8  # letters, and elements of an array, that are shown as they are
_JOINERS = "\u200c\u200d"  # between letters of Persian or of Indian scripts, and parts of a picture


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
  """Raises a ValueError unless `value` is among `choices`.

  >>> one_of("model.gating", "chanel", ("none", "channel"))
  Traceback (most recent call last):
  ValueError: model.gating must be one of channel, none; got 'chanel'. Did you mean 'channel'?
  """
  choices = sorted(choices)
  if not isinstance(value, str) or value not in choices:
    close = near(str(value), choices)
    hint = f". Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}{hint}")


def shown(value: object) -> str:
  """A value in one short line: a text by its beginning, a large array by its type and shape, what else is long by its
  class.

  >>> import numpy as np
  >>> shown(0.6), shown(dict), shown("letters " * 20), shown(np.zeros((6, 4)))
  ('0.6', 'the class dict', "'letters letters letters letters letters letters le'...", 'float64[6,4]')
  """
  if isinstance(value, type):
    return f"the class {value.__name__}"
  if callable(value) and hasattr(value, "__qualname__"):
    return f"the function {value.__qualname__}"
  if is_array(value) and (isinstance(value, jax.core.Tracer) or math.prod(value.shape) > _MOST):
    return _type_and_shape(value)
  text = " ".join(repr(value).split())
  if len(text) <= _LONGEST:
    return text
  if isinstance(value, str):
    return f"{' '.join(value.split())[: _LONGEST - 10]!r}..."
  return _type_and_shape(value) if is_array(value) else f"an object of class {type(value).__name__}"


def is_array(value: object) -> bool:
  """Whether a value is an array of NumPy, JAX or another library."""
  return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type)


def _type_and_shape(array) -> str:
  return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def near(name: str, choices: Iterable[str], count: int = 1) -> list[str]:
  """The choices, at most `count`, that differ from a name by a slip or two; the nearest first.

  >>> near("chanel", ("none", "channel")), near("widht", ("none", "channel"))
  (['channel'], [])
  """
  return difflib.get_close_matches(name, list(choices), n=count, cutoff=_CLOSE)


def few(names: Sequence[str], most: int = 8) -> str:
  """The first of many names on one line, and how many more there are.

  >>> few(["cat", "dog", "cow"], most=2)
  'cat, dog and 1 more'
  """
  more = len(names) - most
  return printable(", ".join(names[:most])) + (f" and {more} more" if more > 0 else "")


def printable(text: object, keep: str = "") -> str:
  """The text without what would move a terminal's cursor, recolour it or turn its letters round; spaces of any kind
  are plain ones.

  Args:
    text: of any origin, such as the name of a class.
    keep: letters that stay nevertheless, such as a new line.

  >>> printable("red \\x1b[31m\\nlines"), printable("two\\nlines\\t", keep="\\n")
  ('red ?[31m?lines', 'two\\nlines?')
  """
  space = lambda c: unicodedata.category(c) == "Zs"
  return "".join(
    c if c.isprintable() or c in keep + _JOINERS else " " if space(c) else "?" for c in str(text)
  )
