"""The table of experiments: each row names what is there."""

import importlib

import pytest

from gating_jax import config_files, experiments, runner
from gating_jax.training import rundir


@pytest.mark.parametrize("name", experiments.KINDS)
def test_a_row_names_modules_functions_and_fields_that_are_there(name):
  kind = experiments.KINDS[name]
  module = importlib.import_module(kind.module)
  assert issubclass(getattr(module, kind.programme), runner.Programme)
  assert callable(module.run)
  assert callable(module.build)
  fields = rundir.flatten(config_files.base(name))
  assert fields["experiment"] == name
  named = {kind.field, *kind.ungated, *kind.small, *kind.tested}
  assert named <= fields.keys()
  assert set(kind.baselines) <= set(kind.ungated[kind.field])
  example = importlib.import_module(f"configs.{kind.example.config}").get_config()
  assert example.experiment == name


def test_a_name_of_another_version_is_of_no_kind():
  assert experiments.kind_of("of a newer version") is None
  assert experiments.kind_of(None) is None
  assert config_files.base("of a newer version") is None
