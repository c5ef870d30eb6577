"""Time that skipped segments save: the whole network against its heavy net on every segment.

    python benchmarks/segments.py [--nets=resnet3d18:0.5,r2plus1d18:0.5] [--videos=1,8]
        [--shares=0.5,0.25]

Weights are random, and the gate's bias is set so that the given fraction of all segments is chosen.
Times are medians over interleaved repeats in one process, from uint8 clips to logits, including
light net and gate. The baseline has neither: it is the heavy net on all segments and the classifier
in one program, for all videos at once or video by video, whichever is faster. Efficiency is the
speed-up times the fraction of the baseline's MACs; 1 means that time falls in proportion to MACs.
Where `computed` exceeds `chosen`, the rest is padding: at most at_once / buckets clips per batch,
none at the fractions above.
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

from gating_jax.data import augment
from gating_jax.inference.segments import compile_segments
from gating_jax.layers.gate import GATE_NAME
from gating_jax.models.summary import video_summary
from gating_jax.models.timegate import SegmentNet
from gating_jax.models.video_backbones import heavy_net, light_net
from gating_jax.ops.compaction import bucket_sizes
from gating_jax.timing import race

CLASSES, MEAN, STD = 10, (0.5,) * 3, (0.5,) * 3
LIMITS = {0.5: 0.8, 0.25: 0.7}


def main():
  """Prints the lines of each net and number of videos."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--nets", default="resnet3d18:0.5,r2plus1d18:0.5", help="name:width, with commas between"
  )
  parser.add_argument("--light", default="mobilenet_small:0.5")
  parser.add_argument("--videos", default="1,8", help="in a batch, with commas between")
  parser.add_argument("--shares", default="0.5,0.25")
  parser.add_argument("--segments", type=int, default=16)
  parser.add_argument("--frames", type=int, default=8)
  parser.add_argument("--pixels", type=int, default=32)
  parser.add_argument(
    "--at_once", type=int, default=16, help="clips that the heavy net is given at most"
  )
  parser.add_argument("--buckets", type=int, default=8, help="sizes of what it is given")
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()

  clip = (args.frames, args.pixels, args.pixels, 3)
  print(
    f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"float32, {args.segments} "
    f"clips of {'x'.join(map(str, clip))}, light net {args.light}, medians of {args.repeats} "
    "interleaved repeats"
  )
  print(
    f"{'heavy net':<18}{'videos':>7}{'chosen':>12}{'computed':>10}{'all':>11}{'skipping':>11}"
    f"{'speed-up':>10}"
    f"{'MACs':>8}{'efficiency':>12}{'limit':>7}"
  )
  for net in args.nets.split(","):
    for videos in map(int, args.videos.split(",")):
      compare(args, net, videos, clip)


def compare(args, net, videos, clip):
  """Prints a line for each share."""
  model = SegmentNet(CLASSES, named(light_net, args.light), named(heavy_net, net))
  counts = video_summary(
    model,
    {
      "light": (args.segments, *clip[1:]),
      "heavy": (args.segments, *clip),
      "valid": (args.segments,),
    },
  )
  rng = np.random.default_rng(0)
  inputs = {
    "clips": rng.integers(0, 256, (videos, args.segments, *clip), dtype=np.uint8),
    "valid": np.ones((videos, args.segments), bool),
  }
  variables = jax.jit(lambda x: model.init(jax.random.key(0, impl="rbg"), prepare(x)))(inputs)

  total = videos * args.segments
  baselines = {
    f"{n} at a time": everything(model, variables, inputs, n) for n in sorted({1, videos})
  }
  contenders = dict(baselines)
  for share in map(float, args.shares.split(",")):
    run = compile_segments(
      model,
      with_share(model, variables, inputs, share),
      prepare=prepare,
      capacities=bucket_sizes(args.at_once, buckets=args.buckets),
    )
    contenders[share] = lambda run=run: run(inputs)
  times = {
    name: statistics.median(values) / videos
    for name, values in race(contenders, args.repeats).items()
  }
  baseline = min(times[name] for name in baselines)
  for share in map(float, args.shares.split(",")):
    _, records, chosen, computed = contenders[share]()
    gates = np.asarray(records[0].gates)
    macs = counts.per_video(
      gates, inputs["valid"], np.full(gates.shape, float(counts.heavy.macs))
    ).mean()
    speed_up, macs = baseline / times[share], macs / counts.all_segments
    print(
      f"{net:<18}{videos:>7}{f'{chosen} of {total}':>12}{computed:>10}{1e3 * baseline:8.1f} ms"
      f"{1e3 * times[share]:8.1f} ms{speed_up:>10.2f}{macs:>8.3f}{speed_up * macs:>12.2f}"
      f"{LIMITS.get(share, ''):>7}",
      flush=True,
    )


def named(build, name):
  """Builds the net of `name:width`."""
  name, width = name.split(":")
  settings = {"stem": "small"} if build is heavy_net else {}
  return build(name, width=float(width), **settings)


def prepare(inputs):
  """Returns the inputs of both nets, normalised, from clips."""
  clips = inputs["clips"]
  centre_frames = clips[:, :, clips.shape[2] // 2]
  return {
    "light": augment.normalise(centre_frames, MEAN, STD),
    "heavy": augment.normalise(clips, MEAN, STD),
    "valid": inputs["valid"],
  }


def everything(model, variables, inputs, at_a_time):
  """Returns the heavy net on all segments, then the classifier, for so many videos at a time."""

  @jax.jit
  def run(variables, inputs):
    """Classifies videos by all of their segments."""
    heavy = prepare(inputs)["heavy"]
    features, _ = model.apply(variables, heavy.reshape(-1, *heavy.shape[2:]), method="encode")
    gates = inputs["valid"].astype(jnp.float32)
    return model.apply(variables, features.reshape(*gates.shape, -1), gates, method="classify")

  starts = range(0, len(inputs["valid"]), at_a_time)
  return lambda: [
    run(variables, {name: x[i : i + at_a_time] for name, x in inputs.items()}) for i in starts
  ]


def with_share(model, variables, inputs, share):
  """Returns the variables with a gate bias that opens this fraction of all segments."""
  record, _ = jax.jit(lambda v, x: model.apply(v, prepare(x), method="choose"))(variables, inputs)
  logits = np.sort(np.asarray(record.logits), axis=None)
  first = round((1 - share) * len(logits))
  last = variables["params"][GATE_NAME]["logits"]
  bias = last["bias"] - (logits[first - 1] + logits[first]) / 2
  gate = {**variables["params"][GATE_NAME], "logits": {**last, "bias": bias}}
  return {**variables, "params": {**variables["params"], GATE_NAME: gate}}


if __name__ == "__main__":
  main()
