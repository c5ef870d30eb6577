"""One self-contained HTML page: headed sections of text, tables and pictures. Nothing is fetched, all is escaped."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path

from gating_jax.training.journal import write_atomically


@dataclasses.dataclass(frozen=True)
class Picture:
  """A PNG image, what it shows in words, and, if it should not fill the page, its width in CSS pixels."""

  png: bytes
  caption: str
  width: int | None = None

  @property
  def source(self) -> str:
    """A data URL."""
    return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True)
class Table:
  """A header and rows of text; the first column is of names, the others of numbers if `numeric`."""

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  numeric: bool = True


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, a paragraph and what follows it."""

  title: str
  text: str = ""
  parts: Sequence[Picture | Table] = ()


def figure_picture(figure, caption: str, dpi: int = 110) -> Picture:
  """A matplotlib figure as a picture."""
  file = io.BytesIO()
  figure.savefig(file, dpi=dpi)
  return Picture(file.getvalue(), caption)


def render(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
  """The page's HTML."""
  return _template().render(title=title, subtitle=subtitle, sections=sections, is_table=_is_table)


def write(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
  """Writes the page, whole or not at all."""
  write_atomically(path, render(title, sections, subtitle))


def _is_table(part: Picture | Table) -> bool:
  return isinstance(part, Table)


@functools.cache
def _template():
  import jinja2  # imports slowly

  environment = jinja2.Environment(
      loader=jinja2.PackageLoader("gating_jax.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
      trim_blocks=True, lstrip_blocks=True)
  return environment.get_template("page.html")
