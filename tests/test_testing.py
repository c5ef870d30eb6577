import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gating_jax.ops.ecdf import batch_shaping_loss, cdf_matching_loss
from gating_jax.ops.priors import beta, uniform
from gating_jax.testing import LossCheckError, check_loss


def levels(x):
  return jnp.arange(1, len(x) + 1, dtype=x.dtype)[:, None] / (len(x) + 1)


def gather(x, axis_name):
  return x if axis_name is None else lax.all_gather(x, axis_name, axis=0, tiled=True)


def first_axis_sorted(x):
  return jnp.sort(x, axis=0)


def gap_loss(x, axis_name=None, *, sort=first_axis_sorted, cdf=jax.nn.sigmoid, gather=gather):
  """The correct loss, with places for possible mistakes."""
  x = gather(x, axis_name)
  return jnp.mean(jnp.square(cdf(sort(x)) - levels(x)), axis=0)


def sorting(put_back):
  """A sort whose backward pass is `put_back(cotangent, source)`."""

  @jax.custom_vjp
  def sort(x):
    return jnp.sort(x, axis=0)

  sort.defvjp(
    lambda x: (sort(x), jnp.argsort(x, axis=0)), lambda source, ct: (put_back(ct, source),)
  )
  return sort


def gather_without_sum(x, axis_name):
  @jax.custom_vjp
  def spread(x):
    return gather(x, axis_name)

  spread.defvjp(
    lambda x: (spread(x), None),
    lambda _, ct: (lax.dynamic_slice_in_dim(ct, lax.axis_index(axis_name) * len(x), len(x)),),
  )
  return x if axis_name is None else spread(x)


@jax.custom_jvp
def beta_cdf(z):
  return beta(0.6, 0.4).logit_cdf(z)


@beta_cdf.defjvp
def _beta_cdf_jvp(primals, tangents):
  p = jax.nn.sigmoid(primals[0])
  density = p**-0.4 * (1 - p) ** -0.6 / jnp.exp(jax.scipy.special.betaln(0.6, 0.4))
  return beta_cdf(*primals), density * p * (1 - p) * tangents[0]


@jax.custom_vjp
def summed_with_mean(x):
  return jnp.sum(gap_loss(x) * len(x))


summed_with_mean.defvjp(
  lambda x: (summed_with_mean(x), x),
  lambda x, ct: (ct * jax.grad(lambda x: jnp.sum(gap_loss(x)))(x),),
)


def straight_through(surrogate):
  """A rank loss whose backward pass takes the ranks for `surrogate(x)`."""

  def loss(x, axis_name=None):
    x = gather(x, axis_name)
    soft = surrogate(x)
    hard = jnp.take_along_axis(levels(x), jnp.argsort(jnp.argsort(x, axis=0), axis=0), axis=0)
    return jnp.mean(jnp.square(jax.nn.sigmoid(x) - (hard + soft - lax.stop_gradient(soft))), axis=0)

  return loss


def soft_ranks(x):
  return jnp.mean(jax.nn.sigmoid(4 * (x[:, None] - x[None])), axis=1)


def with_gradient(rule):
  """The sum of squares with `rule(x)` for its gradient."""

  @jax.custom_vjp
  def loss(x):
    return jnp.sum(jnp.square(x))

  loss.defvjp(lambda x: (loss(x), x), lambda x, ct: (ct * rule(x),))
  return loss


WRONG = {
  "un-sort forgotten": functools.partial(gap_loss, sort=sorting(lambda ct, source: ct)),
  "sort permutation used instead of its inverse": functools.partial(
    gap_loss, sort=sorting(lambda ct, source: jnp.take_along_axis(ct, source, axis=0))
  ),
  "missing psum": functools.partial(gap_loss, gather=gather_without_sum),
  "NaN at saturation": functools.partial(gap_loss, cdf=beta_cdf),
  "mean where a sum was meant": summed_with_mean,
  "gradient through the ranks": straight_through(soft_ranks),
}
NAMES = list(WRONG)


def message_for(loss, **settings):
  with pytest.raises(LossCheckError) as caught:
    check_loss(loss, **settings)
  return str(caught.value)


def line_of(rule, message):
  return next(line for line in message.splitlines() if line.startswith(f"- {rule}"))


def test_batch_shaping_passes_on_real_and_virtual_devices():
  result = check_loss(functools.partial(batch_shaping_loss, prior=beta(0.6, 0.4)), shape=(4, 2))
  assert result.skipped == ""
  assert list(result.errors) == ["gradient", "permutation", "jit", "vmap"] + [
    "4 devices by vmap",
    "4 devices by shard_map",
    "4 devices by shard_map with check_vma",
    "saturation",
  ]
  assert max(result.errors.values()) < 1e-6


def test_cdf_matching_passes_on_probabilities():
  loss = functools.partial(cdf_matching_loss, prior=uniform())
  check_loss(
    loss, shape=(4, 2), low=0.0, high=1.0, saturated=(0.0, 1.0, 1e-30, 1 - 1e-7, -1.0, 2.0)
  )


def test_the_loss_that_the_wrong_ones_are_made_from_passes():
  right = sorting(lambda ct, source: jnp.take_along_axis(ct, jnp.argsort(source, axis=0), axis=0))
  assert max(check_loss(functools.partial(gap_loss, sort=right)).errors.values()) < 1e-6


@pytest.mark.parametrize(
  "name",
  [  # the first four are caught at once by another test, and the fifth takes long
    pytest.param(name, marks=pytest.mark.slow) for name in NAMES[:5]
  ]
  + NAMES[5:],
)
def test_a_wrong_loss_is_caught_and_named(name):
  message = message_for(WRONG[name])
  assert [other for other in NAMES if other in message] == [name]


def test_a_surrogate_that_ignores_the_other_values_is_named_by_elimination():
  message = message_for(straight_through(lambda x: 0.1 * x), devices=None)
  assert "unlike finite differences: gradient through the ranks" in line_of("gradient", message)
  assert [name for name in NAMES if name in message] == ["gradient through the ranks"]


@pytest.mark.slow
def test_several_faults_in_different_columns_are_all_reported_with_their_columns():
  faulty = [WRONG[name] for name in NAMES[:4]]

  def loss(x, axis_name=None):
    return jnp.concatenate(
      [f(x[:, j : j + 1], axis_name) for j, f in enumerate([*faulty, gap_loss])]
    )

  message = message_for(loss, shape=(7, 5))
  assert [name for name in NAMES if name in message] == NAMES[:4]
  assert "un-sort forgotten; in column(s) 0, worst at column 0" in message
  assert "instead of its inverse; in column(s) 1, worst at column 1" in message
  assert (
    "missing psum (1/devices): constant factor 0.25 next to another term; "
    "gradient worst at column 2" in message
  )
  assert (
    "NaN at saturation, in batches of 30, 110, -110, 10000, -10000; first at column 3, example 0, "
    in message
  )


def test_a_factor_on_top_of_a_wrong_order_is_named_too():
  message = message_for(
    functools.partial(gap_loss, sort=sorting(lambda ct, source: ct / len(ct))), devices=None
  )
  assert "un-sort forgotten and mean where a sum was meant (1/N): constant factor 0.1429" in message


def test_a_wrong_order_alone_is_named_without_a_factor():
  message = message_for(WRONG["un-sort forgotten"], devices=None)
  assert "un-sort forgotten; in column(s) 0, 1, 2" in message


def test_a_gradient_that_is_nan_at_ordinary_values_is_named():
  message = message_for(with_gradient(lambda x: jnp.where(x > 0, jnp.nan, 2 * x)), devices=None)
  assert "not finite at ordinary values; in column(s) 0, 1, 2" in line_of("gradient", message)


@pytest.mark.parametrize(
  ("factor", "slip"),
  [
    (2 / 3, ""),
    (7, "sum where a mean was meant (N): "),
    (1 / 4, "mean where a sum was meant (1/devices): "),
  ],
)
def test_a_constant_factor_is_reported_and_recognised(factor, slip):
  message = message_for(with_gradient(lambda x: 2 * factor * x))
  assert f"- gradient: {slip}constant factor {factor:.4g}; in column(s) 0, 1, 2" in message


def test_the_place_and_both_values_are_those_of_the_wrong_element():
  message = message_for(with_gradient(lambda x: (2 * x).at[4, 1].set(9.0)))
  column, example, got, expected = re.search(
    r"worst at column (\d), example (\d): got (\S+), expected (\S+)", line_of("gradient", message)
  ).groups()
  assert (column, example, got) == ("1", "4", "9")
  assert abs(float(expected)) <= 6
  assert "in column(s) 1, worst" in message


def test_the_place_of_a_nan_is_that_of_the_saturated_value():
  message = message_for(
    with_gradient(lambda x: jnp.where(x == 110, jnp.nan, 2 * x)), saturated=(5.0, 110.0, -7.0)
  )
  assert line_of("saturation", message).endswith(
    "in batches of 110; first at column 0, example 0, x = 110: value 254100, gradient nan"
  )


def test_an_infinity_only_where_saturated_values_meet_is_found():
  message = message_for(
    lambda x: jnp.sum(jnp.where(jnp.ptp(x, axis=0) > 100, jnp.inf, x)), saturated=(60.0, -60.0)
  )
  assert "infinity at saturation, in batches of all values in turn; first at column 0" in message


def test_a_loss_that_depends_on_the_order_of_the_batch_is_reported():
  message = message_for(lambda x: jnp.arange(len(x), dtype=x.dtype) @ jnp.square(x))
  assert re.fullmatch(
    r"the loss has 2 fault\(s\)\n- permutation: value .*\n- permutation: gradient worst .*", message
  )


def test_a_loss_that_changes_when_traced_again_is_reported():
  traced = []

  def loss(x):
    traced.append(x.shape)
    return jnp.mean(x) * len(traced)

  message = message_for(loss)
  assert "- jit: value" in message
  assert "- vmap: value" in message


def test_a_loss_that_ignores_the_other_devices_is_reported():
  message = message_for(lambda x, axis_name=None: gap_loss(x))
  assert re.search(
    r"- 4 devices by vmap, .*: not a multiple of the gradient on one device; value \S+, exp",
    message,
  )


def test_a_term_summed_once_too_often_is_reported():
  def loss(x, axis_name=None):
    total = jnp.sum(jnp.square(x))
    return total if axis_name is None else lax.psum(lax.psum(total, axis_name), axis_name)

  assert (
    "one psum too many (devices): constant factor 4 next to another term; value"
    in message_for(loss)
  )


def test_gradients_that_cancel_to_zero_pass():
  def loss(x, axis_name=None):
    return jnp.stack(
      [jnp.mean(gather(x, axis_name) - jnp.mean(gather(x, axis_name))), jnp.mean(x[:, 1])]
    )

  check_loss(loss, shape=(5, 2), devices=2)


def test_a_loss_without_axis_name_is_checked_on_one_device():
  result = check_loss(lambda x: jnp.mean(jnp.square(x)))
  assert list(result.errors) == ["gradient", "permutation", "jit", "vmap", "saturation"]
  assert result.skipped == "devices: the loss takes no keyword axis_name"
  assert check_loss(gap_loss, devices=None).skipped == "devices: not requested"


def test_a_loss_not_written_for_check_vma_is_checked_by_the_other_layouts():
  def loss(x, axis_name=None):
    x = gather(x, axis_name)
    return lax.scan(lambda total, row: (total + row**2, None), jnp.zeros(x.shape[1:], x.dtype), x)[
      0
    ]

  result = check_loss(loss)
  assert result.skipped.startswith("shard_map with check_vma: ")
  assert "4 devices by shard_map" in result.errors


def test_fewer_real_devices_than_asked_for_leave_out_shard_map(monkeypatch):
  (device, *_) = jax.devices()
  monkeypatch.setattr(jax, "devices", lambda: [device])
  result = check_loss(gap_loss, shape=(3, 1), devices=2)
  assert result.skipped == "shard_map: there are fewer than 2 real devices"
  assert "2 devices by vmap" in result.errors


@pytest.mark.slow
def test_one_real_device_is_enough():
  code = """
import jax, jax.numpy as jnp
from jax import lax
from gating_jax.testing import check_loss
def loss(x, axis_name=None):
  return jnp.square(jnp.mean(x) if axis_name is None else lax.pmean(jnp.mean(x), axis_name))
result = check_loss(loss, shape=(3, 1), devices=2)
print(jax.device_count(), "2 devices by vmap" in result.errors, result.skipped)
"""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "1 True shard_map: there are fewer than 2 real devices\n"


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"shape": (2, 3)}, r"shape must be .* N at least 3 .*got \(2, 3\)"),
    ({"shape": (7, 0)}, r"shape must be .* C at least 1; got \(7, 0\)"),
    ({"shape": 7}, "shape must be .*got 7"),
    ({"low": 1.0, "high": 1.0}, "low must be below high, both finite; got low 1.0, high 1.0"),
    ({"high": np.inf}, "low must be below high, both finite; got low -3.0, high inf"),
    ({"saturated": ()}, r"saturated must hold at least one number.*got \(\)"),
    ({"saturated": (1e50,)}, r"all finite in float32; got \(1e\+50,\)"),
    ({"devices": 1}, "devices must be a whole number, at least 2, or None; got 1"),
    ({"tolerance": 0.0}, "tolerance must be between 0 and 1; got 0.0"),
    ({"loss": lambda x: x}, r"loss must return a scalar or \[C\].*shape=\(7, 3\)"),
    (
      {"loss": lambda x: jnp.sum(x.astype(jnp.float32))},
      "in the dtype of its values; got .*float32",
    ),
  ],
)
def test_a_bad_argument_is_named_with_the_rule_and_the_value(settings, words):
  with pytest.raises(ValueError, match=words):
    check_loss(**{"loss": gap_loss} | settings)
