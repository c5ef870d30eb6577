"""The unit tests of functions and layers again, in modes of JAX that other projects turn on."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

MODES = {
  "x64": {"JAX_ENABLE_X64": "1"},
  "strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
}
# `ops/test_modes.py` runs in every mode what these files test: the loss over devices, and kernels.
# The last one tests formulas that are not ours.
ELSEWHERE = (
  "test_modes",
  "test_ecdf_devices",
  "test_native_kernels",
  "test_pallas_kernels",
  "test_authors",
)


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
          *(f"--ignore-glob=*/{name}.py" for name in ELSEWHERE),
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
