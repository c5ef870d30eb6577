"""Runs of what images are gated by besides channels and layers: a tiny net trains, is tested, goes on and reports."""

import importlib
import json
import shutil

import pytest
import tiny

from gating_jax.experiments import classification
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnet
from gating_jax.training import devices, steps
from gating_jax.training.checkpoints import Checkpoints


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setitem(resnet.RESNETS, "tiny", ("cifar", BasicBlock, (1, 1), 4, "A"))

  def make(variants, **changes):
    made = importlib.import_module("configs.digits_resnet20").get_config(f"{variants},epochs=2,model=tiny")
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
def test_a_run_with_exits_spends_less_on_some_images_and_goes_on_from_a_checkpoint(config, tmp_path, capsys):
  made = config("gates=exits", **{"model.exits.threshold": 0.95, "log_every": 11, "eval_every": 0.0})
  classification.run(made, tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  built = classification.build(made)
  assert (result["gates"], result["ungated_macs"]) == (1, built.counts.macs)
  assert result["macs_min"] == built.counts.fixed < result["macs"] < result["macs_max"] == built.counts.macs
  (layer,) = result["layers"]
  assert (layer["layer"], layer["disagreement"], layer["random_dropout"]) == ("exit1", 0, 0)  # nothing is drawn
  spent = built.counts.fixed + layer["mean_open"] * built.counts.gated
  assert result["macs"] == pytest.approx(spent, rel=1e-9)
  first, last = lines(tmp_path, "train")
  assert last["cross_entropy"] < first["cross_entropy"]
  assert 0 < last["exits/accuracy1"] < 1
  assert "Gates of each layer</h2>" in (tmp_path / "report.html").read_text()
  params = final_params(made, tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "22")
  (tmp_path / "result.json").unlink()
  classification.run(made, tmp_path, "train")
  assert "going on from the checkpoint of step 11" in capsys.readouterr().out
  assert tiny.bit_equal(final_params(made, tmp_path), params)


@pytest.mark.slow
@pytest.mark.parametrize("variants", ["gates=experts", "gates=sparse_experts"])
def test_a_run_with_experts_counts_those_that_count(config, tmp_path, variants):
  made = config(variants, **{"model.experts.count": 3, "log_every": 11, "eval_every": 0.0})
  classification.run(made, tmp_path, "train")
  result = json.loads((tmp_path / "result.json").read_text())
  counts = classification.build(made).counts
  count = 3 if variants == "gates=experts" else 1
  assert result["macs"] == result["macs_min"] == result["macs_max"] == counts.fixed + count * counts.gated // 3
  assert result["mean_open"] == pytest.approx(count / 3)
  (layer,) = result["layers"]
  assert (layer["layer"], layer["gates"], layer["disagreement"]) == ("stage2", 3, 0)
  first, last = lines(tmp_path, "train")
  assert last["cross_entropy"] < first["cross_entropy"]
  assert ("balance" in last) == (count == 1)
  if count == 1:
    assert 0.9 < last["balance"] < 2.5
    assert last["loss"] == pytest.approx(last["cross_entropy"] + 0.01 * last["balance"], rel=1e-5)


@pytest.mark.parametrize(("variants", "changes", "message"), [
    ("gates=experts", {"model.experts.top_k": 5}, r"model.experts.top_k must be None or in 1 .. .*; got 5"),
    ("gates=experts,regulariser=sparsity", {}, "loss.regulariser must be 'none' where model.gating is 'experts', if"),
    ("gates=channels,regulariser=balance", {}, "model.gating must be 'experts' where loss.regulariser is 'balance'"),
    ("gates=exits", {"loss.exit_weights": (1.0, 1.0)}, "loss.exit_weights must hold 1 number, or one for each of 1 "),
    ("gates=exits", {"model.name": "vgg8"}, "model.name must be a residual network where model.gating is 'exits'"),
])
def test_settings_that_do_not_belong_together_are_named(config, variants, changes, message):
  made = config(variants, **changes)
  with pytest.raises(ValueError, match=message):
    classification.build(made)
