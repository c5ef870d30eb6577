import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from gating_jax.training.rundir import (
  CONFIG_FILE,
  RunDirError,
  check_usable,
  existing_run,
  open_run,
  staged,
)


def config(**changes):
  made = ml_collections.ConfigDict(
    {"seed": 0, "optim": {"learning_rate": 0.1, "lr_drop_at": (0.5, 0.75)}}
  )
  made.update_from_flattened_dict(changes)
  return made


def snapshot(folder):
  """Returns every file's bytes and time of change, except the lock's."""
  return {
    str(f.relative_to(folder)): (f.read_bytes() if f.is_file() else None, f.stat().st_mtime_ns)
    for f in folder.rglob("*")
    if f.name != ".lock"
  }


def make_run(path):
  with open_run(path, config()) as run:
    run.checkpoints.mkdir()
    (run.checkpoints / "1").write_text("weights")


def refused(path, message):
  with pytest.raises(RunDirError, match=message), open_run(path, config()):
    pass


def test_a_new_run_holds_its_config(tmp_path):
  path = tmp_path / "a" / "b"
  with open_run(path, config()) as run:
    assert run.path == path
    assert run.checkpoints.parent == path
    assert run.result() is None
    assert json.loads((path / CONFIG_FILE).read_text()) == {
      "seed": 0,
      "optim": {"learning_rate": 0.1, "lr_drop_at": [0.5, 0.75]},
    }


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with open_run(Path("~/lr[0.1]"), config()) as run:
    assert run.path == tmp_path / "lr[0.1]"
  assert existing_run(Path("~/lr[0.1]"), config()).path == tmp_path / "lr[0.1]"


def test_a_backslash_in_a_path_is_refused_by_name_before_anything_is_made(tmp_path, monkeypatch):
  with (
    pytest.raises(ValueError, match=r"workdir must have no \\ in its path.*got '.*a\\\\b'"),
    open_run(tmp_path / "a\\b", config()),
  ):
    pass
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "c\\d").mkdir()
  monkeypatch.chdir(tmp_path / "c\\d")
  with pytest.raises(ValueError, match="workdir must have no"), open_run(Path("run"), config()):
    pass
  assert list((tmp_path / "c\\d").iterdir()) == []


def test_an_empty_folder_becomes_a_run(tmp_path):
  with open_run(tmp_path, config()):
    assert (tmp_path / CONFIG_FILE).exists()


def test_a_run_killed_before_its_config_was_written_starts_anew(tmp_path):
  (tmp_path / ".lock").touch()
  (tmp_path / f"{CONFIG_FILE}.tmp").write_text('{"se')
  with open_run(tmp_path, config()):
    assert {f.name for f in tmp_path.iterdir()} == {".lock", CONFIG_FILE}


def test_the_same_config_goes_on_and_changes_nothing(tmp_path):
  make_run(tmp_path)
  before = snapshot(tmp_path)
  with open_run(tmp_path, config()):
    pass
  assert len(before) == 3
  assert snapshot(tmp_path) == before


def test_a_result_outlives_the_run(tmp_path):
  with open_run(tmp_path, config()) as run:
    run.finish({"accuracy": 0.5})
  with open_run(tmp_path, config()) as run:
    assert run.result() == {"accuracy": 0.5}
  assert existing_run(tmp_path, config()).result() == {"accuracy": 0.5}


def test_a_run_that_has_saved_nothing_gives_way_to_another_config(tmp_path):
  with open_run(tmp_path, config()) as run:
    run.checkpoints.mkdir()
    assert not run.has_progress()
  with open_run(tmp_path, config(seed=1)):
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["seed"] == 1


@pytest.mark.parametrize(
  "progress", ["result.json", "checkpoints/1", "checkpoints-damaged-1-0/state"]
)
def test_a_run_that_has_saved_something_does_not(tmp_path, progress):
  with open_run(tmp_path, config()) as run:
    (tmp_path / progress).parent.mkdir(exist_ok=True)
    (tmp_path / progress).write_text("{}")
    assert run.has_progress()
  with (
    pytest.raises(RunDirError, match="seed: 0 there, 1 here"),
    open_run(tmp_path, config(seed=1)),
  ):
    pass
  assert json.loads((tmp_path / CONFIG_FILE).read_text())["seed"] == 0


def test_another_config_is_refused_with_the_difference(tmp_path):
  make_run(tmp_path)
  before = snapshot(tmp_path)
  other = config(**{"optim.learning_rate": 0.2, "optim.lr_drop_at": (0.5,)})
  del other["seed"]
  other.extra = "new"
  with pytest.raises(RunDirError) as caught, open_run(tmp_path, other):
    pass
  assert str(tmp_path) in str(caught.value)
  assert str(caught.value).splitlines()[1:] == [
    "  extra: '(absent)' there, 'new' here",
    "  optim.learning_rate: 0.1 there, 0.2 here",
    "  optim.lr_drop_at: [0.5, 0.75] there, [0.5] here",
    "  seed: 0 there, '(absent)' here",
  ]
  with pytest.raises(RunDirError, match="holds a run of another config"):
    existing_run(tmp_path, other)
  assert snapshot(tmp_path) == before


def test_a_field_that_is_none_is_that_of_an_older_config_without_it(tmp_path):
  make_run(tmp_path)
  other = config()
  other.data = ml_collections.ConfigDict(
    {"label_feature": ml_collections.config_dict.placeholder(str)}
  )
  with open_run(tmp_path, other):
    pass
  other.data.label_feature = "coarse_label"
  with pytest.raises(
    RunDirError, match=r"data.label_feature: '\(absent\)' there, 'coarse_label' here"
  ):
    existing_run(tmp_path, other)


@pytest.mark.parametrize(("method", "resumed"), [("ewc", True), ("hat", False)])
def test_a_field_newer_than_the_run_is_compared_where_its_method_reads_it(
  tmp_path, method, resumed
):
  before = ml_collections.ConfigDict({"method": method, "hat": {"steepness": 400.0}})
  with open_run(tmp_path, before) as run:
    run.checkpoints.mkdir()
    (run.checkpoints / "1").write_text("weights")
  now = before.copy_and_resolve_references()
  now.hat.grad_clip_norm = 10_000.0
  if resumed:
    with open_run(tmp_path, now):
      pass
  else:
    with pytest.raises(RunDirError, match="hat.grad_clip_norm: None there, 10000.0 here"):
      existing_run(tmp_path, now)


def test_other_workers_resume_a_run_and_another_test_split_only_tests_it(tmp_path):
  data = {"workers": 4, "test_split": "test"}
  with open_run(tmp_path, ml_collections.ConfigDict({"data": data})) as run:
    run.checkpoints.mkdir()
    (run.checkpoints / "1").write_text("weights")
  with open_run(tmp_path, ml_collections.ConfigDict({"data": data | {"workers": 0}})):
    pass
  other = ml_collections.ConfigDict({"data": data | {"test_split": "other.txt", "workers": 0}})
  existing_run(tmp_path, other, only_tested=True)
  with pytest.raises(RunDirError, match="data.test_split: 'test' there, 'other.txt' here"):
    existing_run(tmp_path, other)
  with pytest.raises(RunDirError, match="data.test_split"), open_run(tmp_path, other):
    pass


def test_a_run_of_an_earlier_version_is_resumed_by_the_new_names_of_its_fields(tmp_path):
  make_run(tmp_path)
  old = {"seed": 0, "optim": {"learning_rate": 0.1, "drops": [0.5, 0.75]}}
  (tmp_path / CONFIG_FILE).write_text(json.dumps(old))
  with open_run(tmp_path, config()) as run:
    assert run.config() == json.loads(config().to_json())
  with pytest.raises(RunDirError, match=r"optim.lr_drop_at: \[0.5, 0.75\] there, \[0.5\] here"):
    existing_run(tmp_path, config(**{"optim.lr_drop_at": (0.5,)}))


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  refused(tmp_path, f"{tmp_path} exists and has no config.json")
  assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path):
  file = tmp_path / "run"
  file.write_text("not a folder")
  refused(file, "run is no directory")
  refused(file / "below", "cannot be written: Not a directory")
  assert file.read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  refused(tmp_path / "run", "cannot be written: Permission denied")


def test_a_folder_that_may_not_be_written_is_named_before_the_data_are_opened(
  tmp_path, monkeypatch
):
  check_usable(tmp_path / "run", config())
  monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
  with pytest.raises(RunDirError, match="workdir .*run cannot be written: Permission denied"):
    check_usable(tmp_path / "run", config())
  assert not (tmp_path / "run").exists()


def test_there_is_no_run_to_look_at_where_none_began(tmp_path):
  for path in (tmp_path / "nowhere", tmp_path):
    with pytest.raises(RunDirError, match=f"workdir {path} holds no run"):
      existing_run(path, config())
  assert list(tmp_path.iterdir()) == []


def test_a_run_can_be_looked_at_while_it_is_open(tmp_path):
  with open_run(tmp_path, config()):
    before = snapshot(tmp_path)
    assert existing_run(tmp_path, config()).result() is None
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_is_named(tmp_path, name):
  make_run(tmp_path)
  (tmp_path / name).write_text('{"half": ')
  with pytest.raises(RunDirError, match=f"{name} is damaged"), open_run(tmp_path, config()) as run:
    run.result()


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
  holder = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
      "print('held', flush=True); sys.stdin.read()",
      str(tmp_path / ".lock"),
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with holder:
    assert holder.stdout.readline() == "held\n"
    refused(tmp_path, "in use by another process")
    assert not (tmp_path / CONFIG_FILE).exists()
    holder.stdin.close()
    holder.wait(10)
  with open_run(tmp_path, config()):
    pass


def test_a_run_is_held_while_open_and_let_go_after(tmp_path):
  def free():
    with (tmp_path / ".lock").open("w") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      return True

  with open_run(tmp_path, config()):
    assert not free()
    refused(tmp_path, "in use")
  assert free()
  with pytest.raises(RuntimeError, match="oops"), open_run(tmp_path, config()):
    raise RuntimeError("oops")
  assert free()


_KILLED = """
import os, signal, sys
from pathlib import Path
from gating_jax.training import rundir
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "moving":
  rundir._move = lambda aside, path: ((aside / "made" / "a").rename(path / "a"), die())
with rundir.staged(Path(sys.argv[1]), ("a", "b")) as folder:
  (folder / "a").write_text("first")
  if sys.argv[2] == "writing":
    die()
  (folder / "b").mkdir()
  (folder / "b" / "c").write_text("second")
"""


def write_both(path):
  with staged(path, ("a", "b")) as folder:
    (folder / "a").write_text("new")
    (folder / "b").mkdir()


def killed(path, when):
  return subprocess.run([sys.executable, "-c", _KILLED, str(path), when], check=False).returncode


def test_staged_files_are_all_there_or_none_after_a_kill(tmp_path):
  assert killed(tmp_path, "writing") == -9
  assert [f.name for f in tmp_path.iterdir()] == [".staged"]
  write_both(tmp_path)
  assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
  assert (tmp_path / "a").read_text() == "new"


def test_a_kill_while_staged_files_are_moved_is_made_good(tmp_path):
  assert killed(tmp_path, "moving") == -9
  with pytest.raises(RunDirError, match="a exists; rename it or delete it to write it again"):
    write_both(tmp_path)
  assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
  assert ((tmp_path / "a").read_text(), (tmp_path / "b" / "c").read_text()) == ("first", "second")


def test_what_was_moved_late_does_not_make_what_is_written_next_whole(tmp_path):
  assert killed(tmp_path, "moving") == -9
  (tmp_path / "a").rename(tmp_path / "mine")
  with staged(tmp_path, ("d",)):
    assert not (tmp_path / ".staged" / "whole").exists()
  assert {f.name for f in tmp_path.iterdir()} == {"mine", "b"}


def test_an_end_while_staged_files_are_moved_loses_nothing(tmp_path, monkeypatch):
  rename, moved = Path.rename, []

  def once(file, target):
    if moved:
      raise KeyboardInterrupt
    moved.append(target.name)
    return rename(file, target)

  with monkeypatch.context() as patch:
    patch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt):
      write_both(tmp_path)
  assert {f.name for f in tmp_path.iterdir()} == {".staged", *moved}
  with pytest.raises(RunDirError, match=r"\w exists; rename it"):
    write_both(tmp_path)
  assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}


def test_staged_files_of_a_block_that_fails_are_gone(tmp_path):
  def interrupted():
    with staged(tmp_path, ("a",)) as folder:
      (folder / "a").write_text("new")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert list(tmp_path.iterdir()) == []


def test_staged_files_overwrite_nothing_and_are_written_by_one_process(tmp_path):
  with (
    staged(tmp_path, ("a",)),
    pytest.raises(RunDirError, match="is being written to by another process"),
  ):
    write_both(tmp_path)
  (tmp_path / "b").write_text("old")
  with pytest.raises(RunDirError, match="b exists; rename it"):
    write_both(tmp_path)
  assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("b", "old")]
