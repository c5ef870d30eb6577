import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.ops.macs import (
  ConvMacs,
  UnitMacs,
  channel_macs,
  conv_macs,
  executed_macs,
  expected_macs,
  factorised_conv,
  gated_macs,
  mac_fraction,
  plain_conv,
  shared_among,
)
from gating_jax.types import GateRecord


def record(gates, per_unit=0, per_pair=0):
  gates = np.asarray(gates)
  return GateRecord(gates * 0, gates, gates, per_unit, per_pair)


def pair(first, second, *, per_pair=36):
  return (record(first, 10), record(second, 7, per_pair))


ALL, NONE = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
  ("kernel", "output", "macs"),
  [
    ((3, 3, 16, 32), (1, 8, 8, 32), 9 * 16 * 32 * 64),
    ((3, 3, 16, 32), (5, 8, 8, 32), 9 * 16 * 32 * 64),
    ((1, 1, 64, 256), (1, 7, 5, 256), 64 * 256 * 35),
    ((7, 7, 3, 64), (2, 112, 112, 64), 118_013_952),
    ((512, 1000), (4, 1000), 512_000),
    ((3, 3, 1, 16), (1, 4, 4, 16), 9 * 16 * 16),
    ((3, 8, 4), (1, 10, 4), 960),
  ],
)
def test_conv_macs_by_hand(kernel, output, macs):
  assert conv_macs(kernel, output) == macs


def test_the_coefficients_of_a_convolution_give_its_macs():
  plain = plain_conv((3, 5), (2, 4, 6, 8))
  assert plain.total(inputs=7, outputs=8) == conv_macs((3, 5, 7, 8), (2, 4, 6, 8))
  assert plain_conv((), (2, 8)).total(inputs=7, outputs=8) == conv_macs((7, 8), (2, 8))
  depthwise = plain_conv((3, 3), (2, 4, 6, 8), depthwise=True)
  assert depthwise.total(inputs=8, outputs=8) == conv_macs((3, 3, 1, 8), (2, 4, 6, 8))
  # Space on 4 frames to 5 channels, then time on 2 frames.
  space, time = plain_conv((1, 3, 3), (1, 4, 6, 6, 5)), plain_conv((3, 1, 1), (1, 2, 6, 6, 8))
  both = conv_macs((1, 3, 3, 7, 5), (1, 4, 6, 6, 5)) + conv_macs((3, 1, 1, 5, 8), (1, 2, 6, 6, 8))
  assert factorised_conv(space, time, 5).total(inputs=7, outputs=8) == both


def test_channels_that_share_macs_must_be_given():
  assert shared_among(72, inputs=4) == ConvMacs(18, 0, 0)
  with pytest.raises(ValueError, match="inputs or outputs must be the number .*; got neither"):
    shared_among(72)


def test_a_channel_counts_once_where_it_is_made_and_where_it_is_read():
  made, read = ConvMacs(1, 2, 3), ConvMacs(5, 7, 11)
  assert channel_macs(made) == (2, 3)
  assert channel_macs(made, read=read) == (2 + 5, 3)
  assert channel_macs(made, inputs=4) == (2 + 4 * 3, 0)
  assert channel_macs(made, inputs=4, read=read, outputs=6) == (2 + 4 * 3 + 5 + 6 * 11, 0)
  assert channel_macs(made).plus(9) == (2 + 9, 3)


def test_a_gate_of_several_channels_costs_as_much_as_they():
  # 6 channels in gates of 3, after 8 channels in gates of 4.
  unit = UnitMacs(alone=10, per_pair=2).of_gate(3, before=4)
  first, second = np.ones((1, 2)), np.ones((1, 2))
  records = (record(first), record(second, *unit))
  assert gated_macs(records) == 6 * 10 + 6 * 8 * 2


def test_the_fraction_of_macs_is_1_where_all_gates_are_open():
  records = pair([ALL], [ALL])
  for executed, expected in ((gated_macs(records), 1.0), (0, 50 / (50 + gated_macs(records)))):
    found = mac_fraction(records, jnp.float32(executed), never_gated_macs=50)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_executed_macs_by_hand():
  records = (record([[1, 0, 1], [0, 0, 0]], 100), record([[1, 1], [1, 0]], 5))
  np.testing.assert_array_equal(executed_macs(records), [210, 5])
  assert gated_macs(records) == 310


def test_a_relaxed_gate_above_zero_is_a_unit_that_runs():
  records = (record([[0.2, 0.0, 1.0]], 100), record([[0.5, 0.0]], 5, 10))
  np.testing.assert_array_equal(executed_macs(records), [100 * 2 + 5 * 1 + 10 * 2 * 1])


def test_expected_macs_are_executed_ones_at_the_probabilities():
  probs = [np.array([[0.5, 0.25]]), np.array([[1.0, 0.5]])]
  records = tuple(
    GateRecord(p, p, np.ones_like(p), 10, pair) for p, pair in zip(probs, (0, 4), strict=True)
  )
  np.testing.assert_allclose(expected_macs(records), [10 * 0.75 + 10 * 1.5 + 4 * 0.75 * 1.5])


def test_a_pair_costs_the_product_of_its_two_counts():
  first = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  second = [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
  expected = [10 * 2 + 36 * 2 * 3 + 7 * 3, 10 * 1, 7 * 4]
  np.testing.assert_array_equal(executed_macs(pair(first, second)), expected)
  assert gated_macs(pair(first, second)) == 4 * 10 + 36 * 16 + 4 * 7


def test_the_mean_is_of_the_product_and_not_the_product_of_the_means():
  together = pair([ALL, NONE], [ALL, NONE])
  apart = pair([ALL, NONE], [NONE, ALL])
  for a, b in zip(together, apart, strict=True):
    assert a.gates.mean() == b.gates.mean()
  assert executed_macs(together).mean() - executed_macs(apart).mean() == 36 * 16 / 2


def test_a_pair_joins_a_record_to_the_one_before_only():
  records = (
    record([[1, 1]], 1),
    record([[1, 0, 1]], 10, 1000),
    record([[1, 1, 1, 1]], 100),
    record([[1]], 7),
  )
  np.testing.assert_array_equal(executed_macs(records), [2 + 20 + 1000 * 2 * 2 + 400 + 7])


def test_all_open_gates_execute_all_gated_macs_and_closed_ones_none():
  for gates, share in ((ALL, 1), (NONE, 0)):
    np.testing.assert_array_equal(
      executed_macs(pair([gates], [gates])), [share * gated_macs(pair([gates], [gates]))]
    )


def test_float64_gates_count_beyond_what_float32_holds():
  gates = np.ones((1, 2048))
  records = (record(gates, 2**31 + 1), record(gates, 1, 3))
  exact = 2048 * (2**31 + 1) + 3 * 2048**2 + 2048
  assert int(np.float32(exact)) != exact
  assert int(executed_macs(records)[0]) == exact == gated_macs(records)


def test_float32_gates_are_exact_below_two_to_the_24():
  gates = jnp.ones((1, 4096), jnp.float32)
  records = (record(gates, 4094), record(gates[:, :1], 4095))
  assert int(executed_macs(records)[0]) == 4096 * 4094 + 4095 == 2**24 - 4097


def test_jit_and_vmap_agree():
  first = np.random.default_rng(0).integers(0, 2, (5, 2, 4)).astype(np.float32)
  second = 1 - first[:, ::-1]
  one_by_one = np.stack([executed_macs(pair(a, b)) for a, b in zip(first, second, strict=True)])
  assert len(np.unique(one_by_one)) > 3
  stacked = pair(first, second)
  np.testing.assert_array_equal(jax.jit(jax.vmap(executed_macs))(stacked), one_by_one)


def test_no_records_are_an_error():
  message = "records must hold at least one GateRecord; got none: is the model ungated?"
  for function in (executed_macs, gated_macs):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      function(())


def test_a_first_record_with_pairs_is_an_error():
  for function in (executed_macs, gated_macs):
    with pytest.raises(
      ValueError, match=r"^the first record's macs_per_pair must be 0, .*; got 9$"
    ):
      function((record([ALL], 1, 9), record([ALL])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_macs_of_gates_in_half_precision_are_counted_in_full(dtype):
  gates = jnp.ones((2, 300), dtype)  # more than bfloat16 counts, with a penalty beyond float16
  half = (GateRecord(gates, gates, gates, 27_648),)
  np.testing.assert_array_equal(executed_macs(half), [300 * 27_648] * 2)
  np.testing.assert_array_equal(expected_macs(half), [300 * 27_648] * 2)


def test_a_record_without_what_is_counted_is_refused():
  gates = jnp.ones((2, 3))
  with pytest.raises(
    TypeError, match=r"records\[0\].probs must be an array of real numbers; got None"
  ):
    expected_macs((GateRecord(gates, None, gates, 5),))
