"""Mutated videos are read correctly or refused in one line: no crash, hang or memory growth."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, mutated_videos

FEW, MANY = 60, 500


def test_mutated_videos_are_read_right_or_refused_in_one_line(tmp_path):
  whole = mutated_videos.write_whole(tmp_path / "whole")
  outcomes = [mutated_videos.check(seed, whole, tmp_path) for seed in range(FEW)]
  assert FEW / 5 < outcomes.count("read as it is played") < FEW / 2


@pytest.mark.slow
def test_no_mutated_video_crashes_or_stops_a_process_or_fills_its_memory(tmp_path):
  command = [
    sys.executable,
    "-m",
    "tests.helpers.mutated_videos",
    tmp_path,
    "1000",
    str(1000 + MANY),
  ]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  said = ended.stdout.splitlines()
  assert ended.returncode == 0, (
    f"status {ended.returncode} after {said[-1:]}: {ended.stderr[-2000:]}"
  )
  assert len(said) == MANY
  assert sum(line.endswith("read as it is played") for line in said) > MANY / 5
