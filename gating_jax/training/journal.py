"""What a run writes while it goes: JSON lines, TensorBoard events, plain lines or a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from gating_jax.training import hosts

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
TEMPORARY = ".tmp"


class Journal:
  """Writes metrics of steps under a run directory; opened at the step training goes on from.

  Lines of later steps, left by a run that was killed after its last checkpoint, are dropped, and no (step, split) is
  written twice. Of several processes one writes.
  """

  def __init__(self, workdir: Path, first_step: int, total_steps: int):
    from tensorboardX import SummaryWriter  # imports slowly

    self._path = workdir / METRICS_FILE
    kept = [line for line in _readable_lines(self._path) if line["step"] <= first_step]
    writes = hosts.is_writer()
    if writes:
      write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
    self._written = {(line["step"], line["split"]) for line in kept}
    self._file = (self._path if writes else Path(os.devnull)).open("a")
    self._events = SummaryWriter(str(workdir / TENSORBOARD_DIR), purge_step=first_step + 1, write_to_disk=writes)
    self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if writes else True,
                     dynamic_ncols=True)
    self._total = total_steps
    self._start = time.monotonic()

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """One line, and one TensorBoard point per value, named `split/name`; nothing if there is a line already."""
    if (step, split) in self._written:
      return
    self._written.add((step, split))
    values = {name: float(value) for name, value in values.items()}
    with _naming(self._path):
      self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
      self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name if "/" in name else f"{split}/{name}", value, step)

  def progress(self, step: int) -> None:
    """Moves the bar, on a terminal."""
    self._bar.update(step - self._bar.n)

  def say(self, step: int, text: str) -> None:
    """A line for people: above the bar on a terminal, plain otherwise."""
    line = f"step {step}/{self._total}  {text}"
    if self._bar.disable:
      print(f"[{time.monotonic() - self._start:6.0f} s] {line}", flush=True)
    else:
      self._bar.write(line, file=sys.stdout)

  def close(self) -> None:
    self._bar.close()
    with _naming(self._path.parent):
      self._events.close()
      self._file.close()


def write_atomically(path: Path, text: str) -> None:
  """Replaces the file whole or not at all; a kill in between leaves the old one, and a `.tmp` beside it."""
  temporary = path.with_name(path.name + TEMPORARY)
  with _naming(path):
    with temporary.open("w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
  """`value` as indented JSON, atomically."""
  write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_journal(workdir: Path) -> list[dict[str, Any]]:
  """The records written so far, each with its `step` and `split`."""
  return _readable_lines(workdir / METRICS_FILE)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  """Names the file in errors of writing, which by themselves say no more than `No space left on device`."""
  try:
    yield
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def _readable_lines(path: Path) -> list[dict[str, Any]]:
  """The records of a journal; a line cut short by a kill is no record."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      record = json.loads(line)
      records.append({"step": record.pop("step"), "split": record.pop("split"), **record})
    except (ValueError, KeyError, TypeError, AttributeError):
      logging.warning("%s: dropped a line that is no record: %.60s", path, line)
  return records
