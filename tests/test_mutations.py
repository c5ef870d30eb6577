"""The mutants fit the package, and a run of pytest is judged rightly."""

import ast

import pytest

from tests import mutations
from tests.helpers import ROOT


def test_there_are_at_least_25_and_no_name_twice():
  names = [mutant.name for mutant in mutations.MUTANTS]
  assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=lambda mutant: mutant.name)
def test_its_line_and_its_tests_are_there(mutant):
  assert mutations.is_fresh(mutant)
  for test in mutant.tests.split():
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions | {""}


@pytest.mark.parametrize(
  ("status", "output", "expected"),
  [
    (1, "FAILED tests/a.py::test_b - assert 0", ("killed", "a.py::test_b")),
    (0, "3 passed", ("survived", "no test failed")),
    (1, "ERROR tests/a.py::test_b - no fixture", ("error", None)),
    (2, "ERROR tests/a.py - ImportError", ("error", None)),
    (5, "no tests ran", ("error", None)),
  ],
)
def test_only_a_failed_test_kills(status, output, expected):
  outcome, said = mutations.judged(status, output)
  assert outcome == expected[0]
  assert said == expected[1] or (expected[1] is None and output.split(" - ")[0] in said)
