"""Gated hidden units in Flax NNX, on handwritten digits.

python docs/examples/nnx.py
"""

import digits
import optax
from flax import nnx

from gating_jax import batch_shaping_loss, beta, straight_through_gate, threshold_gate

UNITS, BATCH, STEPS = 128, 128, 300
PRIOR = beta(0.6, 0.4)  # open for about 60 % of images


class GatedMLP(nnx.Module):
  """A net that returns class logits, gates and the gates' log-odds of images `[N, 64]`.

  With a key the gates are sampled, as in training.
  """

  def __init__(self, rngs):
    self.hidden = nnx.Linear(64, UNITS, rngs=rngs)
    # Gates start open.
    self.gate = nnx.Linear(64, UNITS, bias_init=nnx.initializers.constant(3.0), rngs=rngs)
    self.out = nnx.Linear(UNITS, 10, rngs=rngs)

  def __call__(self, x, key=None):
    gate_logits = self.gate(x)
    gates = threshold_gate(gate_logits) if key is None else straight_through_gate(key, gate_logits)
    return self.out(nnx.relu(self.hidden(x)) * gates), gates, gate_logits


@nnx.jit
def train_step(model, optimiser, x, y, key):
  def loss(model):
    logits, _, gate_logits = model(x, key)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return cross_entropy + batch_shaping_loss(gate_logits, PRIOR).mean()

  optimiser.update(model, nnx.grad(loss)(model))


def main():
  model, rngs = GatedMLP(nnx.Rngs(0)), nnx.Rngs(gate=1)
  optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  for x, y in digits.batches(STEPS, BATCH):
    train_step(model, optimiser, x, y, rngs.gate())

  logits, gates, _ = model(digits.x_test)
  return digits.report(logits, gates)


if __name__ == "__main__":
  main()
