import asyncio
import json
import math
import os
import re
import signal
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gating_jax.training import devices, loop, stopping
from gating_jax.training.checkpoints import Checkpoints
from gating_jax.training.journal import METRICS_FILE, Journal
from gating_jax.training.loop import LoopSettings, NonFiniteError

METRICS = (
  "loss",
  "cross_entropy",
  "l0_coefficient",
  "gate_rate/layer00",
  "gradient_norm",
  "state_norm",
)


class Run:
  """Runs a loop on a toy problem: each step adds its number to `w`.

  `metrics_at` and `before` change single steps.
  """

  def __init__(self, folder, k=1, metrics_at=None, before=None, first_step=0):
    self.folder, self.k, self.before = folder, k, before or {}
    self.metrics_at, self.first_step = metrics_at or {}, first_step
    self.evaluated, self.calls = [], []

  def advance(self, state, step):
    self.calls.append(step)
    self.before.get(step, lambda: None)()
    numbers = np.arange(step, step + self.k)
    metrics = {
      name: [self.metrics_at.get((name, int(i)), 1.0 + i) for i in numbers] for name in METRICS
    }
    bad = not all(math.isfinite(v) for v in metrics["loss"])
    w = state["w"] + (math.nan if bad else float(numbers.sum()))
    return {"w": w}, {name: jnp.asarray(values) for name, values in metrics.items()}

  def __call__(self, total=12, evaluate=True, start=None, watch=lambda step, means: (), **settings):
    checkpoints = Checkpoints(self.folder / "checkpoints", keep=100)
    journal = Journal(self.folder, self.first_step, total)
    state = {"w": devices.replicate(jnp.float32(0))} if start is None else start
    try:
      return loop.train(
        state,
        self.first_step,
        self.advance,
        settings=LoopSettings(total_steps=total, steps_per_dispatch=self.k, **settings),
        checkpoints=checkpoints,
        journal=journal,
        watch=watch,
        evaluate=(lambda state, step: self.evaluated.append((step, float(state["w"]))))
        if evaluate
        else None,
      )
    finally:
      journal.close()
      checkpoints.close()

  def saved(self):
    """Every checkpoint's `w`, by step."""
    with ocp.StandardCheckpointer() as reader:
      return {
        int(folder.name): float(
          reader.restore(folder / "state", {"w": np.zeros((), np.float32)})["w"]
        )
        for folder in (self.folder / "checkpoints").iterdir()
      }

  def newest(self):
    checkpoints = Checkpoints(self.folder / "checkpoints")
    like = {"w": jax.ShapeDtypeStruct((), jnp.float32)}
    try:
      return checkpoints.restore(like, devices.replicated_sharding())
    finally:
      checkpoints.close()

  def lines(self):
    return [json.loads(line) for line in (self.folder / METRICS_FILE).read_text().splitlines()]


def sums(*steps):
  return {step: step * (step - 1) / 2 for step in steps}


def test_every_step_is_taken_once_and_the_end_is_saved(tmp_path):
  run = Run(tmp_path)
  state, step = run(total=12)
  assert run.calls == list(range(12))
  assert (float(state["w"]), step) == (66, 12)
  assert run.saved() == sums(12)


@pytest.mark.parametrize(("k", "calls"), [(1, 12), (3, 4), (4, 3)])
def test_several_steps_per_call_reach_the_same_end(tmp_path, k, calls):
  run = Run(tmp_path, k=k)
  state, step = run(total=12, log_every=6, checkpoint_every=6, eval_every=6)
  assert len(run.calls) == calls
  assert (float(state["w"]), step) == (66, 12)


@pytest.mark.parametrize(
  ("k", "every", "due"),
  [(1, 5, [5, 10, 12]), (3, 5, [6, 12]), (4, 5, [8, 12]), (3, 3, [3, 6, 9, 12]), (1, 50, [12])],
)
def test_lines_and_checkpoints_come_at_least_every_so_many_steps(tmp_path, k, every, due):
  run = Run(tmp_path, k=k)
  run(total=12, log_every=every, checkpoint_every=every)
  assert [line["step"] for line in run.lines()] == due
  assert run.saved() == sums(*due)


def test_a_line_is_the_mean_since_the_last_one(tmp_path):
  run = Run(tmp_path, k=2)
  run(total=8, log_every=4)
  assert [(line["step"], line["split"], line["loss"]) for line in run.lines()] == [
    (4, "train", np.mean([1, 2, 3, 4])),
    (8, "train", np.mean([5, 6, 7, 8])),
  ]


def test_the_line_for_people_leaves_out_layers_and_coefficients(tmp_path, capfd):
  Run(tmp_path)(total=1)
  assert "step 1/1  loss 1 (cross-entropy 1), open gates 100.0 %\n" in capfd.readouterr().out


def test_what_the_watch_finds_in_a_line_is_said_after_it(tmp_path, capfd):
  watched = []

  def watch(step, means):
    watched.append((step, means["loss"]))
    return ["warning: so it is"] if step == 4 else []

  Run(tmp_path)(total=6, log_every=2, watch=watch)
  assert watched == [(2, 1.5), (4, 3.5), (6, 5.5)]
  said = [re.sub(r"^.*?(?=step)", "", line) for line in capfd.readouterr().out.splitlines()]
  at = said.index("step 4/6  warning: so it is")
  assert said[at - 1].startswith("step 4/6  ")
  assert said[at + 1].startswith("step 6/6  ")
  assert len([line for line in said if "warning" in line]) == 1
  watched.clear()
  Run(tmp_path, first_step=6)(total=8, log_every=2, watch=watch)
  # The journal's lines, then the following ones.
  assert watched == [
    (2, 1.5),
    (4, 3.5),
    (6, 5.5),
    (8, 7.5),
  ]
  assert "warning" not in capfd.readouterr().out


def test_evaluation_is_due_in_between_but_not_at_the_end(tmp_path):
  run = Run(tmp_path)
  run(total=12, eval_every=4)
  assert run.evaluated == [(4, 6), (8, 28)]
  never = Run(tmp_path / "never")
  never.folder.mkdir()
  never(total=12, eval_every=0)
  assert never.evaluated == []


def test_evaluation_comes_before_the_checkpoint_of_its_step(tmp_path):
  run = Run(tmp_path)

  def stop(*_):
    raise RuntimeError("killed while evaluating")

  run.evaluated = type("Evaluated", (), {"append": stop})()
  with pytest.raises(RuntimeError, match="killed"):
    run(total=12, eval_every=4, checkpoint_every=2)
  assert run.saved() == sums(2)


def test_training_goes_on_from_its_first_step(tmp_path):
  Run(tmp_path)(total=6, checkpoint_every=3)
  step, state = Run(tmp_path).newest()
  assert (step, float(state["w"])) == (6, 15)
  resumed = Run(tmp_path, first_step=step)
  state, step = resumed(total=12, start=state)
  assert resumed.calls == list(range(6, 12))
  assert (float(state["w"]), step) == (66, 12)


def test_a_run_already_at_its_end_takes_no_step(tmp_path):
  run = Run(tmp_path, first_step=12)
  _, step = run(total=12)
  assert (run.calls, step) == ([], 12)
  assert run.saved() == {}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, k, value):
  run = Run(tmp_path, k=k, metrics_at={("loss", 7): value, ("cross_entropy", 7): value})
  message = rf"cross_entropy is {value} at step 8 \(not finite: cross_entropy, loss\)"
  with pytest.raises(NonFiniteError, match=message):
    run(total=12, log_every=1, checkpoint_every=3)
  assert run.saved() == sums(3, 6)
  step, state = run.newest()
  assert (step, float(state["w"])) == (6, 15)
  assert all(math.isfinite(line["loss"]) for line in run.lines())


@pytest.mark.parametrize("at", [2, 3, 5, 11])
def test_nothing_that_is_not_finite_is_saved_wherever_it_appears(tmp_path, at):
  run = Run(tmp_path, metrics_at={("loss", at): math.nan})
  with pytest.raises(NonFiniteError, match=f"loss is nan at step {at + 1} "):
    run(total=12, log_every=50, checkpoint_every=3)
  assert run.saved() == sums(*range(3, at + 1, 3))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
  run = Run(tmp_path, metrics_at={("gradient_norm", 4): math.inf})
  with pytest.raises(
    NonFiniteError, match=r"gradient_norm is inf at step 5 \(not finite: gradient_norm\)"
  ):
    run(total=12)


def test_a_state_that_is_not_finite_stops_the_run(tmp_path):
  run = Run(tmp_path, metrics_at={("state_norm", 4): math.inf})
  with pytest.raises(
    NonFiniteError, match=r"state_norm is inf at step 5 \(not finite: state_norm\)"
  ):
    run(total=12, checkpoint_every=5)
  assert run.saved() == {}


def send(number=signal.SIGTERM):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("k", "stops_at"), [(1, 6), (4, 8)])
def test_a_signal_saves_where_it_stopped(tmp_path, k, stops_at, number, capfd):
  run = Run(tmp_path, k=k, before={5 // k * k: lambda: send(number)})
  state, step = run(total=12)
  assert step == stops_at
  assert float(state["w"]) == sums(step)[step]
  assert run.saved() == sums(step)
  resumed = Run(tmp_path, k=k, first_step=step)
  assert float(resumed(total=12, start=state)[0]["w"]) == 66
  # Someone waits after Ctrl-C alone.
  confirmed = "stopping after this step; Ctrl-C again ends at once"
  assert capfd.readouterr().err.count(confirmed) == (number == signal.SIGINT)


def test_sigterm_before_the_first_step_saves_nothing_new(tmp_path):
  run = Run(tmp_path, metrics_at={("loss", 0): math.nan}, before={0: send})
  with pytest.raises(NonFiniteError, match="at step 1 "):
    run(total=12)
  assert run.saved() == {}


def test_training_on_another_thread_leaves_signals_alone(tmp_path):
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with futures.ThreadPoolExecutor(1) as threads:
    state, step = threads.submit(Run(tmp_path), total=2).result()
  assert (float(state["w"]), step) == (1, 2)
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_training_goes_within_a_running_event_loop_as_in_a_notebook(tmp_path):
  async def cell():
    return Run(tmp_path)(total=2, checkpoint_every=1)

  state, step = asyncio.run(cell())
  assert (float(state["w"]), step) == (1, 2)
  assert Run(tmp_path).saved() == sums(1, 2)


def test_the_loop_answers_a_request_before_it_saves(tmp_path, monkeypatch):
  called = []
  monkeypatch.setattr(stopping, "_PATIENCE", 1.0)
  monkeypatch.setattr(stopping, "_end_process", lambda number: called.append("ended"))
  saved = Checkpoints.save

  def save_slowly(self, *what):
    time.sleep(1.5)
    return saved(self, *what)

  monkeypatch.setattr(Checkpoints, "save", save_slowly)
  run = Run(tmp_path, before={2: lambda: send(signal.SIGTERM)})
  _, step = run(total=12, checkpoint_every=100)
  assert step == 3
  assert called == []


def test_a_slow_step_is_told_while_it_lasts(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loop, "_SILENCE", 0.1)
  monkeypatch.setattr(loop, "_LOOK", 0.02)

  def wait_for_a_line():
    assert "step 2/4  training\n" not in capsys.readouterr().out
    time.sleep(0.5)
    assert "step 2/4  training\n" in capsys.readouterr().out

  Run(tmp_path, before={2: wait_for_a_line})(total=4, log_every=4)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(total_steps=0), "total_steps must be >= 1; got 0"),
    (dict(total_steps=5, log_every=0), "log_every must be >= 1; got 0"),
    (dict(total_steps=5, checkpoint_every=-1), "checkpoint_every must be >= 1; got -1"),
    (dict(total_steps=5, eval_every=-1), "eval_every must be >= 0; got -1"),
    (dict(total_steps=5, steps_per_dispatch=0), "steps_per_dispatch must be >= 1; got 0"),
    (
      dict(total_steps=5, steps_per_dispatch=2),
      "total_steps must be a multiple of steps_per_dispatch; got 5 and 2",
    ),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    LoopSettings(**settings)
