"""Rules of this folder: two tiers, short names, helpers in one place."""

import ast
import subprocess
import sys
import tomllib
from xml.etree import ElementTree

import pytest

from tests.helpers import ROOT, environment

# Written by `bash tests/run.sh`, and by it with `--slow`.
RECORD = ROOT / ".cache" / "fast.xml"
SLOW_RECORD = ROOT / ".cache" / "slow.xml"
# Seconds of a test, and of a run that many tests share, on a machine that takes USUAL for a test on
# average; in proportion on a slower or busier one.
CALL_LIMIT = 5.0
SETUP_LIMIT = 15.0
USUAL = 0.17
# For a slow test, to be fast enough when nothing else runs.
ATTEMPTS = 3
MOST_MEMORY = 4.0  # GiB, of one process


def over_limit(record, slowness=1.0):
  """Returns `{node id: seconds}` of the tests of a JUnit record that exceed their limit."""
  found = {}
  for case in cases_of(record):
    setup = number_of(case, "setup_seconds")
    call = float(case.get("time")) - setup
    if call > CALL_LIMIT * slowness or setup > SETUP_LIMIT * slowness:
      found[node_id(case)] = setup + call
  return found


def cases_of(record):
  """Returns the tests of a JUnit record."""
  return list(ElementTree.parse(record).iter("testcase"))


def number_of(case, name):
  """Returns a property of a test, 0 where it has none."""
  properties = {p.get("name"): p.get("value") for p in case.iter("property")}
  return float(properties.get(name, 0))


def node_id(case):
  """Returns the name by which pytest runs the test."""
  file = case.get("classname").replace(".", "/")
  return f"{file}.py::{case.get('name')}"


def slowness_of(record):
  """Returns the slowdown of the machine, at least 1: 2 takes twice `USUAL` for a test."""
  seconds = [float(case.get("time")) for case in cases_of(record)]
  return max(1.0, sum(seconds) / len(seconds) / USUAL)


def run_alone(tests, folder):
  """Returns the JUnit record of these tests, run one by one without a compilation cache."""
  folder.mkdir()
  record = folder / "record.xml"
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-p", "no:xdist", f"--junit-xml={record}", *tests],
    cwd=ROOT,
    check=False,
    env=environment(devices=8, JAX_COMPILATION_CACHE_DIR=str(folder / "programs")),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
  assert {node_id(case) for case in cases_of(record)} == set(tests)
  return record


def test_a_test_over_the_limit_is_named(tmp_path):
  record = tmp_path / "record.xml"
  case = '<testcase classname="tests.ops.test_macs" name="{}" time="{}">{}</testcase>'
  setup = '<properties><property name="setup_seconds" value="{}" /></properties>'
  record.write_text(
    "<testsuites>"
    + "".join(
      [
        case.format("quick", 4.9, ""),
        case.format("long", 5.1, ""),
        case.format("shared", 14.0, setup.format(13.0)),
        case.format("long_shared", 17.0, setup.format(16.0)),
      ]
    )
    + "</testsuites>"
  )
  assert list(over_limit(record)) == [
    "tests/ops/test_macs.py::long",
    "tests/ops/test_macs.py::long_shared",
  ]
  assert list(over_limit(record, slowness=1.05)) == ["tests/ops/test_macs.py::long_shared"]
  record.write_text(f"<testsuites>{case.format('quick', USUAL / 2, '') * 3}</testsuites>")
  assert slowness_of(record) == 1.0
  record.write_text(f"<testsuites>{case.format('quick', USUAL * 1.5, '') * 3}</testsuites>")
  assert slowness_of(record) == pytest.approx(1.5)


@pytest.mark.slow
@pytest.mark.alone
def test_whatever_takes_more_than_five_seconds_is_marked_slow(tmp_path):
  assert RECORD.exists(), "the fast tier leaves a record of its times: run bash tests/run.sh first"
  slowness = slowness_of(RECORD)
  suspects = over_limit(RECORD, slowness)
  for attempt in range(ATTEMPTS):
    if suspects:
      suspects = over_limit(run_alone(suspects, tmp_path / str(attempt)), slowness)
  assert not suspects, f"mark as slow, or make quicker (seconds): {suspects}"


@pytest.mark.slow
@pytest.mark.alone
def test_no_process_of_pytest_nor_one_that_it_starts_needs_more_than_four_gib():
  for record in (RECORD, SLOW_RECORD):
    assert record.exists(), "both tiers leave a record: run bash tests/run.sh, then with --slow"
    peaks = {node_id(case): number_of(case, "peak_gib") for case in cases_of(record)}
    assert 0 < max(peaks.values()) < MOST_MEMORY, max(peaks, key=peaks.get)


@pytest.mark.thin(2)
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1])
def test_of_many_cases_every_kth_is_fast_and_lists_are_paired_in_turn(request, first, second):
  assert (request.node.get_closest_marker("slow") is not None) == bool((first + second) % 2)


@pytest.mark.thin(100)
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(("second", "third"), [(0, "a"), (1, "a"), (1, "b")])
def test_each_value_of_several_lists_is_fast_at_least_once(request, first, second, third):
  fast = {(0, 0, "a"), (1, 1, "b"), (2, 0, "a")}
  assert (request.node.get_closest_marker("slow") is None) == ((first, second, third) in fast)


def imports_of(file):
  """Returns the full names of what a file imports, wherever it does."""
  names = []
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def test_no_test_imports_another_nor_a_helper_without_its_package():
  helpers = {file.stem for file in (ROOT / "tests" / "helpers").glob("*.py")}
  for file in (ROOT / "tests").rglob("*.py"):
    for name in imports_of(file):
      parts = name.split(".")
      assert parts[0] not in helpers, f"{file}: {name} must be imported from tests.helpers"
      assert not any(part.startswith("test_") for part in parts), f"{file} imports {name}"


def test_files_of_one_name_in_several_folders_are_all_run():
  # Otherwise pytest would import the second under the first one's name, and refuse it.
  options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
  assert "--import-mode=importlib" in options["addopts"].split()


def test_names_of_tests_have_at_most_80_characters():
  for file in (ROOT / "tests").rglob("test_*.py"):
    functions = [
      node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    assert [f.name for f in functions if f.name.startswith("test_") and len(f.name) > 80] == []
