"""Texts of data sets, tables and command lines are never run, and never choose where files go."""

import ast
import dataclasses
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from gating_jax.data import image_sets, tfds, video_files
from gating_jax.data.image_sets import SetSource
from gating_jax.data.video_files import VideoFolder
from gating_jax.data.video_tables import VideoTable
from gating_jax.images import classification
from gating_jax.models import resnets
from gating_jax.reports import comparison, tables
from tests.helpers import ROOT, made_tfds, made_videos, tiny_cli

FOLDERS = ("gating_jax", "configs", "benchmarks", "docs")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
UNSAFE_MODULES = {
  "pickle",
  "dill",
  "cloudpickle",
  "shelve",
  "marshal",
  "joblib",
  "yaml",
  "tarfile",
  "zipfile",
}
HARMLESS = {"BadZipFile"}  # an error
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
PATHS = ("../../outside", "/tmp/outside_gating_jax", "a/b", "..", "a\\..\\b")


def findings(text):
  """Finds the parts of a program that can run data, or unpack it to a place the data chooses."""
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.ImportFrom) and {a.name for a in node.names} <= HARMLESS:
      continue
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else [node.module or ""]
      )
      found += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
    if not isinstance(node, ast.Call):
      continue
    called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in UNSAFE_CALLS:
      found.append(called)
    if (
      called.endswith(("np.load", "numpy.load", "jnp.load"))
      and keywords.get("allow_pickle") != "False"
    ):
      found.append(called)
    if (
      keywords.get("allow_pickle") == "True"
      or keywords.get("shell", "False") != "False"
      or called == "os.system"
    ):
      found.append(f"{called}({keywords})")
  return found


def test_no_program_can_run_what_it_reads():
  assert len(SOURCES) > 100
  assert {
    str(path.relative_to(ROOT)): found for path in SOURCES if (found := findings(path.read_text()))
  } == {}


@pytest.mark.parametrize(
  "text",
  [
    "import pickle",
    "from pickle import loads",
    "import yaml.loader",
    "eval(x)",
    "exec(x)",
    "np.load(f)",
    "np.load(f, allow_pickle=True)",
    "subprocess.run(x, shell=True)",
    "os.system(x)",
    "import tarfile",
    "from zipfile import BadZipFile, ZipFile",
  ],
)
def test_the_audit_sees(text):
  assert findings(text)


def test_the_audit_lets_pass():
  assert not findings(
    "import json\nnp.load(f, allow_pickle=False)\nmodel.compile(x)\nre.compile(x)\n"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "override",
  [
    'optim.learning_rate=__import__("pathlib").Path("outside").touch()',
    'optim.lr_drop_at=(__import__("pathlib").Path("outside").touch(),)',
    'data.mean=__import__("pathlib").Path("outside").touch()',
  ],
)
def test_the_text_of_an_override_is_not_run(tmp_path, override):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "gating_jax.cli",
      f"--config={ROOT / 'configs' / 'digits_resnet20.py'}",
      f"--config.{override}",
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PATHS)
def test_the_name_of_a_set_does_not_leave_the_folder_of_sets(tmp_path, name):
  folder = tmp_path / "sets"
  folder.mkdir()
  with pytest.raises((ValueError, tfds.DatasetNotPreparedError)):
    image_sets.load(SetSource(name, "train", str(folder)))
  assert [path.name for path in tmp_path.rglob("*")] == ["sets"]


@pytest.mark.slow
def test_the_names_of_classes_do_not_choose_where_files_go(monkeypatch, tmp_path):
  names, load = (*PATHS, *"fghij"), image_sets.load
  monkeypatch.setattr(
    image_sets, "load", lambda *args: dataclasses.replace(load(*args), class_names=names)
  )
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.chdir(tmp_path)
  config = importlib.import_module("configs.digits_resnet20").get_config()
  config.update_from_flattened_dict({"model.name": "tiny", "optim.epochs": 1})
  classification.run(config, tmp_path / "a" / "run", "train")
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
  assert {path.name for path in (tmp_path / "a" / "run").iterdir()} == {
    ".lock",
    "checkpoints",
    "config.json",
    "data.json",
    "gates.csv",
    "gates.png",
    "histograms.jsonl",
    "metrics.jsonl",
    "predictions.csv",
    "provenance.json",
    "report.html",
    "result.json",
    "tensorboard",
  }
  assert not Path("/tmp/outside_gating_jax").exists()


def playlist(target):
  return f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{target}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("list.m3u8", playlist("{outside}/secret.ts")),
    ("list.m3u8", playlist("../outside/secret.ts")),
    ("video.mp4", "ffconcat version 1.0\nfile 'inside.mp4'\n"),
  ],
)
def test_a_video_file_makes_nothing_else_be_opened(tmp_path, name, text):
  inside, outside = tmp_path / "inside", tmp_path / "outside"
  made_videos.write(outside / "secret.ts", 10)
  made_videos.write(inside / "inside.mp4", 10)
  path = inside / name
  path.write_text(text.replace("{outside}", str(outside)))
  with av.open(str(path)) as container:  # FFmpeg alone follows the file's instructions
    assert sum(1 for _ in container.decode(video=0)) == 10
  with pytest.raises(ValueError, match="must have a self-contained container format"):
    video_files.read_clips(path, 1, 1, (8, 8))
  video_files.read_clips(inside / "inside.mp4", 1, 1, (8, 8))


@pytest.mark.parametrize(
  "name",
  [
    "concat:inside.mp4|../outside/secret.mp4",
    "subfile,,start,0,end,0,,:../outside/secret.mp4",
    "http://localhost/a",
  ],
)
def test_the_name_of_a_video_is_no_address(tmp_path, monkeypatch, name):
  made_videos.write(tmp_path / "outside" / "secret.mp4", 10)
  made_videos.write(tmp_path / "inside" / "inside.mp4", 10)
  monkeypatch.chdir(tmp_path / "inside")
  if not name.startswith("http"):
    av.open(name).close()  # FFmpeg alone treats it as one
  with pytest.raises(FileNotFoundError):
    video_files.read_clips(Path(name), 1, 1, (8, 8))


def test_a_file_of_such_a_name_is_read_as_the_file_that_it_is(tmp_path, monkeypatch):
  made_videos.write(tmp_path / "secret.mp4", 4)
  made_videos.write(tmp_path / "other.mp4", 10).rename(tmp_path / "concat:secret.mp4")
  monkeypatch.chdir(tmp_path)
  frames, _ = made_videos.shown(video_files.read_clips(Path("concat:secret.mp4"), 1, 10, (8, 8))[0])
  assert frames.tolist() == [list(range(10))]


@pytest.mark.parametrize(
  "name",
  [
    "cifar10'); import os; os.system('touch outside",
    'cifar10"; touch outside; "',
    "cifar10 x",
    "/sets/cifar10",
    "../x",
    "cifar10/..",
    "a/b/c",
    "",
    "cifar10\n",
  ],
)
def test_what_is_no_name_of_a_set_is_refused(tmp_path, name):
  with pytest.raises(
    ValueError, match="data.name must be 'digits' or the name of a TFDS data set, .*; got "
  ):
    image_sets.load(SetSource(name, "train", str(tmp_path)))


@pytest.mark.parametrize(
  "name", ["a_set", "a_set/some-config.2", "a_set:1.0.0", "a_set/config:1.*.*"]
)
def test_names_of_sets_are_looked_for(tmp_path, name):
  with pytest.raises(tfds.DatasetNotPreparedError, match="which is unknown to TFDS"):
    image_sets.load(SetSource(name, "train", str(tmp_path)))


def test_the_command_that_prepares_a_set_quotes_any_folder_name(tmp_path):
  folder = tmp_path / 'it\'s "here"; $(touch outside) `touch outside`\\'
  folder.mkdir()
  with pytest.raises(tfds.DatasetNotPreparedError) as caught:
    image_sets.load(SetSource("cifar10", "train", str(folder)))
  (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  python -c ")]
  python, option, program = shlex.split(line)
  assert (python, option) == ("python", "-c")
  (call,) = [
    node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call) and node.args
  ]
  assert [ast.literal_eval(node) for node in (*call.args, *(k.value for k in call.keywords))] == [
    "cifar10",
    str(folder),
    "array_record",
  ]


@pytest.fixture(scope="module")
def named_set(tmp_path_factory):
  """The folder of a prepared set."""
  folder, shape = tmp_path_factory.mktemp("sets"), (4, 4, 3)
  train, test = ([*zip(*made_tfds.images(4, shape), strict=True)] for _ in range(2))
  made_tfds.write(folder, train, test, shape=shape, name="named_set")
  return folder / "named_set"


@pytest.fixture
def wicked_set(named_set, tmp_path, monkeypatch):
  """A folder with a `brought_set`, whose module makes a file `outside` next to the folder."""
  folder = tmp_path / "sets"
  shutil.copytree(named_set, folder / "brought_set")  # TFDS knows only its files
  assert len(image_sets.load(SetSource("brought_set", "train", str(folder)))) == 4
  (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'outside')!r}, 'w').close()")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "evil_features", raising=False)
  (file,) = folder.rglob("features.json")
  features = json.loads(file.read_text())
  features["featuresDict"]["features"]["label"]["pythonClassName"] = "evil_features.Label"
  file.write_text(json.dumps(features))
  return folder


def move_to_a_link(folder):
  (folder / "brought_set" / "1.0.0").rename(folder / "elsewhere")
  (folder / "brought_set" / "1.0.0").symlink_to(folder / "elsewhere")
  (folder / "brought_set" / "again").symlink_to(folder / "brought_set")


def move_to_a_default_config_outside(folder):
  (folder / "brought_set").rename(folder / "other")
  (folder / "brought_set" / ".config").mkdir(parents=True)
  (folder / "brought_set" / ".config" / "metadata.json").write_text(
    '{"default_config_name": "../other"}'
  )


@pytest.mark.parametrize(
  ("name", "hide", "message"),
  [
    (
      "brought_set",
      None,
      "must name only features of tensorflow_datasets, .*; got 'evil_features.Label'",
    ),
    (
      "BroughtSet",
      None,
      "must name only features of tensorflow_datasets, .*; got 'evil_features.Label'",
    ),
    (
      "brought_set",
      move_to_a_link,
      "must name only features of tensorflow_datasets, .*; got 'evil_features.Label'",
    ),
    (
      "brought_set",
      move_to_a_default_config_outside,
      r"must be the name of a folder next to it; got '\.\./other'",
    ),
  ],
)
def test_reading_a_prepared_set_imports_no_module_that_it_names(
  wicked_set, monkeypatch, name, hide, message
):
  outside = wicked_set.parent / "outside"
  if hide:
    hide(wicked_set)
  with pytest.raises(tfds.DatasetNotPreparedError, match=message):
    image_sets.load(SetSource(name, "train", str(wicked_set)))
  assert not outside.exists()
  monkeypatch.setattr(tfds, "_check_features", lambda folder: None)
  with pytest.raises(tfds.DatasetNotPreparedError):
    image_sets.load(SetSource(name, "train", str(wicked_set)))
  assert outside.exists()  # TFDS alone would have run it


WICKED = "\x1b]0;title\x07\x1b[31mred\u202e\n"


def test_names_of_classes_do_not_reach_the_terminal_as_they_are(tmp_path, caplog):
  result = {
    "videos": 1,
    "mean_average_precision": 0.5,
    "all_segments_macs": 1.0,
    "macs": 1.0,
    "mac_ratio": 1.0,
    "share": 1.0,
    "share_p10": 1.0,
    "share_p90": 1.0,
    "unreadable": 0,
    "missing": 0,
  }
  said = tables.render_video(result | {"classes_left_out": [WICKED, "b"]})
  assert said.splitlines()[-1].split("  ")[-1].strip() == "?]0;title??[31mred??, b"
  assert all(c.isprintable() or c == "\n" for c in said)
  aware = {
    "accuracies": [[0.5]],
    "average_accuracy": 0.5,
    "forgetting": None,
    "backward_transfer": None,
    "reasons": {},
  }
  said = tables.render_tasks(
    {
      "task_names": [WICKED],
      "task_aware": aware,
      "dense_macs": 1,
      "task_aware_macs": 1.0,
      "params": 1,
      "memory_mb": 0.0,
    }
  )
  assert all(c.isprintable() or c == "\n" for c in said)
  run = comparison.Run(
    "a", {"experiment": "long_video", "data.table": WICKED}, {"accuracy": 0.5, "step": 1}, []
  )
  said = comparison.render_comparison(
    [run, dataclasses.replace(run, name="b", config={"experiment": "long_video"})]
  )
  assert "[31mred" in said
  assert all(c.isprintable() or c == "\n" for c in said)
  (tmp_path / "bad.mp4").write_bytes(b"no video")
  names = (f"{WICKED}.mp4", "bad.mp4")
  VideoFolder(VideoTable(names, np.array([0, 0]), ("a",)), tmp_path, segments=1, size=(8, 8)).read(
    [0]
  )
  assert len(caplog.records) == 2
  assert all(record.getMessage().isprintable() for record in caplog.records)
