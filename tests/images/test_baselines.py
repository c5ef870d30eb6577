"""Runs of other kinds of gates than channels and layers: training, test, resuming, report."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

from gating_jax.images import classification, start
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnets
from gating_jax.training import devices, rundir, steps
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import tiny
from tests.helpers.runs import without_reports


@pytest.fixture
def config(monkeypatch):
  net = resnets.NamedResNet("cifar", BasicBlock, (1, 1), 4, "A")
  monkeypatch.setitem(resnets.RESNETS, "tiny", net)

  def make(variants, **changes):
    made = importlib.import_module("configs.digits_resnet20").get_config(
      f"{variants},epochs=2,model=tiny"
    )
    made.update_from_flattened_dict(changes)
    return made

  return make


def final_params(made, workdir):
  built = classification.build(made)
  like = steps.init_state(built.model, built.optimiser, made.seed, built.test.shape)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())[1].params
  finally:
    checkpoints.close()


def lines(workdir, split):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line for line in found if line["split"] == split]


@pytest.mark.slow
def test_a_run_with_exits_spends_less_on_some_images_and_goes_on_from_a_checkpoint(
  config, tmp_path, capsys, monkeypatch
):
  made = config(
    "gates=exits", **{"model.exits.threshold": 0.95, "log_every": 11, "eval_every": 0.0}
  )
  classification.run(made, tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  built = classification.build(made)
  assert (result["gates"], result["ungated_macs"]) == (1, built.counts.macs)
  assert (
    result["macs_min"]
    == built.counts.always_macs
    < result["macs"]
    < result["macs_max"]
    == built.counts.macs
  )
  (layer,) = result["layers"]
  # Nothing is drawn.
  assert (layer["layer"], layer["disagreement"], layer["random_dropout"]) == (
    "exit1",
    0,
    0,
  )
  spent = built.counts.always_macs + layer["mean_open"] * built.counts.gated
  assert result["macs"] == pytest.approx(spent, rel=1e-9)
  first, last = lines(tmp_path, "train")
  assert last["cross_entropy"] < first["cross_entropy"]
  assert 0 < last["exits/accuracy1"] < 1
  assert "Gates of each layer</h2>" in (tmp_path / "report.html").read_text()
  params = final_params(made, tmp_path)
  without_reports(monkeypatch)
  shutil.rmtree(tmp_path / "checkpoints" / "22")
  (tmp_path / "result.json").unlink()
  classification.run(made, tmp_path, "train")
  assert "resuming from the checkpoint of step 11" in capsys.readouterr().out
  assert tiny.bit_equal(final_params(made, tmp_path), params)


@pytest.mark.slow
@pytest.mark.parametrize("variants", ["gates=experts", "gates=sparse_experts"])
def test_a_run_with_experts_counts_those_that_count(config, tmp_path, variants):
  made = config(variants, **{"model.experts.count": 3, "log_every": 11, "eval_every": 0.0})
  classification.run(made, tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  counts = classification.build(made).counts
  count = 3 if variants == "gates=experts" else 1
  assert (
    result["macs"]
    == result["macs_min"]
    == result["macs_max"]
    == counts.always_macs + count * counts.gated // 3
  )
  assert result["mean_open"] == pytest.approx(count / 3)
  (layer,) = result["layers"]
  assert (layer["layer"], layer["gates"], layer["disagreement"]) == ("stage2", 3, 0)
  first, last = lines(tmp_path, "train")
  assert last["cross_entropy"] < first["cross_entropy"]
  assert ("balance" in last) == (count == 1)
  if count == 1:
    assert 0.9 < last["balance"] < 2.5
    assert last["loss"] == pytest.approx(last["cross_entropy"] + 0.01 * last["balance"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("gates", "term"), [("static", "l0"), ("layers", "target_rate"), ("random", None)]
)
def test_a_run_of_other_gates_is_what_they_are(config, tmp_path, gates, term):
  classification.run(
    config(f"gates={gates}", **{"optim.epochs": 1, "eval_every": 0.0}), tmp_path, "train"
  )
  result, last = json.loads((tmp_path / "result.json").read_text()), lines(tmp_path, "train")[-1]
  assert {"l0", "target_rate", "batch_shaping"} & set(last) == ({term} if term else set())
  assert np.isfinite(last["loss"])
  # Of a block that keeps the shape; of all channels.
  assert result["gates"] == (1 if gates == "layers" else 12)
  if gates == "static":
    assert result["macs_std"] == 0
    assert abs(result["input_information"]) < 1e-9
  if gates == "random":
    assert result["random_dropout"] == 12
    assert result["mean_open"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
  ("variants", "changes", "message"),
  [
    (
      "gates=experts",
      {"model.experts.top_k": 5},
      r"model.experts.top_k must be None or in 1 .. .*; got 5",
    ),
    (
      "gates=experts,regulariser=sparsity",
      {},
      r"loss.regulariser must be 'none' where model.gating is 'experts' \(alternatively 'bal",
    ),
    (
      "gates=channel,regulariser=balance",
      {},
      "model.gating must be 'experts' where loss.regulariser is 'balance'",
    ),
    (
      "gates=exits",
      {"loss.exit_weights": (1.0, 1.0)},
      "loss.exit_weights must hold 1 number, or one for each of 1 ",
    ),
    (
      "budget=0.5",
      {"model.gate.relaxation": "sigmoid"},
      "model.gate.relaxation='sigmoid' is incompatible with .*budget",
    ),
    (
      "budget=0.5,gates=exits",
      {},
      "model.gating='exits' is incompatible with loss.sparsity.kind='budget'",
    ),
    (
      "gates=random,budget=0.5",
      {},
      "loss.regulariser='none' is incompatible with loss.sparsity.kind='budget'",
    ),
    (
      "budget=0.01",
      {},
      r"loss.sparsity.target must be above 0\.\d+, the fraction of .* that always runs; got 0.01",
    ),
    (
      "budget=0.5,regulariser=entropy",
      {},
      "loss.regulariser='entropy' is incompatible with .*budget",
    ),
    (
      "gates=channel,inner=2",
      {"model.name": "vgg8"},
      "model.inner_width must be 1.0 where model.name is 'vgg8'",
    ),
    (
      "gates=exits",
      {"model.name": "vgg8"},
      "model.name must be a residual network where model.gating is 'exits'",
    ),
  ],
)
def test_settings_that_do_not_belong_together_are_named(config, variants, changes, message):
  made = config(variants, **changes)
  with pytest.raises(ValueError, match=message):
    classification.build(made)


def started(made, workdir):
  """Returns the initial state of a run, and its final parameters."""
  built = classification.build(made)
  state = steps.init_state(built.model, built.optimiser, made.seed, built.test.shape)
  return jax.device_get(start.start_from(built, state)), state


@pytest.mark.slow
@pytest.mark.parametrize("variants", ["gates=channel,noise_to=0.0", "gates=exits"])
def test_a_late_start_takes_all_but_gates_from_an_ungated_run(
  config, tmp_path, capsys, monkeypatch, variants
):
  without_reports(monkeypatch)
  plain = config("gates=none", **{"optim.epochs": 1, "eval_every": 0.0})
  classification.run(plain, tmp_path / "plain", "train")
  built = classification.build(plain)
  checkpoints = Checkpoints(tmp_path / "plain" / "checkpoints", read_only=True)
  _, trained = checkpoints.restore(
    steps.init_state(built.model, built.optimiser, 0, built.test.shape),
    devices.replicated_sharding(),
  )
  checkpoints.close()
  made = config(
    variants,
    **{
      "optim.epochs": 1,
      "model.init_from": str(tmp_path / "plain"),
      "optim.learning_rate": 1e-9,
      "eval_every": 0.0,
    },
  )
  began, fresh = started(made, tmp_path)
  extra = 0
  for collection in ("params", "batch_stats"):
    flat = [traverse_util.flatten_dict(getattr(s, collection)) for s in (began, trained, fresh)]
    assert flat[0].keys() == flat[2].keys() > flat[1].keys()
    for path, value in flat[0].items():
      extra += path not in flat[1]
      np.testing.assert_array_equal(value, (flat[1] if path in flat[1] else flat[2])[path])
  assert extra > 4
  assert began.step == 0
  classification.run(made, tmp_path / "run", "train")
  assert "starting from the parameters of step 11 in" in capsys.readouterr().out
  params = final_params(made, tmp_path / "run")  # they hardly moved
  assert (
    tiny.relative_gap(params, began.params) < 1e-4 < tiny.relative_gap(fresh.params, began.params)
  )
  for other, message in (
    ({"model.width": 2.0}, "with model.width=2.0; that of .*plain has 1.0"),
    ({"model.shortcut": "B"}, "stage2_block1/.* has shape .* here and None in"),
  ):
    wrong = config(variants, **{"model.init_from": str(tmp_path / "plain"), **other})
    with pytest.raises(ValueError, match=f"model.init_from must name a run .*{message}"):
      classification.run(wrong, tmp_path / "wrong", "train")
  nowhere = config(variants, **{"model.init_from": str(tmp_path / "nowhere")})
  with pytest.raises(
    rundir.RunDirError, match="init_from must name a run directory; .*nowhere has no"
  ):
    classification.run(nowhere, tmp_path / "wrong2", "train")
  gated = config(variants, **{"model.init_from": str(tmp_path / "run")})
  with pytest.raises(
    ValueError, match="model.init_from must name a run with model.gating='none'; that of"
  ):
    classification.run(gated, tmp_path / "wrong3", "train")


@pytest.mark.parametrize(
  ("variants", "at_start", "at_end"),
  [
    ("gates=channel,noise=0.5", 0.5, 0.5),
    ("gates=channel,noise_to=0.25", 1.0, 0.25),
    ("gates=exits", 0, 0),
    ("gates=sparse_experts", 0, 0),
    ("gates=random", 1.0, 1.0),
  ],
)
def test_gates_are_judged_by_the_noise_of_their_step(config, variants, at_start, at_end):
  built = classification.build(config(variants))
  assert (built.drawn_noise_scale(0), built.drawn_noise_scale(11)) == (at_start, at_end)


@pytest.mark.parametrize(
  "variants", ["gates=none,noise_to=0", "gates=random,noise_to=0", "gates=exits,noise_to=0"]
)
def test_noise_that_nothing_draws_cannot_change(config, variants):
  with pytest.raises(
    ValueError,
    match="model.noise.final must be None where no gates draw noise of that scale; got 0",
  ):
    classification.build(config(variants))
