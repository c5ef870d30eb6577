"""From a file of weights and a folder of pictures to an exported net, by a page's commands."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gating_jax import ResNet, load_exported, save_pretrained
from gating_jax.data import streaming
from gating_jax.data.image_sets import SetSource
from gating_jax.images import export
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnets
from gating_jax.models.resnets import NamedResNet
from gating_jax.reports import timings
from tests.helpers import ROOT
from tests.helpers.command import run_command
from tests.helpers.doc_blocks import commands

# A small net of the kind that torchvision has.
SMALL = NamedResNet("imagenet", BasicBlock, (1, 1), 4, "B")
SIZE = 32
CLASSES = ("cat", "dog")


def write_pictures(folder):
  """Writes JPEGs of two classes, grey ones and bright ones, of several sizes."""
  rng = np.random.default_rng(0)
  for split, count in (("train", 24), ("test", 8)):
    for number, name in enumerate(CLASSES):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        height, width = rng.integers(36, 60, 2)
        pixels = rng.integers(0, 120, (height, width, 3)) + 130 * number
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.jpg")


def write_weights(file):
  """Writes weights of the small net, for three classes."""
  model = ResNet(3, SMALL.blocks, features=SMALL.features, stem="imagenet", shortcut="B")
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
  return save_pretrained(variables, file, model)


def end_of(*arguments):
  """Runs a command; returns what it says last, behind its progress."""
  status, said = run_command(*arguments)
  assert status == 0, said
  return said[-2000:]


@pytest.mark.slow
def test_three_commands_lead_from_weights_and_pictures_to_an_exported_net(tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "small", SMALL)
  for module in (export, timings):
    monkeypatch.setattr(module, "_REPEATS", 1)
  # Times of a net this small, measured once, say nothing.
  monkeypatch.setattr(timings, "MAX_EFFICIENCY", 100.0)
  pictures, run = tmp_path / "my images", tmp_path / "run"
  write_pictures(pictures)
  weights = write_weights(tmp_path / "small.safetensors")
  train, compiling, exporting = commands("docs/gate_a_pretrained_net.md")[:3]
  given = {
    **dict(train),
    "config": ROOT / "configs/imagenet_resnet18.py",
    "workdir": run,
    "config.data.data_dir": pictures,
    "config.model.init_from": weights,
    # What makes it quick.
    "config.data.image_size": SIZE,
    "config.data.workers": 1,
    "config.model.name": "small",
    "config.optim.epochs": 2,
    "config.optim.batch_size": 16,
  }
  assert given["mode"] == "train"
  end = end_of(*[f"--{name}={value}" for name, value in given.items()])
  assert f"{run / 'report.html'}" in end
  assert f"next: gating-jax --workdir={run} --mode=compile" in end
  assert dict(compiling) == {"workdir": dict(train)["workdir"], "mode": "compile"}
  end = end_of(f"--workdir={run}", "--mode=compile")
  assert re.search(r"\n  made +.*compile\.json", end)
  assert f"next: gating-jax --workdir={run} --mode=export" in end
  assert dict(exporting) == {"workdir": dict(train)["workdir"], "mode": "export"}
  end = end_of(f"--workdir={run}", "--mode=export")
  assert re.search(r"\n  .*/run/export/model\.onnx ", end)
  assert f"next: python {run / 'export' / 'load.py'} IMAGE " in end

  # What the exported files compute of the test pictures, by their own script.
  monkeypatch.chdir(run / "export")
  script = runpy.run_path("load.py")
  compute, prepare = script["load"](), script["prepare"]
  card = load_exported(".").card
  test = streaming.open_stream(SetSource("folder", "test", str(pictures)), image_size=SIZE)
  pixels, labels = test.read(np.arange(len(test)))
  inputs = np.float32((pixels / 255 - np.array(card["mean"])) / np.array(card["std"]))
  logits, _ = compute(inputs)
  np.testing.assert_allclose(logits, load_exported(".")(inputs)[0], rtol=1e-4, atol=1e-4)
  assert np.mean(np.argmax(logits, axis=1) == labels) == pytest.approx(card["accuracy"])
  result = json.loads((run / "result.json").read_text())
  assert card["accuracy_as_trained"] == pytest.approx(result["accuracy"])
  # One picture, from its file.
  picture = sorted((pictures / "test" / "cat").iterdir())[0]
  answer = card["class_names"][int(np.argmax(compute(prepare(picture)[None])[0]))]
  done = subprocess.run(
    [sys.executable, "load.py", str(picture)], capture_output=True, text=True, check=True
  )
  assert done.stdout == f"{picture} {answer}\n"
  # Nothing in the folder says where the pictures and the weights were.
  for name in ("card.json", "config.json", "README.md"):
    assert str(tmp_path) not in Path(name).read_text("utf-8")
