"""The table of programmes: each row names what is there."""

import importlib

import pytest

from gating_jax import config_files, programmes, runner
from gating_jax.training import rundir


@pytest.mark.parametrize("name", programmes.PROGRAMMES)
def test_a_row_names_modules_functions_and_fields_that_are_there(name):
  row = programmes.PROGRAMMES[name]
  module = importlib.import_module(row.module)
  assert issubclass(getattr(module, row.programme), runner.Programme)
  assert callable(module.run)
  assert callable(module.build)
  fields = rundir.flatten(config_files.base(name))
  assert fields["experiment"] == name
  named = {row.field, *row.ungated, *row.small, *row.tested}
  assert named <= fields.keys()
  assert set(row.baselines) <= set(row.ungated[row.field])
  example = importlib.import_module(f"configs.{row.example.config}").get_config()
  assert example.experiment == name


def test_a_name_of_another_version_has_no_row():
  assert programmes.find_row("of a newer version") is None
  assert programmes.find_row(None) is None
  assert config_files.base("of a newer version") is None
