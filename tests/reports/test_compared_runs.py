import json
import re
from pathlib import Path

import pytest

from gating_jax.reports import compared_runs, comparison
from gating_jax.training.rundir import RunDirError
from tests.helpers.runs import announced

LINE = {"step": 4, "split": "train", "cross_entropy": 0.5}


@pytest.fixture
def made(tmp_path):
  """`(path, **config) -> folder` of a finished run."""

  def make(path="run", accuracy=0.75, **config):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
      json.dumps({"experiment": "classification", "optim": {"epochs": 3}, **config})
    )
    (folder / "result.json").write_text(json.dumps({"step": 4, "accuracy": accuracy, "macs": 10.0}))
    (folder / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    return folder

  return make


def test_runs_are_read_printed_and_written(made, tmp_path, capsys, monkeypatch):
  announced(monkeypatch)
  digits = {"data": {"name": "digits"}}
  folders = [made("first/run", **digits), made("second/run", 0.5, optim={"epochs": 5}, **digits)]
  comparison.compare_runs(folders, tmp_path / "page.html")
  printed, html = capsys.readouterr().out, (tmp_path / "page.html").read_text()
  assert re.search(r"accuracy +75\.00 % +50\.00 %", printed)
  assert re.search(r"tested on +digits +digits", printed)
  assert re.search(r"optim\.epochs +3 +5", printed)
  assert f"page: {tmp_path / 'page.html'}" in printed
  assert "drawing the comparison (" in printed
  for text in (
    "<td>75.00 %</td><td>50.00 %</td>",
    '<th scope="col">first/run</th><th scope="col">second/run</th>',
    "<td>optim.epochs</td><td>3</td><td>5</td>",
  ):
    assert text in html


def test_one_run_is_enough_and_need_not_be_finished(made, tmp_path, capsys):
  folder = made()
  (folder / "result.json").unlink()
  with (folder / "metrics.jsonl").open("a") as file:
    # Killed while it wrote.
    file.write('{"step": 3, "split": "test", "accuracy": 0.25}\n{"step": 5, "spl')
  comparison.compare_runs([folder], tmp_path / "page.html")
  printed = capsys.readouterr().out
  assert re.search(r"state +not finished", printed)
  assert re.search(r"accuracy +25\.00 %", printed)


def test_folders_are_separated_by_commas_unless_one_with_the_comma_is_there(tmp_path, monkeypatch):
  for name in ("here/lr=0.1,wd=0", "here/a", "home/b,c"):
    (tmp_path / name).mkdir(parents=True)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path / "here")
  assert compared_runs.split_folders("a") == [Path("a")]
  assert compared_runs.split_folders("lr=0.1,wd=0") == [Path("lr=0.1,wd=0")]
  assert compared_runs.split_folders("a,lr=0.1,wd=0,~/b,c,a") == [
    Path("a"),
    Path("lr=0.1,wd=0"),
    tmp_path / "home" / "b,c",
    Path("a"),
  ]
  assert compared_runs.split_folders("missing,a") == [Path("missing"), Path("a")]


def test_names_are_as_long_as_it_takes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths = [tmp_path / path for path in ("a/x/run", "b/x/run", "b/y/run", "other")]
  assert compared_runs.unique_names(paths) == ["a/x/run", "b/x/run", "y/run", "other"]
  with pytest.raises(
    ValueError, match=f"workdir must name each folder once; got {tmp_path}/a twice"
  ):
    compared_runs.unique_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    ("config.json", None, "workdir .*run holds no run: it has no config.json"),
    ("config.json", '{"exp', "run/config.json is damaged: it must hold JSON"),
    ("config.json", "[1]", "run/config.json is damaged: it must hold a JSON object; got list"),
    ("config.json", "{}", "run/config.json is damaged: it must name the experiment"),
    (
      "config.json",
      '{"experiment": ["a"]}',
      "run/config.json is damaged: it must name the experiment",
    ),
    ("result.json", "", "run/result.json is damaged: it must hold JSON"),
    ("result.json", '{"accuracy": 0.5}', "run/result.json is damaged: it must name the step"),
    ("metrics.jsonl", None, "workdir .*run holds nothing to compare yet: no line in metrics.jsonl"),
    (
      "metrics.jsonl",
      '{"step": "4", "split": "test"}\n',
      "workdir .*run holds nothing to compare yet",
    ),
    (
      "metrics.jsonl",
      "no line\n",
      "workdir .*run holds nothing to compare yet: no line in metrics.jsonl",
    ),
  ],
)
def test_what_is_missing_or_damaged_is_named(made, tmp_path, file, text, message):
  folder, sound = made(), made("sound")
  (folder / file).unlink()
  if text is not None:
    (folder / file).write_text(text)
  with pytest.raises(RunDirError, match=message):
    comparison.compare_runs([sound, folder], tmp_path / "page.html")
  assert not (tmp_path / "page.html").exists()


def test_what_is_no_number_is_left_out(made, tmp_path, capsys):
  folder = made(accuracy="good")
  with (folder / "metrics.jsonl").open("ab") as file:
    file.write(
      b'{"step": 5, "split": "test", "accuracy": null}\n\xff\n{"step": 7, "split": "test", '
      b'"accuracy": 0.5}\n'
    )
  comparison.compare_runs([folder], tmp_path / "page.html")
  printed = capsys.readouterr().out
  assert re.search(r"last step +7\n", printed)
  assert re.search(r"MACs +10\n", printed)
  assert "accuracy" not in printed
  assert '<th scope="col">run</th>' in (tmp_path / "page.html").read_text()


def test_only_the_page_of_an_earlier_comparison_is_replaced(made, tmp_path):
  folder, page = made(), tmp_path / "page.html"
  comparison.compare_runs([folder, made("other_run")], page)
  comparison.compare_runs([folder], page)
  assert "other_run" not in page.read_text()
  page.write_text("<title>My thesis</title>")
  with pytest.raises(
    ValueError,
    match="page must be new or the page of an earlier comparison; .*page.html is neither",
  ):
    comparison.compare_runs([folder], page)
  assert page.read_text() == "<title>My thesis</title>"
