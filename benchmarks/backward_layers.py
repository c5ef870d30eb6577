"""Cost of a training step whose backward pass of a layer skips images for which it is closed.

    python benchmarks/backward_layers.py [--net=resnet20] [--width=1] [--rates=0.5,0.25]

The net has a gate per residual block, drawn at a fixed rate, and GroupNorm; the optimiser is SGD.
Both steps compute the same forward pass; they differ in `backward_share`, which is the smallest
multiple of an eighth of the batch that holds the open images of every block in every step. Times
are medians over interleaved repeats in one process. `gap` is the norm of the difference of the
parameters after `--steps` steps over their norm.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import resnet
from gating_jax.timing import race
from gating_jax.training import steps

CLASSES, EIGHTHS = 10, 8


def main():
  """Prints the lines of each rate."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--net", default="resnet20")
  parser.add_argument("--width", type=float, default=1.0)
  parser.add_argument("--rates", default="0.5,0.25")
  parser.add_argument("--images", type=int, default=128)
  parser.add_argument("--pixels", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--steps", type=int, default=5)
  args = parser.parse_args()
  print(
    f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"float32, {args.net} x "
    f"{args.width:g}, {args.images} images of {args.pixels}^2, medians of {args.repeats} "
    "interleaved repeats"
  )
  print(f"{'open':>7}{'held':>8}{'all':>12}{'open alone':>12}{'ratio':>8}{'gap':>10}")
  for rate in map(float, args.rates.split(",")):
    compare(args, rate)


def compare(args, rate):
  """Prints a line."""
  full = training(args, rate, 1.0)
  after = trained(*full, args.steps)
  for eighths in range(1, EIGHTHS):
    skipping = training(args, rate, eighths / EIGHTHS)
    other = trained(*skipping, args.steps)
    if np.isfinite(optax.tree.norm(other)):
      break
  gap = optax.tree.norm(optax.tree.sub(after, other)) / optax.tree.norm(after)
  times = race(
    {"all": lambda: full[0](full[1]), "open": lambda: skipping[0](skipping[1])}, args.repeats
  )
  one, two = (statistics.median(times[name]) for name in ("all", "open"))
  print(
    f"{rate:>7.3f}{eighths / EIGHTHS:>8.3f}"
    f"{1e3 * one:>9.1f} ms{1e3 * two:>9.1f} ms{two / one:>8.3f}{gap:>10.1e}",
    flush=True,
  )


def training(args, rate, share):
  """Returns `(step, state)` of a network whose gates open at a rate."""
  gate = GateSettings(context="random", initial_open=rate)
  model = resnet(
    args.net,
    CLASSES,
    width=args.width,
    gating="layer",
    gate=gate,
    group_norm=True,
    backward_share=share,
  )
  rng = np.random.default_rng(0)
  shape = (args.pixels, args.pixels, 3)
  images = jax.device_put(rng.normal(size=(args.images, *shape)).astype(np.float32))
  labels = jnp.asarray(rng.integers(0, CLASSES, args.images))
  optimiser = optax.sgd(0.01)
  state = steps.init_state(model, optimiser, 0, shape)

  def objective(logits, labels, records, step, axis_name):
    """Computes the mean cross-entropy, without metrics."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), {}

  step = jax.jit(
    steps.make_train_step(model, optimiser, objective, lambda key, images: images, seed=0)
  )
  return lambda state: step(state, images, labels)[0], state


def trained(step, state, count):
  """Returns the parameters after some steps."""
  for _ in range(count):
    state = step(state)
  return state.params


if __name__ == "__main__":
  main()
