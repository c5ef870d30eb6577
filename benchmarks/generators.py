"""One generator for all tasks against one for each: memory, quality of images, and forgetting.

    python benchmarks/generators.py --config=split_digits --kinds=generative,gated_generative \
        --seeds=0

A judge, a support vector machine trained on real images of all classes, classifies the images.
Listed is the fraction of generated images that show the requested class, right after the task's
training (`then`) and after the last task (`now`). `same` is the fraction of images that have not
changed since then, bit for bit.
"""

import dataclasses
import functools
import time

import continual
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from sklearn.svm import SVC

from gating_jax.continual import build, registry
from gating_jax.data import image_sets

# Most images that the judge is trained on.
_JUDGE_IMAGES = 10_000


def main():
  """Prints a line for each kind of generators and seed."""
  parser = continual.config_arguments(__doc__)
  parser.add_argument("--kinds", default="generative,gated_generative")
  args = parser.parse_args()
  flags.FLAGS.mark_as_parsed()
  experiment = experiment_of(args, "generative", 0)
  judge = trained_judge(experiment)
  sets = [task.test for task in experiment.tasks]
  right = np.mean([np.mean(judge(s.pixels) == s.labels) for s in sets])
  print(
    f"{args.config}, seeds {args.seeds}, {' '.join(args.set)}; the judge on real test "
    f"images: {100 * right:.1f} %\n"
    f"{'generators':<18}{'seed':>5}{'kB':>7}{'then':>7}{'now':>7}{'same':>7}  "
    f"{'now, by task':<26}{'units used, by task':<26}{'seconds':>8}",
    flush=True,
  )
  for kind in args.kinds.split(","):
    for seed in map(int, args.seeds.split(",")):
      report(kind, seed, experiment_of(args, kind, seed), judge)


def experiment_of(args, kind, seed):
  """Builds the experiment with these generators."""
  fields = {"method": "gates", "seed": seed, "router.rehearsal": kind}
  return build.build(continual.configured(args, fields))


def report(kind, seed, experiment, judge):
  """Trains the generators of all tasks and prints a line."""
  start, config = time.perf_counter(), experiment.config
  problem, count = dataclasses.replace(experiment.problem, axis_name=None), config.generator.images
  rehearsal = registry.REHEARSALS[kind](config, problem)
  memory, key = rehearsal.init(experiment.key(0)), experiment.key(1)
  then = []
  for task in range(problem.tasks):
    memory = trained(rehearsal, memory, experiment, task)
    pixels, labels = rehearsal.recall(memory, None, task, key)
    then.append(pixels[task * count :])
    memory = rehearsal.keep(memory, None, task, key)
  images_of_task = np.split(pixels, problem.tasks)
  now, before = [], []
  for task, wanted in enumerate(np.split(labels, problem.tasks)):
    now.append(np.mean(judge(images_of_task[task]) == wanted))
    before.append(np.mean(judge(then[task]) == wanted))
  same = np.mean(np.all(np.concatenate(then) == pixels, axis=(1, 2, 3)))
  used = [
    np.asarray(units).mean(axis=1)
    for units in jax.tree.leaves(getattr(memory, "protection", ()))
    if np.ndim(units) == 2
  ]
  print(
    f"{kind:<18}{seed:>5}{1000 * rehearsal.megabytes(memory, problem.tasks):>7.0f}"
    f"{100 * np.mean(before):>7.1f}{100 * np.mean(now):>7.1f}{100 * same:>7.1f}  "
    f"{percents(now):<26}{''.join(map(percents, used)):<26}{time.perf_counter() - start:>8.0f}",
    flush=True,
  )


def percents(fractions):
  """Formats fractions in whole percent."""
  return " ".join(f"{100 * fraction:.0f}" for fraction in fractions)


def trained(rehearsal, memory, experiment, task):
  """Returns the memory after the pretraining of one task."""
  images, config = experiment.tasks[task].train, experiment.config
  pixels, labels = (jnp.asarray(x) for x in images.read(slice(None)))
  size = config.generator.batch_size * config.generator.critic_steps

  @functools.partial(jax.jit, donate_argnums=0)
  def run(memory, key):
    """Takes all steps of the pretraining."""

    def step(memory, key):
      """Takes one step on random images."""
      index = jax.random.randint(key, (size,), 0, len(labels))
      own = labels[index] - task * experiment.problem.classes
      return rehearsal.pretrain_step(memory, pixels[index], own)[0], None

    return jax.lax.scan(step, memory, jax.random.split(key, config.generator.steps))[0]

  return run(jax.tree.map(jnp.copy, memory), jax.random.key(task))


def trained_judge(experiment):
  """Returns a function from pixels to classes."""
  images = image_sets.join(tuple(task.train for task in experiment.tasks))
  chosen = np.random.default_rng(0).permutation(len(images))[:_JUDGE_IMAGES]

  def flat(pixels):
    """Returns `[n, pixels]` in [0, 1]."""
    return np.asarray(pixels).reshape(len(pixels), -1) / 255

  pixels, labels = images.read(chosen)
  judge = SVC(C=10).fit(flat(pixels), labels)
  return lambda pixels: judge.predict(flat(pixels))


if __name__ == "__main__":
  main()
