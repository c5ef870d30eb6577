"""Prefetching: a function of many items, computed ahead in threads or worker processes.

Reference: grain, https://google-grain.readthedocs.io.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
from absl import flags


def computed_ahead(
  fn: Callable[[Any], Any], items: Sequence[Any], workers: int, *, ahead: int = 8
) -> Iterator[Any]:
  """Computes `fn` of each item, in order, a bounded number of items ahead of the consumer.

  Args:
    fn: a function of one item; with workers, it and its result must be picklable.
    items: anything with a length and an index, such as a range; it is not copied.
    workers: number of worker processes; 0 for threads of this process.
    ahead: number of threads, and of results that they may hold ready. Each worker process holds up
      to two.
  Returns:
    An iterator of the results.

  >>> list(computed_ahead(lambda n: n * n, range(4), workers=0))
  [0, 1, 4, 9]
  """
  dataset = grain.MapDataset.source(items).map(fn)
  if not workers:
    return iter(
      dataset.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
    )
  # grain passes absl's flags on to the workers; outside absl programs nobody has parsed them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  # Few results per worker, since each may be a whole batch of images or videos.
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
  return iter(
    dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
      options
    )
  )
