import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from gating_jax.ops.quantiles import open_threshold

AXIS = "devices"
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (16, 6)).astype(np.float32)
WEIGHTS = np.arange(16, dtype=np.float32) % 3


def opened(logits, share, **options):
  return np.asarray(logits) > np.asarray(
    open_threshold(jnp.asarray(logits), share=share, **options)
  )


def by_sorting(logits, share):
  """Computes the threshold in another way."""
  falling = np.sort(np.ravel(logits))[::-1]
  k = max(1, round(share * falling.size))
  return (falling[k - 1] + falling[k]) / 2


@pytest.mark.parametrize(
  ("share", "theta"), [(0.25, 2.5), (0.5, 1.0), (0.6, 1.0), (0.75, -0.5), (1e-6, 2.5)]
)
def test_the_threshold_lies_between_what_is_open_and_what_is_not(share, theta):
  assert open_threshold(jnp.array([[3.0, -1.0], [0.0, 2.0]]), share=share) == theta


@pytest.mark.parametrize("share", [0.01, 0.234, 0.5, 0.9])
def test_the_threshold_is_that_of_sorted_logits(share):
  theta = jax.jit(open_threshold)(LOGITS, share=share)
  np.testing.assert_allclose(theta, by_sorting(LOGITS, share), rtol=1e-6)
  assert np.sum(theta < LOGITS) == round(share * LOGITS.size)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_share_of_one_opens_every_gate(scale):
  assert opened(LOGITS * np.float32(scale), 1.0).all()
  assert opened(-np.abs(LOGITS) * np.float32(scale), 1.0).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -700.0, 3e-39])
def test_gates_that_tie_with_an_open_one_are_open(value):
  assert opened(np.full((3, 2), value, np.float32), 0.5).all()
  some = np.array([[value, value, value, -800.0]], np.float32)
  assert opened(some, 0.5).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(("share", "count"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 3)])
def test_an_infinite_logit_is_open_or_closed_and_the_threshold_finite(share, count):
  logits = np.array([[np.inf, -np.inf], [1.0, 0.0]], np.float32)
  assert np.isfinite(open_threshold(logits, share=share))
  is_open = opened(logits, share)
  assert is_open[0].tolist() == [True, False]
  assert is_open.sum() == count


def test_a_traced_share_above_one_by_rounding_opens_every_gate():
  share = np.nextafter(np.float32(1), np.float32(2))
  # Of a whole so large that the share's excess is a unit of it; sums of them are exact.
  weights = np.full(16, 2.0**27, np.float32)
  theta = jax.jit(functools.partial(open_threshold, weights=weights))(LOGITS, share=share)
  assert (np.asarray(theta) < LOGITS).all()


def test_one_example_of_one_gate_is_open():
  assert opened(np.array([[-2.0]], np.float32), 0.1).all()
  assert open_threshold(np.float32(-2), share=0.1, weights=np.float32(3)) < -2


def test_a_nan_makes_the_threshold_nan_unless_it_has_no_weight():
  spoilt = np.array([[np.nan, 0.0], [1.0, 2.0]], np.float32)
  assert np.isnan(open_threshold(spoilt, share=0.5))
  assert open_threshold(spoilt, share=0.5, weights=np.array([0.0, 1.0])) == 1.5
  assert np.isnan(open_threshold(LOGITS, share=0.5, weights=np.full(16, -1.0)))


def test_weights_leave_out_and_repeat_examples():
  repeated = np.repeat(LOGITS, WEIGHTS.astype(int), axis=0)
  weighted = functools.partial(open_threshold, LOGITS, share=0.3)
  assert weighted(weights=WEIGHTS) == open_threshold(repeated, share=0.3)
  each = np.broadcast_to(WEIGHTS[:, None], LOGITS.shape)
  assert weighted(weights=each) == weighted(weights=WEIGHTS)
  assert weighted(weights=np.zeros(16)) == 0
  with pytest.raises(ValueError, match=r"^weights must be of shape \(16,\), one per example, or"):
    weighted(weights=np.ones(6))


def test_there_is_no_gradient():
  loss = lambda logits, share: jnp.sum(logits - open_threshold(logits, share=share))
  of_logits, of_share = jax.grad(loss, (0, 1))(jnp.asarray(LOGITS), jnp.float32(0.3))
  np.testing.assert_array_equal(of_logits, np.ones_like(LOGITS))
  assert of_share == 0


def test_jit_and_vmap_agree():
  shares = jnp.array([0.2, 0.5, 1.0])
  one_each = [open_threshold(LOGITS, share=float(share)) for share in shares]
  np.testing.assert_array_equal(
    jax.vmap(lambda s: open_threshold(LOGITS, share=s))(shares), one_each
  )
  stacked = np.stack([LOGITS, -LOGITS])
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(lambda z: open_threshold(z, share=0.3)))(stacked),
    [open_threshold(z, share=0.3) for z in stacked],
  )


def by_pmap(logits, weights):
  spread = lambda x: x.reshape(8, 2, *x.shape[1:])
  run = lambda z, w: open_threshold(z, share=0.3, axis_name=AXIS, weights=w)
  return jax.pmap(run, axis_name=AXIS)(spread(logits), spread(weights))


def by_shard_map(logits, weights, check_vma):
  run = jax.shard_map(
    lambda z, w: open_threshold(z, share=0.3, axis_name=AXIS, weights=w)[None],
    mesh=Mesh(np.array(jax.devices()), (AXIS,)),
    in_specs=(PartitionSpec(AXIS), PartitionSpec(AXIS)),
    out_specs=PartitionSpec(AXIS),
    check_vma=check_vma,
  )
  return jax.jit(run)(logits, weights)


WAYS = {
  "pmap": by_pmap,
  "shard_map": functools.partial(by_shard_map, check_vma=False),
  "shard_map with check_vma": functools.partial(by_shard_map, check_vma=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_eight_devices_have_the_threshold_of_one(way):
  # The devices' own thresholds would differ.
  logits = LOGITS + np.linspace(-9, 9, 16, dtype=np.float32)[:, None]
  found = WAYS[way](logits, WEIGHTS)
  np.testing.assert_array_equal(
    found, np.full(8, open_threshold(logits, share=0.3, weights=WEIGHTS))
  )


@pytest.mark.parametrize(
  ("logits", "share", "error", "message"),
  [
    (LOGITS, 0.0, ValueError, r"share must be in \(0, 1\]; got 0.0"),
    (LOGITS, 1.5, ValueError, r"share must be in \(0, 1\]; got 1.5"),
    (LOGITS[:0], 0.5, ValueError, r"logits must hold at least one value; got shape \(0, 6\)"),
    ("logits", 0.5, TypeError, "logits must be an array of real numbers; got 'logits'"),
  ],
)
def test_bad_arguments_are_named(logits, share, error, message):
  with pytest.raises(error, match=f"^{message}"):
    open_threshold(logits, share=share)
