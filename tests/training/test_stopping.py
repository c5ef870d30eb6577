import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from gating_jax.training import stopping
from gating_jax.training.stopping import StopRequest


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_do_as_before_outside_the_loop(number):
  previous = signal.getsignal(number)
  with StopRequest() as stop:
    assert signal.getsignal(number) != previous
    assert not stop.requested
    send(number)
    assert stop.requested
  assert signal.getsignal(number) == previous


def test_a_handler_that_python_cannot_put_back_is_left_alone(monkeypatch):
  set_anew = []
  monkeypatch.setattr(
    signal, "getsignal", lambda number: None if number == signal.SIGTERM else signal.SIG_DFL
  )
  monkeypatch.setattr(signal, "signal", lambda number, handler: set_anew.append(number))
  with StopRequest():
    pass
  assert set_anew == [signal.SIGINT, signal.SIGINT]


@pytest.mark.parametrize(
  ("number", "answered", "ended"),
  [(signal.SIGTERM, False, True), (signal.SIGTERM, True, False), (signal.SIGINT, False, False)],
)
def test_a_sigterm_that_is_not_answered_in_time_ends_the_process(
  monkeypatch, number, answered, ended
):
  called = threading.Event()
  monkeypatch.setattr(stopping, "_PATIENCE", 0.2)
  monkeypatch.setattr(stopping, "_end_process", lambda number: called.set())
  with StopRequest() as stop:
    if answered:
      stop.answer()
    send(number)
    assert called.wait(5.0 if ended else 0.6) == ended
    assert stop.requested
  assert signal.set_wakeup_fd(-1) == -1


def test_a_second_ctrl_c_ends_a_process_whose_main_thread_is_busy(monkeypatch, capfd):
  ended, called = [], threading.Event()
  monkeypatch.setattr(stopping, "_PATIENCE_AGAIN", 0.05)
  monkeypatch.setattr(stopping, "_end_process", lambda number: (ended.append(number), called.set()))
  # In place of a main thread that compiles, in which no handler runs.
  previous = signal.signal(signal.SIGINT, lambda *_: None)
  watch = stopping._Deadline()
  try:
    send(signal.SIGINT)
    assert not called.wait(0.3)
    assert "stopping after this step" in capfd.readouterr().err
    send(signal.SIGINT)
    assert called.wait(5.0)
  finally:
    watch.close()
    signal.signal(signal.SIGINT, previous)
  assert ended == [signal.SIGINT]


@pytest.mark.parametrize(
  ("handler", "interrupted"), [(signal.default_int_handler, True), (signal.SIG_IGN, False)]
)
def test_a_ctrl_c_that_a_launch_script_handles_does_not_count_as_the_users(handler, interrupted):
  previous = signal.signal(signal.SIGINT, handler)
  try:
    with StopRequest() as stop:
      send(signal.SIGINT)
      assert (stop.requested, stop.interrupted) == (True, interrupted)
  finally:
    signal.signal(signal.SIGINT, previous)


def test_signals_of_an_event_loop_go_on_to_it_and_ctrl_c_is_confirmed(capfd):
  mine, other = socket.socketpair()
  for end in (mine, other):
    end.setblocking(False)
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.set_wakeup_fd(mine.fileno())
  try:
    with StopRequest() as stop:
      send(signal.SIGINT)
      assert (stop.requested, stop.interrupted) == (True, True)
    assert other.recv(1) == bytes([signal.SIGINT])
  finally:
    restored, own = signal.set_wakeup_fd(-1), mine.fileno()
    signal.signal(signal.SIGINT, previous)
    mine.close()
    other.close()
  assert restored == own
  assert capfd.readouterr().err.count("stopping after this step") == 1


def test_other_signals_stop_nothing(monkeypatch):
  ended, seen = [], []
  monkeypatch.setattr(stopping, "_PATIENCE_AGAIN", 0.01)
  monkeypatch.setattr(stopping, "_end_process", ended.append)
  previous = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
  try:
    with StopRequest() as stop:
      send(signal.SIGUSR1)
      # Ten times as long as it waits before it ends the process.
      time.sleep(0.1)
      assert (seen, ended, stop.requested) == ([signal.SIGUSR1], [], False)
  finally:
    signal.signal(signal.SIGUSR1, previous)


def test_a_process_that_must_end_at_once_ends_its_workers_first(monkeypatch, capsys):
  worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
  worker.start()
  ended = []
  # Those of other tests must live on.
  monkeypatch.setattr(stopping.multiprocessing, "active_children", lambda: [worker])
  monkeypatch.setattr(stopping.os, "_exit", lambda status: ended.append(status))
  stopping._end_process(signal.SIGTERM)
  worker.join(10)
  assert worker.exitcode == -signal.SIGKILL
  assert ended == [128 + signal.SIGTERM]
  assert "run the same command to resume from the newest one" in capsys.readouterr().out


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_interrupts_where_a_stop_was_asked_for_already(first):
  with StopRequest():
    send(first)
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
