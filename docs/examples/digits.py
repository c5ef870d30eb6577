"""Shared parts of the examples: handwritten digits, and measures on the held-out ones.

The digits are those of scikit-learn, in a file here, so that the examples need NumPy alone.
Reference: Alpaydin and Kaynak, 1998, "Optical recognition of handwritten digits", UCI Machine
Learning Repository (CC BY 4.0).
"""

from pathlib import Path

import numpy as np

# Rows of 64 pixels from 0 to 16, and the digit.
_table = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
_images, _labels = np.float32(_table[:, :-1] / 16), _table[:, -1].astype(int)
# A fifth is held out, at random, as by `train_test_split(..., random_state=0)` of scikit-learn.
_order, _held_out = np.random.RandomState(0).permutation(len(_table)), -(-len(_table) // 5)
_test, _train = _order[:_held_out], _order[_held_out:]
x_train, x_test, y_train, y_test = _images[_train], _images[_test], _labels[_train], _labels[_test]


def batches(steps, size):
  """Yields images `[size, 64]` and their labels, drawn at random from the training set."""
  rng = np.random.default_rng(0)
  for _ in range(steps):
    index = rng.choice(len(x_train), size, replace=False)
    yield x_train[index], y_train[index]


def report(logits, gates):
  """Prints and returns the accuracy on the held-out images, and statistics of their gates.

  Gates are `[N, units]`.
  """
  open_share = np.mean(gates, axis=0)  # of each unit
  result = {
    "accuracy": float(np.mean(np.argmax(logits, axis=-1) == y_test)),
    "open": float(np.mean(open_share)),
    "conditional": int(np.sum((open_share >= 0.01) & (open_share <= 0.99))),
    "units": len(open_share),
  }
  print(
    "accuracy {accuracy:.1%}, gates open {open:.1%}, {conditional} of {units} conditional".format(
      **result
    )
  )
  return result
