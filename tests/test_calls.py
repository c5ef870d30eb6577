"""Calls of the package's own functions: after the third argument, all are given by keyword."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gating_jax

FILES = sorted(Path(gating_jax.__file__).parent.rglob("*.py"))
MOST = 3


def long_functions(tree: ast.AST, *, nested: bool = True) -> Iterator[str]:
  """Yields names of functions and classes of a file that take a fourth argument by position."""
  of_class = isinstance(tree, ast.ClassDef)
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.FunctionDef):
      # With `*args`, any number is natural.
      taken = 0 if node.args.vararg else len(node.args.posonlyargs + node.args.args) - of_class
      if taken > MOST:
        yield tree.name if of_class and node.name == "__init__" else node.name
    elif isinstance(node, ast.ClassDef):
      fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
      if len(fields) > MOST:
        yield node.name
    if nested or not isinstance(node, ast.FunctionDef):
      yield from long_functions(node, nested=nested)


def long_calls(source: str, own: set[str]) -> list[str]:
  """Lists the calls of own functions that give more than three arguments by position."""
  tree = ast.parse(source)
  here, foreign = set(long_functions(tree)), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.arg):
      # The type of an argument that is a function has no names of parameters.
      here.discard(node.arg)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
      is_own = (getattr(node, "module", None) or "").startswith("gating_jax")
      here |= names & own if is_own else set()
      foreign |= set() if is_own else names
  found = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call) or len(node.args) <= MOST:
      continue
    called = ast.unparse(node.func)
    root, *_, name = called.split(".") if "." in called else ("", called)
    if name in here if not root else name in own and root.partition("(")[0] not in foreign:
      found.append(f"line {node.lineno}: {ast.unparse(node)}")
  return found


@pytest.fixture(scope="module")
def own():
  trees = [ast.parse(file.read_text()) for file in FILES]
  # Other files do not reach functions inside of functions.
  functions = {name for tree in trees for name in long_functions(tree, nested=False)}
  nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
  # As for arguments, the type of a field that is a function has no names of parameters.
  return functions - {
    node.target.id for node in nodes if "Callable" in ast.unparse(node.annotation)
  }


def test_no_call_gives_more_than_three_arguments_by_position(own):
  found = {str(file): calls for file in FILES if (calls := long_calls(file.read_text(), own))}
  assert found == {}


@pytest.mark.parametrize(
  ("call", "found"),
  [
    ("join(1, 2, 3, 4)", 1),
    ("join(1, 2, *rest)", 0),
    ("join(1, 2, 3, rest=4)", 0),
    ("Row(1, 2, 3, 4)", 1),
    ("row.method(1, 2, 3, 4)", 1),
    ("number('x', 1, '> 0', bool)", 1),
    ("arguments.number('x', 1, '> 0', bool)", 1),
    ("np.number('x', 1, '> 0', bool)", 0),
    ("many(1, 2, 3, 4)", 0),
    ("argument(1, 2, 3, 4)", 0),
  ],
)
def test_calls_are_found(call, found):
  source = f"""
import numpy as np
from gating_jax.ops import arguments
from gating_jax.ops.arguments import number
def join(a, b, c, rest): ...
def many(*values): ...
def argument(a, b, c, d): ...
def calls(argument): ...
class Row:
  def method(self, a, b, c, d): ...
  def __init__(self, a, b, c, d): ...
{call}
"""
  own = set(long_functions(ast.parse(source))) | {"number"}
  assert len(long_calls(source, own)) == found
