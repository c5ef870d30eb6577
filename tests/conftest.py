"""Shared set-up: eight virtual devices, quick compilation with a cache, optional float64."""

import ctypes
import gc
import itertools
import os
import resource
import signal
import sys
import time

import pytest

from tests.helpers import QUICK, ROOT

os.environ.update(QUICK | os.environ)

import jax  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.helpers.lowering import share_contexts  # noqa: E402

# The same examples in every run, so that a failure is caused by the change.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("project", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))

share_contexts()

MOST_MEMORY_MAPS = 20_000  # Linux grants a process 65,530; one test has needed 15,000
MOST_MEMORY = 3 << 30  # bytes
_C_LIBRARY = ctypes.CDLL(None)
LEAST_SECONDS = 0.2  # of a test that may have compiled much


# Files whose tests take longest, the longest first: a worker that began one of them last would
# still run it when the others have nothing left.
LONGEST = (
  "continual/test_run.py",
  "test_launch.py",
  "video/test_run.py",
  "training/test_smoke.py",
  "test_docs.py",
  "test_faults.py",
  "test_modes.py",
  "images/test_classification.py",
  "test_config_steps.py",
  "test_cli.py",
  "training/test_closed_gates.py",
  "images/test_baselines.py",
  "reports/test_browser.py",
  "continual/methods/test_task_gates.py",
  "test_accelerator.py",
  "test_examples.py",
  "images/test_loaders_agree.py",
  "data/test_video_fuzz.py",
  "images/test_segmentation.py",
)


def pytest_collection_modifyitems(items):
  """Marks slow tests, and puts the longest files first.

  Slow are tests on real data, and the cases of a test marked `thin` that the fast tier can do
  without.
  """
  fast = {}
  for item in items:
    if item.get_closest_marker("real_data"):
      item.add_marker("slow")
    if item.get_closest_marker("thin"):
      # Of all cases that there are, whichever of them are run.
      test = item.nodeid.partition("[")[0]
      if test not in fast:
        fast[test] = fast_cases(lists_of(item), item.get_closest_marker("thin").args[0])
      if case_of(item) not in fast[test]:
        item.add_marker("slow")
  items.sort(key=lambda item: _rank(item.path))


def lists_of(item):
  """Returns the lists of a test's cases, as `parametrize` has them, the last one first."""
  marks = reversed(list(item.iter_markers("parametrize")))
  return [(mark.args[0], list(mark.args[1])) for mark in marks]


def case_of(item):
  """Returns a case's place in each of the lists."""
  # Among the cases of all lists together, of which the first list changes fastest.
  number = next(iter(item.callspec.indices.values()))
  places = []
  for _, values in lists_of(item):
    number, place = divmod(number, len(values))
    places.append(place)
  return tuple(places)


def fast_cases(lists, step):
  """Returns those cases of a test marked `thin(step)` that are of the fast tier.

  They are every k-th case: those whose places have a sum that `step` divides. Of a test with
  several lists there are also as many more as it takes until each argument has had each of its
  values.

  Args:
    lists: the names and the values of each.
  """
  cases = {}
  for places in itertools.product(*[range(len(values)) for _, values in lists]):
    chosen = [(names, values[place]) for (names, values), place in zip(lists, places, strict=True)]
    marks = [mark.name for _, value in chosen for mark in getattr(value, "marks", ())]
    if "slow" not in marks:
      cases[places] = set().union(*[arguments(names, value) for names, value in chosen])
  kept = {places for places in cases if sum(places) % step == 0}
  if sum(len(values) > 1 for _, values in lists) < 2:
    return kept
  missing = set().union(*cases.values()).difference(*[cases[places] for places in kept])
  while missing:
    best = max(cases, key=lambda places: len(cases[places] & missing))
    kept.add(best)
    missing -= cases[best]
  return kept


def arguments(names, value):
  """Returns the names of arguments, each with its value as text."""
  if isinstance(names, str):
    names = [name.strip() for name in names.split(",")]
  # As `pytest.param` makes them.
  if hasattr(value, "marks"):
    values = value.values
  elif len(names) > 1:
    values = value
  else:
    values = (value,)
  return {(name, repr(value)) for name, value in zip(names, values, strict=True)}


def _rank(path):
  """Returns the place of a file among the longest; that of all others is behind them."""
  for rank, name in enumerate(LONGEST):
    if path == ROOT / "tests" / name:
      return rank
  return len(LONGEST)


def pytest_collection_finish():
  """Lets the garbage collector look at less, and less often: it took a tenth of the time.

  What was imported is left out. JAX makes many objects, of which few are garbage.
  """
  gc.freeze()
  gc.set_threshold(20_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Records the seconds of the set-up separately: a shared run's first test waits for it.

  After the test it records the most memory that this process has needed so far.
  """
  if call.when == "setup":
    item.user_properties.append(("setup_seconds", call.duration))
  if call.when == "call":
    item.user_properties.append(("peak_gib", peak_memory() / 2**30))
  return (yield)


def peak_memory():
  """Returns the most bytes that this process has held, or an ended one that it has started."""
  unit = 1 if sys.platform == "darwin" else 1024
  peaks = []
  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    peaks.append(resource.getrusage(who).ru_maxrss)
  return max(peaks) * unit


def memory():
  """Returns this process's memory in bytes and its number of memory maps; 0 where unknown."""
  try:
    with open("/proc/self/statm") as sizes, open("/proc/self/maps", "rb") as maps:
      return int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in maps)
  except FileNotFoundError:
    return 0, 0


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
  """Drops compiled programs: each holds memory maps, which run out after some thousands."""
  began = time.monotonic()
  yield
  if time.monotonic() - began < LEAST_SECONDS:
    return
  size, maps = memory()
  if size > MOST_MEMORY or maps > MOST_MEMORY_MAPS:
    jax.clear_caches()
    gc.collect()  # programs in reference cycles
    if hasattr(_C_LIBRARY, "malloc_trim"):  # glibc would keep the memory
      _C_LIBRARY.malloc_trim(0)


@pytest.fixture
def ctrl_c():
  """Lets Ctrl-C act in the test and the processes it starts; pytest's workers ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture
def x64():
  """Enables float64 within the test."""
  with jax.enable_x64(True):
    yield
