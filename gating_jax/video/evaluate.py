"""Features and test results of a network for long videos, on a whole set.

Axes: M videos, T segments, C features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.data import batches
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.ops import confidence, selection
from gating_jax.ops.macs import executed_macs
from gating_jax.training import devices, evaluation, hosts
from gating_jax.types import Array
from gating_jax.video import metrics, sets
from gating_jax.video.build import VideoExperiment

Arrays = dict[str, np.ndarray]


def extract_features(
  experiment: VideoExperiment, variables: Any, nets: Sequence[str] = ("light", "heavy")
) -> VideoArrays:
  """Returns the training set with the nets' features in place of their inputs.

  Args:
    experiment: of the network.
    variables: of the nets.
    nets: names of the nets.
  """
  features = lambda variables, batch: _features(experiment, variables, batch, nets)[1]
  train = experiment.train
  return VideoArrays(
    _over(experiment, features, variables, train), train.class_names, train.names, train.unit_names
  )


def test(experiment: VideoExperiment, variables: Any) -> tuple[dict[str, Any], Arrays]:
  """Tests the whole network on every test video once.

  Videos that could not be read are counted and left out.

  Returns:
    `(result, arrays)`: the scores by name, and outputs and gates of each video that was read.
  Raises:
    ValueError: no test video could be read.
  """
  config, test_set = experiment.config, experiment.test
  if config.model.selection == "prefix":
    done = _exit_early(experiment, variables)
  else:
    done = _over(experiment, lambda v, batch: outcome(experiment, v, batch), variables, test_set)
  # Weight 0 marks a video that could not be read.
  read = done["weight"] > 0
  done = {name: values[read] for name, values in done.items()} | {"index": np.flatnonzero(read)}
  if not read.any():
    raise ValueError(f"none of {len(read)} test videos could be read")
  macs = experiment.counts.per_video(done["gates"], done["valid"], done["heavy_macs"])
  everything = experiment.reference.all_valid(done["valid"])
  report = metrics.segment_report(
    done["gates"],
    done["valid"],
    done["label"],
    relevant=done.get("relevant"),
    class_names=test_set.class_names,
  )
  result = {
    "videos": len(macs),
    "unreadable": int(np.sum(~read)),
    "missing": len(getattr(test_set, "missing", ())),
    **_score(test_set, done),
    **{name: value for name, value in dataclasses.asdict(report).items() if value is not None},
    "macs": float(macs.mean()),
    "all_segments_macs": everything,
    "mac_ratio": float(macs.mean()) / everything,
    "heavy_macs": experiment.counts.heavy.macs,
    "light_macs": experiment.counts.light.macs,
    "gate_macs": experiment.counts.selector,
  }
  return result, done


def _score(test_set: VideoArrays | VideoSet, done: Arrays) -> dict[str, Any]:
  # With several labels a video is neither right nor wrong: no accuracy.
  if not test_set.multi_label:
    return {"accuracy": float(np.mean(np.argmax(done["logits"], axis=1) == done["label"]))}
  score = metrics.mean_average_precision(
    done["logits"], done["label"], class_names=test_set.class_names
  )
  return {"mean_average_precision": score.mean, "classes_left_out": list(score.left_out)}


def outcome(
  experiment: VideoExperiment, variables: Any, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Computes logits, gates and heavy MACs of each video of a batch.

  Returns:
    `logits` `[B, classes]`; `gates`, `probs` and `heavy_macs` `[B, T]`; and, if the heavy net has
    channel gates, `channels`, `[B, layers, BINS]` counts of open probabilities in chosen segments.
  """
  outputs, (record, *channels) = experiment.model.apply(variables, experiment.prepare(batch))
  found = {
    "logits": outputs["logits"],
    "gates": record.gates,
    "probs": record.probs,
    "heavy_macs": _heavy_macs(experiment, channels, record.gates.shape),
  }
  if channels:
    # Counts, not probabilities: a set has one of these for each channel, segment and video.
    probs = [c.probs.reshape(*record.gates.shape, -1) for c in channels]
    found["channels"] = jnp.stack([bin_counts(p, record.gates > 0) for p in probs], axis=1)
  return found


def bin_counts(probs: Array, chosen: Array) -> Array:
  """Counts probabilities `[B, T, C]` over [0, 1] in bins, within the chosen segments `[B, T]`.

  Returns:
    `[B, BINS]` histograms, one for each video.
  """
  edges = np.linspace(0, 1, evaluation.BINS + 1, dtype=np.float32)[1:-1]
  count = lambda here: jnp.sum(here & chosen[..., None], axis=(1, 2))
  # One edge after the other, so that no array with an axis of edges is kept.
  below = jax.lax.map(lambda edge: count(probs < edge), edges)
  # Cumulative counts up to each edge; their differences are the bins.
  return jnp.diff(jnp.concatenate([below, count(probs <= 1)[None]]), axis=0, prepend=0).T


def _heavy_macs(experiment: VideoExperiment, channels: Any, shape: tuple[int, int]) -> jax.Array:
  heavy = experiment.counts.heavy
  executed = (
    executed_macs(tuple(channels)).reshape(shape)
    if channels
    else np.zeros(shape, np.float32) + heavy.gated
  )
  return executed + float(heavy.always_macs)


def _features(
  experiment: VideoExperiment, variables: Any, batch: Mapping[str, jax.Array], nets: Sequence[str]
) -> tuple[Any, dict[str, jax.Array]]:
  """Returns the channel records of the last of the nets, and the features of all."""
  inputs, found, records = experiment.prepare(batch), {}, ()
  for name in nets:
    if (net := getattr(experiment.model, name)) is not None:
      # A net alone: its part of the variables, without the name under which the whole holds it.
      own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
      x = inputs[name]
      y, records = net.apply(own, x.reshape(-1, *x.shape[2:]))
      found[name] = y.reshape(*x.shape[:2], -1)
  return records, found


def _exit_early(experiment: VideoExperiment, variables: Any) -> Arrays:
  """Runs FrameExit: segments one by one in their order until the classifier is sure.

  The threshold is the one that meets the budget on the training videos.
  """
  model, multi_label = experiment.model, experiment.test.multi_label
  segments = experiment.counts.segments

  def steps(variables, batch):
    """Returns the logits after each segment, `[B, T, classes]`, and the MACs of a batch."""
    records, found = _features(experiment, variables, batch, ("heavy",))
    classify = lambda k: model.apply(
      variables, found["heavy"], selection.first_k(batch["valid"], k), method="classify"
    )
    return {
      # The heavy net runs once; the classifier sees each prefix of its features.
      "steps": jnp.stack([classify(k + 1) for k in range(segments)], axis=1),
      "heavy_macs": _heavy_macs(experiment, records, batch["valid"].shape),
    }

  train, done = (
    _over(experiment, steps, variables, videos) for videos in (experiment.train, experiment.test)
  )
  counts = lambda arrays: arrays["valid"].sum(axis=1)
  train = {name: values[train["weight"] > 0] for name, values in train.items()}
  # No budget is below one segment of every video.
  one_each = float(np.mean(1 / counts(train)))
  threshold = confidence.step_threshold_for_budget(
    train["steps"],
    counts(train),
    share=max(experiment.config.model.segment_fraction, one_each),
    multi_label=multi_label,
  )
  seen = confidence.exit_steps(
    done["steps"], counts(done), threshold=threshold, multi_label=multi_label
  )
  gates = np.asarray(selection.first_k(done["valid"], seen))
  return done | {
    "gates": gates,
    # Nothing is drawn: a segment is seen, or it is not.
    "probs": gates,
    "logits": done["steps"][np.arange(len(seen)), seen - 1],
  }


def _over(
  experiment: VideoExperiment, fn: Callable, variables: Any, videos: VideoArrays | VideoSet
) -> Arrays:
  """Computes `fn(variables, batch)` for every video once.

  The result also has the videos' own arrays that are not inputs of networks.
  """
  config = experiment.config
  inputs = lambda batch: {name: values for name, values in batch.items() if name in sets.INPUTS}
  run = devices.map_over_devices(
    fn,
    args=(devices.REPLICATED, devices.BATCH),
    results=devices.BATCH,
    backend=config.devices.backend,
  )
  parts = []
  for batch, count in batches.padded_batches(videos, config.optim.batch_size):
    kept = {
      name: batch[name]
      for name in ("valid", "label", "weight", "units", "relevant")
      if name in batch
    }
    found = hosts.allgather(run(variables, hosts.local_shard(inputs(batch))))
    part = kept | jax.device_get(dict(found))
    # `padded_batches` pads the last batch; its padding is cut off.
    parts.append({name: values[:count] for name, values in part.items()})
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
