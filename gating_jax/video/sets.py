"""Sets of videos that a config names, and their arrays as networks take them.

Axes: B videos, T segments, S picked ones, F frames, H and W pixels, D channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.data import augment, composed, video_tables
from gating_jax.data.video_features import FeatureFolder
from gating_jax.data.video_files import VideoFolder
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops.collectives import example_keys
from gating_jax.types import Array

SETS = (composed.NAME, "videos", "features")
LAYOUTS = ("csv", "folders", "breakfast", "charades", "multithumos")
# Layouts whose folder holds the labels.
_WITHOUT_TABLE = ("folders", "breakfast")
# Arrays of a batch that networks may look at, and those that objectives may look at.
INPUTS = ("clips", "light", "heavy", "valid", "relevant")
TARGETS = ("label", "weight", "valid", "units")

Batch = Mapping[str, Any]


def open_set(config: Config, split: str) -> VideoArrays | VideoSet:
  """Opens the `train` or `test` set.

  Raises:
    ValueError: naming the field.
  """
  data = config.data
  if data.name == composed.NAME:
    return composed.make_videos(
      split, videos=data[f"{split}_videos"], segments=data.segments, seed=config.seed
    )
  for field in ("table", "folder"):
    if not data[field] and not (field == "table" and data.layout in _WITHOUT_TABLE):
      raise ValueError(f"data.{field} must be set for {data.name}; got {data[field]!r}")
  data = _expanded(data)
  table = _table(data, data[f"{split}_split"])
  if data.get("at_most"):
    # Spread over the table, which may be sorted by class.
    count = min(data.at_most, len(table))
    table = table.take(np.linspace(0, len(table) - 1, count).astype(int))
  how = dict(
    segments=data.segments,
    seed=config.seed,
    # Tests always see the same frames.
    jitter=data.jitter and split == "train",
    workers=data.workers,
  )
  if data.name == "videos":
    return VideoFolder(table, data.folder, frames=data.frames, size=(data.size, data.size), **how)
  return FeatureFolder(table, data.folder, data.heavy_folder, **how)


def _expanded(data: Config) -> Config:
  """Returns the settings with `~` in paths expanded."""
  given = ["table", "folder", "heavy_folder"]
  if data.layout == "csv":
    # Only here is a split a file, and may have a path.
    given += ["train_split", "test_split"]
  paths = {name: str(user_path(data[name])) for name in given if data[name]}
  return ml_collections.ConfigDict({**data, **paths})


def _table(data: Config, split: str) -> video_tables.VideoTable:
  if data.layout == "csv":
    return video_tables.read_table(data.table, split)
  if data.layout == "folders":
    return video_tables.read_folders(data.folder, split)
  if data.layout == "breakfast":
    return video_tables.read_breakfast(data.folder, split, segmentation=data.table)
  if data.layout == "charades":
    return video_tables.read_charades(data.table, split)
  return video_tables.read_multithumos(data.table, split)


def network_inputs(batch: Batch, config: Config, *, heavy_from: str = "heavy") -> dict[str, Array]:
  """Computes the inputs of a `SegmentNet` from a batch.

  uint8 clips are normalised, and their centre frames are for the light net.

  Args:
    batch: arrays `[B, T, ...]`, or `[N, ...]` of picked segments.
    config: the config of the run.
    heavy_from: `light` to put the light net's input in place of the heavy one's.
  """
  inputs = only(batch, ("light", "heavy", "valid", "relevant", "picked"))
  mean, std, clips = config.data.mean, config.data.std, batch.get("clips")
  if clips is not None:
    # The axis is counted from the end, [F, H, W, D], so that picked segments work, too.
    centre = jnp.take(clips, clips.shape[-4] // 2, axis=-4)
    inputs["light"] = augment.normalise(centre, mean, std)
  if heavy_from == "light":
    inputs["heavy"] = inputs["light"]
  elif clips is not None:
    inputs["heavy"] = augment.normalise(clips, mean, std)
  return inputs


def pick_segments(
  key: Array, batch: Batch, count: int, axis_name: Hashable | None
) -> dict[str, Array]:
  """Picks `count` random valid segments of each video, as examples of their own.

  Videos with fewer segments give some of them twice.

  Args:
    key: key of the random choice.
    batch: arrays `[B, T, ...]`.
    count: S.
    axis_name: mapped device axis, over which each video has a key of its own.
  Returns:
    Arrays `[B * S, ...]`, and `picked` `[B, S]`, the indices of the segments.
  """
  valid = batch["valid"]
  keys = example_keys(key, valid.shape[0], axis_name)
  random = jax.vmap(lambda key: jax.random.uniform(key, valid.shape[1:]))(keys)
  # Random numbers below 1, plus 1 for padding: valid segments come first, in random order.
  order = jnp.argsort(random + ~valid, axis=1)
  # Modulo the number of valid segments: a short video starts again from its first.
  places = jnp.arange(count)[None] % jnp.sum(valid, axis=1, keepdims=True)
  picked = jnp.take_along_axis(order, places, axis=1)
  rows = jnp.arange(valid.shape[0])[:, None]
  segments = {}
  for name, x in only(batch, ("clips", "light", "heavy")).items():
    segments[name] = x[rows, picked].reshape(-1, *x.shape[2:])
  return {**segments, "picked": picked}


def network_shapes(
  videos: VideoArrays | VideoSet, config: Config, *, heavy_from: str = "heavy"
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of one video's `network_inputs`, of which `heavy_from` is an argument."""
  batch = {}
  for name, shape in only(videos.shapes, INPUTS).items():
    dtype = np.uint8 if name == "clips" else np.float32
    batch[name] = jax.ShapeDtypeStruct((1, *shape), dtype)
  inputs = jax.eval_shape(lambda b: network_inputs(b, config, heavy_from=heavy_from), batch)
  return {name: x.shape[1:] for name, x in inputs.items()}


def feature_shapes(
  model: SegmentNet, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of one video's inputs, if both nets' features take their place."""
  featured = {name: shape for name, shape in shapes.items() if name not in ("light", "heavy")}
  for name, net in (("light", model.light), ("heavy", model.heavy)):
    if net is not None:
      featured[name] = (*shapes["valid"], *_feature_shape(net, shapes[name][1:]))
  return featured


def _feature_shape(net: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of the features that a net computes from one segment of this shape."""
  # Traced alone, outside its module and without devices: only the shape is needed.
  alone = net.clone(parent=None, axis_name=None)

  def compute_features(x):
    """Returns the features `[1, ...]` of inputs `[1, ...]`."""
    (features, _), _ = alone.init_with_output(jax.random.key(0), x)
    return features

  segment = jax.ShapeDtypeStruct((1, *shape), np.float32)
  return jax.eval_shape(compute_features, segment).shape[1:]


def examples(batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a batch's arrays into `(inputs, targets)` of a training step."""
  return only(batch, INPUTS), only(batch, TARGETS)


def only(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
  """Returns the named arrays of a batch, those that it has."""
  return {name: batch[name] for name in names if name in batch}
