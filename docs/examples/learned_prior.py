"""A learned prior for each gate: open rates may differ, but together they follow a hyperprior.

There are 500 examples of 30 gates, whose log-odds are free parameters. Each gate follows a relaxed
Bernoulli distribution with its own mean; the 30 means follow Beta(3, 7), whose mean is 0.3. Setting
of Havtorn et al., 2023 (MSViT).

    python docs/examples/learned_prior.py
"""

import jax
import jax.numpy as jnp
import optax

from gating_jax import beta, generalised_batch_shaping_loss, relaxed_bernoulli

EXAMPLES, GATES, STEPS = 500, 30, 800


def main(seed=0):
  draw = lambda key, shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), key), shape)
  params = {"logits": draw(0, (EXAMPLES, GATES)), "mean_logits": 0.1 * draw(1, (GATES,))}
  optimiser = optax.adam(0.03)

  def loss(params):
    gates, means = generalised_batch_shaping_loss(
      params["logits"], params["mean_logits"], lambda mean: relaxed_bernoulli(mean, 0.4), beta(3, 7)
    )
    return jnp.sum(gates) + GATES * means

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      updates, state = optimiser.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), length=STEPS)[0][0]

  params = train(params)
  means = jax.nn.sigmoid(params["mean_logits"])
  open_rates = jnp.mean(params["logits"] > 0, axis=0)
  print(f"loss {loss(params):.5f}")
  print(
    f"learned means: mean {means.mean():.3f}, standard deviation {means.std():.3f} (Beta(3, 7): "
    "0.300, 0.138)"
  )
  print(
    f"a gate's fraction of open examples is within {abs(open_rates - means).max():.3f} of its "
    "learned mean"
  )
  return means, open_rates


if __name__ == "__main__":
  main()
