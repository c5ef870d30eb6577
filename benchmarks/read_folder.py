"""Images per second of a stream from a folder of pictures, next to Pillow's own rate.

    python benchmarks/read_folder.py FOLDER [--images=20000] [--batch=128] [--repeats=5]
        [--workers=0,2] [--size=64]

By default `--workers` are threads (0) and what `data.workers` has by default.

FOLDER holds `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, of `--size` pixels a side. Each repeat
measures all ways, one after the other, on other images. For Pillow's rate a process on each core
decodes its share to RGB, and passes nothing on: nothing reads faster on these cores. The stream
makes batches and hands them over, as a training takes them. Prints medians, and the median of the
ratios within a repeat.
"""

import argparse
import concurrent.futures
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from gating_jax.cores import count_workers, usable_cores
from gating_jax.data.image_sets import SetSource
from gating_jax.data.streaming import open_stream

# Batches that are read before the clock starts, more than are held ready.
AHEAD = 16


def decode(files):
  """Decodes files by Pillow alone."""
  for file in files:
    with Image.open(file) as image:
      np.asarray(image.convert("RGB"))


def measure_pillow(pool, cores, files):
  """Returns the images per second of one process on each core."""
  began = time.perf_counter()
  list(pool.map(decode, [files[core::cores] for core in range(cores)]))
  return len(files) / (time.perf_counter() - began)


def measure_stream(stream, batch, first, steps):
  """Returns the images per second of a stream that has begun, and goes on afterwards."""
  batches = stream.batches(batch, first, 1, total_steps=first + steps + 2 * AHEAD)
  for _ in range(AHEAD):
    next(batches)
  began = time.perf_counter()
  for _ in range(steps):
    next(batches)
  seconds = time.perf_counter() - began
  batches.close()
  return batch * steps / seconds


def main():
  """Prints a line for each way."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path)
  parser.add_argument("--images", type=int, default=20_000, help="of each measurement")
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--workers", default=f"0,{count_workers()}", help="0 for threads")
  parser.add_argument("--size", type=int, default=64)
  args = parser.parse_args()
  if args.images < args.batch:
    parser.error(f"--images must be at least --batch, {args.batch}; got {args.images}")
  cores = usable_cores()
  source = SetSource("folder", "train", str(args.folder))
  began = time.perf_counter()
  ways = {}
  for workers in map(int, args.workers.split(",")):
    name = f"stream, {workers} workers" if workers else "stream, threads"
    ways[name] = open_stream(source, image_size=args.size, workers=workers)
  files = sorted(file for file in args.folder.glob("train/*/*") if file.is_file())
  print(f"{len(files)} images on {cores} cores, opened in {time.perf_counter() - began:.0f} s")
  steps, order = args.images // args.batch, np.random.default_rng(0).permutation(len(files))
  rates = {"Pillow": [], **{name: [] for name in ways}}
  with concurrent.futures.ProcessPoolExecutor(cores) as pool:
    # Its processes start here.
    measure_pillow(pool, cores, files[: 10 * cores])
    for repeat in range(args.repeats):
      chosen = [files[i] for i in np.roll(order, -repeat * args.images)[: args.images]]
      rates["Pillow"].append(measure_pillow(pool, cores, chosen))
      for name, stream in ways.items():
        rates[name].append(measure_stream(stream, args.batch, repeat * steps, steps))
  for name, found in rates.items():
    ratios = [rate / pillow for rate, pillow in zip(found, rates["Pillow"], strict=True)]
    print(f"{name:<20}{statistics.median(found):>10,.0f} images/s{statistics.median(ratios):>8.2f}")


if __name__ == "__main__":
  main()
