"""Code in README and docs runs as it stands; the README's commands are run like a newcomer's."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from gating_jax import cli
from tests.helpers import ROOT, made_videos
from tests.helpers.commands import run_one_after_the_other
from tests.helpers.doc_blocks import blocks, commands

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = ("README.md", *(path.relative_to(ROOT).as_posix() for path in DOCS))
# Pages whose code takes long.
LONG = (
  "devices",
  "export",
  "extend/continual_method",
  "extend/data_set",
  "extend/inference_strategy",
  "extend/prior",
  "extend/segment_policy",
  "gate_a_pretrained_net",
  "gate_your_model",
  "inference",
  "loss",
  "reference/testing",
  "test_your_loss",
  "videos",
)
TRAINS = tuple(f"docs/{name}.md" for name in LONG)
SHORT = {  # changes with which a command of the README takes seconds
  "digits_resnet20": ("optim.epochs=1", "model.name=resnet8", "model.width=0.25"),
  "segmentation_digits": (
    "optim.epochs=1",
    "model.name=resnet8",
    "model.width=0.25",
    "data.train_scenes=64",
    "data.test_scenes=32",
  ),
  "split_digits": ("optim.epochs=1", "model.width=0.1", "gates.when_full=reuse"),
  "composed_timegate": (
    "optim.epochs=1",
    "pretrain.epochs=1",
    "data.train_videos=64",
    "data.test_videos=32",
    "model.heavy.width=0.1",
    "model.light.width=0.25",
  ),
}


# Changes with which a command on a folder takes seconds, next to those of `--smoke`.
TINY = {
  "tfds_resnet20": ("model.name=tiny",),
  "split_digits": (),
  "videos_timegate": (
    "model.light.name=tiny",
    "model.heavy.name=tiny",
    "pretrain.batch_size=4",
    "optim.batch_size=4",
    "data.workers=0",
    "model.gate.concepts=4",
  ),
}


def config_of(flags):
  file, _, variant = dict(flags)["config"].partition(":")
  return importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(variant)


@pytest.mark.parametrize(
  "page",
  [
    pytest.param(page, marks=pytest.mark.slow if page in TRAINS else ())
    for page in PAGES
    if blocks(page, "python")
  ],
)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  names = {"__name__": "page"}
  for block in blocks(page, "python"):
    # Numbers that the comments behind `print` promise, with as many decimals.
    said = re.findall(r"^print\(.*\)  # (\d+(?:\.\d+)?)$", block, re.MULTILINE)
    capsys.readouterr()
    exec(compile(block, page, "exec"), names)  # noqa: S102
    if said:
      printed = capsys.readouterr().out.split()
      assert len(printed) == len(said)
      for number, rounded in zip(printed, said, strict=True):
        decimals = len(rounded.partition(".")[2])
        assert f"{float(number):.{decimals}f}" == rounded
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_name_what_is_there(page):
  for flags in commands(page):
    names = dict(flags)
    assert names.get("mode", "train") in cli.MODES
    assert names["workdir"]
    assert ("config" in names) == (names.get("mode", "train") == "train")
    for name in names:
      section = config_of(flags) if name.startswith("config") else {}
      for part in name.split(".")[1:]:
        assert part in section, name
        section = section[part]


BENCHMARK = re.compile(
  r"(?:python|bash) benchmarks/(\w+\.(?:py|sh))((?:(?!\n(?:python|bash|gating-jax)\b|[`#]).)*)",
  re.DOTALL,
)


def benchmark_commands(page):
  """Returns each command of a page that runs a benchmark, as the file's name and the flags."""
  found = BENCHMARK.findall((ROOT / page).read_text())
  return [(file, re.findall(r"\s\[?(--[\w.]+)", words)) for file, words in found]


@pytest.mark.parametrize(
  "page", [page for page in (*PAGES, "CONTRIBUTING.md") if benchmark_commands(page)]
)
def test_flags_of_benchmarks_are_those_of_their_scripts(page):
  for file, flags in benchmark_commands(page):
    text = (ROOT / "benchmarks" / file).read_text()
    for other in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
      neighbour = ROOT / "benchmarks" / f"{other}.py"
      text += neighbour.read_text() if neighbour.exists() else ""
    for flag in flags:
      # A field of a config, which the script hands on.
      handed_on = "." in flag and "parse_known_args" in text
      assert flag == "--help" or handed_on or re.search(rf"{flag}\b", text), (file, flag)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
  text = (ROOT / page).read_text()
  named = re.findall(
    r"(?<![\w/.])((?:docs|configs|launch|tests|benchmarks|gating_jax)/[\w/]+(?:\.\w+)?)", text
  )
  assert [name for name in named if not (ROOT / name).exists()] == []


def commands_on_folders(page):
  """Returns the commands on folders of images or films, and those that use their runs."""
  if page.endswith(".md"):
    found = commands(page)
  else:
    # The docstring of a config.
    text = (ROOT / page).read_text().split('"""')[1].replace("\\\n", " ")
    found = []
    for line in text.splitlines():
      if line.strip().startswith("gating-jax"):
        flags = shlex.split(line)[1:]
        found.append([flag.removeprefix("--").partition("=")[::2] for flag in flags])
  chosen, runs = [], set()
  for flags in found:
    names = dict(flags)
    own = names.get("config.data.name") == "folder" or "config.data.folder" in names
    # The annotations of published sets are not ours to make.
    published = re.search("layout=(breakfast|charades)", names.get("config", ""))
    if (own and not published) or names["workdir"] in runs:
      chosen.append(flags)
      runs.add(names["workdir"])
  return chosen


def make_folders(folder, page):
  """Makes images and films in folders of their classes; returns the paths for those of a page."""
  for i in range(80):
    file = folder / "images" / f"class {i % 4}" / f"{i}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + i % 7, 50), (60 * (i % 4), 100, 3 * i)).save(file)
  for i in range(32):
    made_videos.write(folder / "films" / ("fight", "walk")[i % 2] / f"{i}.mp4", 16 + i % 5)
  places = {"config.data.data_dir": folder / "images", "config.data.folder": folder / "films"}
  if page == "docs/films.md":
    # The code of the page makes the table and the lists of names.
    names = {"__name__": "page"}
    exec(compile(blocks(page, "python")[0], page, "exec"), names)  # noqa: S102
    films = names["folder"]
  else:
    films = folder / "listed"
    films.mkdir()
    kinds = {f"{i}.mp4": ("fight", "walk")[i % 2] for i in range(24)}
    rows = [f"{name},{kind}\n" for name, kind in kinds.items()]
    (films / "labels.csv").write_text("video,label\n" + "".join(rows))
    (films / "train.txt").write_text("".join(f"{name}\n" for name in list(kinds)[:16]))
    (films / "test.txt").write_text("".join(f"{name}\n" for name in list(kinds)[16:]))
    for name in kinds:
      (films / name).touch()
  for i, film in enumerate(sorted(films.glob("*.mp4"))):
    made_videos.write(film, 16 + i % 5)
  return places, films


@pytest.mark.slow
@pytest.mark.parametrize(
  ("page", "count"),
  [
    ("docs/training.md", 1),
    ("docs/tasks.md", 1),
    ("docs/videos.md", 1),
    ("docs/films.md", 4),
    ("configs/videos_timegate.py", 1),
  ],
)
def test_commands_on_folders_run_as_they_stand(page, count, tmp_path):
  walked = commands_on_folders(page)
  assert len(walked) == count
  places, films = make_folders(tmp_path, page)
  arguments = []
  for flags in walked:
    names, given = dict(flags), []
    for name, value in flags:
      if name == "config":
        value = ROOT / value
      elif value == "FOLDER":
        value = places[name]
      elif value == "/data/cache":
        value = tmp_path / "cache"
      elif value.startswith("/data/"):
        inside = Path(value).name
        value = films / inside if Path(inside).suffix else films
      given.append(f"--{name}={value}")
    if names.get("mode", "train") == "train":
      # Tiny nets on little data, for a few steps.
      given += [f"--config.{name}" for name in TINY[Path(names["config"].partition(":")[0]).stem]]
      given.append("--smoke")
    arguments.append(given)
  run_one_after_the_other(arguments, devices=1, cwd=tmp_path)
  for flags in walked:
    assert (tmp_path / dict(flags)["workdir"] / "report.html").read_text().endswith("</html>")


@pytest.mark.slow
def test_the_walk_of_a_newcomer(tmp_path):
  """Runs every command of the README, in its order and in one folder, each in a small size."""
  walked = commands("README.md")
  assert len(walked) >= 5
  arguments = []
  for flags in walked:
    short = SHORT[Path(dict(flags)["config"]).stem] if "config" in dict(flags) else ()
    arguments.append(
      [
        *(f"--{name}={ROOT / value if name == 'config' else value}" for name, value in flags),
        *(f"--config.{setting}" for setting in short),
      ]
    )
  run_one_after_the_other(arguments, devices=1, cwd=tmp_path)
  for flags in walked:
    last = dict(flags)["workdir"].split(",")[-1]
    page = "comparison.html" if dict(flags)["mode"] == cli.COMPARE else f"{last}/report.html"
    assert (tmp_path / page).read_text().endswith("</html>")
