"""The unit tests of functions and layers once more, in modes of JAX that other projects turn on."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, environment

MODES = {
  "x64": {"JAX_ENABLE_X64": "1"},
  "strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_unit_tests_of_ops_and_layers_pass_in_every_mode(mode):
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "not slow", "--tb=short",
     "--ignore-glob=*/test_modes.py", "tests/ops", "tests/layers"],
    cwd=ROOT, env=environment(devices=8, **MODES[mode]), capture_output=True, text=True, timeout=1500, check=False)
  assert done.returncode == 0, done.stdout[-5000:]
