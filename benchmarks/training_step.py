"""Cost of gating in training: step times of gated and ungated nets, the loss term, the import.

    python benchmarks/training_step.py [--batch=128] [--model=resnet20] [--repeats=15] [--json=FILE]

The loss term is that of batch-shaping. Prints medians over interleaved repeats in one process, and
ratios; uses all cores as virtual devices on CPU.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

_DEVICES = 1 << min(os.cpu_count() or 1, 8).bit_length() - 1
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={_DEVICES}")
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from configs import cifar10_resnet20
from gating_jax.data import image_sets
from gating_jax.images import classification
from gating_jax.models.resnets import resnet
from gating_jax.ops.ecdf import batch_shaping_loss
from gating_jax.ops.priors import beta
from gating_jax.timing import race
from gating_jax.training import devices, steps

IMAGES = 4096


def main():
  """Prints and writes the times and their ratios."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--model", default="resnet20")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  args = parser.parse_args()

  rng = np.random.default_rng(0)
  images = image_sets.Images(
    rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8),
    rng.integers(0, 10, IMAGES).astype(np.int32),
    tuple(map(str, range(10))),
  )
  contenders = {
    "ungated step": training(args, images, "none"),
    "gated step": training(args, images, "channel"),
    "batch-shaping term": shaping_term(args),
  }
  times = race(contenders, args.repeats)
  medians = {name: statistics.median(values) for name, values in times.items()}
  ungated, gated, term = medians.values()
  print(
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}, "
    f"batch {args.batch}, medians of {args.repeats} interleaved repeats"
  )
  for name, median in medians.items():
    print(f"{name:<22}{1e3 * median:10.1f} ms   (fastest {1e3 * min(times[name]):.1f})")
  print(f"{'gated / ungated':<22}{gated / ungated:10.3f}      (limit 1.15)")
  print(f"{'term / gated step':<22}{term / gated:10.3f}      (limit 0.03)")
  # All names: each is imported only when it is first used.
  ours, base = imports(
    "from gating_jax import *", "import jax, flax.linen", repeats=min(7, args.repeats)
  )
  print(
    f"{'import / jax, flax':<22}{ours / base:10.3f}      (limit 1.5; {ours:.2f} s, {base:.2f} s)"
  )
  rows = []
  for name, median in medians.items():
    rows.append(
      {
        "form": name,
        "seconds": median,
        "fastest": min(times[name]),
        "times_ungated": median / ungated,
      }
    )
  rows.append({"form": "import", "seconds": ours, "times_jax_and_flax": ours / base})
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


def training(args, images, gating):
  """Returns a function that takes one training step."""
  config = cifar10_resnet20.get_config(f"batch={args.batch},gates={gating},epochs=1000")
  config.model.name, config.data.loader = args.model, "resident"
  # In place of CIFAR-10, which need not be there.
  with mock.patch.multiple(image_sets, load=lambda *_: images, count_images=lambda *_: len(images)):
    experiment = classification.build(config)
  state = devices.replicate(
    steps.init_state(experiment.model, experiment.optimiser, config.seed, images.shape)
  )
  advance, step = classification.Classification(experiment).make_advance(images, 0), 0

  def run():
    """Takes one step."""
    nonlocal state, step
    state, metrics = advance(state, step)
    step += 1
    return state, metrics

  return run


def shaping_term(args):
  """Returns a function that computes the batch-shaping term and its gradient for all gates.

  Gates are gathered over devices as in training.
  """
  model = resnet(args.model, classes=10, gating="channel")
  init = functools.partial(model.init_with_output, jax.random.key(0))
  (_, records), _ = jax.eval_shape(init, jnp.zeros((1, 32, 32, 3)))
  rng, logits = np.random.default_rng(0), []
  for record in records:
    drawn = rng.normal(1, 2, (args.batch, record.gates.shape[-1]))
    logits.append(drawn.astype(np.float32))
  logits = devices.replicate(logits)
  prior = beta(0.6, 0.4)

  def term(local):
    """Computes the term of a device's logits: one sort for all layers, then each layer's mean."""
    losses = batch_shaping_loss(jnp.concatenate(local, -1), prior, axis_name=devices.AXIS)
    weights = [jnp.full(z.shape[-1], 1 / z.shape[-1]) for z in local]
    return jnp.sum(losses * jnp.concatenate(weights))

  def gradient(logits, places):
    """Computes the gradient of the term, as one number."""
    grads = jax.grad(term)([z[places] for z in logits])
    return jax.lax.pmean(sum(jnp.sum(g**2) for g in grads), devices.AXIS)

  mapped = devices.map_over_devices(
    gradient, args=(devices.REPLICATED, devices.BATCH), results=devices.REPLICATED
  )
  return lambda: mapped(logits, np.arange(args.batch))


def imports(*statements, repeats):
  """Returns the median seconds of each statement in a fresh interpreter, taken in turns."""
  times = {statement: [] for statement in statements}
  for _ in range(repeats):
    for statement in statements:
      start = time.perf_counter()
      subprocess.run(
        [sys.executable, "-c", statement], check=True, cwd=Path(__file__).parent.parent
      )
      times[statement].append(time.perf_counter() - start)
  return [statistics.median(values) for values in times.values()]


if __name__ == "__main__":
  main()
