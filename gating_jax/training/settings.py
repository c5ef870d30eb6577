"""Checks of a config's fields, common to all programmes, before anything is compiled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from gating_jax import config_files
from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.data.image_sets import SetSource
from gating_jax.layers.gate import GateSettings
from gating_jax.training import rundir

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# A test of a field's value, and the rule in words: `NAME must be RULE`.
Rule = tuple[Callable[[Any], bool], str]


def config_of(workdir: Path) -> Config:
  """Reads the config that a run directory began with.

  It has every field, also those that are newer than the run. Raises RunDirError where there is no
  run, or a damaged one.
  """
  file, fields = workdir / rundir.CONFIG_FILE, rundir.RunDir(workdir).config()
  if not isinstance(fields.get("experiment"), str):
    raise rundir.RunDirError(f"{file} is damaged: it must name the experiment")
  # The fields of an unknown experiment cannot be checked; the caller refuses it.
  base = config_files.base(fields["experiment"])
  if base is not None:
    _check_fields(file, base, fields)
  config: Any = config_files.completed(ml_collections.ConfigDict(rundir.with_tuples(fields)))
  return config.lock()


def _check_fields(file: Path, base: Config, fields: Mapping[str, Any], *, prefix: str = "") -> None:
  """Raises a RunDirError unless a config has the fields of `base`, of their types.

  A field may be absent where its default is None: it is newer than the run. So may a section of
  such fields alone. So are those of `config_files.NEWER_FIELDS`, which may be None.
  """
  for name, default in base.items():
    value, kind = fields.get(name), base.get_type(name)
    # JSON has no tuples.
    if kind is tuple:
      kind = list
    section = isinstance(default, ml_collections.ConfigDict)
    if name not in fields and config_files.is_unset(default):
      continue
    if section and isinstance(value, Mapping):
      _check_fields(file, default, value, prefix=f"{prefix}{name}.")
      continue
    # A whole number may stand for a float; True is an int in Python, but not a number here.
    fits = isinstance(value, (int, float) if kind is float else kind) and (
      kind is bool or not isinstance(value, bool)
    )
    newer = (prefix.removesuffix("."), name) in config_files.NEWER_FIELDS
    if section or not fits and not (value is None and (default is None or newer)):
      found = repr(value) if name in fields else "no such field"
      wanted = "a section" if section else f"of type {kind.__name__}"
      raise rundir.RunDirError(
        f"{file} is damaged: {prefix}{name} must be {wanted}; it has {found:.80}"
      )


def check(
  config: Config,
  *,
  choices: Mapping[str, Collection[str]],
  positive: Collection[str] = (),
  not_negative: Collection[str] = (),
  at_least: Mapping[str, int],
  fractions: Collection[str] = (),
  numbers: Collection[str] = (),
  rules: Mapping[str, Rule],
) -> None:
  """Raises a ValueError that names the first field, such as `optim.batch_size`, to break its rule.

  Args:
    config: the config to check.
    choices: allowed values, by field.
    positive, not_negative: fields of finite numbers > 0, and >= 0.
    at_least: least value, by field.
    fractions: fields in (0, 1].
    numbers: fields of tuples of finite numbers, not empty.
    rules: other rules, by field.
  """
  fields = rundir.flatten(config)

  def demand(holds: bool, name: str, rule: str) -> None:
    """Raises a ValueError that names the field and its rule, unless that holds."""
    if not holds:
      raise ValueError(f"{name} must be {rule}; got {fields[name]!r}")

  for name, allowed in choices.items():
    one_of(name, fields[name], allowed)
  for name in positive:
    demand(0 < fields[name] < math.inf, name, "a positive finite number")
  for name in not_negative:
    demand(0 <= fields[name] < math.inf, name, "a finite number >= 0")
  for name, least in at_least.items():
    demand(fields[name] >= least, name, f">= {least}")
  for name in fractions:
    demand(0 < fields[name] <= 1, name, "in (0, 1]")
  for name in numbers:
    demand(all_numbers(fields[name]) and len(fields[name]) > 0, name, "a tuple of numbers")
  # Special rules come last: they may take for granted that a number is in its range.
  for name, (holds, rule) in rules.items():
    demand(holds(fields[name]), name, rule)


def gate_settings(section: Mapping[str, Any], **fixed: Any) -> GateSettings:
  """Returns the settings of channel gates that a section of a config describes.

  Args:
    section: fields of `GateSettings`; one that is None, or that an older config lacks, has the
      default of the class.
    **fixed: fields that replace those of the section.
  Raises:
    ValueError, TypeError: as in `GateSettings`.
  """
  given = {name: value for name, value in section.items() if value is not None}
  return GateSettings(**{**given, **fixed})


@contextlib.contextmanager
def named(section: str) -> Iterator[None]:
  """Prefixes errors of settings in the block with their section of the config."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{section}: {error}") from error
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{section}: {error}") from error


def all_numbers(values: Any) -> bool:
  """Returns whether `values` is a tuple of finite numbers; an empty one is."""
  if not isinstance(values, tuple):
    return False
  return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def check_channels(data: Config, channels: int) -> None:
  """Raises a ValueError unless `data.mean` and `data.std` fit images of that many channels."""
  for name in ("mean", "std"):
    if len(data[name]) not in (1, channels):
      raise ValueError(
        f"data.{name} must hold 1 number, or one for each of {channels} channels; "
        f"got {tuple(data[name])}"
      )


def source_of(data: Config, split: str) -> SetSource:
  """Returns a split of the images of a config, by its section `data`."""
  image, label = feature_names(data)
  return SetSource(
    data.name,
    split,
    data.data_dir,
    image=image,
    label=label,
    in_use=(data.train_split, data.test_split),
  )


def feature_names(data: Config) -> tuple[str, str]:
  """Returns the names of the image and the label in a TFDS set."""
  return data.image_feature or "image", data.label_feature or "label"


def divides_over_devices() -> Rule:
  """Returns the rule of a batch size: a multiple of the number of devices."""
  return (
    lambda size: size % jax.device_count() == 0,
    f"a multiple of the {jax.device_count()} devices",
  )
