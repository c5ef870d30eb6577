"""Real-valued features pulled to a prior: an autoencoder of digits with Normal(0, 1) features.

python docs/examples/feature_matching.py
"""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax import cdf_matching_loss, noise_floor, normal

FEATURES, BATCH, STEPS = 8, 128, 600
PRIOR = normal(0.0, 1.0)


def init(key):
  shapes = [(64, 64), (64, FEATURES), (FEATURES, 64), (64, 64)]
  return [
    (jax.random.normal(key, shape) / np.sqrt(shape[0]), jnp.zeros(shape[1]))
    for key, shape in zip(jax.random.split(key, 4), shapes, strict=True)
  ]


def apply(params, x):
  """Returns features `[N, FEATURES]` and reconstructions of images `[N, 64]`."""
  dense = lambda i, x: x @ params[i][0] + params[i][1]
  features = dense(1, jax.nn.relu(dense(0, x)))
  return features, dense(3, jax.nn.relu(dense(2, features)))


def train(coefficient):
  optimiser = optax.adam(3e-3)

  def loss(params, x):
    features, reconstruction = apply(params, x)
    return (
      jnp.mean((reconstruction - x) ** 2) + coefficient * cdf_matching_loss(features, PRIOR).mean()
    )

  @jax.jit
  def train_step(params, opt_state, x):
    updates, opt_state = optimiser.update(jax.grad(loss)(params, x), opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = init(jax.random.key(0))
  opt_state = optimiser.init(params)
  for x, _ in digits.batches(STEPS, BATCH):
    params, opt_state = train_step(params, opt_state, x)
  return params


def main():
  results = {}
  for name, coefficient in (("free", 0.0), ("matched", 1.0)):
    features, reconstruction = apply(train(coefficient), digits.x_test)
    # 1 for samples of the prior itself.
    gap = cdf_matching_loss(features, PRIOR).mean() / noise_floor(len(features))
    results[name] = {
      "error": float(jnp.mean((reconstruction - digits.x_test) ** 2) / digits.x_test.var()),
      "gap": float(gap),
      "std": float(features.std(axis=0).mean()),
    }
    print(
      "{0:<7} reconstruction error {error:.1%} of the variance, features: std {std:.2f}, "
      "gap to the prior {gap:.1f} noise floors".format(name, **results[name])
    )
  return results


if __name__ == "__main__":
  main()
