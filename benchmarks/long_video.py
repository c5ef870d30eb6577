"""Selections of segments of long videos at equal budgets, on the embedded task.

    python benchmarks/long_video.py --runs=runs/long_video --heavy=resnet3d10 --seed=0
        [--rows=all,gate50,gate25]

Trains both nets once (row `all`, the heavy net on every segment), then every other row on their
features, each with its own classifier. Each row is a run directory, so that finished rows are not
repeated. MACs are those of light net, gate, heavy net and classifier, as a fraction of the heavy
net on all segments. Budgets are on that sum, so selections that need the light net may choose fewer
segments.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from absl import flags

from configs import composed_timegate
from gating_jax.video import evaluate
from gating_jax.video import run as video_run

# For rows without a learned gate.
SHORT = {"optim.epochs": 60}
# Changes of the config, by name.
ROWS = {
  "all": {**SHORT, "model.selection": "all"},
  "gate50": {"loss.sparsity.target": 0.4},
  "gate25": {"loss.sparsity.target": 0.125},
  "alone25": {"loss.sparsity.target": 0.125, "model.gate.context": "none"},
  "convolution25": {"loss.sparsity.target": 0.125, "model.gate.context": "convolution"},
  "uniform25": {**SHORT, "model.selection": "uniform", "model.segment_fraction": 0.25},
  "random25": {**SHORT, "model.selection": "random", "model.segment_fraction": 0.25},
  "confidence25": {
    **SHORT,
    "model.selection": "confidence",
    "model.segment_fraction": 0.18,
    "loss.light": 1.0,
  },
  "prefix25": {**SHORT, "model.selection": "prefix", "model.segment_fraction": 0.25},
  "light": {**SHORT, "model.selection": "light"},
  "oracle25": {**SHORT, "model.selection": "oracle", "model.segment_fraction": 0.25},
  "uniform50": {**SHORT, "model.selection": "uniform", "model.segment_fraction": 0.5},
  "random50": {**SHORT, "model.selection": "random", "model.segment_fraction": 0.5},
}


def main():
  """Trains the rows and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=Path, required=True)
  parser.add_argument("--heavy", default="resnet3d10")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--rows", default=",".join(ROWS))
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  evaluate.extract_features = remembered(evaluate.extract_features)
  folder = args.runs / f"{args.heavy}-{args.seed}"
  print(
    f"{args.heavy}, seed {args.seed}, {jax.device_count()} devices\n{'row':<14}{'accuracy':>9}"
    f"{'MACs':>8}"
    f"{'chosen':>8}{'precision':>10}{'recall':>8}{'seconds':>9}",
    flush=True,
  )
  for row in args.rows.split(","):
    result = run(folder, row, args)
    print(
      f"{row:<14}{result['accuracy']:>9.4f}{result['mac_ratio']:>8.3f}{result['share']:>8.3f}"
      f"{result['precision']:>10.3f}{result['recall']:>8.3f}"
      f"{result['seconds_since_last_start']:>9.0f}",
      flush=True,
    )


def run(folder, row, args):
  """Trains a row, unless its result is there."""
  config = composed_timegate.get_config(f"heavy={args.heavy},seed={args.seed}")
  config.update_from_flattened_dict({**ROWS[row], "log_every": 500, "checkpoint_every": 20.0})
  if row != "all":
    config.pretrained = str(folder / "all")
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / row / "result.json").exists():
    with (folder / f"{row}.log").open("a") as log:
      output, sys.stdout = sys.stdout, log
      try:
        video_run.run(config, folder / row, "train")
      finally:
        sys.stdout = output
  return json.loads((folder / row / "result.json").read_text())


def remembered(extract):
  """Returns `extract` with a memory: it runs once for each set of nets that rows share.

  The sets are: with the light net, without it, and the light net alone.
  """
  known = {}

  @functools.wraps(extract)
  def once(experiment, variables, nets=("light", "heavy")):
    """Runs `extract` where it has not run for the same nets."""
    key = (experiment.model.light is None, experiment.config.model.selection == "light")
    if key not in known:
      known[key] = extract(experiment, variables, nets)
    return known[key]

  return once


if __name__ == "__main__":
  main()
