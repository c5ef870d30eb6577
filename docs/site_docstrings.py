"""Sections and examples of docstrings, as the reference of the documentation site wants them.

Docstrings of this project have no blank line between their sections, and their examples stand
without a heading. The site's reader wants a blank line before each section, and takes the `>>>` of
an example for a quotation unless it is marked as code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"\n(?=(?:Args|Attributes|Returns|Yields|Raises|Reference|References):)")
# From the first prompt to the next blank line or the end.
_EXAMPLE = re.compile(r"(?:^|(?<=\n))(?=>>> )(.*?)(?=\n\n|\n*\Z)", re.DOTALL)
# A value has no name here: "[C], dimensionless: ..." is all description.
_RETURNS = re.compile(r"\nReturns:\n((?:  .*(?:\n|\Z))+)")


def _as_paragraph(section: re.Match) -> str:
  """Writes a section of returned values as one paragraph."""
  lines = [line.strip() for line in section[1].splitlines()]
  return "\n**Returns:** " + "\n".join(lines) + "\n"


class Readable(griffe.Extension):
  """An extension that spaces the sections of docstrings, and marks their examples as code."""

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    """Changes the docstring of one object."""
    if obj.docstring is not None:
      spaced = _SECTION.sub("\n\n", obj.docstring.value)
      spaced = _RETURNS.sub(_as_paragraph, spaced)
      obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\1\n```", spaced)
