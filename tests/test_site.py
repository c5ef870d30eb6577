"""The documentation site builds strictly, names every public name, and fetches nothing."""

import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import gating_jax
from gating_jax.training import rundir
from tests.helpers import ROOT
from tests.helpers.browser import BROWSER, look_at

REFERENCE = ROOT / "docs" / "reference"
NAMED = re.compile(r"^::: (gating_jax[\w.]*)$", re.MULTILINE)
# What a browser would fetch from elsewhere when it opens a page.
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def reference_names():
  pages = (page.read_text() for page in sorted(REFERENCE.glob("*.md")))
  return [name for page in pages for name in NAMED.findall(page)]


def test_the_reference_has_every_public_name_once():
  names = reference_names()
  assert len(names) == len(set(names))
  assert {f"gating_jax.{name}" for name in gating_jax.__all__} <= set(names)


@pytest.mark.parametrize("package", ["ops", "layers", "models", "analysis", "inference", "testing"])
def test_the_reference_has_every_public_name_of_a_package(package):
  public = importlib.import_module(f"gating_jax.{package}").__all__
  # A name that the top level has too is described under that.
  described = {name.rpartition(".")[2] for name in reference_names()}
  assert set(public) <= described


def test_every_function_and_class_of_the_reference_has_an_example():
  without = []
  for name in reference_names():
    value = pkgutil.resolve_name(name)
    if (inspect.isroutine(value) or inspect.isclass(value)) and ">>>" not in (value.__doc__ or ""):
      without.append(name)
  assert without == []


def test_every_page_answers_a_question_begins_with_code_and_says_what_to_read_next():
  for page in sorted((ROOT / "docs").rglob("*.md")):
    first, second, *_, last = page.read_text().rstrip().split("\n\n")
    assert first.startswith("# "), page
    assert first.endswith("?"), page
    assert second.startswith("```"), page
    # It runs as it stands, without a folder or file of the reader's own.
    if second.startswith("```bash"):
      assert not re.search(r"(?<!\w)[A-Z]{2,}\b", second), page
    assert last.startswith("Next: "), page


@pytest.mark.parametrize(
  ("name", "function"),
  [
    ("common", "image_config"),
    ("continual_common", "continual_config"),
    ("video_common", "video_config"),
  ],
)
def test_the_table_of_a_config_has_every_field_once(name, function):
  spec = importlib.util.spec_from_file_location("site_fields", ROOT / "docs" / "site_fields.py")
  site_fields = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(site_fields)
  fields = site_fields.ConfigFile(ROOT / "configs" / f"{name}.py").fields()
  # A row without a default describes a whole section.
  paths = [field.path for field in fields if field.default]
  config = getattr(importlib.import_module(f"configs.{name}"), function)()
  assert sorted(paths) == sorted(rundir.flatten(config))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp("site")
  built = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert built.returncode == 0, built.stderr
  return folder


@pytest.mark.slow
def test_the_site_builds_strictly_and_opens_without_a_network(site):
  pages = {page: page.read_text() for page in site.rglob("*.html")}
  for page, text in pages.items():
    # The canonical address of a page is a link that nothing follows.
    assert [tag for tag in FETCHED.findall(text) if "canonical" not in tag] == [], page
  for sheet in site.rglob("*.css"):
    assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text()), sheet
  texts = "".join(pages.values())
  for name in reference_names():
    assert f'id="{name}"' in texts, name


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
  "page",
  [
    "index",
    "gate_your_model",
    "inference",
    "reference/losses",
    "results/continual",
    "training/settings",
  ],
)
def test_no_page_is_wider_than_the_window(site, page, width):
  found = look_at(site / f"{page}.html", width)
  assert (found["scrolls"], found["broken"], found["nameless"]) == (False, [], 0)
