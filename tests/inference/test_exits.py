"""A program that continues with uncertain images only gives the model's answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gating_jax.inference import exits
from gating_jax.inference.costs import exit_macs
from gating_jax.inference.exits import EXIT_DISPATCH, MASKED, compile_exits, fold_exits
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from tests.helpers.gated_models import random_variables

SHAPE = (8, 7, 3)
MODEL = EarlyExitNet(4, (1, 2, 1), features=4, threshold=0.7)
VARIABLES = random_variables(MODEL)
for exit_, scale in (("exit1", 0.25), ("exit2", 0.03)):  # entropies of all sizes
  VARIABLES["params"][exit_]["classifier"]["kernel"] *= scale


def images(count, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(0, 1, (count, *SHAPE)) + rng.normal(0, 2, (count, 1, 1, 3))).astype(np.float32)


@functools.cache
def model_program(threshold):
  return jax.jit(dataclasses.replace(MODEL, threshold=threshold).apply)


def answers(x, threshold=MODEL.threshold):
  """Returns the model's logits, and after which exits each image continues."""
  logits, records = model_program(threshold)(VARIABLES, x)
  return logits, np.concatenate([r.gates for r in records], axis=1) > 0, records


def compiled(batch_size, threshold=MODEL.threshold, **changes):
  net = dataclasses.replace(fold_exits(MODEL, VARIABLES), threshold=threshold)
  return compile_exits(
    net, input_shape=SHAPE, batch_size=batch_size, **{"strategy": EXIT_DISPATCH, **changes}
  )


@pytest.mark.thin(4)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("buckets", [1, 3])
def test_the_answers_are_those_of_the_model_for_any_number_of_images(batch_size, buckets):
  run = compiled(batch_size, buckets=buckets)
  for number in (0, 1, 7, 16):
    x = images(number, seed=number)
    logits, stay = run(x)
    assert (logits.shape, stay.shape) == ((number, 4), (number, 2))
    if number:
      expected, goes_on, _ = answers(x)
      np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
      assert np.array_equal(stay > 0, goes_on)
  assert 0 < goes_on[:, 1].sum() < goes_on[:, 0].sum() < 16


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "buckets"), [(1, 2), (4, 3)])
def test_equal_to_computing_everything_on_fuzzed_nets(batch_size, buckets):
  """One program, whose weights are arguments: exits are certain of all, none or some images."""
  run, seen = compiled(batch_size, buckets=buckets), set()

  @settings(max_examples=15, deadline=None)
  @given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.03, 0.3, 100.0]),
    st.sampled_from([0.0, 0.03, 100.0]),
    st.integers(0, 9),
  )
  def fuzz(seed, first, second, number):
    variables = random_variables(MODEL, seed)
    for exit_, scale in (("exit1", first), ("exit2", second)):
      for leaf in variables["params"][exit_]["classifier"]:
        variables["params"][exit_]["classifier"][leaf] *= scale
    net, x = fold_exits(MODEL, variables), images(number, seed)
    run.load(net)
    logits, stay = run(x)
    expected, reference = exits.make_program()(net, x)
    assert (logits.shape, stay.shape) == (expected.shape, reference.shape)
    clear = np.all(np.abs(reference) > 1e-3, axis=1)  # rounding sends no image the other way
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(logits[clear], expected[clear], rtol=1e-4, atol=1e-4 * scale)
    assert np.array_equal(stay[clear] > 0, reference[clear] > 0)
    seen.update((np.asarray(reference) > 0).sum(axis=1).tolist())

  fuzz()
  assert seen == {0, 1, 2}


@pytest.mark.thin(2)
@pytest.mark.parametrize(("threshold", "goes_on"), [(1e-5, True), (1 - 1e-5, False)])
def test_all_go_on_or_all_leave_at_the_first_exit(threshold, goes_on):
  x = images(6)
  logits, stay = compiled(6, threshold)(x)
  assert np.all((stay > 0) == goes_on)
  np.testing.assert_allclose(logits, answers(x, threshold)[0], rtol=1e-4, atol=1e-3)


def test_an_image_that_is_no_number_changes_no_other():
  x = images(6)
  whole = compiled(6)(x)[0]
  x[2] = np.nan
  logits = np.asarray(compiled(6)(x)[0])
  others = np.arange(6) != 2
  assert np.isnan(logits[2]).all()
  np.testing.assert_allclose(logits[others], whole[others], rtol=1e-5, atol=1e-5)


def test_multiply_accumulates_are_those_that_the_model_counts():
  x, counts = images(16), model_summary(MODEL, SHAPE)
  _, goes_on, records = answers(x)
  costs = [r.macs_per_unit for r in records]
  _, stay = compiled(16)(x)
  net = fold_exits(MODEL, VARIABLES)
  assert exit_macs(net, SHAPE) == counts.macs
  np.testing.assert_array_equal(
    exit_macs(net, SHAPE, stay), counts.macs - sum(costs) + goes_on @ np.array(costs)
  )


@pytest.mark.slow
def test_what_both_ways_took_is_reported_and_the_faster_runs():
  run = compiled(4, strategy="auto", calibration=images(9), repeats=2)
  masked, gathered, ungated = run.report()
  assert (masked.strategy, gathered.strategy, ungated.strategy) == (
    MASKED,
    EXIT_DISPATCH,
    "ungated",
  )
  assert 0 < masked.mac_ratio == gathered.mac_ratio != ungated.mac_ratio == 1
  assert masked.computed_ratio > gathered.computed_ratio >= gathered.mac_ratio
  assert masked.computed_ratio > 1 == ungated.computed_ratio
  assert [t.chosen for t in run.report()] == [run.strategy == t.strategy for t in run.report()]
  everything = masked.seconds / masked.time_ratio
  # Up to the rounding of the quotient.
  assert everything <= min(masked.seconds, ungated.seconds) * (1 + 1e-9)
  assert gathered.time_ratio == pytest.approx(gathered.seconds / everything)
  assert min(masked.open_ratio, ungated.open_ratio) == 1
  assert (compiled(9, exits._NEVER)(images(9))[1] > 0).all()  # what `open_ratio` is of


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="model must be EarlyExitNet; got ResNet"):
    fold_exits(ResNet(4, (1,), features=4), {})
  with pytest.raises(
    ValueError, match="group_norm must be False: GroupNorm cannot be folded; got True"
  ):
    fold_exits(EarlyExitNet(4, (1, 1), features=4, group_norm=True), {})
  with pytest.raises(ValueError, match="max_slowdown_all_open must be > 0; got 0"):
    compile_exits(
      MODEL, VARIABLES, input_shape=SHAPE, batch_size=1, strategy="masked", max_slowdown_all_open=0
    )
  with pytest.raises(
    ValueError, match="images must have 3 channels, as the network expects; got 2"
  ):
    compile_exits(MODEL, VARIABLES, input_shape=(8, 7, 2), batch_size=1, strategy="masked")
  with pytest.raises(ValueError, match="buckets must be >= 1; got 0"):
    compiled(2, buckets=0)
  with pytest.raises(ValueError, match=r"calibration must be \[N, 8, 7, 3\]"):
    compiled(2, calibration=jnp.zeros((3, 1, 1, 1)))
  with pytest.raises(ValueError, match="calibration must be given for strategy 'auto'; got None"):
    compiled(2, strategy="auto")
  with pytest.raises(ValueError, match="strategy must be one of .*; got 'switch'"):
    compiled(2, strategy="switch")


def test_the_former_name_of_the_limit_is_taken_with_a_warning():
  with pytest.warns(DeprecationWarning, match="open_limit is now called max_slowdown_all_open"):
    compiled(2, open_limit=1.1)


def test_each_piece_of_work_is_told():
  told = []
  tell = lambda done, total: told.append((done, total))
  compiled(2, strategy="auto", calibration=images(3), repeats=2, progress=tell)
  # Six programs are compiled, two of them the baseline's, and all are timed in two turns.
  assert told == [(done, 8) for done in range(1, 9)]


def test_a_network_with_another_threshold_is_not_loaded():
  with pytest.raises(ValueError, match="net must have the parts"):
    compiled(3).load(dataclasses.replace(fold_exits(MODEL, VARIABLES), threshold=0.5))


def test_weights_of_another_network_are_taken():
  run, other = compiled(3), random_variables(MODEL, seed=2)
  run.load(dataclasses.replace(fold_exits(MODEL, other)))
  x = images(3)
  expected, _ = jax.jit(MODEL.apply)(other, x)
  np.testing.assert_allclose(run(x)[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
