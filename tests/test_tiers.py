"""Rules of this folder: two tiers, short names, helpers in one place."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.helpers import ROOT, environment

RECORD = ROOT / ".cache" / "fast.xml"  # written by `bash tests/run.sh`
CALL_LIMIT = (
  5.0  # s, where the whole tier takes at most WHOLE; in proportion on a slower or busier machine
)
SETUP_LIMIT = 15.0  # s, of a run that many tests share; likewise
WHOLE = 800.0  # s, of all workers together
# For a slow test, to be fast enough when nothing else runs.
ATTEMPTS = 3


def over_limit(record, slowness=1.0):
  """Returns `{node id: seconds}` of the tests of a JUnit record that exceed their limit."""
  found = {}
  for case in ElementTree.parse(record).iter("testcase"):
    properties = {p.get("name"): p.get("value") for p in case.iter("property")}
    setup = float(properties.get("setup_seconds", 0))
    call = float(case.get("time")) - setup
    if call > CALL_LIMIT * slowness or setup > SETUP_LIMIT * slowness:
      file = case.get("classname").replace(".", "/")
      found[f"{file}.py::{case.get('name')}"] = setup + call
  return found


def slowness_of(record):
  """Returns the slowdown of the machine, at least 1.

  1 stands for a machine that runs the whole tier in `WHOLE` seconds.
  """
  return max(
    1.0, sum(float(case.get("time")) for case in ElementTree.parse(record).iter("testcase")) / WHOLE
  )


def run_alone(tests, folder):
  """Returns the JUnit record of these tests, run one by one without a compilation cache."""
  folder.mkdir()
  record = folder / "record.xml"
  subprocess.run(
    [sys.executable, "-m", "pytest", "-p", "no:xdist", f"--junit-xml={record}", *tests],
    cwd=ROOT,
    check=False,
    env=environment(devices=8, JAX_COMPILATION_CACHE_DIR=str(folder / "programs")),
    stdout=subprocess.DEVNULL,
  )
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
  assert slowness_of(record) == 1.0
  record.write_text(f"<testsuites>{case.format('quick', WHOLE / 2, '') * 3}</testsuites>")
  assert slowness_of(record) == 1.5


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


@pytest.mark.thin(2)
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1])
def test_of_many_cases_every_kth_is_fast_and_lists_are_paired_in_turn(request, first, second):
  assert (request.node.get_closest_marker("slow") is not None) == bool((first + second) % 2)


def test_no_test_imports_another():
  for file in (ROOT / "tests").rglob("*.py"):
    imported = re.findall(
      r"^\s*(?:from|import) (tests\.(?!helpers)\S+|test_\S+)", file.read_text(), re.MULTILINE
    )
    assert not imported, f"{file}: what several tests need belongs into tests/helpers"


def test_names_of_tests_have_at_most_80_characters():
  for file in (ROOT / "tests").rglob("test_*.py"):
    assert re.findall(r"^def (test_\w{76,})", file.read_text(), re.MULTILINE) == [], file
