"""The frontier of accuracy and cost: a family of ungated nets, and what competes with it.

    python benchmarks/frontier.py TABLE [--data=FOLDER] [--out=runs/frontier] [--seeds=0,1,2]
        [--epochs=N] [--jobs=1] [--only=REGEX] [--minutes=N] [--times] [--FIELD=VALUE ...]

TABLE: `worlds`, `union` (made sets, which need no files), `union3` or `union4` (real ones),
`cifar10`, or `trained_worlds` and `trained_cifar10`, whose nets come from a trained one
(configs/from_trained.py).
A table is a list of rows: the family, which are ungated nets of several widths; baselines, such as
squeeze-and-excitation or static gates; gated nets of about the MACs of one of the family; and an
ungated net with the channels, and so about the parameters, of the gated ones. All are trained on
the same data for the same epochs, with each seed. A row of one net for each set of a union has as
much training in all, and each of its nets has the classes of its own set alone. Accuracy and MACs
of a union are means over its sets, whose shares in training are equal, and not in tests.

Every run is one of `gating_jax.cli`, JOBS of them at a time; FIELD applies to all of them. The same
command resumes where it was stopped, and reuses finished runs of the same config. After N minutes,
or at Ctrl-C or SIGTERM, running jobs are stopped and can be resumed later. With `--times`,
`--mode=compile` then times the first seed of each row, one row after the other: nothing else should
run meanwhile. Prints a table of what has finished, and writes OUT/TABLE.json and OUT/TABLE.png.

What a row has, with its standard error over seeds:

    gain      its accuracy, less that of the family at its MACs and its seed: between two widths,
              accuracy is linear in log MACs; no number beyond the narrowest and the widest
    over      its gain, less that of a baseline
    capture   gain / gain of the net of equal parameters: how much of what the parameters are worth
              the net has at a fraction of their MACs; in tests and in training

and parameters, MACs, what became of the gates, their information about input, class and set,
the same numbers for each set of a union, and milliseconds.
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
from gating_jax.reports import measured_times, page
from gating_jax.timing import UNGATED as UNGATED_PROGRAM

# Kinds of rows, with their names in pictures, colours and markers.
FAMILY, BASELINE, PARAMETERS, GATED = "family", "baseline", "parameters", "gated"
LOOKS = {
  FAMILY: ("ungated", "#4c78a8", "o"),
  BASELINE: ("baseline", "#e0823d", "^"),
  PARAMETERS: ("ungated, as many parameters", "#8c8c8c", "D"),
  GATED: ("gated", "#2a9d6f", "s"),
}
# Fields in which runs differ.
OURS = ("seed", "eval_every", "data.data_dir", "model.init_from", "loss.distillation.teacher")
# Numbers of a result of which a row has the mean over seeds.
MEANS = (
  "params",
  "gate_params",
  "mac_ratio",
  "macs_std",
  "gates",
  "mean_open",
  *OUTCOMES,
  "disagreement",
  "input_information",
  "class_information",
  "source_information",
  "mean_set_overlap",
  "seconds_since_last_start",
)


@dataclasses.dataclass(frozen=True)
class Row:
  """A net of a table.

  Attributes:
    name: of the row.
    kind: one of `LOOKS`.
    config: as the command takes it, with its variants; `{start}` stands for a run directory.
    fields: of the config, `name=value`.
    wide: of a gated row, that of an ungated net with as many parameters.
    start: the row whose run, of the same seed, is that directory.
    together: the row that this one makes with others: one net for each set of a union, which have
      the accuracy, the MACs and the training of all together.
  """

  name: str
  kind: str
  config: str
  fields: tuple[str, ...] = ()
  wide: str = "all open"
  start: str = ""
  together: str = ""


def of_config(file, widths, sets=""):
  """Returns the rows of `configs/worlds.py` or `configs/union.py`.

  Args:
    file: of the config.
    widths: of the ungated nets, in sixteenths: channels of the first stage. The middle one is that
      of all other rows but that of mixed kernels.
    sets: variants of all rows.
  """
  middle = widths[len(widths) // 2]

  def config(row, width=middle):
    """Returns the config of a row."""
    return f"{file}:row={row},{sets}width={width / 16:g}"

  rows = [Row(f"ungated, {w}", FAMILY, config("ungated", w)) for w in widths]
  rows += [
    Row("squeeze-excite", BASELINE, config("scale")),
    # Mixing costs MACs, so that about as many leave fewer channels.
    Row("mixed kernels", BASELINE, config("kernels", middle - 1)),
    Row("told by biases", BASELINE, config("bias")),
    Row("all open", PARAMETERS, config("all_open")),
    Row("recipe", GATED, config("recipe")),
    Row("recipe, told", GATED, config("told")),
    Row("oracle", GATED, config("oracle")),
    Row("random", GATED, config("random")),
  ]
  return rows


def of_union(widths, sets, more=""):
  """Returns the rows of `configs/union.py`, and those of one ungated net for each set.

  Args:
    widths: as in `of_config`.
    sets: their names.
    more: variants of all rows.
  """
  file, middle = "configs/union.py", widths[len(widths) // 2]
  rows = of_config(file, widths, f"sets={'+'.join(sets)},{more}")
  for name in sets:
    config = f"{file}:row=ungated,sets={name},{more}width={middle / 16:g}"
    rows.append(Row(f"{name} alone", BASELINE, config, together="a net a set"))
  return rows


def of_trained(task):
  """Returns the rows of `configs/from_trained.py`.

  The family are narrower nets that are trained as long as the dense one, which is their teacher.

  Args:
    task: one of the config's.
  """
  file = f"configs/from_trained.py:task={task}"
  rows = [Row("dense", FAMILY, f"{file},row=dense", wide="dense")]
  for macs in (70, 50, 30):
    for kind, name, row in (
      (FAMILY, "narrower, as long", "narrow_full"),
      (BASELINE, "narrower", "narrow"),
      (BASELINE, "pruned", "static"),
      (GATED, "gated", "gated"),
    ):
      config = f"{file},row={row},macs={macs},dense={{start}}"
      rows.append(Row(f"{name}, {macs} %", kind, config, wide="dense", start="dense"))
  return rows


CIFAR = "configs/cifar10_resnet20.py:model=resnet8,schedule=cosine,epochs=15"
# Early in training, gates with a budget are noisy; their networks learn fast.
BUDGET = (
  "optim.gate_lr_multiplier=5",
  "model.noise.ramp_start=0.5",
  "model.noise.ramp_end=0.9",
)
TABLES = {
  "worlds": [
    *of_config("configs/worlds.py", (4, 5, 6, 7, 8)),
    Row("pooled, noise, budget", GATED, "configs/worlds.py:row=iclr2020"),
  ],
  "union": of_union((4, 5, 6, 7, 8), ("digits", "digit_scenes", "turned_digits")),
  "union3": of_union((6, 7, 8, 9, 10), ("mnist", "cifar10", "tiny_imagenet50"), "images=64000,"),
  "union4": of_union(
    (6, 7, 8, 9, 10), ("mnist", "fashion_mnist", "cifar10", "tiny_imagenet50"), "images=64000,"
  ),
  "cifar10": [
    *[
      Row(f"ungated, width {w:g}", FAMILY, f"{CIFAR},gates=none,width={w:g}")
      for w in (0.25, 0.35, 0.5, 0.71)
    ],
    Row("squeeze-excite", BASELINE, f"{CIFAR},gates=scale,width=0.35"),
    Row("mixed kernels", BASELINE, f"{CIFAR},gates=kernels,width=0.35"),
    Row(
      "static, to 27 %",
      BASELINE,
      f"{CIFAR},gates=static,width=0.35,inner=4,budget=0.27,noise=0.25,noise_to=0",
      BUDGET,
    ),
    Row("all open", PARAMETERS, f"{CIFAR},gates=none,width=0.35,inner=4"),
    Row(
      "recipe",
      GATED,
      f"{CIFAR},gates=channel,width=0.35,inner=4,equal=1,context=glance+pooled",
    ),
    Row(
      "pooled, noise, budget of 27 %",
      GATED,
      f"{CIFAR},gates=channel,width=0.35,inner=4,budget=0.27,noise=0.25,noise_to=0",
      BUDGET,
    ),
  ],
  "trained_worlds": of_trained("worlds"),
  "trained_cifar10": of_trained("cifar10"),
}


def main():
  """Runs a table, prints it and writes it."""
  args, rows, seeds, flags = parse()
  args.out.mkdir(parents=True, exist_ok=True)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  job = Family(args, flags)
  results = job.run(rows, seeds)
  times = job.time_rows(rows, seeds, results) if args.times else {}
  found = []
  for row, finished in group(rows, seeds, results):
    found.append(summarise(row, finished) | {"milliseconds": times.get(row.name)})
  missing = []
  for row, seed in itertools.product(rows, seeds):
    if results[row.name, seed] is None:
      missing.append(f"{row.name} of seed {seed}")
  compare(found)
  print(table_of(found))
  content = {"table": args.table, "flags": flags, "seeds": seeds, "rows": found}
  (args.out / f"{args.table}.json").write_text(json.dumps(content, indent=2) + "\n")
  if found:
    page.save_figure(draw(found), args.out / f"{args.table}.png")
  if missing:
    sys.exit(f"not finished: {', '.join(missing)}")


def parse():
  """Returns the arguments, the rows, the seeds and the flags of the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("table", choices=TABLES)
  parser.add_argument("--data", type=Path, help="a TFDS folder with the sets")
  parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
  parser.add_argument("--epochs", type=int, help="of every run; by default the config's own")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--only", default="", help="of the names of rows, as the table has them")
  parser.add_argument("--minutes", type=float, default=math.inf)
  parser.add_argument("--times", action="store_true", help="also time the first seed of each row")
  args, options = parser.parse_known_args()
  flags = field_flags(parser, options, OURS)
  if args.epochs is not None and args.epochs < 1:
    parser.error(f"--epochs must be >= 1; got {args.epochs}")
  # Rows that are one together are chosen together, since one alone would be taken for all.
  rows = [row for row in TABLES[args.table] if re.search(args.only, row.together or row.name)]
  if not rows:
    parser.error(f"--only must match a row of {args.table}; got {args.only!r}")
  # Runs that others start from come with them, and before them.
  by_name = {row.name: row for row in TABLES[args.table]}
  for start in {row.start for row in rows if row.start} - {row.name for row in rows}:
    rows.insert(0, by_name[start])
  rows.sort(key=lambda row: bool(row.start))
  return args, rows, [int(seed) for seed in args.seeds.split(",")], flags


class Family(SideBySide):
  """The runs of a table."""

  def __init__(self, args, flags):
    super().__init__(args.jobs, args.minutes)
    self.args, self.flags = args, flags

  def run(self, rows, seeds):
    """Returns the result of each row and seed; None where there is none."""

    def submit(pool):
      """Submits all runs, those that others start from first."""
      found = {}
      for row, seed in itertools.product(rows, seeds):
        start = found[row.start, seed] if row.start else None
        found[row.name, seed] = pool.submit(self._one, row, seed, start)
      return found

    return self.gather(submit)

  def time_rows(self, rows, seeds, results):
    """Returns the milliseconds of each row's first finished seed, by name."""
    found = {}
    for row in rows:
      # Several nets together have no time of their own.
      if row.together:
        continue
      seed = next((seed for seed in seeds if results[row.name, seed] is not None), None)
      if seed is None:
        continue
      folder = self.folder(row, seed)
      if not (folder / measured_times.TIMES_FILE).exists() and self.has_time():
        self._call(folder, [*COMMAND, f"--workdir={folder}", "--mode=compile"])
      found[row.name] = milliseconds(folder)
    return found

  def folder(self, row, seed):
    """Returns the run directory of a row and seed."""
    return (self.args.out / self.args.table / f"{folder_name(row.name)}-{seed}").resolve()

  def _one(self, row, seed, start):
    """Returns the result of one run; None where it, or the run it starts from, does not finish."""
    folder, config = self.folder(row, seed), row.config
    if start:
      if start.result() is None:
        return None
      first = dataclasses.replace(row, name=row.start)
      config = config.format(start=self.folder(first, seed))
    if self.args.epochs is not None:
      config += f"{',' if ':' in config else ':'}epochs={self.args.epochs}"
    command = [
      *COMMAND,
      f"--config={config}",
      f"--workdir={folder}",
      f"--config.seed={seed}",
      "--config.eval_every=0",
      *(f"--config.{field}" for field in row.fields),
      *self.flags,
    ]
    if self.args.data:
      command.append(f"--config.data.data_dir={self.args.data.resolve()}")
    if not self.finish(folder, command):
      self.tell(f"NOT DONE: {row.name}, seed {seed}; see {folder}.txt")
      return None
    self.tell(f"done: {row.name}, seed {seed}")
    result = json.loads((folder / "result.json").read_text())
    if "sets" in result:
      result |= {"accuracy": result["mean_set_accuracy"], "macs": result["mean_set_macs"]}
    return result | {"training": training_accuracy(folder)}


def group(rows, seeds, results):
  """Returns the rows that have finished runs, and the results of each by its seeds.

  Rows that are one together come as that row, with the seeds that all of them have.
  """
  members = {}
  for row in rows:
    members.setdefault(row.together or row.name, []).append(row)
  found = []
  for name, parts in members.items():
    finished = {}
    for seed in seeds:
      each = [results[part.name, seed] for part in parts]
      if None not in each:
        finished[seed] = join(each) if parts[0].together else each[0]
    if finished:
      found.append((dataclasses.replace(parts[0], name=name), finished))
  return found


def join(results):
  """Returns the results of nets for a set each as that of one net for all of these sets."""
  trained = [result["training"] for result in results if result["training"] is not None]
  return {
    "accuracy": statistics.fmean(result["accuracy"] for result in results),
    "macs": statistics.fmean(result["macs"] for result in results),
    "training": statistics.fmean(trained) if trained else None,
    "params": sum(result["params"] for result in results),
    "gate_params": sum(result["gate_params"] for result in results),
    "sets": {name: entry for result in results for name, entry in result["sets"].items()},
  }


def milliseconds(folder):
  """Returns the times of a run by title, compiled and ungated; None where it was not timed."""
  times = measured_times.read_times(folder)
  if times is None:
    return None
  found = {}
  for title, programs in times.timings.items():
    whole = [program for program in programs if program["part"] is None]
    entry = {}
    for program in whole:
      if program["chosen"]:
        entry["compiled"] = 1000 * program["seconds"]
      if program["strategy"] == UNGATED_PROGRAM:
        entry["ungated"] = 1000 * program["seconds"]
    found[title] = entry
  return found


def spread(values):
  """Returns values by place of seed, their mean and its standard error; None without any value.

  Args:
    values: of each seed of a row; None for a seed without one, which the mean leaves out.
  """
  known = [value for value in values if value is not None]
  if not known:
    return None
  error = None
  if len(known) > 1:
    error = statistics.stdev(known) / math.sqrt(len(known))
  return {"values": values, "mean": statistics.fmean(known), "standard_error": error}


def of_seed(row, measure, seed):
  """Returns the value of a row's seed; None where it has none.

  Args:
    row: as `summarise` returns it.
    measure: from a row to a `spread`.
    seed: of a run.
  """
  values = measure(row)
  if values is None or seed not in row["seeds"]:
    return None
  return values["values"][row["seeds"].index(seed)]


def macs_of(row):
  """Returns the `spread` of a row's MACs."""
  return row["macs"]


def summarise(row, results):
  """Returns a row's numbers.

  Args:
    row: of the table.
    results: of its runs, by seed.
  """
  each = list(results.values())
  found = {
    **dataclasses.asdict(row),
    "seeds": list(results),
    "accuracy": spread([result["accuracy"] for result in each]),
    "training": spread([result["training"] for result in each]),
    "macs": spread([result["macs"] for result in each]),
  }
  for key in MEANS:
    # A result has only the numbers that its kind of net and of set has.
    known = [result[key] for result in each if key in result]
    found[key] = statistics.fmean(known) if len(known) == len(each) else None
  sets = {}
  for name in each[0].get("sets", {}):
    sets[name] = {}
    for key in ("accuracy", "macs", "mean_open"):
      sets[name][key] = spread([result["sets"][name].get(key) for result in each])
  found["sets"] = sets
  return found


def compare(rows):
  """Adds to each row its gains over the family, over baselines, and its capture."""
  family = [row for row in rows if row["kind"] == FAMILY]
  for row in rows:
    if row["kind"] == FAMILY:
      continue
    row["gain"] = spread(gains(row, family, lambda r: r["accuracy"]))
    row["training_gain"] = spread(gains(row, family, lambda r: r["training"]))
    for name, entry in row["sets"].items():
      entry["gain"] = spread(gains(row, family, lambda r, name=name: r["sets"][name]["accuracy"]))
  by_name = {row["name"]: row for row in rows}
  for row in rows:
    if row["kind"] != GATED:
      continue
    row["over"] = {}
    for baseline in rows:
      if baseline["kind"] == BASELINE:
        row["over"][baseline["name"]] = difference(row, baseline, family)
    # What the net of equal parameters has more than the family at the MACs of this one.
    row["capture"] = capture(row, by_name.get(row["wide"]), family, "accuracy")
    row["training_capture"] = capture(row, by_name.get(row["wide"]), family, "training")


def gains(row, family, measure):
  """Returns the gain of each seed of a row; None where it has none.

  Args:
    row: as `summarise` returns it.
    family: rows of the family.
    measure: from a row to the `spread` of what is compared.
  """
  found = []
  for seed in row["seeds"]:
    expected = expect(of_seed(row, macs_of, seed), seed, family, measure)
    own = of_seed(row, measure, seed)
    found.append(None if None in (expected, own) else own - expected)
  return found


def expect(macs, seed, family, measure):
  """Returns what the family has at these MACs and this seed; None beyond its widths."""
  curve = []
  for member in family:
    value = of_seed(member, measure, seed)
    if value is not None:
      curve.append((math.log(of_seed(member, macs_of, seed)), value))
  curve.sort()
  at = math.log(macs)
  for (x0, y0), (x1, y1) in itertools.pairwise(curve):
    if x0 <= at <= x1:
      return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
  return None


def difference(row, baseline, family):
  """Returns the gains of a row less those of a baseline, over the seeds that both have."""
  own = dict(zip(row["seeds"], gains(row, family, lambda r: r["accuracy"]), strict=True))
  theirs = gains(baseline, family, lambda r: r["accuracy"])
  other = dict(zip(baseline["seeds"], theirs, strict=True))
  found = []
  for seed in row["seeds"]:
    both = (own[seed], other.get(seed))
    found.append(None if None in both else both[0] - both[1])
  return spread(found)


def capture(row, wide, family, key):
  """Returns the fraction of the gain of equal parameters that a row has, both at its MACs."""
  if wide is None:
    return None

  def measure(r):
    """Returns what is compared."""
    return r[key]

  own, most = [], []
  for seed in row["seeds"]:
    expected = expect(of_seed(row, macs_of, seed), seed, family, measure)
    gained, possible = of_seed(row, measure, seed), of_seed(wide, measure, seed)
    if None not in (expected, gained, possible):
      own.append(gained - expected)
      most.append(possible - expected)
  if not most or not sum(most):
    return None
  return sum(own) / sum(most)


def table_of(rows):
  """Returns the table as Markdown, and one of the sets where there are several."""
  lines = [
    "| net | accuracy | gain at equal MACs | in training | capture, in training | k MACs "
    "| parameters | always open, closed, random, conditional | bits on input, class, set "
    "| ms of one input, ungated | s |",
    "|---" * 11 + "|",
  ]
  for row in rows:
    captures = [fraction(row.get(key)) for key in ("capture", "training_capture")]
    cells = [
      row["name"],
      points(row["accuracy"]),
      points(row.get("gain"), sign=True),
      points(row["training"]),
      ", ".join(captures) if any(captures) else "",
      f"{row['macs']['mean'] / 1e3:,.1f}",
      f"{row['params'] + row['gate_params']:,.0f}",
      outcomes_of(row),
      bits_of(row),
      times_of(row),
      f"{row['seconds_since_last_start']:.0f}" if row["seconds_since_last_start"] else "",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  for row in rows:
    for baseline, gain in row.get("over", {}).items():
      if gain is not None:
        lines.append(f"\n{row['name']} over {baseline}: {points(gain, sign=True)}")
  return "\n".join([*lines, *set_lines(rows)])


def set_lines(rows):
  """Returns the lines of the table of sets; none where there is one set alone."""
  names = list(rows[0]["sets"]) if rows else []
  if not names:
    return []
  titles = [f"{name}: accuracy, gain, k MACs, open gates" for name in names]
  lines = ["", f"| net | {' | '.join(titles)} | overlap |", "|---" * (len(names) + 2) + "|"]
  for row in rows:
    cells = [row["name"]]
    for name in names:
      entry = row["sets"].get(name)
      # Of nets for a set each, some may not be finished.
      if entry is None:
        cells.append("")
        continue
      parts = [points(entry["accuracy"]), points(entry.get("gain"), sign=True)]
      parts.append(f"{entry['macs']['mean'] / 1e3:,.1f}")
      if entry["mean_open"] is not None:
        parts.append(f"{100 * entry['mean_open']['mean']:.0f} %")
      cells.append(", ".join(part for part in parts if part))
    cells.append(fraction(row["mean_set_overlap"]))
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def points(values, *, sign=False):
  """Formats mean and standard error in points; empty without values."""
  if values is None:
    return ""
  mean = f"{100 * values['mean']:{'+' if sign else ''}.2f}"
  if values["standard_error"] is None:
    return mean
  return f"{mean} ± {100 * values['standard_error']:.2f}"


def fraction(value):
  """Formats a fraction in percent; empty for None."""
  return "" if value is None else f"{100 * value:.0f} %"


def outcomes_of(row):
  """Returns numbers of gates, rounded means over seeds; empty without gates."""
  if not row["gates"]:
    return ""
  return f"{', '.join(f'{row[o]:.0f}' for o in OUTCOMES)} of {row['gates']:.0f}"


def bits_of(row):
  """Returns the information of a gate about input, class and set; empty without gates."""
  keys = ("input_information", "class_information", "source_information")
  return ", ".join(f"{row[key]:.2f}" for key in keys if row[key] is not None)


def times_of(row):
  """Returns the milliseconds of one input, and of the ungated program; empty where not timed."""
  for title, entry in (row["milliseconds"] or {}).items():
    if title.startswith("1 "):
      return ", ".join(f"{entry[key]:.2f}" for key in ("compiled", "ungated") if key in entry)
  return ""


def draw(rows):
  """Draws accuracy against MACs, with the family's curve and standard errors over seeds."""
  # They import slowly.
  from matplotlib import ticker
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  for kind, (label, colour, marker) in LOOKS.items():
    own = [row for row in rows if row["kind"] == kind]
    own.sort(key=lambda row: row["macs"]["mean"])
    if not own:
      continue
    macs = [row["macs"]["mean"] / 1e3 for row in own]
    means = [100 * row["accuracy"]["mean"] for row in own]
    errors = [100 * (row["accuracy"]["standard_error"] or 0) for row in own]
    line = "-" if kind == FAMILY else "none"
    axes.errorbar(
      macs, means, errors, color=colour, marker=marker, linestyle=line, capsize=3, label=label
    )
    if kind == FAMILY:
      continue
    for row, x, y in zip(own, macs, means, strict=True):
      axes.annotate(row["name"], (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8)
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel("thousand multiply-accumulates of a test image")
  axes.set_ylabel("test accuracy (%)")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=8, loc="lower right")
  return figure


if __name__ == "__main__":
  main()
