"""Contents of a table's files, read independently of the readers: by characters, without patterns.

Each function takes a folder and returns a list of `(name, classes, intervals, seconds)`, one per
video: a set of names, a list of `(start, end, unit)`, and None for an unknown length. It returns
None where a file breaks a rule.
"""

import math

BLANKS = " \t"
_DIGITS = set("0123456789")


class Broken(Exception):
  """Error: a file breaks a rule."""


def _require(rule):
  if not rule:
    raise Broken


def _or_none(expected):
  def found(folder):
    try:
      return expected(folder)
    except (Broken, UnicodeDecodeError, FileNotFoundError):
      return None

  return found


def described(table):
  """The same of a table that was read."""
  found = []
  for i, name in enumerate(table.names):
    places = table.labels[i].nonzero()[0] if table.multi_label else [table.labels[i]]
    units = (
      []
      if table.units is None
      else [(start, end, table.unit_names[unit]) for start, end, unit in table.units[i]]
    )
    seconds = None if table.seconds is None or math.isnan(table.seconds[i]) else table.seconds[i]
    found.append((name, {table.class_names[place] for place in places}, units, seconds))
  return found


@_or_none
def own_format(folder):
  """Reads a table `all.csv` and a split `split.txt`."""
  labels = {}
  rows = _csv(folder / "all.csv", ["video", "label"])
  several = any(";" in label for _, label in rows)
  for video, label in rows:
    _require(video and video not in labels)
    labels[video] = {part.strip(BLANKS) for part in label.split(";")} - {""}
    _require(several or labels[video])
  names = _lines(folder / "split.txt")
  _require(
    names and len(set(names)) == len(names) and set(names) <= set(labels) and any(labels.values())
  )
  return [(name, labels[name], [], None) for name in names]


@_or_none
def charades(folder):
  """The training split."""
  classes, found, seen = {}, [], set()
  for line in _lines(folder / "Charades_v1_classes.txt"):
    code, name = line[:4], line[4:]
    _require(
      code[0] == "c" and len(code) == 4 and set(code[1:]) <= _DIGITS and name[:1] in ("\t", " ")
    )
    _require(code not in classes)
    classes[code] = name.strip(BLANKS)
  for video, actions, length in _csv(folder / "Charades_v1_train.csv", ["id", "actions", "length"]):
    _require(video and video not in seen)
    seen.add(video)
    intervals = [_interval(action) for action in actions.split(";") if action.strip(BLANKS)]
    _require(all(code in classes for code, *_ in intervals))
    seconds = _number(length) if length else None
    _require(seconds is None or 0 < seconds < math.inf)
    units = [(start, end, classes[code]) for code, start, end in intervals]
    found.append((video, {name for *_, name in units}, units, seconds))
  _require(found)
  return found


@_or_none
def multithumos(folder):
  """The training split."""
  classes, units = [], {}
  for line in _lines(folder / "class_list.txt"):
    fields = _fields(line)
    _require(len(fields) == 2 and fields[0] == str(len(classes) + 1))
    _require("/" not in fields[1] and fields[1] != "." and fields[1] not in classes)
    classes.append(fields[1])
  for name in classes:
    for line in _lines(folder / "annotations" / f"{name}.txt"):
      video, start, end = _interval(line)
      _require(video.startswith(("video_validation_", "video_test_")))
      if video.startswith("video_validation_"):
        units.setdefault(video, []).append((start, end, name))
  _require(units)
  return [
    (video, {name for *_, name in units[video]}, units[video], None) for video in sorted(units)
  ]


@_or_none
def breakfast(folder):
  """The training split of one video, whose file is there, with its segmentation."""
  units = []
  for line in _lines(folder / "P03/cam01/P03_cereals.txt"):
    fields = _fields(line)
    _require(len(fields) == 2)
    frames = fields[0].split("-")
    _require(
      len(frames) == 2 and all(0 < len(frame) < 10 and set(frame) <= _DIGITS for frame in frames)
    )
    first, last = map(int, frames)
    _require(1 <= first <= last)
    units.append(((first - 1) / 15, last / 15, fields[1]))
  return [
    ("P03/cam01/P03_cereals", {"cereals"}, units, max((end for _, end, _ in units), default=None))
  ]


def _text(path):
  text = path.read_bytes().decode("utf-8-sig")
  _require("\0" not in text)
  return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path):
  lines = [line.strip(BLANKS) for line in _text(path).split("\n")]
  return [line for line in lines if line]


def _fields(text):
  return [field for field in text.replace("\t", " ").split(" ") if field]


def _number(text):
  _require(set(text) <= _DIGITS | set("+-.eE"))
  try:
    return float(text)
  except ValueError:
    raise Broken from None


def _interval(text):
  fields = _fields(text)
  _require(len(fields) == 3)
  start, end = map(_number, fields[1:])
  _require(0 <= start < end < math.inf)
  return fields[0], start, end


def _csv(path, columns):
  """Returns the fields of these columns, row by row."""
  header, *rows = csv_fields(_text(path))
  _require(all(header.count(column) == 1 for column in columns))
  places = [header.index(column) for column in columns]
  rows = [row for row in rows if any(row)]
  _require(all(len(row) > max(places) and not any(row[len(header) :]) for row in rows))
  return [[row[place] for place in places] for row in rows]


def csv_fields(text):
  """Returns all rows of a CSV file whose lines end at LF, with one state for each character."""
  rows, row, field, state = [], [], "", "before"
  for character in text + "\n":
    if state == "inside":
      state, field = ("quote", field) if character == '"' else ("inside", field + character)
    elif character == '"' and state in ("before", "quote"):
      state, field = "inside", "" if state == "before" else field + character
    elif character in ",\n":
      row.append(field.strip(BLANKS))
      state, field = "before", ""
      if character == "\n":
        rows.append(row)
        row = []
    elif state in ("quote", "after"):
      _require(character in BLANKS)
      state = "after"
    else:
      field += character
      state = state if character in BLANKS else "plain"
  _require(state == "before")
  return rows
