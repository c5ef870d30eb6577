"""Paths that users give: `~` is the home folder, every other character stands for itself."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

# On Linux an open folder has a numbered name here, without any pattern or separator of its own.
HANDLES = Path("/proc/self/fd")


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
