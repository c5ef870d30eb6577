"""`benchmarks/continual.py`: the fields that `--set` may change."""

import argparse
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture
def configured(monkeypatch):
  """Returns the config that `--set` makes of a small one."""
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  monkeypatch.delitem(sys.modules, "continual", raising=False)
  import continual

  def of(*changes):
    args = argparse.Namespace(config="split_digits:width=0.1", set=list(changes))
    return continual.configured(args, {"method": "ewc"})

  return of


def test_fields_are_set_by_their_present_and_former_names(configured):
  config = configured("optim.epochs=3", "optim.clip=5.0", "generator.average=0.5", "seed=4")
  assert (config.optim.epochs, config.optim.grad_clip_norm) == (3, 5.0)
  assert (config.generator.ema_decay, config.seed) == (0.5, 4)
  assert (config.method, config.model.width) == ("ewc", 0.1)
  assert "clip" not in config.optim
  assert "average" not in config.generator


@pytest.mark.parametrize(
  ("change", "hint"),
  [
    ("optim.epoch=3", ". Did you mean 'optim.epochs'?"),
    ("optim.grad_clip=5.0", ". Did you mean 'optim.grad_clip_norm'?"),
    ("sede=4", ". Did you mean 'seed'?"),
    ("optim=3", ""),
    ("nothing.of_it=3", ""),
  ],
)
def test_a_field_that_no_config_has_is_refused(configured, change, hint):
  with pytest.raises(SystemExit) as refused:
    configured(change)
  field = change.partition("=")[0]
  assert str(refused.value) == f"--set must name a field of the config; got {field!r}{hint}"
