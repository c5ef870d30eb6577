"""A fit with the batch-shaping loss, and the ways to spread its batch over devices.

Axes: N examples, C gates. Each way returns the value and the gradient of the whole batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gating_jax.ops.ecdf import batch_shaping_loss, cdf_matching_loss
from gating_jax.ops.penalties import target_rate_loss
from gating_jax.ops.priors import beta, empirical, relaxed_bernoulli

AXIS = "devices"
TWO_AXES = ("hosts", "devices")


def problem(gates=10):
  """Parameters, and 16 examples whose first features and weights differ from device to device."""
  rng = np.random.default_rng(0)
  features = lambda: rng.normal(size=(16, 4)) + np.linspace(-1, 1, 16)[:, None] * [1, 0, 0, 0]
  params = {
    "w": rng.normal(size=(4, gates)),
    "a": rng.uniform(0.4, 2, gates),
    "b": rng.uniform(0.4, 2, gates),
    "mean": rng.uniform(0.2, 0.8, gates),
    "temperature": rng.uniform(0.3, 2, gates),
    "reference": rng.normal(size=(4, gates)),
  }
  batch = {
    "x": features(),
    "y": rng.normal(size=(16, gates)),
    "fit": np.ones(16),  # the weights of the fit
    "weights": np.linspace(0, 3, 16),  # those of the batch-shaping loss
  }
  return jax.tree.map(np.float32, (params, batch))


# Terms: (params, batch, logits, axis_name=, exchange=) -> [C], or a scalar.


def fixed_prior(params, batch, logits, **options):
  return batch_shaping_loss(logits, beta(0.6, 0.4), **options)


def weighted(params, batch, logits, **options):
  return batch_shaping_loss(logits, beta(0.6, 0.4), weights=batch["weights"], **options)


def learned_beta(params, batch, logits, **options):
  return batch_shaping_loss(logits, beta(params["a"], params["b"]), **options)


def learned_relaxed_bernoulli(params, batch, logits, **options):
  return batch_shaping_loss(
    logits, relaxed_bernoulli(params["mean"], params["temperature"]), **options
  )


def reference_samples(params, batch, logits, axis_name=None, **options):
  reference = empirical(batch["x"] @ params["reference"], axis_name=axis_name)
  return cdf_matching_loss(logits, reference, axis_name=axis_name, **options)


def target_rate(params, batch, logits, axis_name=None, exchange=None):
  return target_rate_loss([jax.nn.sigmoid(logits)], target=0.9, axis_name=axis_name) / 10


def loss(params, batch, term, *, fit=1.0, shaping=10.0, **options):
  logits = batch["x"] @ params["w"]
  value = fit * jnp.mean(batch["fit"][:, None] * jnp.square(logits - batch["y"]))
  return value + shaping * jnp.sum(term(params, batch, logits, **options))


@functools.partial(jax.jit, static_argnames="term")
def on_one_device(params, batch, term, **scales):
  return jax.value_and_grad(loss)(params, batch, term, **scales)


def by_pmap(params, batch, term, exchange):
  """Runs over the devices of all processes, this one with its part of the batch.

  Returns every device's own result.
  """
  run = jax.pmap(_averaged(term, exchange, AXIS), axis_name=AXIS, in_axes=(None, 0))
  return run(
    params, jax.tree.map(lambda a: a.reshape(jax.local_device_count(), -1, *a.shape[1:]), batch)
  )


def by_shard_map(params, batch, term, exchange, *, axes=AXIS, order=None, check_vma=False):
  """Runs over one axis, or over two, the first of size 2; `order` is their order in the batch."""
  devices = np.array(jax.devices())
  mesh = Mesh(devices if isinstance(axes, str) else devices.reshape(2, -1), axes)
  order = order or axes
  gradients = _summed if check_vma else _averaged
  run = jax.shard_map(
    gradients(term, exchange, order),
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(order)),
    out_specs=PartitionSpec(),
    check_vma=check_vma,
  )
  return jax.jit(run)(params, batch)


def _averaged(term, exchange, axis_name):
  """Computes local gradients, then their mean, as in training."""
  local = jax.value_and_grad(lambda p, b: loss(p, b, term, axis_name=axis_name, exchange=exchange))
  return lambda p, b: lax.pmean(local(p, b), axis_name)


def _summed(term, exchange, axis_name):
  """Averages the loss: with `check_vma`, gradients of replicated values are summed over devices."""
  return jax.value_and_grad(
    lambda p, b: lax.pmean(loss(p, b, term, axis_name=axis_name, exchange=exchange), axis_name)
  )
