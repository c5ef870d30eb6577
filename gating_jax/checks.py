"""Checks of what users give, settings and paths, and the text of messages about it.

A message has the argument, the rule, the value and the likely intention. Values and names can come
from anywhere, so their text is shortened and sanitised. In a path `~` is the home folder, and every
other character stands for itself.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from gating_jax.names import lazy_names

# Least similarity of a suggestion: twice the letters that two names share in order, as a fraction
# of the letters of both.
_CLOSE = 0.7
# Letters of a text and elements of an array that are shown in full.
_LONGEST, _MOST = 60, 8
# An archive may unpack to so many times its size, or to so many bytes.
_TIMES, _UNPACKED = 100, 2**28
# Invisible, but needed between letters of Persian and Indian scripts and within compound emoji.
_JOINERS = "\u200c\u200d"
# On Linux an open folder has a numbered name here, without any pattern or separator of its own.
HANDLES = Path("/proc/self/fd")


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
  """Returns a value as one short line.

  A long text is cut, a large array is given by its type and shape, any other long value by its
  class.

  >>> import numpy as np
  >>> shown(0.6), shown(dict), shown(np.zeros((6, 4)))
  ('0.6', 'the class dict', 'float64[6,4]')
  >>> shown("letters " * 20)
  "'letters letters letters letters letters letters le'..."
  """
  if isinstance(value, type):
    return f"the class {value.__name__}"
  if callable(value) and hasattr(value, "__qualname__"):
    return f"the function {value.__qualname__}"
  # The repr of a tracer says nothing to a user, so it is never shown.
  if is_array(value) and (is_tracer(value) or math.prod(value.shape) > _MOST):
    return _type_and_shape(value)
  text = " ".join(repr(value).split())
  if len(text) <= _LONGEST:
    return text
  if isinstance(value, str):
    return f"{' '.join(value.split())[: _LONGEST - 10]!r}..."
  return _type_and_shape(value) if is_array(value) else f"an object of class {type(value).__name__}"


class _Array(Protocol):
  """An array of NumPy, JAX or another library."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...


def is_array(value: object) -> TypeGuard[_Array]:
  """Returns whether a value is an array of NumPy, JAX or another library."""
  return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type)


def is_number(value: object) -> TypeGuard[float]:
  """Returns whether a value read from a file is a finite number."""
  # True is an int in Python, but no number here.
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_tracer(array: object) -> bool:
  """Returns whether JAX traces a value, so that it is not known."""
  # Imported here: the command checks its flags before it loads JAX.
  from jax.core import Tracer

  return isinstance(array, Tracer)


def _type_and_shape(array) -> str:
  """Describes an array by its type and shape, such as `float64[6,4]`."""
  return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def near(name: str, choices: Iterable[str], count: int = 1) -> list[str]:
  """Returns at most `count` choices that differ from a name by a typo or two, the nearest first.

  Of names that are equally near, the one with the nearest number comes first.

  >>> near("chanel", ("none", "channel")), near("widht", ("none", "channel"))
  (['channel'], [])
  >>> near("resnet21", ("resnet20", "resnet32"))
  ['resnet20']
  """
  choices = list(choices)
  close = difflib.get_close_matches(name, choices, n=max(1, len(choices)), cutoff=_CLOSE)

  def distance(choice):
    """Returns the fraction of letters that differ, and how far numbers in the names are apart."""
    unlike = 1 - difflib.SequenceMatcher(None, choice, name).ratio()
    # One of the names may have fewer numbers.
    return unlike, [abs(a - b) for a, b in zip(_numbers(name), _numbers(choice), strict=False)]

  return sorted(close, key=distance)[:count]


def _numbers(name: str) -> list[int]:
  """Returns the numbers in a name."""
  return [int(number) for number in re.findall(r"[0-9]+", name)]


def few(names: Sequence[str], most: int = 8) -> str:
  """Returns the first of many names on one line, and the number of the others.

  >>> few(["cat", "dog", "cow"], most=2)
  'cat, dog and 1 more'
  """
  first = printable(", ".join(names[:most]))
  more = len(names) - most
  return f"{first} and {more} more" if more > 0 else first


def printable(text: object, keep: str = "") -> str:
  """Replaces characters that move a terminal's cursor, recolour it or reverse its text.

  They become `?`; spaces of any kind become plain ones.

  Args:
    text: of any origin, such as the name of a class.
    keep: letters that stay nevertheless, such as a new line.

  >>> printable("red \\x1b[31m\\nlines"), printable("two\\nlines\\t", keep="\\n")
  ('red ?[31m?lines', 'two\\nlines?')
  """
  letters = []
  for letter in str(text):
    if letter.isprintable() or letter in keep + _JOINERS:
      letters.append(letter)
    # Unicode's class of spaces: `isprintable` accepts the plain one alone.
    elif unicodedata.category(letter) == "Zs":
      letters.append(" ")
    else:
      letters.append("?")
  return "".join(letters)


def first_line(error: Exception) -> str:
  """Returns the first line of an error's text; its type where it has none."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def user_path(path: str | os.PathLike) -> Path:
  """Expands `~` and `~name` at the beginning of a path where there is such a user.

  Expanding a path twice changes nothing.

  >>> user_path("runs/lr[0.1]")
  PosixPath('runs/lr[0.1]')
  """
  expanded = Path(os.path.expanduser(path))
  # Path drops the ./ of ./~. Made absolute, a folder named ~ is not expanded the next time.
  return expanded.absolute() if str(expanded).startswith("~") else expanded


def is_text(path: str | os.PathLike) -> bool:
  """Returns whether the path is UTF-8.

  File systems take any bytes, which Python keeps as surrogates.
  """
  return not any("\ud800" <= character <= "\udfff" for character in os.fspath(path))


def quoted(argument: str) -> str:
  """Quotes an argument of a command for a shell.

  Unprintable bytes are written as numbers, since no terminal or page keeps them.

  >>> print(quoted("lr[0.1]"), quoted("a\\n"))
  'lr[0.1]' $'a\\x0a'
  """
  if argument.isprintable():
    return shlex.quote(argument)
  letters = []
  for byte in os.fsencode(argument):
    # A backslash or a quote would end or change the $'...' around the text.
    plain = 32 <= byte < 127 and byte not in b"\\'"
    letters.append(chr(byte) if plain else f"\\x{byte:02x}")
  return f"$'{''.join(letters)}'"


def check_storable(name: str, path: Path) -> None:
  """Raises a ValueError naming the argument unless checkpoints can be written below `path`.

  TensorStore takes a backslash for a slash: whatever opens the folder by its name would look
  elsewhere. Orbax takes three more characters for patterns where it cannot be given the folder by
  its handle.

  Args:
    name: the name of the argument that holds the path.
    path: the folder of the checkpoints, or one above it.
  """
  # With a handle, orbax never sees the patterns in the path.
  taken = "\\" if HANDLES.is_dir() else "\\*?["
  for character in taken:
    if character in str(path.absolute()):
      raise ValueError(
        f"{name} must have no {character} in its path, which the checkpoint library "
        f"takes for another character or a pattern; got {str(path.absolute())!r}"
      )


def check_unpacked(sizes: Iterable[int], size: int) -> None:
  """Raises a ValueError if a zip archive unpacks to far more than its own size.

  Such an archive fills the memory. Measured numbers shrink by a small factor, if at all.

  Args:
    sizes: of the members once unpacked, in bytes.
    size: of the archive itself, in bytes.
  """
  unpacked = sum(sizes)
  if unpacked > max(_UNPACKED, _TIMES * size):
    raise ValueError(
      f"must be an archive that unpacks to at most {_TIMES} times its size; it has {size:,} bytes "
      f"and unpacks to {unpacked:,}"
    )


if not TYPE_CHECKING:
  # These were here before.
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.extras": ("EXTRAS", "missing_extra", "naming_extra", "require_extra"),
      "gating_jax.names": ("former_keyword", "former_positional"),
    },
  )
