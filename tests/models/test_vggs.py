import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import resnet
from gating_jax.models.summary import model_summary, reduced_macs
from gating_jax.models.vggs import POOL, VGG, vgg
from gating_jax.ops.macs import executed_macs


def test_simple_cnn_has_the_macs_of_the_paper():
  """Abati et al., table 2, count inputs as one channel: 9 * 100 * (28^2 + 14^2 + 7^2) = 926,100."""
  counts = model_summary(vgg("simple_cnn", None, gating="channel"), (28, 28, 1))
  assert counts.macs == counts.gated == 22_755_600
  for gating in ("channel", "none"):
    assert reduced_macs(vgg("simple_cnn", 2, gating=gating), (28, 28, 1)) == 926_100
  assert reduced_macs(vgg("simple_cnn", 2), (28, 28, 3)) == 926_100


def test_resnet18_for_small_images_has_the_macs_of_the_paper():
  counts = model_summary(resnet("resnet18", None, stem="cifar", gating="all_channels"), (32, 32, 3))
  assert counts.macs == 555_417_600
  assert counts.gated == counts.macs - 9 * 3 * 64 * 32**2  # all but the stem


def records_of(model, shape):
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x)[1]


def test_vgg16_has_the_parameters_that_others_count():
  """With the 4,224 biases that BatchNorm makes needless there are 14,728,266 parameters."""
  assert model_summary(vgg("vgg16", 10), (32, 32, 3)).params == 14_728_266 - 4_224


def test_gates_are_of_the_output_channels_of_every_layer():
  model = VGG(None, (3, POOL, 5, 4), gating="channel", gate=GateSettings(hidden=4))
  records = records_of(model, (8, 8, 2))
  assert [r.gates.shape for r in records] == [(1, 3), (1, 5), (1, 4)]
  assert [(r.macs_per_unit, r.macs_per_pair) for r in records] == [
    (9 * 64 * 2, 0),
    (0, 9 * 16),
    (0, 9 * 16),
  ]
  assert [r.writers for r in records] == [((f"layer{i}", "conv", "conv"),) for i in (1, 2, 3)]
  assert [r.gate for r in records] == [(f"layer{i}", "gate") for i in (1, 2, 3)]


@pytest.mark.parametrize("norm", [True, False])
def test_closed_channels_are_zero_and_open_ones_as_without_gates(norm):
  gated, ungated = (
    VGG(None, (4, POOL, 4), norm=norm, gating=gating, gate=GateSettings(hidden=2))
    for gating in ("channel", "none")
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 1)), jnp.float32)
  variables = gated.init(jax.random.key(0), x)
  params = jax.tree.map(lambda a: a, variables["params"])
  for layer, logits in (("layer1", [9.0] * 4), ("layer2", [9.0, -9.0, 9.0, 9.0])):
    head = params[layer]["gate"]["head"]["logits"]
    head["kernel"], head["bias"] = head["kernel"] * 0, jnp.array(logits)
  y, records = gated.apply({**variables, "params": params}, x)
  without = lambda tree: {
    name: {k: v for k, v in layer.items() if k != "gate"} for name, layer in tree.items()
  }
  plain = {kind: without(tree) for kind, tree in {**variables, "params": params}.items()}
  if not norm:
    plain.pop("batch_stats", None)
  expected = np.array(ungated.apply(plain, x)[0])
  assert (expected[:, 1] != 0).any()
  expected[:, 1] = 0
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  assert float(executed_macs(records)[0]) == 9 * 36 * 4 + 9 * 9 * 4 * 3


def test_images_too_small_for_the_pools_are_refused():
  with pytest.raises(ValueError, match="nothing is left after layer6, which has 1 x 1"):
    records_of(vgg("vgg8", None), (8, 8, 1))


def test_what_is_no_image_or_no_name_is_refused():
  with pytest.raises(ValueError, match=r"images must be \[N, H, W, D\]; got shape \(2, 3\)"):
    vgg("vgg8", 10).init(jax.random.key(0), jnp.zeros((2, 3)))
  with pytest.raises(
    ValueError, match="model name must be one of .*; got 'vgg9'. Did you mean 'vgg"
  ):
    vgg("vgg9", 10)
  with pytest.raises(ValueError, match="gating must be one of .*; got 'layer'"):
    VGG(None, (4,), gating="layer").init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
