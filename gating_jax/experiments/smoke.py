"""`--smoke`: any config on so little data, and for so few steps and tasks, that a run ends within a minute."""

from __future__ import annotations

import re

import jax
import ml_collections

from gating_jax.data import scenes, sources

_BATCH = 16  # examples, over all devices
_EXAMPLES = {"train": 64, "test": 32}
_TASK_IMAGES = {"train": 512, "test": 256}  # of all classes together, so that each task has some
_AT_MOST = {
    "data.train_scenes": 64,
    "data.test_scenes": 16,
    "data.train_videos": 32,
    "data.test_videos": 16,
    "tasks.count": 2,
    "router.steps": 10,
    "generator.steps": 4,
    "generator.images": 64,
    "ewc.examples": 64,
    "online_ewc.examples": 64,
    "replay.images": 64,
    "optim.eval_batch_size": 64,
    "log_every": 5,
    "devices.steps_per_dispatch": 1,
}


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with less of everything that a run's time grows with; its model and method are as they were.

  >>> from ml_collections import ConfigDict
  >>> shrink(ConfigDict({"data": {"name": "cifar10", "train_split": "train"}, "optim": {"epochs": 200}})).to_dict()
  {'data': {'name': 'cifar10', 'train_split': 'train[:64]'}, 'optim': {'epochs': 1}}
  """
  small = config.copy_and_resolve_references().unlock()
  learns_tasks = "tasks" in small
  for name, most in _AT_MOST.items():
    _lower(small, name, most)
  phases = ["optim"]
  if not small.get("pretrained"):  # else the first training is that of another run, and stays as it was
    phases.append("pretrain")
  for phase in phases:
    _lower(small, f"{phase}.epochs", 1)
    _lower(small, f"{phase}.batch_size", _over_devices(_BATCH))
  _set(small, "eval_every", 0.0)
  if small.get("gates", {}).get("when_full") == "error":
    small.gates.when_full = "reuse"  # after a few steps most units are taken
  examples = _TASK_IMAGES if learns_tasks else _EXAMPLES
  if "layout" in small.get("data", {}):  # splits of videos are files
    small.data.at_most = sum(_EXAMPLES.values())
  else:
    for split, count in examples.items():
      _cut(small, f"{split}_split", count)
  return small.lock()


def _over_devices(size: int) -> int:
  """The size, or what is next to it that all devices share."""
  return max(1, size // jax.device_count()) * jax.device_count()


def _lower(config: ml_collections.ConfigDict, name: str, most: int) -> None:
  """Sets a field that is there to `most` at most; 0 means all of it, but where it counts epochs."""
  section, field = _place(config, name)
  if section is not None and (section[field] > most or section[field] == 0 and name == "tasks.count"):
    section[field] = most


def _set(config: ml_collections.ConfigDict, name: str, value: float) -> None:
  section, field = _place(config, name)
  if section is not None:
    section[field] = value


def _place(config: ml_collections.ConfigDict, name: str) -> tuple[ml_collections.ConfigDict | None, str]:
  """The section that has a field; None where there is none."""
  *sections, field = name.split(".")
  for each in sections:
    config = config.get(each, {})
  return (config if field in config else None), field


def _cut(config: ml_collections.ConfigDict, field: str, count: int) -> None:
  """Cuts a split of a TFDS set, by its name, to its first examples; what comes with the package is small, or made."""
  data = config.get("data", {})
  if data.get("name") not in (sources.DIGITS, scenes.MADE) and re.fullmatch(r"\w+", data.get(field) or ""):
    data[field] = f"{data[field]}[:{count}]"
