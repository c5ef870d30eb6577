"""The unit tests of functions and layers again, in modes of JAX that other projects turn on."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

# All at once: what passes in the strict modes with float64 as well has the values of float32, and
# mixes neither types nor ranks.
MODES = {
  "JAX_ENABLE_X64": "1",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
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
PARTS = ("tests/ops", "tests/layers")


@pytest.mark.slow
def test_unit_tests_of_ops_and_layers_pass_in_every_mode(tmp_path):
  jobs = {}
  for part in PARTS:  # all at once, since each works on one core for a minute
    with (tmp_path / part.replace("/", "_")).open("w") as said:
      jobs[part] = subprocess.Popen(
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
          part,
        ],
        cwd=ROOT,
        env=environment(devices=8, **MODES),
        stdout=said,
        stderr=subprocess.STDOUT,
      )
  statuses = {part: job.wait(1500) for part, job in jobs.items()}
  assert statuses == dict.fromkeys(PARTS, 0), [
    file.read_text()[-5000:] for file in tmp_path.iterdir()
  ]
