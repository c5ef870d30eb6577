"""Joint multi-task learning with a growing number of tasks: accuracy per task, and shared gates.

    python benchmarks/multitask.py --runs=runs/multitask --config=split_digits:width=0.1 \
        --counts=1,3,5 --seeds=0,1,2

Accuracies are in % with the task known, means over seeds: of the first task, which every count has;
of all tasks, with the deviation over seeds; and of each task. MACs are fractions of the dense
net's.
"""

import argparse
import statistics
from pathlib import Path

import continual
from absl import flags

COLUMNS = (
  f"{'tasks':>5} {'method':<16}{'first':>7}{'all':>14}{'unknown':>9}{'overlap':>9}{'MACs':>7}  each"
)


def main():
  """Prints a line for each number of tasks and method."""
  parser = continual.arguments(__doc__, "multitask_trunk,multitask_norms,multitask_gates")
  parser.add_argument("--counts", default="1,2,3,4,5", help="numbers of tasks")
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  print(f"{args.config} {' '.join(args.set)}, seeds {args.seeds}\n{COLUMNS}", flush=True)
  for count in map(int, args.counts.split(",")):
    of_count = argparse.Namespace(
      **{
        **vars(args),
        "runs": Path(args.runs, f"{count}-tasks"),
        "set": [*args.set, f"tasks.count={count}"],
      }
    )
    for method in args.methods.split(","):
      results = [continual.run(of_count, method, int(seed)) for seed in args.seeds.split(",")]
      print(row(method, count, results), flush=True)


def row(method, count, results):
  """Returns the line of a method and a number of tasks."""
  last_rows = (r["task_aware"]["accuracies"][-1] for r in results)
  each = [statistics.fmean(column) for column in zip(*last_rows, strict=True)]
  averages = [r["task_aware"]["average_accuracy"] for r in results]
  spread = f" ± {100 * statistics.stdev(averages):.2f}" if len(averages) > 1 else ""
  return (
    f"{count:>5} {method:<16}{100 * each[0]:>7.2f}"
    f"{f'{100 * statistics.fmean(averages):.2f}{spread}':>14}"
    f"{100 * statistics.fmean(r['task_agnostic']['average_accuracy'] for r in results):>9.2f}"
    f"{continual.percent([r.get('mean_gate_overlap') for r in results]):>9}"
    f"{statistics.fmean(r['task_aware_macs'] / r['dense_macs'] for r in results):>7.3f}"
    f"  {' '.join(f'{100 * a:.1f}' for a in each)}"
  )


if __name__ == "__main__":
  main()
