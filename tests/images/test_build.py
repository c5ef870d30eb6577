import jax
import jax.numpy as jnp
import pytest

from configs import common, imagenet_resnet18
from gating_jax.images.build import build, network
from gating_jax.models.summary import model_summary
from gating_jax.training import devices
from gating_jax.training.outlines import Outline

# By name: image shape, and MACs of the first convolution and of a classifier of 10 classes, which
# grow with the width and not its square.
SHAPES = {
  "resnet20": ((32, 32, 3), 32**2 * 27 * 16, 640),
  "resnet18": ((64, 64, 3), 32**2 * 147 * 64, 5_120),
  "resnet34": ((64, 64, 3), 32**2 * 147 * 64, 5_120),
  "resnet50": ((64, 64, 3), 32**2 * 147 * 64, 20_480),
  "vgg8": ((32, 32, 3), 32**2 * 27 * 64, 5_120),
  "vgg16": ((32, 32, 3), 32**2 * 27 * 64, 5_120),
}


def model(**fields):
  config = common.image_config().model
  config.update_from_flattened_dict(fields)
  return network(config, 10)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", SHAPES)
def test_backbones_of_every_width_have_the_macs_and_gates_that_follow_from_width_one(name):
  shape, first, classifier = SHAPES[name]
  one = model_summary(model(name=name), shape)
  for width in (0.25, 20.0):
    wide = model_summary(model(name=name, width=width), shape)
    expected = width * (first + classifier) + width**2 * (one.macs - first - classifier)
    assert (wide.macs, wide.gates) == (expected, width * one.gates)


# The channels that each layer's gates switch, in the order of the network.
GATED_CHANNELS = {
  "resnet18": [64] * 2 + [128] * 2 + [256] * 2 + [512] * 2,
  "resnet50": [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6,  # two layers a block
  "vgg16": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6,
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", list(GATED_CHANNELS))
@pytest.mark.parametrize("block", [1, 8, 16, 64, 128])
def test_blocks_of_channels_share_a_gate(name, block):
  net = model(name=name, **{"gate.block": block})
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  (_, records), _ = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  shape = lambda channels: (2, -(-channels // block))
  assert [(r.logits.shape, r.gates.shape) for r in records] == [
    (shape(c), shape(c)) for c in GATED_CHANNELS[name]
  ]


def imagenet_counts(variants):
  return model_summary(network(imagenet_resnet18.get_config(variants).model, 1000), (224, 224, 3))


@pytest.mark.parametrize(
  ("variants", "macs", "params", "gates", "gate_macs", "gate_params"),
  [
    ("", 1_814_073_344, 11_689_512, 1_920, 54_272, 56_448),
    ("model=resnet34", 3_663_761_408, 21_797_672, 3_776, 113_664, 117_952),
    ("model=resnet50,budget=0.45", 4_089_184_256, 25_557_032, 7_552, 330_752, 338_816),
    ("model=resnet50,gates=none", 4_089_184_256, 25_557_032, 0, 0, 0),
  ],
)
def test_the_config_of_imagenet_builds_networks_of_known_size(
  variants, macs, params, gates, gate_macs, gate_params
):
  c = imagenet_counts(variants)
  assert (c.macs, c.params, c.gates, c.gate_macs, c.gate_params) == (
    macs,
    params,
    gates,
    gate_macs,
    gate_params,
  )


def test_twice_as_wide_on_imagenet_is_four_times_the_convolutions_between():
  stem, classifier, norms = 147 * 64, 512 * 1000, 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
  wide = imagenet_counts("width=2")
  linear = 112**2 * stem + classifier
  assert wide.macs == 2 * linear + 4 * (1_814_073_344 - linear)
  linear = stem + classifier + norms
  assert wide.params == 2 * linear + 4 * (11_689_512 - linear - 1000) + 1000
  assert wide.gates == 2 * 1_920


def test_a_chain_is_built_by_the_same_settings_as_a_residual_network():
  net = model(name="simple_cnn", width=0.04, **{"gate.hidden": 3, "dtype": "bfloat16"})
  assert (net.gating, net.gate.hidden, net.dtype, net.axis_name) == (
    "channel",
    3,
    jnp.bfloat16,
    devices.AXIS,
  )
  x = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
  (logits, records), _ = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
  assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
  assert [r.gates.shape for r in records] == [(4, 4)] * 3


@pytest.mark.thin(2)
@pytest.mark.parametrize(
  ("variants", "gates", "params"),
  [
    ("gates=none", 0, 0),
    ("gates=channel", 336, 10_608),
    ("gates=channel,block=16", 21, 5_253),
    ("gates=static", 336, 336),
    ("gates=static,model=vgg8", 1_728, 1_728),
    ("gates=random", 336, 0),
    ("share=0.5", 336, 10_608),
    ("gates=scale", 0, 10_608),
    ("gates=layer", 7, 16 * (3 * 16 + 2 * 32 + 2 * 64) + 7 * 49),
    ("gates=experts", 4, 16 * 32 + 32 + 4 * 17),
    ("gates=exits", 2, 0),
    ("gates=exits,model=resnet18", 3, 0),
    ("gates=layer,model=resnet50", 12, 16 * (2 * 256 + 3 * 512 + 5 * 1024 + 2 * 2048) + 12 * 49),
  ],
)
def test_what_is_gated_is_one_variant(variants, gates, params):
  config = common.apply_variants(common.image_config(), variants)
  counts = model_summary(network(config.model, 10), (32, 32, 3))
  assert (counts.gates, counts.gate_params) == (gates, params)


def test_what_a_backbone_does_not_have_is_refused():
  with pytest.raises(
    ValueError, match="^model.shortcut must be None for vgg8, which has no shortcuts; got 'A'"
  ):
    model(name="vgg8", shortcut="A")
  assert model(name="resnet20", shortcut="B").shortcut == "B"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"model.gate.relaxation": "scale"},
      "model.gate.relaxation must be that of gates, for a network with scales set model.gating",
    ),
    (
      {"model.dense_first.form": "cosine"},
      "model.dense_first.form must be None where no gates have quantiles for thresholds; got 'cos",
    ),
    (
      {"model.dense_first.form": "sine", "model.gate.threshold": "quantile"},
      "model.dense_first: form must be one of cosine, held, linear; got 'sine'",
    ),
    ({"model.sources": -1}, "model.sources must be None or >= 0; got -1"),
    ({"model.sources": 2}, "data.mean must hold a number for each channel, and 0 for the last"),
    ({"model.sources": 2, "model.name": "vgg8"}, "model.sources must be None where model.name is"),
    (
      {"model.gating": "bias", "loss.regulariser": "none"},
      "model.sources must be > 0 where model.gating is 'bias'; got None",
    ),
    ({"model.stem": "small", "model.name": "vgg8"}, "model.stem must be None for vgg8, which has"),
    ({"model.gate.share": 0.5}, "gate share must be 1 unless threshold is quantile or context is"),
  ],
)
def test_a_setting_of_openings_that_would_be_ignored_is_refused(fields, message):
  config = common.image_config()
  config.update_from_flattened_dict(fields)
  data = Outline(examples=256, class_names=tuple("abcdefghij"), shape=(8, 8, 1))
  with pytest.raises(ValueError, match=f"^{message}"):
    build(config, outlines=[data, data])


def test_the_share_of_gates_falls_in_the_part_of_training_that_the_config_says():
  data = Outline(examples=256, class_names=tuple("abcdefghij"), shape=(8, 8, 1))

  def shares(variant, **fields):
    """Returns the share at every second of eight steps; None without a schedule."""
    config = common.apply_variants(common.image_config(), variant)
    config.update_from_flattened_dict({"optim.epochs": 4, "optim.batch_size": 128, **fields})
    schedule = build(config, outlines=[data, data]).share
    return schedule and [float(schedule(step)) for step in range(0, 9, 2)]

  linear = {"form": "linear", "start": 0.25, "end": 0.75}
  fields = {f"model.dense_first.{name}": value for name, value in linear.items()}
  assert shares("share=0.25", **fields) == pytest.approx([1, 1, 0.625, 0.25, 0.25])
  # By a cosine over the first half.
  assert shares("share=0.25") == pytest.approx([1, 0.625, 0.25, 0.25, 0.25])
  assert shares("share=0.25", **{"model.dense_first.form": None}) is None
  assert shares("") is None


def with_budget(target):
  """Builds resnet20 for 32 x 32 images with this budget, and returns its objective."""
  config = common.apply_variants(common.image_config(), f"budget={target}")
  data = Outline(examples=256, class_names=tuple("abcdefghij"), shape=(32, 32, 3))
  return build(config, outlines=[data, data]).objective


def test_a_budget_is_checked_by_the_macs_that_the_loss_measures():
  counts = model_summary(model(name="resnet20"), (32, 32, 3))
  least, with_gate_nets = counts.never_gated_macs / counts.macs, counts.always_macs / counts.macs
  between = (least + with_gate_nets) / 2
  assert least < between < with_gate_nets
  objective = with_budget(between)
  assert (objective.target, objective.never_gated_macs) == (between, counts.never_gated_macs)
  with pytest.raises(ValueError, match=f"must be above {least:.3f}, the fraction of the ungated"):
    with_budget(least)
