"""Gated hidden units in Equinox, on handwritten digits. Needs `pip install equinox`.

python docs/examples/equinox_mlp.py
"""

import digits
import equinox as eqx
import jax
import optax

from gating_jax import batch_shaping_loss, beta, straight_through_gate, threshold_gate

UNITS, BATCH, STEPS = 128, 128, 300
PRIOR = beta(0.6, 0.4)  # open for about 60 % of images


class GatedMLP(eqx.Module):
  """A net that returns class logits, gates and the gates' log-odds of one image `[64]`.

  With a key the gates are sampled, as in training.
  """

  hidden: eqx.nn.Linear
  gate: eqx.nn.Linear
  out: eqx.nn.Linear

  def __init__(self, key):
    hidden_key, gate_key, out_key = jax.random.split(key, 3)
    self.hidden = eqx.nn.Linear(64, UNITS, key=hidden_key)
    gate = eqx.nn.Linear(64, UNITS, key=gate_key)
    self.gate = eqx.tree_at(lambda layer: layer.bias, gate, gate.bias + 3.0)  # gates start open
    self.out = eqx.nn.Linear(UNITS, 10, key=out_key)

  def __call__(self, x, key=None):
    gate_logits = self.gate(x)
    gates = threshold_gate(gate_logits) if key is None else straight_through_gate(key, gate_logits)
    return self.out(jax.nn.relu(self.hidden(x)) * gates), gates, gate_logits


def loss(model, x, y, key):
  logits, _, gate_logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  # Outside vmap: it needs the whole batch.
  return cross_entropy + batch_shaping_loss(gate_logits, PRIOR).mean()


def main():
  optimiser = optax.adam(1e-2)

  @eqx.filter_jit
  def train_step(model, opt_state, x, y, key):
    updates, opt_state = optimiser.update(eqx.filter_grad(loss)(model, x, y, key), opt_state)
    return eqx.apply_updates(model, updates), opt_state

  model = GatedMLP(jax.random.key(0))
  opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
  for step, (x, y) in enumerate(digits.batches(STEPS, BATCH)):
    model, opt_state = train_step(
      model, opt_state, x, y, jax.random.fold_in(jax.random.key(1), step)
    )

  logits, gates, _ = jax.vmap(model)(digits.x_test)
  return digits.report(logits, gates)


if __name__ == "__main__":
  main()
