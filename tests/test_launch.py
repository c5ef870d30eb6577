"""Jobs of several processes, as `launch/local.sh` and the other launchers start them.

Their faults are in `test_faults.py`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tomllib

import jax
import numpy as np
import pytest

from gating_jax.training import hosts
from tests.helpers import tiny
from tests.helpers.jobs import (
  ROOT,
  STEPS_PER_EPOCH,
  TRAINING,
  alone,
  arguments,
  finished,
  here,
  launched,
  processes_of,
  saved_state,
  saved_steps,
  wait_until,
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
def test_two_processes_of_four_devices_do_what_one_of_eight_does(tmp_path, backend):
  changes = TRAINING | {"devices.backend": backend}
  status, said = finished(launched(tmp_path / "two", **changes))
  assert status == 0, said
  assert said.count("run directory:") == 1  # one of them prints
  here(*arguments(tmp_path / "one", **changes))
  two, one = (saved_state(tmp_path / run, STEPS_PER_EPOCH) for run in ("two", "one"))
  assert tiny.relative_gap(two["params"], one["params"]) < 1e-5
  assert {f.name for f in (tmp_path / "two").iterdir()} == {
    f.name for f in (tmp_path / "one").iterdir()
  }
  lines = lambda run: (tmp_path / run / "metrics.jsonl").read_text().count("\n")
  assert lines("two") == lines("one")
  if backend == "pmap":  # a checkpoint of either is the same
    evaluated = alone(*arguments(tmp_path / "two", **changes), "--mode=evaluate", devices=1)
    assert f"checkpoint of step {STEPS_PER_EPOCH}" in evaluated


PROGRAMMES = {
  # Both nets, gate and classifier. Large, since otherwise Adam's steps would multiply rounding.
  "composed_timegate": {
    "model.light.name": "tiny",
    "model.heavy.name": "tiny",
    "data.train_videos": 40,
    "data.test_videos": 8,
    "model.gate.concepts": 4,
    "training": "end_to_end",
    "pretrain.epochs": 0,
    "optim.kind": "sgd",
    "optim.learning_rate": 5e-4,
    "optim.batch_size": 8,
    "optim.epochs": 1,
  },
  "split_digits": {
    "model.width": 0.05,
    "tasks.count": 2,
    "optim.batch_size": 48,
    "optim.epochs": 1,
    "router.steps": 20,
    "gates.when_full": "reuse",
  },
}


@pytest.mark.slow
@pytest.mark.parametrize("config", PROGRAMMES)
def test_two_processes_of_four_devices_train_each_programme_as_one_of_eight(tmp_path, config):
  changes = {"config": config, **PROGRAMMES[config]}
  status, said = finished(launched(tmp_path / "two", **changes))
  assert status == 0, said
  here(*arguments(tmp_path / "one", **changes))
  assert saved_steps(tmp_path / "two") == saved_steps(tmp_path / "one")
  step = STEPS_PER_EPOCH + (config == "split_digits")  # the end of a task counts as a step
  two, one = (saved_state(tmp_path / run, step)["params"] for run in ("two", "one"))
  print(f"{config}: {tiny.relative_gap(two, one):.1e}")
  assert tiny.relative_gap(two, one) < 1e-5
  if config == "split_digits":
    two, one = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("two", "one"))
    for kind in ("task_aware", "task_agnostic"):
      assert two[kind]["accuracies"][0] == pytest.approx(one[kind]["accuracies"][0], abs=0.03)
      assert two[kind]["accuracies"][1] == pytest.approx(one[kind]["accuracies"][1], abs=0.03)
    assert two["task_aware_macs"] == pytest.approx(one["task_aware_macs"], rel=0.02)
    assert two["free_units"] == one["free_units"]


@pytest.mark.slow
def test_a_job_of_two_processes_is_finished_by_one_on_as_many_devices_or_fewer(tmp_path):
  changes = TRAINING | {"optim.epochs": 4}
  begun = tmp_path / "begun"
  job = launched(begun, **changes)
  wait_until(lambda: saved_steps(begun), job)
  for process in processes_of(job):
    os.kill(process, signal.SIGKILL)
  assert finished(job)[0] != 0
  step = saved_steps(begun)[-1]
  assert step < 4 * STEPS_PER_EPOCH
  fewer = shutil.copytree(begun, tmp_path / "fewer")
  outputs = here(*arguments(begun, **changes)), alone(*arguments(fewer, **changes), devices=1)
  for said in outputs:
    assert f"resuming from the checkpoint of step {step} " in said
  here(*arguments(tmp_path / "whole", **changes))
  whole = saved_state(tmp_path / "whole", 4 * STEPS_PER_EPOCH)["params"]
  for run in (begun, fewer):
    found = saved_state(run, 4 * STEPS_PER_EPOCH)["params"]
    assert tiny.relative_gap(found, whole) < 1e-4  # rounding, of 20 steps


@pytest.mark.slow
def test_a_job_that_cannot_begin_ends_on_all_with_the_reason_of_one(tmp_path):
  workdir = tmp_path / "mine"
  workdir.mkdir()
  (workdir / "letter.txt").write_text("not a run")
  status, said = finished(launched(workdir, {"RESTARTS": "2"}, **TRAINING))
  assert status == 2
  assert "restarting from" not in said
  assert said.count("exists and has no config.json") == 1
  assert [f.name for f in workdir.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
  ("processes", "process", "message"),
  [
    (2, 2, r"process must be in 0, ..., processes - 1, .*; got process 2, processes 2"),
    (None, 0, "both required with a coordinator; got process 0, processes None"),
  ],
)
def test_processes_that_make_no_job_are_refused(processes, process, message):
  with pytest.raises(ValueError, match=message):
    hosts.connect("localhost:1", processes, process)


def test_a_launcher_that_joins_processes_itself_is_told_no_numbers():
  message = "processes and process must not be given with coordinator=auto; got 2, None"
  with pytest.raises(ValueError, match=message):
    hosts.connect("auto", 2, None)


def test_processes_agree_on_what_one_has_seen_and_gather_their_parts(monkeypatch):
  batch = {"x": np.arange(6)}
  assert (hosts.any_of(False), hosts.broadcast_from_writer(3)) == (False, 3)
  assert hosts.allgather(batch) is batch
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)

  def gather(mine, tiled=False):
    """Stands in for the other process, which has seen it, and has the smaller numbers."""
    if tiled:
      return {name: np.concatenate([part - 3, part]) for name, part in mine.items()}
    return np.stack([np.True_, mine])

  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda mine: mine + 4)
  assert (hosts.any_of(False), hosts.broadcast_from_writer(3)) == (True, 7)
  part = hosts.local_shard(batch)
  assert part["x"].tolist() == [3, 4, 5]
  assert hosts.allgather(part)["x"].tolist() == batch["x"].tolist()


def test_processes_know_the_least_number_and_who_shares_their_host(monkeypatch):
  assert (hosts.least_of(5), hosts.count_on_host()) == (5, 1)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  # One on this host, and one on another, with larger numbers.
  gather = lambda mine: np.stack([mine, mine, mine + 1])
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
  assert (hosts.least_of(5), hosts.count_on_host()) == (5.0, 2)


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":1", "localhost:http"])
def test_a_coordinator_without_host_or_port_is_refused(coordinator):
  with pytest.raises(
    ValueError, match=f"coordinator must be auto or host:port; got '{coordinator}'"
  ):
    hosts.connect(coordinator, 2, 1)


def test_a_coordinator_that_does_not_listen_is_waited_for_and_named(monkeypatch):
  monkeypatch.setattr(hosts, "_PATIENCE", 0.1)
  with pytest.raises(
    hosts.PeerError,
    match="no coordinator answers at localhost:9 for 0.1 s .*: is process 0 running",
  ):
    hosts.connect("localhost:9", 2, 1)


def test_a_process_joins_the_job_of_a_coordinator_that_listens(monkeypatch):
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *job, **_: joined.append(job))
  with socket.create_server(("localhost", 0)) as server:
    coordinator = f"localhost:{server.getsockname()[1]}"
    before = signal.getsignal(signal.SIGTERM)
    try:
      hosts.connect(coordinator, 2, 1)
      hosts.connect("auto", None, None)
    finally:
      signal.signal(signal.SIGTERM, before)
  assert joined == [(coordinator, 2, 1), ()]


def test_processes_that_do_not_find_each_other_are_an_error_of_the_job(monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("timed out")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(
    hosts.PeerError, match="the processes of the job could not connect: timed out"
  ):
    hosts.connect("localhost:1", 2, 0)


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize(
  ("script", "arguments"),
  [
    ("local.sh", ()),
    ("local.sh", ("2", "--workdir=x")),
    ("slurm.sh", ("--workdir=x",)),
    ("tpu.sh", ()),
    ("quickstart.sh", ()),
    ("quickstart.sh", ("elsewhere",)),
    ("setup.sh", ()),
    ("restarts.sh", ()),
    ("../tests/run.sh", ("--slow",)),
    ("../benchmarks/accelerator.sh", ("--smoke",)),
  ],
)
def test_help_of_a_launcher_starts_nothing(script, arguments, option, tmp_path):
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments, option],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env={"PATH": os.environ["PATH"], "GATING_JAX": "false"},
  )
  assert (told.returncode, told.stderr) == (0, "")
  assert "Usage: " in told.stdout
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("script", "arguments", "expected"),
  [
    (
      "local.sh",
      ("2", "--workdir=x", "--dry-run"),
      "--workdir=x --coordinator=localhost:PORT --processes=2",
    ),
    ("slurm.sh", ("--workdir=x", "--dry-run"), "--workdir=x --coordinator=auto"),
    ("tpu.sh", ("--workdir=x", "--dry-run"), "--workdir=x"),
    (
      "quickstart.sh",
      ("elsewhere", "--dry-run"),
      "gating-jax --config=configs/digits_resnet20.py --workdir=elsewhere",
    ),
  ],
)
def test_a_dry_run_may_be_asked_for_anywhere(script, arguments, expected):
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
    env={"PATH": os.environ["PATH"], "NAME": "pod", "ZONE": "z", "GATING_JAX": "false"},
  )
  assert expected in told.stdout
  assert "--dry-run" not in told.stdout


@pytest.mark.parametrize(
  ("script", "arguments"),
  [
    ("local.sh", ()),
    ("local.sh", ("0", "--workdir=x")),
    ("local.sh", ("two", "--workdir=x")),
    ("local.sh", ("2",)),
    ("slurm.sh", ()),
    ("slurm.sh", ("--dry-run",)),
    ("tpu.sh", ("--dry-run",)),
    ("tpu.sh", ("--workdir=x",)),
  ],
)
def test_a_launcher_says_how_it_is_used(script, arguments):
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / script), *arguments],
    capture_output=True,
    text=True,
    check=False,
    env={"PATH": os.environ["PATH"]},
  )
  assert (told.returncode, told.stdout) == (2, "")
  assert "Usage: " in told.stderr
  assert f"launch/{script} " in told.stderr


def test_the_launcher_for_slurm_says_where_it_must_be_called(tmp_path):
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / "slurm.sh"), "--workdir=x"],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    env={"PATH": os.environ["PATH"]},
  )
  assert (told.returncode, told.stderr) == (
    2,
    f"error: call it from the repository; this is {tmp_path}\n",
  )


@pytest.mark.parametrize(
  ("script", "environment", "expected"),
  [
    (
      ("local.sh", "--dry-run", "2"),
      {"DEVICES": "4", "GATING_JAX": "gating-jax", "XLA_FLAGS": ""},
      "env XLA_FLAGS=--xla_force_host_platform_device_count=4 gating-jax --workdir=a\\ b "
      "--coordinator=localhost:PORT --processes=2 --process=1",
    ),
    (
      ("slurm.sh", "--dry-run"),
      {"SLURM_SUBMIT_DIR": str(ROOT)},
      f"srun --kill-on-bad-exit=0 --wait=30 {ROOT}/.venv/bin/gating-jax --workdir=a\\ b "
      "--coordinator=auto",
    ),
    (
      ("tpu.sh", "--dry-run"),
      {"NAME": "pod", "ZONE": "z"},
      "gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all",
    ),
  ],
)
def test_a_dry_run_prints_what_would_be_done(script, environment, expected):
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / script[0]), *script[1:], "--workdir=a b"],
    capture_output=True,
    text=True,
    env={**os.environ, **environment, "RESTARTS": "3"},
    check=True,
  )
  assert expected in told.stdout
  assert told.stdout.endswith(
    "# if it fails, restart from its newest checkpoint, at most 3 times\n"
  )


@pytest.mark.parametrize(
  ("restarts", "status", "runs"),
  [(0, 1, 1), (2, 1, 3), (2, 2, 1), (2, 127, 1), (2, 143, 3), (2, 0, 1)],
)
@pytest.mark.parametrize(("script", "program"), [("slurm.sh", "srun"), ("tpu.sh", "gcloud")])
def test_what_a_restart_may_mend_is_started_again_so_many_times(
  tmp_path, script, program, restarts, status, runs
):
  (tmp_path / program).write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\nexit {status}\n")
  (tmp_path / program).chmod(0o755)
  told = subprocess.run(
    ["bash", str(ROOT / "launch" / script), "--workdir=x"],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
    env={
      **os.environ,
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "NAME": "pod",
      "ZONE": "z",
      "SLURM_SUBMIT_DIR": str(ROOT),
      "RESTARTS": str(restarts),
    },
  )
  assert told.returncode == status
  assert (tmp_path / "runs").read_text().count("run") == runs
  assert told.stderr.count("restarting from its newest checkpoint") == runs - 1


@pytest.mark.parametrize(("statuses", "expected"), [((0, 3), 3), ((1, 2), 2)])
def test_a_local_job_has_the_status_of_the_process_that_failed(tmp_path, statuses, expected):
  program = tmp_path / "program"
  lines = [
    f'case "$*" in *--process={i}) exit {status};; esac' for i, status in enumerate(statuses)
  ]
  program.write_text("\n".join(["#!/bin/sh", *lines]))
  program.chmod(0o755)
  script = ROOT / "launch" / "local.sh"
  told = subprocess.run(
    ["bash", str(script), "2", "--workdir=x"],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "GATING_JAX": str(program)},
  )
  assert told.returncode == expected
  assert told.stderr.startswith("launch: a process of the job ended with status ")
  # Bash has this from version 4.3 or 5.1 on; that of macOS is 3.2.
  assert "wait -n" not in script.read_text()


def test_shellcheck_finds_nothing_in_the_shell_scripts():
  scripts = [
    *ROOT.glob("launch/*.sh"),
    *ROOT.glob("benchmarks/*.sh"),
    ROOT / "tests" / "run.sh",
    ROOT / ".ci" / "run",
  ]
  assert len(scripts) > 6
  done = subprocess.run(
    [shutil.which("shellcheck"), "-x", *map(str, scripts)],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_container_file_copies_what_is_there_and_what_its_installation_needs():
  lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
  steps = [line.split() for line in lines if line and not line.startswith("#")]
  copied = [source for step in steps if step[0] == "COPY" for source in step[1:-1]]
  assert copied
  assert all((ROOT / source).exists() for source in copied)
  installed = [
    step[step.index(option) + 1]
    for step in steps
    for option in ("--requirement", "--constraint")
    if option in step
  ]
  assert installed
  assert set(installed) <= set(copied)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  needed = {"pyproject.toml", project["readme"], *project["license-files"], "gating_jax", "configs"}
  assert needed <= set(copied[: copied.index("configs") + 1])
  assert json.loads(" ".join(steps[-1][1:])) == ["gating-jax"]
  assert "gating-jax" in project["scripts"]
  (user,) = (step[1] for step in steps if step[0] == "USER")
  assert user != "root"
