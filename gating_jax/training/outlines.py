"""Outlines of data sets: all that a network needs to know of its data.

A run directory keeps those of its first data sets, so that its model can be loaded without the
data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.training import hosts
from gating_jax.training.journal import write_json
from gating_jax.training.rundir import RunDirError
from gating_jax.training.settings import with_tuples

FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Outline:
  """A data set without its examples, which stands in for the set wherever none is read.

  Attributes:
    examples: number of examples, the length of the set.
    class_names: one per class.
    shape: `(H, W, D)` of an image; None for videos.
    shapes: shapes of the arrays of a video, by name; None for images.
    unit_names: one per unit action of a video.
    multi_label: whether a video may have several classes.
  """

  examples: int
  class_names: tuple[str, ...]
  shape: tuple[int, ...] | None = None
  shapes: Mapping[str, tuple[int, ...]] | None = None
  unit_names: tuple[str, ...] = ()
  multi_label: bool = False

  def __len__(self) -> int:
    return self.examples


def write(folder: Path, sets: Sequence[Any]) -> None:
  """Writes the outlines of the sets that a run begins with."""
  hosts.on_writer(lambda: write_json(folder / FILE, {"sets": [_fields(data) for data in sets]}))


def read(folder: Path) -> list[Outline] | None:
  """Reads the outlines that a run directory keeps; None for a run of an older version without any.

  Raises:
    RunDirError: the file is damaged.
  """
  file = folder / FILE
  if not file.exists():
    return None
  try:
    # JSON has lists where outlines have tuples.
    sets = with_tuples(json.loads(file.read_text("utf-8")))["sets"]
    outlines = [Outline(**fields) for fields in sets]
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise RunDirError(f"{file} is damaged: it must hold outlines of data sets ({error})") from None
  # Every run begins with at least one set.
  if not outlines:
    raise RunDirError(f"{file} is damaged: it must hold at least one outline of a data set")
  for outline in outlines:
    if wrong := _wrong(outline):
      raise RunDirError(f"{file} is damaged: {wrong}")
  return outlines


def _fields(data: Any) -> dict[str, Any]:
  """Returns the fields of an outline that a set has."""
  names = [field.name for field in dataclasses.fields(Outline)]
  # A set has a length in place of the field `examples`.
  return {
    "examples": len(data),
    **{name: getattr(data, name) for name in names if hasattr(data, name)},
  }


def _wrong(outline: Outline) -> str | None:
  """Returns a description of the first field that no data set can have; None if there is none."""
  shapes = {} if outline.shapes is None else outline.shapes
  # An exact type: isinstance would take True for an integer.
  if type(outline.examples) is not int or outline.examples < 0:
    return f"examples must be an integer >= 0; it has {outline.examples!r:.80}"
  for name in ("class_names", "unit_names"):
    names = getattr(outline, name)
    if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
      return f"{name} must be texts; it has {names!r:.80}"
  if not isinstance(shapes, dict):
    return f"shapes must be a section; it has {shapes!r:.80}"
  for shape in (outline.shape or (), *shapes.values()):
    if not isinstance(shape, tuple) or not all(type(size) is int and size > 0 for size in shape):
      return f"a shape must be of integers >= 1; it has {shape!r:.80}"
  return None
