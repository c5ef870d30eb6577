"""How hard is the embedded task of long videos? Logistic regression on which unit actions a few segments show.

    python benchmarks/composed_probe.py [--train_videos=1600] [--test_videos=640] [--seed=0]

The probe is told the truth about random segments of a video: their unit actions or, as far as a centre frame could
tell, their digit classes alone. Its input is the bag of what it sees; the order says nothing here. Chance is 1/16.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from sklearn.linear_model import LogisticRegression

from gating_jax.data.composed import UNIT_NAMES, composed

COUNTS = (1, 2, 4, 8, 16)
DRAWS = 5  # of the segments of each training video


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--train_videos", type=int, default=1600)
  parser.add_argument("--test_videos", type=int, default=640)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  train, test = (
    composed(split, videos=videos, seed=args.seed).arrays
    for split, videos in (("train", args.train_videos), ("test", args.test_videos))
  )
  print(f"{'segments':>8}{'unit actions':>14}{'digit classes':>15}")
  for count in COUNTS:
    scores = (
      accuracy(train, test, count, motions=motions, seed=args.seed) for motions in (True, False)
    )
    print(f"{count:>8}{next(scores):>14.1%}{next(scores):>15.1%}")


def accuracy(train, test, count, *, motions, seed=0):
  """Test accuracy from `count` random segments of each video; without `motions` their digit classes alone are known."""
  rng = np.random.default_rng(seed)
  rows = np.concatenate([seen(rng, train["units"], count, motions) for _ in range(DRAWS)])
  probe = LogisticRegression(max_iter=300).fit(rows, np.tile(train["label"], DRAWS))
  return probe.score(seen(rng, test["units"], count, motions), test["label"])


def seen(rng, units, count, motions):
  """Which unit actions, or digit classes, and clutter, some random segments show: 0 and 1, `[M, 1 + units]`."""
  kinds = (units if motions else units // (len(UNIT_NAMES) // 10)) + 1
  picked = rng.permuted(kinds, axis=1)[:, :count]
  return (picked[..., None] == np.arange(1 + len(UNIT_NAMES))).any(axis=1).astype(np.float32)


if __name__ == "__main__":
  main()
