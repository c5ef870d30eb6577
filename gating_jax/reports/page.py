"""One self-contained HTML page: headed sections of text, tables and pictures. Nothing is fetched, all is escaped."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from gating_jax.reports.lettering import save
from gating_jax.training.journal import write_atomically

WIDTH = 5.0  # inches of a picture
_DPI = 150


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG image and what it shows in words.

  Attributes:
    width: in CSS pixels, if that is not one for each of its own.
    scrolls: sideways, where there is no room for it; else it shrinks.
  """

  kind: ClassVar[str] = "picture"
  png: bytes
  caption: str
  width: int | None = None
  scrolls: bool = False

  @property
  def source(self) -> str:
    """A data URL."""
    return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
  """A header and rows of text; the first column is of names, the others of numbers if `numeric`."""

  kind: ClassVar[str] = "table"
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: bool = True


@dataclasses.dataclass(frozen=True)
class Listing:
  """Text as a terminal shows it."""

  kind: ClassVar[str] = "listing"
  text: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, a paragraph and what follows it."""

  title: str
  text: str = ""
  parts: Sequence[Picture | Table | Listing] = ()


def drawn(
    draw: Callable[[BinaryIO], None], caption: str, width: int | None = None, *, scrolls: bool = False
) -> Picture:
  """What `draw` writes as a PNG, as a picture."""
  file = io.BytesIO()
  draw(file)
  return Picture(file.getvalue(), caption, width, scrolls)


def pictured(figure: Any, caption: str, *, scrolls: bool = False) -> Picture:
  """A matplotlib figure as a picture; one that is `WIDTH` wide fills a phone, its letters as large as the text's.

  A wider one is best read if it `scrolls`.
  """
  width = round(100 * figure.get_figwidth())
  return drawn(lambda file: save(figure, file, dpi=_DPI), caption, width, scrolls=scrolls)


def render(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
  """The page's HTML."""
  return _template().render(title=title, subtitle=subtitle, sections=sections)


def write(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
  """Writes the page, whole or not at all."""
  write_atomically(path, render(title, sections, subtitle))


@functools.cache
def _template():
  import jinja2  # imports slowly

  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("gating_jax.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  return environment.get_template("page.html")
