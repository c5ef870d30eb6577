"""Tables of CIFAR-10 with ResNets: regularisers, accuracy against MACs, and single changes.

    python benchmarks/images.py TABLE [--data=FOLDER] [--out=runs/images] [--model=resnet20]
        [--epochs=30] [--seeds=0,1] [--jobs=1] [--only=REGEX] [--minutes=N] [--FIELD=VALUE ...]

TABLE: `ablation`, every regulariser; `budgets`, ungated nets of several widths, gated channels,
static channels and gated layers; `levers`, single changes of one gated net; `inside`, single
changes of a net whose blocks are wide inside.

Every run is one of `gating_jax.cli`, JOBS of them at a time; FIELD applies to all of them. A run
that starts late from an ungated run shares its epochs with that: half are the ungated run's.

The same command resumes where it was stopped, and reuses finished runs of the same config. After N
minutes, or at Ctrl-C or SIGTERM, running jobs are stopped and can be resumed later. Prints the
table of finished runs, and writes it to OUT/TABLE-MODEL.md and .json; seconds are those since a
run's last start.

These are the tables of docs/results/images.md. `frontier.py` compares families of nets at equal
MACs on any set, and the gates that open by quantiles; new tables belong there.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import signal
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import COMMAND, SideBySide, field_flags, folder_name, training_accuracy

from gating_jax.analysis.outcomes import OUTCOMES

CONFIG = "configs/cifar10_resnet20.py"
# Quarters of the test images, from easy to hard.
QUARTERS = tuple(f"macs_of_quarter{i}" for i in (1, 2, 3, 4))
# Numbers of a result of which a row has the mean over seeds.
MEANS = (
  "accuracy",
  "params",
  "gate_params",
  "macs",
  "macs_std",
  *QUARTERS,
  "mac_ratio",
  "gates",
  "mean_open",
  *OUTCOMES,
  "disagreement",
  "input_information",
  "class_information",
  "seconds_since_last_start",
)
# Fields in which runs differ.
OURS = (
  "seed",
  "eval_every",
  "checkpoint_every",
  "data.data_dir",
  "model.init_from",
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's variants and fields of a config; a `late` run starts from an ungated one of its net."""

  variants: str
  fields: tuple[str, ...] = ()
  late: bool = False


UNGATED = {
  f"ungated, width {w:g}": Run(f"gates=none,width={w:g}") for w in (0.25, 0.35, 0.5, 0.71, 1)
}
LATE = (
  "model.gate.initial_open=0.95",
  "optim.learning_rate=0.05",
  "loss.sparsity.ramp_start=0.0",
  "loss.sparsity.ramp_end=0.5",
)
QUICK = "optim.gate_lr_multiplier=5"


def gated(width, budget, *fields, late=False, variants="noise=0.25"):
  """Returns a run with gated channels, trained to a budget."""
  size = f"width={width:g},budget={budget:g}"
  fields = (*LATE, *fields) if late else fields
  return Run(f"{size},{variants}" if variants else size, fields, late)


def ungated(*widths):
  """Returns the rows of ungated nets of these widths."""
  names = [f"ungated, width {width:g}" for width in widths]
  return {name: UNGATED[name] for name in names}


def wide_inside(width, inner, budget, *fields, gates="channels"):
  """Returns a run with blocks `inner` times as wide inside.

  Its budget leaves as many MACs as an ungated net of this width has.
  """
  fading = ("model.noise.ramp_start=0.5", "model.noise.ramp_end=0.9")
  run = gated(
    width, budget, QUICK, *fading, *fields, variants=f"inner={inner},noise=0.25,noise_to=0"
  )
  return dataclasses.replace(run, variants=f"gates={gates},{run.variants}")


TABLES = {
  "ablation": {
    "none": Run("regulariser=none"),
    "entropy": Run("regulariser=entropy"),
    "entropy of each decision": Run("regulariser=decision_entropy"),
    "away from 1/2": Run("regulariser=away_from_half"),
    "away from 1/2, begun there": Run(
      "regulariser=away_from_half", ("model.gate.initial_open=0.5",)
    ),
    "L0 alone": Run("regulariser=sparsity"),
    "L0 alone, ten times": Run("regulariser=sparsity,sparsity=5"),
    "batch-shaping and L0": Run("regulariser=batch_shaping"),
  },
  "budgets": {
    **UNGATED,
    "gated, width 1, to 50 %": gated(1, 0.5, QUICK),
    "gated, width 1, to 25 %": gated(1, 0.25, QUICK),
    "gated, width 1, to 12.5 %": gated(1, 0.125, QUICK),
    "gated, width 0.5, inner 4, to 26.5 %": wide_inside(0.5, 4, 0.265),
    "gated, width 0.35, inner 4, to 27 %": wide_inside(0.35, 4, 0.27),
    "gated, width 0.25, inner 4, to 28 %": wide_inside(0.25, 4, 0.28),
    "gated, width 0.5, inner 8, to 13.5 %": wide_inside(0.5, 8, 0.135),
    "gated, width 0.35, inner 8, to 14 %": wide_inside(0.35, 8, 0.14),
    "gated, width 0.25, inner 8, to 14.5 %": wide_inside(0.25, 8, 0.145),
    "static, width 1, to 25 %": Run("gates=static,budget=0.25"),
    "layers, width 0.5, to 60 %": Run("gates=layer,width=0.5,budget=0.6"),
  },
  "levers": {
    **ungated(0.35, 0.5, 0.71),
    "early, noise 1": gated(1, 0.25, variants=""),
    "early": gated(1, 0.25),
    "late": gated(1, 0.25, late=True),
    "late, noise 0": gated(1, 0.25, late=True, variants="noise=0"),
    "late, no batch-shaping": gated(1, 0.25, late=True, variants="noise=0.25,bas=0"),
    "late, learning rate 0.1": gated(1, 0.25, "optim.learning_rate=0.1", late=True),
    "late, width 1.41": gated(1.41, 0.125, late=True),
  },
  "inside": {
    **ungated(0.25, 0.35),
    "as in budgets": wide_inside(0.25, 4, 0.28),
    "inner 8": wide_inside(0.25, 8, 0.145),
    "closed early": wide_inside(
      0.25, 4, 0.28, "loss.sparsity.ramp_start=0.0", "loss.sparsity.ramp_end=0.2"
    ),
    "shaped to the end": wide_inside(
      0.25,
      4,
      0.28,
      "loss.batch_shaping.fade_end=1.0",
      "loss.batch_shaping.a=0.3",
      "loss.batch_shaping.b=0.77",
    ),
    "shaped, summed over gates": wide_inside(0.25, 4, 0.28, "loss.batch_shaping.reduction=sum"),
    "shaped to a mean of 28 %": wide_inside(
      0.25, 4, 0.28, "loss.batch_shaping.a=0.28", "loss.batch_shaping.b=0.72"
    ),
    "begun at 1/2": wide_inside(0.25, 4, 0.28, "model.gate.initial_open=0.5"),
    "begun at 0.95": wide_inside(0.25, 4, 0.28, "model.gate.initial_open=0.95"),
    "static": wide_inside(0.25, 4, 0.28, gates="static"),
    "not shaped": wide_inside(0.25, 4, 0.28, "loss.batch_shaping.coefficient=0.0"),
    "noise fades early": wide_inside(
      0.25, 4, 0.28, "model.noise.ramp_start=0.1", "model.noise.ramp_end=0.5"
    ),
    "gates no faster": wide_inside(0.25, 4, 0.28, "optim.gate_lr_multiplier=1.0"),
    "gates of 64 hidden units": wide_inside(0.25, 4, 0.28, "model.gate.hidden=64"),
    "blocks of 4": wide_inside(0.25, 4, 0.28, "model.gate.block=4"),
  },
}


def main():
  """Runs a table, prints it and writes it."""
  args, runs, seeds, fields = parse()
  args.out.mkdir(parents=True, exist_ok=True)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  results = Job(args, fields).run(runs, seeds)
  rows, missing = [], []
  for name in runs:
    finished = []
    for seed in seeds:
      if results[name, seed]:
        finished.append(results[name, seed])
      else:
        missing.append(f"{name} of seed {seed}")
    if finished:
      rows.append(row(name, finished))
  rows = compared(rows)
  text = outcome_table(rows) if args.table == "ablation" else mac_table(rows)
  print(text)
  (args.out / f"{args.table}-{args.model}.json").write_text(json.dumps(rows, indent=2) + "\n")
  (args.out / f"{args.table}-{args.model}.md").write_text(text + "\n")
  if missing:
    sys.exit(f"not finished: {', '.join(missing)}")


def parse():
  """Returns the arguments, the runs by name, the seeds and the flags of the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("table", choices=TABLES)
  parser.add_argument("--data", type=Path, help="a TFDS folder with cifar10")
  parser.add_argument("--out", type=Path, default=Path("runs/images"))
  parser.add_argument("--model", default="resnet20")
  parser.add_argument("--epochs", type=int, default=30)
  parser.add_argument("--seeds", default="0,1")
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--only", default="", help="of the names of rows")
  parser.add_argument("--minutes", type=float, default=math.inf)
  args, fields = parser.parse_known_args()
  flags = field_flags(parser, fields, OURS)
  if args.epochs < 2:
    parser.error(f"--epochs must be >= 2; got {args.epochs}")
  runs = {name: run for name, run in TABLES[args.table].items() if re.search(args.only, name)}
  seeds = [int(seed) for seed in args.seeds.split(",")]
  if not runs:
    parser.error(f"--only must match a row of {args.table}; got {args.only!r}")
  return args, runs, seeds, flags


class Job(SideBySide):
  """Runs of the command, several at a time, each with its own folder and output."""

  def __init__(self, args, fields):
    super().__init__(args.jobs, args.minutes)
    self.args, self.fields = args, fields

  def run(self, runs, seeds):
    """Returns the result of each name and seed; None where there is none."""
    late, half = sorted({width(run) for run in runs.values() if run.late}), self.args.epochs // 2

    def submit(pool):
      """Submits all runs, those that others start from first."""
      starts, found = {}, {}
      for seed, w in itertools.product(seeds, late):
        first = Run(f"gates=none,width={w}")
        starts[w, seed] = pool.submit(self._one, f"start, width {w}", seed, first, half)
      for seed, (name, run) in itertools.product(seeds, runs.items()):
        epochs = self.args.epochs - half * run.late
        start = starts[width(run), seed] if run.late else None
        found[name, seed] = pool.submit(self._one, name, seed, run, epochs, start)
      return found

    return self.gather(submit)

  def _one(self, name, seed, run, epochs, start=None):
    """Returns the result of one run; None where it, or the run it starts from, does not finish."""
    folder, fields = self._folder(name, seed), list(run.fields)
    if start:
      if start.result() is None:
        return None
      fields.append(f"model.init_from={self._folder(f'start, width {width(run)}', seed)}")
    variants = f"model={self.args.model},{run.variants},schedule=cosine,epochs={epochs}"
    command = [
      *COMMAND,
      f"--config={CONFIG}:{variants}",
      f"--workdir={folder}",
      f"--config.seed={seed}",
      "--config.eval_every=0",
      "--config.checkpoint_every=10",
      *(f"--config.{field}" for field in fields),
      *self.fields,
    ]
    if self.args.data:
      command.append(f"--config.data.data_dir={self.args.data.resolve()}")
    done = self.finish(folder, command)
    outcome = f"done: {name}, seed {seed}"
    if not done:
      outcome = f"NOT DONE: {name}, seed {seed}; see {folder}.txt"
    self.tell(outcome)
    if not done:
      return None
    result = json.loads((folder / "result.json").read_text())
    return result | {"training": training_accuracy(folder)}

  def _folder(self, name, seed):
    """Returns the run directory of a row and seed."""
    table = self.args.out / f"{self.args.table}-{self.args.model}"
    return (table / f"{folder_name(name)}-{seed}").resolve()


def width(run):
  """Returns the width of a run's net, as its variants have it."""
  return dict(item.split("=") for item in run.variants.split(",")).get("width", "1")


def row(name, results):
  """Returns means over seeds, and the accuracies themselves."""
  found = {
    "name": name,
    "seeds": len(results),
    "accuracies": [r["accuracy"] for r in results],
    "training": [r["training"] for r in results if r.get("training") is not None],
  }
  for key in MEANS:
    # A result has only the numbers that its kind of net has.
    known = bool(results) and key in results[0]
    found[key] = statistics.fmean(r[key] for r in results) if known else None
  return found


def compared(rows):
  """Adds the `gain` over an ungated net of equal MACs.

  Between ungated widths, accuracy is interpolated linearly in log MACs.
  """
  curve = []
  for r in rows:
    if r["name"].startswith("ungated"):
      curve.append((math.log(r["macs"]), r["accuracy"]))
  curve.sort()
  for r in rows:
    at, r["gain"] = math.log(r["macs"]), None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
      if x0 <= at <= x1 and not r["name"].startswith("ungated"):
        r["gain"] = r["accuracy"] - (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
  return rows


def mac_table(rows):
  """Returns the table of accuracy against MACs."""
  lines = [
    "| net | accuracy of each seed | mean | in training | parameters | M MACs | of its ungated net "
    "| against ungated of equal MACs | deviation over images | easy to hard quarter "
    "| always open, closed, random, conditional | s |",
    "|---" * 12 + "|",
  ]
  for r in rows:
    gain = "" if r["gain"] is None else f"{100 * r['gain']:+.2f}"
    lines.append(
      f"| {r['name']} | {percents(r['accuracies'])} | {100 * r['accuracy']:.2f} "
      f"| {percents(r['training'])} "
      f"| {r['params'] + r['gate_params']:,.0f} | {r['macs'] / 1e6:.2f} "
      f"| {100 * r['mac_ratio']:.1f} % "
      f"| {gain} | {spread(r)} | {outcomes(r)} | {r['seconds_since_last_start']:.0f} |"
    )
  return "\n".join(lines)


def spread(r):
  """Returns two cells: deviation of MACs over images, and means of the easiest and hardest quarter.

  All are fractions of the mean over all images. Empty where every image takes the same.
  """
  if not r["macs_std"]:
    return " | "
  deviation = f"{100 * r['macs_std'] / r['macs']:.1f} %"
  easy = f"{100 * r[QUARTERS[0]] / r['macs']:.1f} %"
  hard = f"{100 * r[QUARTERS[-1]] / r['macs']:.1f} %"
  return f"{deviation} | {easy} → {hard}"


def outcomes(r):
  """Returns numbers of gates, rounded means over seeds; empty without gates."""
  if not r["gates"]:
    return ""
  return f"{', '.join(f'{r[o]:.0f}' for o in OUTCOMES)} of {r['gates']:.0f}"


def outcome_table(rows):
  """Returns the table of gate outcomes."""
  lines = [
    "| regulariser | accuracy of each seed | MACs | always open | always closed | random dropout "
    "| conditional | two draws differ | bits about the input | about the class | deviation over "
    "images | easy to hard quarter | s a run |",
    "|---" * 13 + "|",
  ]
  for r in rows:
    shares = " | ".join(f"{100 * r[o] / r['gates']:.0f} %" for o in OUTCOMES)
    lines.append(
      f"| {r['name']} | {percents(r['accuracies'])} | {100 * r['mac_ratio']:.1f} % | {shares} | "
      f"{100 * r['disagreement']:.0f} % | {r['input_information']:.3f} "
      f"| {r['class_information']:.3f} | "
      f"{spread(r)} | {r['seconds_since_last_start']:.0f} |"
    )
  return "\n".join(lines)


def percents(values):
  """Returns fractions in percent, with commas between them."""
  return ", ".join(f"{100 * value:.2f}" for value in values)


if __name__ == "__main__":
  main()
