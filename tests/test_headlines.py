"""README and pages say what docs/headlines.json has, and `benchmarks/headline.py` measures it."""

import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys

import pytest

from tests.helpers import ROOT

ROWS = {
  "net": {
    "seeds": [3, 5],
    "figures": {
      "accuracy": {"values": [97.78, 98.89], "mean": 98.335, "range": [97.78, 98.89]},
      "macs": {"mean": 53.1},
      "gates": {"values": [336, None], "mean": 336.0, "range": [336, 336]},
    },
  },
  "other": {
    "seeds": [0],
    "figures": {"ms": {"values": [1234.5], "mean": 1234.5, "range": [1234.5, 1234.5]}},
  },
}


@pytest.fixture
def headline(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  for name in ("headline", "headline_rows"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  return importlib.import_module("headline")


def test_readme_and_pages_say_what_is_stored(headline):
  assert headline.check_pages(headline.load_rows()) == []


@pytest.mark.parametrize(
  ("page", "least"),
  [("README.md", 20), ("docs/results.md", 250), ("docs/when_gates_pay.md", 40)],
)
def test_the_main_pages_name_their_figures(headline, page, least):
  claims, _ = headline.read_claims((ROOT / page).read_text(), headline.load_rows())
  assert len(claims) >= least


def test_another_number_in_the_readme_is_found(headline):
  text = (ROOT / "README.md").read_text()
  rows = headline.load_rows()
  claim = headline.read_claims(text, rows)[0][0]
  digit = text[claim.end - 1]
  changed = text[: claim.end - 1] + str((int(digit) + 1) % 10) + text[claim.end :]
  assert headline.read_claims(changed, rows)[0][0].said != claim.stored


def test_every_row_names_a_commit_of_the_history_for_each_seed(headline):
  rows = headline.load_rows()
  assert headline.check_commits(rows) == []
  assert set(headline.WITHOUT_COMMIT) <= set(rows)


HERE = "a" * 12


@pytest.mark.parametrize(
  ("commit", "faults"),
  [
    (HERE, []),
    ([HERE, HERE[:7]], []),
    ([HERE], ["net: 1 commits for 2 seeds"]),
    (None, ["net: commit must be 7 to 40 hexadecimal digits; got None"]),
    ([HERE, None], ["net: commit must be 7 to 40 hexadecimal digits; got None"]),
    (
      "aaaaaaa (seed 0)",
      ["net: commit must be 7 to 40 hexadecimal digits; got 'aaaaaaa (seed 0)'"],
    ),
    ([HERE, "bbbbbbb"], ["net: no commit bbbbbbb here"]),
  ],
)
def test_a_row_without_a_commit_of_each_seed_is_named(headline, monkeypatch, commit, faults):
  monkeypatch.setattr(
    headline, "unknown", lambda commits: [each for each in commits if each[0] != "a"]
  )
  assert headline.check_commits({"net": ROWS["net"] | {"commit": commit}}) == faults
  excused = commit in (None, HERE)
  monkeypatch.setattr(headline, "WITHOUT_COMMIT", ("net",))
  assert headline.check_commits({"net": ROWS["net"] | {"commit": commit}}) == (
    [] if excused else faults
  )


def test_commits_are_looked_up_where_the_whole_history_is_there(headline, monkeypatch, tmp_path):
  def git(*words):
    done = subprocess.run(
      ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip()

  monkeypatch.setattr(headline, "ROOT", tmp_path)
  assert headline.unknown(["aaaaaaa"]) == []
  git("init")
  git("commit", "--allow-empty", "-m", "first")
  commit, tree = git("rev-parse", "HEAD"), git("rev-parse", "HEAD^{tree}")
  assert headline.unknown([commit, tree, "aaaaaaa", commit[:7]]) == [tree, "aaaaaaa"]
  (tmp_path / ".git" / "shallow").write_text(f"{commit}\n")
  assert headline.unknown(["aaaaaaa"]) == []


def test_the_results_say_how_many_rows_the_command_stored(headline):
  sources = [row.get("source") for row in headline.load_rows().values()]
  command, journal, run = map(sources.count, (None, "journal", "run"))
  said = " ".join((ROOT / "docs" / "results.md").read_text().split())
  assert f"{command} of the {len(sources)} rows were stored by it" in said
  assert f"{journal} are as the journal has them, and {run} are of the runs" in said


def test_every_stored_row_says_how_it_was_measured(headline):
  text = headline.FILE.read_text()
  content = json.loads(text)
  # Written by hand or by the command, the file looks the same.
  assert headline.dump(content) == text
  rows = content["rows"]
  assert set(headline.ROWS) <= set(rows)
  for name, row in rows.items():
    assert {"what", "command", "commit", "seeds", "hardware", "figures"} <= set(row), name
    assert row["command"], name
    assert row["hardware"], name
    # The command writes twelve digits of one commit, and no source.
    by_hand = not re.fullmatch("[0-9a-f]{12}", str(row["commit"]))
    assert row.get("source") in (("journal", "run") if by_hand else (None, "run")), name
    # Where no commit is known, or no command measures the row again, a note says more.
    if row["commit"] is None or name not in headline.ROWS:
      assert row["note"], name
    if name in headline.ROWS:
      assert row["what"] == headline.ROWS[name].what, name
    for figure in row["figures"].values():
      values = figure.get("values")
      if values is None:
        continue
      assert len(values) == len(row["seeds"]), name
      known = [value for value in values if value is not None]
      assert figure["mean"] == pytest.approx(statistics.fmean(known), abs=1e-6), name
      assert figure["range"] == [min(known), max(known)], name


@pytest.mark.parametrize(
  ("text", "stored"),
  [
    ("97.78, 98.89 % <!-- figures: net.accuracy -->", ["97.78", "98.89"]),
    ("98.9 and 53 % <!-- figures: net.accuracy[5], .macs -->", ["98.9", "53"]),
    ("97.8 to 98.9 <!-- figures: net.accuracy.min, net.accuracy.max -->", ["97.8", "98.9"]),
    # Halves go up.
    ("98.34 <!-- figures: net.accuracy.mean -->", ["98.34"]),
    ("336 of ResNet20 <!-- figures: net.gates[3] -->", ["336"]),
    ("1,235 ms of CIFAR-10 <!-- figures: other.ms -->", ["1,235"]),
    # Differences are without a sign.
    ("1.11 less <!-- figures: net.accuracy[3] - .accuracy[5] -->", ["1.11"]),
    ("23.2 × <!-- figures: other.ms / net.macs -->", ["23.2"]),
    ("53.1 with 25 % open <!-- figures: net.macs, 25 -->", ["53.1", "25"]),
    ("seeds 3, 5 <!-- figures: net.seeds -->", ["3", "5"]),
    # Numbers before those that are named stay as they are.
    ("In 100 epochs 53.1 <!-- figures: net.macs --> and 336 <!-- figures: net.gates[3] -->", None),
  ],
)
def test_marks_name_the_numbers_before_them(headline, text, stored):
  claims, faults = headline.read_claims(text, ROWS)
  assert faults == []
  assert [claim.stored for claim in claims] == (stored or ["53.1", "336"])
  assert [claim.said for claim in claims] == [claim.stored for claim in claims]
  for claim in claims:
    assert text[claim.start : claim.end] == claim.said


@pytest.mark.parametrize(
  ("text", "fault"),
  [
    ("5 <!-- figures: nothing.macs -->", "it has no 'nothing'"),
    ("5 <!-- figures: net.cost -->", "must name a figure of 'net': accuracy, macs, gates"),
    ("5 <!-- figures: net.accuracy[4] -->", r"the seeds are \[3, 5\]"),
    ("5 <!-- figures: net.macs[3] -->", "only the mean over seeds is known"),
    ("5 <!-- figures: net.macs.max -->", "only the mean over seeds is known"),
    ("5 <!-- figures: net.gates -->", "is not known for every seed"),
    ("5 <!-- figures: macs -->", "must be row.figure"),
    ("5 <!-- figures: net.accuracy - net.macs -->", "must be one value less"),
    ("5 <!-- figures: net.accuracy -->", "names 2 figures behind 1 numbers"),
    ("53.1 %\n<!-- figures: net.macs -->", "must not begin a line"),
  ],
)
def test_wrong_marks_are_told(headline, text, fault):
  _, faults = headline.read_claims(text, ROWS)
  assert len(faults) == 1
  assert re.search(fault, faults[0])


def test_measured_numbers_without_a_name_are_told(headline):
  text = """# Title of 5 %

`code 5 %` and [a link](page.md#5-%) of CIFAR-10, with 7 images and no unit.
A paragraph with 6 %.

| what of 8 % | 9 % |
|---|---|
| first column 10 % | 11 |

```bash
12 %
```
- An item with 13 points.
"""
  _, faults = headline.read_claims(text, ROWS, complete=True)
  found = [re.search(r"for (\S+) in", fault)[1] for fault in faults]
  assert found == ["5", "6", "11", "13"]


def test_pages_are_filled_with_what_is_stored(headline, monkeypatch, tmp_path, capsys):
  page = tmp_path / "README.md"
  page.write_text("1.0 and 2.00 % <!-- figures: net.macs, .accuracy[3] --> of 3.\n")
  monkeypatch.setattr(headline, "ROOT", tmp_path)
  headline.fill_pages(ROWS)
  assert page.read_text() == "53.1 and 97.78 % <!-- figures: net.macs, .accuracy[3] --> of 3.\n"
  assert "README.md: 2.00 is now 97.78 (.accuracy[3])" in capsys.readouterr().out
  assert headline.check_pages(ROWS) == []


# Measuring


@pytest.fixture
def measuring(headline, monkeypatch, tmp_path):
  """Returns a function that measures these rows, and then the stored rows."""
  file = tmp_path / "headlines.json"
  file.write_text('{"rows": {}}\n')
  monkeypatch.setattr(headline, "FILE", file)
  monkeypatch.setattr(headline, "MACHINE", "print('a machine')")
  monkeypatch.setattr(headline, "commit_of_code", lambda: "abc")

  def measure(rows, *arguments):
    headline.ROWS.clear()
    headline.ROWS.update(rows)
    monkeypatch.setattr(sys, "argv", ["headline.py", f"--runs={tmp_path / 'runs'}", *arguments])
    headline.main()
    return json.loads(file.read_text())["rows"]

  return measure


def program(text):
  """Returns a command that runs this text as Python."""
  return f"python -c {shlex.quote(text)}"


def of_seed(headline, folder):
  """Returns a row whose result is a tenth of its seed, and whose runs are counted in a file."""
  text = (
    "import pathlib, json; folder = pathlib.Path('{runs}'); "
    "log = (folder / 'count').open('a'); log.write('x'); "
    "(folder / '{seed}.json').write_text(json.dumps(dict(a=dict(b={seed} / 10), c=2)))"
  )
  # `format` takes the places only.
  figures = {
    "percent": headline.ROWS["digits"].figures["accuracy"]._replace(path=("a", "b")),
    "half": headline.ROWS["digits"]
    .figures["accuracy"]
    ._replace(path=("a", "b"), scale=1, over=("c",)),
  }
  row = headline.ROWS["digits"]
  return row._replace(
    what="a row", command=program(text), figures=figures, result="{runs}/{seed}.json", seeds=(3, 5)
  )


def test_a_row_is_measured_for_each_seed_and_not_again(headline, measuring, tmp_path, capsys):
  row = of_seed(headline, tmp_path)
  stored = measuring({"one": row})
  assert stored["one"] == {
    "what": "a row",
    "command": row.command.format(runs="runs", seed="SEED"),
    "commit": "abc",
    "seeds": [3, 5],
    "hardware": "a machine",
    "figures": {
      "percent": {"values": [30.0, 50.0], "mean": 40.0, "range": [30.0, 50.0]},
      "half": {"values": [0.15, 0.25], "mean": 0.2, "range": [0.15, 0.25]},
    },
  }
  count = tmp_path / "runs" / "abc" / "count"
  assert count.read_text() == "xx"
  assert measuring({"one": row}) == stored
  assert "one: measured already" in capsys.readouterr().out
  # With a seed more, the commands that have ended are not repeated.
  more = measuring({"one": row._replace(seeds=(3, 5, 7))})
  assert more["one"]["seeds"] == [3, 5, 7]
  assert count.read_text() == "xxx"


def test_a_row_that_fails_is_told_and_the_others_are_measured(
  headline, measuring, tmp_path, capsys
):
  good = of_seed(headline, tmp_path)
  rows = {
    "fails": good._replace(command=program("raise SystemExit(3)")),
    "lacks": good._replace(command=program("print({seed})"), result="{runs}/none.json"),
    "good": good,
    "elsewhere": good._replace(device="gpu"),
    "folder": good._replace(command="{data} {seed}"),
  }
  with pytest.raises(SystemExit, match="not measured: fails, lacks; outputs are in"):
    measuring(rows)
  assert set(json.loads(headline.FILE.read_text())["rows"]) == {"good"}
  output = capsys.readouterr().out
  assert "elsewhere: needs --device=gpu" in output
  assert "folder: needs --data" in output


def test_a_command_for_all_seeds_runs_once_and_may_give_means_alone(headline, measuring, tmp_path):
  text = (
    "import pathlib, json; pathlib.Path('{runs}/table.json').write_text("
    "json.dumps([dict(name='a', each=[0.1, 0.2], mean=7)]))"
  )
  figure = headline.ROWS["digits"].figures["accuracy"]
  row = of_seed(headline, tmp_path)._replace(
    command=program(text),
    result="{runs}/table.json",
    figures={
      "each": figure._replace(path=({"name": "a"}, "each")),
      "mean": figure._replace(path=({"name": "a"}, "mean"), scale=1),
    },
  )
  assert measuring({"table": row})["table"]["figures"] == {
    "each": {"values": [10.0, 20.0], "mean": 15.0, "range": [10.0, 20.0]},
    "mean": {"mean": 7},
  }


def test_a_row_is_not_stored_if_the_code_changes_meanwhile(
  headline, measuring, monkeypatch, tmp_path
):
  commits = iter(["abc", "abc", "def"])
  monkeypatch.setattr(headline, "commit_of_code", lambda: next(commits))
  row = of_seed(headline, tmp_path)
  with pytest.raises(SystemExit, match="second is not stored: the code was committed anew"):
    measuring({"first": row, "second": row})
  assert set(json.loads(headline.FILE.read_text())["rows"]) == {"first"}


def test_only_must_name_a_row(headline, measuring, tmp_path, capsys):
  with pytest.raises(SystemExit):
    measuring({"one": of_seed(headline, tmp_path)}, "--only=two")
  assert "--only must match the name of a row; got 'two'" in capsys.readouterr().err


def test_code_that_differs_from_its_commit_is_refused(headline, monkeypatch):
  class Done:
    stdout = " M gating_jax/cli.py\n"

  monkeypatch.setattr(headline.subprocess, "run", lambda *_, **__: Done)
  with pytest.raises(SystemExit, match="these files differ from it:\nM gating_jax/cli.py"):
    headline.commit_of_code()


@pytest.mark.parametrize(
  ("row", "figure", "output", "number"),
  [
    ("segments", "half", "r2plus1d18:0.5          1     8 of 16         8   446.7 ms   226.3 ms"
     "      1.97   0.504        0.99    0.8", 1.97),
    ("segments", "quarter", "r2plus1d18:0.5          1     4 of 16         4   446.7 ms   121.3 ms"
     "      3.68   0.254        0.94    0.7", 3.68),
    ("trained", "one_xla", "| 1 | ungated | XLA | 83.17% | 40,551,040 | 0.801 | 0.790 | 1.00 |",
     0.801),
    ("trained", "many", "| 64 | gated | auto (native) | 82.64% | 20,641,219 | 9.831 | 9.7 | 2.57 |",
     9.831),
    ("block", "half", "| block N=1 C=64 32x32 | 50.2% | 0.730 | 0.727 | 0.400 | switch | 0.441 | "
     "1.65 | 1.55 | 1.60 |", 1.65),
    ("block", "quarter", "| block N=1 C=64 32x32 | 25.3% | 0.730 | 0.727 | 0.300 | switch | 0.284 "
     "| 2.56 | 2.30 | 2.50 |", 2.56),
    ("native", "half", "     8x64x16      300      310      200      151  1.98x       79  3.78x"
     "       46  6.56x        1.06", 3.78),
    ("native", "quarter", "     8x64x16      300      310      200      151  1.98x       79  3.78x"
     "       46  6.56x        1.06", 6.56),
  ],
)  # fmt: skip
def test_numbers_are_found_in_what_benchmarks_print(headline, row, figure, output, number):
  text = f"a title\n{output}\nanother line\n"
  assert headline.numbers(headline.ROWS[row].figures[figure], text) == [number]
  with pytest.raises(ValueError, match="the output has no"):
    headline.numbers(headline.ROWS[row].figures[figure], "something else\n")


# Rows agree with configs and benchmarks


def commands(row):
  """Returns the words of each command of a row."""
  text = row.command.format(runs="runs", seed=0, data="data", authors="authors")
  return [shlex.split(command) for command in text.split(" && ")]


def test_rows_of_the_command_name_configs_and_fields(headline):
  found = 0
  for name, row in headline.ROWS.items():
    for words in commands(row):
      if "gating-jax" not in words or "--mode=train" not in words:
        continue
      flags = dict(word.removeprefix("--").partition("=")[::2] for word in words if "--" in word)
      file, _, variant = flags["config"].partition(":")
      module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
      config = module.get_config(variant)
      for flag in flags:
        section = config
        for part in flag.split(".")[1:]:
          assert part in section, (name, flag)
          section = section[part]
      found += 1
  assert found >= 15


def test_rows_of_benchmarks_name_what_these_have(headline):
  import continual
  import images
  import long_video

  for name, row in headline.ROWS.items():
    words = commands(row)[-1]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words if "--" in word)
    if "benchmarks/images.py" in words:
      table = images.TABLES[words[words.index("benchmarks/images.py") + 1]]
      chosen = [item for item in table if re.search(flags.get("only", ""), item)]
      assert {figure.path[0]["name"] for figure in row.figures.values()} <= set(chosen), name
    if "benchmarks/long_video.py" in words:
      assert set(flags["rows"].split(",")) <= set(long_video.ROWS), name
    if "benchmarks/continual.py" in words:
      assert flags["methods"] in continual.METHODS, name
      changed = words[words.index("--set") + 1 :] if "--set" in words else []
      arguments = continual.argparse.Namespace(config=flags["config"], set=changed)
      continual.configured(arguments, {"method": flags["methods"], "seed": 0})
