import contextlib
import gc
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from gating_jax.training import devices
from gating_jax.training.checkpoints import CheckpointError, Checkpoints
from tests.helpers import tiny

# A restore that fails leaves coroutines of orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RANDOM = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


def state(step):
  """Makes a state that differs at each step and is incompressible."""
  return devices.replicate(
    {
      "step": jnp.int32(step),
      "params": {"w": jnp.asarray(RANDOM + step), "b": jnp.zeros(3)},
      "stats": {},
      "opt": (jnp.full((4,), step, jnp.float32), ()),
    }
  )


@pytest.fixture
def open_checkpoints(tmp_path):
  opened = []

  def open_in(name="checkpoints", **settings):
    opened.append(Checkpoints(tmp_path / name, **settings))
    return opened[-1]

  yield open_in
  for one in opened:
    one.close()


@pytest.fixture(scope="module", autouse=True)
def _collect_coroutines():
  """Collects what orbax leaves behind while this file's filter of warnings holds.

  Once for all tests: to look at all objects takes half a second.
  """
  yield
  gc.collect()


@pytest.fixture
def warnings(monkeypatch):
  """The warnings of our code, without those of orbax."""
  seen = []

  def warn(message, *values):
    if message.startswith(("checkpoint of", "moved the")):
      seen.append(message % values)

  monkeypatch.setattr(logging, "warning", warn)
  return seen


def saved(open_checkpoints, steps, name="checkpoints", **settings):
  checkpoints = open_checkpoints(name, **settings)
  for step in steps:
    checkpoints.save(step, state(step))
  checkpoints.close()


def restored(checkpoints):
  return checkpoints.restore(jax.eval_shape(lambda: state(0)), devices.replicated_sharding())


def test_an_empty_directory_holds_nothing(open_checkpoints):
  assert restored(open_checkpoints()) is None


def test_the_newest_is_restored_bit_for_bit_to_where_it_is_wanted(open_checkpoints):
  saved(open_checkpoints, [3, 7, 12])
  step, found = restored(open_checkpoints())
  assert step == 12
  assert tiny.bit_equal(found, state(12))
  assert not tiny.bit_equal(found, state(7))
  assert all(leaf.sharding.device_set == set(jax.devices()) for leaf in jax.tree.leaves(found))


def test_only_the_newest_are_kept(open_checkpoints, tmp_path):
  saved(open_checkpoints, [1, 2, 3, 4, 5], keep=2)
  assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


def test_a_step_already_there_is_left_alone(open_checkpoints):
  checkpoints = open_checkpoints()
  checkpoints.save(1, state(1))
  checkpoints.save(1, state(2))
  checkpoints.wait()
  assert tiny.bit_equal(restored(checkpoints)[1], state(1))


NAMES = (
  "lr[0.1]",
  "*?",
  "{a,b}|#%41",
  "line\nbreak\t",
  " ~x:$HOME'\"",
  "ü\u2028",
  os.fsdecode(b"\xff"),
  "x__lock",
)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_may_have_any_name_that_the_file_system_takes(open_checkpoints, tmp_path, name):
  saved(open_checkpoints, [1, 2], name=f"{name}/checkpoints", keep=1)
  for reading in (False, True):
    step, found = restored(open_checkpoints(f"{name}/checkpoints", read_only=reading))
    assert step == 2
    assert tiny.bit_equal(found, state(2))
  assert [f.name for f in tmp_path.iterdir()] == [name]
  assert [f.name for f in (tmp_path / name / "checkpoints").iterdir()] == ["2"]


def test_a_folder_that_looks_like_a_pattern_for_its_neighbour_is_taken_for_itself(
  open_checkpoints, tmp_path
):
  saved(open_checkpoints, [2], name="seed1")
  (tmp_path / "seed1" / "2" / "state").rename(
    tmp_path / "seed1" / "2" / "state.orbax-checkpoint-tmp"
  )
  (tmp_path / "seed1" / "2").rename(tmp_path / "seed1" / "2.orbax-checkpoint-tmp")
  saved(open_checkpoints, [2], name="seed?")
  assert restored(open_checkpoints("seed?"))[0] == 2


def test_a_folder_with_a_backslash_is_refused_before_anything_is_made(tmp_path):
  with pytest.raises(
    ValueError, match=r"directory must have no \\ in its path.*takes for another.*got '.*a\\\\b'"
  ):
    Checkpoints(tmp_path / "a\\b")
  assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_names_the_folder_as_it_was_given(open_checkpoints, tmp_path, warnings):
  saved(open_checkpoints, [1], name="lr[0.1]")
  empty_every_file(tmp_path / "lr[0.1]" / "1")
  with pytest.raises(CheckpointError) as raised:
    restored(open_checkpoints("lr[0.1]"))
  assert "/proc/" not in str(raised.value)
  assert str(tmp_path / "lr[0.1]") in str(raised.value)


def test_closed_checkpoints_hold_no_handle_of_their_folder(tmp_path):
  checkpoints = Checkpoints(tmp_path / "one")
  assert handles_below(tmp_path)
  checkpoints.close()
  checkpoints.close()
  assert not handles_below(tmp_path)


def handles_below(folder):
  """Returns this process's open files and folders within a folder."""
  links = []
  for link in Path("/proc/self/fd").iterdir():
    with contextlib.suppress(FileNotFoundError):  # the listing's own file
      links.append(link.readlink())
  return [target for target in links if target.is_relative_to(folder)]


def test_a_half_written_checkpoint_is_removed_and_the_one_before_used(open_checkpoints, tmp_path):
  saved(open_checkpoints, [1, 2])
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
  checkpoints = open_checkpoints()
  assert restored(checkpoints)[0] == 2
  checkpoints.save(3, state(3))
  checkpoints.close()
  assert sorted(f.name for f in folder.iterdir()) == ["1", "2", "3"]
  assert tiny.bit_equal(restored(open_checkpoints())[1], state(3))


def files(folder):
  return sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def halve_largest(folder):
  os.truncate(files(folder)[-1], files(folder)[-1].stat().st_size // 2)


def empty_largest(folder):
  os.truncate(files(folder)[-1], 0)


def empty_every_file(folder):
  for file in files(folder):
    os.truncate(file, 0)


def flip_bits_of_values(folder):
  largest = files(folder)[-1]
  data = bytearray(largest.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
  largest.write_bytes(data)


def remove_metadata(folder):
  for file in folder.rglob("_METADATA"):
    file.unlink()


def remove_array_manifest(folder):
  for file in folder.rglob("manifest.ocdbt"):
    file.unlink()


def empty_state(folder):
  shutil.rmtree(folder / "state")
  (folder / "state").mkdir()


def remove_state(folder):
  shutil.rmtree(folder / "state")


def remove_everything(folder):
  shutil.rmtree(folder)
  folder.mkdir()


DAMAGES = [
  halve_largest,
  empty_largest,
  empty_every_file,
  flip_bits_of_values,
  remove_metadata,
  remove_array_manifest,
  empty_state,
  remove_state,
  remove_everything,
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_training_can_go_on(
  damage, open_checkpoints, tmp_path, warnings
):
  saved(open_checkpoints, [10, 20])
  damage(tmp_path / "checkpoints" / "20")
  checkpoints = open_checkpoints()
  step, found = restored(checkpoints)
  assert step == 10
  assert tiny.bit_equal(found, state(10))
  aside = tmp_path / "checkpoints-damaged-20-0"
  passed_over, moved = warnings
  assert passed_over.startswith("checkpoint of step 20 cannot be read, trying the previous one: ")
  assert moved == f"moved the damaged checkpoint of step 20 to {aside}"
  assert aside.is_dir()
  checkpoints.save(20, state(21))
  checkpoints.close()
  step, found = restored(open_checkpoints())
  assert step == 20
  assert tiny.bit_equal(found, state(21))


def test_two_damaged_checkpoints_in_a_row(open_checkpoints, tmp_path, warnings):
  saved(open_checkpoints, [10, 20, 30])
  for step in ("20", "30"):
    empty_largest(tmp_path / "checkpoints" / step)
  assert restored(open_checkpoints())[0] == 10
  assert [message.split(",")[0] for message in warnings[:2]] == [
    "checkpoint of step 30 cannot be read",
    "checkpoint of step 20 cannot be read",
  ]
  assert {f.name for f in tmp_path.iterdir()} == {
    "checkpoints",
    "checkpoints-damaged-20-0",
    "checkpoints-damaged-30-0",
  }


def test_a_step_damaged_twice_is_put_aside_twice(open_checkpoints, tmp_path):
  saved(open_checkpoints, [10, 20])
  for _ in range(2):
    empty_largest(tmp_path / "checkpoints" / "20")
    checkpoints = open_checkpoints()
    assert restored(checkpoints)[0] == 10
    checkpoints.save(20, state(20))
    checkpoints.close()
  assert sorted(f.name for f in tmp_path.iterdir()) == [
    "checkpoints",
    "checkpoints-damaged-20-0",
    "checkpoints-damaged-20-1",
  ]


def test_where_none_can_be_read_nothing_is_changed_and_training_does_not_begin_anew(
  open_checkpoints, tmp_path
):
  saved(open_checkpoints, [10, 20])
  for step in ("10", "20"):
    empty_largest(tmp_path / "checkpoints" / step)
  before = files(tmp_path)
  with pytest.raises(
    CheckpointError,
    match=r"no checkpoint in .*checkpoints can be read:\n  step 20: .*\n  step 10: ",
  ):
    restored(open_checkpoints())
  assert files(tmp_path) == before


def test_a_state_of_another_shape_is_not_taken_for_damage_to_be_moved(open_checkpoints, tmp_path):
  saved(open_checkpoints, [10, 20])
  other = {
    **jax.eval_shape(lambda: state(0)),
    "params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)},
  }
  with pytest.raises(CheckpointError, match="To start over, choose another workdir"):
    open_checkpoints().restore(other, devices.replicated_sharding())
  wider = jax.eval_shape(lambda: state(0))
  wider["params"]["b"] = jax.ShapeDtypeStruct((5,), jnp.float32)
  message = r"of another network: params/b has shape \(3,\), the config's has \(5,\)"
  with pytest.raises(CheckpointError, match=message):
    open_checkpoints().restore(wider, devices.replicated_sharding())
  assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]


def test_reading_alone_changes_nothing(open_checkpoints, tmp_path):
  saved(open_checkpoints, [10, 20])
  empty_largest(tmp_path / "checkpoints" / "20")
  shutil.copytree(
    tmp_path / "checkpoints" / "10", tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp"
  )
  before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
  reader = open_checkpoints(read_only=True)
  step, found = restored(reader)
  reader.close()
  assert step == 10
  assert tiny.bit_equal(found, state(10))
  assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before


def test_a_save_that_orbax_refuses_is_an_error(open_checkpoints, monkeypatch):
  checkpoints = open_checkpoints()
  monkeypatch.setattr(checkpoints._manager, "save", lambda *_, **__: False)
  with pytest.raises(
    OSError, match="a checkpoint cannot be written in .*: orbax refused to save step 5"
  ):
    checkpoints.save(5, state(5))


def test_a_full_disk_is_named_before_anything_is_written(open_checkpoints, tmp_path, monkeypatch):
  checkpoints = open_checkpoints()
  nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: nearly_full)
  message = r"no space left on device: \d+\.\d MB needed, 0\.0 MB free"
  with pytest.raises(OSError, match=message):
    checkpoints.save(5, state(5))
  assert not list((tmp_path / "checkpoints").iterdir())
