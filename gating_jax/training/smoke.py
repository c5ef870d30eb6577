"""Smoke tests of any config: a run ends soon, with little data, few steps, tasks and layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from gating_jax import programmes
from gating_jax.config_files import Config
from gating_jax.data import composed, features, folders, image_sets, scenes, unions, worlds
from gating_jax.data import tfds as tfds_sets
from gating_jax.training import settings

# Examples of a batch, over all devices.
_BATCH = 16
_EXAMPLES = {"train": 64, "test": 32}
# Examples of a class on average, for runs of tasks: no class is then without images.
_OF_A_CLASS = {"train": 20, "test": 10}
# Videos, where these are files, and frames of a segment. Gates need as many different segments as
# they have concepts.
_VIDEOS, _FRAMES = 24, 4
# Pixels of a scene's longer side.
_SIDE = 128
# Fields of several programmes that a run's time grows with, and their largest value;
# `programmes.PROGRAMMES` has those of one.
_AT_MOST = {
  "data.image_size": 32,
  "data.workers": 1,
  "log_every": 5,
  "devices.steps_per_dispatch": 1,
}
# Networks and those that stand for them: programs of few layers compile in seconds.
_SHALLOW = {
  **dict.fromkeys((f"resnet{depth}" for depth in (14, 20, 32, 44, 56, 110)), "resnet8"),
  **dict.fromkeys(("resnet34", "resnet50", "resnet101", "resnet152"), "resnet18"),
  **dict.fromkeys((f"resnet3d{depth}" for depth in (18, 34, 50, 101)), "resnet3d10"),
  "r2plus1d18": "r2plus1d10",
  "i3d": "i3d_small",
  **dict.fromkeys(("mobilenet", "mobilenet_small"), "resnet8"),
  "vgg16": "vgg8",
}
_NAMES = ("model.name", "model.light.name", "model.heavy.name")
# Largest width of networks of images; gates of several adjacent channels need whole blocks of them.
_WIDTH = 0.375


def shrink(config: Config) -> Config:
  """Returns the config with less of everything that a run's time grows with.

  A large network becomes a small one, unless it starts from trained weights. Nets of videos that
  another run has trained are trained again. The method is unchanged. TFDS sets are opened for their
  splits and classes, and for tasks folders are listed; errors are as in `data.tfds.open_tfds` and
  `data.folders.open_folder`.

  >>> from ml_collections import ConfigDict
  >>> config = {"data": {"name": "digits", "image_size": 224}, "optim": {"epochs": 200}}
  >>> shrink(ConfigDict(config)).to_dict()
  {'data': {'image_size': 32, 'name': 'digits'}, 'optim': {'epochs': 1}}
  """
  small = config.copy_and_resolve_references().unlock()
  # Nets of another run were trained on other segments.
  _set(small, "pretrained", "")
  _shrink_scenes(small)
  _shrink_networks(small)
  row = programmes.find_row(small.get("experiment"))
  for name, most in {**_AT_MOST, **(row.small if row else {})}.items():
    # A teacher takes images of its own size alone.
    if not (name == "data.image_size" and _has_teacher(small)):
      _lower(small, name, most)
  _lower(small, "pretrain.segments_per_video", 1)
  for phase in ("optim", "pretrain"):
    _lower(small, f"{phase}.epochs", 1)
    _lower(small, f"{phase}.batch_size", _over_devices(_BATCH))
  _set(small, "optim.steps_per_task", 4)
  _set(small, "eval_every", 0.0)
  # Programs that are optimised less have no speed of interest.
  _set(small, "speed", False)
  # The first two of tasks that are listed, which have no count.
  if small.get("tasks", {}).get("classes") is not None:
    small.tasks.classes, small.tasks.count = tuple(small.tasks.classes[:2]), 0
  if small.get("gates", {}).get("when_full") == "error":
    # After a few steps of training most units are taken.
    small.gates.when_full = "reuse"
  # Splits of videos are files; digits and made scenes are small already.
  if "layout" in small.get("data", {}):
    small.data.at_most = _VIDEOS
    if small.data.name != composed.NAME:
      _lower(small, "data.frames", _FRAMES)
    else:
      # Made segments have a fixed number of frames, and an activity has a least number of segments.
      small.data.segments = min(config.data.segments, composed.MIN_SEGMENTS)
  elif unions.is_union(small.get("data", {}).get("name", "")):
    _cut_union(small)
  elif small.data.get("name") in worlds.NAMES:
    # Made images are as many as a split names.
    for split, count in _EXAMPLES.items():
      small.data[f"{split}_split"] = f"{split}[:{count}]"
  elif small.data.get("name") not in (image_sets.DIGITS, scenes.MADE):
    _cut_splits(small)
  return small.lock()


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
  """Lets XLA leave out most optimisations: compiling programs of few steps is most of their time.

  >>> with compiling_quickly():
  ...   jax.config.read("jax_disable_most_optimizations")
  True
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  try:
    yield
  finally:
    jax.config.update(name, before)


def _over_devices(size: int) -> int:
  """Rounds the size down to a multiple of the devices; up to their number where it is below."""
  return max(1, size // jax.device_count()) * jax.device_count()


def _lower(config: Config, name: str, most: float) -> None:
  """Sets a field to at most `most`, where it is there.

  A count of 0 tasks stands for all of them, and is replaced too; any other 0 stays.
  """
  section, field = _place(config, name)
  if (
    section is not None
    and isinstance(section[field], (int, float))
    and (section[field] > most or section[field] == 0 and name == "tasks.count")
  ):
    section[field] = most


def _has_teacher(config: Config) -> bool:
  """Returns whether a trained network teaches that of the config."""
  return config.get("loss", {}).get("distillation", {}).get("coefficient") is not None


def _set(config: Config, name: str, value: Any) -> None:
  section, field = _place(config, name)
  if section is not None:
    section[field] = value


def _place(config: Config, name: str) -> tuple[Config | None, str]:
  """Returns the section that has a field, or None, and the field's own name."""
  *sections, field = name.split(".")
  for each in sections:
    config = config.get(each, {})
  return (config if field in config else None), field


def _shrink_scenes(config: Config) -> None:
  """Scales scenes and their crops by one factor, to at most `_SIDE` pixels."""
  data = config.get("data", {})
  whole = data.get("size")
  if not isinstance(whole, tuple) or max(whole) <= _SIDE:
    return
  factor = _SIDE / max(whole)
  for field in ("size", "crop"):
    if data[field] is not None:
      data[field] = tuple(round(factor * side) for side in data[field])


def _shrink_networks(config: Config) -> None:
  """Makes deep networks shallow and wide ones narrow, unless they start from trained weights."""
  if config.get("model", {}).get("init_from"):
    return
  for name in _NAMES:
    section, field = _place(config, name)
    if section is not None and section[field] in _SHALLOW:
      section[field] = _SHALLOW[section[field]]
  model = config.get("model", {})
  # At a small width no fraction of gates may be as cheap as the network that is wanted.
  solved = model.get("equal_inner_width") is not None
  if model.get("gate", {}).get("block", 1) == 1 and not solved:
    _lower(config, "model.width", _WIDTH)


def _cut_splits(config: Config) -> None:
  """Cuts the splits of a folder or a TFDS set to their first examples.

  TFDS has shuffled its examples; those of a folder are some of each class.
  """
  data, read = config.data, {}
  if data.name == folders.FOLDER:
    _cut_folder(config)
    return
  if "tasks" in config:
    read = {settings.feature_names(data)[1]: features.ImageClass}
  for split, count in _EXAMPLES.items():
    field = f"{split}_split"
    source = tfds_sets.open_tfds(data.name, data[field], data.data_dir, readers=read)
    if "tasks" in config:
      count = _OF_A_CLASS[split] * len(source.class_names)
    data[field] = _first(data[field], count, source.dataset_info.splits)


def _cut_folder(config: Config) -> None:
  """Cuts the splits of a folder, before any image is opened."""
  data = config.data
  whole = {split: data[f"{split}_split"] for split in _EXAMPLES}
  for split, count in _EXAMPLES.items():
    if "tasks" in config:
      count = _OF_A_CLASS[split] * folders.count_classes(data.data_dir, list(whole.values()))
    data[f"{split}_split"] = folders.first_of(whole[split], count)


def _cut_union(config: Config) -> None:
  """Cuts the splits of the folders and TFDS sets of a union, and the images of each in an epoch."""
  data = config.data
  data.images_per_set = _EXAMPLES["train"]
  # Made sets are small already.
  kept = (*unions.MADE, *image_sets.MADE)
  for split, count in _EXAMPLES.items():
    cut = []
    whole = unions.splits_of(data.name, data[f"{split}_split"])
    for part, of_part in zip(unions.parts_of(data.name), whole, strict=True):
      if part.startswith(f"{folders.FOLDER}:"):
        of_part = folders.first_of(of_part, count)
      elif part not in kept:
        source = tfds_sets.open_tfds(part, of_part, data.data_dir, readers={})
        of_part = _first(of_part, count, source.dataset_info.splits)
      cut.append(of_part)
    data[f"{split}_split"] = unions.join_splits(cut)


def _first(split: str, count: int, splits: Any) -> str:
  """Returns the first examples of any TFDS split: of `train[80%:]`, `train[800:864]`."""
  # Imported here: it loads slowly.
  import tensorflow_datasets as tfds

  parts = []
  for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits):
    begin = part.from_ or 0
    end = splits[part.splitname].num_examples if part.to is None else part.to
    taken = min(count, end - begin)
    count -= taken
    if taken:
      parts.append(f"{part.splitname}[{begin}:{begin + taken}]")
  return "+".join(parts)
