"""Time of a residual branch with block-structured gates: dense, masked, dispatched, Pallas kernel.

    python benchmarks/kernels.py [--shapes=64x16x16x256/64,1x16x16x256/64]
        [--dtypes=bfloat16,float32] [--repeats=15]
    python benchmarks/kernels.py --roofline

A shape is N x H x W x C / B: C channels everywhere, and a gate for every B of them. Each block is
open for a given fraction of the examples. Prints medians over interleaved repeats in one process;
ratios of the faster of dense and masked to each form; the ratio that the roofline of the device
allows, or that of an H100 where the device's is unknown; and the largest difference from float32 at
full precision.

A repeat is one program of `--calls` calls. Each call takes the output of the last one, and the
gates of the examples are shifted by one. So the device is timed, without dispatch and without work
that a loop does only once. On a GPU the kernel's tiles are tuned first. Without a GPU the kernel is
interpreted, in small shapes: this checks values, and its times mean nothing. On TPUs it is skipped.
With `--roofline` nothing is run: it prints what the roofline of an H100 allows.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from peaks import REFERENCE, peaks

from gating_jax.ops import pallas_kernels
from gating_jax.ops.pallas_kernels import Branch, Tiles
from gating_jax.timing import race

SHARES = (1.0, 0.5, 0.25)
SHAPES = {
  "gpu": "64x32x32x128/64,64x16x16x256/64,64x8x8x512/128,1x16x16x256/64",
  "cpu": "4x6x6x64/16",
}
TILES = (
  Tiles(),
  Tiles(64, 64, 64),
  Tiles(64, 128, 32),
  Tiles(128, 64, 32),
  Tiles(128, 128, 32, 8),
  Tiles(128, 128, 64, 8),
  Tiles(32, 64, 64),
)
# Fractions of the largest value; float32 is computed in TF32 on a GPU.
TOLERANCE = {
  "float32": 2e-2,
  "bfloat16": 5e-2,
}


def main():
  """Prints and writes the rows of each shape, dtype and fraction."""
  backend = jax.default_backend()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", default=SHAPES["cpu" if backend == "cpu" else "gpu"])
  parser.add_argument("--dtypes", default="bfloat16,float32")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--calls", type=int, default=1 if backend == "cpu" else 20)
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  parser.add_argument("--roofline", action="store_true", help="print what it allows, run nothing")
  args = parser.parse_args()
  if args.roofline:
    print_roofline(SHAPES["gpu"].split(","), args.dtypes.split(","))
    return

  name, _ = peaks()
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {args.repeats} "
    "interleaved repeats of "
    f"{args.calls} calls; roofline of {name or f'{REFERENCE}: this device is not in the table'}"
  )
  if backend == "cpu":
    print("no accelerator: the kernel is interpreted, and its times say nothing")
  print(
    f"{'N x H x W x C / B':<20}{'dtype':<10}{'open':>6}  {'form':<12}{'median':>12}"
    f"{'times as fast':>15}"
    f"{'by roofline':>13}{'gap':>10}"
  )
  rows = []
  for shape in args.shapes.split(","):
    for dtype in args.dtypes.split(","):
      for share in SHARES:
        found = compared(shape, dtype, share, repeats=args.repeats, calls=args.calls)
        print(*map(line, found), sep="\n", flush=True)
        rows += found
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


def compared(shape, dtype, share, *, repeats, calls):
  """Returns one row per form."""
  branch, x, gates, sizes = problem(shape, dtype, share)
  capacity = max(1, int(np.max(np.sum(gates > 0, axis=0))))
  forms = {
    "dense": lambda branch, x, gates: pallas_kernels.masked_branch(branch, x, jnp.ones_like(gates)),
    "masked": pallas_kernels.masked_branch,
    "dispatched": functools.partial(pallas_kernels.dispatched_branch, capacity=capacity),
  }
  tiles = (
    tuned(branch, x, gates, calls)
    if jax.default_backend() == "gpu"
    else pallas_kernels.DEFAULT_TILES
  )
  if jax.default_backend() != "tpu":
    forms["kernel"] = functools.partial(pallas_kernels.gated_branch, tiles=tiles)
  compiled = {name: jax.jit(form).lower(branch, x, gates).compile() for name, form in forms.items()}
  exact = jax.jit(functools.partial(pallas_kernels.masked_branch, precision="highest"))(
    *jax.tree.map(lambda a: a.astype(jnp.float32), (branch, x, gates))
  )
  times = race(
    {name: in_a_row(form, calls, branch, x, gates) for name, form in forms.items()}, repeats
  )
  medians = {name: statistics.median(values) / calls for name, values in times.items()}
  base = min(medians["dense"], medians["masked"])
  expected = roofline(sizes, dtype, share=float(np.mean(gates)), capacity=capacity / len(x))
  rows = []
  for name, seconds in medians.items():
    gap = float(
      jnp.max(jnp.abs(compiled[name](branch, x, gates) - exact)) / jnp.max(jnp.abs(exact))
    )
    if name != "dense" and not gap <= TOLERANCE[dtype]:
      raise SystemExit(f"error: {name} is wrong for {shape} in {dtype}: {gap} of the largest value")
    rows.append(
      {
        "shape": shape,
        "dtype": dtype,
        "open": float(np.mean(gates)),
        "form": name,
        "seconds": seconds,
        "times_as_fast": base / seconds,
        "by_roofline": expected["dense"] / expected[name],
        "roofline_seconds": expected[name],
        "gap": gap if name != "dense" else None,
        "tiles": list(tiles) if name == "kernel" else None,
      }
    )
  return rows


def problem(shape, dtype, share):
  """Returns a branch whose blocks are open for a fraction of the examples, different ones each.

  Counts are rounded. With a single example, this fraction of the blocks is open.
  """
  sizes, _, block = shape.partition("/")
  n, h, w, c = map(int, sizes.split("x"))
  blocks = c // int(block)
  rng = np.random.default_rng(0)

  def draw(scale, *shape):
    """Draws an array of this standard deviation."""
    return jnp.asarray(rng.normal(0, scale, shape), dtype)

  branch = Branch(
    draw((9 * c) ** -0.5, 3, 3, c, c), draw(1, c), draw((9 * c) ** -0.5, 3, 3, c, c), draw(1, c)
  )
  rows, columns = (blocks, n) if n > 1 else (n, blocks)
  gates = np.tile(np.arange(columns) < round(share * columns), (rows, 1))
  gates = rng.permuted(gates, axis=1).astype(np.float32)
  return branch, draw(1, n, h, w, c), gates.T if n > 1 else gates, (n, h, w, c, blocks)


def in_a_row(form, calls, branch, x, gates):
  """Returns a function that runs a compiled program of so many calls."""
  every = jnp.stack([jnp.roll(gates, i, axis=0) for i in range(calls)])
  args = jax.device_put((branch, x, every))

  def several(branch, x, every):
    """Feeds each call's output to the next."""
    return jax.lax.scan(lambda x, gates: (form(branch, x, gates), None), x, every)[0]

  compiled = jax.jit(several).lower(*args).compile()
  return lambda: compiled(*args)


def tuned(branch, x, gates, calls):
  """Returns the fastest of `TILES` that this GPU accepts."""
  contenders = {}
  for tiles in TILES:
    form = functools.partial(pallas_kernels.gated_branch, tiles=tiles)
    try:
      contenders[tiles] = in_a_row(form, calls, branch, x, gates)
      jax.block_until_ready(contenders[tiles]())
    # Such as too much shared memory.
    except jax.errors.JaxRuntimeError as error:
      contenders.pop(tiles, None)
      print(f"left out {tiles}: {str(error).splitlines()[0]:.100}")
  times = race(contenders, 3)
  return min(times, key=lambda tiles: min(times[tiles]))


def roofline(sizes, dtype, *, share, capacity):
  """Returns the seconds of each form at the device's peaks.

  Each array is moved once per convolution that reads or writes it. Let a be the bytes of x, h or y,
  k those of a kernel, and M the MACs of a convolution. Dense and masked compute M and move 2 a + k,
  twice. The kernel at an open fraction s computes s M and moves (1 + s) a + k, twice. Dispatched
  with capacity c of the examples computes 2 c M and moves, per block, c a three times for x (read,
  gathered, read again) and a float32 y twice, and also h.
  """
  n, h, w, c, blocks = sizes
  macs, values = n * h * w * 9 * c * c, n * h * w * c
  size = jnp.dtype(dtype).itemsize
  a, k = size * values, size * 9 * c * c
  seconds = (peaks()[1] or peaks(REFERENCE)[1]).seconds
  dense = 2 * seconds(dtype, macs, 2 * a + k)
  return {
    "dense": dense,
    "masked": dense,
    "kernel": 2 * seconds(dtype, share * macs, (1 + share) * a + k),
    "dispatched": seconds(
      dtype, 2 * capacity * macs, capacity * (blocks * (3 * a + 2 * 4 * values) + 2 * a) + 2 * k
    ),
  }


def print_roofline(shapes, dtypes):
  """Prints what the data sheet's peaks allow."""
  print(
    f"{REFERENCE}, by its data sheet, nothing measured\n"
    f"{'N x H x W x C / B':<20}{'dtype':<10}{'open':>6}{'dense':>12}{'kernel':>12}{'':>8}"
    f"{'dispatched':>12}"
  )
  for shape in shapes:
    n, h, w, c, block = map(int, shape.replace("/", "x").split("x"))
    for dtype in dtypes:
      for share in SHARES:
        found = roofline(
          (n, h, w, c, c // block), dtype, share=share, capacity=share if n > 1 else 1.0
        )
        dense, kernel, dispatched = (found[form] for form in ("dense", "kernel", "dispatched"))
        print(
          f"{shape:<20}{dtype:<10}{share:6.2f}"
          f"{1e6 * dense:9.1f} us{1e6 * kernel:9.1f} us{dense / kernel:6.2f} x"
          f"{1e6 * dispatched:9.1f} us{dense / dispatched:6.2f} x"
        )


def line(row):
  """Returns a row as a line of text."""
  gap = f"{row['gap']:10.1e}" if row["gap"] is not None else ""
  return (
    f"{row['shape']:<20}{row['dtype']:<10}{row['open']:6.2f}  {row['form']:<12}"
    f"{1e6 * row['seconds']:9.1f} us"
    f"{row['times_as_fast']:15.2f}{row['by_roofline']:13.2f}{gap}"
  )


if __name__ == "__main__":
  main()
