"""One of two processes that share a batch: `two_processes.py PORT PROCESS FILE.npz`.

Writes the value and the gradients found in every way, with each exchange. `test_ecdf_devices.py`
starts both processes.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gating_jax.ops.ecdf import EXCHANGES
from tests.helpers.spread_loss import AXIS, by_pmap, by_shard_map, fixed_prior, problem


def main(port, process, path):
  jax.distributed.initialize(
    coordinator_address=f"localhost:{port}",
    num_processes=2,
    process_id=int(process),
    heartbeat_timeout_seconds=10,
  )
  params, batch = problem()
  mine = jax.tree.map(lambda a: np.split(a, 2)[jax.process_index()], batch)
  whole = NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec(AXIS))
  spread = jax.tree.map(lambda a: jax.make_array_from_process_local_data(whole, a), mine)
  results = {}
  for exchange in EXCHANGES:
    of_devices = by_pmap(params, mine, fixed_prior, exchange)
    ways = {
      "pmap": jax.tree.map(lambda a: a.addressable_data(0)[0], of_devices),
      "shard_map": by_shard_map(params, spread, fixed_prior, exchange),
      "check_vma": by_shard_map(params, spread, fixed_prior, exchange, check_vma=True),
    }
    for way, (value, gradient) in ways.items():
      results |= {f"{way} {exchange}/{name}": a for name, a in {"value": value, **gradient}.items()}
  np.savez(path, **results)


if __name__ == "__main__":
  main(*sys.argv[1:])
