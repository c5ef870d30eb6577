"""Features and test results of a network for long videos, on a whole set.

Axes: M videos, T segments, C features.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.analysis import statistics
from gating_jax.data.image_sets import padded_batches
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.ops import confidence, selection
from gating_jax.training import devices, hosts
from gating_jax.types import Array, Records
from gating_jax.video import metrics, sets
from gating_jax.video.build import VideoExperiment

Arrays = dict[str, np.ndarray]
# Arrays of the videos themselves that are kept with the results of a test.
_KEPT = ("valid", "label", "weight", "units", "relevant")


def extract_features(
  experiment: VideoExperiment, variables: Any, nets: Sequence[str] = ("light", "heavy")
) -> VideoArrays:
  """Returns the training set with the nets' features in place of their inputs.

  Args:
    experiment: the experiment of the network.
    variables: variables of the nets, each under its name.
    nets: names of the nets.
  """

  def features(variables, batch):
    """Returns the features of a batch, `[B, T, C]` for each net."""
    return _features(experiment, variables, batch, nets=nets).of_net

  train = experiment.train
  arrays = _over(experiment, features, variables, videos=train)
  return VideoArrays(arrays, train.class_names, train.names, unit_names=train.unit_names)


def test_network(experiment: VideoExperiment, variables: Any) -> tuple[dict[str, Any], Arrays]:
  """Tests the whole network on every test video once.

  Videos that could not be read are counted and left out.

  Returns:
    `(result, arrays)`: the scores by name, and outputs and gates of each video that was read.
  Raises:
    ValueError: no test video could be read.
  """
  config, test_set = experiment.config, experiment.test
  if config.model.selection == "prefix":
    tested = _exit_early(experiment, variables)
  else:
    of_batch = functools.partial(outcome, experiment)
    tested = _over(experiment, of_batch, variables, videos=test_set)
  # Weight 0 marks a video that could not be read.
  read = tested["weight"] > 0
  tested = {name: values[read] for name, values in tested.items()} | {"index": np.flatnonzero(read)}
  if not read.any():
    raise ValueError(f"none of {len(read)} test videos could be read")
  macs = experiment.counts.per_video(tested["gates"], tested["valid"], tested["heavy_macs"])
  everything = experiment.reference.all_valid(tested["valid"])
  report = metrics.segment_report(
    tested["gates"],
    tested["valid"],
    tested["label"],
    relevant=tested.get("relevant"),
    class_names=test_set.class_names,
  )
  # Without ground truth the report has no agreement with it.
  segments = {name: value for name, value in vars(report).items() if value is not None}
  result = {
    "videos": len(macs),
    "unreadable": int(np.sum(~read)),
    "missing": len(getattr(test_set, "missing", ())),
    **_score(test_set, tested),
    **segments,
    "macs": float(macs.mean()),
    "all_segments_macs": everything,
    "mac_ratio": float(macs.mean()) / everything,
    "heavy_macs": experiment.counts.heavy.macs,
    "light_macs": experiment.counts.light.macs,
    "gate_macs": experiment.counts.selector,
  }
  return result, tested


def _score(test_set: VideoArrays | VideoSet, tested: Arrays) -> dict[str, Any]:
  # With several labels a video is neither right nor wrong: no accuracy.
  if not test_set.multi_label:
    return {"accuracy": float(np.mean(np.argmax(tested["logits"], axis=1) == tested["label"]))}
  score = metrics.mean_average_precision(
    tested["logits"], tested["label"], class_names=test_set.class_names
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
  results: Any = experiment.model.apply(variables, experiment.prepare(batch))
  outputs, (record, *channels) = results
  found = {
    "logits": outputs["logits"],
    "gates": record.gates,
    "probs": record.probs,
    "heavy_macs": experiment.counts.heavy.per_example(tuple(channels), record.gates.shape),
  }
  if channels:
    # Counts, not probabilities: a set has one of these for each channel, segment and video.
    counts = []
    for layer in channels:
      probs = layer.probs.reshape(*record.gates.shape, -1)
      counts.append(bin_counts(probs, record.gates > 0))
    found["channels"] = jnp.stack(counts, axis=1)
  return found


def bin_counts(probs: Array, chosen: Array) -> Array:
  """Counts probabilities `[B, T, C]` over [0, 1] in bins, within the chosen segments `[B, T]`.

  Returns:
    `[B, BINS]` histograms, one for each video.
  """
  edges = np.linspace(0, 1, statistics.BINS + 1, dtype=np.float32)[1:-1]

  def count(fits):
    """Returns the number of probabilities of each video that fit, `[B]`, in chosen segments."""
    return jnp.sum(fits & chosen[..., None], axis=(1, 2))

  # One edge after the other, so that no array with an axis of edges is kept.
  below = jax.lax.map(lambda edge: count(probs < edge), edges)
  # Cumulative counts up to each edge; their differences are the bins.
  up_to = jnp.concatenate([below, count(probs <= 1)[None]])
  return jnp.diff(up_to, axis=0, prepend=0).T


class _Features(NamedTuple):
  """Features of a batch.

  Attributes:
    of_net: `[B, T, C]` of each net, by its name.
    records: records of the channel gates of the last net.
  """

  of_net: dict[str, jax.Array]
  records: Records


def _features(
  experiment: VideoExperiment,
  variables: Any,
  batch: Mapping[str, jax.Array],
  *,
  nets: Sequence[str],
) -> _Features:
  """Runs those of the nets that the network has."""
  inputs, of_net, records = experiment.prepare(batch), {}, ()
  for name in nets:
    net = getattr(experiment.model, name)
    if net is None:
      continue
    # A net alone: its part of the variables, without the name under which the whole holds it.
    own = {kind: tree[name] for kind, tree in variables.items() if name in tree}
    x = inputs[name]
    y, records = net.apply(own, x.reshape(-1, *x.shape[2:]))
    of_net[name] = y.reshape(*x.shape[:2], -1)
  return _Features(of_net, records)


def _exit_early(experiment: VideoExperiment, variables: Any) -> Arrays:
  """Runs FrameExit: segments one by one in their order until the classifier is sure.

  The threshold is the one that meets the budget on the training videos.
  """
  model, multi_label = experiment.model, experiment.test.multi_label

  def steps(variables, batch):
    """Returns the logits after each segment, `[B, T, classes]`, and the MACs of a batch."""
    features = _features(experiment, variables, batch, nets=("heavy",))
    valid, logits = batch["valid"], []
    # The heavy net runs once; the classifier sees each prefix of its features.
    for seen in range(1, experiment.counts.segments + 1):
      first = selection.first_k(valid, seen)
      logits.append(model.apply(variables, features.of_net["heavy"], first, method="classify"))
    return {
      "steps": jnp.stack(logits, axis=1),
      "heavy_macs": experiment.counts.heavy.per_example(features.records, valid.shape),
    }

  train = _over(experiment, steps, variables, videos=experiment.train)
  tested = _over(experiment, steps, variables, videos=experiment.test)
  # Weight 0 marks a video that could not be read.
  read = train["weight"] > 0
  lengths = train["valid"][read].sum(axis=1)
  # No budget is below one segment of every video.
  one_each = float(np.mean(1 / lengths))
  threshold = confidence.step_threshold_for_budget(
    train["steps"][read],
    lengths,
    share=max(experiment.config.model.segment_fraction, one_each),
    multi_label=multi_label,
  )
  seen = confidence.exit_steps(
    tested["steps"], tested["valid"].sum(axis=1), threshold=threshold, multi_label=multi_label
  )
  gates = np.asarray(selection.first_k(tested["valid"], seen))
  return tested | {
    "gates": gates,
    # Nothing is drawn: a segment is seen, or it is not.
    "probs": gates,
    "logits": tested["steps"][np.arange(len(seen)), seen - 1],
  }


def _over(
  experiment: VideoExperiment, fn: Callable, variables: Any, *, videos: VideoArrays | VideoSet
) -> Arrays:
  """Computes `fn(variables, batch)` for every video once.

  The result also has the videos' own arrays that are not inputs of networks.
  """
  config = experiment.config
  run = devices.map_over_devices(
    fn,
    args=(devices.REPLICATED, devices.BATCH),
    results=devices.BATCH,
    backend=config.devices.backend,
  )
  parts = collections.defaultdict(list)
  for batch, count in padded_batches(videos, config.optim.batch_size):
    inputs = hosts.local_shard(sets.only(batch, sets.INPUTS))
    found = hosts.allgather(run(variables, inputs))
    part = sets.only(batch, _KEPT) | jax.device_get(dict(found))
    for name, values in part.items():
      # The last batch is padded; its padding is cut off.
      parts[name].append(values[:count])
  return {name: np.concatenate(values) for name, values in parts.items()}
