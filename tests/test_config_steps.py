"""Every config, in a tiny size, builds, matches its counts, and takes two steps on made data."""

import importlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gating_jax.continual import build as continual_build
from gating_jax.continual.training import make_advance
from gating_jax.data import tfds
from gating_jax.images import classification, segmentation
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnets, vggs, video_backbones
from gating_jax.training import devices, steps
from gating_jax.video import build as video_build
from gating_jax.video.run import LongVideo
from tests.helpers import tiny_cli
from tests.helpers.config_files import FILES
from tests.helpers.stand_ins import video_files

RANDOM = np.random.default_rng(0)
BATCH = 8


class Source(list):
  """Examples of a TFDS set as they are read, with their metadata."""

  def __init__(self, examples, shape, names):
    super().__init__(examples)
    self.shape, self.class_names = shape, tuple(names)
    self.dataset_info = SimpleNamespace(features={"image": SimpleNamespace(shape=shape)})


def source(name, split, *_, **__):
  """Makes images with the set's channels, classes and, where they differ in it, sizes."""
  if name == "cityscapes":
    labels = RANDOM.choice([7, 26, 0], (16, 12, 16, 1)).astype(np.uint8)
    return [
      {"image_left": np.repeat(label * 5, 3, axis=-1), "segmentation_label": label}
      for label in labels
    ]
  depth, classes = (
    1 if "mnist" in name else 3,
    {"imagenet2012": 1000, "tiny_imagenet50": 50}.get(name, 10),
  )
  sides = (9, 12) if name == "imagenet2012" else (8, 8)
  image = lambda i: RANDOM.integers(
    0, 256, (sides[i % 2], sides[-1 - i % 2], depth), dtype=np.uint8
  )
  examples = [
    {"image": image(i), "label": i % classes} for i in range(20 * classes if classes < 1000 else 40)
  ]
  side = None if name == "imagenet2012" else 8
  return Source(examples, (side, side, depth), [str(c) for c in range(classes)])


@pytest.fixture
def config(monkeypatch, tmp_path):
  """Returns `name -> config`, with networks of one or two blocks and made data."""
  monkeypatch.setattr(tfds, "open_tfds", source)
  net = resnets.NamedResNet("cifar", BasicBlock, (1, 1), 4, "B")
  monkeypatch.setitem(resnets.RESNETS, "tiny", net)
  monkeypatch.setitem(vggs.VGGS, "tiny_chain", (4, vggs.POOL, 4))
  monkeypatch.setitem(video_backbones.LIGHT_NETS, "tiny", tiny_cli.TINY_LIGHT)
  monkeypatch.setitem(video_backbones.HEAVY_NETS, "tiny", tiny_cli.TINY_HEAVY)

  def make(name):
    made = importlib.import_module(f"configs.{name}").get_config()
    chain = made.experiment == "continual" and made.model.name in vggs.VGGS
    changes = {"optim.batch_size": BATCH, "optim.epochs": 1}
    if made.experiment == "long_video":
      changes |= {
        "training": "end_to_end",
        "optim.epochs": 2,
        "data.train_videos": 8,
        "data.test_videos": 8,
        "data.segments": 14,
        "data.workers": 0,
        "pretrain.batch_size": BATCH,
        "model.gate.concepts": 4,
        "model.gate.hidden": 4,
      }
      if made.model.light.name != "features":
        changes |= {
          "model.light.name": "tiny",
          "model.heavy.name": "tiny",
          "model.heavy.stem": None,
        }
      changes |= video_files(tmp_path, made.data.name)
      if made.data.name == "videos":
        changes |= {"data.size": 8, "data.frames": 4, "data.segments": 3}
    else:
      changes |= {"model.name": "tiny_chain" if chain else "tiny", "model.width": 1.0}
    if made.experiment == "segmentation":
      changes |= {
        "data.size": (12, 16),
        "data.train_scenes": 16,
        "data.test_scenes": 8,
        "data.workers": 0,
        "data.crop": made.data.crop and (8, 8),
        "model.head": 8,
      }
    if made.experiment == "continual":
      changes |= {
        "tasks.count": 2,
        "optim.eval_batch_size": BATCH,
        "gates.threshold": 0.5,
        "router.steps": 2,
      }
    if made.data.name == "worlds":
      changes |= {"data.train_split": "train[:64]", "data.test_split": "test[:64]"}
    if made.experiment == "classification" and made.data.image_size:
      changes |= {"data.image_size": 8, "data.workers": 0}
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  return make


def images(made, build, kind):
  built = build(made)
  fresh = lambda: steps.init_state(built.model, built.optimiser, made.seed, built.test.shape)
  return (
    fresh,
    kind(built).make_advance(built.open_train(), 0),
    (built.counts.params + built.counts.gate_params),
  )


def tasks(made):
  built = continual_build.build(made)
  return built.fresh, make_advance(built)(0), None


def videos(made):
  built = video_build.build(made)
  phase = built.training
  fresh = lambda: steps.init_state(phase.model, phase.optimiser, made.seed, phase.shapes)
  return fresh, LongVideo(built).make_advance(phase, built.train, 0), None


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_config_takes_two_steps(name, config):
  made = config(name)
  parts = {
    "classification": lambda: images(made, classification.build, classification.Classification),
    "segmentation": lambda: images(made, segmentation.build, segmentation.Segmentation),
    "continual": lambda: tasks(made),
    "long_video": lambda: videos(made),
  }
  fresh, advance, params = parts[made.experiment]()
  abstract = jax.eval_shape(fresh)
  sizes = [leaf.size for leaf in jax.tree.leaves(abstract.params)]
  assert params is None or sum(sizes) == params
  began = jax.device_get(fresh())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), began) == jax.tree.map(
    lambda x: (x.shape, x.dtype), abstract
  )
  state = devices.replicate(began)
  for step in range(2):
    state, metrics = advance(state, step)
    assert np.isfinite(np.asarray(metrics["loss"])).all()
  assert int(state.step) == 2
  moved = [
    not np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(began.params), jax.tree.leaves(jax.device_get(state.params)), strict=True
    )
  ]
  assert sum(moved) > len(moved) / 2
