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
from gating_jax.data import augment, composed, tasks, video_tables
from gating_jax.data.array_cache import ArrayCache
from gating_jax.data.video_features import FeatureFolder
from gating_jax.data.video_files import VideoFolder
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops.collectives import example_keys
from gating_jax.training import settings
from gating_jax.types import Array

# The splits of a set; `validation` is held out of training.
SPLITS = ("train", "validation", "test")
SETS = (composed.NAME, "videos", "features")
LAYOUTS = ("csv", "folders", "breakfast", "charades", "multithumos")
# Layouts whose folder holds the labels.
_WITHOUT_TABLE = ("folders", "breakfast")
# Arrays of a batch that networks may look at, and those that objectives may look at.
INPUTS = ("clips", "light", "heavy", "valid", "relevant")
TARGETS = ("label", "weight", "valid", "units")
# Size of a cache, in 10^9 bytes, where a config does not say.
_CACHE_GB = 20.0
# Number folded into the key of a step, for its augmentation. Runs depend on it.
_AUGMENT = 1
# Number folded into the seed of the videos that are held out. Runs depend on it.
_HELD_OUT = 1

Batch = Mapping[str, Any]


def open_set(config: Config, split: str) -> VideoArrays | VideoSet:
  """Opens one of the `SPLITS`; `validation` is there where `holds_out` says so.

  Raises:
    ValueError: naming the field.
  """
  data = config.data
  if data.name == composed.NAME:
    videos = data.test_videos if split == "test" else data.train_videos
    if split == "validation":
      videos = max(1, round(data.validation * videos))
    return composed.make_videos(
      split,
      videos=videos,
      segments=data.segments,
      seed=config.seed,
      held_out=data.validation or 0.0,
    )
  for field in ("table", "folder"):
    if not data[field] and not (field == "table" and data.layout in _WITHOUT_TABLE):
      raise ValueError(f"data.{field} must be set for {data.name}; got {data[field]!r}")
  data = _expanded(data)
  table = _table_of_split(data, split, seed=config.seed)
  how = dict(
    segments=data.segments,
    seed=config.seed,
    # Tests always see the same frames.
    jitter=data.jitter and split == "train",
    workers=data.workers,
  )
  if data.name == "videos":
    size = (data.size, data.size)
    videos = VideoFolder(
      table, data.folder, frames=data.frames, size=size, cache=_open_cache(data), **how
    )
    # Nobody has made a table of what is whole.
    if data.layout == "folders":
      videos.check_files()
    return videos
  return FeatureFolder(table, data.folder, data.heavy_folder, **how)


def advise_segments(videos: VideoArrays | VideoSet, data: Config) -> str | None:
  """Returns a line of advice where clips are longer than films, so that segments overlap, or None.

  Args:
    videos: of training.
    data: the section of the config.
  """
  counts = videos.count_frames() if isinstance(videos, VideoFolder) else []
  if not counts:
    return None
  typical, wanted = int(np.median(counts)), data.segments * data.frames
  if typical >= wanted:
    return None
  fitting = max(1, typical // data.frames)
  return (
    f"films of about {typical} frames are shorter than data.segments x data.frames = {wanted}: "
    f"segments overlap; data.segments={fitting} fits them"
  )


def _open_cache(data: Config) -> ArrayCache | None:
  """Opens the cache of frames that a config names, or returns None.

  Raises:
    ValueError: naming the field.
  """
  if not data.cache:
    return None
  gigabytes = data.cache_gb or _CACHE_GB
  with settings.named("data.cache"):
    return ArrayCache(data.cache, round(gigabytes * 1e9))


def holds_out(data: Config) -> bool:
  """Returns whether the section `data` holds videos out of training, as the split `validation`."""
  return bool(data.validation or data.validation_split)


def _table_of_split(data: Config, split: str, *, seed: int) -> video_tables.VideoTable:
  """Reads the table of a split, of which `validation` may be a part of the training table."""
  of_file = "train" if split == "validation" and not data.validation_split else split
  if data.layout == "csv":
    for field in ("table", f"{of_file}_split"):
      if not user_path(data[field]).is_file():
        raise ValueError(f"data.{field} must be a file; there is no {data[field]!r}")
  table = _table(data, data[f"{of_file}_split"])
  if data.at_most:
    # Spread over the table, which may be sorted by class.
    count = min(data.at_most, len(table))
    table = table.take(np.linspace(0, len(table) - 1, count).astype(int))
  if of_file != "train" or not data.validation:
    return table
  held = tasks.hold_out(table.labels, data.validation, np.random.default_rng((seed, _HELD_OUT)))
  left = np.setdiff1d(np.arange(len(table)), held)
  if not len(held) or not len(left):
    raise ValueError(
      f"data.validation must leave videos in both parts of {len(table)} training videos, which "
      f"may have to be more; got {data.validation}"
    )
  return table.take(held if split == "validation" else left)


def _expanded(data: Config) -> Config:
  """Returns the settings with `~` in paths expanded."""
  given = ["table", "folder", "heavy_folder"]
  if data.layout == "csv":
    # Only here is a split a file, and may have a path.
    given += ["train_split", "test_split", "validation_split"]
  paths = {name: str(user_path(data[name])) for name in given if data[name]}
  return ml_collections.ConfigDict({**data, **paths})


def _table(data: Config, split: str) -> video_tables.VideoTable:
  if data.layout == "csv":
    return video_tables.read_table(data.table, split)
  if data.layout == "folders":
    fields = ("train_split", "test_split", "validation_split")
    in_use = [data[field] for field in fields if data[field]]
    return video_tables.read_folders(data.folder, split, in_use)
  if data.layout == "breakfast":
    return video_tables.read_breakfast(data.folder, split, segmentation=data.table)
  if data.layout == "charades":
    return video_tables.read_charades(data.table, split)
  return video_tables.read_multithumos(data.table, split)


def network_inputs(batch: Batch, data: Config, *, heavy_from: str = "heavy") -> dict[str, Array]:
  """Computes the inputs of a `SegmentNet` from a batch.

  uint8 clips are normalised, and their centre frames are for the light net.

  Args:
    batch: arrays `[B, T, ...]`, or `[N, ...]` of picked segments.
    data: the section of the config.
    heavy_from: `light` to put the light net's input in place of the heavy one's.
  """
  inputs = only(batch, ("light", "heavy", "valid", "relevant", "picked"))
  mean, std, clips = data.mean, data.std, batch.get("clips")
  if clips is not None:
    # The axis is counted from the end, [F, H, W, D], so that picked segments work, too.
    centre = jnp.take(clips, clips.shape[-4] // 2, axis=-4)
    inputs["light"] = augment.normalise(centre, mean, std)
  if heavy_from == "light":
    inputs["heavy"] = inputs["light"]
  elif clips is not None:
    inputs["heavy"] = augment.normalise(clips, mean, std)
  return inputs


def augment_clips(
  key: Array, batch: Batch, data: Config, *, axis_name: Hashable | None
) -> dict[str, Array]:
  """Augments the clips of a training batch as the config says, each video as a whole.

  Args:
    key: of the training step.
    batch: arrays `[B, T, ...]`, or `[B * S, ...]` of picked segments.
    data: the section of the config.
    axis_name: mapped device axis, over which each video has a draw of its own.
  """
  clips = batch.get("clips")
  pad, colour = data.crop_padding or 0, data.colour or 0.0
  flip = bool(data.flip)
  if clips is None or not (pad or flip or colour):
    return dict(batch)
  # The picked segments of a video are changed alike.
  videos = clips
  if "picked" in batch:
    videos = clips.reshape(*batch["picked"].shape, *clips.shape[1:])
  # Another key than that of the picked segments.
  key = jax.random.fold_in(key, _AUGMENT)
  augmented = augment.augment_videos(
    key, videos, pad=pad, flip=flip, colour=colour, axis_name=axis_name
  )
  return {**batch, "clips": augmented.reshape(clips.shape)}


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
  videos: VideoArrays | VideoSet, data: Config, *, heavy_from: str = "heavy"
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of one video's `network_inputs`, of which `heavy_from` is an argument."""
  batch = {}
  for name, shape in only(videos.shapes, INPUTS).items():
    dtype = np.uint8 if name == "clips" else np.float32
    batch[name] = jax.ShapeDtypeStruct((1, *shape), dtype)
  inputs = jax.eval_shape(lambda b: network_inputs(b, data, heavy_from=heavy_from), batch)
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
