import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gating_jax.inference import costs, folded, pruning
from gating_jax.inference.analysing import analyse, prune
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.folded import Block, FoldedNet, Group, Head, Layer
from gating_jax.inference.folding import fold
from tests.helpers import folded_nets
from tests.helpers.folded_nets import forced, heads_of
from tests.helpers.gated_models import MODELS, SHAPE, images, random_variables

GATED = ("basic", "blocks", "layer", "bottleneck", "vgg", "vgg without norm")
OUTPUTS = ("outputs", "bottleneck outputs")
CLOSED, OPEN = -1e3, 1e3


@functools.cache
def folded_net(name):
  """Returns a folded model; it is made when it is first asked for, not when tests are collected."""
  return fold(MODELS[name], random_variables(MODELS[name]))


def everywhere(net, bias):
  return forced(net, [np.full(head.logits_bias.shape, bias) for head in heads_of(net)])


def equal_where_it_must(net, choices, x):
  """Compares outputs where all static units behave; returns the images on which one does not."""
  y, logits = folded.run_net(net, x)
  z, _ = folded.run_net(pruning.apply_pruning(net, choices), x)
  wrong = [
    ((g > 0) & c.removed | (g <= 0) & c.ungated).any(axis=1)
    for g, c in zip(logits, choices, strict=True)
  ]
  wrong = np.any(wrong, axis=0)
  np.testing.assert_allclose(z[~wrong], y[~wrong], rtol=1e-4, atol=1e-5 * np.abs(y).max())
  return wrong


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, deadline=None)
def test_equal_on_every_image_where_nothing_static_moves(data):
  net = folded_net(data.draw(st.sampled_from((*GATED, *OUTPUTS))))
  bias = st.sampled_from([CLOSED, 0.0, 0.0, OPEN])
  mixed = [
    data.draw(st.lists(bias, min_size=h.logits_bias.size, max_size=h.logits_bias.size))
    for h in heads_of(net)
  ]
  net = data.draw(
    st.sampled_from([forced(net, mixed), everywhere(net, CLOSED), everywhere(net, OPEN)])
  )
  found = folded_nets.count_gates(net, images(12))
  choices = pruning.find_static_units(
    net, found, multiple=data.draw(st.sampled_from([1, 2, 3, 16]))
  )
  assert not equal_where_it_must(net, choices, images(12)).any()
  equal_where_it_must(net, choices, images(6, seed=data.draw(st.integers(1, 3))))
  assert costs.macs(pruning.apply_pruning(net, choices), SHAPE) <= costs.macs(net, SHAPE)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", GATED)
def test_all_open_loses_every_gate_and_all_closed_every_branch(name):
  opened = everywhere(folded_net(name), OPEN)
  small = pruning.apply_pruning(
    opened, pruning.find_static_units(opened, folded_nets.count_gates(opened, images(4)))
  )
  assert heads_of(small) == []
  assert costs.macs(small, SHAPE) == costs.macs(opened, SHAPE) - sum(
    h.hidden.size + h.logits.size for h in heads_of(opened)
  )
  closed = everywhere(folded_net(name), CLOSED)
  small = pruning.apply_pruning(
    closed, pruning.find_static_units(closed, folded_nets.count_gates(closed, images(4)))
  )
  pairs = zip(closed.parts, small.parts, strict=True)
  blocks = [(old, new) for old, new in pairs if isinstance(old, Block) and old.head]
  for old, new in blocks:
    assert new.head is None
    assert new.convs == () if old.layer_gate else new.convs[-1].kernel.shape[2] == 0
    assert costs.macs(FoldedNet((new,)), (8, 8, 4)) <= (
      new.project.kernel.size * 64 if new.project else 0
    )
  np.testing.assert_allclose(
    folded.run_net(small, images(4))[0], folded.run_net(closed, images(4))[0], rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_channels_that_shortcuts_read_stay_and_keep_their_gates(name):
  for bias in (OPEN, CLOSED):
    net = everywhere(folded_net(name), bias)
    small = pruning.apply_pruning(
      net, pruning.find_static_units(net, folded_nets.count_gates(net, images(4)), multiple=1)
    )
    assert len(heads_of(small)) == len(heads_of(net)) > 1
    for old, new in zip(heads_of(net), heads_of(small), strict=True):
      *inner, outer = new.groups
      assert outer == old.groups[-1]
      assert all(group.gates == 0 for group in inner)
    assert costs.macs(small, SHAPE) < costs.macs(net, SHAPE)
    run = compile_conditional(
      small, input_shape=SHAPE, batch_size=2, calibration=images(4), repeats=1
    )
    np.testing.assert_allclose(
      run(images(3))[0], folded.run_net(net, images(3))[0], rtol=1e-4, atol=1e-4
    )
    macs = analyse(small, None, images(4)).macs
    assert macs["executed"] <= macs["switch of 4"] <= macs["masked"]


@pytest.mark.thin(4)
@pytest.mark.parametrize(
  ("name", "bias"), [("recipe", 3.0), ("weighted layers", OPEN), ("weighted vgg", 3.0)]
)
def test_weighted_units_that_are_always_open_keep_their_gates(name, bias):
  opened = everywhere(folded_net(name), bias)
  found = folded_nets.count_gates(opened, images(6))
  assert any((counted.opened == counted.images).any() for counted in found)
  choices = pruning.find_static_units(opened, found, multiple=1)
  assert not any(choice.ungated.any() for choice in choices)
  assert not equal_where_it_must(opened, choices, images(6)).any()
  wrong = [choice._replace(ungated=~choice.removed) for choice in choices]
  with pytest.raises(ValueError, match="choices must leave weighted units their gate"):
    pruning.apply_pruning(opened, wrong)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["recipe", "thresholds", "weighted vgg"])
def test_pruned_units_of_weighted_nets_change_nothing(name):
  """The gate network of a chain's layer loses the rows of the channels that are gone."""
  net = folded_net(name)
  mixed = [np.where(np.arange(h.logits_bias.size) % 2, CLOSED, 0) for h in heads_of(net)]
  net = forced(net, mixed)
  choices = pruning.find_static_units(net, folded_nets.count_gates(net, images(12)), multiple=1)
  assert any(choice.removed.any() for choice in choices)
  assert not equal_where_it_must(net, choices, images(12)).any()


def test_a_glance_that_no_gate_reads_any_more_is_gone():
  closed = everywhere(folded_net("recipe"), CLOSED)
  found = folded_nets.count_gates(closed, images(4))
  small = pruning.apply_pruning(closed, pruning.find_static_units(closed, found))
  assert closed.glance is not None
  assert small.glance is None
  assert heads_of(small) == []
  y, z = folded.run_net(closed, images(4))[0], folded.run_net(small, images(4))[0]
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)


def test_rows_of_each_part_of_the_context_are_selected():
  """Two channels: pooled 0 1, glance 2 3 4, moments 5 6 and 7 8, grid four times two."""
  rows = jnp.arange(17.0)[:, None]
  context = ("pooled", "glance", "moments", "grid")
  head = Head(rows, jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros(2), (Group(2),), context)
  small = head.select_inputs(np.array([1]), channels=2)
  assert small.hidden[:, 0].tolist() == [1, 2, 3, 4, 6, 8, 10, 12, 14, 16]
  # Row 7, the deviation of the channel that is gone, sees 0.01, as of any map of zeros.
  np.testing.assert_allclose(small.hidden_bias, [0.07], rtol=1e-6)
  same = head.select_inputs(np.array([0, 1]), channels=2)
  np.testing.assert_array_equal(same.hidden, head.hidden)
  np.testing.assert_array_equal(same.hidden_bias, [0])


def test_gates_of_a_blocks_output_cannot_be_taken():
  net = folded_net("outputs")
  choices = [pruning.PruneMask.nothing(place.group.gates) for place in folded.group_places(net)]
  choices[1].removed[0] = True
  with pytest.raises(ValueError, match="must not change the gates of a block's output"):
    pruning.apply_pruning(net, choices)


def counted(opened, images, highest, group=None, *, part=1):
  u = len(opened)
  return pruning.GroupStatistics(
    part=part,
    index=0,
    group=group or Group(u),
    layer_gate=False,
    images=images,
    opened=np.array(opened),
    together=np.zeros((u, u), int),
    highest=np.array(highest, np.float32),
    lowest=np.full(u, -9, np.float32),
  )


def one_block(group):
  conv = lambda i, o: folded.Conv(jnp.zeros((1, 1, i, o)), jnp.zeros(o))
  head = Head(
    jnp.zeros((2, 3)), jnp.zeros(3), jnp.zeros((3, group.gates)), jnp.zeros(group.gates), (group,)
  )
  return FoldedNet((Layer(conv(3, 2)), Block((conv(2, group.width), conv(group.width, 2)), head)))


def test_kept_are_rounded_up_by_those_nearest_to_opening():
  net = one_block(Group(6))
  found = counted([0, 5, 0, 10, 0, 0], 10, [-3.0, 1.0, -1.0, 2.0, -2.0, -4.0])
  (choice,) = pruning.find_static_units(net, [found], multiple=4)
  assert choice.removed.tolist() == [True, False, False, False, False, True]
  assert choice.ungated.tolist() == [False, False, False, True, False, False]
  small = pruning.apply_pruning(net, [choice])
  assert small.parts[1].head.groups == (Group(3, always=1),)
  (choice,) = pruning.find_static_units(net, [found], multiple=1)
  assert choice.removed.tolist() == [True, False, True, False, True, True]


def test_units_of_several_channels_and_channels_without_gate_are_rounded_in_channels():
  group = Group(4, channels=2, always=2)
  found = counted([0, 3, 0, 0], 10, [-3.0, 1.0, -1.0, -2.0], group)
  # 2 + 2 open channels, so that 2 more stay.
  (choice,) = pruning.find_static_units(one_block(group), [found], multiple=6)
  assert choice.removed.tolist() == [True, False, False, True]
  assert pruning.apply_pruning(one_block(group), [choice]).parts[1].convs[0].bias.size == 6


def test_gates_of_a_blocks_output_stay_where_those_inside_are_pruned():
  (stem, block), inner, outer = one_block(Group(2)).parts, Group(2), Group(2)
  head = dataclasses.replace(
    block.head, logits=jnp.zeros((3, 4)), logits_bias=jnp.zeros(4), groups=(inner, outer)
  )
  net = FoldedNet((stem, dataclasses.replace(block, head=head, output_gate=True)))
  closed = counted([0, 4], 4, [-1, 1])
  found = [closed, dataclasses.replace(closed, index=1)]
  choices = pruning.find_static_units(net, found, multiple=1)
  assert [choice.removed.tolist() for choice in choices] == [[True, False], [False, False]]
  assert [choice.ungated.tolist() for choice in choices] == [[False, True], [False, False]]
  small = pruning.apply_pruning(net, choices).parts[1]
  assert small.head.groups == (Group(0, always=1), outer)
  assert small.head.logits.shape == (3, 2)


def test_order_is_ungated_first_and_logits_follow():
  net = folded_net("basic")
  net = forced(net, [[0, OPEN, CLOSED, 0], *([0] * h.logits_bias.size for h in heads_of(net)[1:])])
  part = next(p for p in net.parts if p.head is not None)
  choice = pruning.PruneMask(np.array([0, 0, 1, 0], bool), np.array([0, 1, 0, 0], bool))
  none = [pruning.PruneMask(*np.zeros((2, h.logits_bias.size), bool)) for h in heads_of(net)[1:]]
  small = next(p for p in pruning.apply_pruning(net, [choice, *none]).parts if p.head is not None)
  np.testing.assert_array_equal(small.convs[0].bias, part.convs[0].bias[jnp.array([1, 0, 3])])
  np.testing.assert_array_equal(
    small.convs[1].kernel, part.convs[1].kernel[:, :, jnp.array([1, 0, 3])]
  )
  np.testing.assert_array_equal(small.head.logits, part.head.logits[:, jnp.array([0, 3])])


def test_pruning_twice_changes_nothing_more():
  analysis = analyse(folded_net("bottleneck"), None, images(20))
  once = prune(analysis, multiple=2)
  twice = prune(analyse(once, None, images(20)), multiple=2)
  assert costs.macs(once, SHAPE) < costs.macs(analysis.net, SHAPE)
  assert costs.macs(twice, SHAPE) == costs.macs(once, SHAPE)


def test_features_of_a_vgg_keep_their_channels_and_order():
  net = everywhere(FoldedNet(folded_net("vgg").parts), CLOSED)
  choices = pruning.find_static_units(net, folded_nets.count_gates(net, images(4)), multiple=1)
  assert not choices[-1].removed.any()
  assert choices[0].removed.any()
  assert (
    folded.run_net(pruning.apply_pruning(net, choices), images(4))[0].shape
    == folded.run_net(net, images(4))[0].shape
  )


def test_confidence_takes_nothing_on_too_few_images():
  net = one_block(Group(2))
  choose = lambda images, **options: pruning.find_static_units(
    net, [counted([0, images], images, [-1, 1])], multiple=1, **options
  )
  assert choose(298, confidence=0.95)[0].removed.tolist() == [False, False]
  assert choose(299, confidence=0.95)[0].removed.tolist() == [True, False]
  assert choose(298, confidence=0.95)[0].ungated.tolist() == [False, False]
  assert choose(60, confidence=0.95, max_rate=0.05)[0].ungated.tolist() == [False, True]
  assert choose(10)[0].removed.tolist() == [True, False]


@pytest.mark.parametrize("images", [1, 30, 299, 5000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_rate_bound_is_the_rule_of_three(images, confidence):
  assert pruning.rate_bound(images, confidence) == pytest.approx(
    1 - (1 - confidence) ** (1 / images), rel=1e-9
  )
  assert pruning.rate_bound(images, confidence, events=images) == 1.0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"multiple": 0}, "multiple must be >= 1; got 0"),
    ({"multiple": 2.5}, "multiple must be a whole number >= 1; got 2.5"),
    ({"confidence": 1.0}, "confidence must be above 0 and below 1, or None; got 1.0"),
    ({"max_rate": 0.0}, "max_rate must be above 0 and at most 1; got 0.0"),
  ],
)
def test_bad_settings_are_named(options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    pruning.find_static_units(one_block(Group(2)), [counted([0, 1], 2, [-1, 1])], **options)


def test_choices_and_openings_of_another_network_are_refused():
  with pytest.raises(ValueError, match="gate_statistics must be those of the network's 1 groups"):
    pruning.find_static_units(one_block(Group(3)), [counted([0, 1], 2, [-1, 1])])
  with pytest.raises(ValueError, match="choices must be one for each group"):
    pruning.apply_pruning(one_block(Group(3)), [])
