"""The unit tests of functions and layers again, in modes of JAX that other projects turn on."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

MODES = {
  "x64": {"JAX_ENABLE_X64": "1"},
  "strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
}


@pytest.mark.slow
def test_unit_tests_of_ops_and_layers_pass_in_every_mode(tmp_path):
  jobs = {}
  for mode, variables in MODES.items():  # all at once, since each works on one core for minutes
    with (tmp_path / mode).open("w") as said:
      jobs[mode] = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "pytest",
          "-p",
          "no:xdist",
          "-m",
          "not slow",
          "--tb=short",
          "--ignore-glob=*/test_modes.py",
          "tests/ops",
          "tests/layers",
        ],
        cwd=ROOT,
        env=environment(devices=8, **variables),
        stdout=said,
        stderr=subprocess.STDOUT,
      )
  statuses = {mode: job.wait(1500) for mode, job in jobs.items()}
  assert statuses == dict.fromkeys(MODES, 0), [
    (tmp_path / mode).read_text()[-5000:] for mode in MODES
  ]
