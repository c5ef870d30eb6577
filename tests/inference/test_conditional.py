"""Every strategy equals `folded.masked`, for any open gates and any number of images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gating_jax.inference import conditional, folded
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.folded import Block, FoldedNet, Group, Layer
from gating_jax.inference.quantising import quantise
from gating_jax.inference.strategies import STRATEGIES, PartContext, for_open, why_not, worth_trying
from tests.helpers.folded_nets import FEATURES, KINDS, SHAPE, basic, conv, images, net
from tests.helpers.runs import race_by

CASES = [
  pytest.param(
    kind, strategy, marks=pytest.mark.skipif(bool(why_not(strategy)), reason=why_not(strategy))
  )
  for kind, known in KINDS.items()
  for strategy in known
]


def compiled(kind, strategy, batch_size=1, **changes):
  changes = {"calibration": images(3, seed=5) if strategy == "cluster" else None, **changes}
  return compile_conditional(
    net(kind), input_shape=SHAPE, batch_size=batch_size, strategy=strategy, **changes
  )


# Tests that only read a program share it.
shared = functools.cache(compiled)
MOST = 7  # images


def reference_of(of, x):
  """Runs `folded.run_net` as one program for any number of images."""
  found = jax.jit(folded.run_net)(of, np.concatenate([x, images(MOST - len(x))]))
  return jax.tree.map(lambda a: np.asarray(a)[: len(x)], found)


def check(run, x, of):
  """Checks that a program's outputs are those of the reference; returns the gates.

  Images with a logit so near 0 that rounding may open its gate are left out.
  """
  y, logits = run(x)
  expected, reference = reference_of(of, x)
  assert y.shape == expected.shape
  clear = np.all(
    [np.all(np.abs(z) > 1e-5 * np.abs(z).max(initial=0), axis=1) for z in reference], axis=0
  )
  assert clear.sum() >= len(x) - 1
  for actual, desired in ((y, expected), *zip(logits, reference, strict=True)):
    scale = np.abs(desired).max(initial=0)
    np.testing.assert_allclose(actual[clear], desired[clear], rtol=1e-5, atol=1e-5 * scale)
  return [np.asarray(z) > 0 for z in reference]


def check_image_that_is_no_number(run):
  """It has no answer, and does not change the others'."""
  x = images(3)
  whole = np.asarray(run(x)[0])
  for value in (np.nan, np.inf):
    spoilt = x.copy()
    spoilt[1, 2, 2, 0] = value
    y = np.asarray(run(spoilt)[0])
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[[0, 2]], whole[[0, 2]], rtol=1e-5, atol=1e-5)


def with_bias(of, bias):
  """The network with this summand to all gate logits."""
  moved = lambda part: (
    part
    if part.head is None
    else dataclasses.replace(
      part, head=dataclasses.replace(part.head, logits_bias=part.head.logits_bias + bias)
    )
  )
  return dataclasses.replace(of, parts=tuple(moved(part) for part in of.parts))


@pytest.mark.thin(5)
@pytest.mark.parametrize(("kind", "strategy"), CASES)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_equal_to_computing_everything(kind, strategy, batch_size):
  run = compiled(kind, strategy, batch_size)
  assert strategy in run.strategies
  gates = check(run, images(7), net(kind))
  assert 0.1 < np.mean(np.concatenate(gates, axis=1)) < 0.9
  assert any(len(np.unique(g.sum(1))) > 1 for g in gates)
  check_image_that_is_no_number(run)


@pytest.mark.thin(15)
@pytest.mark.parametrize(("kind", "strategy"), CASES)
@pytest.mark.parametrize(("batch_size", "buckets"), [(3, 4), (1, 2)])
def test_equal_on_fuzzed_gates(kind, strategy, batch_size, buckets):
  """One program, whose weights are arguments: all open, all closed, and some open."""
  run = compiled(kind, strategy, batch_size, buckets=buckets)
  seen = set()

  @settings(max_examples=10, deadline=None)
  @example(0, -100.0, 4)
  @example(0, 100.0, 4)
  @given(
    st.integers(0, 10**6),
    st.sampled_from([-100.0, -2.0, 0.0, 2.0, 100.0]),
    st.sampled_from([0, 1, 4, 7]),
  )
  def fuzz(seed, bias, count):
    other = with_bias(net(kind, seed), bias)
    run.load(other)
    seen.update(
      bool(v) for g in check(run, images(count, seed), other) for v in (g.all(), ~g.any()) if g.size
    )

  fuzz()
  assert seen == {True, False}


def test_what_is_closed_is_not_computed():
  """Infinite weights of closed channels and branches do no harm where they are skipped."""
  for kind, strategy in (
    ("channels", "switch"),
    ("blocks", "block_dispatch"),
    ("layers", "layer_dispatch"),
  ):
    run = compiled(kind, strategy)
    closed = with_bias(net(kind), -1e4)
    spoilt = dataclasses.replace(
      closed,
      parts=tuple(
        part
        if isinstance(part, Layer)
        else dataclasses.replace(
          part,
          convs=tuple(
            dataclasses.replace(
              c,
              kernel=c.kernel.at[..., -1 if i == 0 else slice(None)].set(
                jnp.nan if i == 0 or kind != "channels" else c.kernel
              ),
            )
            for i, c in enumerate(part.convs)
          ),
        )
        for part in closed.parts
      ),
    )
    x = images(1)
    expected, _ = jax.jit(folded.run_net)(closed, x)
    run.load(spoilt)
    np.testing.assert_allclose(run(x)[0], expected, rtol=2e-5, atol=2e-5, err_msg=strategy)
    assert np.isnan(jax.jit(folded.run_net)(spoilt, x)[0]).all()


@pytest.mark.slow
def test_auto_takes_a_net_of_which_slimming_has_left_dead_branches():
  run = compiled("dead branches", "auto", 2, calibration=images(9), repeats=1)
  check(run, images(5), net("dead branches"))
  assert all(t.mac_ratio == 1 for t in run.report() if t.part in (1, 2))


def test_blocks_that_the_kernel_for_gpus_cannot_take_are_left_out(monkeypatch):
  (block,) = (
    part
    for part in net("blocks").parts
    if isinstance(part, Block) and part.head.groups[0].channels == 8
  )
  assert STRATEGIES["pallas"].make(block, PartContext(4)) is not None
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert STRATEGIES["pallas"].make(block, PartContext(4)) is None


@pytest.mark.parametrize("kind", [pytest.param("blocks", marks=pytest.mark.slow), "layers"])
def test_auto_reports_what_it_measured_and_takes_the_fastest(kind):
  run = compiled(kind, "auto", 2, calibration=images(9), repeats=2)
  check(run, images(5), net(kind))
  timings = run.report()
  known = {"masked", *(name for name in KINDS[kind] if worth_trying(name))}
  parts = [i for i, part in enumerate(net(kind).parts) if part.head is not None]
  assert {(t.part, t.strategy) for t in timings if t.part in parts} == {
    (i, s) for i in parts for s in known
  }
  for t in timings:
    assert t.seconds > 0
    assert t.efficiency == pytest.approx(t.mac_ratio / t.time_ratio)
    assert 0 <= t.mac_ratio < 1.5
    assert t.mac_ratio <= t.computed_ratio < 1.5 or t.strategy == "ungated"
    if t.part is not None:
      assert t.chosen == (run.strategies[t.part] == t.strategy)
  whole = {t.strategy: t for t in timings if t.part is None}
  assert {"ungated", *known} <= whole.keys()
  assert sum(t.chosen for t in whole.values()) == 1
  (chosen,) = (t for t in whole.values() if t.chosen)
  assert chosen.time_ratio <= whole["masked"].time_ratio
  assert all(t.time_ratio >= 1 for t in whole.values() if t.strategy in ("masked", "ungated"))


def clock(seconds, when_open=1.0):
  """A race by a made-up clock: seconds of each strategy, and 2 of others.

  With everything open, `masked` and `ungated` take 1 second.
  """

  def race(runs, _, **__):
    def spent(name):
      strategy, wide = name if isinstance(name, tuple) else (name, False)
      if wide or strategy == "ungated":
        return 1.0 if strategy in ("masked", "ungated") else when_open
      return seconds.get(strategy, 2.0)

    return {name: [spent(name)] for name in runs}

  return race


@pytest.mark.slow
def test_strategies_are_timed_on_other_images_than_they_are_fitted_to(monkeypatch):
  seen = {"fitted": [], "timed": []}

  def contexts_of(net, buckets, gates):
    seen["fitted"].append(len(gates[0]))
    return of_net(net, buckets, gates)

  def spread_batches(images, size):
    seen["timed"].append(np.asarray(images))
    return spread(images, size)

  of_net, spread = conditional.contexts_of, conditional.spread_batches
  monkeypatch.setattr(conditional, "contexts_of", contexts_of)
  monkeypatch.setattr(conditional, "spread_batches", spread_batches)
  x = images(9)
  told = []
  for count in (9, 1):
    compiled(
      "blocks",
      "auto",
      2,
      calibration=x[:count],
      repeats=1,
      candidates=("block_dispatch",),
      progress=lambda *counts: told.append(counts),
    )
    done, (total, *totals) = zip(*told, strict=True)
    assert done == (*range(1, len(told) + 1),)
    assert set(totals) == {total}
    assert 0 <= total - len(told) <= 2  # a mixture of both strategies may be compiled as well
    told.clear()
  assert seen["fitted"] == [5, 1]
  np.testing.assert_array_equal(seen["timed"][0], x[1::2])
  np.testing.assert_array_equal(seen["timed"][1], x[:1])


def test_auto_falls_back_where_skipping_loses(monkeypatch):
  for fast in ("masked", "block_dispatch"):
    race_by(monkeypatch, clock({fast: 1.0}))
    run = compiled("blocks", "auto", 2, calibration=images(3))
    assert run.strategies == ("masked", fast, fast)


@pytest.mark.parametrize(
  ("when_open", "limit", "strategy"),
  [
    (1.04, {}, "block_dispatch"),
    (1.06, {}, "masked"),
    (1.06, {"max_slowdown_all_open": 1.1}, "block_dispatch"),
  ],
)
def test_auto_takes_nothing_that_is_slow_with_everything_open(
  when_open, limit, strategy, monkeypatch
):
  race_by(monkeypatch, clock({"masked": 1.0, "block_dispatch": 0.5}, when_open))
  run = compiled("blocks", "auto", 2, calibration=images(3), **limit)
  assert run.strategies[1:] == (strategy, strategy)
  ratios = {t.strategy: t.open_ratio for t in run.report() if t.part is None}
  assert (ratios["masked"], ratios["ungated"], ratios["block_dispatch"]) == (1.0, 1.0, when_open)
  assert all(t.open_ratio is None for t in run.report() if t.part is not None)


def test_with_everything_open_is_timed_with_everything_open(monkeypatch):
  raced = {}
  race_by(
    monkeypatch,
    lambda runs, _, **__: raced.update(runs) or {name: [1.0] for name in runs},
  )
  compiled("blocks", "auto", 2, calibration=images(9))
  # The baselines have no gates.
  dense = ("ungated", "one by one")
  whole = {
    name: run for name, run in raced.items() if isinstance(name, tuple) and name[0] not in dense
  }
  assert {wide for _, wide in whole} == {True, False}
  for (_, wide), run in whole.items():
    program, calls = run.args
    logits = [z for call in calls for z in program(*call)[1]]
    assert all((z > 0).all() for z in logits) == wide


def test_units_that_no_image_can_open_are_not_opened():
  of = with_bias(net("channels"), 0.0)
  part = of.parts[1]
  closed = dataclasses.replace(
    part.head,
    logits=part.head.logits.at[:, 3].set(0),
    logits_bias=part.head.logits_bias.at[3].set(-1e3),
  )
  of = dataclasses.replace(
    of, parts=(of.parts[0], dataclasses.replace(part, head=closed), of.parts[2])
  )
  first, second = reference_of(conditional.opened(of), images(4))[1]
  np.testing.assert_array_equal(first > 0, np.broadcast_to(np.arange(34) != 3, (4, 34)))
  assert (second > 0).all()


def test_auto_takes_from_the_candidates_alone(monkeypatch):
  # Otherwise parts might differ in the fastest.
  race_by(monkeypatch, clock({"block_dispatch": 1.0}))
  run = compiled(
    "blocks", "auto", 2, calibration=images(3), repeats=1, candidates=("block_dispatch",)
  )
  assert {t.strategy for t in run.report()} == {"masked", "block_dispatch", "ungated"}


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (
      lambda: dataclasses.replace(net("channels"), parts=net("channels").parts[:2]),
      "parts and settings",
    ),
    (lambda: net("layers"), "parts and settings"),
    (
      lambda: dataclasses.replace(net("channels"), classifier=(jnp.zeros((6, 5)), jnp.zeros(5))),
      r"the shapes of the compiled network, at classifier.0 float32 \(6, 4\); got "
      r"float32 \(6, 5\)",
    ),
  ],
)
def test_a_network_of_other_shapes_is_not_loaded(other, message):
  run = shared("channels", "switch")
  with pytest.raises(ValueError, match=message):
    run.load(other())


def test_a_network_with_other_groups_of_the_same_convolutions_is_not_loaded():
  rng = np.random.default_rng(0)
  of = lambda group: FoldedNet((Layer(conv(rng, 3, FEATURES)), basic(rng, group)))
  run = compile_conditional(of(Group(34)), input_shape=SHAPE, batch_size=1, strategy="switch")
  with pytest.raises(ValueError, match="groups of gates"):
    run.load(of(Group(30, always=4)))


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (
      np.zeros((2, 5, 5, 3), np.float32),
      r"images must be \[N, 5, 4, 3\]; got shape \(2, 5, 5, 3\)",
    ),
    (np.zeros((5, 4, 3), np.float32), r"images must be \[N, 5, 4, 3\]; got shape \(5, 4, 3\)"),
    (
      np.zeros((2, *SHAPE), np.uint8),
      "images must be network inputs in floating point, .*; got uint8",
    ),
  ],
)
def test_wrong_images_are_named(x, message):
  with pytest.raises(ValueError, match=message):
    shared("channels", "switch")(x)


def test_images_of_other_floating_point_types_are_taken():
  run, x = shared("channels", "switch"), images(2)
  np.testing.assert_array_equal(run(x.astype(np.float64))[0], run(x)[0])


def test_an_absent_kernel_is_named(monkeypatch):
  monkeypatch.setattr(
    conditional, "why_not", lambda name: "no compiler" if name == "native" else ""
  )
  with pytest.raises(ValueError, match="strategy 'native' cannot run here: no compiler"):
    compiled("channels", "native")
  monkeypatch.setattr(conditional, "worth_trying", lambda name: name != "native")
  run = compiled("channels", "auto", calibration=images(3), repeats=1)
  assert "native" not in {t.strategy for t in run.report()}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"strategy": "swich"}, "strategy must be one of .*; got 'swich'. Did you mean 'switch'"),
    (
      {"strategy": "layer_dispatch"},
      "strategy must fit a part of the network; 'layer_dispatch' fits",
    ),
    ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
    ({"batch_size": 2.5}, "batch_size must be a whole number >= 1; got 2.5"),
    (
      {"input_shape": (0, -1, 7)},
      r"input_shape must be \(H, W, D\), whole numbers >= 1; got \(0, -1, 7\)",
    ),
    ({"input_shape": (7, 9)}, r"input_shape must be \(H, W, D\), whole numbers >= 1; got \(7, 9\)"),
    (
      {"input_shape": (5, 4, 1), "strategy": "switch"},
      "images must have 3 channels, as the network expects; got 1",
    ),
    ({"max_slowdown_all_open": 0.0}, "max_slowdown_all_open must be > 0; got 0.0"),
    (
      {"candidates": ("swich",)},
      "candidates must be one of .*; got 'swich'. Did you mean 'switch'",
    ),
    ({"buckets": 0}, "buckets must be >= 1; got 0"),
    ({"repeats": 0}, "repeats must be >= 1; got 0"),
    ({}, "calibration must be given for strategy 'auto'; got None"),
    (
      {"calibration": images(2)[:, 1:]},
      r"calibration must be \[N, 5, 4, 3\]; got shape \(2, 4, 4, 3\)",
    ),
    ({"calibration": images(0)}, "calibration must hold at least one image; got none"),
    (
      {"calibration": np.full((2, *SHAPE), np.nan, np.float32)},
      "calibration must be finite; index 0 of 2 is",
    ),
  ],
)
def test_a_wrong_argument_is_named(changes, message):
  with pytest.raises((TypeError, ValueError), match=message):
    compile_conditional(net("channels"), **{"input_shape": SHAPE, "batch_size": 1, **changes})


def test_int8_kernels_are_refused():
  with pytest.raises(ValueError, match="net must have float32 kernels, .*; got Int8"):
    compile_conditional(
      quantise(net("channels")), input_shape=SHAPE, batch_size=1, strategy="switch"
    )


def test_every_strategy_is_tried():
  assert {"masked", *(s for known in KINDS.values() for s in known)} == STRATEGIES.keys()


def test_the_program_for_any_number_of_open_examples_holds_them_all():
  x = jnp.arange(1.0, 9.0)
  run = jax.jit(lambda is_open: for_open(is_open, (x,), lambda x: 10 * x, x, 4))
  for count in range(9):
    is_open = np.arange(8) >= 8 - count
    np.testing.assert_array_equal(run(is_open), np.where(is_open, 11 * x, x))
