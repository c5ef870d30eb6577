"""ONNX models of folded networks, run by onnxruntime."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import folded
from gating_jax.inference.analysing import analyse, prune
from gating_jax.inference.folded import Conv, FoldedNet, Group, Head, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.grafting import GraftedNet
from gating_jax.inference.onnx_export import load_onnx, to_onnx
from gating_jax.inference.quantising import quantise
from gating_jax.layers.blocks import Bottleneck
from gating_jax.models.resnets import ResNet
from gating_jax.models.vggs import POOL, VGG
from tests.helpers.gated_models import MODELS, RECIPE, SHAPE, images, random_variables

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
run = jax.jit(folded.run_net)
# The recipe with a prior: each gate of a block's two groups has a shift of its own.
PRIOR = dataclasses.replace(RECIPE, prior=True)
KINDS = {
  **MODELS,
  "prior": ResNet(3, (1,), Bottleneck, features=4, gating="channel", gate=PRIOR),
  "dense vgg": VGG(3, (4, POOL, 6), hidden=(7,), pooled=2),
}
# Parts, gates and contexts of each kind; most are slow.
FEW = ("bottleneck", "prior", "weighted outputs", "dense vgg")
MORE = (
  *("basic", "blocks", "dilated", "feature map", "vgg", "thresholds", "weighted vgg"),
  *("scaled outputs", "static weights"),
)
EACH = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def net_of_one_gate(context):
  """Returns a net of one layer, whose gate reads a context."""
  head = Head(
    jnp.zeros((3, 1)), jnp.zeros(1), jnp.zeros((1, 1)), jnp.zeros(1), (Group(1),), (context,)
  )
  return FoldedNet((Layer(Conv(jnp.zeros((1, 1, 3, 1)), jnp.zeros(1)), head),), pooled=False)


def assert_alike(program, net, x):
  """Outputs and logits of a program of ONNX are those of a network, to 1e-4."""
  outputs, logits = program(x)
  expected, expected_logits = run(net, x)
  assert len(logits) == len(expected_logits)
  for found, wanted in zip((outputs, *logits), (expected, *expected_logits), strict=True):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_it_computes_what_the_network_does(name):
  net = fold(KINDS[name], random_variables(KINDS[name]))
  program = load_onnx(to_onnx(net, SHAPE))
  assert_alike(program, net, images(5))
  # Some gates are open and some are closed.
  gates = np.concatenate([z.ravel() > 0 for z in program(images(5))[1]] or [np.array([0, 1])])
  assert 0 < gates.mean() < 1 or "static" in name


def test_it_takes_any_number_of_images_and_what_is_pruned():
  model = MODELS["wide inside"]
  net = prune(analyse(model, random_variables(model), images(8)), multiple=1)
  # Some channels lost their gate.
  assert any(group.always for part in net.parts for group in part.groups)
  program = load_onnx(to_onnx(net, SHAPE))
  for count in (1, 3):
    assert_alike(program, net, images(count))


def test_the_gates_of_an_image_that_is_not_finite_are_nan():
  net = fold(MODELS["layer"], random_variables(MODELS["layer"]))
  program = load_onnx(to_onnx(net, SHAPE))
  assert_alike(program, net, images(2))
  bad = np.array(images(2))
  bad[0, 0, 0, 0] = np.nan
  logits = program(bad)[1]
  assert np.isnan(logits[0][0]).all()
  assert np.isfinite(logits[0][1]).all()


def test_padding_on_one_side_is_that_of_the_network():
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 2)), jnp.float32)
  # Nine rows have a border above and below, eight columns one on the right alone.
  conv = Conv(kernel, jnp.ones(2), stride=2, same=True)
  net = FoldedNet((Layer(conv),), pooled=False)
  assert_alike(load_onnx(to_onnx(net, SHAPE)), net, images(2))


def test_what_cannot_be_an_onnx_model_is_named():
  with pytest.raises(
    ValueError, match="net must be of a ResNet or a VGG; the other layers of a Ga"
  ):
    to_onnx(GraftedNet(()), SHAPE)
  part = net_of_one_gate("told")
  with pytest.raises(ValueError, match="net must have contexts that ONNX models .*; got 'told'"):
    to_onnx(part, SHAPE)
  model = MODELS["ungated"]
  net = fold(model, random_variables(model))
  with pytest.raises(TypeError, match="net must be a folded network"):
    to_onnx(model, SHAPE)
  with pytest.raises(ValueError, match="images must have 3 channels"):
    to_onnx(net, (8, 8, 1))
  with pytest.raises(ValueError, match="net must have float32 kernels"):
    to_onnx(quantise(net), SHAPE)


def test_what_an_onnx_model_cannot_take_is_named():
  model = MODELS["ungated"]
  data = to_onnx(fold(model, random_variables(model)), SHAPE)
  program = load_onnx(data)
  with pytest.raises(ValueError, match="images must be network inputs in floating point"):
    program(np.zeros((1, *SHAPE), np.uint8))
  with pytest.raises(ValueError, match=r"images must be \[N, 9, 8, 3\]; got shape \(9, 8, 3\)"):
    program(np.zeros(SHAPE, np.float32))
  with pytest.raises(TypeError, match="data must be the bytes of a model, as of to_onnx"):
    load_onnx("model.onnx")
  with pytest.raises(ValueError, match=r"data must be .*; onnxruntime cannot read it: "):
    load_onnx(data[: len(data) // 2])
  other = onnx.load_from_string(data)
  other.graph.input[0].name = other.graph.node[0].input[0] = "pixels"
  with pytest.raises(ValueError, match="data must be the bytes of a model, .*; it takes pixels"):
    load_onnx(other.SerializeToString())
