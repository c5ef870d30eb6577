import os

import pytest

from gating_jax import checks
from gating_jax.checks import check_storable, is_text, user_path


@pytest.mark.parametrize(
  ("given", "meant"),
  [
    ("~", "home"),
    ("~/runs/a", "home/runs/a"),
    ("./~/a", "here/~/a"),
    ("~no-such-user/a", "here/~no-such-user/a"),
    ("runs/~x", "here/runs/~x"),
    ("lr[0.1]/*", "here/lr[0.1]/*"),
    ("a\\b", "here/a\\b"),
    ("$HOME", "here/$HOME"),
  ],
)
def test_only_the_home_folder_at_the_beginning_is_expanded(given, meant, monkeypatch, tmp_path):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert user_path(given).absolute() == tmp_path / meant
  assert user_path(user_path(given)).absolute() == tmp_path / meant


def test_patterns_are_refused_where_folders_have_no_handles(monkeypatch, tmp_path):
  check_storable("workdir", tmp_path / "lr[0.1]" / "*?")
  monkeypatch.setattr(checks, "HANDLES", tmp_path / "missing")
  for character in "*?[\\":
    with pytest.raises(ValueError, match="workdir must have no .* in its path") as raised:
      check_storable("workdir", tmp_path / f"a{character}b")
    assert f"no {character} in" in str(raised.value)


def test_bytes_that_are_no_text_are_told_from_text():
  assert is_text("runs/ü\u2028")
  assert not is_text("runs/" + os.fsdecode(b"\xff"))
