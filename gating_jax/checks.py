"""Messages for bad settings: the argument, the rule, the value, and what may have been meant; texts of any origin."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
  """Raises a ValueError unless `value` is among `choices`.

  >>> one_of("model.gating", "chanel", ("none", "channel"))
  Traceback (most recent call last):
  ValueError: model.gating must be one of channel, none; got 'chanel'. Did you mean 'channel'?
  """
  choices = sorted(choices)
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{hint}")


def printable(text: object, keep: str = "") -> str:
  """The text without what would move a terminal's cursor, recolour it or turn its letters round.

  Args:
    text: of any origin, such as the name of a class.
    keep: letters that stay nevertheless, such as a new line.

  >>> printable("red \\x1b[31m\\nlines"), printable("two\\nlines\\t", keep="\\n")
  ('red ?[31m?lines', 'two\\nlines?')
  """
  return "".join(c if c.isprintable() or c in keep else "?" for c in str(text))
