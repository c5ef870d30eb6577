"""What data sets, tables and command lines say is never run, and never chooses where files go."""

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_cli

from gating_jax.data import sources
from gating_jax.experiments import classification
from gating_jax.models import resnet

ROOT = Path(__file__).parent.parent
FOLDERS = ("gating_jax", "configs", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "tarfile", "zipfile"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
PATHS = ("../../outside", "/tmp/outside_gating_jax", "a/b", "..", "a\\..\\b")


def findings(text):
  """What of a program can run data, or unpack it to where it says."""
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
      found += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
    if not isinstance(node, ast.Call):
      continue
    called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in UNSAFE_CALLS:
      found.append(called)
    if called.endswith(("np.load", "numpy.load", "jnp.load")) and keywords.get("allow_pickle") != "False":
      found.append(called)
    if keywords.get("allow_pickle") == "True" or keywords.get("shell", "False") != "False" or called == "os.system":
      found.append(f"{called}({keywords})")
  return found


def test_no_program_can_run_what_it_reads():
  assert len(SOURCES) > 100
  assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := findings(path.read_text()))} == {}


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import yaml.loader", "eval(x)", "exec(x)", "np.load(f)",
    "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system(x)", "import tarfile"])
def test_the_audit_sees(text):
  assert findings(text)


def test_the_audit_lets_pass():
  assert not findings("import json\nnp.load(f, allow_pickle=False)\nmodel.compile(x)\nre.compile(x)\n")


@pytest.mark.slow
@pytest.mark.parametrize("override", [
    'optim.learning_rate=__import__("pathlib").Path("outside").touch()',
    'optim.drops=(__import__("pathlib").Path("outside").touch(),)',
    'data.mean=__import__("pathlib").Path("outside").touch()'])
def test_the_text_of_an_override_is_not_run(tmp_path, override):
  done = subprocess.run(
      [sys.executable, "-m", "gating_jax.cli", f"--config={ROOT / 'configs' / 'digits_resnet20.py'}",
       f"--config.{override}", f"--workdir={tmp_path / 'run'}"],
      cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      timeout=120)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PATHS)
def test_the_name_of_a_set_does_not_leave_the_folder_of_sets(tmp_path, name):
  folder = tmp_path / "sets"
  folder.mkdir()
  with pytest.raises((ValueError, sources.DatasetNotPreparedError)):
    sources.load(name, "train", str(folder))
  assert [path.name for path in tmp_path.rglob("*")] == ["sets"]


@pytest.mark.slow
def test_the_names_of_classes_do_not_choose_where_files_go(monkeypatch, tmp_path):
  names, load = (*PATHS, *"fghij"), sources.load
  monkeypatch.setattr(sources, "load", lambda *args: dataclasses.replace(load(*args), class_names=names))
  monkeypatch.setitem(resnet.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.chdir(tmp_path)
  config = importlib.import_module("configs.digits_resnet20").get_config()
  config.update_from_flattened_dict({"model.name": "tiny", "optim.epochs": 1})
  classification.run(config, tmp_path / "a" / "run", "train")
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
  assert {path.name for path in (tmp_path / "a" / "run").iterdir()} == {
      ".lock", "checkpoints", "config.json", "gates.csv", "gates.png", "histograms.jsonl", "metrics.jsonl",
      "report.html", "result.json", "tensorboard"}
  assert not Path("/tmp/outside_gating_jax").exists()
