"""Contenders are timed in turns."""

import os
import platform
import types

import jax
import pytest

from gating_jax import timing
from gating_jax.cores import usable_cores


@pytest.mark.parametrize(("settle", "calls"), [(False, "ababab"), (True, "abaabbaabb")])
def test_contenders_take_turns_after_a_warm_up(settle, calls):
  called = []
  times = timing.race(
    {name: lambda name=name: called.append(name) for name in "ab"}, 2, settle=settle
  )
  assert "".join(called) == calls
  assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
  assert all(second >= 0 for seconds in times.values() for second in seconds)


def test_each_first_call_and_each_turn_is_told():
  called = []
  note = lambda name: lambda: called.append(name)
  contenders = {"a": note("a"), "b": note("b")}
  timing.race(contenders, 2, on_start=note("start"), on_turn=note("turn"))
  assert called == ["a", "start", "b", "start", "a", "b", "turn", "a", "b", "turn"]


def test_a_device_that_is_no_processor_is_described_by_its_kind(monkeypatch):
  chip = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
  monkeypatch.setattr(jax, "devices", lambda: [chip])
  assert timing.device() == "gpu: NVIDIA H200"


def test_a_processor_without_a_name_is_described_by_its_architecture(monkeypatch):
  def read_text(path):
    raise FileNotFoundError(path)

  # As on macOS and Windows.
  monkeypatch.setattr(timing.Path, "read_text", read_text)
  monkeypatch.setattr(timing, "usable_cores", lambda: 1)
  assert timing.device() == f"cpu: {platform.machine()}, 1 core"


def test_cores_are_those_of_the_process_or_else_all(monkeypatch):
  monkeypatch.setattr(os, "cpu_count", lambda: 7)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
  assert usable_cores() == 2
  # As on macOS and Windows.
  monkeypatch.delattr(os, "sched_getaffinity")
  assert usable_cores() == 7
  monkeypatch.setattr(os, "cpu_count", lambda: None)
  assert usable_cores() == 1
