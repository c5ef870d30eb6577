import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from gating_jax.ops.priors import beta
from gating_jax.ops.relaxations import straight_through
from gating_jax.training.objectives import ImageObjective, weighted_mean
from gating_jax.types import GateRecord
from gating_jax.video.objectives import SegmentObjective, VideoObjective, label_loss

AXIS = "devices"
B, T, CLASSES, CHANNELS = 16, 5, 3, 4
STEP, GAMMA, RHO, LIGHT, TARGET = 7, 0.24, 1.4, 0.3, 0.4
RANDOM = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 2, 5, 3, 4, 5, 5, 1, 1, 2, 2, 5, 5, 3, 4])
# A device's two videos have none.
WEIGHT = np.array([1, 0, 1, 1, 0, 0, 2, 1, 1, 1, 1, 1, 1, 1, 0.5, 1], np.float32)
TARGETS = {
  "label": RANDOM.integers(0, CLASSES, B).astype(np.int32),
  "weight": WEIGHT,
  "valid": np.arange(T) < LENGTHS[:, None],
  "units": RANDOM.integers(-1, CLASSES, (B, T)).astype(np.int32),
}
MULTI = {**TARGETS, "label": RANDOM.integers(0, 2, (B, CLASSES)).astype(np.float32)}
PREDICTED = {
  "logits": RANDOM.normal(size=(B, CLASSES)).astype(np.float32),
  "light_logits": RANDOM.normal(size=(B, T, CLASSES)).astype(np.float32),
  "segments": RANDOM.normal(size=(B, T)).astype(np.float32),
  "channels": RANDOM.normal(size=(B * T, CHANNELS)).astype(np.float32),
}
SEEN = WEIGHT[:, None] * TARGETS["valid"]


def channels(sparsity="l0"):
  return ImageObjective(
    prior=beta(0.6, 0.4),
    reduction="layer_mean",
    sparsity=sparsity,
    target=0.5,
    never_gated_macs=100,
    batch_shaping_coefficient=optax.constant_schedule(0.5),
    sparsity_coefficient=optax.constant_schedule(2.0),
  )


def objective(sparsity="target", multi_label=False, **settings):
  return VideoObjective(
    **{
      **dict(
        multi_label=multi_label,
        sparsity=sparsity,
        target=TARGET,
        prior=beta(0.6, 0.4),
        light_coefficient=LIGHT,
        sparsity_coefficient=optax.linear_schedule(0.0, 2.0, 10),
        batch_shaping_coefficient=optax.linear_schedule(0.8, 0.0, 10),
        channels=channels(),
      ),
      **settings,
    }
  )


def record(logits):
  return GateRecord(logits, jax.nn.sigmoid(logits), straight_through(logits), 10)


def evaluate(objective, predicted, targets, axis_name=None, gated=False):
  @jax.jit  # or each operation would be a program of its own
  def losses(predicted, targets):
    outputs = {name: predicted[name] for name in ("logits", "light_logits") if name in predicted}
    records = (record(jnp.asarray(predicted["segments"])),)
    if gated:
      records += (record(jnp.asarray(predicted["channels"])),)
    return objective(outputs, targets, records, jnp.int32(STEP), axis_name)

  return losses(predicted, targets)


def mean_by_hand(values, weights):
  return (np.asarray(values, np.float64) * weights).sum() / weights.sum()


def label_loss_by_hand(logits, labels, multi_label):
  logits = logits.astype(np.float64)
  if multi_label:
    return -(
      labels * np.log(special.expit(logits)) + (1 - labels) * np.log(special.expit(-logits))
    ).mean(-1)
  return -np.take_along_axis(special.log_softmax(logits, axis=-1), labels[..., None], -1)[..., 0]


def shaping_by_hand():
  """Computes the formula of `batch_shaping_loss` with weights.

  Padding and videos of weight 0 are removed beforehand.
  """
  logits, weights = PREDICTED["segments"][SEEN > 0].astype(np.float64), SEEN[SEEN > 0]
  order = np.argsort(logits)
  p, w = special.expit(logits[order]), weights[order]
  level = (np.cumsum(w) - w / 2 + 0.5) / (w.sum() + 1)
  return (w * (stats.beta(0.6, 0.4).cdf(p) - level) ** 2).sum() / w.sum()


@pytest.mark.thin(2)
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("sparsity", ["none", "mean", "target"])
def test_total_is_classification_and_weighted_terms(sparsity, multi_label):
  targets = MULTI if multi_label else TARGETS
  total, terms = evaluate(objective(sparsity, multi_label), PREDICTED, targets)
  classification = mean_by_hand(
    label_loss_by_hand(PREDICTED["logits"], targets["label"], multi_label), WEIGHT
  )
  of_video = np.repeat(targets["label"][:, None], T, axis=1)
  light = mean_by_hand(label_loss_by_hand(PREDICTED["light_logits"], of_video, multi_label), SEEN)
  share = mean_by_hand(PREDICTED["segments"] > 0, SEEN)
  price = {"none": 0, "mean": share, "target": (share - TARGET) ** 2}[sparsity]
  expected = {
    "classification": classification,
    "light": light,
    "share": share,
    "batch_shaping": shaping_by_hand(),
    "batch_shaping_coefficient": GAMMA,
    "gates/segments_closed": 0,
  }
  if sparsity != "none":
    expected |= {sparsity: price, f"{sparsity}_coefficient": RHO}
  if not multi_label:
    expected["accuracy"] = mean_by_hand(PREDICTED["logits"].argmax(-1) == TARGETS["label"], WEIGHT)
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    assert float(terms[name]) == pytest.approx(value, rel=2e-5), name
  by_hand = classification + LIGHT * light + RHO * price + GAMMA * shaping_by_hand()
  assert float(total) == pytest.approx(by_hand, rel=2e-5)
  assert min(abs(share - TARGET), shaping_by_hand()) > 0.01


@pytest.mark.parametrize("sparsity", ["mean", "target"])
def test_each_video_may_have_the_budget(sparsity):
  total, terms = evaluate(objective(sparsity, scope="video"), PREDICTED, TARGETS)
  of_set, set_terms = evaluate(objective(sparsity), PREDICTED, TARGETS)
  valid, shapings = TARGETS["valid"], []
  fractions = np.sum((PREDICTED["segments"] > 0) & valid, axis=1) / valid.sum(axis=1)
  price = fractions if sparsity == "mean" else (fractions - TARGET) ** 2
  for logits, own in zip(PREDICTED["segments"].astype(np.float64), valid, strict=True):
    p = np.sort(special.expit(logits[own]))
    level = np.arange(1, len(p) + 1) / (len(p) + 1)
    shapings.append(np.mean((stats.beta(0.6, 0.4).cdf(p) - level) ** 2))
  expected = {
    sparsity: mean_by_hand(price, WEIGHT),
    "batch_shaping": mean_by_hand(shapings, WEIGHT),
  }
  assert terms.keys() == set_terms.keys()
  for name, value in expected.items():
    assert float(terms[name]) == pytest.approx(value, rel=2e-5), name
  moved = RHO * (expected[sparsity] - float(set_terms[sparsity]))
  moved += GAMMA * (expected["batch_shaping"] - float(set_terms["batch_shaping"]))
  assert float(total - of_set) == pytest.approx(moved, abs=2e-5)


def test_an_unknown_scope_is_named():
  with pytest.raises(ValueError, match="budget.scope must be one of set, video; got 'batch'"):
    objective(scope="batch")


def test_channel_gates_have_their_own_price():
  plain, _ = evaluate(objective(), PREDICTED, TARGETS)
  total, terms = evaluate(objective(), PREDICTED, TARGETS, gated=True)
  price, own = channels().gate_terms((record(jnp.asarray(PREDICTED["channels"])),), STEP)
  assert float(total - plain) == pytest.approx(float(price), rel=1e-4)
  assert float(price) > 0.5
  for name, value in own.items():
    assert float(terms[f"channels_{name}"]) == pytest.approx(float(value))


def test_the_light_head_counts_only_where_it_has_a_coefficient():
  total, terms = evaluate(objective(light_coefficient=0.0), PREDICTED, TARGETS)
  silent, _ = evaluate(
    objective(), {k: v for k, v in PREDICTED.items() if k != "light_logits"}, TARGETS
  )
  assert "light" not in terms
  assert float(total) == float(silent)


def test_padding_and_videos_without_weight_change_nothing():
  differentiate = jax.jit(jax.value_and_grad(lambda p: evaluate(objective(), p, TARGETS)[0]))
  total, slopes = differentiate(
    {name: value for name, value in PREDICTED.items() if name != "channels"}
  )
  unread, unseen = WEIGHT == 0, SEEN == 0
  other = {
    "logits": np.where(unread[:, None], 40, PREDICTED["logits"]),
    "light_logits": np.where(unseen[..., None], -30, PREDICTED["light_logits"]),
    "segments": np.where(unseen, 20 - PREDICTED["segments"], PREDICTED["segments"]),
  }
  other_total, other_slopes = differentiate(jax.tree.map(np.float32, other))
  assert float(other_total) == pytest.approx(float(total), rel=1e-6)
  for name, rows in (("logits", unread), ("light_logits", unseen), ("segments", unseen)):
    assert not np.asarray(slopes[name])[rows].any()
    assert (np.abs(np.asarray(slopes[name])[~rows]) > 0).any(-1).all()
    np.testing.assert_allclose(other_slopes[name], slopes[name], rtol=1e-5, atol=1e-8)
  left = {name: value[~unread] for name, value in PREDICTED.items() if name != "channels"}
  few, _ = evaluate(objective(), left, {name: value[~unread] for name, value in TARGETS.items()})
  assert float(few) == pytest.approx(float(total), rel=1e-5)


def test_a_batch_without_weight_costs_nothing():
  nothing = {**TARGETS, "weight": 0 * WEIGHT}
  value, slopes = jax.jit(jax.value_and_grad(lambda p: evaluate(objective("mean"), p, nothing)[0]))(
    PREDICTED
  )
  assert float(value) == 0
  assert not any(np.asarray(slope).any() for slope in jax.tree.leaves(slopes))


@pytest.mark.slow
def test_devices_agree_with_one():
  """Gradients averaged over devices are those of the whole batch.

  Weights differ between devices, and are all 0 on one of them.
  """
  both = objective(channels=channels("target_rate"))

  def run(predicted, targets, axis_name=None):
    def loss(params):  # of what every device has: two numbers for each thing that is predicted
      moved = {
        name: params[name][0] * value + params[name][1] * value**2
        for name, value in predicted.items()
      }
      return evaluate(both, moved, targets, axis_name, gated=True)

    return jax.value_and_grad(loss, has_aux=True)(
      {name: jnp.array([0.9, 0.1]) for name in predicted}
    )

  (total, terms), slopes = jax.jit(run)(PREDICTED, TARGETS)
  split = lambda tree: jax.tree.map(lambda x: x.reshape(8, x.shape[0] // 8, *x.shape[1:]), tree)
  (totals, all_terms), all_slopes = jax.pmap(
    functools.partial(run, axis_name=AXIS), axis_name=AXIS
  )(split(PREDICTED), split(TARGETS))
  assert any((split(WEIGHT) == 0).all(1))
  assert np.mean(totals) == pytest.approx(float(total), rel=1e-5)
  for name, value in terms.items():
    assert np.mean(all_terms[name]) == pytest.approx(float(value), rel=1e-5), name
  for name, value in slopes.items():
    assert np.abs(value).min() > 1e-3, name
    np.testing.assert_allclose(
      np.mean(all_slopes[name], 0), value, rtol=1e-4, atol=1e-6, err_msg=name
    )


def segment_objective(target, multi_label=False):
  return SegmentObjective(target, CLASSES + (target == "units"), multi_label, channels())


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("target", ["units", "label"])
def test_nets_are_taught_single_segments(target, multi_label):
  targets = MULTI if multi_label else TARGETS
  picked = np.random.default_rng(1).integers(0, T, (B, 2))
  rng, classes = np.random.default_rng(2), CLASSES + (target == "units")
  outputs = {
    name: rng.normal(size=(2 * B, classes)).astype(np.float32) for name in ("light", "heavy")
  }
  outputs["picked"] = picked
  total, terms = segment_objective(target, multi_label)(outputs, targets, (), jnp.int32(STEP))
  binary = target == "label" and multi_label
  rows = [(b, t) for b in range(B) for t in picked[b]]
  units = [CLASSES if targets["units"][row] == -1 else targets["units"][row] for row in rows]
  labels = np.array(units if target == "units" else [targets["label"][b] for b, _ in rows])
  assert (np.array(units) == CLASSES).any()
  weight = np.array([WEIGHT[b] for b, _ in rows])
  expected = {
    name: mean_by_hand(label_loss_by_hand(outputs[name], labels, binary), weight)
    for name in ("light", "heavy")
  }
  both = sum(expected.values())
  if not binary:
    expected |= {
      f"{name}_accuracy": mean_by_hand(outputs[name].argmax(-1) == labels, weight)
      for name in ("light", "heavy")
    }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    assert float(terms[name]) == pytest.approx(value, rel=1e-5), name
  assert float(total) == pytest.approx(both, rel=1e-5)


def test_the_heavy_nets_channel_gates_are_priced_while_it_is_taught():
  outputs = {name: np.zeros((B * T, CLASSES), np.float32) for name in ("light", "heavy")}
  outputs["picked"] = np.tile(np.arange(T), (B, 1))
  records = (record(jnp.asarray(PREDICTED["channels"])),)
  total, terms = segment_objective("label")(outputs, TARGETS, records, jnp.int32(STEP))
  price, own = channels().gate_terms(records, STEP)
  assert float(total) == pytest.approx(2 * np.log(CLASSES) + float(price), rel=1e-5)
  assert float(terms["channels_l0"]) == pytest.approx(float(own["l0"]))


def test_losses_of_labels_by_hand():
  logits = jnp.array([[0.0, np.log(3.0)]])
  assert float(label_loss(logits, jnp.array([1]), False)[0]) == pytest.approx(np.log(4 / 3))
  assert float(label_loss(logits, jnp.array([[1.0, 0.0]]), True)[0]) == pytest.approx(
    (np.log(2) + np.log(4)) / 2
  )


def test_a_weighted_mean_of_nothing_is_0():
  assert float(weighted_mean(jnp.ones((2, 3)), jnp.zeros((2, 3)))) == 0
  assert float(weighted_mean(jnp.array([[2.0, 5.0]]), jnp.array([[0.5, 0.25]]))) == pytest.approx(3)


def test_an_unknown_sparsity_is_named():
  with pytest.raises(
    ValueError, match=r"^loss.sparsity.kind must be one of mean, none, target; got 'budget'$"
  ):
    objective("budget")
