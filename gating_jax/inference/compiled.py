"""Parts that all compiled networks share: checks, batches of images, timings, and the choice by them.

Axes: N images of H x W pixels and D channels.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.ops import arguments
from gating_jax.timing import MASKED, UNGATED
from gating_jax.types import Array

# The strategy that is chosen by timing.
AUTO = "auto"
# A strategy must take less than this fraction of the time of the program it replaces.
GAIN = 0.97
# Largest time with every unit open, relative to computing everything.
MAX_SLOWDOWN_ALL_OPEN = 1.05
# So many batches of calibration data are timed, or as many as hold so many images.
_BATCHES, _IMAGES = 4, 16


def check_images(name: str, x: Any, shape: Sequence[int] | None = None) -> Array:
  """Checks `[N, H, W, D]` network inputs of any floating-point type, and returns them in float32.

  Args:
    name: of the argument.
    x: the array.
    shape: `(H, W, D)`; None for any.
  Raises:
    ValueError: another rank, shape or type, such as pixels in uint8 that are not normalised.
  """
  # jax arrays stay on their device.
  x = x if hasattr(x, "dtype") else np.asarray(x)
  if x.ndim != 4 or (shape is not None and tuple(x.shape[1:]) != tuple(shape)):
    wanted = "N, H, W, D" if shape is None else ", ".join(map(str, ("N", *shape)))
    raise ValueError(f"{name} must be [{wanted}]; got shape {tuple(x.shape)}")
  # uint8 pixels would be cast without an error, and give wrong outputs.
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be network inputs in floating point, normalised as in training; got {x.dtype}"
    )
  return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def check_finite(name: str, x: Any) -> np.ndarray:
  """Returns the images in host memory.

  Raises:
    ValueError: an image has NaN or infinity.
  """
  x = np.asarray(x)
  good = np.isfinite(x).all(axis=(1, 2, 3))
  if not good.all():
    raise ValueError(f"{name} must be finite; index {int(np.argmin(good))} of {len(x)} is not")
  return x


def check_image_shape(shape: Any) -> tuple[int, int, int]:
  """Returns `(H, W, D)` as a tuple.

  Raises:
    ValueError: it is not three whole numbers >= 1.
  """
  try:
    # `index` takes numpy's whole numbers as well, and no floats.
    sizes = tuple(operator.index(size) for size in shape)
  except TypeError:
    sizes = ()
  if len(sizes) != 3 or min(sizes) < 1:
    raise ValueError(f"input_shape must be (H, W, D), whole numbers >= 1; got {shape!r}")
  return sizes


def check_arguments(
  strategy: str,
  input_shape: tuple[int, int, int],
  batch_size: int,
  buckets: int,
  calibration: Any,
  repeats: int,
  max_slowdown_all_open: float,
) -> np.ndarray | None:
  """Checks the arguments of a compilation, and returns the calibration images.

  Raises:
    TypeError, ValueError: naming the first argument that is wrong, or missing.
  """
  for name, value in (("batch_size", batch_size), ("buckets", buckets), ("repeats", repeats)):
    arguments.whole_number(name, value)
  arguments.number("max_slowdown_all_open", max_slowdown_all_open, "> 0", lambda v: v > 0)
  if calibration is None:
    if strategy == AUTO:
      raise ValueError(f"calibration must be given for strategy {strategy!r}; got None")
    return None
  calibration = check_finite("calibration", check_images("calibration", calibration, input_shape))
  if not len(calibration):
    raise ValueError("calibration must hold at least one image; got none")
  return calibration


def in_batches(run: Callable[[Array], Any], x: Array, size: int) -> Any:
  """Applies `run`, which takes `size` examples, to any number of them."""
  if len(x) == size:
    return run(x)
  # At least one call, so that no images give empty outputs of the right shapes.
  parts = [run(_padded(x[i : i + size], size)) for i in range(0, max(1, len(x)), size)]
  return jax.tree.map(lambda *pieces: jnp.concatenate(pieces)[: len(x)], *parts)


def _padded(x: Array, count: int) -> Array:
  # Zeros are computed with the rest, and `in_batches` cuts them off.
  missing = count - len(x)
  return jnp.pad(jnp.asarray(x), [(0, missing), *[(0, 0)] * 3]) if missing else x


def spread_indices(count: int, most: int) -> np.ndarray:
  """Returns the indices of at most `most` of `count` images, evenly over all."""
  return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


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
  times: Mapping[tuple[str, bool], Sequence[float]], batches: int, max_slowdown_all_open: float
) -> tuple[str, dict[str, float], dict[str, float]]:
  """Chooses the fastest strategy that is not too slow with every unit open.

  Args:
    times: seconds of a run over all batches, by strategy and whether everything was open: `ungated`
      with False only, others with both.
    batches: number of batches.
    max_slowdown_all_open: of `compile_conditional`.
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
  limit = max(max_slowdown_all_open, ratios[MASKED])
  best = min((name for name in open_seconds if ratios[name] <= limit), key=seconds.get)
  return best if seconds[best] < GAIN * seconds[MASKED] else MASKED, seconds, ratios
