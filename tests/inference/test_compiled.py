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
  chosen, seconds, ratios, everything = compiled.choose_fastest(times, 1, limit)
  assert chosen == taken
  assert everything == 1.0
  assert (seconds, ratios) == (
    {"masked": 1.0, "switch": 0.5, "ungated": 1.0},
    {"masked": masked, "switch": 1.08, "ungated": 1.0},
  )


def test_a_shape_that_is_no_shape_is_named():
  for shape in (8, (8, 8, 3.0)):
    with pytest.raises(
      ValueError, match=r"^input_shape must be \(H, W, D\), whole numbers >= 1; got"
    ):
      compiled.check_image_shape(shape)


def test_time_is_relative_to_the_quickest_way_to_compute_everything():
  """Here that is a strategy with a kernel of its own, with every unit open."""
  times = {
    ("masked", False): [2.0],
    ("masked", True): [2.0],
    ("native", False): [0.5],
    ("native", True): [0.8],
    ("ungated", False): [1.0],
  }
  choice = compiled.choose_fastest(times, 1, 1.05)
  assert (choice.strategy, choice.everything) == ("native", 0.8)
  timings = choice.timings(compiled.MacRatios(opened=0.5, computed={}))
  assert {timing.strategy: timing.time_ratio for timing in timings} == pytest.approx(
    {"masked": 2.5, "native": 0.625, "ungated": 1.25}
  )
  assert {timing.strategy: timing.efficiency for timing in timings} == pytest.approx(
    {"masked": 0.2, "native": 0.8, "ungated": 0.8}
  )


def test_the_baseline_takes_a_batch_at_once_or_one_by_one_whichever_is_quicker(monkeypatch):
  batches = [np.arange(6.0).reshape(3, 2), np.ones((3, 2))]
  weight, calls = np.float32(2), []

  def run(weights, x):
    calls.append(len(x))
    return weights * x

  programs = compiled.baseline_programs(run, weight, batches)
  assert list(programs) == ["ungated", "one by one"]
  singles = programs["one by one"].run(weight, batches[0])
  np.testing.assert_array_equal(np.concatenate(singles), 2 * batches[0])
  assert calls == [1, 1, 1]
  assert list(compiled.baseline_programs(run, weight, [np.ones((1, 2))])) == ["ungated"]
  tree = {"clips": batches[0], "valid": np.ones((3, 1), bool)}
  masked_run = lambda weights, batch: weights * batch["clips"] * batch["valid"]
  singles = compiled.baseline_programs(masked_run, weight, [tree])["one by one"].run(weight, tree)
  np.testing.assert_array_equal(np.concatenate(singles), 2 * batches[0])

  def race(runs, *_, **__):
    spent = {"ungated": 4.0, "one by one": 3.0}
    return {way: [spent.get(way.strategy, 5.0)] for way in runs}

  monkeypatch.setattr(compiled, "race", race)
  masked = compiled.TimedProgram(run, weight, open_weights=weight)
  choice = compiled.time_programs(
    {"masked": masked, **programs},
    batches,
    repeats=1,
    max_slowdown_all_open=1.05,
    advance=lambda: None,
  )
  assert choice.seconds == {"masked": 2.5, "ungated": 1.5}
  assert choice.everything == 1.5
