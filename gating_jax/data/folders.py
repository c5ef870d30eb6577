"""Images in folders of their classes, or in a table of paths and labels.

    data_dir/train/CLASS/*.jpg, data_dir/test/CLASS/*.jpg     a folder for each split
    data_dir/CLASS/*.jpg                                      split by a hash of the path
    table.csv                                                 columns path, label and perhaps split

Files lie at any depth below their class. Every file is decoded once when a folder is opened: those
that cannot be read are named, counted and left out, so that no training stops at one. Hidden files
and those of other endings are left out and counted.

Axes: H and W pixels.
"""

from __future__ import annotations

import collections
import csv
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gating_jax.checks import few, printable, user_path
from gating_jax.data import features
from gating_jax.data.faults import find_faults
from gating_jax.terminal import warn

# The name of such a set in configs.
FOLDER = "folder"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

_CHANNELS = 3
# Of images without a split of their own, this fraction is for tests.
_TEST_FRACTION = 0.2


class Entry(NamedTuple):
  """An image file: its path, the name of its class, and its split."""

  file: Path
  label: str
  split: str


class Listing(NamedTuple):
  """All readable images of a folder or a table.

  Attributes:
    entries: the images, in the order of their paths.
    class_names: of all splits, in sorted order.
    splits: names of the splits.
  """

  entries: tuple[Entry, ...]
  class_names: tuple[str, ...]
  splits: tuple[str, ...]


class FolderImages(Sequence):
  """Images of a split, decoded when they are read.

  An example has the picture, uint8 `[H, W, 3]`, and its class. Palettes, grey, 16 bits, CMYK and
  transparency become colours of 8 bits; the orientation that a camera noted is applied; of several
  frames the first is read.

  Attributes:
    class_names: one per class.
    shape: `(None, None, 3)`, since sizes differ between images.
  """

  shape = (None, None, _CHANNELS)

  def __init__(self, entries: Sequence[Entry], class_names: Sequence[str], image: str, label: str):
    self._files = [entry.file for entry in entries]
    self.class_names = tuple(class_names)
    places = {name: place for place, name in enumerate(class_names)}
    self._labels = [places[entry.label] for entry in entries]
    self._image, self._label = image, label

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    file = self._files[index]
    try:
      pixels = read_picture(file.read_bytes())
    # It could be read when the folder was opened.
    except Exception as error:
      raise ValueError(
        f"{printable(file)} has changed since the training began and cannot be read: "
        f"{printable(error)}"
      ) from error
    return {self._image: pixels, self._label: self._labels[index]}


def open_folder(
  data_dir: str | None, split: str, image: str = "image", label: str = "label"
) -> FolderImages:
  """Opens a split of a folder of classes, or of a table.

  Args:
    data_dir: the folder, or a file that ends in `.csv`.
    split: the name of a split: of a folder in `data_dir`, or a value of the table's column `split`;
      else `train` or `test`, which has a fifth of the images.
    image, label: keys of the picture and of the class in an example.
  Raises:
    ValueError: no such folder or split, a table without its columns, or no readable image.
  """
  if data_dir is None:
    raise ValueError(
      f"data.data_dir must be a folder of classes or a .csv file where data.name is {FOLDER!r}; "
      "got None"
    )
  root = user_path(data_dir)
  if not root.exists():
    raise ValueError(f"data.data_dir must be a folder of classes or a .csv file; no {root} exists")
  listing = _list_images(root, root.stat().st_mtime_ns)
  if split not in listing.splits:
    raise ValueError(
      f"data split of {root} must be one of {few(sorted(listing.splits))}; got {split!r}"
    )
  entries = [entry for entry in listing.entries if entry.split == split]
  if not entries:
    raise ValueError(f"data split {split!r} of {root} must hold at least one image; it is empty")
  return FolderImages(entries, listing.class_names, image, label)


def list_files(root: Path, endings: Sequence[str]) -> list[Entry]:
  """Lists the files in folders of classes; says how many others are left out.

  Args:
    root: the folder; with a folder `train` in it, each split has a folder, else a hash of the path
      puts a fifth of the files into `test`.
    endings: of the files to list, in lower case.
  """
  if not (root / "train").is_dir():
    return _in_order(_of_classes(root, None, endings))
  entries = []
  for folder in _folders(root):
    entries += _of_classes(folder, folder.name, endings)
  return _in_order(entries)


def read_picture(encoded: bytes) -> np.ndarray:
  """Decodes a file of any of `ENDINGS` to uint8 `[H, W, 3]`, upright.

  Raises:
    Exception: any error of Pillow for damaged files; a file of too many pixels.
  """
  return features.to_uint8(features.decode_picture(encoded, _CHANNELS, upright=True))


# The splits of a run are opened one by one, and list the same files. With the time of the last
# change, since a folder may have been filled since.
@functools.lru_cache(maxsize=4)
def _list_images(root: Path, changed: int) -> Listing:
  """Returns the readable images below a folder or of a table; says what is left out."""
  del changed
  entries = _in_order(_of_table(root)) if root.is_file() else list_files(root, ENDINGS)
  readable = _readable(entries, root)
  if not readable:
    raise ValueError(
      f"data.data_dir must hold images ({', '.join(ENDINGS)}) in folders of their classes, or name "
      f"a .csv file with columns path and label; {root} has no readable image"
    )
  classes = sorted({entry.label for entry in readable})
  splits = {entry.split for entry in readable}
  warn(
    "%s: %d images of %d classes: %s", printable(root), len(readable), len(classes), few(classes)
  )
  return Listing(tuple(readable), tuple(classes), tuple(sorted(splits)))


def _folders(root: Path) -> list[Path]:
  """Returns the folders in a folder, without hidden ones."""
  return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
  """Returns entries in the order of the bytes of their paths, which no locale changes."""
  return sorted(entries, key=lambda entry: os.fsencode(entry.file))


def _of_classes(root: Path, split: str | None, endings: Sequence[str]) -> list[Entry]:
  """Returns the files in the folders of classes below `root`; None splits them by hash."""
  entries, others = [], collections.Counter()
  for folder in _folders(root):
    # Bytes that are not UTF-8 still give a name that can be written.
    label = os.fsencode(folder.name).decode("utf-8", "backslashreplace")
    for file in _files(folder):
      if file.name.startswith("."):
        others["hidden"] += 1
      elif file.suffix.lower() not in endings:
        others[file.suffix or "no ending"] += 1
      else:
        place = file.relative_to(root)
        entries.append(Entry(file, label, split or _split_of(os.fsencode(place))))
  if others:
    counts = [f"{count} of {ending}" for ending, count in sorted(others.items())]
    warn("%s: left out hidden files and other endings: %s", printable(root), few(counts))
  return entries


def _files(folder: Path) -> Iterator[Path]:
  """Yields the files below a folder, without those in hidden folders."""
  for place, below, names in os.walk(folder):
    # Assigned in place, which tells `os.walk` where to continue.
    below[:] = [name for name in below if not name.startswith(".")]
    for name in names:
      yield Path(place, name)


def _of_table(table: Path) -> list[Entry]:
  """Returns the images of a table, whose paths are relative to its folder.

  Raises:
    ValueError: no CSV file with columns path and label.
  """
  entries, without = [], 0
  try:
    with table.open(newline="", encoding="utf-8-sig") as opened:
      rows = csv.DictReader(opened)
      missing = {"path", "label"} - set(rows.fieldnames or ())
      if missing:
        raise ValueError(f"it lacks the column {' and '.join(sorted(missing))}")
      for row in rows:
        # The reader gives None for a row that is too short.
        path, label, split = row["path"], row["label"], row.get("split")
        if not path or not label:
          without += 1
          continue
        entries.append(Entry(table.parent / path, label, split or _split_of(os.fsencode(path))))
  except (ValueError, csv.Error, OSError) as error:
    raise ValueError(
      f"data.data_dir must be a table of columns path and label, perhaps split; {table}: "
      f"{printable(error)}"
    ) from None
  if without:
    warn("%s: left out %d rows without a path or a label", printable(table), without)
  return entries


def _split_of(path: bytes) -> str:
  """Returns the split of an image, by a hash of its path: files that are added move no others."""
  number = int.from_bytes(hashlib.sha256(path).digest()[:8], "big")
  return "test" if number < _TEST_FRACTION * 2**64 else "train"


def _readable(entries: Sequence[Entry], root: Path) -> list[Entry]:
  """Returns the entries whose files can be decoded; names and counts the others."""
  faults = find_faults(
    [entry.file for entry in entries],
    lambda file: read_picture(file.read_bytes()),
    f"checking the images of {root.name}",
    # Pillow's own words show the address of an object.
    describe=lambda error: type(error).__name__,
  )
  readable, faulty = [], []
  for entry, fault in zip(entries, faults, strict=True):
    if fault is None:
      readable.append(entry)
    else:
      faulty.append(f"{entry.file} ({fault})")
  if faulty:
    warn(
      "%s: %d of %d images cannot be read and are left out: %s",
      printable(root),
      len(faulty),
      len(entries),
      few(faulty),
    )
  return readable
