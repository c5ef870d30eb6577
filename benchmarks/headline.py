"""Headline figures: measures them, stores them, and checks that the pages say what is stored.

    python benchmarks/headline.py --list
    python benchmarks/headline.py [--only=REGEX] [--data=FOLDER] [--authors=FOLDER] [--device=cpu]
        [--runs=runs/headlines]
    python benchmarks/headline.py --check
    python benchmarks/headline.py --fill

The rows are those of `headline_rows.py`. Each is measured by its command, once for each of its
seeds, and stored in docs/headlines.json with command, commit, seeds, values, mean, range and
hardware. `commit` is that of all seeds, or a list with one for each. A row that was stored by hand
has `source`: `journal`, the pages of docs/results, or `run`, a run of another purpose. The file is
written after every row, and the same command resumes: a row that was measured at this commit, and a
command that has ended, are not repeated. A row whose folder is missing (DATA: a TFDS folder;
AUTHORS: a checkout of the authors' code) or whose device is another is left out.

A page names its figures in a comment right behind them, in their order:

    | CIFAR-10, gated | 80.06, 81.18 % | 3.16 M MACs <!-- figures: wide_50.accuracy, .macs --> |

`row.figure` stands for the values of all seeds, or for the mean where only that is known;
`row.figure[1]` for that of seed 1; `row.figure.mean`, `.min` and `.max` for what they say;
`row.seeds` for the seeds. `.figure` is of the row that was named last. `a.x - b.x` and `a.x / b.x`
are differences and ratios, whose sign the sentence says, and a number stands for itself: a setting.
A figure is compared as it is printed, with as many decimals. A comment never begins a line, since
it would end the paragraph.

`--check` prints what differs, which measured numbers of the main pages have no name, and which rows
name no commit of this repository; `--fill` writes the stored figures into the pages.
"""

import argparse
import hashlib
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from headline_rows import ROWS

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "headlines.json"
# Pages on which every measured number must have a name. On others only named ones are compared.
MAIN_PAGES = ("README.md", "docs/index.md", "docs/results.md", "docs/when_gates_pay.md")
# What decides the numbers. A commit of text alone makes no row old.
CODE = ("gating_jax", "configs", "benchmarks")
# Rows that may name no commit: those that are to be measured again.
WITHOUT_COMMIT: tuple[str, ...] = ()
COMMIT = re.compile(r"[0-9a-f]{7,40}")
# A checked-out tree is used as it stands, wherever the package is installed from.
MACHINE = (
  "import jax; from gating_jax.timing import device; print(f'{device()}, jax {jax.__version__}')"
)

MARK = re.compile(r"<!-- figures: (.*?) -->")
# Not a number within a word or name, such as 10 in CIFAR-10.
NUMBER = re.compile(r"(?<![\w.\-/])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|\.\d)")
NAME = re.compile(r"(\w*)\.([a-z]\w*)(?:\[(\d+)\]|\.(mean|min|max))?")
UNIT = re.compile(r"\s?(?:%|×|points?\b|ms\b|M\b)")
# Code, targets of links and attributes.
HIDDEN = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)|\{[^}\n]*\}", re.DOTALL)


def main():
  """Lists, checks, fills or measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  modes = parser.add_mutually_exclusive_group()
  modes.add_argument("--list", action="store_true", help="print the rows and what is stored")
  modes.add_argument("--check", action="store_true", help="print what pages say differently")
  modes.add_argument("--fill", action="store_true", help="write the stored figures into the pages")
  parser.add_argument("--only", default="", help="of the names of rows")
  parser.add_argument("--data", type=Path, help="a TFDS folder")
  parser.add_argument("--authors", type=Path, help="a checkout of the authors' batch-shaping code")
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--runs", type=Path, default=Path("runs/headlines"))
  args = parser.parse_args()
  chosen = [name for name in ROWS if re.search(args.only, name)]
  if not chosen:
    parser.error(f"--only must match the name of a row; got {args.only!r}")
  if args.list:
    list_rows(chosen)
  elif args.check:
    rows = load_rows()
    differences = check_commits(rows) + check_pages(rows)
    sys.exit("\n".join(differences) if differences else 0)
  elif args.fill:
    fill_pages(load_rows())
  else:
    measure_rows(args, chosen)


def load_rows():
  """Returns the stored rows by name."""
  return json.loads(FILE.read_text())["rows"]


def list_rows(names):
  """Prints each row: its name, the seeds and commit that are stored, and its command."""
  stored = load_rows()
  for name in names:
    row = stored.get(name, {})
    seeds = ",".join(map(str, row.get("seeds", [])))
    commit = row.get("commit") or "-"
    commit = ",".join(commit) if isinstance(commit, list) else commit
    print(f"{name:<24}{seeds or '-':<12}{commit}\n{'':<24}{shown(ROWS[name])}")


# Measuring


def measure_rows(args, names):
  """Measures rows, and stores each as soon as it is there."""
  # Running commands are asked to stop, and save their state.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  commit = commit_of_code()
  folder = (args.runs / commit).resolve()
  folder.mkdir(parents=True, exist_ok=True)
  hardware = subprocess.run(
    [sys.executable, "-c", MACHINE], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.strip()
  places = {"runs": folder}
  for name in ("data", "authors"):
    if getattr(args, name):
      places[name] = getattr(args, name).resolve()
  failed = []
  for name in names:
    row, stored = ROWS[name], load_rows().get(name, {})
    reason = why_not(row, args.device, places)
    if not reason and stored.get("commit") == commit and stored["seeds"] == list(row.seeds):
      reason = "measured already"
    if reason:
      print(f"{name}: {reason}", flush=True)
      continue
    try:
      values = measure(row, places, folder)
    except (subprocess.CalledProcessError, OSError, LookupError, ValueError) as error:
      print(f"{name}: NOT DONE: {error!r}", flush=True)
      failed.append(name)
      continue
    # A row takes hours, in which the code may have been changed.
    if commit_of_code() != commit:
      sys.exit(f"{name} is not stored: the code was committed anew while it was measured")
    store(name, entry(row.what, shown(row), commit, row.seeds, hardware, values))
    print(f"{name}: done", flush=True)
  if failed:
    sys.exit(f"not measured: {', '.join(failed)}; outputs are in {folder}")


def commit_of_code():
  """Returns the last commit of the code; ends this process where files differ from it."""

  def git(*words):
    """Returns the output of a git command."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  if changed := git("status", "--porcelain", "--", *CODE):
    sys.exit(f"figures must be of a commit; these files differ from it:\n{changed}")
  return git("log", "-1", "--abbrev=12", "--format=%h", "--", *CODE)


def why_not(row, device, places):
  """Returns why a row cannot be measured here; None where it can."""
  if row.device != device:
    return f"needs --device={row.device}"
  for name in ("data", "authors"):
    if f"{{{name}}}" in row.command and name not in places:
      return f"needs --{name}"
  return None


def shown(row):
  """Returns the command of a row as the file has it."""
  return row.command.format(runs="runs", seed="SEED", data="FOLDER", authors="AUTHORS")


def measure(row, places, folder):
  """Returns the values of each figure: one for each seed, or one mean over seeds.

  Args:
    row: what to measure.
    places: folders by the names that commands have for them.
    folder: for outputs of commands.
  Raises:
    CalledProcessError: a command failed.
    OSError, LookupError, ValueError: a command left no such number.
  """
  values = {name: [] for name in row.figures}
  # A command that takes all seeds is one run.
  seeds = row.seeds if "{seed}" in row.command else row.seeds[:1]
  for seed in seeds:
    source = ""
    for command in row.command.format(seed=seed, **places).split(" && "):
      source = output_of(command, folder)
    if row.result:
      source = json.loads(Path(row.result.format(seed=seed, **places)).read_text())
    for name, figure in row.figures.items():
      values[name] += numbers(figure, source)
  return values


def output_of(command, folder):
  """Runs a command, unless it has ended before, and returns what it printed.

  Raises:
    CalledProcessError: it failed.
  """
  file = folder / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.txt"
  ended = file.with_suffix(".ended")
  if not ended.exists():
    words = []
    for word in shlex.split(command):
      own = {"gating-jax": [sys.executable, "-m", "gating_jax"], "python": [sys.executable]}
      words += own.get(word, [word])
    print(f"running {command}", flush=True)
    with file.open("w") as output:
      process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
      try:
        status = process.wait()
      except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
      raise subprocess.CalledProcessError(status, command, str(file))
    ended.write_text(f"{command}\n")
  return file.read_text()


def numbers(figure, source):
  """Returns the numbers that a figure has in a result, or in what a command printed.

  Raises:
    LookupError: the result has no such item.
    ValueError: the text does not match.
  """
  if isinstance(figure.path, str):
    match = re.search(figure.path, source, re.MULTILINE)
    if match is None:
      raise ValueError(f"the output has no {figure.path!r}")
    found = float(match[1].replace(",", ""))
  else:
    found = look_up(source, figure.path)
  found = found if isinstance(found, list) else [found]
  if None in found:
    raise LookupError(f"the result has no value at {figure.path}")
  divisor = look_up(source, figure.over) if figure.over else 1
  return [figure.scale * number / divisor for number in found]


def look_up(found, path):
  """Returns what stands at a path; a step that is a dict finds the item of a list that has it.

  Raises:
    LookupError: there is no such item.
  """
  for step in path:
    if isinstance(step, dict):
      matching = [item for item in found if step.items() <= item.items()]
      if len(matching) != 1:
        raise LookupError(f"{len(matching)} items have {step}, where there must be one")
      (found,) = matching
    else:
      found = found[step]
  return found


def entry(what, command, commit, seeds, hardware, values):
  """Returns a row as the file has it.

  Raises:
    ValueError: a figure has neither a value for each seed nor one mean.
  """
  figures = {}
  for name, found in values.items():
    rounded = [number if number is None else round(number, 6) for number in found]
    known = [number for number in rounded if number is not None]
    if len(rounded) == len(seeds):
      mean = round(statistics.fmean(known), 6)
      figures[name] = {"values": rounded, "mean": mean, "range": [min(known), max(known)]}
    elif len(rounded) == 1:
      figures[name] = {"mean": rounded[0]}
    else:
      raise ValueError(f"{name} must have {len(seeds)} values or one; got {rounded}")
  return {
    "what": what,
    "command": command,
    "commit": commit,
    "seeds": list(seeds),
    "hardware": hardware,
    "figures": figures,
  }


def store(name, row):
  """Puts a row into the file."""
  content = json.loads(FILE.read_text())
  content["rows"][name] = row
  FILE.write_text(dump(content))


def dump(content):
  """Returns the text of the file: one line for each list and figure."""
  text = json.dumps(content, indent=2, ensure_ascii=False)
  # Lists of numbers, and then figures, which hold nothing else.
  text = re.sub(r"\[[^\[\]{}\"]*\]", lambda match: joined(match[0]), text)
  text = re.sub(r'\{\s*"(?:values|mean)":[^{}]*\}', lambda match: joined(match[0]), text)
  return f"{text}\n"


def joined(text):
  """Returns a list or object on one line."""
  return re.sub(r"([\[{]) | ([\]}])", r"\1\2", " ".join(text.split()))


# Checking


class Block(NamedTuple):
  """A row of a table, an item of a list or a paragraph: its place in the page.

  Attributes:
    start, end: characters.
    cells: where the cells behind the first begin; None of what is no table.
  """

  start: int
  end: int
  cells: int | None = None


class Claim(NamedTuple):
  """A number of a page whose figure is named.

  Attributes:
    start, end: characters.
    said: as the page has it.
    stored: as the file has it.
    name: of the figure.
  """

  start: int
  end: int
  said: str
  stored: str
  name: str


def commits_of(row):
  """Returns the commit of each seed of a row, which has them as a list, or one for all."""
  commit = row["commit"]
  return commit if isinstance(commit, list) else [commit] * len(row["seeds"])


def check_commits(rows):
  """Returns a line for each row that does not name one commit of this repository per seed."""
  faults, named = [], {}
  for name, row in rows.items():
    commits = commits_of(row)
    if commits == [None] * len(row["seeds"]) and name in WITHOUT_COMMIT:
      continue
    if len(commits) != len(row["seeds"]):
      faults.append(f"{name}: {len(commits)} commits for {len(row['seeds'])} seeds")
    for commit in dict.fromkeys(commits):
      if COMMIT.fullmatch(str(commit)):
        named.setdefault(commit, name)
      else:
        faults.append(f"{name}: commit must be 7 to 40 hexadecimal digits; got {commit!r}")
  return faults + [f"{named[commit]}: no commit {commit} here" for commit in unknown(list(named))]


def unknown(commits):
  """Returns the commits that the history does not have; none where it is cut or missing."""
  git = ["git", "-C", str(ROOT)]
  shallow = subprocess.run(
    [*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False
  )
  # An unpacked archive has no history, and a shallow clone the newest commit alone.
  if shallow.stdout.strip() != "false":
    return []
  asked = "".join(f"{commit}^{{commit}}\n" for commit in commits)
  found = subprocess.run(
    [*git, "cat-file", "--batch-check=%(objecttype)"],
    input=asked,
    capture_output=True,
    text=True,
    check=True,
  )
  kinds = found.stdout.splitlines()
  return [commit for commit, kind in zip(commits, kinds, strict=True) if kind != "commit"]


def check_pages(rows):
  """Returns what README and pages say differently from the stored rows, one line each."""
  found = []
  for path in pages():
    page = path.relative_to(ROOT).as_posix()
    claims, faults = read_claims(path.read_text(), rows, complete=page in MAIN_PAGES)
    for claim in claims:
      if claim.said != claim.stored:
        faults.append(f"{claim.said} must be {claim.stored}, which is {claim.name}")
    found += [f"{page}: {fault}" for fault in faults]
  return found


def fill_pages(rows):
  """Writes the stored figures into the pages, and prints each that changes."""
  for path in pages():
    text = path.read_text()
    claims, _ = read_claims(text, rows)
    # From the end, so that the places before stay.
    for claim in reversed(claims):
      if claim.said != claim.stored:
        print(f"{path.relative_to(ROOT)}: {claim.said} is now {claim.stored} ({claim.name})")
        text = text[: claim.start] + claim.stored + text[claim.end :]
    path.write_text(text)


def pages():
  """Returns the files that may name figures."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_claims(text, rows, *, complete=False):
  """Finds the named numbers of a page.

  Args:
    text: of the page.
    rows: of the file.
    complete: whether every measured number must be named: those in tables, but for the first
      column, and those with a unit elsewhere.
  Returns:
    The claims in their order, and what is wrong with marks and with numbers that have none.
  """
  hidden = HIDDEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
  claims, faults = [], []
  for block in blocks(hidden):
    at = block.start
    for mark in MARK.finditer(hidden, block.start, block.end):
      said = list(NUMBER.finditer(hidden, at, mark.start()))
      if not hidden[hidden.rfind("\n", 0, mark.start()) + 1 : mark.start()].strip():
        faults.append(f"{mark[0]} must not begin a line: it would end the paragraph")
      try:
        named = named_figures(mark[1], rows)
      except ValueError as error:
        faults.append(f"{mark[0]}: {error}")
        named = []
      if len(said) < len(named):
        faults.append(f"{mark[0]} names {len(named)} figures behind {len(said)} numbers")
        named = []
      unnamed = said[: len(said) - len(named)]
      faults += unnamed_faults(hidden, block, unnamed) if complete else []
      for number, (name, value) in zip(said[len(unnamed) :], named, strict=True):
        stored = printed(value, like=number[0])
        claims.append(Claim(number.start(), number.end(), number[0], stored, name))
      at = mark.end()
    rest = list(NUMBER.finditer(hidden, at, block.end))
    faults += unnamed_faults(hidden, block, rest) if complete else []
  return claims, faults


def blocks(text):
  """Returns the blocks of a page, whose code is hidden; heads of tables are left out."""
  found, at, table_lines, running = [], 0, 0, False
  for line in text.splitlines(keepends=True):
    end = at + len(line)
    if line.startswith("|"):
      table_lines, running = table_lines + 1, False
      # The first two lines are the head.
      if table_lines > 2:
        found.append(Block(at, end, at + line.index("|", 1)))
    else:
      table_lines = 0
      if not line.strip():
        running = False
      elif running and not line.startswith(("- ", "#")):
        found[-1] = found[-1]._replace(end=end)
      else:
        found.append(Block(at, end))
        running = True
    at = end
  return found


def unnamed_faults(text, block, numbers_there):
  """Returns a line for each number that should have a name."""
  faults = []
  for number in numbers_there:
    in_cell = block.cells is not None and number.start() > block.cells
    with_unit = block.cells is None and UNIT.match(text, number.end())
    if in_cell or with_unit:
      around = " ".join(text[max(block.start, number.start() - 40) : number.end() + 10].split())
      faults.append(f"no figure is named for {number[0]} in '{around}'")
  return faults


def named_figures(text, rows):
  """Returns pairs of a name and its value, of the names in a mark; settings are strings.

  Raises:
    ValueError: the file has no such figure.
  """
  found, row = [], ""
  for name in re.split(r",\s+", text):
    if NUMBER.fullmatch(name):
      found.append((name, name))
      continue
    left, *rest = re.split(r"\s+([-/])\s+", name)
    values, row = figure_values(left, row, rows)
    if rest:
      others, row = figure_values(rest[1], row, rows)
      if len(rest) != 2 or len(values) != 1 or len(others) != 1:
        raise ValueError(f"{name!r} must be one value less, or over, another")
      values = [values[0] - others[0] if rest[0] == "-" else values[0] / others[0]]
    found += [(name, value) for value in values]
  return found


def figure_values(name, row, rows):
  """Returns the values that a name stands for, and the row that is then the last.

  Raises:
    ValueError: the file has no such figure.
  """
  if NUMBER.fullmatch(name):
    return [float(name.replace(",", ""))], row
  match = NAME.fullmatch(name)
  if match is None:
    raise ValueError(f"{name!r} must be row.figure, perhaps with [seed], .mean, .min or .max")
  of_row, figure, seed, kind = match.groups()
  row = of_row or row
  if row not in rows:
    raise ValueError(f"{name!r} must name a row of the file; it has no {row!r}")
  stored = rows[row]
  if figure == "seeds":
    return stored["seeds"], row
  if figure not in stored["figures"]:
    raise ValueError(f"{name!r} must name a figure of {row!r}: {', '.join(stored['figures'])}")
  found = stored["figures"][figure]
  if kind == "mean" or (not kind and not seed and "values" not in found):
    values = [found["mean"]]
  elif "values" not in found:
    raise ValueError(f"{name!r}: only the mean over seeds is known")
  elif kind:
    values = [found["range"][kind == "max"]]
  elif seed:
    if int(seed) not in stored["seeds"]:
      raise ValueError(f"{name!r}: the seeds are {stored['seeds']}")
    values = [found["values"][stored["seeds"].index(int(seed))]]
  else:
    values = found["values"]
  if None in values:
    raise ValueError(f"{name!r} is not known for every seed")
  return values, row


def printed(value, *, like):
  """Formats a value with the decimals of the text; a setting, which is a string, stays."""
  if isinstance(value, str):
    return value
  # Halves go up, also where a float is a little below.
  return f"{abs(value) + 1e-9:,.{len(like.partition('.')[2])}f}"


if __name__ == "__main__":
  main()
