import json

import pytest
from PIL import Image

from configs import digits_resnet20
from gating_jax import runner
from gating_jax.images import classification, compile
from gating_jax.layers.gate import GateSettings
from gating_jax.models import resnets
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.reports import timings
from gating_jax.training import rundir
from gating_jax.training.evaluation import Evaluation
from tests.helpers import tiny_cli


@pytest.mark.parametrize(
  ("gates", "refused"), [("experts", "model must be ResNet or VGG; got ExpertNet"), ("none", "")]
)
def test_the_page_of_what_is_not_compiled_says_why(tmp_path, monkeypatch, gates, refused):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  pages = []
  monkeypatch.setattr(classification.image_report, "write_report", lambda _, run: pages.append(run))
  built = classification.build(digits_resnet20.get_config(f"gates={gates},model=tiny"))

  class OneRow(classification.Classification):
    def rows(self, result):
      return [("a row", "1")]

  programme, run_dir = OneRow(built), rundir.RunDir(tmp_path)
  programme.write_report(run_dir, 3, Evaluation({}, None, None), drawn={})
  assert (pages[0].around.step, pages[0].around.not_compiled) == (3, refused)
  assert "mode=compile" not in runner.closing_lines(programme, run_dir, {}, done="Tested")


def test_scales_skip_nothing():
  of = lambda **settings: resnets.resnet("resnet8", 10, gating="channel", **settings)
  assert compile.skips(of())
  assert not compile.skips(of(gate=GateSettings(relaxation="scale")))
  compile.check_compilable(of(gate=GateSettings(relaxation="scale")))


def test_networks_with_exits_have_a_compiler_of_their_own(monkeypatch):
  monkeypatch.setattr(compile, "fold_exits", lambda model, variables: ("folded", variables))
  monkeypatch.setattr(compile, "compile_exits", lambda *given: given)
  make = compile._compiler(resnets.resnet("resnet8", 10, kind=EarlyExitNet), {"params": {}})
  assert make("images") == (("folded", {"params": {}}), "images")


@pytest.mark.slow
def test_a_run_is_compiled_and_what_was_measured_is_kept(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.setattr(timings, "_REPEATS", 1)
  # One call of each program is no measurement.
  monkeypatch.setattr(timings, "MAX_EFFICIENCY", float("inf"))
  monkeypatch.setattr(timings, "_BATCHES", (1, 3))
  config = digits_resnet20.get_config()
  config.update_from_flattened_dict({"model.name": "tiny", "optim.epochs": 1})
  classification.run(config, tmp_path / "run", "train")
  before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
  capsys.readouterr()
  classification.run(config, tmp_path / "run", "compile")
  said = capsys.readouterr().out
  found = json.loads((tmp_path / "run" / "compile.json").read_text())
  assert found["step"] == 11
  assert found["timings"].keys() == {"1 image at a time", "3 images at a time"}
  for rows in found["timings"].values():
    assert {"masked", "switch", "cluster"} <= {row["strategy"] for row in rows if row["part"] == 1}
    assert {"masked", "ungated"} <= {row["strategy"] for row in rows if row["part"] is None}
    assert sum(row["chosen"] for row in rows if row["part"] is None) == 1
    assert all((row["open_ratio"] is None) == (row["part"] is not None) for row in rows)
    for row in rows:
      assert row["efficiency"] == pytest.approx(row["mac_ratio"] / row["time_ratio"])
      assert f"{1e3 * row['seconds']:.2f}" in said
  last = said.rstrip().split("\n\n")[-1].splitlines()
  assert last[0].startswith("Timed the checkpoint of step 11")
  assert [line.split("  ")[1].strip() for line in last[1:4]] == [
    "made",
    "1 image at a time",
    "3 images at a time",
  ]
  assert last[4:] == [
    f"next: gating-jax --workdir={tmp_path / 'run'} --mode=export"
    "    # writes files that run without this package; some minutes"
  ]
  with Image.open(tmp_path / "run" / "compile.png") as picture:
    assert picture.width > picture.height > 300
  assert all(path.read_bytes() == content for path, content in before.items())
  with pytest.raises(rundir.RunDirError, match=r"compile\.json exists; rename it"):
    classification.run(config, tmp_path / "run", "compile")
