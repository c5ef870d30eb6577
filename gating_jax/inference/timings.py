"""What ways to run a network took on calibration images, and which of them to take.

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

GAIN = 0.97  # of the time of the program it replaces: what a strategy must stay under to be taken
OPEN_LIMIT = 1.05
_BATCHES, _IMAGES = (
  4,
  16,
)  # so many batches of calibration data are timed, or as many as hold so many images


@dataclasses.dataclass(frozen=True)
class Timing:
  """Of a part, or of the whole network (`part` None), by one strategy.

  Attributes:
    strategy: its name; of the network also `chosen`, the mixture of the parts' fastest, and `ungated`; of one with
      early exits `masked`, `exit_dispatch` and `ungated`, of one that chooses segments `segments` for the second.
    mac_ratio: MACs that the timed examples leave open, of all; of the network with its gate networks; 1 of `ungated`.
    computed_ratio: MACs that the strategy computes for them, in the same way, with all that it pads.
    seconds: of a call.
    time_ratio: `seconds` of those of `masked`.
    efficiency: `mac_ratio / time_ratio`; 1 where all MACs that were saved have saved time.
    chosen: whether it is what runs.
    open_ratio: of the network: seconds of a call with every unit open, or no image leaving at an exit, of the faster
      of `masked` then and `ungated`; None of a part.
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
  """A `Timing` for each strategy, by name, `masked` among them; `computed` are ratios, 1 by default."""
  found = []
  for name, spent in seconds.items():
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
  """The strategy to take; seconds of a call of each, and its `Timing.open_ratio`, `ungated` included.

  Args:
    times: of a run over all batches, by strategy, and whether everything was open: of `ungated` (False) alone, of
      others both.
    batches: how many.
    open_limit: of `compile_conditional`.
  """
  seconds, open_seconds = (
    {
      name: statistics.median(spent) / batches
      for (name, wide), spent in times.items()
      if wide == opening
    }
    for opening in (False, True)
  )
  dense = min(open_seconds[MASKED], seconds[UNGATED])
  ratios = {
    name: spent / dense for name, spent in {**open_seconds, UNGATED: seconds[UNGATED]}.items()
  }
  limit = max(open_limit, ratios[MASKED])  # what is taken otherwise is within no other
  best = min((name for name in open_seconds if ratios[name] <= limit), key=seconds.get)
  return best if seconds[best] < GAIN * seconds[MASKED] else MASKED, seconds, ratios


def spread_batches(images: Any, batch_size: int) -> list[Array]:
  """A few batches that are spread over the images, which are repeated where they are too few."""
  count = min(max(_BATCHES, -(-_IMAGES // batch_size)), -(-len(images) // batch_size))
  index = np.linspace(0, len(images), count * batch_size, endpoint=False).astype(int)
  return [jnp.asarray(images[i]) for i in index.reshape(batch_size, count).T]


def run_over(run: Callable[..., Any], calls: Sequence[tuple]) -> None:
  """Calls, one after the other's end."""
  for args in calls:
    jax.block_until_ready(run(*args))
