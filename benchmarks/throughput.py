"""Images per second in training and in tests, and the fraction of the device's peak.

    python benchmarks/throughput.py [--images=50000] [--repeats=5] CONFIG[:VARIANTS] [CONFIG ...]
        [--FIELD=VALUE ...]

Each CONFIG is trained for some steps on made images of 32 x 32 from memory, with its own step and
dispatch, in float32 or `--model.dtype`; FIELD applies to all configs. A training step counts three
times the MACs of the ungated net and of the gates, since gates save none in training. Prints
medians.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from peaks import peaks

from gating_jax.data import image_sets
from gating_jax.images import classification
from gating_jax.training import devices, steps


def main():
  """Prints and writes the row of each config."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("configs", nargs="+")
  parser.add_argument("--images", type=int, default=50000)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  args, fields = parser.parse_known_args()

  name, _ = peaks()
  print(
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, medians "
    f"of {args.repeats}; peak of {name or 'this device not in the table'}"
  )
  print(
    f"{'config':<76}{'dtype':<10}{'train images/s':>16}{'of peak':>9}{'test images/s':>16}"
    f"{'of peak':>9}"
  )
  rows = []
  for named in args.configs:
    rows.append(
      measured(named, dict(field.removeprefix("--").split("=", 1) for field in fields), args)
    )
    print(line(rows[-1]), flush=True)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measured(named, fields, args):
  """Returns the row of one config."""
  experiment = built(config_of(named, fields), args.images)
  config, counts = experiment.config, experiment.counts
  macs = counts.macs + counts.gate_macs
  steps_a_call = config.devices.steps_per_dispatch
  train = config.optim.batch_size * steps_a_call / training(experiment, args.repeats)
  test = len(experiment.test) / testing(experiment, args.repeats)
  _, known = peaks()

  def of_peak(rate, macs):
    """Returns the fraction of the device's peak; None where that is unknown."""
    return rate * macs / getattr(known, config.model.dtype) / jax.device_count() if known else None

  return {
    "config": named,
    "dtype": config.model.dtype,
    "macs_per_image": macs,
    "train_images_per_second": train,
    "train_share_of_peak": of_peak(train, 3 * macs),
    "test_images_per_second": test,
    "test_share_of_peak": of_peak(test, macs),
  }


def config_of(named, fields):
  """Reads a config, with these fields."""
  path, _, variants = named.partition(":")
  spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variants)
  for field, value in fields.items():
    default = config
    for part in field.split("."):
      default = default[part]
    kind = type(default)
    config.update_from_flattened_dict({field: kind(value)})
  return config


def built(config, images):
  """Returns the experiment of a config, on made images."""
  rng = np.random.default_rng(0)
  made = image_sets.Images(
    rng.integers(0, 256, (images, 32, 32, len(config.data.mean)), dtype=np.uint8),
    rng.integers(0, 10, images).astype(np.int32),
    tuple(map(str, range(10))),
  )
  # In place of CIFAR-10, which need not be there.
  with mock.patch.multiple(image_sets, load=lambda *_: made, count_images=lambda *_: images):
    return classification.build(config)


def training(experiment, repeats):
  """Returns the median seconds of a call of several steps; two are in flight, as in training."""
  state = devices.replicate(
    steps.init_state(
      experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape
    )
  )
  advance = classification.Classification(experiment).make_advance(experiment.test, 0)
  k = experiment.config.devices.steps_per_dispatch
  seconds = []
  for call in range(repeats + 1):
    start = time.perf_counter()
    for half in range(2):
      state, metrics = advance(state, (2 * call + half) * k)
    jax.block_until_ready((state, metrics))
    seconds.append((time.perf_counter() - start) / 2)
  return statistics.median(seconds[1:])


def testing(experiment, repeats):
  """Returns the median seconds of a pass over the test set, gates and sums included."""
  state = devices.replicate(
    steps.init_state(
      experiment.model, experiment.optimiser, experiment.config.seed, experiment.test.shape
    )
  )
  test, seconds = classification.Classification(experiment).make_test(), []
  for _ in range(min(repeats, 2) + 1):
    start = time.perf_counter()
    test(state)
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[1:])


def line(row):
  """Returns a row as a line of text."""
  text = f"{row['config']:<76}{row['dtype']:<10}"
  for part in ("train", "test"):
    of_peak = row[f"{part}_share_of_peak"]
    percent = f"{'?':>9}" if of_peak is None else f"{100 * of_peak:7.1f} %"
    text += f"{row[f'{part}_images_per_second']:16,.0f}{percent}"
  return text


if __name__ == "__main__":
  main()
