"""Names of the public API: those of former versions still import."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import gating_jax
from gating_jax import analysis, ops, testing
from gating_jax.ops import relaxations

# The public API before the first renaming.
FORMER = """
  Analysis BasicBlock Bottleneck ChannelGate GateHead GateRecord GateSettings ModelCounts Prior
  ResNet SegmentGate SegmentGateSettings SegmentNet Skipping Switched VGG VideoCounts analyse
  apply_gates batch_shaping_loss beta binary_concrete bucket_sizes capacity_for cdf_matching_loss
  clipped_sigmoid compile_conditional compile_exits count count_video disagreement empirical
  empirical_cdf executed_macs expected_macs export_model find_concepts fold from_cdf gated_macs
  generalised_batch_shaping_loss hard_concrete hard_concrete_mean hard_concrete_open_prob
  heavy_net l0_loss light_net mac_budget_loss mac_loss noise_floor normal open_indices put_back
  quantise relaxed_bernoulli resnet slim sort_with_vjp static_units straight_through_gate
  symmetric_beta target_rate_loss threshold_gate uniform vgg
"""
# What stands for itself in `gating_jax`, next to the names.
SUBMODULES = "analysis inference layers models ops testing"


@pytest.mark.parametrize("name", FORMER.split())
def test_former_names_still_import(name):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    assert getattr(gating_jax, name) is not None


@pytest.mark.parametrize(("old", "new"), gating_jax.RENAMED.items())
def test_a_renamed_name_warns_and_is_the_new_one(old, new):
  assert old not in gating_jax.__all__
  assert new in gating_jax.__all__
  with pytest.warns(DeprecationWarning, match=f"gating_jax.{old} is now called gating_jax.{new}"):
    assert getattr(gating_jax, old) is getattr(gating_jax, new)


@pytest.mark.parametrize(
  ("former", "today", "names"),
  [
    ("checks", "extras", "EXTRAS missing_extra naming_extra require_extra"),
    ("checks", "names", "former_keyword former_positional"),
    (
      "inference.folded",
      "inference.costs",
      "Cost macs macs_by_part exit_macs stage_macs glance_macs head_macs opened_of open_channels "
      "part_macs branch_macs shortcut_macs",
    ),
    ("inference.strategies", "inference.costs", "exit_dispatch_macs"),
    ("models.columns", "models.summary", "ColumnMacs column_macs"),
    ("analysis", "models", "UnitImportance select_units unit_importance with_prior"),
    (
      "reports.timings",
      "reports.measured_times",
      "Times parse_times time_number times_section",
    ),
  ],
)
def test_names_that_moved_are_also_found_in_their_former_module(former, today, names):
  places = [importlib.import_module(f"gating_jax.{module}") for module in (former, today)]
  for name in names.split():
    assert getattr(places[0], name) is getattr(places[1], name)
    assert name in dir(places[0])


def test_former_keywords_and_attributes_warn_and_work():
  counts = gating_jax.model_summary(gating_jax.resnet("resnet8", 10, gating="channel"), (8, 8, 3))
  with pytest.warns(DeprecationWarning, match="fixed is now called always_macs"):
    assert counts.fixed == counts.always_macs
  gates = np.ones((2, 3), np.float32)
  record = gating_jax.GateRecord(logits=gates, probs=gates, gates=gates, macs_per_unit=5)
  with pytest.warns(DeprecationWarning, match="fixed_macs is now called never_gated_macs"):
    old = gating_jax.mac_budget_loss([record], fixed_macs=5, budget=0.5)
  assert old == gating_jax.mac_budget_loss([record], never_gated_macs=5, budget=0.5)
  with pytest.raises(TypeError, match="never_gated_macs must be given once; got it as fixed_macs"):
    gating_jax.mac_budget_loss([record], fixed_macs=5, never_gated_macs=5, budget=0.5)


GATES = np.array([[0.5, -1.0], [0.0, 2.0]], np.float32)
RESNET = gating_jax.resnet("resnet8", 10, width=0.25, inner_width=4, gating="channel")
COUNTS = gating_jax.model_summary(RESNET, (8, 8, 3))
VIDEO = gating_jax.VideoCounts(segments=2, light=COUNTS, heavy=COUNTS, selector=3, classifier=5)
VALID = np.ones((2, 2), bool)
CONTROLS = {"batch_stats": {"gate": {"threshold": np.zeros((), np.float32)}}}


@pytest.mark.parametrize(
  ("function", "arrays", "former", "settings"),
  [
    (gating_jax.straight_through_gate, (jax.random.key(0), GATES), {"temperature": 0.5}, {}),
    (gating_jax.binary_concrete, (jax.random.key(0), GATES), {"temperature": 0.5}, {}),
    (gating_jax.hard_concrete, (jax.random.key(0), GATES), {"temperature": 0.5}, {}),
    (gating_jax.hard_concrete_open_prob, (GATES,), {"temperature": 0.5}, {}),
    (gating_jax.ops.straight_through, (GATES,), {"temperature": 0.5}, {}),
    (relaxations.hard_concrete_location, (GATES,), {"temperature": 0.5}, {}),
    (gating_jax.open_threshold, (GATES,), {"share": 0.5}, {}),
    (gating_jax.ops.stay_logits, (GATES[None],), {"threshold": 0.5}, {}),
    (
      gating_jax.ops.threshold_for_budget,
      (GATES, [10, 20]),
      {"always_macs": 10},
      dict(threshold=0.5, share=0.8),
    ),
    (gating_jax.models.solve_share, (RESNET, (8, 8, 3)), {"macs": 60_000}, {}),
    (gating_jax.empirical_cdf, (GATES,), {"axis": 1}, {}),
    (gating_jax.sort_with_vjp, (GATES,), {"axis": 1}, {}),
    (gating_jax.open_indices, (GATES[1],), {"capacity": 2}, {}),
    (gating_jax.scatter_back, (GATES, np.array([2, 0]), VALID[0]), {"size": 3}, {}),
    (gating_jax.capacity_for, (3,), {"sizes": (2, 4)}, {}),
    (gating_jax.bucket_sizes, (8,), {"buckets": 2}, {"multiple": 3}),
    (ops.top_k, (GATES, VALID), {"k": 1}, {}),
    (ops.uniform_k, (VALID,), {"k": 1}, {}),
    (ops.random_k, (jax.random.key(0), VALID), {"k": 1}, {}),
    (ops.first_k, (VALID,), {"k": 1}, {}),
    (ops.budget_to_k, (VALID,), {"share": 0.5}, {}),
    (gating_jax.shift_thresholds, (CONTROLS,), {"shift": 0.5}, {}),
    (gating_jax.layers.deterministic_record, (np.abs(GATES),), {"macs_per_unit": 7}, {}),
    (gating_jax.find_concepts, (GATES,), {"k": 1}, {"seed": 0}),
    (COUNTS.of_results, ({"macs": GATES[0]},), {"count": 2}, {}),
    (VIDEO.computed, (VALID,), {"taken": 1.0}, {}),
    (analysis.open_probs, (GATES,), {"noise_scale": 0.5}, {}),
    (analysis.tally, (GATES, GATES, np.array([0, 1])), {"classes": 2}, {}),
  ],
)
def test_what_is_no_array_warns_by_position_and_works(function, arrays, former, settings):
  ((name, value),) = former.items()
  with pytest.warns(DeprecationWarning, match=f"takes {name}=... by keyword$") as warned:
    found = function(*arrays, value, **settings)
  assert warned[0].filename == __file__
  # Some return tuples of unlike arrays, or dataclasses.
  assert repr(found) == repr(function(*arrays, **former, **settings))


def test_the_axis_of_devices_warns_by_position_and_works():
  with pytest.warns(DeprecationWarning, match="takes axis_name=... by keyword$"):
    differentiate = gating_jax.value_and_grad_over_devices(lambda w: w * w, None)
  assert differentiate(3.0) == (9.0, 6.0)


def test_the_package_loads_nothing_heavy_that_jax_and_flax_do_not_load():
  program = (
    "import sys, jax, flax.linen; before = set(sys.modules); from gating_jax import *; "
    "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
    "print(*new - set(sys.stdlib_module_names))"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
  )
  assert set(done.stdout.split()) == {"gating_jax", "jax"}


@pytest.mark.parametrize("module", ["gating_jax", "gating_jax.cli", "gating_jax.config_files"])
def test_neither_the_package_nor_the_command_loads_jax_before_it_is_used(module):
  program = f"import sys, {module}; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["False"]


def test_the_package_loads_no_library_of_an_extra():
  libraries = "optax orbax grain PIL matplotlib tensorflow ml_collections"
  program = (
    f"import sys, gating_jax; print(*[n for n in {libraries!r}.split() if n in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == []


# The README's first line is the usual one; the package alone loads JAX when a name is used.
IMPORTS = (
  "import gating_jax",
  "from gating_jax import batch_shaping_loss, beta, straight_through_gate",
)


@pytest.mark.slow
@pytest.mark.alone
def test_importing_takes_at_most_a_fifth_longer_than_importing_jax_and_flax():
  seconds = {line: [] for line in ("import jax, flax.linen", *IMPORTS)}
  # In turns, so that a busy machine slows all of them; the first round loads the files.
  for attempt in range(8):
    for line, found in seconds.items():
      program = f"import time; t = time.perf_counter()\n{line}\nprint(time.perf_counter() - t)"
      done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
      )
      if attempt:
        found.append(float(done.stdout))
  both, *ours = map(statistics.median, seconds.values())
  assert max(ours) <= 1.2 * both, seconds


@pytest.mark.parametrize("name", ["", ".analysis", ".inference", ".layers", ".models", ".ops"])
def test_type_checkers_dir_and_python_find_the_same_names(name):
  package = importlib.import_module(f"gating_jax{name}")
  source = ast.parse(Path(package.__file__).read_text())
  imported, modules = {}, []
  for node in ast.walk(source):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("gating_jax."):
      imported |= {alias.name: node.module for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module == "gating_jax":
      modules += [alias.asname for alias in node.names]
  assert imported.pop("lazy_names") == "gating_jax.names"
  assert package.__all__ == sorted(imported)
  assert modules == ([] if name else SUBMODULES.split())
  assert set(package.__all__) <= set(dir(package))
  submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
  # Python would set the module as the attribute.
  assert not submodules.intersection(package.__all__)
  for public, home in imported.items():
    assert getattr(package, public) is getattr(importlib.import_module(home), public)


def public_values():
  """Yields each public function and class once, with its name."""
  seen = set()
  for name in ("", ".analysis", ".inference", ".layers", ".models", ".ops", ".testing"):
    package = importlib.import_module(f"gating_jax{name}")
    for public in package.__all__:
      value = getattr(package, public)
      if public not in seen and callable(value):
        seen.add(public)
        yield public, value


# A shape stands for an array.
SHAPES = "shape input_shape output_shape shapes"
# Parameters that are no arrays and still positional, of every function or of one, with reasons.
POSITIONAL = {
  "train": "Flax modules are called as `module(x, train)`, and blocks call modules of others",
  "a b mean std temperature": "a distribution is written as Beta(a, b); numbers or arrays",
  "classes": "as in `resnet(name, classes)` of torchvision and timm; no array precedes it",
  "load_pretrained.name": "the network that a file should hold, as `resnet('resnet50')`",
  "macs": "the array `[X]` of `threshold_for_budget`",
}


def is_setting(parameter):
  """Whether a parameter is a number, a text or the like, by its name and annotation."""
  if parameter.name in SHAPES.split():
    return False
  # What a function or a mapping holds is no parameter.
  kinds = re.sub(r"(Callable|Mapping|dict)\[.*\]", "", str(parameter.annotation))
  named = re.search(r"\b(int|float|bool|str|bytes|Hashable)\b", kinds)
  return named is not None and "PathLike" not in kinds


def public_signatures():
  """Yields each public function and method with its name and its positional parameters."""
  for name, value in public_values():
    members = [(name, value)]
    if inspect.isclass(value):
      own = [(method, found) for method, found in vars(value).items() if method[0] != "_"]
      own += [("__call__", value.__call__)] if "__call__" in vars(value) else []
      members = [(f"{name}.{method}", getattr(value, method)) for method, _ in own]
    for label, function in members:
      if inspect.isroutine(function):
        parameters = list(inspect.signature(function).parameters.values())
        parameters = [p for p in parameters if p.name != "self"]
        yield label, [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_arrays_are_positional_and_all_else_is_given_by_keyword():
  allowed = set(" ".join(POSITIONAL).split())
  functions = dict(public_signatures())
  wrong = []
  for label, positional in functions.items():
    # The first argument is what the function is about.
    for parameter in positional[1:]:
      names = {parameter.name, f"{label}.{parameter.name}"}
      if allowed.isdisjoint(names) and is_setting(parameter):
        wrong.append(f"{label}: {parameter}")
  assert not wrong
  assert {"top_k", "ResNet.__call__", "ModelCounts.of_results"} <= functions.keys()


def test_every_public_name_has_an_example():
  assert [name for name, value in public_values() if ">>>" not in (value.__doc__ or "")] == []


def public_functions():
  """Yields each public function with its name, past decorators and caches."""
  for name, value in public_values():
    function = inspect.unwrap(value)
    if inspect.isfunction(function):
      yield name, function


@functools.cache
def definitions(module):
  """Returns the functions and methods of a module by name, parsed; of overloads the last."""
  tree = ast.parse(inspect.getsource(importlib.import_module(module)))
  found = {}
  for outer in tree.body:
    for node in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
      if isinstance(node, ast.FunctionDef):
        found[f"{outer.name}.{node.name}" if node is not outer else node.name] = node
  return found


def parsed(function):
  """Returns a function as parsed; what another function makes is empty."""
  return definitions(function.__module__).get(function.__qualname__, ast.Module([], []))


def raises(function):
  """Returns whether the body of a function raises a ValueError or a TypeError itself."""
  raised = set()
  for each in ast.walk(parsed(function)):
    if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call):
      raised.add(ast.unparse(each.exc.func))
  return not raised.isdisjoint({"ValueError", "TypeError"})


def called(function):
  """Yields the package's functions that a function calls by a name of its module."""
  for node in ast.walk(parsed(function)):
    if not isinstance(node, ast.Call):
      continue
    found = function.__globals__
    try:
      for part in ast.unparse(node.func).split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    # A local name, or a method of what is computed.
    except (KeyError, AttributeError):
      continue
    found = inspect.unwrap(found) if callable(found) else None
    if inspect.isfunction(found) and found.__module__.startswith("gating_jax"):
      yield found


def test_every_public_function_says_what_it_takes_returns_and_raises():
  lacking = []
  for name, function in public_functions():
    said = function.__doc__
    arguments = list(inspect.signature(function).parameters)
    for argument in arguments:
      if not re.search(rf"\b{argument}\b", said.partition("Args:")[2]):
        lacking.append(f"{name} explains {argument} below Args")
    if not said.startswith("Returns ") and "\n  Returns:\n" not in said:
      lacking.append(f"{name} has Returns")
    if "\n  Raises:\n" not in said and any(map(raises, [function, *called(function)])):
      lacking.append(f"{name} has Raises")
  assert not lacking, "\n".join(lacking)


def test_every_public_class_says_what_it_raises_where_it_is_made_or_called():
  lacking = []
  for name, value in public_values():
    for method in ("__init__", "__post_init__", "setup", "__call__"):
      function = inspect.unwrap(getattr(value, method, None))
      # Not those of Flax, of dataclasses and of functions.
      if not inspect.isfunction(function) or not function.__module__.startswith("gating_jax"):
        continue
      said = re.search(r"^ +Raises:$", f"{value.__doc__}{function.__doc__}", re.MULTILINE)
      if said is None and any(map(raises, [function, *called(function)])):
        lacking.append(f"{name}.{method} has Raises")
  assert not lacking, "\n".join(lacking)


def test_checks_that_a_function_calls_are_found():
  assert raises(gating_jax.apply_gates)
  assert not raises(gating_jax.vgg)
  assert any(map(raises, called(gating_jax.vgg)))
  assert not any(map(raises, [gating_jax.expected_macs]))
  assert raises(inspect.unwrap(gating_jax.VGG.__call__))
  assert any(map(raises, called(gating_jax.GateSettings.__post_init__)))


def test_a_package_imports_a_name_when_it_is_used():
  program = (
    "import sys; from gating_jax import ops; print('jax' in sys.modules); "
    "ops.beta(0.6, 0.4); print('jax' in sys.modules, 'gating_jax.ops.penalties' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["False", "True", "False"]


def test_the_package_imports_its_packages_when_they_are_used():
  program = (
    f"import sys, gating_jax; names = {SUBMODULES!r}.split(); loaded = sys.modules.keys(); "
    "print(set(names) <= set(dir(gating_jax)), {'gating_jax.' + n for n in names} & loaded); "
    "gating_jax.ops.beta; print('gating_jax.layers' in loaded); "
    "print(all(getattr(gating_jax, n) is sys.modules['gating_jax.' + n] for n in names))"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["True", "set()", "False", "True"]


def test_each_package_exports_what_the_top_level_takes_from_it():
  for name in gating_jax.__all__:
    value = getattr(gating_jax, name)
    package = value.__module__.split(".")[1]
    if package in SUBMODULES.split():
      assert getattr(getattr(gating_jax, package), name) is value


def test_the_checks_of_losses_export_their_public_names():
  defined = [name for name in vars(testing) if name[0] != "_" and is_of(testing, name)]
  assert testing.__all__ == sorted(defined)


def is_of(module, name):
  """Whether a module defines a name itself."""
  return getattr(vars(module)[name], "__module__", None) == module.__name__


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'put_front'"):
    gating_jax.put_front  # noqa: B018
