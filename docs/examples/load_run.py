"""Predictions and cost of a trained image classifier on images of its test set.

gating-jax --config=digits --workdir=runs/digits
python docs/examples/load_run.py runs/digits
"""

import sys

import jax
import numpy as np

from gating_jax import executed_macs, gated_macs, load_run
from gating_jax.data import augment, image_sets
from gating_jax.training import settings


def main(workdir):
  model, variables, config = load_run(workdir)
  data = config.data
  test = image_sets.load(settings.source_of(data, data.test_split), data.image_size)
  pixels, labels = test.read(np.arange(min(64, len(test))))
  logits, records = jax.jit(model.apply)(variables, augment.normalise(pixels, data.mean, data.std))
  right = np.argmax(logits, axis=1) == labels
  print(f"{right.sum()} of {len(right)} images right")
  if records:
    # [64], as a fraction of the MACs that gates can skip.
    part = executed_macs(records) / gated_macs(records)
    print(
      f"{part.mean():.1%} of the gated computation, from {part.min():.1%} to {part.max():.1%} of "
      "an image"
    )
  return right


if __name__ == "__main__":
  main(sys.argv[1])
