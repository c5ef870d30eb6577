"""Building of the native library: once, whole, by several processes at once, or not at all."""

import os
import stat
import subprocess
import sys

import pytest

from gating_jax.native import build
from tests.helpers import ROOT

FAKE = """#!/bin/sh
[ "$1" = --version ] && { echo fake; exit; }
for last; do :; done
sleep 0.3
echo $$ > "$last"
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.delenv(build.SWITCH, raising=False)
  return tmp_path / "cache"


@pytest.fixture
def compiler(monkeypatch, tmp_path):
  """Puts a script in a compiler's place, which writes its process's number."""
  script = tmp_path / "cxx"
  script.write_text(FAKE)
  script.chmod(script.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("CXX", str(script))
  return script


def test_switched_off_it_is_neither_built_nor_loaded(cache, monkeypatch):
  monkeypatch.setenv(build.SWITCH, "0")
  with pytest.raises(build.NotBuilt, match="switched off by GATING_JAX_NATIVE=0"):
    build.load()
  assert not cache.exists()


def test_without_a_compiler_it_says_what_to_install(cache, monkeypatch):
  monkeypatch.setenv("CXX", "no-such-compiler")
  with pytest.raises(
    build.NotBuilt, match=r"no C\+\+ compiler found \(no-such-compiler\); install one"
  ):
    build.load()
  monkeypatch.delenv("CXX")
  monkeypatch.setenv("PATH", str(cache))
  with pytest.raises(build.NotBuilt, match=r"\(c\+\+, g\+\+, clang\+\+\)"):
    build.load()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(cache, compiler):
  compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'no such header' >&2; exit 1; }\n")
  with pytest.raises(build.NotBuilt, match="failed: no such header"):
    build.built()
  assert not list((cache / "gating_jax").iterdir())


@pytest.mark.parametrize("asked", ["--version", "-std=c++17"])
def test_a_compiler_that_does_not_answer_is_named_and_leaves_nothing(
  cache, compiler, monkeypatch, asked
):
  whole = subprocess.run

  def run(command, **settings):
    if asked in command:
      raise subprocess.TimeoutExpired(command, 300)
    return whole(command, **settings)

  monkeypatch.setattr(build.subprocess, "run", run)
  with pytest.raises(build.NotBuilt, match="cxx failed: .* timed out after 300 seconds"):
    build.built()
  assert not list(cache.rglob("*.part"))


def test_without_a_home_it_says_which_folder_to_name(monkeypatch, compiler):
  def no_home():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv(build.SWITCH, raising=False)
  monkeypatch.setattr(build.Path, "home", no_home)
  with pytest.raises(
    build.NotBuilt,
    match="no folder for the native library: Could not determine .*; set XDG_CACHE_HOME",
  ):
    build.built()


def test_what_cannot_be_loaded_is_said(cache, compiler):
  with pytest.raises(build.NotBuilt, match="could not be loaded"):
    build.load()


def test_a_folder_that_cannot_be_written(cache, compiler):
  cache.write_text("a file")
  with pytest.raises(build.NotBuilt, match="cannot be written"):
    build.built()


def test_built_once_and_again_when_a_source_changes(cache, compiler, monkeypatch, tmp_path):
  first = build.built()
  text = first.read_text()
  assert build.built() == first
  assert first.read_text() == text
  assert list((cache / "gating_jax").iterdir()) == [first]
  changed = tmp_path / "gated_chain.cc"
  changed.write_text("other")
  monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
  assert build.built() != first


@pytest.mark.slow
def test_processes_at_once_leave_one_whole_file(cache, compiler):
  program = "from gating_jax.native import build; print(build.built())"
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for _ in range(3)
  ]
  names = {run.communicate(timeout=120)[0].strip() for run in runs}
  assert len(names) == 1
  (file,) = (cache / "gating_jax").iterdir()
  assert str(file) in names
  assert file.read_text().strip().isdigit()


def test_the_command_says_why_and_does_not_fail(cache, monkeypatch, capsys):
  monkeypatch.setenv(build.SWITCH, "0")
  build.main()
  assert capsys.readouterr().out.startswith("native kernels: none (switched off")


def test_the_command_names_the_file_that_it_built(cache, compiler, monkeypatch, capsys):
  monkeypatch.setattr(build.ctypes, "CDLL", lambda file: file)
  build.main()
  (file,) = (cache / "gating_jax").iterdir()
  assert capsys.readouterr().out == f"native kernels: {file}\n"
