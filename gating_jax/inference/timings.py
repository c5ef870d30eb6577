"""Times of the ways to run a network on calibration images, and the choice among them.

Axes: N images.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.timing import MASKED, UNGATED
from gating_jax.types import Array

# A strategy must take less than this fraction of the time of the program it replaces.
GAIN = 0.97
# Largest time with every unit open, relative to computing everything.
OPEN_LIMIT = 1.05
# So many batches of calibration data are timed, or as many as hold so many images.
_BATCHES, _IMAGES = 4, 16


@dataclasses.dataclass(frozen=True)
class Timing:
  """The measured time of a part, or of the whole network (`part` None), by one strategy.

  Attributes:
    part: index of the part.
    strategy: its name. For the network also `chosen`, the mixture of the parts' fastest, and
      `ungated`; for one with early exits `masked`, `exit_dispatch` and `ungated`; for one that
      chooses segments `segments` in place of the second.
    mac_ratio: MACs that the timed examples leave open, relative to all; for the network with its
      gate networks; 1 for `ungated`.
    computed_ratio: MACs that the strategy computes for them, in the same way, padding included.
    seconds: of a call.
    time_ratio: `seconds` relative to `masked`.
    efficiency: `mac_ratio / time_ratio`; 1 if all MACs that were saved have saved time.
    chosen: whether this strategy runs.
    open_ratio: for the network: seconds of a call with every unit open, or no image leaving at an
      exit, relative to the faster of `masked` in that case and `ungated`; None for a part.
  """

  part: int | None
  strategy: str
  mac_ratio: float
  computed_ratio: float
  seconds: float
  time_ratio: float
  efficiency: float
  chosen: bool
  open_ratio: float | None = None


def rows(
  part: int | None,
  seconds: Mapping[str, float],
  mac_ratio: float,
  computed: Mapping[str, float],
  chosen: str = "",
  open_ratios: Mapping[str, float] = MappingProxyType({}),
) -> list[Timing]:
  """Returns a `Timing` for each strategy, by name, `masked` among them.

  Args:
    part: index of the part; None for the whole network.
    seconds: of a call, by strategy.
    mac_ratio: of the open units.
    computed: ratios of computed MACs, by strategy; 1 by default.
    chosen: name of the strategy that runs.
    open_ratios: `Timing.open_ratio`, by strategy.
  """
  found = []
  for name, spent in seconds.items():
    # `ungated` closes nothing, so all of its MACs are open.
    share, time_ratio = 1.0 if name == UNGATED else mac_ratio, spent / seconds[MASKED]
    found.append(
      Timing(
        part,
        name,
        share,
        computed.get(name, 1.0),
        spent,
        time_ratio,
        share / time_ratio,
        name == chosen,
        open_ratios.get(name),
      )
    )
  return found


def fastest(
  times: Mapping[tuple[str, bool], Sequence[float]], batches: int, open_limit: float
) -> tuple[str, dict[str, float], dict[str, float]]:
  """Chooses the fastest strategy that is not too slow with every unit open.

  Args:
    times: seconds of a run over all batches, by strategy and whether everything was open: `ungated`
      with False only, others with both.
    batches: number of batches.
    open_limit: of `compile_conditional`.
  Returns:
    The strategy; seconds of a call of each, and its `Timing.open_ratio`, `ungated` included.
  """
  seconds, open_seconds = (
    {
      name: statistics.median(spent) / batches
      for (name, wide), spent in times.items()
      if wide == opening
    }
    for opening in (False, True)
  )
  # The worst case is compared with the faster way to compute everything.
  dense = min(open_seconds[MASKED], seconds[UNGATED])
  ratios = {
    name: spent / dense for name, spent in {**open_seconds, UNGATED: seconds[UNGATED]}.items()
  }
  # `masked` is the fallback, so its own ratio must be within the limit.
  limit = max(open_limit, ratios[MASKED])
  best = min((name for name in open_seconds if ratios[name] <= limit), key=seconds.get)
  return best if seconds[best] < GAIN * seconds[MASKED] else MASKED, seconds, ratios


def spread_batches(images: Any, batch_size: int) -> list[Array]:
  """Returns a few batches spread over the images, which are repeated if they are too few."""
  count = min(max(_BATCHES, -(-_IMAGES // batch_size)), -(-len(images) // batch_size))
  index = np.linspace(0, len(images), count * batch_size, endpoint=False).astype(int)
  return [jnp.asarray(images[i]) for i in index.reshape(batch_size, count).T]


def run_over(run: Callable[..., Any], calls: Sequence[tuple]) -> None:
  """Runs calls one after the other, each to its end."""
  for args in calls:
    # Calls return before their results are there; without waiting they would overlap.
    jax.block_until_ready(run(*args))
