"""Mutated pictures and tables are read correctly or refused in one line.

There is no crash, no hang, and no unbounded memory.
"""

import csv
import io
import itertools
import re
import resource
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gating_jax.data import features, streaming
from gating_jax.data import tfds as tfds_sets
from gating_jax.data.tfds import DatasetNotPreparedError
from gating_jax.data.video_tables import (
  read_breakfast,
  read_charades,
  read_multithumos,
  read_table,
)
from tests.helpers import expected_tables
from tests.helpers.made_tables import write
from tests.helpers.made_tfds import encoded

FEW, ALL = 500, 2000
MOST_SECONDS, MOST_MEMORY = 10, 1 << 30  # of one file; of all
counts = pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])

EXTREMES = (b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\xff\xff", b"\x80\x00\x00\x00")
CHARACTERS = tuple(character.encode() for character in "\u2028\u2029\x85\f\v\x1c\ufeff\u00a0\u0663")
BLANKS = (b" ", b"\t", b",", b", ", b" ,", b"\r")
PIECES = (
  *CHARACTERS,
  *BLANKS,
  b"\n",
  b"\0",
  b";",
  b'"',
  b'""',
  b"-",
  b"nan",
  b"1e999",
  b"_",
  b"..",
  b"\xff",
  b"\xc3",
)


def mutated(data, random, pieces):
  """Makes one to three changes: bytes flipped, cut off, deleted, repeated, moved or inserted."""
  for _ in range(random.integers(1, 4)):
    first = random.integers(0, len(data) + 1)
    last = min(first + random.integers(12), len(data))
    part = data[first:last]
    kind = random.integers(7)
    if kind == 0 and part:
      place = random.integers(first, last)
      data = data[:place] + bytes([data[place] ^ 1 << random.integers(8)]) + data[place + 1 :]
    elif kind == 1:
      data = data[:last]
    elif kind == 2:
      data = data[:first] + data[last:]
    elif kind == 3:
      data = data[:last] + part + data[last:]
    elif kind == 4:
      data = part + data[:first] + data[last:]
    elif kind == 5:
      data = data[:first] + pieces[random.integers(len(pieces))] + data[first:]
    else:
      piece = pieces[random.integers(len(pieces))]
      data = data[:first] + piece + data[first + len(piece) :]
  return data


def renamed(texts, random):
  """Inserts the same character into a word, wherever it occurs in these files."""
  words = sorted(set(re.findall(rb"\w\w+", b" ".join(texts.values()))))
  word, character = (choices[random.integers(len(choices))] for choices in (words, CHARACTERS))
  return {name: text.replace(word, word[:1] + character + word[1:]) for name, text in texts.items()}


def turned(text, random):
  """Swaps two consecutive numbers."""
  pairs = list(re.finditer(rb"([\d.]+)([ \t-]+)([\d.]+)", text))
  if not pairs:
    return text
  pair = pairs[random.integers(len(pairs))]
  return text[: pair.start()] + pair[3] + pair[2] + pair[1] + text[pair.end() :]


def padded(text, random):
  """Adds blanks or separators at the beginning or the end of a line."""
  lines = text.split(b"\n")
  place, blank = random.integers(len(lines)), BLANKS[random.integers(len(BLANKS))]
  lines[place] = blank + lines[place] if random.integers(2) else lines[place] + blank
  return b"\n".join(lines)


def pierced(text, random):
  """Inserts a character, separator or quote somewhere."""
  place = random.integers(len(text))
  return text[:place] + PIECES[random.integers(len(PIECES))] + text[place:]


def changed(texts, random):
  """Returns the files of a table, by name, after one kind of change."""
  name, kind = sorted(texts)[random.integers(len(texts))], random.integers(5)
  if kind == 0:
    return renamed(texts, random)
  change = (turned, padded, pierced, lambda text, random: mutated(text, random, PIECES))[kind - 1]
  return texts | {name: change(texts[name], random)}


def watched(read, *errors):
  """Returns the result of `read()`, or its error of these kinds, in one line and in time."""
  began = time.monotonic()
  try:
    found = read()
  except errors as error:
    found = error
  assert time.monotonic() - began < MOST_SECONDS
  assert not isinstance(found, Exception) or str(found).isprintable()  # which a new line is not
  return found


@pytest.fixture
def bounded_memory():
  most = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  before = most()
  yield
  assert most() - before < MOST_MEMORY


def files():
  """Pictures of every kind and mode."""
  colours = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
  picture, grey = Image.fromarray(colours), Image.fromarray(colours[..., 0])
  deep = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
  made = [(picture, kind) for kind in features.FORMATS]
  made += [
    (grey, "PNG"),
    (grey, "JPEG"),
    (deep, "PNG"),
    (deep, "TIFF"),
    (picture.convert("RGBA"), "PNG"),
  ]
  made += [
    (picture.quantize(), "PNG"),
    (grey.convert("1"), "PNG"),
    (picture.convert("CMYK"), "JPEG"),
  ]
  return [encoded(picture, kind).getvalue() for picture, kind in made]


class OneFile:
  """A TFDS source of one example."""

  split, dataset_info = "train", types.SimpleNamespace()

  def __init__(self, file):
    self.file = file

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return {"image": self.file, "label": 0}


def opened(file):
  """A set of this picture."""
  readers = {
    "image": features.Picture(tfds.features.Image(), "feature 'image' of a_set"),
    "label": features.ImageClass(
      tfds.features.ClassLabel(num_classes=1), "feature 'label' of a_set"
    ),
  }
  return tfds_sets.Examples(OneFile(file), "a_set", readers)


def read_picture(file):
  """Returns the picture as it is read, and as training sees it."""
  source = opened(file)
  stream = streaming.Stream(source, source.class_names, (8, 8, 3), crop_area=0.5)
  return source[0]["image"], stream.read_one(0, (1, 2))[0], stream.read_one(0, None)[0]


def test_an_index_error_of_a_decoder_is_of_the_file_and_not_the_end_of_the_set(monkeypatch):
  source = opened(files()[0])
  assert len(list(itertools.islice(source, 2))) == 1

  def decode(*_):
    raise IndexError("pop from empty list")

  monkeypatch.setattr(features, "decode_picture", decode)
  with pytest.raises(
    DatasetNotPreparedError, match="example 0 .* cannot be read .IndexError: pop from empty list"
  ):
    list(itertools.islice(source, 2))


@counts
def test_mutated_pictures_are_read_as_they_look_or_named(count, bounded_memory):
  kinds, read = files(), 0
  for i in range(count):
    random = np.random.default_rng((1, i))
    file = mutated(kinds[i % len(kinds)], random, EXTREMES)
    found = watched(lambda file=file: read_picture(file), DatasetNotPreparedError, ValueError)
    if isinstance(found, Exception):
      assert "a_set" in str(found)
      continue
    read += 1
    whole, *parts = found
    assert [part.shape for part in parts] == [(8, 8, 3)] * 2
    assert {part.dtype for part in found} == {np.dtype(np.uint8)}
    with Image.open(io.BytesIO(file)) as picture:
      if picture.mode.startswith("I;16"):
        assert np.abs(whole - np.asarray(picture)[..., None] / 257).max() <= 0.5
      elif features.decode_picture(file, 3).dtype == np.uint8:
        np.testing.assert_array_equal(whole, picture.convert("RGBA").convert("RGB"))
  assert 0.1 * count < read < 0.9 * count


def made_tables():
  """Returns, by reader, the contents and the files, some of which are changed."""
  charades = {
    "Charades_v1_classes.txt": "c000 Holding some clothes\nc001 Putting clothes, somewhere\n",
    "Charades_v1_train.csv": "id,script,actions,length\n"
    '46GP8,"He said, ""so""",c001 11.90 21.20;c000 0 12.6,24.83\n'
    "N11GT,line,,18.33\nXXXXX,line,c001 0.00 3.00; ;,\n",
  }
  thumos = {
    "class_list.txt": "1 BaseballPitch\n2 Run\n",
    "annotations/BaseballPitch.txt": "video_validation_0000266 72.80 76.40\nvideo_test_0000002\t1 "
    "2\n",
    "annotations/Run.txt": "video_validation_0000266 1.00 2.00\nvideo_validation_0000100 3.5 4.0\n",
  }
  own = {
    "all.csv": 'video,label,note\na/1.mp4,tea,x\n2,coffee,"y, z"\n3 ,"tea",\n\n4,\t"juice" \n',
    "split.txt": "3\n\na/1.mp4\n4\n",
  }
  segmentation = {"P03/cam01/P03_cereals.txt": "1-30 SIL  \n31-150 take_bowl\n151-151 SIL\n"}
  return [
    (
      lambda folder: read_table(folder / "all.csv", folder / "split.txt"),
      expected_tables.own_format,
      own,
    ),
    (lambda folder: read_charades(folder, "train"), expected_tables.charades, charades),
    (lambda folder: read_multithumos(folder, "train"), expected_tables.multithumos, thumos),
    (
      lambda folder: read_breakfast(folder, "train", segmentation=folder),
      expected_tables.breakfast,
      segmentation,
    ),
  ]


@pytest.mark.parametrize(
  "text",
  [
    "a,b\n",
    '"a","b ""c"""\n\n, d',
    'a "b", "c\n"\n',
    '"a" b\n',
    '"a',
    "a,\t b\t,",
    '"","a"""b"\n',
    "",
  ],
)
def test_the_csv_of_the_fuzz_is_that_of_python(text):
  try:
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True))
  except csv.Error:
    with pytest.raises(expected_tables.Broken):
      expected_tables.csv_fields(text)
    return
  fields = lambda rows: [[field.strip(" \t") for field in row] for row in rows if any(row)]
  assert fields(expected_tables.csv_fields(text)) == fields(rows)


@counts
def test_mutated_tables_are_read_as_they_stand_or_named(count, tmp_path, bounded_memory):
  kinds, read = made_tables(), 0
  for i in range(count):
    random = np.random.default_rng((2, i))
    reader, said, texts = kinds[i % len(kinds)]
    folder = write(tmp_path / str(i), {"P03/cam01/P03_cereals.avi": ""})
    for name, text in changed(
      {name: text.encode() for name, text in texts.items()}, random
    ).items():
      (folder / name).parent.mkdir(exist_ok=True)
      (folder / name).write_bytes(text)
    found = watched(lambda read=reader, folder=folder: read(folder), ValueError, FileNotFoundError)
    expected = said(folder)
    if isinstance(found, Exception):
      assert str(folder) in str(found)
      assert expected is None, f"refused: {found}"
    else:
      read += 1
      assert expected_tables.described(found) == expected
  assert 0.1 * count < read < 0.9 * count
