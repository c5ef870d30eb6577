"""`benchmarks/continual.py`: the fields that `--set` may change."""

import argparse
import json
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


def test_networks_of_single_tasks_are_averaged(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  monkeypatch.delitem(sys.modules, "continual", raising=False)
  import continual

  learnt = []

  def train(config, workdir, mode):
    """Leaves the result of a run whose accuracy is a tenth of its first class."""
    learnt.append((config.method, config.tasks.classes, config.optim.epochs, mode))
    of_kind = {"average_accuracy": config.tasks.classes[0][0] / 10, "forgetting": None}
    result = {"task_aware": of_kind, "task_agnostic": of_kind, "seconds_since_last_start": 2}
    numbers = ("task_aware_macs", "task_agnostic_macs", "dense_macs", "params", "memory_mb")
    workdir.mkdir()
    (workdir / "result.json").write_text(json.dumps(result | dict.fromkeys(numbers, 1)))

  monkeypatch.setattr(continual.continual_run, "run", train)
  args = argparse.Namespace(runs=tmp_path, config="split_digits", set=["optim.epochs=3"], alone=3)
  found = continual.run_alone(args, "ewc", seed=0)
  assert learnt == [("ewc", (classes,), 3, "train") for classes in ((0, 1), (2, 3), (4, 5))]
  assert found["task_aware"]["average_accuracy"] == pytest.approx(0.2)
  assert found["seconds_since_last_start"] == 6
  assert " 20.0 " in continual.row("ewc", [found])
