"""Code in README and docs runs as it stands; the README's commands are run like a newcomer's."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from gating_jax import cli
from tests.helpers import ROOT
from tests.helpers.commands import run_one_after_the_other

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


def blocks(page, language):
  return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page):
  """Returns each `gating-jax` command of a page, as its flags `(name, value)`."""
  lines = [
    line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
  ]
  split = [shlex.split(line, comments=True) for line in lines]
  return [
    [flag.removeprefix("--").partition("=")[::2] for flag in words[1:]]
    for words in split
    if words[:1] == ["gating-jax"]
  ]


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


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
  text = (ROOT / page).read_text()
  named = re.findall(
    r"(?<![\w/.])((?:docs|configs|launch|tests|benchmarks|gating_jax)/[\w/]+(?:\.\w+)?)", text
  )
  assert [name for name in named if not (ROOT / name).exists()] == []


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
