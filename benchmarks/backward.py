"""Cost of a training step whose backward pass of the heavy net skips segments that are not chosen.

    python benchmarks/backward.py [--net=resnet3d10:0.5] [--shares=0.5,0.25,0.125]

Both steps see the same videos, choose the same evenly spaced segments and compute the same forward
pass of all segments; they differ in `backward_capacity`. Times are medians over interleaved repeats
in one process. `expected` is (1 + 3 s) / 3 for the fraction s, see `open_backward`. `gap` is the
norm of the difference of the parameters after `--steps` steps of SGD over their norm.
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

from gating_jax.models.timegate import SegmentNet
from gating_jax.models.video_backbones import heavy_net
from gating_jax.timing import race
from gating_jax.training import steps

CLASSES = 10


def main():
  """Prints a line for each fraction of segments."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--net", default="resnet3d10:0.5", help="name:width")
  parser.add_argument("--shares", default="0.5,0.25,0.125")
  parser.add_argument("--videos", type=int, default=8)
  parser.add_argument("--segments", type=int, default=8)
  parser.add_argument("--frames", type=int, default=8)
  parser.add_argument("--pixels", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--steps", type=int, default=5)
  args = parser.parse_args()
  print(
    f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"float32, {args.net}, "
    f"{args.videos} videos of {args.segments} clips, medians of {args.repeats} interleaved repeats"
  )
  print(f"{'chosen':>8}{'all':>11}{'chosen':>11}{'ratio':>8}{'expected':>10}{'gap':>10}")
  for share in map(float, args.shares.split(",")):
    compare(args, share)


def compare(args, share):
  """Prints a line."""
  count = args.videos * round(share * args.segments)
  full, skipping = (training(args, share, capacity) for capacity in (None, count))
  after, other = (trained(*each, args.steps) for each in (full, skipping))
  gap = optax.tree.norm(optax.tree.sub(after, other)) / optax.tree.norm(after)
  times = race(
    {"full": lambda: full[0](full[1]), "skipping": lambda: skipping[0](skipping[1])}, args.repeats
  )
  one, two = (statistics.median(times[name]) for name in ("full", "skipping"))
  print(
    f"{share:>8.3f}{1e3 * one:>8.1f} ms{1e3 * two:>8.1f} ms{two / one:>8.3f}"
    f"{(1 + 3 * share) / 3:>10.3f}"
    f"{gap:>10.1e}"
  )


def training(args, share, capacity):
  """Returns `(step, state)` of a network that trains with evenly spaced segments."""
  name, width = args.net.split(":")
  model = SegmentNet(
    CLASSES,
    None,
    heavy_net(name, width=float(width), stem="small", group_norm=True),
    selection="uniform",
    share=share,
    pooling="mean",
    backward_capacity=capacity,
  )
  rng = np.random.default_rng(0)
  shape = (args.segments, args.frames, args.pixels, args.pixels, 3)
  # Videos of different colours: otherwise BatchNorm would divide by the little they differ.
  colours = rng.normal(size=(args.videos, 1, 1, 1, 1, 3))
  inputs = {
    "heavy": (colours + rng.normal(size=(args.videos, *shape))).astype(np.float32),
    "valid": np.ones((args.videos, args.segments), bool),
  }
  labels = rng.integers(0, CLASSES, args.videos)
  optimiser = optax.sgd(0.01)
  state = steps.init_state(model, optimiser, 0, {"heavy": shape, "valid": (args.segments,)})

  def objective(outputs, labels, records, step, axis_name):
    """Computes the mean cross-entropy, without metrics."""
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels)
    return losses.mean(), {}

  step = jax.jit(
    steps.make_train_step(model, optimiser, objective, lambda key, inputs: inputs, seed=0)
  )
  inputs, labels = jax.device_put((inputs, jnp.asarray(labels)))
  return lambda state: step(state, inputs, labels)[0], state


def trained(step, state, count):
  """Returns the parameters after some steps."""
  for _ in range(count):
    state = step(state)
  return state.params


if __name__ == "__main__":
  main()
