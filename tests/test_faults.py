"""Faults of a job of two processes: its messages, when it ends, what is lost, how it resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gating_jax.training import hosts
from tests.helpers import environment, jobs, made_tfds, tiny
from tests.helpers.jobs import finished, launched, saved_state, saved_steps, wait_until

pytestmark = pytest.mark.slow

EPOCHS = 8
PATIENCE = 2  # s
TRAINING = jobs.TRAINING | {"optim.epochs": EPOCHS, "log_every": 5}
STEPS = EPOCHS * jobs.STEPS_PER_EPOCH


def launch(workdir, out=None, settings=TRAINING, **environment):
  """A job of two processes of one device."""
  return launched(workdir, {"DEVICES": "1"} | environment, out, **settings)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
  """The directory of a run without faults."""
  workdir = tmp_path_factory.mktemp("runs") / "quiet"
  status, said = finished(launch(workdir))
  assert status == 0, said
  return workdir


def ended(job):
  """Returns status and output of a job that fails.

  It ends within 30 s of its first message, without a traceback.
  """
  wait_until(
    lambda: "error: " in job.out.read_text() or "launch: " in job.out.read_text() or job.poll(), job
  )
  since = time.monotonic()
  status, said = finished(job)
  seconds = time.monotonic() - since
  print(f"over after {seconds:.1f} s, status {status}:\n{said}")
  assert status != 0
  assert seconds < 30
  assert "Traceback" not in said
  assert "Fatal Python error" not in said
  assert not jobs.processes_of(job)
  return status, said


def check_it_goes_on_to_the_same_end(workdir, quiet, *, after, out=None):
  """Runs the same command after the cause is repaired."""
  status, said = finished(launch(workdir, out))
  assert status == 0, said
  assert f"resuming from the checkpoint of step {after} " in said
  assert tiny.bit_equal(saved_state(workdir, STEPS), saved_state(quiet, STEPS))


# The command, with less patience than it has: it waits for 20 s.
IMPATIENT = f"""
from gating_jax.training import hosts
from tests.helpers import tiny_cli
hosts._PATIENCE = {PATIENCE}
tiny_cli.register()
tiny_cli.cli.main()
"""


def test_a_coordinator_that_is_absent_is_named_and_leaves_nothing(tmp_path):
  workdir, began = tmp_path / "run", time.monotonic()
  told = subprocess.run(
    [
      sys.executable,
      "-c",
      IMPATIENT,
      *jobs.arguments(workdir, **TRAINING),
      "--coordinator=localhost:9",
      "--processes=2",
      "--process=1",
    ],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    cwd=jobs.ROOT,
    env=environment(devices=1),
  )
  assert time.monotonic() - began < 30
  assert told.returncode == 1
  assert re.fullmatch(
    rf"error: no coordinator answers at localhost:9 for {PATIENCE} s \(.*\): "
    r"is process 0 running there\?\n",
    told.stderr,
  )
  assert not workdir.exists()  # so the same command begins as if nothing had been
  assert hosts._PATIENCE < 25


def test_a_coordinator_killed_before_all_are_there_ends_the_job(tmp_path):
  workdir = tmp_path / "run"
  job = launch(workdir)
  wait_until(lambda: len(jobs.processes_of(job)) == 2, job)
  subprocess.run(["kill", "-KILL", str(jobs.processes_of(job)[0])], check=True)
  status, said = ended(job)
  assert status == 137
  assert "launch: a process of the job ended with status 137; ending the others" in said


@pytest.fixture
def small_disk(tmp_path):
  """A folder on its own file system, and a function that enlarges this."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = lambda *options: (
    subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode
  )
  if mount("-t", "tmpfs", "-o", "size=1250k", "tmpfs"):
    pytest.skip("mounting is not allowed here")
  yield folder, lambda: mount("-o", "remount,size=64m")
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_job_goes_on_once_there_is_room(small_disk, quiet, tmp_path):
  disk, enlarge = small_disk
  workdir, out = disk / "run", tmp_path / "out"
  status, said = ended(launch(workdir, out))
  assert status == 1
  assert re.search(
    rf"error: a checkpoint cannot be written in {workdir}/checkpoints: no space left on device",
    said,
  )
  kept = saved_steps(workdir)
  assert kept
  assert kept[-1] < STEPS
  assert enlarge() == 0
  check_it_goes_on_to_the_same_end(workdir, quiet, after=kept[-1], out=out)


def test_a_folder_that_cannot_be_written_is_named_and_not_tried_again(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  workdir, out = tmp_path / "file" / "run", tmp_path / "out"
  status, said = ended(launch(workdir, out, RESTARTS="2"))
  assert status == 2
  assert said.count(f"error: workdir {workdir} cannot be written: Not a directory") == 1
  assert "restarting from" not in said
  assert (tmp_path / "file").read_text() == "not a folder"


def test_when_a_process_is_killed_the_others_end_and_the_job_goes_on_to_the_same_end(
  tmp_path, quiet
):
  disturbed = tmp_path / "disturbed"
  job = launch(disturbed, RESTARTS="1")
  wait_until(lambda: saved_steps(disturbed), job)
  peers = jobs.processes_of(job)
  assert len(peers) == 2
  os.kill(peers[-1], signal.SIGKILL)
  killed = time.monotonic()
  while any(Path(f"/proc/{peer}").exists() for peer in peers):
    assert time.monotonic() - killed < 30
    time.sleep(0.05)
  status, said = finished(job)
  assert status == 0, said
  # The launcher may hear first of the peer, which ends since the killed one no longer answers.
  assert re.search(r"status (137|1); restarting from its newest checkpoint \(1 of 1\)", said)
  assert "Traceback" not in said
  assert "resuming from the checkpoint of step" in said
  assert saved_steps(disturbed)[-1] == STEPS
  assert tiny.bit_equal(saved_state(disturbed), saved_state(quiet))


def test_a_termination_while_a_checkpoint_is_written_loses_nothing(tmp_path, quiet):
  workdir = tmp_path / "run"
  job = launch(workdir)
  wait_until(lambda: saved_steps(workdir) and any((workdir / "checkpoints").glob("*tmp*")), job)
  job.send_signal(signal.SIGTERM)
  began = time.monotonic()
  status, said = finished(job)
  assert time.monotonic() - began < 30
  assert status == 0
  assert "stopped as asked; a checkpoint is saved" in said
  assert "Traceback" not in said
  step = saved_steps(workdir)[-1]
  assert step < STEPS
  assert f"step {step}/{STEPS}  stopped as asked" in said
  check_it_goes_on_to_the_same_end(workdir, quiet, after=step)


def test_a_clock_that_jumps_changes_nothing(tmp_path, quiet):
  workdir = tmp_path / "run"
  began = time.monotonic()
  program = f"{sys.executable} {jobs.ROOT / 'tests' / 'helpers' / 'jumping_cli.py'}"
  status, said = finished(launch(workdir, GATING_JAX=program))
  assert status == 0, said
  assert "Traceback" not in said
  result = json.loads((workdir / "result.json").read_text())
  assert 0 < result["seconds_since_last_start"] < time.monotonic() - began
  seconds = [int(number) for number in re.findall(r"^\[ *(-?[0-9]+) s\]", said, re.MULTILINE)]
  assert len(seconds) > 1
  assert seconds == sorted(seconds)
  assert 0 <= seconds[0] <= seconds[-1] < time.monotonic() - began
  assert tiny.bit_equal(saved_state(workdir, STEPS), saved_state(quiet, STEPS))


@pytest.fixture(scope="module")
def made_set(tmp_path_factory):
  """A folder with a small data set, and the file of its training images."""
  folder = tmp_path_factory.mktemp("data")
  train, test = made_tfds.images(280, (8, 8, 3)), made_tfds.images(16, (8, 8, 3), seed=1)
  made_tfds.write(
    folder,
    list(zip(*train, strict=True)),
    list(zip(*test, strict=True)),
    shape=(8, 8, 3),
    name="fault_set",
  )
  (file,) = folder.rglob("*train.array_record*")
  return folder, file


@pytest.mark.parametrize("loader", ["resident", "streaming"])
def test_a_damaged_record_is_named_and_ends_the_job(tmp_path, made_set, loader):
  folder, file = made_set
  intact = file.read_bytes()
  images = [place.start() for place in re.finditer(b"\x89PNG", intact)]
  assert len(images) == 280
  damaged = bytearray(intact)
  damaged[images[140] + 20 : images[140] + 40] = bytes(20)
  workdir = tmp_path / "run"
  changes = TRAINING | {
    "config": "tfds_resnet20",
    "data.name": "fault_set",
    "data.data_dir": folder,
    "data.loader": loader,
    "data.std": "0.25,0.25,0.25",
    "data.mean": "0.5,0.5,0.5",
    "optim.batch_size": 56,
    "optim.epochs": 1,
  }
  file.write_bytes(damaged)
  try:
    status, said = ended(launch(workdir, settings=changes, RESTARTS="2"))
  finally:
    file.write_bytes(intact)
  assert status == 2
  assert "restarting from" not in said
  assert re.search(
    rf"error: example 1[0-9]+ of split 'train' of fault_set in {folder} cannot be read "
    r"\(\w+: Corrupted .*\): delete the prepared data set and prepare it again",
    said,
  )
  status, said = finished(launch(workdir, settings=changes))
  assert status == 0, said
