import subprocess

import pytest

from gating_jax.training import provenance


def test_starts_are_kept_in_their_order_and_old_runs_have_none(tmp_path, monkeypatch):
  assert provenance.read_starts(tmp_path) == []
  monkeypatch.setattr("sys.argv", ["/a/folder/cli.py", "--config=a b.py", "--workdir=it's\udcff\n"])
  for _ in range(2):
    provenance.record_start(tmp_path)
  first, second = provenance.read_starts(tmp_path)
  assert (
    first["command"]
    == second["command"]
    == r"gating-jax '--config=a b.py' $'--workdir=it\x27s\xff\x0a'"
  )
  assert first.keys() == {
    "date",
    "command",
    "commit",
    "versions",
    "hardware",
    "devices",
    "processes",
  }
  assert first["date"].endswith("+00:00")
  assert {"python", "jax", "numpy"} <= first["versions"].keys()


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"starts": 3}', '{"starts": [3]}', "[" * 100_000]
)
def test_damaged_starts_are_none(tmp_path, text):
  (tmp_path / provenance.FILE).write_text(text)
  assert provenance.read_starts(tmp_path) == []


def test_the_oldest_start_and_the_newest_are_kept(tmp_path, monkeypatch):
  numbers = iter(range(100))
  monkeypatch.setattr(provenance, "describe", lambda: {"number": next(numbers)})
  for _ in range(60):
    provenance.record_start(tmp_path)
  kept = [start["number"] for start in provenance.read_starts(tmp_path)]
  assert kept == [0, *range(11, 60)]


def test_a_package_that_is_not_installed_has_no_version():
  assert provenance._versions(["numpy", "no-such-package"]).keys() == {"numpy"}


def test_only_a_checkout_that_git_can_describe_has_a_commit(tmp_path, monkeypatch):
  file = tmp_path / "gating_jax" / "training" / "provenance.py"
  monkeypatch.setattr(provenance, "__file__", str(file))
  done = subprocess.CompletedProcess([], 0, "abc-dirty\n")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
  # An installed package may lie in the checkout of another project, which git describes.
  assert provenance._commit() is None
  (tmp_path / ".git").mkdir()
  assert provenance._commit() == "abc-dirty"
  for error in (FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)):

    def fail(*_, error=error, **__):
      raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert provenance._commit() is None
