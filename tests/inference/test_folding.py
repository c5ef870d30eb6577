import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.inference import costs, folded
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.folding import fold
from gating_jax.inference.pruning import PruneMask, apply_pruning, find_static_units
from gating_jax.inference.quantising import dequantise, quantise
from gating_jax.layers.blocks import Bottleneck
from gating_jax.layers.gate import SHUT, GateSettings, shift_thresholds
from gating_jax.models.resnet_variants import EarlyExitNet, ExpertNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import POOL, VGG
from gating_jax.ops.macs import executed_macs
from tests.helpers.folded_nets import count_gates
from tests.helpers.gated_models import MODELS, RECIPE, SHAPE, STATIC, images, random_variables

models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.mark.thin(4)
@models
def test_the_same_outputs_gates_and_macs(model):
  variables, x = random_variables(model), images()
  y, records = jax.jit(model.apply)(variables, x)
  net = fold(model, variables)
  z, logits = jax.jit(folded.run_net)(net, x)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  if model.gate.context == "none" and model.gating != "none":
    assert logits == ()
    return
  gates = [r.gates for r in records]
  for of_record, of_net in zip(records, logits, strict=True):
    np.testing.assert_allclose(of_net, of_record.logits, rtol=1e-3, atol=1e-3)
  assert not gates or 0 < np.mean(np.concatenate(gates, axis=1) > 0) < 1
  counts = model_summary(model, SHAPE)
  assert costs.macs(net, SHAPE) == counts.macs + counts.gate_macs
  if records:
    np.testing.assert_array_equal(
      costs.macs(net, SHAPE, gates), counts.always_macs + executed_macs(records)
    )


def gates_of(net, logits):
  """Returns the gates of every group, from its logits."""
  found, left = [], list(logits)
  for part in net.parts:
    found += part.head.gates([left.pop(0) for _ in part.groups]) if part.groups else []
  return found


@pytest.mark.thin(9)
@pytest.mark.parametrize("shift", [0.0, 0.4, -0.4])
@pytest.mark.parametrize("name", ["recipe", "weighted outputs", "weighted vgg", "thresholds"])
def test_moved_thresholds_move_the_logits_and_keep_the_weights(name, shift):
  model = MODELS[name]
  variables, x = shift_thresholds(random_variables(model), shift=shift), images(40)
  y, records = jax.jit(model.apply)(variables, x)
  net = fold(model, variables)
  z, logits = jax.jit(folded.run_net)(net, x)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  seen = []
  for record, of_net, gates in zip(records, logits, gates_of(net, logits), strict=True):
    np.testing.assert_allclose(of_net, record.logits, rtol=1e-3, atol=1e-3)
    # Rounding may open a gate whose logit is 0.
    clear = np.abs(np.asarray(record.logits)) > 1e-4
    gates, expected = np.asarray(gates)[clear], np.asarray(record.gates)[clear]
    np.testing.assert_allclose(gates, expected, rtol=1e-4, atol=1e-4)
    seen.append(gates)
  opened = np.concatenate(seen)
  opened = opened[opened > 0]
  if not model.gate.weighted:
    assert set(opened) == {1.0}
  else:
    # A threshold that was moved down opens units that training would close: they count less than 1.
    assert (opened.min() < 1) == (shift < 0)
    assert len(np.unique(opened)) > 20


def test_folded_thresholds_by_hand():
  """One block of two gates: z' = s (z - mean) / sqrt(var + eps) - theta - shift."""
  gate = GateSettings(
    hidden=1, noise_scale=0.0, normalise=2.0, threshold="quantile", share=0.5, weighted=True
  )
  model = ResNet(3, (1,), features=2, gating="channel", gate=gate)
  variables = random_variables(model)
  own = variables["params"]["stage1_block1"]["gate"]["head"]["logits"]
  own["kernel"], own["bias"] = jnp.array([[3.0, -1.0]]), jnp.array([0.5, 2.0])
  stats = variables["batch_stats"]["stage1_block1"]["gate"]
  stats["normalised"] = {"mean": jnp.array([1.0, 0.0]), "var": jnp.array([4.0, 0.25])}
  stats["threshold"], stats["shift"] = jnp.float32(0.25), jnp.float32(0.5)
  head = fold(model, variables).parts[1].head
  # The factors are 2 / 2 and 2 / 0.5.
  np.testing.assert_allclose(head.logits, [[3.0, -4.0]], rtol=1e-4)
  np.testing.assert_allclose(head.logits_bias, [-0.5 - 0.75, 8.0 - 0.75], rtol=1e-4)
  (gates,) = head.gates((jnp.array([[0.0, 1.0, -1.0, jnp.nan]]),))
  np.testing.assert_allclose(gates, [[0, 2 / (1 + np.exp(-1.5)), 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["recipe", "thresholds"])
def test_gates_that_are_shut_for_good_stay_shut(name):
  """Without a deviation, normalised logits would be near 0, and could be above the threshold."""
  model = MODELS[name]
  variables = random_variables(model)
  gate = variables["params"]["stage1_block1"]["gate"]["head"]["logits"]
  gate["kernel"] = gate["kernel"].at[:, 1].set(0)
  gate["bias"] = gate["bias"].at[1].set(SHUT)
  stats = variables["batch_stats"]["stage1_block1"]["gate"]
  stats["normalised"]["mean"] = stats["normalised"]["mean"].at[1].set(SHUT)
  stats["normalised"]["var"] = stats["normalised"]["var"].at[1].set(0)
  stats["threshold"] = jnp.float32(-1)
  net = fold(model, variables)
  y, records = jax.jit(model.apply)(variables, images())
  z, logits = jax.jit(folded.run_net)(net, images())
  assert (np.asarray(logits[0])[:, 1] == SHUT).all()
  np.testing.assert_allclose(logits[0], records[0].logits, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_one_program_takes_the_net_with_other_thresholds():
  model = MODELS["recipe"]
  variables = random_variables(model)
  run = compile_conditional(
    model, variables, input_shape=SHAPE, batch_size=5, strategy="switch", calibration=images()
  )
  opened = []
  for shift in (-0.5, 0.0, 0.5):
    moved = shift_thresholds(variables, shift=shift)
    run.load(fold(model, moved))
    y, logits = run(images())
    expected, _ = jax.jit(model.apply)(moved, images())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    opened.append(np.mean(np.concatenate(logits, axis=1) > 0))
  assert opened[0] > opened[1] > opened[2]


def test_a_shift_without_a_threshold_is_another_models():
  model = MODELS["basic"]
  variables = random_variables(model)
  variables["batch_stats"]["stage1_block1"]["gate"]["shift"] = jnp.float32(1)
  with pytest.raises(ValueError, match=r"stage1_block1/gate/shift of shape none; got \(\)"):
    fold(model, variables)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["scales", "scaled outputs", "scaled layers", "scaled vgg"])
def test_scales_are_no_gates(name):
  net = fold(MODELS[name], random_variables(MODELS[name]))
  heads = [part.head for part in net.parts if part.head is not None]
  assert heads
  assert all(head.scales for head in heads)
  assert folded.group_places(net) == []
  assert jax.jit(folded.run_net)(net, images())[1] == ()
  run = compile_conditional(net, input_shape=SHAPE, batch_size=2, strategy="masked")
  expected, _ = jax.jit(MODELS[name].apply)(random_variables(MODELS[name]), images())
  scale = np.abs(expected).max()
  np.testing.assert_allclose(run(images())[0], expected, rtol=1e-4, atol=1e-4 * scale)
  spoilt = np.asarray(images()).copy()
  spoilt[1, 0, 0, 0] = np.nan
  assert np.isnan(run(spoilt)[0][1]).all()


def test_the_glance_is_computed_once(monkeypatch):
  net = fold(MODELS["recipe"], random_variables(MODELS["recipe"]))
  calls, look = [], folded.Glance.__call__

  def counting(glance, x):
    calls.append(x.shape)
    return look(glance, x)

  monkeypatch.setattr(folded.Glance, "__call__", counting)
  # A function of its own: a trace of `run` that another test has left would call nothing.
  jax.eval_shape(lambda net, x: folded.run_net(net, x), net, images())
  assert calls == [images().shape]
  # 3 x 3 windows at 4 x 4 places, from 3 channels to 8.
  assert costs.glance_macs(net) == 9 * 16 * 3 * 8


@pytest.mark.parametrize("name", ["static", "static layers"])
def test_what_static_gates_close_is_gone(name):
  model = MODELS[name]
  variables = random_variables(model)
  _, records = jax.jit(model.apply)(variables, images(1))
  closed = sum(int(np.sum(np.asarray(r.gates) == 0)) for r in records)
  assert closed > 0
  net, counts = fold(model, variables), model_summary(model, SHAPE)
  assert costs.macs(net, SHAPE) == counts.always_macs + executed_macs(records)[0]


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
  np.testing.assert_allclose(jax.jit(folded.run_net)(net, x)[0], y, rtol=1e-4, atol=1e-5)
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
  assert costs.macs(net, SHAPE) == (
    9 * height * width * 3 * first + 9 * (height // 2) * (width // 2) * first * second + 3 * second
  )


def test_a_convolution_without_a_norm_is_taken_with_its_bias():
  model = VGG(3, (4,), norm=False)
  variables = random_variables(model)
  conv, own = fold(model, variables).parts[0].conv, variables["params"]["layer1"]["conv"]["conv"]
  np.testing.assert_array_equal(conv.kernel, own["kernel"])
  np.testing.assert_array_equal(conv.bias, own["bias"])


def test_static_gates_of_a_sigmoid_scale_what_they_let_through():
  gate = GateSettings(context="none", relaxation="sigmoid")
  model = VGG(3, (4,), norm=False, gating="channel", gate=gate)
  variables = random_variables(model)
  layer = variables["params"]["layer1"]
  layer["gate"]["logits"] = np.float32([0, 1, -1, 2])
  scale = 1 / (1 + np.exp([0, -1, 1, -2]))
  found = fold(model, variables).parts[0].conv.bias
  np.testing.assert_allclose(found, layer["conv"]["conv"]["bias"] * scale, rtol=1e-5)


def test_runners_must_be_one_for_each_part_and_a_dead_branch_leaves_the_shortcut():
  x = jnp.array([-1.0, 2.0]).reshape(1, 1, 1, 2)
  net = folded.FoldedNet((folded.Block(()),), pooled=False)
  np.testing.assert_array_equal(folded.run_net(net, x)[0].ravel(), [0, 2])
  with pytest.raises(ValueError, match="^runners must be one for each of 1 parts; got 2"):
    folded.run_net(net, x, [folded.masked] * 2)


DENSE = VGG(3, (4, POOL, 6), hidden=(7, 5), pooled=2, gating="channel", gate=GateSettings(hidden=4))


def test_dense_layers_on_parts_of_the_last_map_are_folded():
  variables, x = random_variables(DENSE), images(20)
  expected, records = jax.jit(DENSE.apply)(variables, x)
  net, size = fold(DENSE, variables), np.abs(expected).max()
  y, _ = jax.jit(folded.run_net)(net, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * size)
  counts, gates = model_summary(DENSE, SHAPE), [record.gates for record in records]
  assert costs.macs(net, SHAPE) == counts.macs + counts.gate_macs
  np.testing.assert_array_equal(
    costs.macs(net, SHAPE, gates), counts.always_macs + executed_macs(records)
  )
  kernel, _ = net.hidden[0]
  again, _ = dequantise(quantise(net)).hidden[0]
  assert 0 < np.abs(kernel - again).max() < 0.01 * np.abs(kernel).max()
  # Features that are pruned leave the rows of the first dense layer, in each part of the map.
  removed = np.arange(6) == 1
  choices = [PruneMask.nothing(4), PruneMask(removed, np.zeros(6, bool))]
  pruned = apply_pruning(net, choices)
  rows = np.asarray(kernel).reshape(2, 2, 6, 7)[:, :, ~removed].reshape(-1, 7)
  np.testing.assert_array_equal(pruned.hidden[0][0], rows)
  np.testing.assert_array_equal(pruned.classifier[0], net.classifier[0])


def test_features_that_dense_layers_do_not_read_are_gone():
  model = DENSE.clone(gate=STATIC)
  variables = random_variables(model)
  variables["params"]["layer2"]["gate"]["logits"] = jnp.asarray([9.0, -9, 9, -9, 9, 9], jnp.float32)
  net = fold(model, variables)
  assert (net.parts[-1].conv.bias.size, net.hidden[0][0].shape) == (4, (4 * 4, 7))
  kernel = np.asarray(variables["params"]["hidden1"]["kernel"]).reshape(4, 6, 7)
  rows = kernel[:, [0, 2, 4, 5]].reshape(-1, 7)
  np.testing.assert_array_equal(net.hidden[0][0], rows)


@pytest.mark.parametrize("features", [None, 3])
def test_only_features_that_a_chain_itself_ends_with_stay(features):
  model = VGG(features, (4, 6), gating="channel", gate=STATIC)
  variables = random_variables(model)
  variables["params"]["layer2"]["gate"]["logits"] = jnp.asarray([9.0, -9, 9, -9, 9, 9], jnp.float32)
  net = fold(model, variables)
  assert net.parts[-1].conv.bias.size == (6 if features is None else 4)
  expected, _ = jax.jit(model.apply)(variables, images())
  np.testing.assert_allclose(
    jax.jit(folded.run_net)(net, images())[0], expected, rtol=1e-4, atol=1e-5
  )


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
      "context must be pooled or another that reads images if block outputs",
    ),
    (
      ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(context="random")),
      "context must be pooled or another that reads images alone, or none",
    ),
    (
      ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(relaxation="sigmoid")),
      "relaxation must be",
    ),
    *[
      (
        ResNet(3, (1,), features=4, gating="channel", gate=GateSettings(context=context)),
        f"gate context must be pooled or another that reads images alone, or none; got '{context}",
      )
      for context in ("assigned", "told")
    ],
    (ResNet(3, (1,), features=4, gating="bias", sources=2), "gating must be none or that of gates"),
    (ResNet(3, (1,), features=4, sources=2), "sources must be 0, since images with"),
    (VGG(3, (4,), pooled=7, max_map=7), r"max_map must be None, as of model.clone\(max_map=None\)"),
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


def test_gates_with_a_prior_have_weights_without_it():
  gate = dataclasses.replace(RECIPE, prior=True)
  model = ResNet(3, (1,), Bottleneck, features=4, gating="channel", gate=gate)
  variables, x = shift_thresholds(random_variables(model), shift=0.1), images()
  # Units that never open, to be pruned with their shift.
  own = variables["params"]["stage1_block1"]["gate"]
  own["gain"], own["prior"] = own["gain"].at[0].set(0), own["prior"].at[0].set(-9)
  y, records = jax.jit(model.apply)(variables, x)
  net = fold(model, variables)
  pruned = apply_pruning(net, find_static_units(net, count_gates(net, x), multiple=1))
  assert pruned.parts[1].head.shift.size < net.parts[1].head.shift.size == 8
  z, _ = jax.jit(folded.run_net)(pruned, x)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  z, logits = jax.jit(folded.run_net)(net, x)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
  for record, gates in zip(records, gates_of(net, logits), strict=True):
    np.testing.assert_allclose(gates, record.gates, rtol=1e-4, atol=1e-4)
  seen = np.concatenate([record.gates for record in records], axis=1)
  # Of the gate networks' words alone, on either side of 1.
  assert seen[seen > 0].min() < 1 < seen.max()
