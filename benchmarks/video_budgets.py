"""Budgets of segments on videos that training has not seen, on the embedded task.

    python benchmarks/video_budgets.py --runs=runs/budgets [--videos=200,1600] [--seeds=0,1,2]
        [--targets=0.25,0.5] [--selections=gate,prefix,confidence] [--scope=set]

Prints the fraction of segments chosen on training, validation and test videos, with its standard
deviation over videos, and how many points the test is off the target. Thresholds are set on the
validation videos, a fifth of as many as `--videos`. Each row is a run directory, so that finished
rows are not repeated; rows of the same videos and seed share their trained nets.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from absl import flags

from configs import composed_timegate
from gating_jax.video import run as video_run

# Gates need more epochs than selections that are fixed.
EPOCHS = {"gate": 240, "prefix": 60, "confidence": 60}
SPLITS = ("training", "validation", "test")


def main():
  """Trains the rows and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=Path, required=True)
  parser.add_argument("--videos", default="200,1600")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--targets", default="0.25,0.5")
  parser.add_argument("--selections", default=",".join(EPOCHS))
  parser.add_argument("--scope", default="set")
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  print(
    f"{'videos':>6} {'seed':>4} {'selection':<11}{'target':>7}"
    + "".join(f"{split:>16}" for split in SPLITS)
    + f"{'off, points':>13}{'accuracy':>10}",
    flush=True,
  )
  worst = 0.0
  rows = itertools.product(
    args.videos.split(","), args.seeds.split(","), args.selections.split(",")
  )
  for videos, seed, selection in rows:
    for target in args.targets.split(","):
      result = run(
        args.runs / f"videos{videos}-seed{seed}",
        videos=int(videos),
        seed=int(seed),
        selection=selection,
        target=float(target),
        scope=args.scope,
      )
      off = 100 * (result["share"] - float(target))
      worst = max(worst, abs(off))
      print(f"{videos:>6} {seed:>4} {selection:<11}{target:>7}{describe(result, off)}", flush=True)
  print(f"\nfarthest from its target: {worst:.1f} points")


def describe(result, off):
  """Returns the columns of a row that its result fills."""
  cells = ""
  for split in SPLITS:
    of_split = result["splits"][split]
    cells += f"{of_split['share']:>9.3f} ±{of_split['share_std']:.3f}"
  return f"{cells}{off:>13.1f}{result['accuracy']:>10.4f}"


def run(folder, *, videos, seed, selection, target, scope):
  """Trains a row, unless its result is there."""
  config = composed_timegate.get_config(f"selection={selection},seed={seed},validation=0.2")
  config.update_from_flattened_dict(
    {
      "budget.scope": scope,
      "data.train_videos": videos,
      "loss.sparsity.target": target,
      "model.segment_fraction": target,
      # The confidence is that of the light net's own head, which every row then trains.
      "loss.light": 1.0 if selection == "confidence" else 0.0,
      "optim.epochs": EPOCHS[selection],
      "eval_every": EPOCHS[selection] / 6,
      "log_every": 500,
      "checkpoint_every": 20.0,
    }
  )
  # The nets are trained once for all rows of these videos and this seed.
  config.pretrained = str(train_nets(folder / "all", videos=videos, seed=seed))
  return train(config, folder / f"{selection}-{target}-{scope}")


def train_nets(workdir, *, videos, seed):
  """Trains both nets, with a classifier of all segments; returns the run directory."""
  config = composed_timegate.get_config(f"selection=all,seed={seed},validation=0.2,epochs=60")
  config.data.train_videos = videos
  train(config, workdir)
  return workdir


def train(config, workdir):
  """Trains a run with its lines in a file, unless it is finished; returns its result."""
  workdir.parent.mkdir(parents=True, exist_ok=True)
  if not (workdir / "result.json").exists():
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
      output, sys.stdout = sys.stdout, log
      try:
        video_run.run(config, workdir, "train")
      finally:
        sys.stdout = output
  return json.loads((workdir / "result.json").read_text())


if __name__ == "__main__":
  main()
