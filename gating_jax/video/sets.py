"""The sets of videos that a config names, and their arrays as networks take them.

Axes: B videos, T segments, S picked ones, F frames, H and W pixels, D channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gating_jax.data import augment, composed, video_layouts, video_tables
from gating_jax.data.video_arrays import VideoArrays
from gating_jax.data.videos import FeatureFolder, VideoFolder, VideoSet
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops.collectives import example_keys
from gating_jax.paths import user_path
from gating_jax.types import Array

SETS = (composed.NAME, "videos", "features")
LAYOUTS = ("csv", "breakfast", "charades", "multithumos")
INPUTS = (
  "clips",
  "light",
  "heavy",
  "valid",
  "relevant",
)  # of a batch's arrays, what networks may look at
TARGETS = ("label", "weight", "valid", "units")  # and what objectives may

Batch = Mapping[str, Any]


def open_set(config: ml_collections.ConfigDict, split: str) -> VideoArrays | VideoSet:
  """The `train` or `test` set. Raises ValueError naming the field."""
  data = config.data
  if data.name == composed.NAME:
    return composed.composed(
      split, videos=data[f"{split}_videos"], segments=data.segments, seed=config.seed
    )
  for field in ("table", "folder"):
    if not data[field] and not (field == "table" and data.layout == "breakfast"):
      raise ValueError(f"data.{field} must be set for {data.name}; got {data[field]!r}")
  data = _expanded(data)
  table = _table(data, data[f"{split}_split"])
  if data.get("at_most"):
    table = table.take(np.linspace(0, len(table) - 1, min(data.at_most, len(table))).astype(int))
  how = dict(
    segments=data.segments,
    seed=config.seed,
    jitter=data.jitter and split == "train",
    workers=data.workers,
  )
  if data.name == "videos":
    return VideoFolder(table, data.folder, frames=data.frames, size=(data.size, data.size), **how)
  return FeatureFolder(table, data.folder, data.heavy_folder, **how)


def _expanded(data: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """With `~` in paths expanded."""
  given = ["table", "folder", "heavy_folder"]
  if data.layout == "csv":
    given += ["train_split", "test_split"]
  return ml_collections.ConfigDict(
    {**data, **{name: str(user_path(data[name])) for name in given if data[name]}}
  )


def _table(data: ml_collections.ConfigDict, split: str) -> video_tables.VideoTable:
  if data.layout == "csv":
    return video_tables.read_table(data.table, split)
  if data.layout == "breakfast":
    return video_layouts.read_breakfast(data.folder, split, segmentation=data.table)
  return {"charades": video_layouts.read_charades, "multithumos": video_layouts.read_multithumos}[
    data.layout
  ](data.table, split)


def network_inputs(
  batch: Batch, config: ml_collections.ConfigDict, *, light_alone: bool = False
) -> dict[str, Array]:
  """What a `SegmentNet` takes: uint8 clips normalised, and their centre frames for the light net.

  `light_alone` puts what the light net sees in the heavy one's place.
  """
  inputs = {
    name: batch[name] for name in ("light", "heavy", "valid", "relevant", "picked") if name in batch
  }
  if "clips" in batch:
    clips = batch["clips"]
    normalise = lambda pixels: augment.normalise(pixels, config.data.mean, config.data.std)
    inputs["light"] = normalise(jnp.take(clips, clips.shape[-4] // 2, axis=-4))
    inputs["heavy"] = inputs["light"] if light_alone else normalise(clips)
  elif light_alone:
    inputs["heavy"] = inputs["light"]
  return inputs


def pick_segments(
  key: Array, batch: Batch, count: int, axis_name: Hashable | None
) -> dict[str, Array]:
  """`count` random valid segments of each video as single ones, `[B * S, ...]`, and which, `picked` `[B, S]`; of videos
  with fewer, some twice."""
  valid = batch["valid"]
  keys = example_keys(key, valid.shape[0], axis_name)
  order = jnp.argsort(
    jax.vmap(lambda key: jax.random.uniform(key, valid.shape[1:]))(keys) + ~valid, axis=1
  )
  picked = jnp.take_along_axis(
    order, jnp.arange(count)[None] % jnp.sum(valid, axis=1, keepdims=True), axis=1
  )
  rows = jnp.arange(valid.shape[0])[:, None]
  take = lambda x: x[rows, picked].reshape(-1, *x.shape[2:])
  return {
    **{name: take(batch[name]) for name in ("clips", "light", "heavy") if name in batch},
    "picked": picked,
  }


def network_shapes(
  videos: VideoArrays | VideoSet, config: ml_collections.ConfigDict, *, light_alone: bool = False
) -> dict[str, tuple[int, ...]]:
  """Of one video's `network_inputs`."""
  batch = {
    name: jax.ShapeDtypeStruct((1, *shape), np.uint8 if name == "clips" else np.float32)
    for name, shape in videos.shapes.items()
    if name in INPUTS
  }
  inputs = jax.eval_shape(lambda b: network_inputs(b, config, light_alone=light_alone), batch)
  return {name: x.shape[1:] for name, x in inputs.items()}


def feature_shapes(
  model: SegmentNet, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
  """Of one video's inputs, once both nets' features stand in place of what they take."""
  features = {
    name: net for name, net in (("light", model.light), ("heavy", model.heavy)) if net is not None
  }
  width = lambda net, shape: jax.eval_shape(
    lambda x: net.clone(parent=None, axis_name=None).init_with_output(jax.random.key(0), x)[0][0],
    jax.ShapeDtypeStruct((1, *shape[1:]), np.float32),
  ).shape[1:]
  rest = {name: shape for name, shape in shapes.items() if name not in ("light", "heavy")}
  return {
    **rest,
    **{name: (*shapes["valid"], *width(net, shapes[name])) for name, net in features.items()},
  }


def examples(batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
  """A batch's arrays as `(inputs, targets)` of a training step."""
  return (
    {name: batch[name] for name in INPUTS if name in batch},
    {name: batch[name] for name in TARGETS if name in batch},
  )
