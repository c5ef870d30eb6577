"""The examples train, and their results on held-out data are as claimed."""

import importlib
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax import GateSettings, ResNet, export_model, fold, quantise
from gating_jax.images import classification
from gating_jax.inference import folded
from gating_jax.inference.quantising import dequantise
from tests.helpers.runs import said

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def main_of(monkeypatch):
  monkeypatch.syspath_prepend(str(EXAMPLES))
  return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.parametrize("name", ["plain_jax", "linen", "nnx", "equinox_mlp"])
def test_gated_net_reads_digits_and_decides_per_image(main_of, name):
  result = main_of(name)()
  assert result["accuracy"] > 0.95
  assert 0.55 < result["open"] < 0.8
  assert result["conditional"] > 0.9 * result["units"]


def test_gates_stay_open_without_batch_shaping(main_of):
  result = main_of("plain_jax")(coefficient=0.0)
  assert result["accuracy"] > 0.95
  assert result["open"] > 0.95
  assert result["conditional"] < 0.5 * result["units"]


def test_matched_features_follow_the_prior_and_keep_the_images(main_of):
  results = main_of("feature_matching")()
  assert results["free"]["gap"] > 20
  assert results["matched"]["gap"] < 3
  assert results["matched"]["error"] < results["free"]["error"] + 0.03


def test_learned_means_follow_the_hyperprior_and_gates_their_means(main_of):
  means, open_rates = main_of("learned_prior")()
  assert means.shape == (30,)
  assert abs(means.mean() - 0.30) <= 0.02
  assert abs(means.std() - 0.138) <= 0.03
  assert abs(open_rates - means).max() <= 0.02


def test_an_export_runs_with_jax_alone(main_of, tmp_path):
  model = ResNet(3, (1, 1), features=4, gating="channel", gate=GateSettings(hidden=3))
  net = fold(model, model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
  for name, exported in (("float32", net), ("int8", quantise(net))):
    path = export_model(exported, tmp_path / name, input_shape=(8, 8, 3), platforms=("cpu",))
    images, outputs = main_of("load_exported")(path)
    assert images.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(
      outputs, folded.run_net(dequantise(exported), images)[0], rtol=1e-4, atol=1e-5
    )
  text = (EXAMPLES / "load_exported.py").read_text()
  assert "import gating_jax" not in text
  assert "from gating_jax" not in text


def test_a_run_is_loaded_and_answers(main_of, tmp_path):
  made = importlib.import_module("configs.digits_resnet20").get_config(
    "epochs=1,model=simple_cnn,width=0.25"
  )
  said(classification, made, tmp_path / "run", "train")
  assert main_of("load_run")(tmp_path / "run").shape == (64,)
