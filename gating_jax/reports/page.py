"""Self-contained HTML page of numbers, a picture and folded sections.

The page fetches nothing and runs no script. Parts that are measured later, such as times, have a
named place, which `fill_page` overwrites.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from gating_jax.training.journal import write_atomically

WIDTH = 5.0  # inches of a picture
DPI = 150  # 1.5 pixels for each CSS pixel, see `embed_figure`

# Pairs of a column, an axis or a colour, and the sentence that defines it.
Terms = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Number:
  """A large number at the top of a page, next to its baseline.

  Attributes:
    name: of the measure.
    value: with its unit.
    baseline: the value of the ungated baseline, or why there is none.
    meaning: a sentence that defines the number.
    command: that measures the number; empty if it is measured.
    place: name by which `fill_page` finds it; empty if it is never overwritten.
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
  """A point in a picture that shows a text when it is hovered over or focused.

  Attributes:
    left, top: of its centre, in % of the picture's width and height.
    name: title of the text.
    lines: of the text.
  """

  left: float
  top: float
  name: str
  lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class EmbeddedPicture:
  """A PNG image with a caption.

  Attributes:
    png: content of the file.
    caption: what the image shows, in words.
    width: in CSS pixels; None gives each pixel of the image one of them.
    scrolls: sideways where the screen is too narrow; otherwise the image shrinks.
    terms: each axis or colour, and a sentence that defines it.
    photo: the image shows photographs, whose colours are kept on a dark screen; those of a chart
      are inverted.
    points: that show more about what is drawn there.
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
    """Returns the image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
  """A header and rows of text.

  Attributes:
    header: names of the columns.
    rows: cells.
    numeric: all columns but the first hold numbers, aligned to the right.
    terms: columns, each with a sentence that defines it.
  """

  kind: ClassVar[str] = "table"
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: bool = True
  terms: Terms = ()


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, a paragraph, and pictures and tables.

  Attributes:
    title: the heading.
    text: the paragraph.
    parts: below the paragraph.
    open: shown unfolded; otherwise the reader opens it.
    place: name by which `fill_page` finds it; empty if it is never overwritten.
  """

  kind: ClassVar[str] = "section"
  title: str
  text: str = ""
  parts: Sequence[EmbeddedPicture | Table] = ()
  open: bool = False
  place: str = ""


@dataclasses.dataclass(frozen=True)
class Opening:
  """The top of a page.

  Attributes:
    numbers: in the largest letters of the page.
    picture: of what the gates do.
    text: below the numbers.
    notice: the first line, for what a reader must know first, such as that the run has failed.
  """

  numbers: Sequence[Number] = ()
  picture: EmbeddedPicture | None = None
  text: str = ""
  notice: str = ""


def save_figure(figure: Any, file: Path | IO[bytes]) -> None:
  """Writes a matplotlib figure as a PNG file of `DPI` pixels an inch.

  Texts are drawn literally: `$` starts no formula. A letter that no font has is drawn as a box,
  without a warning.

  Args:
    figure: of matplotlib.
    file: a path, which is written whole or not at all, or an open binary file.
  """
  from matplotlib.text import Text  # imports slowly

  # A prior or a class may have `$` in its name, which matplotlib would parse as a formula.
  for text in figure.findobj(Text):
    text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    # In memory first, so that a figure that cannot be drawn leaves no half-written file.
    content = io.BytesIO()
    # The figure gets the resolution of the picture: positions measured in it then hold for both.
    figure.set_dpi(DPI)
    figure.savefig(content, dpi=DPI)
  if isinstance(file, Path):
    write_atomically(file, content.getvalue())
  else:
    file.write(content.getvalue())


def embed_figure(
  figure: Any, caption: str, *, scrolls: bool = False, terms: Terms = (), photo: bool = False
) -> EmbeddedPicture:
  """Returns a matplotlib figure as a picture.

  A figure of width `WIDTH` fills a phone, with letters as large as the text's. A wider one should
  scroll.

  Args:
    figure: of matplotlib.
    caption, scrolls, terms, photo: of the `EmbeddedPicture`.
  """
  # 100 CSS pixels an inch, whatever the resolution of the PNG.
  width = round(100 * figure.get_figwidth())
  file = io.BytesIO()
  save_figure(figure, file)
  return EmbeddedPicture(file.getvalue(), caption, width, scrolls=scrolls, terms=terms, photo=photo)


def render_page(
  title: str, sections: Sequence[Section], *, subtitle: str = "", opening: Opening | None = None
) -> str:
  """Renders the page as HTML.

  Args:
    title: of the page.
    sections: in the order of the page.
    subtitle: below the title.
    opening: top of the page.
  """
  return _template("page.html").render(
    title=title, subtitle=subtitle, sections=sections, opening=opening or Opening()
  )


def write_page(
  path: Path,
  title: str,
  sections: Sequence[Section],
  *,
  subtitle: str = "",
  opening: Opening | None = None,
) -> None:
  """Writes the page, whole or not at all; arguments as in `render_page`."""
  write_atomically(path, render_page(title, sections, subtitle=subtitle, opening=opening))


def fill_page(path: Path, parts: Sequence[Number | Section]) -> bool:
  """Overwrites numbers and sections of an existing page.

  Args:
    path: of the page.
    parts: the new contents; each replaces the part with the same `place`.
  Returns:
    True if the page has all the places. A page of an older version lacks them and is not changed.
  """
  if not path.is_file():
    return False
  html, macros = path.read_text("utf-8", "replace"), vars(_template("parts.html").module)
  for part in parts:
    # A plain string: jinja's `Markup` would escape whatever is added to it.
    mark = str(macros["mark"](part))
    # A part stands between two equal marks, which no other text of the page can contain.
    before, first, rest = html.partition(mark)
    _, second, after = rest.partition(mark)
    if not (first and second):
      return False
    # In memory: if a later part has no place, the file is left as it is.
    html = before + str(macros["part_of"](part)).strip() + after
  write_atomically(path, html)
  return True


@functools.cache
def _template(name: str):
  """Loads a template of this package."""
  import jinja2  # imports slowly

  # Autoescape: texts come from configs and data sets, and must not become HTML. `StrictUndefined`:
  # a misspelt name in a template is an error, not an empty text.
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("gating_jax.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(name)
