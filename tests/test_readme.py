"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_there_are_blocks():
  assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block):
  names = {}
  exec(compile(block, "README.md", "exec"), names)  # noqa: S102
  results = {name: names[name] for name in ("gradient", "macs", "errors", "result") if name in names}
  assert results
  if result := results.pop("result", None):
    np.testing.assert_allclose(result.outputs["logits"], names["outputs"]["logits"], atol=1e-5)
    assert 2 <= result.chosen == names["segments"].gates.sum()
  if "errors" in results:
    assert max(results["errors"].values()) < 1e-4
  else:
    assert all(value.shape in ((256, 64), (8,)) for value in results.values())
