"""Features and test results of a network for long videos, on a whole set.

Axes: M videos, T segments, C features.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.analysis import scores, statistics
from gating_jax.checks import few
from gating_jax.data.image_sets import padded_batches
from gating_jax.data.shared_videos import find_shared
from gating_jax.data.videos import VideoArrays, VideoSet
from gating_jax.ops import confidence, selection
from gating_jax.terminal import warn
from gating_jax.training import devices, hosts
from gating_jax.types import Array, Records
from gating_jax.video import metrics, sets
from gating_jax.video.build import VideoExperiment

Arrays = dict[str, np.ndarray]
# Arrays of the videos themselves that are kept with the results of a test.
_KEPT = ("valid", "label", "weight", "units", "relevant")
# Splits of videos, as results name them.
TRAINING, VALIDATION, TEST = "training", "validation", "test"
# Entries of a result that are compared over splits.
_COMPARED = (
  "videos",
  "unreadable",
  "accuracy",
  "mean_average_precision",
  "share",
  "share_std",
  "share_p10",
  "share_p90",
  "mac_ratio",
)
# Unreadable videos that an error or a result names.
_NAMED = 5
# Resampled test sets for the interval of a mean average precision, which is slow.
_RESAMPLED = 50


def extract_features(
  experiment: VideoExperiment, variables: Any, nets: Sequence[str] = ("light", "heavy")
) -> VideoArrays:
  """Returns the training set with the nets' features in place of their inputs.

  The row of a video that could not be read is that of another one, since a blank one would go into
  the statistics of BatchNorm.

  Args:
    experiment: the experiment of the network.
    variables: variables of the nets, each under its name.
    nets: names of the nets.
  Raises:
    ValueError: no training video could be read; the first five are named.
  """

  def features(variables, batch):
    """Returns the features of a batch, `[B, T, C]` for each net."""
    return _features(experiment, variables, batch, nets=nets).of_net

  train = experiment.train
  program = f"features of {' and '.join(nets)}"
  arrays = compute_over(experiment, features, variables, videos=train, program=program)
  read, names = _which_read(arrays, train, TRAINING), train.names
  if not read.all():
    rows = np.arange(len(train))
    # The run's seed: a restart finds the same rows.
    rng = np.random.default_rng(experiment.config.seed)
    rows[~read] = rng.choice(np.flatnonzero(read), size=np.sum(~read))
    arrays = {name: values[rows] for name, values in arrays.items()}
    names = tuple(names[row] for row in rows)
  return VideoArrays(arrays, train.class_names, names, unit_names=train.unit_names)


def test_network(
  experiment: VideoExperiment, variables: Any, split: str
) -> tuple[dict[str, Any], Arrays]:
  """Tests the whole network on every video of a split once.

  Videos that could not be read are counted and left out, and the first five are named.

  Returns:
    `(result, arrays)`: the scores by name, and outputs and gates of each video that was read.
  Raises:
    ValueError: no test video could be read; the first five are named.
  """
  config, test_set = experiment.config, videos_of(experiment, split)
  if config.model.selection == "prefix":
    tested = _exit_early(experiment, variables, split)
  else:
    of_batch = functools.partial(outcome, experiment)
    tested = compute_over(experiment, of_batch, variables, videos=test_set, program="outcome")
  read = _which_read(tested, test_set, split)
  tested = {name: values[read] for name, values in tested.items()} | {"index": np.flatnonzero(read)}
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
    "unreadable_names": _name_unread(test_set, read),
    "missing": len(getattr(test_set, "missing", ())),
    "classes": list(test_set.class_names),
    **_score(experiment, test_set, tested),
    **segments,
    "macs": float(macs.mean()),
    "all_segments_macs": everything,
    "mac_ratio": float(macs.mean()) / everything,
    "heavy_macs": experiment.counts.heavy.macs,
    "light_macs": experiment.counts.light.macs,
    "gate_macs": experiment.counts.selector,
  }
  return result, tested


def videos_of(experiment: VideoExperiment, split: str) -> VideoArrays | VideoSet:
  """Returns the videos of a split.

  Raises:
    ValueError: no videos are held out for validation.
  """
  videos = {
    TRAINING: experiment.train,
    VALIDATION: experiment.validation,
    TEST: experiment.test,
  }[split]
  if videos is None:
    raise ValueError(f"data.validation must hold videos out for the split {split!r}; got None")
  return videos


def compare_splits(
  experiment: VideoExperiment, variables: Any, of_test: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
  """Tests the network on all splits, to show what differs on videos that training has not seen.

  Args:
    experiment: the experiment of the network.
    variables: of the whole network.
    of_test: the result on the test set.
  Returns:
    by split, its score and the fraction of segments chosen, with the spread over videos.
  """
  results = {}
  for split in (TRAINING, VALIDATION):
    results[split], _ = test_network(experiment, variables, split)
  results[TEST] = of_test
  splits = {}
  for split, result in results.items():
    splits[split] = {name: result[name] for name in _COMPARED if name in result}
  return splits


def count_unread(videos: VideoArrays | VideoSet | None, split: str) -> dict[str, Any]:
  """Counts the videos of a split that could not be read so far, and names the first five.

  Args:
    videos: of the split; None for no such split.
    split: its name, with which the entries begin.
  Returns:
    entries of a result.
  """
  # Arrays in memory have been read.
  if not isinstance(videos, VideoSet):
    return {}
  names = videos.name_unreadable()
  return {f"{split}_unreadable": len(videos.unreadable), f"{split}_unreadable_names": names}


def count_copies(
  train: VideoArrays | VideoSet,
  validation: VideoArrays | VideoSet | None,
  test: VideoArrays | VideoSet,
) -> dict[str, int | list[str]]:
  """Counts the videos whose files are, byte for byte, those of a split that a net learns from.

  Of the test videos these are copies of training videos, held out or not; of the videos held out,
  copies of the others. The first five are named, here and in a warning.

  Args:
    train, validation, test: the splits; None where no videos are held out.
  Returns:
    entries of a result; none for sets in memory, which have no files.
  """
  if not (isinstance(train, VideoSet) and isinstance(test, VideoSet)):
    return {}
  copies = dict(_copies(train, test))
  found: dict[str, int | list[str]] = {}
  if isinstance(validation, VideoSet):
    copies = dict(_copies(validation, test)) | copies
    found |= _count_copies("validation_copies", "held-out", dict(_copies(train, validation)))
  return _count_copies("copies", "test", copies) | found


def _copies(one: VideoSet, other: VideoSet) -> Iterator[tuple[str, str]]:
  """Yields the names of the second set's copies, each with the name in the first."""
  for first, name in find_shared(one, other).by_content:
    yield name, first


def _count_copies(entry: str, split: str, copies: Mapping[str, str]) -> dict[str, int | list[str]]:
  """Returns the entries of copies, by their names, and warns of them where there are any."""
  if copies:
    pairs = [f"{name} is {first}" for name, first in copies.items()]
    warn("%d %s videos are copies of training videos: %s", len(pairs), split, few(pairs, _NAMED))
  return {entry: len(copies), f"{entry}_names": list(copies)[:_NAMED]}


def _which_read(arrays: Arrays, videos: VideoArrays | VideoSet, split: str) -> np.ndarray:
  """Returns `[M]` bool: the videos that could be read.

  Raises:
    ValueError: none could; the first five are named.
  """
  # Weight 0 marks a video that could not be read.
  read = arrays["weight"] > 0
  if not read.any():
    named = few(videos.names, _NAMED)
    raise ValueError(f"none of {len(read)} {split} videos could be read: {named}")
  return read


def _name_unread(videos: VideoArrays | VideoSet, read: np.ndarray) -> list[str]:
  """Returns the names of the first five videos that could not be read."""
  return [videos.names[row] for row in np.flatnonzero(~read)[:_NAMED]]


def _score(
  experiment: VideoExperiment, test_set: VideoArrays | VideoSet, tested: Arrays
) -> dict[str, Any]:
  """Returns the score of a split, and what it is worth: see `analysis.scores`."""
  labels, logits, names = tested["label"], tested["logits"], test_set.class_names
  trained = scores.count_labels(_labels_of(experiment.train), len(names))
  # With several labels a video is neither right nor wrong: no accuracy.
  if not test_set.multi_label:
    predicted = np.argmax(logits, axis=1)
    accuracy = {"accuracy": float(np.mean(predicted == labels))}
    return accuracy | scores.score_predictions(labels, predicted, names, trained=trained)
  score = metrics.mean_average_precision(logits, labels, class_names=names)

  def score_some(index):
    """Returns the mean average precision of some of the videos."""
    return metrics.mean_average_precision(logits[index], labels[index]).mean

  of_class = {}
  for name, precision in zip(names, score.per_class.tolist(), strict=True):
    if not np.isnan(precision):
      of_class[name] = precision
  # By chance, the precision of a class is the fraction of videos that have it.
  with_class = labels.mean(axis=0)
  interval = scores.bootstrap_interval(score_some, len(labels), _RESAMPLED)
  return {
    "mean_average_precision": score.mean,
    **scores.interval_entries("mean_average_precision", interval),
    "classes_left_out": list(score.left_out),
    "classes_without_training": scores.list_untrained(trained, names),
    "class_average_precision": of_class,
    "chance_average_precision": float(with_class[with_class > 0].mean()) if of_class else 0.0,
  }


def _labels_of(videos: VideoArrays | VideoSet) -> np.ndarray:
  """Returns the labels of all videos of a set, without reading any."""
  return videos.table.labels if isinstance(videos, VideoSet) else videos.arrays["label"]


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


def _exit_early(experiment: VideoExperiment, variables: Any, split: str) -> Arrays:
  """Runs FrameExit on a split: segments one by one in their order until the classifier is sure.

  The threshold is the one that meets the budget on the validation videos, or on the training videos
  where none are held out.
  """
  model, multi_label = experiment.model, experiment.test.multi_label

  def steps(variables, batch):
    """Returns the logits after each segment, `[B, T, classes]`, and the MACs of a batch."""
    features = _features(experiment, variables, batch, nets=("heavy",))
    valid, logits = batch["valid"], []
    # The heavy net runs once; the classifier sees each prefix of its features.
    for seen in range(1, experiment.counts.segments + 1):
      first = selection.first_k(valid, k=seen)
      logits.append(model.apply(variables, features.of_net["heavy"], first, method="classify"))
    return {
      "steps": jnp.stack(logits, axis=1),
      "heavy_macs": experiment.counts.heavy.per_example(features.records, valid.shape),
    }

  held = TRAINING if experiment.validation is None else VALIDATION
  program, known_videos = "logits of each step", videos_of(experiment, held)
  known = compute_over(experiment, steps, variables, videos=known_videos, program=program)
  tested = known
  if split != held:
    videos = videos_of(experiment, split)
    tested = compute_over(experiment, steps, variables, videos=videos, program=program)
  read = _which_read(known, known_videos, held)
  lengths = known["valid"][read].sum(axis=1)
  # No budget is below one segment of every video.
  one_each = float(np.mean(1 / lengths))
  threshold = confidence.step_threshold_for_budget(
    known["steps"][read],
    lengths,
    share=max(experiment.config.model.segment_fraction, one_each),
    multi_label=multi_label,
  )
  seen = confidence.exit_steps(
    tested["steps"], tested["valid"].sum(axis=1), threshold=threshold, multi_label=multi_label
  )
  gates = np.asarray(selection.first_k(tested["valid"], k=seen))
  return tested | {
    "gates": gates,
    # Nothing is drawn: a segment is seen, or it is not.
    "probs": gates,
    "logits": tested["steps"][np.arange(len(seen)), seen - 1],
  }


def compute_over(
  experiment: VideoExperiment,
  fn: Callable,
  variables: Any,
  *,
  videos: VideoArrays | VideoSet,
  program: str,
) -> Arrays:
  """Computes `fn(variables, batch)` for every video once.

  The result also has the videos' own arrays that are not inputs of networks.

  Args:
    experiment: the experiment of the network.
    fn: a function of arrays and of nothing else that changes.
    variables: its first argument.
    videos: read in batches.
    program: the name of `fn`, by which later calls find it compiled.
  """
  config = experiment.config
  # A test during training, and one of another split, run the same program.
  run = experiment.programs.get(program)
  if run is None:
    run = experiment.programs[program] = devices.map_over_devices(
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
