"""Shared parts of the examples: scikit-learn's digits, and measures on the held-out ones."""

import numpy as np
from sklearn import datasets, model_selection

_digits = datasets.load_digits()
x_train, x_test, y_train, y_test = model_selection.train_test_split(
  np.float32(_digits.data / 16), _digits.target, test_size=0.2, random_state=0
)


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
