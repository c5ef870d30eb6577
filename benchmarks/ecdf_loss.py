"""Time of the batch-shaping loss and its gradient: ours, plain autodiff, and the authors' PyTorch.

    python benchmarks/ecdf_loss.py [--authors=PATH] [--shapes=256x336,256x2048] [--repeats=15]
        [--json=FILE]

Ours is timed with either sort. PATH is a checkout of
github.com/Qualcomm-AI-research/batchshaping, timed if torch is installed as well. Prints medians
over interleaved repeats in one process, ratios to ours, and the largest difference from our
results: of the loss as a mean over gates, and of the gradient in the logits in the sum form, whose
size is about 0.1.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from gating_jax.ops import ranking
from gating_jax.ops.ecdf import batch_shaping_loss
from gating_jax.ops.priors import beta
from gating_jax.timing import race

A, B = 0.6, 0.4
SHAPES = "256x336,256x2048,256x7552,1024x2048"
# On CPU, for the shape below.
LIMITS = {"plain autodiff": 15, "authors": 10}
LIMITED_SHAPE = (256, 2048)
SORTS = {
  "compare-exchange network": ranking._network_argsort,
  "XLA's sort": ranking._library_argsort,
}


def main():
  """Prints and writes the rows of each shape."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--authors", type=Path, help="a checkout of github.com/Qualcomm-AI-research/batchshaping"
  )
  parser.add_argument("--shapes", default=SHAPES, help="batch x gates, with commas between")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  args = parser.parse_args()

  makers = {
    "ours": ours,
    "ours, other sort": ours_with_the_other_sort,
    "plain autodiff": plain_autodiff,
  }
  print(
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
    f"jax {jax.__version__}, "
    f"Beta({A}, {B}), float32, medians of {args.repeats} interleaved repeats"
  )
  if available(args.authors):
    import torch

    makers["authors"] = authors
    print(f"authors' code on cpu, torch {torch.__version__}, {torch.get_num_threads()} threads")
  rows = []
  for shape in args.shapes.split(","):
    rows += compare(tuple(map(int, shape.split("x"))), makers, args.repeats)
    # After every shape, so that the results so far remain if a later shape takes too long.
    if args.json:
      args.json.write_text(json.dumps(rows, indent=2) + "\n")


def available(path):
  """Checks that the authors' code can be imported; prints what is missing if not."""
  missing = "torch: pip install torch" if importlib.util.find_spec("torch") is None else None
  if path is None or not (path / "batchshaping" / "batch_shaping_loss.py").is_file():
    missing = "--authors=PATH of a checkout of github.com/Qualcomm-AI-research/batchshaping"
  if missing:
    print(f"authors' code left out; to include it, give {missing}")
    return False
  sys.path.insert(0, str(path))
  return True


def compare(shape, makers, repeats):
  """Prints the lines of one shape; returns them, one row per contender."""
  logits = distinct_logits(*shape)
  contenders = {name: make(logits) for name, make in makers.items()}
  gaps = differences(contenders, logits)
  times = {
    name: statistics.median(values)
    for name, values in race(contenders, repeats, settle=True).items()
  }
  chosen = sort_strategy(shape)
  sorts = {"ours": chosen, "ours, other sort": other_sort(chosen)}
  print(
    f"\n{shape[0]} x {shape[1]}, ours sorts by {chosen}, the other sort "
    f"is {sorts['ours, other sort']}"
  )
  print(f"{'':<18}{'median':>12}{'/ ours':>8}{'gap, value':>13}{'gap, gradient':>15}")
  rows = []
  for name, seconds in times.items():
    limited = shape == LIMITED_SHAPE and jax.default_backend() == "cpu" and name in LIMITS
    value, gradient = gaps[name]
    print(
      f"{name:<18}{1e3 * seconds:9.2f} ms{seconds / times['ours']:8.1f}{value:13.1e}"
      f"{gradient:15.1e}" + (f"   (limit {LIMITS[name]})" if limited else ""),
      flush=True,
    )
    rows.append(
      {
        "shape": "x".join(map(str, shape)),
        "form": name,
        "sort": sorts.get(name),
        "seconds": seconds,
        "times_ours": seconds / times["ours"],
        "value_gap": value,
        "gradient_gap": gradient,
      }
    )
  return rows


def distinct_logits(n, c):
  """Returns `[n, c]` logits like a net's, all different: on ties the gradients rightly differ."""
  rng = np.random.default_rng(0)
  place = rng.permuted(np.tile(np.arange(n)[:, None], c), axis=0)
  return (1 + 2 * special.ndtri((place + rng.uniform(0.25, 0.75, (n, c))) / n)).astype(np.float32)


def ours(logits):
  """Returns our loss's value and gradient as a function without arguments."""
  function = jax.jit(jax.value_and_grad(lambda z: batch_shaping_loss(z, beta(A, B)).sum()))
  logits = jnp.asarray(logits)
  return lambda: function(logits)


def ours_with_the_other_sort(logits):
  """Returns `ours` with the one of `ranking.argsort`'s two sorts that it would not choose here."""
  other = other_sort(sort_strategy(logits.shape))
  run = ours(logits)
  with mock.patch.object(ranking, "argsort", SORTS[other]):
    # Traces and compiles.
    run()
  return run


def plain_autodiff(logits):
  """Returns the loss differentiated by JAX, as a function without arguments."""

  # From probabilities, so it is spared the sigmoid. `betainc` takes nearly all of the time: the
  # sort's axis, its stability, and starting from logits change less than the timings scatter.
  def loss(p):
    """Computes the loss of probabilities `[n, c]`, summed over gates."""
    n = p.shape[0]
    expected = jnp.arange(1, n + 1, dtype=p.dtype)[:, None] / (n + 1)
    return jnp.mean(
      (jax.scipy.special.betainc(A, B, jnp.sort(p, axis=0)) - expected) ** 2, axis=0
    ).sum()

  function = jax.jit(jax.value_and_grad(loss))
  probs = jnp.asarray(special.expit(logits))
  return lambda: function(probs)


def authors(logits):
  """Returns the authors' loss, as a function without arguments."""
  import torch
  from batchshaping.batch_shaping_loss import Prior, gbas_loss

  probs = torch.tensor(special.expit(logits), requires_grad=True)
  gates = logits.shape[1]

  def run():
    """Computes value and gradient."""
    probs.grad = None
    # Theirs is the mean over gates.
    loss = gates * gbas_loss(probs, Prior.BETA, A, B, dim=1)
    loss.backward()
    return loss.detach(), probs.grad

  return run


def differences(contenders, logits):
  """Returns, per contender, the largest differences of value and gradient from ours.

  The others' gradients are those in p.
  """
  n, c = logits.shape
  p = special.expit(logits.astype(np.float64))

  def comparable(name):
    """Returns a contender's value and gradient, per gate and in log-odds."""
    value, gradient = (np.asarray(part, np.float64) for part in contenders[name]())
    return value / c, n * gradient * (1 if name.startswith("ours") else p * (1 - p))

  ours = comparable("ours")
  gaps = {}
  for name in contenders:
    value, gradient = comparable(name)
    gaps[name] = [float(np.max(np.abs(value - ours[0]))), float(np.max(np.abs(gradient - ours[1])))]
  return gaps


def sort_strategy(shape):
  """Returns which of `ranking.argsort`'s two sorts runs here, read from the compiled program."""
  program = jax.jit(ranking.argsort).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text()
  return "XLA's sort" if "stablehlo.sort" in program else "compare-exchange network"


def other_sort(chosen):
  """Returns the name of the sort that was not chosen."""
  return next(name for name in SORTS if name != chosen)


if __name__ == "__main__":
  main()
