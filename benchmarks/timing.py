"""How the benchmarks time: contenders in turns, so that drifts of the machine hit all alike."""

import time

import jax


def race(contenders, repeats, *, settle=False):
  """Seconds of each contender's calls, taken in turns after a warm-up.

  With `settle` every turn begins with a call that is not timed, which finds the caches and the memory pool as another
  contender left them.
  """
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  for _ in range(repeats):
    for name, run in contenders.items():
      if settle:
        jax.block_until_ready(run())
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return times
