import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gating_jax.models.resnets import RESNETS, resnet
from gating_jax.models.summary import ModelCounts, layer_names, model_summary, reduced_macs
from gating_jax.models.vggs import VGGS, vgg
from gating_jax.types import GateRecord

# Dense MACs, parameters, gates, gate MACs and gate parameters of the project's specification; it
# omits resnet8, whose three blocks are added up by hand below.
TABLE = {
  "resnet20": (40_551_040, 269_722, 336, 9_984, 10_608),
  "resnet8": (12_239_488, 75_290, 112, 2_816, 3_024),
  "resnet32": (68_862_592, 464_154, 560, 17_152, 18_192),
  "resnet56": (125_485_696, 853_018, 1_008, 31_488, 33_360),
  "resnet18": (1_814_073_344, 11_689_512, 1_920, 54_272, 56_448),
  "resnet34": (3_663_761_408, 21_797_672, 3_776, 113_664, 117_952),
  "resnet50": (4_089_184_256, 25_557_032, 7_552, 330_752, 338_816),
}
CIFAR = {"classes": 10, "input_shape": (32, 32, 3)}
IMAGENET = {"classes": 1000, "input_shape": (224, 224, 3)}
SETTINGS = {
  "resnet8": CIFAR,
  "resnet20": CIFAR,
  "resnet32": CIFAR,
  "resnet56": CIFAR,
  "resnet18": IMAGENET,
  "resnet34": IMAGENET,
  "resnet50": IMAGENET,
}


def counts_of(name, gating, *, classes, input_shape, **settings):
  return model_summary(resnet(name, classes, gating=gating, **settings), input_shape)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_known_sizes(name):
  c = counts_of(name, "channel", **SETTINGS[name])
  assert (c.macs, c.params, c.gates, c.gate_macs, c.gate_params) == TABLE[name]


def test_the_gates_of_resnet8_by_hand():
  # Channels that each of the three gate networks reads and switches.
  layers = (
    (16, 16),
    (16, 32),
    (32, 64),
  )
  macs = sum(16 * (read + switched) for read, switched in layers)
  switched = 16 + 32 + 64
  norms = 3 * 2 * 16
  assert TABLE["resnet8"][2:] == (switched, macs, macs + norms + switched)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("depth", "params"),
  [
    (8, 75_290),
    (14, 172_506),
    (20, 269_722),
    (32, 464_154),
    (44, 658_586),
    (56, 853_018),
    (110, 1_727_962),
  ],
)
def test_every_depth_for_small_images_has_the_size_that_follows_from_its_blocks(depth, params):
  """Checks sizes against the blocks.

  Each of a stage's n blocks would be two 3x3 convolutions between the stage's channels; the first
  block of the second and third stage reads half of them. All stages have the same number of
  multiplications: twice the channels come with a quarter of the pixels.
  """
  n, channels = (depth - 2) // 6, (16, 32, 64)
  stem, halves = 27 * 16, 9 * (32 * 16 + 64 * 32)
  norms = 2 * (16 + 2 * n * sum(channels))
  expected = stem + 18 * n * sum(c * c for c in channels) - halves + norms + 64 * 10 + 10
  c = counts_of(f"resnet{depth}", "none", **CIFAR)
  assert c.params == expected == params
  assert c.macs == 32**2 * stem + (3 * 2 * n - 1) * 32**2 * 9 * 16 * 16 + 64 * 10


@pytest.mark.parametrize(
  ("name", "params", "macs"),
  [
    (
      "simple_cnn",
      9 * (3 * 100 + 2 * 100 * 100) + 2 * 300 + 1010,
      9 * (32**2 * 3 * 100 + (16**2 + 8**2) * 100 * 100) + 1000,
    ),
    (
      "vgg8",
      9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512) + 2 * 1_728 + 5_130,
      9
      * (
        32**2 * 3 * 64
        + 16**2 * 64 * 128
        + 8**2 * (128 * 256 + 256 * 256)
        + 4**2 * (256 * 512 + 512 * 512)
      )
      + 5_120,
    ),
  ],
)
def test_chains_have_the_size_that_follows_from_their_layers(name, params, macs):
  c = model_summary(vgg(name, 10), (32, 32, 3))
  assert (c.params, c.macs) == (params, macs)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_without_gates_the_network_proper_is_the_same(name):
  macs, params, *_ = TABLE[name]
  plain = counts_of(name, "none", **SETTINGS[name])
  assert plain == ModelCounts(
    params=params, gate_params=0, gates=0, macs=macs, gate_macs=0, gated=0
  )
  assert plain.always_macs == macs


@pytest.mark.parametrize("size", [(32, 32, 3), (31, 29, 3), (28, 28, 1), (5, 4, 1)])
def test_all_but_stem_and_classifier_is_gated_where_shortcuts_are_free(size):
  c = model_summary(resnet("resnet20", 10, gating="channel"), size)
  h, w, depth = size
  stem, classifier = 9 * depth * 16 * h * w, 640
  assert c.gated == c.macs - stem - classifier > 0
  assert c.always_macs == stem + classifier + c.gate_macs


def test_gated_layers_are_named_in_the_order_of_the_network():
  layers = lambda name, gating: (
    model_summary(resnet(name, 10, gating=gating, blocks=(1, 2)), (8, 8, 3)).gate_layers
  )
  assert layers("resnet20", "channel") == (
    ("stage1_block1/conv1", 16),
    ("stage2_block1/conv1", 32),
    ("stage2_block2/conv1", 32),
  )
  assert layers("resnet20", "layer") == (("stage1_block1", 1), ("stage2_block2", 1))
  assert layers("resnet50", "channel")[:3] == (
    ("stage1_block1/conv1", 64),
    ("stage1_block1/conv2", 64),
    ("stage2_block1/conv1", 128),
  )


def test_projections_are_never_gated():
  c = model_summary(resnet("resnet50", 10, gating="channel", blocks=(1, 1)), (63, 65, 3))
  stem = 147 * 64 * 32 * 33
  projections = 16 * 17 * 64 * 256 + 8 * 9 * 256 * 512
  assert c.gated == c.macs - stem - projections - 5120


def test_gate_macs_by_hand():
  c = model_summary(resnet("resnet20", 10, gating="channel", blocks=(1, 1)), (8, 8, 3))
  assert c.gate_macs == (16 * 16 + 16 * 16) + (16 * 16 + 16 * 32)
  assert c.gate_params == c.gate_macs + 2 * 32 + 16 + 32
  assert c.gates == 16 + 32


def test_convolutions_and_dense_layers_are_counted_at_each_call():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      conv = nn.Conv(4, (3, 3), padding="VALID")
      y = nn.Conv(4, (1, 1), feature_group_count=2)(conv(x))
      return nn.Dense(5)(np.zeros((1, 3)) + y.mean()) + conv(x).mean(), ()

  c = model_summary(Net(), (6, 5, 2))
  assert c.macs == 2 * 9 * 2 * 4 * 12 + 2 * 4 * 12 + 15
  assert c.params == (72 + 4) + (8 + 4) + (15 + 5)
  assert reduced_macs(Net(), (6, 5, 2)) == 2 * 9 * 4 * 12 + 4 * 12


DEEP = ("resnet34", "resnet56", "resnet110", "resnet101")
# resnet152 has more of the blocks of resnet101, and takes longer.
BACKBONES = [
  pytest.param(name, marks=[pytest.mark.slow] if name in DEEP else [])
  for name in (*RESNETS, *VGGS)
  if name != "resnet152"
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", BACKBONES)
def test_xla_counts_the_multiplications_of_every_backbone_within_two_percent(name, monkeypatch):
  """Pads before XLA counts, since XLA omits products with padding, 20 % of vgg8's.

  XLA also counts operations on single elements, such as BatchNorm's. Nothing is compiled.
  """
  convolve = lax.conv_general_dilated

  def padded(x, kernel, strides, padding, **settings):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return convolve(x, kernel, strides, [(0, 0)] * len(padding), **settings)

  net = resnet(name, 10) if name in RESNETS else vgg(name, 10)
  shape = (64, 64, 3) if name in ("resnet18", "resnet34", "resnet50", "resnet101") else (32, 32, 3)
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  monkeypatch.setattr(lax, "conv_general_dilated", padded)
  analysis = jax.jit(lambda v, x: net.apply(v, x)[0]).lower(variables, x).cost_analysis()
  assert 1 < analysis["flops"] / 2 / model_summary(net, shape).macs < 1.02


def test_layers_are_named_by_the_module_that_is_gated_and_else_by_their_place():
  gate = jnp.zeros((2, 3))
  of = lambda **paths: GateRecord(gate, gate, gate, **paths)
  records = [
    of(writers=(("block1", "conv1", "conv"),)),
    of(gate=("block2", "gate")),
    of(gate=("gate",)),
    of(),
    of(gate=("block2", "gate")),
  ]
  assert layer_names(records) == ("block1/conv1", "block2", "gate", "layer03", "layer04")
