"""Difficulty of the embedded task of long videos: logistic regression on a few segments' actions.

    python benchmarks/composed_probe.py [--train_videos=1600] [--test_videos=640] [--seed=0]

The probe gets the ground truth of random segments of a video: their unit actions or, as far as a
centre frame could show, their digit classes alone. Its input is a bag of these; their order carries
no information here. Chance is 1/16.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from sklearn.linear_model import LogisticRegression

from gating_jax.data.composed import UNIT_NAMES, make_videos

COUNTS = (1, 2, 4, 8, 16)
# How often the segments of each training video are drawn.
DRAWS = 5


def main():
  """Prints the accuracies for each number of segments."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--train_videos", type=int, default=1600)
  parser.add_argument("--test_videos", type=int, default=640)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  train, test = (
    make_videos(split, videos=videos, seed=args.seed).arrays
    for split, videos in (("train", args.train_videos), ("test", args.test_videos))
  )
  print(f"{'segments':>8}{'unit actions':>14}{'digit classes':>15}")
  for count in COUNTS:
    scores = (
      accuracy(train, test, count, motions=motions, seed=args.seed) for motions in (True, False)
    )
    print(f"{count:>8}{next(scores):>14.1%}{next(scores):>15.1%}")


def accuracy(train, test, count, *, motions, seed=0):
  """Returns the test accuracy from `count` random segments of each video.

  Without `motions` only their digit classes are known.
  """
  rng = np.random.default_rng(seed)
  rows = np.concatenate([seen(rng, train["units"], count, motions) for _ in range(DRAWS)])
  probe = LogisticRegression(max_iter=300).fit(rows, np.tile(train["label"], DRAWS))
  return probe.score(seen(rng, test["units"], count, motions), test["label"])


def seen(rng, units, count, motions):
  """Returns `[M, 1 + units]` of 0 and 1: the clutter and unit actions that random segments show.

  Without `motions` these are digit classes.
  """
  kinds = (units if motions else units // (len(UNIT_NAMES) // 10)) + 1
  picked = rng.permuted(kinds, axis=1)[:, :count]
  return (picked[..., None] == np.arange(1 + len(UNIT_NAMES))).any(axis=1).astype(np.float32)


if __name__ == "__main__":
  main()
