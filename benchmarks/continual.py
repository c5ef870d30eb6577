"""Methods of continual learning on one config: accuracies, forgetting and cost.

    python benchmarks/continual.py --runs=runs/continual --config=split_digits:width=0.3 \
        --methods=ewc,lwf --seeds=0,1 [--alone=5]

Each run is a run directory, so that finished ones are not repeated. Accuracy, with the task known
and unknown, is the mean over tasks after the last; forgetting is with the task known, in points;
overlap is the fraction of units that two tasks have in common.

`--alone=5` trains a network for each of the first five tasks, on that task alone, and prints means
over them: what a method could reach if tasks cost each other nothing. Of an ungated net,
`--methods=fine_tuning` is the baseline of methods that forget nothing.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from absl import flags

from gating_jax import config_files
from gating_jax.checks import near
from gating_jax.continual import run as continual_run
from gating_jax.continual.registry import METHODS
from gating_jax.training import rundir


def main():
  """Prints a line for each method."""
  parser = arguments(__doc__, ",".join(METHODS))
  parser.add_argument(
    "--alone", type=int, default=0, metavar="TASKS", help="one network for each of so many tasks"
  )
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  seeds = [int(seed) for seed in args.seeds.split(",")]
  print(
    f"{args.config}, seeds {args.seeds}, {jax.device_count()} devices\n{'method':<16}{'known':>18}"
    f"{'unknown':>18}"
    f"{'forgetting':>11}{'overlap':>9}{'MACs':>8}{'unknown':>8}{'params':>10}{'MB':>8}"
    f"{'seconds':>9}",
    flush=True,
  )
  train = run_alone if args.alone else run
  for method in args.methods.split(","):
    print(row(method, [train(args, method, seed) for seed in seeds]), flush=True)


def row(method, results):
  """Returns the line of a method, from its results over seeds."""

  def mean(key):
    """Returns the mean of a number over seeds."""
    return statistics.mean(r[key] for r in results)

  def each(kind):
    """Returns the accuracy of each seed."""
    return " ".join(f"{100 * r[kind]['average_accuracy']:.1f}" for r in results)

  def fraction(key):
    """Returns MACs as a fraction of the dense net's."""
    return f"{statistics.mean(r[key] / r['dense_macs'] for r in results):.3f}"

  forgetting = percent([r["task_aware"]["forgetting"] for r in results])
  overlap = percent([r.get("mean_gate_overlap") for r in results])
  return (
    f"{method:<16}{each('task_aware'):>18}{each('task_agnostic'):>18}{forgetting:>11}{overlap:>9}"
    f"{fraction('task_aware_macs'):>8}{fraction('task_agnostic_macs'):>8}"
    f"{mean('params'):>10,.0f}{mean('memory_mb'):>8.2f}{mean('seconds_since_last_start'):>9.0f}"
  )


def arguments(description, methods):
  """Returns the parser of a benchmark of methods."""
  parser = config_arguments(description)
  parser.add_argument("--runs", type=Path, required=True)
  parser.add_argument("--methods", default=methods)
  return parser


def config_arguments(description):
  """Returns the parser of a benchmark on one config."""
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  parser.add_argument("--config", default="split_digits")
  parser.add_argument("--seeds", default="0")
  parser.add_argument(
    "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config, as JSON"
  )
  return parser


def percent(shares):
  """Formats the mean in %, where it is defined."""
  return "n/a" if None in shares else f"{100 * statistics.mean(shares):.2f}"


def configured(args, fields):
  """Returns the config that the arguments name, with these fields.

  Raises SystemExit where an argument sets a field that no config has: the run would be another
  than the one asked for.
  """
  name, _, variant = args.config.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(variant)
  changes = {}
  for argument in args.set:
    field, value = argument.split("=", 1)
    changes[present_name(config, field)] = json.loads(value)
  config.update_from_flattened_dict(changes | fields)
  return config


def present_name(config, field):
  """Returns the name that a field has in a config; `field` may be its name of an earlier version.

  Raises SystemExit where the config has no such field.
  """
  section, _, last = field.rpartition(".")
  # `rename_fields` takes a section by its last name, as in a config.
  fields = {last: None}
  config_files.rename_fields(fields, section.rpartition(".")[2])
  present = f"{section}.{next(iter(fields))}".lstrip(".")
  names = rundir.flatten(config)
  if present not in names:
    close = near(present, names)
    hint = f". Did you mean {close[0]!r}?" if close else ""
    raise SystemExit(f"--set must name a field of the config; got {field!r}{hint}")
  return present


def run_alone(args, method, seed):
  """Returns the means of the results of networks that have each learnt one task."""
  width = configured(args, {}).tasks.classes_per_task
  results = []
  for task in range(args.alone):
    classes = tuple(range(width * task, width * (task + 1)))
    fields = {"tasks.classes": (classes,)}
    results.append(run(args, method, seed, fields=fields, name=f"{method}-task{task + 1}"))
  return mean_result(results)


def mean_result(results):
  """Returns what `row` reads of a result: means over results, and the sum of their seconds."""
  means = {}
  for kind in ("task_aware", "task_agnostic"):
    accuracy = statistics.mean(r[kind]["average_accuracy"] for r in results)
    means[kind] = {"average_accuracy": accuracy, "forgetting": None}
  for key in ("task_aware_macs", "task_agnostic_macs", "dense_macs", "params", "memory_mb"):
    means[key] = statistics.mean(r[key] for r in results)
  means["seconds_since_last_start"] = sum(r["seconds_since_last_start"] for r in results)
  return means


def run(args, method, seed, fields=types.MappingProxyType({}), *, name=None):
  """Returns the result of a run; ends this process where the run was stopped.

  Args:
    args: of the command.
    method, seed: of the run.
    fields: further fields of the config, by their names.
    name: of the run directory, before its seed; by default that of the method.
  """
  workdir = args.runs / args.config.replace(":", "-") / f"{name or method}-{seed}"
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with workdir.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log):
    # A finished run is not repeated, and a run of another config is an error.
    config = configured(args, {"method": method, "seed": seed, **fields})
    continual_run.run(config, workdir, "train")
  if not (workdir / "result.json").exists():
    raise SystemExit(f"stopped in {workdir}; the same command goes on from there")
  return json.loads((workdir / "result.json").read_text())


if __name__ == "__main__":
  main()
