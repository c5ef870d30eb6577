"""Batches, timings and choices of all compiled networks."""

import numpy as np
import pytest

from gating_jax.inference import compiled


@pytest.mark.parametrize(("size", "batches"), [(1, 16), (2, 8), (8, 4), (64, 2)])
def test_four_batches_are_timed_or_as_many_as_hold_16_images(size, batches):
  x = np.arange(128, dtype=np.float32).reshape(128, 1, 1, 1)
  found = compiled.spread_batches(x, size)
  assert [len(batch) for batch in found] == [size] * batches
  assert len(np.unique(np.concatenate(found))) == size * batches
  assert len(compiled.spread_batches(x[:3], 1)) == 3


@pytest.mark.parametrize(
  ("masked", "limit", "taken"), [(1.1, 1.05, "switch"), (1.0, 1.05, "masked"), (1.0, 1.1, "switch")]
)
def test_what_runs_is_never_slower_with_everything_open_than_what_it_replaces(masked, limit, taken):
  """Gate networks that cost a tenth are in every strategy."""
  times = {
    ("masked", False): [1.0],
    ("masked", True): [masked],
    ("switch", False): [0.5],
    ("switch", True): [1.08],
    ("ungated", False): [1.0],
  }
  chosen, seconds, ratios = compiled.choose_fastest(times, 1, limit)
  assert chosen == taken
  assert (seconds, ratios) == (
    {"masked": 1.0, "switch": 0.5, "ungated": 1.0},
    {"masked": masked, "switch": 1.08, "ungated": 1.0},
  )
