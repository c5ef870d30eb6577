import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import folded
from gating_jax.inference.folding import fold
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import VGG
from gating_jax.ops.macs import executed_macs
from tests.helpers.gated_models import MODELS, SHAPE, STATIC, images, random_variables

models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.mark.thin(2)
@models
def test_the_same_outputs_gates_and_macs(model):
  variables, x = random_variables(model), images()
  y, records = jax.jit(model.apply)(variables, x)
  net = fold(model, variables)
  z, logits = jax.jit(folded.run)(net, x)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  if model.gate.context == "none" and model.gating != "none":
    assert logits == ()
    return
  gates = [r.gates for r in records]
  for of_record, of_net in zip(records, logits, strict=True):
    np.testing.assert_allclose(of_net, of_record.logits, rtol=1e-3, atol=1e-3)
  assert not gates or 0 < np.mean(np.concatenate(gates, axis=1)) < 1
  counts = model_summary(model, SHAPE)
  assert folded.macs(net, SHAPE) == counts.macs + counts.gate_macs
  if records:
    np.testing.assert_array_equal(
      folded.macs(net, SHAPE, gates), counts.always_macs + executed_macs(records)
    )


@pytest.mark.parametrize("name", ["static", "static layers"])
def test_what_static_gates_close_is_gone(name):
  model = MODELS[name]
  variables = random_variables(model)
  _, records = jax.jit(model.apply)(variables, images(1))
  closed = sum(int(np.sum(np.asarray(r.gates) == 0)) for r in records)
  assert closed > 0
  net, counts = fold(model, variables), model_summary(model, SHAPE)
  assert folded.macs(net, SHAPE) == counts.always_macs + executed_macs(records)[0]


@pytest.mark.parametrize(
  "closed", [([1, 3], [0, 4]), ([], [5]), ([0, 1, 2, 3], []), ([2], [0, 1, 2, 3, 4, 5])]
)
def test_what_static_gates_close_in_a_chain_is_gone(closed):
  """This includes the last layer, whose only reader is the classifier.

  A layer that is completely closed keeps one channel, which is 0.
  """
  model = MODELS["static vgg"]
  variables, x = random_variables(model), images()
  widths = (4, 6)
  for i, (width, places) in enumerate(zip(widths, closed, strict=True), start=1):
    logits = np.full(width, 9.0, np.float32)
    logits[places] = -9
    assert variables["params"][f"layer{i}"]["gate"]["logits"].shape == (width,)
    variables["params"][f"layer{i}"]["gate"]["logits"] = jnp.asarray(logits)
  y, records = jax.jit(model.apply)(variables, x)
  assert [list(np.flatnonzero(np.asarray(r.gates)[0] == 0)) for r in records] == [
    list(places) for places in closed
  ]
  net = fold(model, variables)
  np.testing.assert_allclose(jax.jit(folded.run)(net, x)[0], y, rtol=1e-4, atol=1e-5)
  first, second = (
    max(1, width - len(places)) for width, places in zip(widths, closed, strict=True)
  )
  shapes = [part.conv.kernel.shape for part in net.parts]
  assert (*shapes, net.classifier[0].shape) == (
    (3, 3, 3, first),
    (3, 3, first, second),
    (second, 3),
  )
  height, width, _ = SHAPE
  assert folded.macs(net, SHAPE) == (
    9 * height * width * 3 * first + 9 * (height // 2) * (width // 2) * first * second + 3 * second
  )


@pytest.mark.parametrize("features", [None, 3])
def test_only_features_that_a_chain_itself_ends_with_stay(features):
  model = VGG(features, (4, 6), gating="channel", gate=STATIC)
  variables = random_variables(model)
  variables["params"]["layer2"]["gate"]["logits"] = jnp.asarray([9.0, -9, 9, -9, 9, 9], jnp.float32)
  net = fold(model, variables)
  assert net.parts[-1].conv.bias.size == (6 if features is None else 4)
  expected, _ = jax.jit(model.apply)(variables, images())
  np.testing.assert_allclose(jax.jit(folded.run)(net, images())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (ResNet(3, (1,), features=4, group_norm=True), "group_norm must be False"),
    (
      ResNet(3, (1,), features=4, gating="chanel"),
      "gating must be one of .*; got 'chanel'. Did you mean 'channel'",
    ),
    (
      ResNet(3, (1,), features=4, gating="all_channels", gate=STATIC),
      "context must be pooled if block outputs",
    ),
    (
      ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(context="random")),
      "context must be pooled or none",
    ),
    (
      ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(relaxation="sigmoid")),
      "relaxation must be",
    ),
    *[
      (ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(**fields)), message)
      for fields, message in (
        ({"normalise": 2.0}, "gate normalise must be 0.0, since another cannot be folded yet; got"),
        ({"threshold": "quantile"}, "gate threshold must be 'zero', since another cannot be"),
        ({"weighted": True}, "gate weighted must be False, since another cannot be folded yet"),
        ({"context": "glance+pooled"}, "gate context must be pooled or none, since others are"),
        ({"relaxation": "scale"}, "gate relaxation must be straight_through"),
      )
    ],
    (ResNet(3, (1,), features=4, gating="bias", sources=2), "gating must be none or that of gates"),
    (ResNet(3, (1,), features=4, sources=2), "sources must be 0, since images with"),
    (flax.linen.Dense(3), "model must be ResNet or VGG; got Dense"),
    (EarlyExitNet(3, (1, 1), features=4), "model must be ResNet or VGG; got EarlyExitNet"),
    (ExpertNet(3, (1, 1), features=4), "model must be ResNet or VGG; got ExpertNet"),
  ],
)
def test_what_cannot_be_folded_is_named(model, message):
  with pytest.raises(ValueError, match=message):
    fold(model, {})


def test_variables_of_another_model_are_named():
  model = ResNet(3, (1,), features=4)
  for missing in ({}, None):
    with pytest.raises(
      ValueError, match=r"variables must be those of the model, with .* of shape \(4,\); got none"
    ):
      fold(model, missing)
  for other, message in (
    (
      ResNet(3, (2,), features=4),
      r"batch_stats/stage1_block2/conv1/norm/mean of shape \(4,\); got none",
    ),
    (
      ResNet(3, (1,), features=8),
      r"batch_stats/stage1_block1/conv1/norm/mean of shape \(8,\); got \(4,\)",
    ),
    (
      ResNet(3, (1,), features=4, gating="layer"),
      r"batch_stats/stage1_block1/gate/head/norm/mean of shape \(16,\)",
    ),
  ):
    with pytest.raises(ValueError, match=f"variables must be those of the model, with {message}"):
      fold(other, random_variables(model))
  with pytest.raises(ValueError, match=r"gate/head/norm/mean of shape none; got \(16,\)"):
    fold(model, random_variables(ResNet(3, (1,), features=4, gating="channel")))
