"""Gated hidden units in plain JAX and optax, on handwritten digits.

python docs/examples/plain_jax.py
"""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax import batch_shaping_loss, beta, straight_through_gate, threshold_gate

UNITS, BATCH, STEPS = 128, 128, 300
PRIOR = beta(0.6, 0.4)  # open for about 60 % of images


def init(key):
  layers = {
    "hidden": (64, UNITS, 0.0),
    # Gates start open.
    "gate": (64, UNITS, 3.0),
    "out": (UNITS, 10, 0.0),
  }
  return {
    name: (jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs), jnp.full(outputs, bias))
    for key, (name, (inputs, outputs, bias)) in zip(
      jax.random.split(key, 3), layers.items(), strict=True
    )
  }


def apply(params, x, key=None):
  """Returns class logits, gates and the gates' log-odds of images `[N, 64]`.

  With a key the gates are sampled, as in training.
  """
  dense = lambda name, x: x @ params[name][0] + params[name][1]
  gate_logits = dense("gate", x)
  gates = threshold_gate(gate_logits) if key is None else straight_through_gate(key, gate_logits)
  return dense("out", jax.nn.relu(dense("hidden", x)) * gates), gates, gate_logits


def main(coefficient=1.0):
  optimiser = optax.adam(1e-2)

  def loss(params, x, y, key):
    logits, _, gate_logits = apply(params, x, key)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return cross_entropy + coefficient * batch_shaping_loss(gate_logits, PRIOR).mean()

  @jax.jit
  def train_step(params, opt_state, x, y, step):
    grads = jax.grad(loss)(params, x, y, jax.random.fold_in(jax.random.key(1), step))
    updates, opt_state = optimiser.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = init(jax.random.key(0))
  opt_state = optimiser.init(params)
  for step, (x, y) in enumerate(digits.batches(STEPS, BATCH)):
    params, opt_state = train_step(params, opt_state, x, y, step)

  logits, gates, _ = apply(params, digits.x_test)
  return digits.report(logits, gates)


if __name__ == "__main__":
  main()
