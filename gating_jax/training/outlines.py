"""Outlines of data sets in a run directory, with which its model is loaded without the data."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.training import hosts
from gating_jax.training.journal import write_json
from gating_jax.training.rundir import RunDirError, with_tuples

DATA_FILE = "data.json"


@dataclasses.dataclass(frozen=True)
class Outline:
  """A data set without its examples, which stands in for the set wherever none is read.

  Attributes:
    examples: number of examples, the length of the set; of a union to train on, those of an epoch.
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


def write_outlines(folder: Path, sets: Sequence[Any]) -> None:
  """Writes the outlines of the data sets that a run begins with: its model loads without the data.

  Args:
    folder: the run directory.
    sets: the sets, in the order in which `read_outlines` returns them.
  """
  outlines = [_outline_of(data) for data in sets]
  hosts.on_writer(write_json, folder / DATA_FILE, {"sets": outlines})


def read_outlines(folder: Path) -> list[Outline] | None:
  """Reads the outlines that a run directory keeps; None for a run of an older version without any.

  Raises:
    RunDirError: the file is damaged.
  """
  file = folder / DATA_FILE
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
    if wrong := _find_wrong_field(outline):
      raise RunDirError(f"{file} is damaged: {wrong}")
  return outlines


def check_classes(folder: Path, class_names: Sequence[str]) -> None:
  """Checks that a run's data have the classes with which it began, in their order.

  Args:
    folder: the run directory.
    class_names: of the data, as they are opened now; none for data without classes.
  Raises:
    RunDirError: the classes are others; or as in `read_outlines`.
  """
  kept = read_outlines(folder)
  if not kept or not class_names:
    return
  for place, (own, other) in enumerate(itertools.zip_longest(kept[0].class_names, class_names)):
    if own != other:
      raise RunDirError(
        f"workdir {folder} holds a run whose classes differ from those of the data; choose another "
        f"workdir, or give it the data that it began with. Of its {len(kept[0].class_names)} "
        f"classes and the {len(class_names)} of the data, number {place} is the first that "
        f"differs: {own!r} and {other!r}"
      )


def _outline_of(data: Any) -> dict[str, Any]:
  """Returns the fields of an outline that a set has."""
  # A set has a length in place of the field `examples`; a union, epochs of another length.
  found = {"examples": getattr(data, "in_epoch", None) or len(data)}
  for field in dataclasses.fields(Outline):
    if hasattr(data, field.name):
      found[field.name] = getattr(data, field.name)
  return found


def _find_wrong_field(outline: Outline) -> str | None:
  """Returns a description of the first field that no data set can have; None if there is none."""
  shapes = {} if outline.shapes is None else outline.shapes
  # An exact type: isinstance would take True for an integer.
  if type(outline.examples) is not int or outline.examples < 0:
    return f"examples must be an integer >= 0; it has {outline.examples!r:.80}"
  for name in ("class_names", "unit_names"):
    names = getattr(outline, name)
    if not _is_tuple_of(str, names):
      return f"{name} must be texts; it has {names!r:.80}"
  if not isinstance(shapes, dict):
    return f"shapes must be a section; it has {shapes!r:.80}"
  for shape in (outline.shape or (), *shapes.values()):
    if not _is_tuple_of(int, shape) or min(shape, default=1) < 1:
      return f"a shape must be of integers >= 1; it has {shape!r:.80}"
  return None


def _is_tuple_of(kind: type, values: Any) -> bool:
  """Returns whether all values are of exactly this type: a bool is no int here."""
  return isinstance(values, tuple) and all(type(value) is kind for value in values)
