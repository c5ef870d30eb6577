"""Images in folders of their classes, or in a table of paths and labels.

    data_dir/train/CLASS/*.jpg, data_dir/test/CLASS/*.jpg     a folder for each split
    data_dir/CLASS/*.jpg                                      split by a hash of the path
    table.csv                                                 columns path, label and perhaps split

There is a folder for each split where a folder `train` has folders of files in it. Case does not
matter in these names, and `training`, `testing`, `valid` and `validation` stand for `train`, `test`
and `val`. A folder `train` that has only files is a class, like any other.

Files lie at any depth below their class; links to folders are followed. The files of the splits in
use are decoded once when a folder is opened: those that cannot be read are named, counted and left
out, so that no training stops at one. Hidden files, those of other endings, and those outside
folders of classes are left out and counted.

Axes: H and W pixels.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from gating_jax.checks import few, printable, user_path
from gating_jax.data import features
from gating_jax.data.checked_files import (
  FaultNotes,
  UnreadableFileError,
  find_faults,
  keep_ranges,
  recall_ranges,
  stamp_files,
)
from gating_jax.data.text_files import csv_rows
from gating_jax.terminal import warn

# The name of such a set in configs.
FOLDER = "folder"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

_CHANNELS = 3
# Fraction of images that is for tests where a folder has no splits.
_TEST_FRACTION = 0.2
# Fewer images than these are decoded in a moment, and not remembered.
_MANY = 1000
# Images in a row that cannot be read any more before reading stops.
_MOST_REPLACED = 100
# Names that people give to folders of splits, in lower case, and the split that each stands for.
_SPLIT_NAMES = {
  "train": "train",
  "training": "train",
  "test": "test",
  "testing": "test",
  "val": "val",
  "valid": "val",
  "validation": "val",
}
# The first images of a split: `train[:64]`.
_FIRST = re.compile(r"(.+)\[:(\d{1,18})\]", re.DOTALL)
# The first bytes of files of these formats.
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"RIFF")
# Reasons why a file cannot be opened.
_REASONS = {
  FileNotFoundError: "is missing",
  PermissionError: "may not be read (permission denied)",
  IsADirectoryError: "is a folder",
}
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Entry(NamedTuple):
  """A file: its path, the name of its class, and its split."""

  file: Path
  label: str
  split: str


class Listing(NamedTuple):
  """The files that a folder or a table names, none of which has been opened.

  Attributes:
    entries: the files, in the order of their paths.
    splits: names of the splits, also of those without any file.
    outside: by split, the number of its files that lie outside folders of classes.
  """

  entries: tuple[Entry, ...]
  splits: tuple[str, ...]
  outside: Mapping[str, int]


class _Part(NamedTuple):
  """A split, or its first `count` images, some of each class."""

  split: str
  count: int | None


class _Checked(NamedTuple):
  """The readable images of the splits in use.

  Attributes:
    listing: all files.
    class_names: of the splits in use.
    parts: the images of each split in use, in the order of their paths.
    unreadable: the reason for each file of these splits that cannot be read, by its path.
  """

  listing: Listing
  class_names: tuple[str, ...]
  parts: Mapping[_Part, tuple[Entry, ...]]
  unreadable: Mapping[str, str]


class FolderImages(Sequence):
  """Images of a split, decoded when they are read.

  An example has the picture, uint8 `[H, W, 3]`, and its class. Palettes, grey, 16 bits and CMYK
  become colours of 8 bits; white shows through what is transparent; the orientation that a camera
  noted is applied; of several frames the first is read.

  Attributes:
    class_names: one per class.
    shape: `(None, None, 3)`, since sizes differ between images.
    unreadable: the reason for each file that was left out, of all splits in use, by its path.
  """

  shape = (None, None, _CHANNELS)

  def __init__(
    self,
    entries: Sequence[Entry],
    class_names: Sequence[str],
    folder: Path,
    *,
    image: str,
    label: str,
    unreadable: Mapping[str, str],
  ):
    self.unreadable = dict(unreadable)
    self._files, self._folder = [entry.file for entry in entries], folder
    self.class_names = tuple(class_names)
    places = {name: place for place, name in enumerate(class_names)}
    self._labels = [places[entry.label] for entry in entries]
    self._image, self._label = image, label

  def __len__(self) -> int:
    return len(self._files)

  @property
  def file_names(self) -> tuple[str, ...]:
    """Returns the path of each image, relative to the folder if it lies there."""
    # Made when they are asked for: worker processes of a large folder do without.
    return tuple(_name_in(self._folder, file) for file in self._files)

  def __getitem__(self, index: int) -> dict[str, Any]:
    pixels = features.to_uint8(_read_file(self._files[index]))
    return {self._image: pixels, self._label: self._labels[index]}


def read_or_replace(examples: Sequence[Any], index: int, notes: FaultNotes | None = None) -> Any:
  """Returns an example; in place of one whose file cannot be read any more, the next that can.

  Args:
    examples: of a folder, or of any other set, whose errors are its own.
    index: of the example.
    notes: receives the files that cannot be read any more.
  Raises:
    ValueError: no file of the set can be read any more, or none of the 100 from `index` on.
  """
  # So many are no single damaged files: the folder is gone, or its disk.
  tried = min(len(examples), _MOST_REPLACED)
  for step in range(tried):
    try:
      return examples[(index + step) % len(examples)]
    except UnreadableFileError as error:
      if notes is not None:
        notes.note({str(error.file): error.reason})
  raise ValueError(f"none of {tried} images can be read any longer: is the folder still there?")


def open_folder(
  data_dir: str | None,
  split: str,
  image: str = "image",
  *,
  label: str = "label",
  in_use: Sequence[str] | None = None,
) -> FolderImages:
  """Opens a split of a folder of classes, or of a table.

  Args:
    data_dir: the folder, or a file that ends in `.csv`.
    split: the name of a split: of a folder in `data_dir`, or a value of the table's column `split`;
      else `train` or `test`, which has a fifth of the images. `train[:64]` are its first 64, some
      of each class.
    image, label: keys of the picture and of the class in an example.
    in_use: the splits that agree on the classes, which are those of their images; files of no other
      split are opened. None for all splits.
  Raises:
    ValueError: no such folder or split, a table without its columns or with a row that breaks a
      rule, no readable image, or pictures that would be almost black.
  """
  root = _find_root(data_dir)
  wanted = None if in_use is None else tuple(sorted({split, *in_use}))
  checked = _list_images(root, root.stat().st_mtime_ns, wanted)
  part = _find_part(split, checked.listing, root)
  entries = checked.parts.get(part)
  if entries is None:
    entries = _first_of_each(checked.parts[_Part(part.split, None)], part.count)
  if not entries:
    raise ValueError(f"data split {split!r} of {root} must hold at least one image; it is empty")
  return FolderImages(
    entries,
    checked.class_names,
    root if root.is_dir() else root.parent,
    image=image,
    label=label,
    unreadable=checked.unreadable,
  )


def count_classes(data_dir: str | None, splits: Sequence[str]) -> int:
  """Counts the classes of the splits, readable or not, without opening any image.

  Args:
    data_dir, splits: as `data_dir` and `in_use` of `open_folder`, which has the errors.
  """
  root = _find_root(data_dir)
  listing = _list_all(root)
  parts = {_find_part(split, listing, root).split for split in splits}
  return len({entry.label for entry in listing.entries if entry.split in parts})


def first_of(split: str, count: int) -> str:
  """Returns the name of the first images of a split, or of a part of one, see `open_folder`.

  >>> first_of("train", 64), first_of("train[:10]", 64)
  ('train[:64]', 'train[:10]')
  """
  if first := _FIRST.fullmatch(split):
    split, count = first[1], min(count, int(first[2]))
  return f"{split}[:{count}]"


def list_files(root: Path, endings: Sequence[str]) -> Listing:
  """Lists the files in folders of classes; says how the folder was read and what is left out.

  Args:
    root: the folder, with a folder for each split or for each class; where there is none for a
      split, a hash of the path puts a fifth of the files into `test`.
    endings: of the files to list, in lower case.
  Raises:
    ValueError: the only folders with files have the names of splits.
  """
  outside, entries = {"": _count_outside(root, endings)}, []
  below = _folders(root)
  if _are_splits(below, endings):
    warn("%s: read as a folder for each split: %s", printable(root), few(_names(below)))
    for folder in below:
      entries += _of_classes(folder, folder.name, endings)
      outside[folder.name] = _count_outside(folder, endings)
    splits = _names(below)
  else:
    entries = _of_classes(root, None, endings)
    splits = sorted({entry.split for entry in entries})
    labels = sorted({entry.label for entry in entries})
    if labels and all(label.lower() in _SPLIT_NAMES for label in labels):
      raise ValueError(
        f"{root} must hold folders of classes, or a folder for each split, of which train has "
        f"folders of classes; got {few(labels)}"
      )
    if entries:
      warn(
        "%s: read as folders of classes, of whose files a hash of the path puts a fifth into the "
        "test",
        printable(root),
      )
  return Listing(tuple(_in_order(entries)), tuple(splits), outside)


def in_class_order(names: Iterable[str]) -> tuple[str, ...]:
  """Returns the names of classes in their order, which is that of numbers where all are whole.

  >>> in_class_order(["10", "9", "0"]), in_class_order(["10", "9", "cat"])
  (('0', '9', '10'), ('10', '9', 'cat'))
  """
  names = sorted(names)
  if all(_WHOLE_NUMBER.fullmatch(name) for name in names):
    names.sort(key=int)
  return tuple(names)


def find_split(name: str, splits: Iterable[str]) -> str | None:
  """Returns the split that a name stands for; None where there is none, or several.

  >>> find_split("validation", ["Train", "val"]), find_split("train", ["Train", "val"])
  ('val', 'Train')
  """
  splits = list(splits)
  if name in splits:
    return name
  same = [split for split in splits if _plain_name(split) == _plain_name(name)]
  return same[0] if len(same) == 1 else None


def read_picture(encoded: bytes) -> np.ndarray:
  """Decodes a file of any of `ENDINGS` to uint8 `[H, W, 3]`, upright and on white.

  Raises:
    Exception: any error of Pillow for damaged files; a file of too many pixels.
  """
  return features.to_uint8(_decode(encoded))


def _decode(encoded: bytes) -> np.ndarray:
  """Decodes a file to `[H, W, 3]` of the file's own type, upright and on white."""
  return features.decode_picture(encoded, _CHANNELS, upright=True, on_white=True)


def _read_file(file: Path) -> np.ndarray:
  """Reads a file as `_decode` does; raises UnreadableFileError where no picture can be made."""
  encoded = None
  try:
    encoded = file.read_bytes()
    pixels = _decode(encoded)
  # A lack of memory is no fault of the file.
  except MemoryError:
    raise
  # Damaged files make decoders raise errors of many types.
  except Exception as error:
    raise UnreadableFileError(file, _explain_fault(error, encoded)) from error
  try:
    features.to_uint8(pixels)
  except ValueError as error:
    raise UnreadableFileError(file, f"has {error}") from error
  return pixels


def _explain_fault(error: Exception, encoded: bytes | None) -> str:
  """Returns in words why a file cannot be read; None for content that was not read."""
  if encoded is None:
    for kind, reason in _REASONS.items():
      if isinstance(error, kind):
        return reason
    return f"cannot be opened: {getattr(error, 'strerror', None) or type(error).__name__}"
  if not encoded:
    return "is empty"
  if isinstance(error, features.TooLargeError):
    return f"has more than {features.MOST_PIXELS:,} pixels"
  if isinstance(error, PIL.UnidentifiedImageError) and not encoded.startswith(_BEGINNINGS):
    return "is no image of a known format"
  # Pillow's own words show the address of an object.
  truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
  return "is truncated" if truncated else "is truncated or damaged"


def _find_root(data_dir: str | None) -> Path:
  """Returns the path of a folder or a table, which must be there."""
  if data_dir is None:
    raise ValueError(
      f"data.data_dir must be a folder of classes or a .csv file where data.name is {FOLDER!r}; "
      "got None"
    )
  root = user_path(data_dir)
  if not root.exists():
    raise ValueError(f"data.data_dir must be a folder of classes or a .csv file; no {root} exists")
  return root


# The splits of a run are opened one by one, and list the same files. With the time of the last
# change, since a folder may have been filled since.
@functools.lru_cache(maxsize=4)
def _list_images(root: Path, changed: int, wanted: tuple[str, ...] | None) -> _Checked:
  """Returns the readable images of the splits in use; says what is left out.

  Args:
    root: the folder or the table.
    changed: the time of its last change.
    wanted: the splits in use; None for all.
  """
  del changed
  listing = _list_all(root)
  if not listing.entries:
    raise _no_image(root, listing)
  if wanted is None:
    parts = [_Part(split, None) for split in listing.splits]
  else:
    parts = [_find_part(split, listing, root) for split in wanted]
  chosen = {}
  for part in parts:
    own = [entry for entry in listing.entries if entry.split == part.split]
    chosen[part] = _first_of_each(own, part.count)
  # Two parts may share images.
  entries = _in_order(set(itertools.chain(*chosen.values())))
  ranges, unreadable = _check_files([entry.file for entry in entries], listing, root)
  for part, own in chosen.items():
    chosen[part] = tuple(entry for entry in own if entry.file in ranges)
  readable = [entry for entry in entries if entry.file in ranges]
  if not readable:
    raise _no_image(root, listing)
  features.check_scale(
    ranges.values(),
    f"pictures of {printable(root)}",
    "Save them with 255 as white, or 65535 where files have 16 bits a channel",
  )
  classes = in_class_order({entry.label for entry in readable})
  warn(
    "%s: %d images of %d classes: %s", printable(root), len(readable), len(classes), few(classes)
  )
  for part, own in chosen.items():
    missing = set(classes) - {entry.label for entry in own}
    # The first images need not have every class.
    if own and missing and part.count is None:
      names = few(in_class_order(missing))
      warn("%s: split %r has no image of class %s", printable(root), part.split, names)
  return _Checked(listing, classes, chosen, unreadable=unreadable)


def _no_image(root: Path, listing: Listing) -> ValueError:
  """Returns the error for a folder or a table without an image that can be read."""
  lost = listing.outside.get("", 0)
  advice = f"; it has {lost} images outside folders of classes" if lost else ""
  return ValueError(
    f"data.data_dir must hold images ({', '.join(ENDINGS)}) in folders of their classes, or name "
    f"a .csv file with columns path and label; {root} has no readable image{advice}"
  )


def _list_all(root: Path) -> Listing:
  """Lists the images of a folder or of a table."""
  return _of_table(root) if root.is_file() else list_files(root, ENDINGS)


def _find_part(text: str, listing: Listing, root: Path) -> _Part:
  """Returns the part of a folder that a config names, such as `test` or `train[:64]`.

  Raises:
    ValueError: there is no such split.
  """
  split, count = find_split(text, listing.splits), None
  if split is None and (first := _FIRST.fullmatch(text)):
    split, count = find_split(first[1], listing.splits), int(first[2])
  if split is not None and any(entry.split == split for entry in listing.entries):
    return _Part(split, count)
  known = sorted({entry.split for entry in listing.entries})
  lost = listing.outside.get(split, 0) if split else 0
  advice = f": {split}/ has {lost} images outside folders of classes" if lost else ""
  raise ValueError(
    f"data split of {root} must be one of {few(known) or 'none'}; got {text!r}{advice}"
  )


def _first_of_each(entries: Sequence[Entry], count: int | None) -> tuple[Entry, ...]:
  """Returns the first entries, as many of each class as of another if there are; None for all."""
  if count is None or count >= len(entries):
    return tuple(entries)
  seen: collections.Counter[str] = collections.Counter()
  ranks = []
  for place, entry in enumerate(entries):
    ranks.append((seen[entry.label], place))
    seen[entry.label] += 1
  taken = sorted(place for _, place in sorted(ranks)[:count])
  return tuple(entries[place] for place in taken)


def _plain_name(split: str) -> str:
  """Returns the name of a split without its case and spelling."""
  return _SPLIT_NAMES.get(split.lower(), split.lower())


def _are_splits(below: Sequence[Path], endings: Sequence[str]) -> bool:
  """Returns whether folders are those of splits: one of training has folders with files."""
  for path in below:
    if _plain_name(path.name) == "train":
      return any(_has_files(of_class, endings) for of_class in _folders(path))
  return False


def _has_files(folder: Path, endings: Sequence[str]) -> bool:
  """Returns whether a folder has files of these endings, at any depth."""
  return any(not hidden and file.suffix.lower() in endings for file, hidden in _files(folder))


def _folders(root: Path) -> list[Path]:
  """Returns the folders in a folder, in order and without hidden ones."""
  found = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
  return sorted(found, key=os.fsencode)


def _name_in(folder: Path, file: Path) -> str:
  """Returns the path of a file below a folder; its whole path where it lies elsewhere."""
  return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def _names(folders: Sequence[Path]) -> list[str]:
  """Returns the names of folders."""
  return [path.name for path in folders]


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
  """Returns entries in the order of the bytes of their paths, which no locale changes."""
  return sorted(entries, key=lambda entry: os.fsencode(entry.file))


def _of_classes(root: Path, split: str | None, endings: Sequence[str]) -> list[Entry]:
  """Returns the files in the folders of classes below `root`; None splits them by hash."""
  entries, others = [], collections.Counter()
  # Classes with a file of their own, and folders between the other files and their classes.
  direct, between = set(), {}
  for folder in _folders(root):
    # Bytes that are not UTF-8 still give a name that can be written.
    label = os.fsencode(folder.name).decode("utf-8", "backslashreplace")
    for file, hidden in _files(folder):
      if hidden:
        others["hidden"] += 1
      elif file.suffix.lower() not in endings:
        others[file.suffix or "no ending"] += 1
      else:
        place = file.relative_to(root)
        entries.append(Entry(file, label, split or _split_of(os.fsencode(place))))
        if len(place.parts) == 2:
          direct.add(label)
        else:
          between[place.parts[1]] = folder
  if others:
    counts = [f"{count} of {ending}" for ending, count in sorted(others.items())]
    warn("%s: left out hidden files and other endings: %s", printable(root), few(counts))
  # Other splits may lack classes, and are not always in use.
  if split is None or _plain_name(split) == "train":
    _doubt_classes(root, {entry.label for entry in entries}, direct, between=between)
  return entries


def _doubt_classes(
  root: Path, labels: set[str], direct: set[str], *, between: Mapping[str, Path]
) -> None:
  """Warns of folders that were read as classes but may be something else.

  Args:
    root: the folder of the classes.
    labels: the classes.
    direct: the classes that have a file of their own, and not only folders.
    between: the folders below those of classes, by name, each with that of its class.
  """
  classes = few(in_class_order(labels))
  if labels and not direct:
    advice = ""
    if len(labels) == 1:
      (folder,) = set(between.values())
      advice = f". If these are the classes or the splits, give {printable(folder)} in its place"
    warn(
      "%s: read as classes: %s, in which there are only folders: %s%s",
      printable(root),
      classes,
      few(list(between)),
      advice,
    )
  elif len(labels) == 1:
    warn("%s: all files are of one class, %s", printable(root), classes)
  named = [label for label in labels if label.lower() in _SPLIT_NAMES]
  if named:
    warn("%s: read as classes, and not as splits: %s", printable(root), few(sorted(named)))


def _count_outside(folder: Path, endings: Sequence[str]) -> int:
  """Counts the files in a folder itself, outside those of classes, and says how many are left out.

  Hidden files and folders and files of other endings are counted in the message alone.
  """
  outside = others = hidden = 0
  for path in folder.iterdir():
    if path.name.startswith(".") and path.is_dir():
      hidden += sum(1 for _ in _files(path))
    elif path.suffix.lower() in endings and not path.name.startswith("."):
      outside += path.is_file()
    else:
      others += path.is_file()
  if outside or others or hidden:
    warn(
      "%s: left out %d files outside folders of classes, %d that are hidden or of other endings, "
      "and %d in hidden folders",
      printable(folder),
      outside,
      others,
      hidden,
    )
  return outside


def _files(folder: Path) -> Iterator[tuple[Path, bool]]:
  """Yields the files below a folder, and whether each is hidden or in a hidden folder.

  Links to folders are followed, to each folder once.
  """
  # A link to a folder around this one would bring in the files of other classes.
  seen = {_identity(above) for above in folder.resolve().parents}
  # Folders come before links, so that a link which is added changes no path.
  starts = [folder]
  for start in starts:
    for place, below, names in os.walk(start, onerror=_say_unopened):
      if (identity := _identity(place)) in seen:
        below.clear()
        continue
      seen.add(identity)
      below.sort()
      for name in below:
        if os.path.islink(os.path.join(place, name)):
          starts.append(Path(place, name))
      parts = Path(place).relative_to(folder).parts
      aside = any(part.startswith(".") for part in parts)
      for name in names:
        yield Path(place, name), aside or name.startswith(".")


def _say_unopened(error: OSError) -> None:
  """Says that a folder cannot be opened."""
  warn("%s: left out a folder that cannot be opened: %s", printable(error.filename), error.strerror)


def _identity(folder: str | Path) -> tuple[int, int]:
  """Returns numbers that a folder has under each of its paths."""
  stat = os.stat(folder)
  return stat.st_dev, stat.st_ino


def _of_table(table: Path) -> Listing:
  """Returns the images of a table, whose paths are relative to its folder or begin with `~`.

  Raises:
    ValueError: no CSV file with columns path and label, or a row that breaks a rule.
  """
  entries, without = [], []
  try:
    for line, row in csv_rows(table, ("path", "label"), optional=("split",)):
      path, label = row["path"], row["label"]
      if not path or not label:
        without.append(f"line {line.number}")
        continue
      file = table.parent / os.path.expanduser(path)
      # Elsewhere a backslash is a letter, which a name may have.
      if "\\" in path and not file.exists():
        raise line.error("separate the folders of a path by / and not by a backslash", path)
      entries.append(Entry(file, label, row["split"] or _split_of(os.fsencode(path))))
  except (ValueError, OSError) as error:
    raise ValueError(
      f"data.data_dir must be a table of columns path and label, perhaps split; {printable(error)}"
    ) from None
  if without:
    warn(
      "%s: left out %d rows without a path or a label: %s",
      printable(table),
      len(without),
      few(without),
    )
  splits = sorted({entry.split for entry in entries})
  return Listing(tuple(_in_order(entries)), tuple(splits), {})


def _split_of(path: bytes) -> str:
  """Returns the split of an image, by a hash of its path: files that are added move no others."""
  number = int.from_bytes(hashlib.sha256(path).digest()[:8], "big")
  return "test" if number < _TEST_FRACTION * 2**64 else "train"


def _check_files(
  files: Sequence[Path], listing: Listing, root: Path
) -> tuple[dict[Path, np.ndarray], dict[str, str]]:
  """Decodes files, but for those of a large set that were decoded before; names those that fail.

  Args:
    files: those to decode.
    listing: all files.
    root: the folder or the table.
  Returns:
    for each file that can be decoded its smallest and its largest value, `[2]` of the file's type;
    and for each other the reason, by its path.
  """
  many = len(files) >= _MANY
  # From before they are read: a file that changes meanwhile is then read again.
  stamps = stamp_files(files) if many else {}
  ranges = recall_ranges(root, stamps) if many else {}
  new = [file for file in files if file not in ranges]

  def read(file):
    """Decodes a file as `read_picture` does, and notes its range."""
    pixels = _read_file(file)
    ranges[file] = np.array([pixels.min(), pixels.max()], pixels.dtype)

  faults = find_faults(
    new,
    read,
    f"checking the images of {root.name}",
    describe=_reason_of,
  )
  unreadable = {str(file): fault for file, fault in zip(new, faults, strict=True) if fault}
  if unreadable:
    warn(
      "%s: %d of %d images cannot be read and are left out: %s",
      printable(root),
      len(unreadable),
      len(files),
      few([f"{file} ({fault})" for file, fault in unreadable.items()]),
    )
  # Threads end in any order.
  ranges = {file: ranges[file] for file in files if file in ranges}
  if many and len(unreadable) < len(new):
    keep_ranges(root, stamps, ranges, listed=[entry.file for entry in listing.entries])
  return ranges, unreadable


def _reason_of(error: Exception) -> str:
  """Returns why a file cannot be read; raises the error where the file is not at fault."""
  if isinstance(error, MemoryError):
    raise error
  return getattr(error, "reason", str(error))
