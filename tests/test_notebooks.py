"""Notebooks in docs run as they stand, and print what they say, but for their numbers."""

import contextlib
import io
import json
import re

import pytest

from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def cells(path, kind):
  book = json.loads(path.read_text("utf-8"))
  assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
  return [cell for cell in book["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran_from_top_to_bottom(path):
  code = cells(path, "code")
  assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
  # What a cell prints is kept, and no error.
  assert {output["output_type"] for cell in code for output in cell["outputs"]} == {"stream"}
  for cell in code:
    assert bool(cell["outputs"]) == ("print(" in "".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_says(path):
  pytest.importorskip("onnx")
  scope = {"__name__": "notebook"}
  for i, cell in enumerate(cells(path, "code")):
    code = compile("".join(cell["source"]), f"{path.name}, cell {i + 1}", "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      exec(code, scope)
    kept = "".join("".join(output["text"]) for output in cell["outputs"])
    assert without_numbers(printed.getvalue()) == without_numbers(kept)


def without_numbers(text):
  """Text without its numbers, which depend on the machine."""
  return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", text)
