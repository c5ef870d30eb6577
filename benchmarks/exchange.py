"""Time and traffic of the two exchanges of a batch among devices in `batch_shaping_loss`.

    python benchmarks/exchange.py [--devices=8,2] [--shapes=256x336,256x2048] [--repeats=15]
        [--json=FILE]

Measures value and gradient; prints medians over interleaved repeats in one process. On CPU, devices
are virtual and share the cores, so the times add up the work of all of them and do not show the
cost of a network between them.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gating_jax.ops.ecdf import EXCHANGES, batch_shaping_loss
from gating_jax.ops.priors import beta
from gating_jax.timing import race

AXIS = "devices"


def main():
  """Prints and writes the rows of each number of devices and shape."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--devices", default="8,2", help="how many, with commas between")
  parser.add_argument(
    "--shapes", default="256x336,256x2048", help="whole batch x gates, with commas between"
  )
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  args = parser.parse_args()

  print(
    f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, float32, "
    f"value and gradient, medians of {args.repeats} interleaved repeats"
  )
  print(
    f"{'devices':>7}{'shape':>12}{'exchange':>14}{'median':>12}{'/ gather':>10}"
    f"{'sent per device':>20}"
  )
  rows = []
  for devices in map(int, args.devices.split(",")):
    for shape in args.shapes.split(","):
      n, c = map(int, shape.split("x"))
      times = race(
        {exchange: value_and_gradient(exchange, devices, n, c) for exchange in EXCHANGES},
        args.repeats,
      )
      medians = {exchange: statistics.median(values) for exchange, values in times.items()}
      for exchange, seconds in medians.items():
        ratio, sent = seconds / medians["gather"], traffic(exchange, devices, n, c)
        print(
          f"{devices:>7}{shape:>12}{exchange:>14}{1e3 * seconds:9.2f} ms{ratio:10.2f}"
          f"{sent / 1e3:17.1f} kB"
        )
        rows.append(
          {
            "devices": devices,
            "shape": shape,
            "exchange": exchange,
            "seconds": seconds,
            "times_gather": ratio,
            "bytes_sent_per_device": sent,
          }
        )
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


def value_and_gradient(exchange, devices, n, c):
  """Returns a function that computes both for `[n, c]` logits spread over the devices."""
  prior = beta(0.6, 0.4)
  mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
  spread = PartitionSpec(AXIS)

  def local(logits):
    """Computes value and gradient on one device of the mesh."""

    def total(z):
      """Computes the loss, summed over gates."""
      return batch_shaping_loss(z, prior, axis_name=AXIS, exchange=exchange).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    return lax.pmean(value, AXIS), gradient

  run = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=spread, out_specs=(PartitionSpec(), spread), check_vma=False
    )
  )
  logits = np.random.default_rng(0).normal(1, 2, (n, c)).astype(np.float32)
  logits = jax.device_put(logits, NamedSharding(mesh, spread))
  return lambda: run(logits)


def traffic(exchange, devices, n, c):
  """Returns the bytes that each device sends, at 4 per number.

  Algorithms are assumed to send nothing twice (rings, for gather and its sum). Three arrays travel:
  keys and values forwards, the cotangent of the values backwards. When they are gathered, a device
  passes on all but 1 / devices of the whole `[n, c]`; when they are exchanged, all but 1 / devices
  of its own `[n / devices, c]`. An exchange also gathers the losses `[c]` and sums their
  cotangents. Here c stands for its next multiple of the devices.
  """
  others = (devices - 1) / devices
  if exchange == "gather":
    return 4 * others * 3 * n * c
  columns = c + -c % devices
  return 4 * others * (3 * n / devices + 2) * columns


if __name__ == "__main__":
  main()
