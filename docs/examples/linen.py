"""Gated hidden units in Flax Linen, on handwritten digits.

python docs/examples/linen.py
"""

import digits
import flax.linen as nn
import jax
import optax

from gating_jax import batch_shaping_loss, beta, straight_through_gate, threshold_gate

UNITS, BATCH, STEPS = 128, 128, 300
PRIOR = beta(0.6, 0.4)  # open for about 60 % of images


class GatedMLP(nn.Module):
  """A net that returns class logits, gates and the gates' log-odds of images `[N, 64]`.

  In training the gates are sampled.
  """

  @nn.compact
  def __call__(self, x, train=False):
    # Gates start open.
    gate_logits = nn.Dense(UNITS, bias_init=nn.initializers.constant(3.0), name="gate")(x)
    gates = (
      straight_through_gate(self.make_rng("gate"), gate_logits)
      if train
      else threshold_gate(gate_logits)
    )
    return nn.Dense(10)(nn.relu(nn.Dense(UNITS)(x)) * gates), gates, gate_logits


def main():
  model, optimiser = GatedMLP(), optax.adam(1e-2)

  def loss(params, x, y, key):
    logits, _, gate_logits = model.apply(params, x, train=True, rngs={"gate": key})
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return cross_entropy + batch_shaping_loss(gate_logits, PRIOR).mean()

  @jax.jit
  def train_step(params, opt_state, x, y, step):
    grads = jax.grad(loss)(params, x, y, jax.random.fold_in(jax.random.key(1), step))
    updates, opt_state = optimiser.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = model.init(jax.random.key(0), digits.x_train[:1])
  opt_state = optimiser.init(params)
  for step, (x, y) in enumerate(digits.batches(STEPS, BATCH)):
    params, opt_state = train_step(params, opt_state, x, y, step)

  logits, gates, _ = model.apply(params, digits.x_test)
  return digits.report(logits, gates)


if __name__ == "__main__":
  main()
