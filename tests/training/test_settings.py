import importlib
import json
from math import inf

import pytest

from gating_jax import config_files
from gating_jax.continual import registry
from gating_jax.training.rundir import RunDirError
from gating_jax.training.settings import all_numbers, config_of
from gating_jax.video import sets


def write(folder, name="digits_resnet20", **changes):
  """Writes the config.json of a packaged config with fields changed, or removed if `...`."""
  config = importlib.import_module(f"configs.{name}").get_config()
  fields = json.loads(config.to_json())
  for path, value in changes.items():
    *sections, field = path.split("__")
    section = fields
    for each in sections:
      section = section[each]
    section[field] = value
    if value is ...:
      del section[field]
  (folder / "config.json").write_text(json.dumps(fields))
  return config


@pytest.mark.parametrize("name", sorted(config_files.packaged()))
def test_the_config_of_a_run_is_read_as_it_was(tmp_path, name):
  config = write(tmp_path, name)
  assert config_of(tmp_path).to_dict() == config.to_dict()


def test_a_field_that_is_newer_than_the_run_may_be_absent_where_it_is_none(tmp_path):
  write(tmp_path, data__label_feature=..., data__image_feature=...)
  assert config_of(tmp_path).data.label_feature is None
  write(tmp_path, model__dense_first=...)
  assert config_of(tmp_path).model.dense_first.form is None


def test_a_run_from_before_hats_own_limit_on_the_gradient_keeps_that_of_all_methods(tmp_path):
  write(tmp_path, "split_digits", method="hat", hat__grad_clip_norm=...)
  config = config_of(tmp_path)
  assert config.hat.grad_clip_norm is None
  assert registry.gradient_clip(config) == config.optim.grad_clip_norm == 1.0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": "zero"}, "seed must be of type int; it has 'zero'"),
    ({"seed": True}, "seed must be of type int; it has True"),
    ({"eval_every": None}, "eval_every must be of type float; it has None"),
    ({"optim__epochs": ...}, "optim.epochs must be of type int; it has no such field"),
    ({"model__gate": ...}, "model.gate must be a section; it has no such field"),
    ({"optim__lr_drop_at": "0.5"}, "optim.lr_drop_at must be of type list; it has '0.5'"),
    ({"model__gate": [1]}, r"model.gate must be a section; it has \[1\]"),
    ({"model": ...}, "model must be a section; it has no such field"),
    ({"data__data_dir": 3}, "data.data_dir must be of type str; it has 3"),
    ({"experiment": 3}, "it must name the experiment"),
  ],
)
def test_a_damaged_config_is_named_with_file_and_field(tmp_path, changes, message):
  write(tmp_path, **changes)
  with pytest.raises(RunDirError, match=rf"^{tmp_path}/config.json is damaged: {message}$"):
    config_of(tmp_path)


def test_a_section_of_fields_that_may_be_none_may_be_newer_than_the_run(tmp_path):
  write(tmp_path, "composed_timegate", budget=..., data__validation=...)
  config = config_of(tmp_path)
  assert config.budget.scope is None
  assert not sets.holds_out(config.data)


def test_a_section_of_sections_may_be_newer_than_the_run_where_all_is_none(tmp_path, monkeypatch):
  write(tmp_path)
  base = config_files.base("classification")
  base.unlock()
  base.newer = {"inner": {"a": None, "b": None}}
  monkeypatch.setattr(config_files, "base", lambda experiment: base)
  assert config_of(tmp_path).newer.inner.to_dict() == {"a": None, "b": None}
  base.newer.inner.b = 3
  with pytest.raises(RunDirError, match="newer must be a section; it has no such field"):
    config_of(tmp_path)


@pytest.mark.parametrize(
  ("values", "fit"),
  [((), True), ((0.5, 1), True), ([0.5], False), (0.5, False), (("0",), False), ((inf,), False)],
)
def test_numbers_of_a_tuple_are_finite(values, fit):
  assert all_numbers(values) == fit
