import contextlib
import importlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from gating_jax.data import image_sets, streaming
from gating_jax.data.image_sets import SetSource
from gating_jax.images import classification, export
from gating_jax.images.model_card import hub_files, without_folders
from gating_jax.inference.export import export_model, load_exported
from gating_jax.inference.folding import fold
from gating_jax.inference.onnx_export import load_onnx
from gating_jax.models import resnets
from gating_jax.models.vggs import VGG
from gating_jax.training import rundir, steps
from tests.helpers import tiny_cli
from tests.helpers.runs import announced, race_by, said, without_reports


@pytest.fixture(scope="module")
def config():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
    made = importlib.import_module("configs.digits_resnet20").get_config()
    # So that gates are left.
    made.update_from_flattened_dict(
      {
        "model.name": "tiny",
        "optim.epochs": 2,
        "optim.learning_rate": 0.05,
        "model.gate.initial_open": 0.5,
      }
    )
    yield made.lock()


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
  """A finished run with its exports, and its output."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  with pytest.MonkeyPatch.context() as patch:
    without_reports(patch)
    said(classification, config, workdir, "train")
    patch.setattr(export, "_REPEATS", 2)
    race_by(patch, fastest("switch"))
    announced(patch)
    return workdir, said(classification, config, workdir, "export")


def fastest(strategy):
  """A race by a made-up clock, in which this strategy takes half the time of others."""
  return lambda runs, _, **__: {
    name: [0.5 if strategy in (name, name[0]) else 1.0] for name in runs
  }


@pytest.mark.thin(2)
@pytest.mark.parametrize(("folder", "tolerance"), [("export", 0), ("export_int8", 0.05)])
def test_the_export_of_a_run_scores_as_the_run_does(exported, folder, tolerance):
  workdir, _ = exported
  result = json.loads((workdir / "result.json").read_text())
  loaded = load_exported(workdir / folder)
  test = image_sets.load(SetSource("digits", "test"))
  images = (test.pixels / 255 - np.array(loaded.card["mean"])) / np.array(loaded.card["std"])
  outputs, _ = loaded(images)
  accuracy = np.mean(np.argmax(np.asarray(outputs), axis=1) == test.labels)
  assert accuracy == pytest.approx(loaded.card["accuracy"], abs=1e-9)
  assert abs(accuracy - result["accuracy"]) <= tolerance + 1e-9
  assert loaded.card["accuracy_as_trained"] == pytest.approx(result["accuracy"], abs=1e-9)
  assert loaded.card["executed_macs_as_trained"] == pytest.approx(result["macs"], rel=1e-6)
  assert loaded.card["class_names"] == [*"0123456789"]
  assert (loaded.card["step"], loaded.card["calibration_images"], loaded.card["test_images"]) == (
    22,
    1437,
    360,
  )
  assert loaded.card["config"]["model"]["name"] == "tiny"
  assert set(loaded.card["milliseconds"]) == {"1", "64"}


def test_the_export_that_skips_takes_one_image_and_answers_alike(exported):
  workdir, text = exported
  skips, whole = load_exported(workdir / "export_conditional"), load_exported(workdir / "export")
  assert skips.card["batch_size"] == 1
  assert "switch" in skips.card["strategies"]
  assert set(skips.card["milliseconds"]) == {"1"}
  assert skips.weights.keys() == whole.weights.keys()
  images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
  for image in images:
    np.testing.assert_allclose(skips(image[None])[0], whole(image[None])[0], rtol=1e-4, atol=1e-4)
  assert skips.card["accuracy"] == pytest.approx(whole.card["accuracy"], abs=1 / 360)
  assert re.search(r"pruned, skipping +\d+\.\d\d %", text)


def test_the_onnx_model_scores_as_the_export_does_and_the_card_has_its_time(exported):
  pytest.importorskip("onnxruntime")
  workdir, text = exported
  loaded = load_exported(workdir / "export")
  images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
  outputs, logits = load_onnx((workdir / "export" / "model.onnx").read_bytes())(images)
  expected, expected_logits = loaded(images)
  np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
  for found, wanted in zip(logits, expected_logits, strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  card = loaded.card["onnx"]
  assert set(card["milliseconds"]) == {"1", "64"}
  assert card["runtime"].startswith("onnxruntime ")
  assert card["accuracy"] == pytest.approx(loaded.card["accuracy"], abs=1 / 360 + 1e-9)
  assert re.search(r"pruned, onnxruntime +\d+\.\d\d %", text)
  assert not (workdir / "export_int8" / "model.onnx").exists()


def test_an_export_is_a_folder_for_a_model_hub(exported, tmp_path, monkeypatch, capsys):
  folder = exported[0] / "export"
  image = image_sets.load(SetSource("digits", "test")).pixels[0]
  Image.fromarray(image[..., 0]).save(tmp_path / "digit.png")
  # As `python load.py digit.png` does, without this package.
  monkeypatch.setattr(sys, "argv", ["load.py", str(tmp_path / "digit.png")])
  runpy.run_path(str(folder / "load.py"), run_name="__main__")
  card = load_exported(folder).card
  x = (image / 255 - np.array(card["mean"])) / np.array(card["std"])
  answer = int(np.argmax(load_exported(folder)(np.float32(x)[None])[0]))
  assert capsys.readouterr().out.split()[-1] == card["class_names"][answer]
  run_page_in(tmp_path, folder, monkeypatch)
  assert capsys.readouterr().out.strip() == card["class_names"][answer]
  source = (folder / "load.py").read_text().partition("\nimport")[2].splitlines()
  assert "gating_jax" not in "".join(source)
  config = json.loads((folder / "config.json").read_text())
  assert config["id2label"] == {str(i): str(i) for i in range(10)}
  assert config["input_shape"] == [8, 8, 1]
  _, head, page = (folder / "README.md").read_text().split("---\n", 2)
  fields = yaml.safe_load(head)
  assert (fields["license"], fields["library_name"]) == ("unknown", "gating_jax")
  assert (fields["pipeline_tag"], fields["metrics"]) == ("image-classification", ["accuracy"])
  metrics = fields["model-index"][0]["results"][0]["metrics"]
  assert metrics == [{"type": "accuracy", "value": pytest.approx(card["accuracy"], abs=1e-6)}]
  assert f"| accuracy | {100 * card['accuracy']:.2f} % |" in page
  assert f"| one image in JAX | {card['milliseconds']['1']:.2f} ms |" in page
  assert f"| one image in onnxruntime | {card['onnx']['milliseconds']['1']:.2f} ms |" in page


def loader_of(page):
  """The lines of Python on a page."""
  (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
  assert len(code.splitlines()) <= 20
  return code


def run_page_in(tmp_path, folder, monkeypatch):
  """Runs the lines of an export's page next to its files and a picture."""
  shutil.copytree(folder, tmp_path / "net")
  shutil.copy(tmp_path / "digit.png", tmp_path / "net" / "picture.png")
  monkeypatch.chdir(tmp_path / "net")
  exec(loader_of((folder / "README.md").read_text()), {})


@pytest.mark.parametrize(
  ("card", "channels"),
  [
    ({"data": {"loader": "streaming", "name": "imagenet2012"}}, 3),
    ({"data": {"name": "digits"}}, 1),
    ({"model": {"sources": 3}, "mean": [0.5, 0.4, 0.3, 0.0], "std": [0.25] * 4}, 4),
  ],
  ids=["a photograph", "grey", "with sets"],
)
def test_the_lines_of_a_page_prepare_an_image_as_its_script_does(
  tmp_path, monkeypatch, card, channels
):
  card = card_of(**{"mean": [0.5] * channels, "std": [0.25] * channels, **card})
  files = hub_files(card, (8, 12, channels))
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  monkeypatch.chdir(tmp_path)
  kept = []
  # The network itself is not there.
  for line in loader_of(files["README.md"].decode()).splitlines():
    if not line.startswith(("program", "weights", "logits", "print")):
      kept.append(line)
  prepare = runpy.run_path(str(tmp_path / "load.py"))["prepare"]
  # Also one with transparency, and one of the size that the network takes.
  for shape in ((30, 41, 3), (30, 41, 4), (8, 12, 3)):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    names = {}
    exec("\n".join(kept), names)
    np.testing.assert_allclose(names["images"], prepare("picture.png")[None], atol=1e-5)


def test_a_card_names_no_folders_of_the_machine(tmp_path):
  (tmp_path / "me, myself (2)" / "b c").mkdir(parents=True)
  folder = f"folder:{tmp_path}/me, myself (2)/b c"
  config = {
    "data": {"data_dir": "../home/me/flowers/", "name": f"union(mnist,{folder},folder:d)"},
    "loss": {"distillation": {"teacher": "../alice/runs/big"}},
    "model": {"init_from": "runs/x.safetensors", "name": "resnet18", "width": 1.0, "gate": None},
    "notes": "/tmp/run",
    "windows": "C:\\me\\run",
    "home": "~/x",
    "set": "imagenet_resized/32x32",
  }
  assert without_folders(config) == {
    "data": {"data_dir": "flowers", "name": "union(mnist,folder:b c,folder:d)"},
    "loss": {"distillation": {"teacher": "big"}},
    "model": {"init_from": "x.safetensors", "name": "resnet18", "width": 1.0, "gate": None},
    "notes": "run",
    "windows": "run",
    "home": "x",
    "set": "imagenet_resized/32x32",
  }


def card_of(*, model=(), data=(), **facts):
  """Facts that an export's page has."""
  of_model = {"name": "tiny", "gating": "channel", **dict(model)}
  of_data = {"name": "folder", "data_dir": "/data/flowers", "loader": "resident", **dict(data)}
  return {
    "config": {"model": of_model, "data": of_data},
    "step": 22,
    "class_names": ["a", "b"],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25] * 3,
    "device": "cpu",
    "weights": "float32",
    "accuracy": 0.75,
    "macs": 100,
    "executed_macs": 60.0,
    "milliseconds": {"1": 0.5},
    **facts,
  }


SKIPS = {"strategies": ["switch", "masked"]}
EXITS = {"model": {"gating": "exits"}}


@pytest.mark.parametrize(
  ("facts", "title", "behaviour"),
  [
    ({}, "tiny on flowers", "which units are used: closed ones are multiplied by 0."),
    ({"weights": "int8"}, "tiny on flowers, 8-bit weights", "are multiplied by 0."),
    (SKIPS, "tiny on flowers, skipping closed units", "for each image which units run."),
    ({"strategies": ["masked"]}, "tiny on flowers", "closed ones are multiplied by 0."),
    (
      {"model": {"gating": "none"}, "executed_macs": 100.0, "data": {"name": "cifar10"}},
      "tiny on cifar10",
      "It computes the same units for each image.",
    ),
    ({**EXITS, "strategies": ["exit_dispatch"]}, "tiny on flowers", "An image leaves at the first"),
    ({**EXITS, "strategies": ["masked"]}, "tiny on flowers", "but all of the network is computed."),
    ({"data": {"name": "union(mnist,folder:/a/b)"}}, "tiny on mnist + b", "Gates decide"),
  ],
)
def test_the_page_of_an_export_says_what_it_is_and_does(facts, title, behaviour):
  page = hub_files(card_of(**facts), (8, 8, 3))["README.md"].decode()
  assert f"\n# {title}\n" in page
  assert behaviour in page


@pytest.mark.parametrize("has_onnx", [False, True])
def test_the_page_names_the_onnx_model_where_it_is_there(has_onnx):
  # Also where onnxruntime is not installed, which would have timed it.
  page = hub_files(card_of(), (8, 8, 3), has_onnx=has_onnx)["README.md"].decode()
  assert ("model.onnx" in page) == has_onnx


@pytest.mark.parametrize("loader", ["resident", "streaming"])
def test_an_export_prepares_a_photograph_as_the_test_does(tmp_path, loader):
  rng, turned = np.random.default_rng(0), Image.Exif()
  turned[0x0112] = 6
  Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "a.png", exif=turned)
  Image.fromarray(rng.integers(0, 65536, (50, 30), np.uint16)).save(tmp_path / "deep.png")
  Image.fromarray(rng.integers(0, 256, (40, 40, 4), np.uint8)).save(tmp_path / "clear.png")
  table = tmp_path / "images.csv"
  names = ("a.png", "clear.png", "deep.png")
  table.write_text("path,label,split\na.png,a,test\nclear.png,b,test\ndeep.png,b,test\n")
  opened = {"resident": image_sets.load, "streaming": streaming.open_stream}[loader]
  pixels, _ = opened(SetSource("folder", "test", str(table)), image_size=16).read(np.arange(3))
  card = card_of(data={"loader": loader})
  for name, content in hub_files(card, (16, 16, 3)).items():
    (tmp_path / name).write_bytes(content)
  prepare = runpy.run_path(str(tmp_path / "load.py"))["prepare"]
  found = [prepare(tmp_path / name) for name in names]
  np.testing.assert_allclose(found, (pixels / 255 - card["mean"]) / 0.25, atol=1e-5)


def test_an_export_of_a_net_that_is_told_the_set_takes_its_number(tmp_path, monkeypatch):
  card = card_of(model={"sources": 3}, mean=[0.5, 0.4, 0.3, 0.0], std=[0.25, 0.25, 0.25, 1 / 255])
  files = hub_files(card, (8, 8, 4))
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  assert "load.py --set=0 picture.png" in files["README.md"].decode()
  assert "8 x 8 pixels of 3 colours and the number of" in " ".join(
    files["README.md"].decode().split()
  )
  Image.new("RGB", (8, 8), (200, 100, 0)).save(tmp_path / "a.png")
  script = str(tmp_path / "load.py")
  image = runpy.run_path(script)["prepare"](tmp_path / "a.png", 2)
  assert image.shape == (8, 8, 4)
  np.testing.assert_allclose(image[..., 3], 2, rtol=1e-6)
  np.testing.assert_allclose(image[..., 0], (200 / 255 - 0.5) / 0.25, rtol=1e-6)
  for given in ([], ["--set=3"]):
    monkeypatch.setattr(sys, "argv", ["load.py", *given, "a.png"])
    with pytest.raises(SystemExit) as ended:
      runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2


@pytest.mark.slow
def test_the_script_of_an_export_runs_in_a_process_of_its_own(tmp_path):
  model, card = VGG(classes=2, chain=(4,), gating="channel"), card_of()
  net = fold(model, model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)))
  files = hub_files(card, (8, 8, 3))
  path = export_model(
    net, tmp_path / "net", input_shape=(8, 8, 3), card=card, platforms=("cpu",), files=files
  )
  Image.new("RGB", (9, 20), (200, 100, 0)).save(tmp_path / "a.png")
  command = [sys.executable, "-I", "load.py", "../a.png"]
  done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True)
  colour = (np.array([200, 100, 0]) / 255 - card["mean"]) / card["std"]
  outputs, _ = load_exported(path)(np.broadcast_to(np.float32(colour), (1, 8, 8, 3)))
  assert done.stdout == f"../a.png {card['class_names'][int(np.argmax(outputs))]}\n"


def test_where_skipping_is_no_faster_no_program_that_skips_is_written(
  exported, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(export, "_REPEATS", 1)
  race_by(monkeypatch, fastest("masked"))
  monkeypatch.setattr(export, "_has_onnx", lambda: False)
  shutil.copytree(exported[0], tmp_path / "run", ignore=shutil.ignore_patterns("export*"))
  text = said(classification, config, tmp_path / "run", "export")
  assert {path.name for path in (tmp_path / "run").glob("*export*")} == {"export", "export_int8"}
  assert "computing everything is as fast as skipping here" in text
  # The package onnx is not installed here.
  assert not (tmp_path / "run" / "export" / "model.onnx").exists()
  lines = [line for line in text.splitlines() if "model.onnx" in line]
  assert len(lines) == 1
  assert lines[0].endswith('not written, since onnx is missing: pip install "gating-jax[export]"')


@pytest.mark.slow
def test_a_net_with_early_exits_is_exported_for_one_image(tmp_path, monkeypatch):
  monkeypatch.setattr(export, "_REPEATS", 1)
  config = importlib.import_module("configs.digits_resnet20").get_config("gates=exits")
  config.update_from_flattened_dict(
    {"model.name": "resnet8", "model.width": 0.25, "optim.epochs": 1}
  )
  said(classification, config, tmp_path / "run", "train")
  text = said(classification, config, tmp_path / "run", "export")
  assert re.search("model.onnx +not written: in an ONNX model every image would pass", text)
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  loaded = load_exported(tmp_path / "run" / "export")
  assert loaded.card["batch_size"] == 1
  assert loaded.card["accuracy"] == pytest.approx(result["accuracy"], abs=1 / 360 + 1e-9)
  assert loaded.card["executed_macs"] == pytest.approx(result["macs"], rel=1e-2)
  assert loaded(np.zeros((1, 8, 8, 1), np.float32))[0].shape == (1, 10)


@pytest.fixture(scope="module")
def exported_exits(tmp_path_factory):
  """The export of an untrained net with early exits, and its output."""
  folder = tmp_path_factory.mktemp("exits")
  config = importlib.import_module("configs.digits_resnet20").get_config("gates=exits")
  config.update_from_flattened_dict(
    {"model.name": "resnet8", "model.width": 0.25, "optim.epochs": 1}
  )
  experiment = classification.build(config)
  state = steps.init_state(experiment.model, experiment.optimiser, 0, experiment.test.shape)
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
    patch.setattr(export, "_REPEATS", 1)
    announced(patch)
    export._write_exits(
      experiment,
      folder,
      {"step": 0, "config": config.to_dict()},
      {"params": state.params, "batch_stats": state.batch_stats},
    )
  return folder, out.getvalue()


def test_a_net_with_exits_is_exported_for_one_image(exported_exits):
  folder, text = exported_exits
  loaded = load_exported(folder / "export")
  assert loaded.card["batch_size"] == 1
  assert 0 < loaded.card["executed_macs"] <= loaded.card["macs"]
  assert loaded(np.zeros((1, 8, 8, 1), np.float32))[0].shape == (1, 10)
  assert "testing the program on 360 images, one at a time (" in text
  assert "timing the program and the net, one image at a time (" in text


def test_the_program_that_skips_is_not_counted_where_it_is_not_timed(monkeypatch):
  monkeypatch.setattr(export, "_REPEATS", 1)
  pieces, images = [], np.zeros((64, 1, 1, 1), np.float32)
  programs = dict.fromkeys(("trained", "pruned", "pruned, skipping"), lambda x: x)
  found = export._milliseconds(programs, images, lambda done, total: pieces.append((done, total)))
  assert {name: set(times) for name, times in found.items()} == {
    "trained": {"1", "64"},
    "pruned": {"1", "64"},
    "pruned, skipping": {"1"},
  }
  assert pieces == [(done, 5) for done in range(1, 6)]


def test_an_onnx_model_that_could_not_run_says_so():
  said_so = "neither tested nor timed, since onnxruntime is not installed"
  assert export._onnx_summary({"onnx": None}) == said_so
  measured = {"accuracy": 0.75, "milliseconds": {"1": 0.5, "64": 8.0}}
  assert export._onnx_summary({"onnx": measured}) == (
    "75.00 %, 0.50 ms, 8.00 ms for 64 images in onnxruntime"
  )


def test_the_time_of_the_trained_net_stands_next_to_that_of_the_same_checkpoint(tmp_path):
  ratios = {"mac_ratio": 0.5, "computed_ratio": 0.5, "time_ratio": 0.5, "chosen": False}
  rows = [
    {"part": None, "strategy": "masked", "seconds": 0.002, **ratios},
    {"part": None, "strategy": "chosen", "seconds": 0.001, **ratios},
    {"part": 0, "strategy": "masked", "seconds": 0.0005, **ratios},
  ]
  times = {"step": 22, "device": "cpu", "timings": {"1 image at a time": rows}}
  (tmp_path / "compile.json").write_text(json.dumps(times))
  of_step = lambda step: export._as_compiled(rundir.RunDir(tmp_path), step, 2.5)
  assert of_step(22) == "2.50 ms; 2.00 ms by --mode=compile"
  assert of_step(11) == "2.50 ms"


def test_a_net_without_gated_layers_has_a_table_of_its_ways_alone():
  ways = [{"strategy": "masked", "macs": 1500.0, "ratio": 0.75}]
  layer = dict.fromkeys(("units", "always_open", "always_closed", "varies"), 3)
  layer |= {"open_on_all": 1, "closed_on_all": 2, "open": 0.5, "correlation": 0.25}
  analysis = lambda layers: SimpleNamespace(mac_rows=lambda: ways, rows=lambda: layers)
  alone = export._analysis_lines(analysis([]), [])
  assert [line.split() for line in alone[1:]] == [["masked", "1,500", "75.0", "%"]]
  both = export._analysis_lines(analysis([layer]), ["stage1"])
  assert (both[1].split()[:2], both[2], both[3:]) == (["stage1", "3"], "", alone)


def test_what_is_said(exported):
  workdir, text = exported
  for words in (
    "checkpoint of step 22, calibrated on 1,437 training images",
    "stage1_block1/conv1",
    "union of 8",
    "testing the net that skips closed units on 360 images, one at a time (",
    "of 360 test images a static unit would have moved",
    "pruned, int8",
    f"{workdir / 'export_int8'}",
  ):
    assert words in text
  size = (workdir / "export_int8" / "model.safetensors").stat().st_size
  assert f"{size:,}" in text
  end = text.partition("Exported the checkpoint")[2]
  assert re.search(r"export/model\.onnx +\d+\.\d\d %, .* ms .*in onnxruntime\n", end)
  assert f"next: python {workdir / 'export' / 'load.py'} IMAGE  " in end


def test_an_export_is_not_written_over(exported, config):
  workdir, _ = exported
  before = (workdir / "export" / "card.json").read_bytes()
  with pytest.raises(rundir.RunDirError, match=r"export\w* exists; rename it"):
    said(classification, config, workdir, "export")
  assert (workdir / "export" / "card.json").read_bytes() == before


def test_a_run_without_a_checkpoint_is_named(config, tmp_path):
  with rundir.open_run(tmp_path / "run", config):
    pass
  with pytest.raises(rundir.RunDirError, match="no checkpoint in"):
    said(classification, config, tmp_path / "run", "export")
