"""Types: the package and code of users check, and mistakes are found."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow


def test_the_package_and_code_of_users_check_and_mistakes_are_found():
  done = subprocess.run(
    [sys.executable, "-m", "pyright", "--outputjson"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  found = json.loads(done.stdout)
  lines = [
    f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}"
    for each in found["generalDiagnostics"]
  ]
  assert not lines, "\n".join(lines)
  assert found["summary"]["filesAnalyzed"] > 100
