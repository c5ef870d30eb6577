"""Paths that a user gives: `~` is the home folder, and every other character stands for itself."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

# Under its number here, on Linux, an open folder has a name in which nothing can be taken for a pattern or a separator.
HANDLES = Path("/proc/self/fd")


def user_path(path: str | os.PathLike) -> Path:
  """The path, with `~` and `~name` at its beginning expanded where there is such a user; twice is as once.

  >>> user_path("runs/lr[0.1]")
  PosixPath('runs/lr[0.1]')
  """
  expanded = Path(os.path.expanduser(path))
  # Of ./~ a Path keeps ~ alone.
  return expanded.absolute() if str(expanded).startswith("~") else expanded


def is_text(path: str | os.PathLike) -> bool:
  """Whether the path is UTF-8: file systems take any bytes, which Python keeps as surrogates."""
  return not any("\ud800" <= character <= "\udfff" for character in os.fspath(path))


def quoted(argument: str) -> str:
  """The argument of a command for a shell. Bytes that are no letters stand as numbers: no terminal or page keeps them.

  >>> print(quoted("lr[0.1]"), quoted("a\\n"))
  'lr[0.1]' $'a\\x0a'
  """
  if argument.isprintable():
    return shlex.quote(argument)
  letters = []
  for byte in os.fsencode(argument):
    plain = 32 <= byte < 127 and byte not in b"\\'"
    letters.append(chr(byte) if plain else f"\\x{byte:02x}")
  return f"$'{''.join(letters)}'"


def check_storable(name: str, path: Path) -> None:
  """Raises a ValueError that names the argument unless checkpoints can be written below `path`.

  TensorStore takes a backslash for a slash: whatever opens the folder by its name would look elsewhere. Orbax takes
  three more characters for patterns where it cannot be given the folder by its handle.
  """
  taken = "\\" if HANDLES.is_dir() else "\\*?["
  for character in taken:
    if character in str(path.absolute()):
      raise ValueError(
        f"{name} must have no {character} in its path, which the library that stores checkpoints takes "
        f"for another character or a pattern; got {str(path.absolute())!r}"
      )
