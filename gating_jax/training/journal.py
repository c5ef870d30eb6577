"""The journal of a run: its metrics as JSON lines, TensorBoard events and human-readable lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gating_jax.data.text_files import TEMPORARY as TEMPORARY
from gating_jax.data.text_files import naming_file, write_atomically
from gating_jax.terminal import is_open, progress_bar, warn
from gating_jax.training import hosts

METRICS_FILE = "metrics.jsonl"
HISTOGRAMS_FILE = "histograms.jsonl"
TENSORBOARD_DIR = "tensorboard"

# The words for metrics of training, in human-readable lines.
_ACCURACIES = {
  "accuracy": "accuracy",
  "light_accuracy": "accuracy of the light net",
  "heavy_accuracy": "accuracy of the heavy net",
}
# As a budget counts them; the `mac_ratio` of a test includes the gate networks.
_COSTS = {
  "mac_ratio": "MACs without gate networks",
  "channels_mac_ratio": "MACs of the heavy net without gate networks",
  "share": "segments chosen",
}
_TERMS = {
  "cross_entropy": "cross-entropy",
  "batch_shaping": "batch-shaping",
  "l0": "L0",
  "macs": "penalty on MACs",
  "mean": "penalty on segments",
  "light": "light net",
  "heavy": "heavy net",
  "task_cross_entropy": "cross-entropy of the task",
}
# Not among the loss's terms; metrics.jsonl and TensorBoard have the norms.
_NOT_SHOWN = ("loss", "gradient_norm", "state_norm")
# Prefixes of metrics: terms of a heavy net's channel gates, and open rates of layers.
_CHANNELS, _RATES = "channels_", "gate_rate/"


class Journal:
  """A writer of metrics and histograms by step, under a run directory.

  It is opened at the step from which training continues. Lines of later steps, left by a run that
  was killed after its last checkpoint, are dropped, and no (step, split) is written twice. Of
  several processes one writes.

  Attributes:
    past: the lines of training up to the first step, as pairs of a step and the line's numbers.
  """

  def __init__(
    self, workdir: Path, first_step: int, total_steps: int, started: float | None = None
  ):
    """Opens the files.

    Args:
      workdir: the run directory, or the folder of a phase.
      first_step: the step from which training continues.
      total_steps: all steps of the training.
      started: the reading of `time.monotonic` from which lines count their seconds; None for now.
    """
    # Imported here: it loads slowly.
    from tensorboardX import SummaryWriter

    writes, self._path = hosts.is_writer(), workdir / TENSORBOARD_DIR
    metrics = _cut_back(workdir / METRICS_FILE, first_step)
    histograms = _cut_back(workdir / HISTOGRAMS_FILE, first_step)
    self.past = []
    for line in metrics:
      if line["split"] == "train":
        self.past.append((line["step"], numbers(line)))
    # Evaluations before a kill are in the file: a resumed training does not write them twice.
    self._metrics = _Lines(workdir / METRICS_FILE, metrics)
    self._histograms = _Lines(workdir / HISTOGRAMS_FILE, histograms)
    # tensorboardX takes a prefix with a colon, as in s3:, for a kind of storage, unless a slash
    # comes first.
    self._events = SummaryWriter(
      str(self._path.absolute()), purge_step=first_step + 1, write_to_disk=writes
    )
    self._bar = progress_bar(
      total=total_steps, initial=first_step, unit="step", hidden=not writes, dynamic_ncols=True
    )
    self._total = total_steps
    self._said = time.monotonic()
    self._start = self._said if started is None else started

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes a line, and a TensorBoard point per value, named `split/name`.

    It does nothing where this step and split have a line already. A name with a slash keeps its own
    form in TensorBoard.

    Args:
      step: the training step.
      split: the split of the data, such as `train`.
      values: numbers, by name.
    """
    values = {name: float(value) for name, value in values.items()}
    if self._metrics.add(step, split, values):
      for name, value in values.items():
        self._events.add_scalar(name if "/" in name else f"{split}/{name}", value, step)

  def write_histograms(self, step: int, split: str, counts: Mapping[str, np.ndarray]) -> None:
    """Writes a line, and a TensorBoard histogram for each name.

    It does nothing where this step and split have a line already.

    Args:
      step: the training step.
      split: the split of the data.
      counts: by name, such as `gates/stage1_block1/conv1/probs`: `[bins]` integers, the number of
        values in each of `bins` equal parts of [0, 1].
    """
    bins = {name: np.asarray(count).tolist() for name, count in counts.items()}
    if not self._histograms.add(step, split, bins):
      return
    for name, count in counts.items():
      # TensorBoard wants sums of values: bins give them at their middles.
      edges = np.linspace(0, 1, len(count) + 1)
      middles = (edges[1:] + edges[:-1]) / 2
      self._events.add_histogram_raw(
        name,
        min=0.0,
        max=1.0,
        num=int(np.sum(count)),
        sum=float(middles @ count),
        sum_squares=float(middles**2 @ count),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=bins[name],
        global_step=step,
      )

  def write_picture(self, step: int, name: str, path: Path) -> None:
    """Writes a picture from its file to TensorBoard."""
    with Image.open(path) as picture:
      self._events.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

  def progress(self, step: int) -> None:
    """Moves the bar, on a terminal."""
    self._bar.update(step - self._bar.n)

  def say(self, step: int, text: str) -> None:
    """Prints a human-readable line: above the bar on a terminal, plain otherwise."""
    line = f"step {step}/{self._total}  {text}"
    if self._bar.disable:
      line = f"[{time.monotonic() - self._start:6.0f} s] {line}"
    self._said = time.monotonic()
    if is_open(sys.stdout):
      self._bar.write(line, file=sys.stdout)
      sys.stdout.flush()

  def silence(self) -> float:
    """Returns the seconds since the last line."""
    return time.monotonic() - self._said

  def close(self) -> None:
    """Closes the bar, the events and both files."""
    self._bar.close()
    with naming_file(self._path):
      self._events.close()
    self._metrics.close()
    self._histograms.close()


class _Lines:
  """A file of JSON lines with a step and a split, appended to those already there.

  A new file is created with its first line.
  """

  def __init__(self, path: Path, there: Sequence[Mapping[str, Any]]):
    self._path = path if hosts.is_writer() else Path(os.devnull)
    self._written = {(line["step"], line["split"]) for line in there}
    self._file = None

  def add(self, step: int, split: str, values: Mapping[str, Any]) -> bool:
    """Writes a line and returns True; returns False where this step and split have one already."""
    if (step, split) in self._written:
      return False
    self._written.add((step, split))
    with naming_file(self._path):
      self._file = self._file or self._path.open("a")
      self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
      # A kill loses no line that was written.
      self._file.flush()
    return True

  def close(self) -> None:
    """Closes the file, if a line was written."""
    if self._file:
      with naming_file(self._path):
        self._file.close()


def _cut_back(path: Path, first_step: int) -> list[dict[str, Any]]:
  """Cuts a journal's file back to the step training continues from; returns its records."""
  kept = [line for line in read_lines(path) if line["step"] <= first_step]
  if hosts.is_writer() and path.exists():
    lines = [json.dumps(line) + "\n" for line in kept]
    write_atomically(path, "".join(lines))
  return kept


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically."""
  write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
  """Reads a JSON file; None where it is missing or damaged."""
  try:
    return json.loads(path.read_text("utf-8", "replace"))
  # RecursionError: a damaged file may nest deeper than Python can follow.
  except (OSError, ValueError, RecursionError):
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Reads the records of a journal's file; none if it is missing.

  A line cut short by a kill is dropped with a warning.
  """
  records = []
  for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else []:
    if not line:
      continue
    try:
      record = json.loads(line)
      step, split = record.pop("step"), record.pop("split")
      if not isinstance(step, int) or not isinstance(split, str):
        raise TypeError(f"step must be an integer and split a string; got {step!r} and {split!r}")
      records.append({"step": step, "split": split, **record})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      warn("%s: dropped a line that is not a record: %.60s", path, line)
  return records


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
  """Returns the values that are numbers."""
  return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def describe_metrics(means: Mapping[str, float]) -> str:
  """Describes metrics: accuracy, loss and its terms, MACs, open gates; those that there are.

  Args:
    means: means of a step's metrics, by name: fractions, except for the losses; terms of the loss
      are before their coefficients.

  >>> means = {"loss": 0.8125, "cross_entropy": 0.5, "batch_shaping": 0.25}
  >>> means |= {"batch_shaping_coefficient": 0.75, "accuracy": 0.875, "mac_ratio": 0.5312}
  >>> means |= {"gate_rate/layer1/conv": 0.5, "gradient_norm": 2.0}
  >>> print(describe_metrics(means).replace(" (", "\\n("))
  accuracy 87.5 %, loss 0.8125
  (cross-entropy 0.5, batch-shaping 0.25), MACs without gate networks 53.1 %, open gates 50.0 %
  """
  terms, rates = [], []
  for name, value in means.items():
    known = name in _NOT_SHOWN or name in _ACCURACIES or name in _COSTS
    if name.startswith(_RATES):
      rates.append(value)
    elif not known and "/" not in name and not name.endswith("_coefficient"):
      terms.append(f"{_term(name)} {value:.4g}")
  parts = _percents(_ACCURACIES, means)
  if "loss" in means:
    parts.append(f"loss {means['loss']:.4g}" + (f" ({', '.join(terms)})" if terms else ""))
  else:
    parts += terms
  parts += _percents(_COSTS, means)
  # The first rate is that of segments, which "share" has shown.
  if "share" in means:
    rates = rates[1:]
  # A mean over layers, whatever their number of gates.
  if rates:
    parts.append(f"open gates {_percent(float(np.mean(rates)))}")
  return ", ".join(parts)


def _percents(words: Mapping[str, str], means: Mapping[str, float]) -> list[str]:
  """Returns each of these metrics that there is, in words and as a percentage."""
  return [f"{word} {_percent(means[name])}" for name, word in words.items() if name in means]


def _term(name: str) -> str:
  own = name.removeprefix(_CHANNELS)
  words = _TERMS.get(own, own.replace("_", " "))
  return words if own == name else f"{words} of channel gates"


def _percent(fraction: float) -> str:
  return f"{100 * fraction:.1f} %"
