"""Tables of config fields for the documentation site, read from the files in `configs`.

A line `<!-- fields of configs/common.py -->` of a page becomes a table of the fields that the
first function of the file whose name ends in `_config` sets, with their defaults and comments, and
a list of its variants. Fields of a function that the dicts unpack are listed in its place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
_MARK = re.compile(r"^<!-- fields of (configs/\w+\.py) -->$", re.MULTILINE)
_COMMENT = re.compile(r"#\s?(.*)$")
_PLACEHOLDER = re.compile(r"config_dict\.placeholder\((\w+)\)")


class Field(NamedTuple):
  """A field: its path in the config, its default as it is written, and its comment."""

  path: str
  default: str
  comment: str


class ConfigFile:
  """A file that lists fields."""

  def __init__(self, path: Path) -> None:
    self.text = path.read_text()
    self.lines = self.text.splitlines()
    self.tree = ast.parse(self.text)
    functions = [node for node in self.tree.body if isinstance(node, ast.FunctionDef)]
    self.functions = {node.name: node for node in functions}
    self.function = next(node for node in functions if node.name.endswith("_config"))
    # Dicts with a name of their own, that fields refer to.
    self.named = {}
    for node in self.function.body:
      if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
        self.named[node.targets[0].id] = node.value

  def fields(self) -> Iterator[Field]:
    """Lists the fields in the order of the file."""
    for node in self.function.body:
      if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
        yield from self._of_dict("", node.value.args[0])
      elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        path = ast.unparse(node.targets[0]).partition(".")[2]
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("ConfigDict"):
          yield from self._of_dict(f"{path}.", node.value.args[0])
        else:
          yield self._field(path, node.targets[0], node.value)

  def variants(self) -> Iterator[tuple[str, str]]:
    """Lists the variants, each with the field that it sets; empty where it sets several."""
    for node in self.tree.body:
      if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_VARIANTS":
        for key, value in zip(node.value.keys, node.value.values, strict=True):
          sets_one = isinstance(value, ast.Call)
          yield key.value, value.args[0].value if sets_one else ""

  def _of_dict(self, prefix: str, node: ast.Dict) -> Iterator[Field]:
    """Lists the fields of one dict, and of those in it."""
    for key, value in zip(node.keys, node.values, strict=True):
      if key is None:
        yield from self._of_unpacked(prefix, value)
        continue
      path = prefix + key.value
      if isinstance(value, ast.Name):
        value = self.named[value.id]
      if not isinstance(value, ast.Dict):
        yield self._field(path, key, value)
        continue
      if about := self._comment(key.lineno, key.lineno):
        yield Field(path, "", about)
      yield from self._of_dict(f"{path}.", value)

  def _of_unpacked(self, prefix: str, call: ast.Call) -> Iterator[Field]:
    """Lists the fields of the dict that a function without arguments returns.

    The function is one of this file, or of another file of configs, such as `common.opening`.
    """
    module, _, name = ast.unparse(call.func).rpartition(".")
    file = ConfigFile(ROOT / "configs" / f"{module}.py") if module else self
    yield from file._of_dict(prefix, file.functions[name].body[-1].value)

  def _field(self, path: str, key: ast.expr, value: ast.expr) -> Field:
    """Describes the field that one line sets."""
    default = ast.get_source_segment(self.text, value)
    default = _PLACEHOLDER.sub(r"None", default)
    return Field(path, default, self._comment(key.lineno, value.end_lineno))

  def _comment(self, first: int, last: int) -> str:
    """Reads the comment after a line, or else the lines of comment above it."""
    if after := _COMMENT.search(self.lines[last - 1]):
      return after[1]
    above: list[str] = []
    for line in reversed(self.lines[: first - 1]):
      if not line.strip().startswith("#"):
        break
      above.insert(0, _COMMENT.search(line)[1])
    return " ".join(above)


def table(path: Path) -> str:
  """Writes the fields and the variants of a file as Markdown."""
  file = ConfigFile(path)
  rows = ["| field | default | |", "|---|---|---|"]
  for field in file.fields():
    default = f"`{field.default}`" if field.default else ""
    rows.append(f"| `{field.path}` | {default} | {field.comment} |")
  variants = []
  for name, sets in file.variants():
    variants.append(f"`{name}=` ({f'`{sets}`' if sets else 'several fields'})")
  if variants:
    rows += ["", f"Variants: {', '.join(variants)}."]
  return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Replaces the marks of a page by tables; called by mkdocs."""
  return _MARK.sub(lambda mark: table(ROOT / mark[1]), markdown)
