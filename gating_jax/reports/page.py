"""One self-contained HTML page: numbers, a picture, folded sections. Nothing is fetched, no script runs.

What is measured after the page was written, such as times, has a place of its own that `fill` writes again.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from gating_jax.reports.text import save
from gating_jax.training.journal import write_atomically

WIDTH = 5.0  # inches of a picture
_DPI = 150

Terms = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Number:
  """A large number at the top of a page, next to its baseline.

  Attributes:
    name: of what is measured.
    value: with its unit.
    baseline: the value of the ungated baseline, or why there is none.
    meaning: a sentence that defines the number.
    command: that measures it, where it is not measured.
    place: where `fill` finds it, if it is written again later.
  """

  kind: ClassVar[str] = "number"
  name: str
  value: str
  baseline: str
  meaning: str
  command: str = ""
  place: str = ""


@dataclasses.dataclass(frozen=True)
class Point:
  """A place in a picture that shows a text when it is pointed at, or has the focus.

  Attributes:
    left, top: of its centre, in per cent of the picture.
    name: what it is.
    lines: what is said of it.
  """

  left: float
  top: float
  name: str
  lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG image and what it shows in words.

  Attributes:
    width: in CSS pixels, if that is not one for each of its own.
    scrolls: sideways, where there is no room for it; else it shrinks.
    terms: each axis or colour, and a sentence that defines it.
    photo: shows images, whose colours stay as they are on a dark screen; those of a chart are inverted.
    points: that say more of what is drawn there.
  """

  kind: ClassVar[str] = "picture"
  png: bytes
  caption: str
  width: int | None = None
  scrolls: bool = False
  terms: Terms = ()
  photo: bool = False
  points: Sequence[Point] = ()

  @property
  def source(self) -> str:
    """A data URL."""
    return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
  """A header and rows of text; the first column is of names, the others of numbers if `numeric`.

  `terms` are columns, each with a sentence that defines it.
  """

  kind: ClassVar[str] = "table"
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: bool = True
  terms: Terms = ()


@dataclasses.dataclass(frozen=True)
class Listing:
  """Text as a terminal shows it."""

  kind: ClassVar[str] = "listing"
  text: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, a paragraph and what follows it; folded until somebody opens it, unless it is `open`.

  `place` is where `fill` finds it, if it is written again later.
  """

  kind: ClassVar[str] = "section"
  title: str
  text: str = ""
  parts: Sequence[Picture | Table | Listing] = ()
  open: bool = False
  place: str = ""


@dataclasses.dataclass(frozen=True)
class Opening:
  """What a page begins with.

  Attributes:
    numbers: in the largest letters of the page.
    picture: one that says what gates did.
    text: below the numbers.
    notice: what a reader must know before all else, such as that a run has failed; the first line.
  """

  numbers: Sequence[Number] = ()
  picture: Picture | None = None
  text: str = ""
  notice: str = ""


def drawn(
  draw: Callable[[BinaryIO], None],
  caption: str,
  width: int | None = None,
  *,
  scrolls: bool = False,
  terms: Terms = (),
  photo: bool = False,
) -> Picture:
  """What `draw` writes as a PNG, as a picture."""
  file = io.BytesIO()
  draw(file)
  return Picture(file.getvalue(), caption, width, scrolls, terms, photo)


def pictured(
  figure: Any, caption: str, *, scrolls: bool = False, terms: Terms = (), photo: bool = False
) -> Picture:
  """A matplotlib figure as a picture; one that is `WIDTH` wide fills a phone, its letters as large as the text's.

  A wider one is best read if it `scrolls`.
  """
  width = round(100 * figure.get_figwidth())
  return drawn(
    lambda file: save(figure, file, dpi=_DPI),
    caption,
    width,
    scrolls=scrolls,
    terms=terms,
    photo=photo,
  )


def render(
  title: str, sections: Sequence[Section], subtitle: str = "", opening: Opening | None = None
) -> str:
  """The page's HTML."""
  return _template("page.html").render(
    title=title, subtitle=subtitle, sections=sections, opening=opening or Opening()
  )


def write(
  path: Path,
  title: str,
  sections: Sequence[Section],
  subtitle: str = "",
  opening: Opening | None = None,
) -> None:
  """Writes the page, whole or not at all."""
  write_atomically(path, render(title, sections, subtitle, opening))


def fill(path: Path, parts: Sequence[Number | Section]) -> bool:
  """Writes numbers and sections into a page that is there, at their places, over what stands there.

  Returns whether the page has all the places; one of an older version does not, and is left as it is.
  """
  if not path.is_file():
    return False
  html, macros = path.read_text("utf-8", "replace"), _template("parts.html").module
  for part in parts:
    mark = str(macros.mark(part))  # texts, since markup escapes what is added to it
    before, first, rest = html.partition(mark)
    _, second, after = rest.partition(mark)
    if not (first and second):
      return False
    html = before + str(macros.part_of(part)).strip() + after
  write_atomically(path, html)
  return True


@functools.cache
def _template(name: str):
  import jinja2  # imports slowly

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("gating_jax.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(name)
