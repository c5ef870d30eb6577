import json

import pytest

from configs import digits_resnet20
from gating_jax.images import classification, curve
from gating_jax.models import resnets
from gating_jax.training import rundir
from tests.helpers import tiny_cli


@pytest.fixture
def made(monkeypatch):
  """Returns `variants -> (experiment, variables)` of a tiny network that is not trained."""
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)

  def make(variants, gate=()):
    config = digits_resnet20.get_config(f"model=tiny,{variants}")
    config.model.gate.update(dict(gate))
    experiment = classification.build(config)
    programme = classification.Classification(experiment)
    return experiment, programme.variables(programme.fresh())

  return make


def test_one_net_has_a_curve_of_macs_and_a_file_of_it(made, tmp_path, capsys):
  experiment, variables = made("share=0.5", {"normalise": 0.0, "initial_open": 0.5})
  curve.curve_run(experiment, rundir.RunDir(tmp_path), 3, variables)
  found = json.loads((tmp_path / "curve.json").read_text())
  assert found["step"] == 3
  points, printed = found["points"], capsys.readouterr().out
  assert [point["shift"] for point in points] == list(curve.SHIFTS)
  macs = [point["macs"] for point in points]
  assert macs == sorted(macs, reverse=True)
  assert len(set(macs)) >= 4
  for point in points:
    assert f"{point['macs']:,.0f} MACs" in printed
    assert point["mac_ratio"] == pytest.approx(point["macs"] / experiment.counts.macs)
  last = printed.rstrip("\n").split("\n\n")[-1]
  assert last.count("\n") < 12
  assert f"\nnext: gating-jax --workdir={tmp_path} --mode=compile" in last
  none = curve.trace_curve(experiment, variables, [0.0])
  assert next(none)._asdict() == points[curve.SHIFTS.index(0.0)]


def test_a_net_without_thresholds_has_no_curve(made, tmp_path):
  experiment, variables = made("gates=channel")
  with pytest.raises(ValueError, match="^variables must have thresholds of gates"):
    curve.curve_run(experiment, rundir.RunDir(tmp_path), 3, variables)
  assert not (tmp_path / "curve.json").exists()
