"""`benchmarks/accelerator.sh` as with an accelerator, as far as possible without one."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from gating_jax.ops.ecdf import EXCHANGES
from tests.helpers import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  for name in ("accelerator", "peaks", "throughput"):
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def accelerator(benchmarks):
  import accelerator

  return accelerator


def test_every_recipe_is_a_config(accelerator):
  import throughput

  found = {
    name: throughput.config_of(config, {"devices.steps_per_dispatch": "39"})
    for name, config in accelerator.RECIPES.items()
  }
  assert len(found) == 5
  assert {config.devices.steps_per_dispatch for config in found.values()} == {39}
  assert [config.model.gating for config in found.values()] == ["none"] + ["channel"] * 4
  assert [config.loss.sparsity.target for config in list(found.values())[1:]] == [
    0.75,
    0.5,
    0.25,
    0.26,
  ]
  assert [config.model.inner_width for config in found.values()] == [1, 1, 1, 1, 4]


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(
  accelerator, tmp_path, capsys
):
  job = accelerator.Job(tmp_path, 60)
  run = lambda name, program, limit=30, **options: job.run(
    name, [sys.executable, "-c", program], limit, **options
  )
  said = run("device", "print('{\"devices\": 1}')")
  assert json.loads(said) == {"devices": 1}
  assert run("fails", "raise SystemExit('no memory')") is None
  begun = time.monotonic()
  assert run("sleeps", "import time; time.sleep(50)", 6) is None
  assert time.monotonic() - begun < 20
  run(
    "rows",
    "import sys, pathlib; pathlib.Path(sys.argv[1].partition('=')[2]).write_text('[1, 2]')",
    rows=True,
  )
  job.before = time.monotonic() + 1
  assert run("late", "print('never')") is None
  with pytest.raises(SystemExit, match="not done: fails, sleeps, late"):
    job.finish()
  assert "no memory" in capsys.readouterr().out
  written = json.loads((tmp_path / "accelerator.json").read_text())
  assert written["device"] == {"devices": 1}
  assert {name: part["status"] for name, part in written["parts"].items()} == {
    "device": 0,
    "fails": 1,
    "sleeps": "stopped",
    "rows": 0,
    "late": "left out",
  }
  assert written["parts"]["rows"]["rows"] == [1, 2]


def test_the_time_that_making_the_environment_took_counts(accelerator, tmp_path, capsys):
  begun = time.monotonic()
  job = accelerator.Job(tmp_path, 1000, elapsed=400)
  np.testing.assert_allclose([job.end - begun, job.before - begun], [600, 0.45 * 600], atol=1)
  late = accelerator.Job(tmp_path, 60, elapsed=58)
  assert late.run("device", [sys.executable, "-c", "print('never')"], 120) is None
  with pytest.raises(SystemExit, match="not done: device"):
    late.finish()
  written = json.loads((tmp_path / "accelerator.json").read_text())
  assert written["device"] is None
  assert 58 <= written["seconds"] < 60


def test_recipes_share_the_time_that_is_left_by_their_speed(accelerator, tmp_path, monkeypatch):
  job = accelerator.Job(tmp_path, 1000)
  speeds = {"a": 50000.0, "b": 50000.0, "c": 1e9}
  job.parts["throughput"] = {
    "rows": [{"config": name, "train_images_per_second": rate} for name, rate in speeds.items()]
  }
  commands = []

  def run(name, command, limit):
    commands.append((command, limit))
    job.parts[name] = {"status": 0, "seconds": 250}
    (tmp_path / name).mkdir()
    if name == "recipe0":  # 50 s more than its epochs, at one a second, take
      job.parts[name]["seconds"] = int(command[3].split("=")[-1]) + 50
      (tmp_path / name / "result.json").write_text(json.dumps({"accuracy": 0.9, "macs": 8.0}))
      return
    line = {"step": 1, "split": "test", "accuracy": 0.5, "macs": 7.0}
    (tmp_path / name / "metrics.jsonl").write_text(
      json.dumps(line) + "\n" + json.dumps({**line, "split": "train"})
    )

  monkeypatch.setattr(job, "run", run)
  args = type("", (), {"smoke": False, "data": tmp_path})
  monkeypatch.setattr(accelerator, "OVERHEAD", 100)
  accelerator.train(job, {"first": "a", "second": "b", "third": "c", "fourth": "d"}, args)
  limits = [limit for _, limit in commands]
  # No time passes here: more for each.
  np.testing.assert_allclose(limits, [250, 333, 500, 1000], atol=5)
  epochs = [job.parts[f"recipe{i}"]["epochs"] for i in range(4)]
  # Then as measured.
  np.testing.assert_allclose(epochs[:2], [0.85 * (250 - 100), 0.85 * (333 - 50)], atol=3)
  assert epochs[2:] == [500, 1]  # at most the full recipe; one if the speed is unknown
  assert f"--config=a,epochs={epochs[0]}" in commands[0][0]
  outcomes = [
    [job.parts[f"recipe{i}"][key] for key in ("finished", "accuracy", "macs", "mac_ratio")]
    for i in (0, 1)
  ]
  assert outcomes == [[True, 0.9, 8.0, None], [False, 0.5, 7.0, None]]


def test_peaks_are_found_by_the_kind_of_device(benchmarks):
  import peaks

  assert peaks.peaks("NVIDIA H100 80GB HBM3")[0] == "H100"
  assert peaks.peaks("NVIDIA H200")[1].memory > peaks.peaks("NVIDIA H100 80GB HBM3")[1].memory
  assert peaks.peaks("TPU v5 lite")[1].bfloat16 < peaks.peaks("TPU v5p")[1].bfloat16
  assert peaks.peaks("cpu") == (None, None)
  made = peaks.Peaks(bfloat16=100.0, float32=50.0, memory=10.0)
  assert (made.seconds("float32", 200, 10), made.seconds("bfloat16", 200, 30)) == (4, 3)


def script(*arguments, **environment):
  return subprocess.run(
    ["bash", "benchmarks/accelerator.sh", *arguments],
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=False,
    env={**os.environ, "PYTHON": sys.executable, **environment},
    timeout=580,
  )


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("arguments", "environment", "message"),
  [
    (["--data=nowhere"], {}, "--data must be a TFDS folder with cifar10 in it; got nowhere"),
    (["--out=benchmarks"], {}, "--out must be a new folder; got benchmarks"),
    (["--minutes=0"], {}, "--minutes must be above 0"),
    ([], {"PYTHON": "/nowhere/python"}, "/nowhere/python must be Python 3.11 or newer with jax"),
  ],
)
def test_what_it_cannot_do_it_says(arguments, environment, message):
  done = script(*arguments, **environment)
  assert done.returncode == 2
  assert message in done.stderr


@pytest.mark.slow
def test_the_smallest_form_goes_through(tmp_path):
  out = tmp_path / "out"
  done = script("--smoke", f"--out={out}")
  assert done.returncode == 0, done.stdout + done.stderr
  written = json.loads((out / "accelerator.json").read_text())
  parts = written["parts"]
  assert list(parts) == [
    "device",
    "throughput",
    "kernels",
    "loss",
    "exchange",
    "training_step",
    "recipe0",
  ]
  assert {part["status"] for part in parts.values()} == {0}
  assert parts["throughput"]["rows"][0]["train_images_per_second"] > 0
  forms = [row["form"] for row in parts["kernels"]["rows"]]
  assert forms == ["dense", "masked", "dispatched", "kernel"] * 3
  assert all(row["gap"] < 1e-5 for row in parts["kernels"]["rows"] if row["form"] == "kernel")
  loss = {row["form"]: row for row in parts["loss"]["rows"]}
  assert list(loss)[:3] == ["ours", "ours, other sort", "plain autodiff"]
  assert {loss[form]["sort"] for form in list(loss)[:2]} == {
    "compare-exchange network",
    "XLA's sort",
  }
  assert all(row["seconds"] > 0 and row["value_gap"] < 1e-5 for row in loss.values())
  assert [row["exchange"] for row in parts["exchange"]["rows"]] == list(EXCHANGES)
  assert all(row["seconds"] > 0 for row in parts["exchange"]["rows"])
  steps = {row["form"]: row["seconds"] for row in parts["training_step"]["rows"]}
  assert list(steps) == ["ungated step", "gated step", "batch-shaping term", "import"]
  assert min(steps.values()) > 0
  recipe = parts["recipe0"]
  result = json.loads((out / "recipe0" / "result.json").read_text())
  assert (recipe["finished"], recipe["accuracy"], recipe["macs"]) == (
    True,
    result["accuracy"],
    result["macs"],
  )
  table = (out / "accelerator.txt").read_text()
  assert "== kernels" in table
  assert f"{100 * result['accuracy']:.2f}" in table.splitlines()[-1]
