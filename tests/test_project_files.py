"""The files that people and tools look for at the top parse, and agree with the package."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import gating_jax
from tests.helpers import ROOT

PAPERS = ("1907.06627", "2004.00070", "2004.01808")


def read_yaml(name):
  return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_names_the_version_the_license_and_the_papers():
  citation = read_yaml("CITATION.cff")
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert citation["cff-version"] == "1.2.0"
  assert {"message", "title", "authors"} <= citation.keys()
  assert str(citation["version"]) == gating_jax.__version__
  assert citation["license"] == project["license"]
  readme = (ROOT / "README.md").read_text()
  for paper, number in zip(citation["references"], PAPERS, strict=True):
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == f"https://arxiv.org/abs/{number}"
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
    assert paper["url"] in readme


def test_the_changelog_has_the_version_and_every_name_that_changed():
  changelog = (ROOT / "CHANGELOG.md").read_text()
  versions = re.findall(r"^## \[(.*?)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
  assert versions[0] == gating_jax.__version__
  kinds = re.findall(r"^### (.*)$", changelog, re.MULTILINE)
  assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
  for old, new in gating_jax.RENAMED.items():
    assert re.search(rf"`{old}`\s+is\s+`{new}`", changelog)


def test_the_hooks_are_the_checks_of_the_tests():
  (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
  assert repository["repo"] == "local"
  run = (ROOT / "tests" / "run.sh").read_text()
  for hook in repository["hooks"]:
    assert {"id", "name", "entry", "language"} <= hook.keys()
    # The commands are those of .venv, whose Python runs the tests.
    assert shutil.which(hook["entry"].split()[0], path=str(Path(sys.executable).parent))
    assert " ".join(hook["entry"].split()[:2]).removesuffix(" --no-logo") in run


def test_the_workflow_runs_what_a_change_must_pass():
  workflow = read_yaml(".github/workflows/ci.yml")
  (job,) = workflow["jobs"].values()
  commands = [step["run"] for step in job["steps"] if "run" in step]
  assert commands == ["bash .ci/run"]
  checkout, python = [step["with"] for step in job["steps"] if "with" in step]
  # A shallow clone would not have the commits of stored figures.
  assert checkout == {"fetch-depth": 0}
  pins = (ROOT / "requirements.txt").read_text()
  assert f"Python {python['python-version']}" in pins


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_a_page_names_exist(name):
  text = (ROOT / name).read_text()
  for path in re.findall(r"`((?:docs|tests|launch)/[\w./]+)`", text):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("docs/results.md", 150)])
def test_what_is_read_first_stays_short(name, most):
  assert len((ROOT / name).read_text().splitlines()) <= most
