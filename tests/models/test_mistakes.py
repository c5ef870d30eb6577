"""Mistakes with settings, layers and networks: a line names argument, rule and value."""

import copy
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gating_jax as gj
from gating_jax.layers.conv import ConvNorm
from gating_jax.layers.experts import mixture
from gating_jax.layers.gate import GateHead
from gating_jax.models.summary import solve_share
from gating_jax.models.timegate import Dropout, pool
from gating_jax.testing import check_loss

KEY, IMAGES, VIDEOS, VALID = (
  jax.random.key(0),
  jnp.ones((2, 4, 4, 3)),
  jnp.ones((2, 3, 4)),
  jnp.ones((2, 3), bool),
)

CONTEXTS = "assigned, glance, grid, moments, none, pooled, random, told"
GROUPS = (gj.GatedChannels(4, 10),)


def init(module, *inputs, **options):
  return jax.eval_shape(
    lambda *inputs: module.init({"params": KEY, "gate": KEY}, *inputs, **options), *inputs
  )


class OnlyOutputs(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x)


FOLDABLE = gj.ResNet(classes=2, blocks=(1,), features=4)
FEATURES = gj.light_net("features")
VIDEO_NET = gj.SegmentNet(2, None, gj.heavy_net("features"), selection="all")
SETTINGS = {
  "hidden of text": (
    lambda: gj.GateSettings(hidden="16"),
    TypeError,
    "gate hidden must be a whole number >= 1; got '16'",
  ),
  "hidden of half a unit": (
    lambda: gj.GateSettings(hidden=1.5),
    TypeError,
    "gate hidden must be a whole number >= 1; got 1.5",
  ),
  "initial_open of text": (
    lambda: gj.GateSettings(initial_open="0.85"),
    TypeError,
    "gate initial_open must be a number in (0, 1); got '0.85'",
  ),
  "initial_open in percent": (
    lambda: gj.GateSettings(initial_open=85),
    ValueError,
    "gate initial_open must be in (0, 1); got 85",
  ),
  "temperature of none": (
    lambda: gj.GateSettings(temperature=None),
    TypeError,
    "gate temperature must be a number > 0; got None",
  ),
  "noise_scale without an end": (
    lambda: gj.GateSettings(noise_scale=float("inf")),
    ValueError,
    "gate noise_scale must be >= 0; got inf",
  ),
  "context of another gate": (
    lambda: gj.GateSettings(context=3),
    ValueError,
    f"gate context must be one of {CONTEXTS}; got 3",
  ),
  "concepts of text": (
    lambda: gj.SegmentGateSettings("8"),
    TypeError,
    "gate concepts must be a whole number >= 1; got '8'",
  ),
  "a dict for the settings of segment gates": (
    lambda: gj.SegmentGateSettings(gate={"hidden": 4}),
    TypeError,
    "gate must be GateSettings, such as GateSettings(hidden=16); got {'hidden': 4}",
  ),
}
LAYERS = {
  "one group": (
    lambda: init(gj.ChannelGate(GROUPS[0]), IMAGES),
    TypeError,
    "groups must be a tuple of GatedChannels, one per group of channels; got ",
  ),
  "a number for groups": (
    lambda: init(gj.ChannelGate(4), IMAGES),
    TypeError,
    "groups must be a tuple of GatedChannels, one per group of channels; got 4",
  ),
  "no groups": (
    lambda: init(gj.ChannelGate(()), IMAGES),
    TypeError,
    "groups must be a tuple of GatedChannels, one per group of channels; got ()",
  ),
  "numbers for groups": (
    lambda: init(gj.ChannelGate((4,)), IMAGES),
    TypeError,
    "groups[0] must be GatedChannels, such as GatedChannels(channels=32, macs_per_channel=0); "
    "got 4",
  ),
  "channels of text": (
    lambda: init(gj.ChannelGate((gj.GatedChannels("4", 1),)), IMAGES),
    TypeError,
    "groups[0].channels must be a whole number >= 1; got '4'",
  ),
  "no costs": (
    lambda: init(gj.ChannelGate((gj.GatedChannels(4, None),)), IMAGES),
    TypeError,
    "groups[0].macs_per_channel must be a number >= 0; got None",
  ),
  "a dict for settings": (
    lambda: init(gj.ChannelGate(GROUPS, {"hidden": 4}), IMAGES),
    TypeError,
    "settings must be GateSettings, such as GateSettings(hidden=16); got ",
  ),
  "the class for settings": (
    lambda: init(gj.ChannelGate(GROUPS, gj.GateSettings), IMAGES),
    TypeError,
    "settings must be GateSettings, such as GateSettings(hidden=16); got the class GateSettings",
  ),
  "settings of segments": (
    lambda: init(GateHead(4, gj.SegmentGateSettings()), IMAGES),
    TypeError,
    "settings must be GateSettings, such as GateSettings(hidden=16); got ",
  ),
  "units of text": (
    lambda: init(GateHead("4"), IMAGES),
    TypeError,
    "units must be a whole number >= 1; got '4'",
  ),
  "one row for images": (
    lambda: init(gj.ChannelGate(GROUPS), jnp.ones(3)),
    ValueError,
    "x must be [N, ..., D], in training with at least one example; got shape (3,)",
  ),
  "training without an example": (
    lambda: init(gj.ChannelGate(GROUPS), IMAGES[:0], train=True),
    ValueError,
    "x must be [N, ..., D], in training with at least one example; got shape (0, 4, 4, 3)",
  ),
  "settings of channels for segments": (
    lambda: init(gj.SegmentGate(gj.GateSettings()), VIDEOS, VALID),
    TypeError,
    "settings must be SegmentGateSettings, such as SegmentGateSettings(concepts=128); got ",
  ),
  "a mask of other videos": (
    lambda: init(gj.SegmentGate(), VIDEOS, VALID[:1]),
    ValueError,
    "x must be [B, T, C] and valid [B, T]; got x (2, 3, 4), valid (1, 3)",
  ),
}
NETWORKS = {
  "a depth for a name": (lambda: gj.resnet(20, 10), ValueError, "model name must be one of "),
  "classes of text": (
    lambda: gj.resnet("resnet20", "10"),
    TypeError,
    "classes must be a whole number >= 1; got '10'",
  ),
  "classes by name": (
    lambda: gj.vgg("vgg8", ("cat", "dog")),
    TypeError,
    "classes must be a whole number >= 1; got ('cat', 'dog')",
  ),
  "width of text": (
    lambda: gj.resnet("resnet20", 10, width="0.5"),
    TypeError,
    "width must be a number > 0; got '0.5'",
  ),
  "settings of segments for a ResNet": (
    lambda: gj.resnet("resnet20", 10, gate=gj.SegmentGateSettings()),
    TypeError,
    "gate must be GateSettings, such as GateSettings(hidden=16); got ",
  ),
  "blocks of one number": (
    lambda: init(gj.ResNet(2, 3), IMAGES),
    TypeError,
    "blocks must be a list of numbers of blocks per stage; ",
  ),
  "a record for images": (
    lambda: FOLDABLE.init(KEY, gj.Prior),
    TypeError,
    "x must be an array of real numbers; got the class Prior",
  ),
  "gates of a dict": (
    lambda: init(gj.vgg("vgg8", 2).clone(gate={"hidden": 4}), IMAGES),
    TypeError,
    "gate must be GateSettings, such as GateSettings(hidden=16); got ",
  ),
  "a heavy net's width of text": (
    lambda: gj.heavy_net("r2plus1d18", width="1"),
    TypeError,
    "width must be a number > 0; got '1'",
  ),
  "a name for the heavy net": (
    lambda: init(VIDEO_NET.clone(heavy="r2plus1d18"), {"valid": VALID}),
    TypeError,
    "heavy must be a network, such as heavy_net('r2plus1d18'); got 'r2plus1d18'",
  ),
  "videos without a mask": (
    lambda: init(VIDEO_NET, {"heavy": VIDEOS}),
    ValueError,
    "inputs must have 'valid'; got heavy",
  ),
  "an array for videos": (
    lambda: init(VIDEO_NET, VIDEOS),
    TypeError,
    "inputs must be a mapping with arrays heavy, valid and, ",
  ),
  "lists for a mask of videos": (
    lambda: VIDEO_NET.init(KEY, {"heavy": VIDEOS, "valid": [[True]]}),
    TypeError,
    "inputs['valid'] must be an [B, T] array of real numbers; got [[True]]",
  ),
  "lists for videos": (
    lambda: VIDEO_NET.init(KEY, {"heavy": [[0.5]], "valid": VALID}),
    TypeError,
    "inputs['heavy'] must be an array of real numbers; got [[0.5]]",
  ),
  "videos of other segments than the mask": (
    lambda: init(VIDEO_NET, {"heavy": VIDEOS[:, :2], "valid": VALID}),
    ValueError,
    "inputs['heavy'] must be [B, T, ...] like valid, (2, 3); got shape (2, 2, 4)",
  ),
  "lists for a block": (
    lambda: gj.BasicBlock(4).init(KEY, [[1.0]]),
    TypeError,
    "x must be an array of real numbers; got [[1.0]]",
  ),
  "half a stride": (
    lambda: init(gj.Bottleneck(4, stride=0.5), IMAGES),
    TypeError,
    "stride must be a whole number >= 1; got 0.5",
  ),
  "half a window": (
    lambda: init(ConvNorm(4, 1.5), IMAGES, False),
    TypeError,
    "window must be a whole number >= 1; got 1.5",
  ),
  "text for the experts that count": (
    lambda: mixture(VIDEOS[0], "1"),
    TypeError,
    "top_k must be a whole number >= 0; got '1'",
  ),
  "lists to pool": (
    lambda: pool([[1.0]], VALID, "mean"),
    TypeError,
    "features must be an [B, T, C] array of real numbers; got ",
  ),
  "gates of other segments to pool": (
    lambda: pool(VIDEOS, VALID[:, :2], "mean"),
    ValueError,
    "gates must be [B, T] for features [B, T, C]; got (2, 2), (2, 3, 4)",
  ),
  "all of a feature dropped": (
    lambda: init(Dropout(1.0), IMAGES),
    ValueError,
    "rate must be in [0, 1); got 1.0",
  ),
}
COUNTS = {
  "the class for a network": (
    lambda: gj.model_summary(gj.ResNet, (4, 4, 3)),
    TypeError,
    "model must be a network, such as resnet('resnet20', classes=10); got the class ResNet",
  ),
  "a number for a shape": (
    lambda: gj.model_summary(FOLDABLE, 32),
    TypeError,
    "input_shape must be a tuple of whole numbers, such as (32, 32, 3)",
  ),
  "images for a shape": (
    lambda: gj.model_summary(FOLDABLE, IMAGES),
    TypeError,
    "input_shape must be a tuple of whole numbers, such as (32, ",
  ),
  "a list for a shape": (
    lambda: gj.model_summary(FOLDABLE, [8, 8, 3]),
    TypeError,
    "input_shape must be a tuple of whole numbers, such as (32, 32, 3), or a tree of them; "
    "got [8, 8, 3]",
  ),
  "a number for a loss": (
    lambda: check_loss(3, shape=(5, 2)),
    TypeError,
    "loss must be a function of [N, C] values; got 3",
  ),
  "a number to differentiate": (
    lambda: gj.value_and_grad_over_devices(3, axis_name="batch"),
    TypeError,
    "loss must be a function; got 3",
  ),
  "no run directory": (lambda: gj.load_run(None), TypeError, "workdir must be a path; got None"),
  "a number for an export": (
    lambda: gj.load_exported(3),
    TypeError,
    "directory must be a path; got 3",
  ),
  "videos without segments": (
    lambda: init(VIDEO_NET, {"heavy": VIDEOS[:, :0], "valid": VALID[:, :0]}),
    ValueError,
    "inputs must have at least one segment of each video; got (2, 0) of valid",
  ),
  "MACs for a network without gates": (
    lambda: solve_share(FOLDABLE, (4, 4, 3), macs=100),
    ValueError,
    "model must have gates; got one without",
  ),
  "a batch for an image": (
    lambda: gj.model_summary(gj.vgg("vgg8", 3), (5, 8, 8, 3)),
    ValueError,
    "input_shape must be that of one example which the model takes, without the axis of the batch; "
    "got (5, 8, 8, 3): images must be [N, H, W, D]; got shape (1, 5, 8, 8, 3)",
  ),
  "an image without channels": (
    lambda: gj.model_summary(FOLDABLE, (8, 8)),
    ValueError,
    "input_shape must be that of one example which the model takes, without the axis of the batch; "
    "got (8, 8): ",
  ),
  "no shape": (
    lambda: gj.model_summary(FOLDABLE, None),
    TypeError,
    "input_shape must be a tuple of whole numbers, such as (32, ",
  ),
  "settings for a context": (
    lambda: gj.GateSettings(context=np.ones((9, 9))),
    ValueError,
    f"gate context must be one of {CONTEXTS}; got float64[9,9]",
  ),
  "a network without records": (
    lambda: gj.model_summary(OnlyOutputs(), (3,)),
    TypeError,
    "model must return (y, records), as gated networks do; got ",
  ),
  "shapes without a mask": (
    lambda: gj.video_summary(VIDEO_NET, {"heavy": (3, 4)}),
    TypeError,
    "shapes['valid'] must be a tuple of whole numbers; got None",
  ),
  "gates of other videos": (
    lambda: gj.VideoCounts(3, None, None, 1, 1).per_video(
      np.ones((2, 4)), np.ones((2, 3)), np.ones((2, 3))
    ),
    ValueError,
    "gates and valid must be [M, 3]; got (2, 4) and (2, 3)",
  ),
  "an array for a name": (
    lambda: gj.vgg(np.ones(2), 3),
    ValueError,
    "model name must be one of simple_cnn, vgg16, vgg8; got array(",
  ),
  "a network of images for videos": (
    lambda: gj.video_summary(FOLDABLE, {}),
    TypeError,
    "model must be a SegmentNet; got an object of class ",
  ),
}
INFERENCE = {
  "the class for a network to fold": (
    lambda: gj.fold(gj.ResNet, {}),
    ValueError,
    "model must be ResNet or VGG; got the class ResNet",
  ),
  "an array for variables": (
    lambda: gj.fold(FOLDABLE, IMAGES),
    TypeError,
    "variables must be a mapping with params and batch_stats; got ",
  ),
  "a network that is not folded, to quantise": (
    lambda: gj.quantise(FOLDABLE),
    TypeError,
    "net must be a folded network, as returned by fold(model, variables); got an object of class "
    "ResNet",
  ),
  "variables of another network": (
    lambda: gj.analyse(gj.ResNet(2, (1,), features=4), {}, 8),
    ValueError,
    "variables must be those of the model",
  ),
  "a network for an analysis": (
    lambda: gj.prune(FOLDABLE),
    TypeError,
    "analysis must be an Analysis, as returned by analyse(model, variables, ",
  ),
  "a network that is not folded, for static units": (
    lambda: gj.find_static_units(FOLDABLE, ()),
    TypeError,
    "net must be a folded network, as returned by fold(",
  ),
  "a network that is not folded, for the error of pruning": (
    lambda: gj.pruning_error(FOLDABLE, (), IMAGES),
    TypeError,
    "net must be a folded network, as returned by fold(model, ",
  ),
  "a network that is not folded, to export": (
    lambda: gj.export_model(FOLDABLE, "somewhere", input_shape=(4, 4, 3)),
    TypeError,
    "model must be folded first, by fold(model, variables); got an object of class ResNet",
  ),
  "no function to export": (
    lambda: gj.export_model(3, "somewhere", input_shape=(4, 4, 3)),
    TypeError,
    "model must be a folded or compiled network, or a function of images; got 3",
  ),
  "no path to export to": (
    lambda: gj.export_model(len, 3, input_shape=(4, 4, 3)),
    TypeError,
    "directory must be a path; got 3",
  ),
  "text for a card": (
    lambda: gj.export_model(len, "somewhere", input_shape=(4, 4, 3), card="net"),
    TypeError,
    "card must be a mapping of names to JSON values; got 'net'",
  ),
  "one platform": (
    lambda: gj.export_model(len, "somewhere", input_shape=(4, 4, 3), platforms="cpu"),
    TypeError,
    "platforms must be a list of names among cpu, cuda, tpu, rocm; got 'cpu'",
  ),
  "a network of images to skip segments": (
    lambda: gj.compile_segments(FOLDABLE, {}, capacities=(1,)),
    TypeError,
    "model must be a SegmentNet; got ",
  ),
  "one capacity": (
    lambda: gj.compile_segments(VIDEO_NET, {}, capacities=8),
    TypeError,
    "capacities must be a list of numbers >= 1; ",
  ),
  "videos without a mask, to skip segments": (
    lambda: gj.compile_segments(VIDEO_NET, {}, capacities=(1,))({"heavy": VIDEOS}),
    ValueError,
    "inputs must have 'valid'; got heavy",
  ),
  "text for features": (
    lambda: gj.find_concepts(["a", "b"], k=1, seed=0),
    TypeError,
    "features must be an array of real numbers; got ",
  ),
  "a half for the seed of concepts": (
    lambda: gj.find_concepts(np.eye(3), k=2, seed=0.5),
    TypeError,
    "seed must be a whole number >= 0; got 0.5",
  ),
  "text for the number of concepts": (
    lambda: gj.find_concepts(np.eye(3), k="2", seed=0),
    TypeError,
    "k must be a whole number >= 0; got '2'",
  ),
}
ALL = {**SETTINGS, **LAYERS, **NETWORKS, **COUNTS, **INFERENCE}


@pytest.mark.parametrize(("call", "error", "message"), ALL.values(), ids=ALL)
def test_a_mistake_is_named_in_one_line(call, error, message):
  with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
    call()
  assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
  "value",
  [
    gj.GateSettings(hidden=4),
    gj.SegmentGateSettings(concepts=4),
    GROUPS[0],
    gj.ModelCounts(1, 2, 3, 4, 5, 6),
  ],
  ids=lambda value: type(value).__name__,
)
def test_settings_and_counts_can_be_copied_and_pickled(value):
  assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(copy.copy(value))


def test_a_record_can_be_copied_and_pickled():
  record = gj.GateRecord(
    jnp.zeros((2, 3)), jnp.ones((2, 3)), np.ones((2, 3)), 4, 5, (("a", "b"),), (), ("gate",)
  )
  copied = pickle.loads(pickle.dumps(copy.deepcopy(copy.copy(record))))
  leaves, structure = jax.tree.flatten(copied)
  assert structure == jax.tree.structure(record)
  for leaf, right in zip(leaves, jax.tree.leaves(record), strict=True):
    np.testing.assert_array_equal(leaf, right)


def test_networks_and_gates_can_be_copied_and_pickled():
  for module in (
    gj.resnet("resnet20", 10, gating="channel"),
    gj.ChannelGate(GROUPS),
    gj.SegmentGate(),
    VIDEO_NET,
  ):
    assert pickle.loads(pickle.dumps(copy.deepcopy(module))) == module


def test_evaluation_of_no_image_has_no_output():
  variables = init(FOLDABLE, IMAGES)
  logits, records = jax.eval_shape(FOLDABLE.apply, variables, IMAGES[:0])
  assert logits.shape == (0, 2)
  assert records == ()
  gate = gj.ChannelGate(GROUPS)
  (record,) = jax.eval_shape(gate.apply, init(gate, IMAGES), IMAGES[:0])
  assert record.gates.shape == (0, 4)


def test_evaluation_of_no_video_has_no_output():
  for selection in ("all", "gate", "confidence"):
    net = gj.SegmentNet(2, FEATURES, gj.heavy_net("features"), selection=selection)
    inputs = {"light": VIDEOS, "heavy": VIDEOS, "valid": VALID}
    none = {name: array[:0] for name, array in inputs.items()}
    outputs, (record,) = jax.eval_shape(net.apply, init(net, inputs), none)
    assert outputs["logits"].shape == (0, 2)
    assert record.gates.shape == (0, 3)
