import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.ops import relaxations

LOGITS = np.array([-6.0, -2.0, -0.3, 0.0, 0.7, 3.0], np.float32)
SAMPLES = 200_000


def draw(gate, logits=LOGITS, samples=SAMPLES, seed=0):
  return jax.jit(gate)(jax.random.key(seed), jnp.broadcast_to(logits, (samples, len(logits))))


def assert_rates_are(rates, probs, samples=SAMPLES):
  tolerance = 5 * np.sqrt(probs * (1 - probs) / samples)
  np.testing.assert_array_less(np.abs(np.asarray(rates, np.float64) - probs), tolerance)


def test_straight_through_gate_opens_with_the_sigmoid_of_its_logit():
  gates = draw(relaxations.straight_through_gate)
  assert_rates_are(gates.mean(0), special.expit(LOGITS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_have_the_same_open_rates(dtype):
  gates = draw(relaxations.straight_through_gate, jnp.asarray(LOGITS, dtype))
  assert gates.dtype == dtype
  assert_rates_are(
    gates.astype(jnp.float32).mean(0),
    special.expit(np.asarray(jnp.asarray(LOGITS, dtype), np.float64)),
  )


def test_the_temperature_does_not_change_the_open_rate():
  gates = draw(lambda key, z: relaxations.straight_through_gate(key, z, temperature=5.0))
  assert_rates_are(gates.mean(0), special.expit(LOGITS))


def test_noise_scale_divides_the_logit():
  gates = draw(lambda key, z: relaxations.straight_through_gate(key, z, noise_scale=2.0))
  assert_rates_are(gates.mean(0), special.expit(LOGITS / 2))


@pytest.mark.parametrize("temperature", [0.1, 2 / 3, 3.0])
def test_gates_are_exactly_zero_or_one(temperature):
  gates = draw(
    lambda key, z: relaxations.straight_through_gate(key, z, temperature=temperature), samples=5000
  )
  assert set(np.unique(gates)) == {0.0, 1.0}


def test_without_noise_the_sampled_gate_is_the_evaluation_gate():
  logits = jnp.linspace(-2, 2, 101)
  key = jax.random.key(1)
  evaluated = np.where(np.asarray(logits) > 0, 1.0, 0.0)
  assert np.mean(relaxations.straight_through_gate(key, logits) != evaluated) > 0.1
  np.testing.assert_array_equal(
    relaxations.straight_through_gate(key, logits, noise_scale=0.0), evaluated
  )
  np.testing.assert_array_equal(relaxations.threshold_gate(logits), evaluated)


def test_threshold_gate_is_closed_at_zero_and_has_no_gradient():
  logits = jnp.array([-1.0, -1e-30, 0.0, 1e-30, 2.0])
  np.testing.assert_array_equal(relaxations.threshold_gate(logits), [0, 0, 0, 1, 1])
  np.testing.assert_array_equal(
    jax.grad(lambda z: relaxations.threshold_gate(z).sum())(logits), np.zeros(5)
  )


@pytest.mark.parametrize("temperature", [0.5, 2 / 3, 2.0])
@pytest.mark.parametrize("noise_scale", [0.0, 0.4, 1.0])
def test_the_gradient_is_that_of_the_relaxed_gate(temperature, noise_scale):
  key = jax.random.key(3)
  slopes = {
    gate: jax.grad(
      lambda z, gate=gate: gate(key, z, temperature=temperature, noise_scale=noise_scale).sum()
    )(LOGITS)
    for gate in (relaxations.straight_through_gate, relaxations.binary_concrete)
  }
  noise = np.asarray(jax.random.logistic(key, LOGITS.shape, jnp.float32))
  soft = special.expit((LOGITS + noise_scale * noise) / temperature)
  for slope in slopes.values():
    np.testing.assert_allclose(slope, soft * (1 - soft) / temperature, rtol=1e-5, atol=1e-7)


def test_the_straight_through_slope_at_zero_is_a_quarter_over_the_temperature():
  for temperature, slope in ((1.0, 0.25), (2 / 3, 0.375), (0.5, 0.5)):
    got = jax.grad(relaxations.straight_through)(jnp.zeros(()), temperature=temperature)
    np.testing.assert_allclose(got, slope, rtol=1e-6)


@pytest.mark.parametrize("logit", [110.0, 1e4])
def test_saturated_logits_give_sure_gates_and_finite_gradients(logit):
  logits = jnp.array([-logit, logit], jnp.float32)
  value, pullback = jax.vjp(
    lambda z: relaxations.straight_through_gate(jax.random.key(0), z), logits
  )
  np.testing.assert_array_equal(value, [0, 1])
  np.testing.assert_array_equal(pullback(jnp.ones_like(value))[0], [0, 0])


def test_binary_concrete_exceeds_a_half_with_the_sigmoid_of_its_logit():
  gates = draw(relaxations.binary_concrete)
  assert gates.min() >= 0
  assert gates.max() <= 1
  assert np.mean((gates > 0.01) & (gates < 0.99)) > 0.4
  assert_rates_are((gates > 0.5).mean(0), special.expit(LOGITS))


def test_a_colder_binary_concrete_is_nearer_to_zero_and_one():
  near = lambda t: np.mean(
    np.abs(draw(lambda key, z: relaxations.binary_concrete(key, z, temperature=t)) - 0.5) > 0.49
  )
  assert near(0.1) > near(2 / 3) + 0.2 > near(3.0) + 0.3


@pytest.mark.parametrize("temperature", [2 / 3, 1.5])
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-0.5, 1.2)])
def test_hard_concrete_open_prob_is_the_rate_of_gates_above_zero(temperature, stretch):
  gates = draw(
    lambda key, z: relaxations.hard_concrete(key, z, temperature=temperature, stretch=stretch)
  )
  probs = relaxations.hard_concrete_open_prob(LOGITS, temperature=temperature, stretch=stretch)
  assert np.abs(probs - special.expit(LOGITS)).max() > 0.05
  assert_rates_are((gates > 0).mean(0), np.asarray(probs, np.float64))


def test_hard_concrete_location_is_where_the_open_prob_is_as_asked():
  for settings in (dict(), dict(temperature=1.5, stretch=(-0.5, 1.2))):
    location = relaxations.hard_concrete_location(LOGITS, **settings)
    assert np.abs(location - LOGITS).min() > 0.1
    np.testing.assert_allclose(
      relaxations.hard_concrete_open_prob(location, **settings), special.expit(LOGITS), rtol=1e-5
    )


def test_hard_concrete_has_mass_at_zero_at_one_and_between():
  gates = draw(relaxations.hard_concrete, samples=20_000)
  for share in (np.mean(gates == 0), np.mean(gates == 1), np.mean((gates > 0) & (gates < 1))):
    assert share > 0.1
  assert gates.min() == 0
  assert gates.max() == 1


def test_hard_concrete_mean_by_hand():
  logits = np.log([1 / 3, 1, 3]).astype(np.float32)
  np.testing.assert_allclose(relaxations.hard_concrete_mean(logits), [0.2, 0.5, 0.8], rtol=1e-6)
  np.testing.assert_allclose(
    relaxations.hard_concrete_mean(logits, stretch=(-0.5, 1.5)), [0, 0.5, 1], atol=1e-6
  )
  np.testing.assert_array_equal(relaxations.hard_concrete_mean(jnp.array([-9.0, 9.0])), [0, 1])


def test_clipped_sigmoid_by_hand():
  logits = jnp.array([-110.0, -2.0, -1.0, 0.0, 1.0, 1.9, 110.0])
  np.testing.assert_allclose(
    relaxations.clipped_sigmoid(logits), [0, 0, 0.25, 0.5, 0.75, 0.975, 1], rtol=1e-6
  )
  np.testing.assert_allclose(
    relaxations.clipped_sigmoid(logits, slope=1.0), [0, 0, 0, 0.5, 1, 1, 1]
  )
  slope = jax.grad(lambda z: relaxations.clipped_sigmoid(z).sum())(
    jnp.array([-3.0, -1.0, 0.0, 1.0, 3.0])
  )
  np.testing.assert_array_equal(slope, [0, 0.25, 0.25, 0.25, 0])


@pytest.mark.parametrize(
  "gate",
  [
    lambda z: relaxations.straight_through_gate(jax.random.key(5), z),
    lambda z: relaxations.binary_concrete(jax.random.key(5), z),
    lambda z: relaxations.hard_concrete(jax.random.key(5), z),
    relaxations.hard_concrete_open_prob,
    relaxations.hard_concrete_mean,
    relaxations.clipped_sigmoid,
    relaxations.threshold_gate,
  ],
)
def test_jit_and_vmap_agree(gate):
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (4, 3)), jnp.float32)
  one_by_one = np.stack([gate(row) for row in logits])
  np.testing.assert_allclose(jax.jit(jax.vmap(gate))(logits), one_by_one, rtol=1e-6)


@pytest.mark.parametrize(
  "gate",
  [relaxations.straight_through_gate, relaxations.binary_concrete, relaxations.hard_concrete],
)
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_named(gate, temperature):
  with pytest.raises(ValueError, match=rf"^temperature must be > 0; got {temperature}$"):
    gate(jax.random.key(0), jnp.zeros(2), temperature=temperature)


def test_a_traced_temperature_is_accepted():
  gate = jax.jit(
    lambda t: relaxations.binary_concrete(
      jax.random.key(0), jnp.ones(3), temperature=t, noise_scale=0.0
    )
  )
  np.testing.assert_allclose(gate(0.5), special.expit([2, 2, 2]), rtol=1e-6)


@pytest.mark.parametrize("stretch", [(0.0, 1.1), (-0.1, 1.0), (1.1, -0.1)])
def test_a_stretch_that_does_not_reach_beyond_the_unit_interval_is_named(stretch):
  message = (
    rf"^stretch must be \(low, high\) with low < 0 and high > 1; got "
    rf"\({stretch[0]}, {stretch[1]}\)$"
  )
  for gate in (
    lambda: relaxations.hard_concrete(jax.random.key(0), jnp.zeros(2), stretch=stretch),
    lambda: relaxations.hard_concrete_open_prob(jnp.zeros(2), stretch=stretch),
    lambda: relaxations.hard_concrete_mean(jnp.zeros(2), stretch=stretch),
  ):
    with pytest.raises(ValueError, match=message):
      gate()
