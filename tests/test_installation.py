"""What an installation has: JAX and Flax alone, an extra, a wheel."""

import contextlib
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gating_jax
from gating_jax.extras import EXTRAS, missing_extra, naming_extra, require_extra
from tests.helpers import ROOT, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions(requirements):
  """The names of the distributions that requirements ask for, themselves and by others."""
  found, waiting = set(), [Requirement(text) for text in requirements]
  while waiting:
    requirement = waiting.pop()
    name, marker = canonicalize_name(requirement.name), requirement.marker
    wanted = [{"extra": extra} for extra in requirement.extras or {""}]
    if name in found or (marker and not any(map(marker.evaluate, wanted))):
      continue
    found.add(name)
    # What another system needs is not installed.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      waiting += map(Requirement, importlib.metadata.requires(name) or ())
  return found


@functools.cache
def installed():
  """The distributions of each module that can be imported."""
  return {
    module: {*map(canonicalize_name, owners)}
    for module, owners in importlib.metadata.packages_distributions().items()
  }


def modules_of(names):
  """The modules that distributions install, as they are imported."""
  return {module for module, owners in installed().items() if owners & names}


# Hides what an installation without extras lacks.
HIDE = """
import importlib.machinery, sys

class Core:
  @staticmethod
  def find_spec(name, path=None, target=None):
    if name.partition(".")[0] in {missing}:
      return None
    return importlib.machinery.PathFinder.find_spec(name, path, target)

own = importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter
sys.meta_path[:] = [*own, Core]
"""


def run_core(program):
  """Returns what a program prints where JAX, Flax and what these require are all there is."""
  core = modules_of(distributions(PROJECT["dependencies"]))
  missing = sorted(set(installed()) - core - {"gating_jax"})
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", HIDE.format(missing=missing) + program],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT / "docs" / "examples",
    env=environment(devices=1),
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


MISSING = """
import gating_jax.__main__
def need(use):
  try:
    use()
  except ModuleNotFoundError as error:
    print(error)

need(lambda: gating_jax.load_run("run"))
need(lambda: gating_jax.find_concepts([[1.0]], 1, seed=0))
need(lambda: gating_jax.load_exported("net"))
need(lambda: importlib.import_module("gating_jax.continual"))
sys.stderr = sys.stdout
try:
  gating_jax.__main__.main()
except SystemExit as end:
  print(end.code)
"""


def fifteen_lines():
  """Returns the README's first program in Python."""
  return (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_jax_and_flax_are_enough_for_the_readme_and_what_else_is_needed_is_named():
  said = run_core(f"from gating_jax import *\n{fifteen_lines()}\nprint(logits.shape)\n{MISSING}")
  get = "is not installed; get it by: pip install"
  before, after, shape, *missing = said.splitlines()
  assert float(after) < 0.1 * float(before)
  assert [shape, *missing] == [
    "(256, 64)",
    f'ml_collections {get} "gating-jax[train]"',
    f'sklearn {get} "gating-jax[train]"',
    f'safetensors {get} "gating-jax[export]"',
    f'PIL {get} "gating-jax[train]"',
    f'error: ml_collections {get} "gating-jax[train]"',
    "2",
  ]


@pytest.mark.slow
def test_jax_and_flax_are_enough_for_the_plain_example():
  said = run_core("import runpy; runpy.run_path('plain_jax.py', run_name='__main__')")
  assert said.startswith("accuracy 9")


def test_every_library_of_an_extra_is_named_and_pinned():
  pinned = {
    canonicalize_name(line.partition("==")[0])
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and line[0] != "#"
  }
  core = modules_of(distributions(PROJECT["dependencies"]))
  everything = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
  names = distributions([*PROJECT["dependencies"], *everything]) - {"gating-jax"}
  assert names <= pinned
  for extra, libraries in EXTRAS.items():
    listed = {Requirement(text) for text in PROJECT["optional-dependencies"][extra]}
    names = {canonicalize_name(requirement.name) for requirement in listed} - {"gating-jax"}
    assert set(libraries) <= modules_of(names)
    # Each library that is asked for can be missed.
    for name in names:
      assert modules_of({name}).intersection({*libraries, *core})


def test_an_error_of_another_kind_stays():
  assert missing_extra(ValueError("no extra")) is None
  assert missing_extra(ModuleNotFoundError("unheard of", name="unheard_of.part")) is None
  with pytest.raises(ImportError, match="^unheard of$"), naming_extra():
    raise ImportError("unheard of")
  # As JAX does where it lacks a library.
  error = ImportError("Please install 'flatbuffers'")
  error.__cause__ = ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers")
  with (
    pytest.raises(ModuleNotFoundError, match=r"flatbuffers .*gating-jax\[export\]"),
    naming_extra(),
  ):
    raise error
  for extra in EXTRAS:
    require_extra(extra)


def test_an_extra_without_one_of_its_libraries_is_named(monkeypatch):
  monkeypatch.setitem(EXTRAS, "export", ("onnx", "no_such_library"))
  with pytest.raises(ModuleNotFoundError, match=r"^no_such_library is .*gating-jax\[export\]"):
    require_extra("export")


def test_the_version_is_that_of_the_package():
  assert "version" in PROJECT["dynamic"]
  dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
  assert dynamic == {"version": {"attr": "gating_jax.__version__"}}
  assert re.fullmatch(r"\d+\.\d+\.\d+", gating_jax.__version__)
  # No other file of the package has a version of its own.
  assert "version" not in PROJECT


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
  """Returns the folder of the wheel and the source archive."""
  # A copy, since the build leaves folders beside the sources.
  folder = tmp_path_factory.mktemp("sources")
  for part in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / part, folder)
  for part in ("gating_jax", "configs"):
    shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
  run_outside([sys.executable, "-m", "build", "--outdir", "dist", "."], folder)
  return folder / "dist"


def run_outside(command, folder):
  """Returns what a command prints in a folder, from which this tree cannot be imported."""
  variables = environment(devices=1)
  del variables["PYTHONPATH"]
  done = subprocess.run(
    [*map(str, command)], cwd=folder, env=variables, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def install(folder, *requirements):
  """Installs requirements, at the pinned versions, into an environment that is made if missing.

  Returns the folder of its programs.
  """
  if not folder.exists():
    run_outside([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
  python = folder / "bin" / "python"
  pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
  run_outside([*pip, "-c", ROOT / "requirements.txt", *requirements], folder)
  return folder / "bin"


@pytest.mark.slow
def test_a_built_package_holds_all_its_files(dist):
  (wheel,) = dist.glob("*.whl")
  (source,) = dist.glob("*.tar.gz")
  assert f"-{gating_jax.__version__}-" in wheel.name
  with zipfile.ZipFile(wheel) as archive:
    inside = archive.namelist()
  with tarfile.open(source) as archive:
    unpacked = archive.getnames()
  names = ["py.typed", "native/gated_chain.cc", "native/isa.inc", "reports/templates/page.html"]
  names += [f"configs/{file.name}" for file in (ROOT / "configs").glob("*.py")]
  for name in names:
    assert f"gating_jax/{name}" in inside
    home = "" if name.startswith("configs") else "gating_jax/"
    assert f"gating_jax-{gating_jax.__version__}/{home}{name}" in unpacked


@pytest.mark.slow
def test_a_built_package_may_be_uploaded(dist, tmp_path):
  twine = install(tmp_path / "twine", "twine") / "twine"
  said = run_outside([twine, "--no-color", "check", "--strict", *dist.iterdir()], tmp_path)
  assert said.count("PASSED") == 2


@pytest.mark.slow
def test_a_wheel_serves_with_jax_and_flax_alone_and_trains_with_its_extra(dist, tmp_path):
  (wheel,) = dist.glob("*.whl")
  programs = install(tmp_path / "venv", wheel)
  place = run_outside([programs / "python", "-c", "print(__import__('gating_jax'))"], tmp_path)
  assert str(tmp_path / "venv") in place
  (tmp_path / "fifteen.py").write_text(fifteen_lines())
  before, after = run_outside([programs / "python", "fifteen.py"], tmp_path).split()
  assert float(after) < 0.1 * float(before)
  example = ROOT / "docs" / "examples" / "plain_jax.py"
  assert run_outside([programs / "python", example], tmp_path).startswith("accuracy 9")
  assert not [*programs.parent.rglob("site-packages/PIL")]
  assert install(tmp_path / "venv", f"{wheel}[train]") == programs
  small = "--config=digits:epochs=1,model=simple_cnn,width=0.25"
  said = run_outside([programs / "gating-jax", small, "--smoke"], tmp_path)
  assert said.startswith("new run directory: runs/digits-1;")
  assert (tmp_path / "runs" / "digits-1" / "report.html").exists()
