import numpy as np
import pytest

from gating_jax.training import optim


def values(schedule, *at):
  return [float(schedule(step)) for step in at]


def test_fade_out_falls_linearly_to_zero_and_stays():
  schedule = optim.fade_out(0.75, 0.2, 1000)
  assert values(schedule, 0, 100, 199, 200, 1000) == pytest.approx([0.75, 0.375, 0.00375, 0, 0])


def test_fade_out_that_ends_at_the_start_is_zero():
  assert values(optim.fade_out(0.75, 0.0, 1000), 0, 1, 999) == [0, 0, 0]


def test_fade_out_over_the_whole_training():
  assert values(optim.fade_out(2.0, 1.0, 10), 0, 5, 10) == pytest.approx([2, 1, 0])


def test_fade_out_that_ends_within_the_first_step():
  assert values(optim.fade_out(1.0, 0.2, 2), 0, 1) == [1, 0]


def test_fade_in_is_zero_then_linear_then_constant():
  schedule = optim.fade_in(0.5, 0.2, 0.6, 1000)
  assert values(schedule, 0, 200, 201, 400, 600, 1000) == pytest.approx(
    [0, 0, 0.00125, 0.25, 0.5, 0.5]
  )


def test_fade_in_from_the_start():
  assert values(optim.fade_in(1.0, 0.0, 0.5, 10), 0, 1, 5, 9) == pytest.approx([0, 0.2, 1, 1])


def test_fade_in_of_equal_fractions_is_a_jump():
  assert values(optim.fade_in(1.0, 0.5, 0.5, 10), 0, 5, 6, 9) == pytest.approx([0, 0, 1, 1])


def test_step_learning_rate_drops_at_each_fraction():
  schedule = optim.learning_rate("step", 0.1, 1000, lr_drop_at=(0.6, 0.75, 0.9), factor=0.1)
  assert values(schedule, 0, 599, 600, 749, 750, 899, 900, 999) == pytest.approx(
    [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
  )


def test_step_learning_rate_without_drops_is_constant():
  assert values(optim.learning_rate("step", 0.1, 1000), 0, 999) == pytest.approx([0.1, 0.1])


def test_drops_at_the_same_step_multiply():
  schedule = optim.learning_rate("step", 1.0, 5, lr_drop_at=(0.6, 0.75, 0.9), factor=0.5)
  assert values(schedule, 2, 3, 4) == pytest.approx([1, 0.5, 0.125])


def test_cosine_learning_rate_ends_at_zero():
  schedule = optim.learning_rate("cosine", 0.2, 100)
  assert values(schedule, 0, 50, 100) == pytest.approx([0.2, 0.1, 0], abs=1e-7)
  assert float(schedule(25)) == pytest.approx(0.2 * (1 + np.cos(np.pi / 4)) / 2)


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_warm_up_rises_linearly_to_the_peak(kind):
  schedule = optim.learning_rate(kind, 0.1, 100, warmup=0.1, lr_drop_at=(0.5,))
  assert values(schedule, 0, 1, 5, 10) == pytest.approx([0, 0.01, 0.05, 0.1])


def test_warm_up_does_not_move_the_drops_or_the_end():
  step = optim.learning_rate("step", 0.1, 100, warmup=0.1, lr_drop_at=(0.5,), factor=0.5)
  assert values(step, 49, 50, 99) == pytest.approx([0.1, 0.05, 0.05])
  cosine = optim.learning_rate("cosine", 0.1, 100, warmup=0.1)
  assert values(cosine, 55, 100) == pytest.approx([0.05, 0], abs=1e-7)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: optim.fade_out(1, -0.1, 10),
      r"fade_end must be a fraction of training, in \[0, 1\]; got -0.1",
    ),
    (lambda: optim.fade_out(1, 20, 10), "fade_end must be .*; got 20"),
    (lambda: optim.fade_in(1, 1.5, 2, 10), "ramp_start must be .*; got 1.5"),
    (lambda: optim.fade_in(1, 0.5, 2, 10), "ramp_end must be .*; got 2"),
    (
      lambda: optim.fade_in(1, 0.6, 0.2, 10),
      "ramp_start must be <= ramp_end; got ramp_start 0.6, ramp_end 0.2",
    ),
    (lambda: optim.learning_rate("step", 1, 10, warmup=5), "warmup must be .*; got 5"),
    (
      lambda: optim.learning_rate("step", 1, 10, lr_drop_at=(0.5, 60)),
      r"lr_drop_at\[1\] must be .*; got 60",
    ),
    (
      lambda: optim.learning_rate("step", 1, 10, lr_drop_at=(float("nan"),)),
      r"lr_drop_at\[0\] must be .*; got nan",
    ),
    (lambda: optim.learning_rate("step", 0, 10), "learning_rate must be > 0; got 0"),
    (
      lambda: optim.learning_rate("cosin", 1, 10),
      "must be one of cosine, step; .*Did you mean 'cosine'",
    ),
  ],
)
def test_bad_fractions_and_names_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ("form", "expected"),
  [
    ("linear", [1, 1, 0.8125, 0.625, 0.4375, 0.25, 0.25]),
    ("cosine", [1, 1, 0.890165, 0.625, 0.359835, 0.25, 0.25]),
    ("held", [1, 1, 1, 1, 1, 0.25, 0.25]),
  ],
)
def test_a_transition_has_its_form(form, expected):
  schedule = optim.transition(1.0, 0.25, 0.2, 0.6, 10, form=form)
  assert values(schedule, 0, 2, 3, 4, 5, 6, 10) == pytest.approx(expected)
  assert values(optim.transition(1.0, 0.25, 0.0, 0.0, 10, form=form), 0, 9) == [0.25, 0.25]


def test_an_unknown_transition_is_named():
  with pytest.raises(ValueError, match="^form must be one of cosine, held, linear; got 'step'"):
    optim.transition(1.0, 0.5, 0.0, 0.5, 10, form="step")


def test_a_ramp_falls_or_rises_between_two_values():
  assert values(optim.ramp(1.0, 0.25, 0.2, 0.6, 10), 0, 2, 3, 4, 6, 10) == pytest.approx(
    [1, 1, 0.8125, 0.625, 0.25, 0.25]
  )
  assert values(optim.ramp(1.0, 0.25, 0.0, 0.0, 10), 0, 9) == [0.25, 0.25]
