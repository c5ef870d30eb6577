"""Folders and tables of images, with everything that people have in them."""

import io
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gating_jax.data import checked_files, features, folders, image_sets, streaming
from gating_jax.data.checked_files import FaultNotes
from gating_jax.data.image_sets import SetSource

RED = (200, 10, 10)


@pytest.fixture(autouse=True)
def _fresh():
  """Folders of one test are not those of another."""
  folders._list_images.cache_clear()
  yield
  folders._list_images.cache_clear()


def picture(size=(6, 4), mode="RGB", colour=RED):
  """A picture of one colour; `size` is width and height."""
  plain = Image.new("RGB", size, colour)
  # A palette of its own has the very colour.
  return plain.quantize() if mode == "P" else plain.convert(mode)


def saved(file, image=None, **settings):
  file.parent.mkdir(parents=True, exist_ok=True)
  (picture() if image is None else image).save(file, **settings)
  return file


def classes(root, per_class=6, names=("cat", "dog"), suffix=".png"):
  for number, name in enumerate(names):
    for i in range(per_class):
      saved(root / name / f"{i}{suffix}", picture(colour=(20 * number, 10 * i, 5)))
  return root


def test_a_folder_for_each_split_gives_its_images(tmp_path):
  classes(tmp_path / "train", 3)
  classes(tmp_path / "val", 2, names=("dog", "emu"))
  train, val = (folders.open_folder(str(tmp_path), split) for split in ("train", "val"))
  # Classes are those of all splits, so that a number means the same in each.
  assert train.class_names == val.class_names == ("cat", "dog", "emu")
  assert [example["label"] for example in train] == [0, 0, 0, 1, 1, 1]
  assert [example["label"] for example in val] == [1, 1, 2, 2]
  assert train[1]["image"].shape == (4, 6, 3)
  assert train[1]["image"][0, 0].tolist() == [0, 10, 5]
  with pytest.raises(ValueError, match="must be one of train, val; got 'test'"):
    folders.open_folder(str(tmp_path), "test")


def test_without_splits_a_hash_of_the_path_decides(tmp_path):
  classes(tmp_path / "a", 50)
  train, test = (folders.open_folder(str(tmp_path / "a"), split) for split in ("train", "test"))
  assert len(train) + len(test) == 100
  assert 8 < len(test) < 35
  # Neither the place of the folder nor further files move an image.
  os.rename(tmp_path / "a", tmp_path / "b")
  before = {file.relative_to(tmp_path / "a") for file in test._files}
  saved(tmp_path / "b" / "cat" / "new.png")
  after = folders.open_folder(str(tmp_path / "b"), "test")
  found = {file.relative_to(tmp_path / "b") for file in after._files}
  assert before <= found
  assert len(found - before) <= 1


@pytest.mark.parametrize(
  ("mode", "suffix"),
  [
    ("RGB", ".png"),
    ("RGB", ".JPG"),
    ("RGB", ".webp"),
    ("RGB", ".bmp"),
    ("P", ".gif"),
    ("P", ".png"),
    ("L", ".png"),
    ("1", ".png"),
    ("LA", ".png"),
    ("RGBA", ".png"),
    ("RGBA", ".webp"),
    ("CMYK", ".jpeg"),
    ("L", ".jpg"),
  ],
)
def test_pictures_of_every_mode_become_colours(tmp_path, mode, suffix):
  file = saved(tmp_path / f"a{suffix}", picture(mode=mode))
  pixels = folders.read_picture(file.read_bytes())
  assert (pixels.shape, pixels.dtype) == ((4, 6, 3), np.uint8)
  if mode in ("L", "LA", "1"):
    assert (pixels == pixels[..., :1]).all()
  else:
    np.testing.assert_allclose(pixels[1, 1], RED, atol=12)


@pytest.mark.parametrize(
  ("mode", "suffix"),
  [
    *((mode, ".png") for mode in ("RGBA", "LA", "P", "L", "I;16")),
    *((mode, suffix) for mode in ("RGBA", "P", "L") for suffix in (".webp", ".gif")),
  ],
)
def test_white_shows_through_what_is_transparent(tmp_path, mode, suffix):
  shades = np.array([[0, 100, 100]], np.uint8)
  expected, settings = [255, 100, 100], {"lossless": True} if suffix == ".webp" else {}
  if mode == "I;16":
    image, settings["transparency"] = Image.fromarray(shades * np.uint16(257)), 0
  else:
    image = Image.fromarray(shades)
    if mode in ("RGBA", "LA"):
      image.putalpha(Image.fromarray(np.array([[0, 255, 128]], np.uint8)))
      image, expected = image.convert(mode), [255, 100, 255 - round(155 * 128 / 255)]
    elif mode == "P":
      image = Image.fromarray(np.array([[2, 1, 1]], np.uint8)).convert("P")
      image.putpalette([0, 0, 0, 100, 100, 100, 7, 7, 7])
      settings["transparency"] = 2
    else:
      settings["transparency"] = 0
  if suffix == ".gif" and mode == "RGBA":
    # A GIF has no half transparency.
    expected[2] = 100
  if suffix == ".webp" and mode in ("P", "L"):
    image.info["transparency"] = settings["transparency"]
  file = saved(tmp_path / f"a{suffix}", image, **settings)
  pixels = folders.read_picture(file.read_bytes())
  np.testing.assert_allclose(pixels[0, :, 0], expected, atol=1)
  assert (pixels == pixels[..., :1]).all()
  # Only folders lay pictures on white.
  assert features.to_uint8(features.decode_picture(file.read_bytes(), 3))[0, 0].max() < 10


def test_sixteen_bits_become_eight(tmp_path):
  deep = Image.fromarray(np.full((4, 6), 257 * 100, np.uint16))
  file = saved(tmp_path / "deep.png", deep)
  assert (folders.read_picture(file.read_bytes()) == 100).all()


def test_the_first_frame_of_several_is_read(tmp_path):
  frames = [picture(mode="P", colour=(0, 0, 200)), picture(mode="P")]
  file = tmp_path / "film.gif"
  frames[0].save(file, save_all=True, append_images=frames[1:])
  np.testing.assert_allclose(folders.read_picture(file.read_bytes())[0, 0], (0, 0, 200), atol=12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_the_camera_noted(tmp_path, orientation):
  pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
  # By the standard: where row 0 and column 0 of the file are in the upright picture.
  upright = {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: pixels.swapaxes(0, 1),
    6: np.rot90(pixels, -1),
    7: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(pixels),
  }
  np.testing.assert_array_equal(folders.read_picture(file.read_bytes()), upright[orientation])


ODD_NAMES = ("a b", "it's", 'say "x"', "ümlaut", "two\nlines", "%s", "日本")


def test_odd_names_and_files_that_cannot_be_read_stop_nothing(tmp_path, caplog):
  root = tmp_path / "odd folder"
  for name in ODD_NAMES:
    for part in range(2):
      saved(root / "train" / name / "deeper" / f"{name}{part}.png")
  bad = root / "train" / "bad"
  whole = saved(bad / "whole.jpg").read_bytes()
  (bad / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  (bad / "empty.png").write_bytes(b"")
  (bad / "text.png").write_text("no picture")
  (bad / "line\n.gif").write_bytes(b"GIF89a")
  (bad / ".hidden.png").write_bytes(b"")
  (bad / "notes.txt").write_text("")
  (bad / "Thumbs").write_text("")
  with caplog.at_level(logging.WARNING):
    images = folders.open_folder(str(root), "train")
  assert images.class_names == tuple(sorted((*ODD_NAMES, "bad")))
  assert len(images) == 2 * len(ODD_NAMES) + 1
  assert all(example["image"].shape == (4, 6, 3) for example in images)
  said = caplog.text
  assert "4 of 19 images cannot be read and are left out" in said
  for name in ("cut.jpg", "empty.png", "text.png", "line?.gif"):
    assert name in said
  assert "left out hidden files and other endings: 1 of .txt, 1 of hidden, 1 of no ending" in said


def test_a_table_names_paths_labels_and_splits(tmp_path):
  classes(tmp_path / "pictures", 2)
  table = tmp_path / "table.csv"
  rows = ["path,label,split", "pictures/cat/0.png,tom,train", '"pictures/dog/1.png","a, b",test']
  table.write_text("\n".join([*rows, "pictures/none.png,tom,train", "pictures/cat/1.png,,train"]))
  train, test = (folders.open_folder(str(table), split) for split in ("train", "test"))
  assert train.class_names == ("a, b", "tom")
  assert [example["label"] for example in train] == [1]
  assert [example["label"] for example in test] == [0]
  assert test[0]["image"][0, 0].tolist() == [20, 10, 5]
  # Without a column of splits, a hash of the path decides.
  rows = [f"pictures/{kind}/{i}.png,{kind}" for kind in ("cat", "dog") for i in range(2)]
  table.write_text("\n".join(["path,label", *rows]))
  folders._list_images.cache_clear()
  listing = folders._of_table(table)
  own = {entry.file.name + entry.label: entry.split for entry in listing.entries}
  assert len(own) == 4
  assert set(own.values()) <= {"train", "test"}
  table.write_text("file,label\npictures/cat/0.png,tom\n")
  folders._list_images.cache_clear()
  with pytest.raises(ValueError, match="line 1: must have the columns path,label; got 'file,"):
    folders.open_folder(str(table), "train")


@pytest.mark.parametrize(
  ("data_dir", "message"),
  [
    (None, "must be a folder of classes or a .csv file where data.name is 'folder'; got None"),
    ("missing", "no .*missing exists"),
    ("", "has no readable image"),
  ],
)
def test_a_folder_without_images_is_refused(tmp_path, data_dir, message):
  with pytest.raises(ValueError, match=message):
    folders.open_folder(None if data_dir is None else str(tmp_path / data_dir), "train")


def test_both_loaders_read_a_folder(tmp_path):
  classes(tmp_path / "train", 3)
  saved(tmp_path / "train" / "cat" / "wide.png", picture(size=(40, 10)))
  folder = str(tmp_path)
  with pytest.raises(ValueError, match="images of different sizes .* set data.image_size"):
    image_sets.load(SetSource(folders.FOLDER, "train", folder))
  images = image_sets.load(SetSource(folders.FOLDER, "train", folder), image_size=4)
  assert images.pixels.shape == (7, 4, 4, 3)
  assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert image_sets.count_images(SetSource(folders.FOLDER, "train", folder)) == 7
  with pytest.raises(ValueError, match="data.image_size must be set to stream folder"):
    streaming.open_stream(SetSource(folders.FOLDER, "train", folder))
  stream = streaming.open_stream(SetSource(folders.FOLDER, "train", folder), image_size=4)
  pixels, labels = stream.read(np.arange(7))
  assert pixels.shape == (7, 4, 4, 3)
  assert labels.tolist() == images.labels.tolist()
  (first, _), *_ = stream.batches(2, 0, 1, total_steps=2)
  assert first.shape == (2, 1, 4, 4, 3)


def test_the_middle_of_an_image_is_kept_in_its_proportions(tmp_path):
  pixels = np.zeros((4, 12, 3), np.uint8)
  pixels[:, 4:8] = 100
  saved(tmp_path / "train" / "cat" / "a.png", Image.fromarray(pixels))
  images = image_sets.load(SetSource(folders.FOLDER, "train", str(tmp_path)), image_size=4)
  assert (images.pixels == 100).all()


def spoil(root):
  """Empties one file and removes another, of a folder that has been opened."""
  (root / "cat" / "1.png").write_bytes(b"")
  (root / "dog" / "0.png").unlink()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_another_image_takes_the_place_of_one_that_can_be_read_no_longer(tmp_path, caplog, workers):
  root = classes(tmp_path / "train", 3)
  (root / "cat" / "bad.png").write_bytes(b"no picture")
  source = SetSource(folders.FOLDER, "train", str(tmp_path))
  stream = streaming.open_stream(source, image_size=4, workers=workers)
  whole = image_sets.load(source, image_size=4)
  assert (
    stream.unreadable
    == whole.unreadable
    == {str(root / "cat" / "bad.png"): "is no image of a known format"}
  )
  spoil(root)
  found = list(stream.batches(6, 0, 1, total_steps=2))
  gone = {str(root / "cat" / "1.png"): "is empty", str(root / "dog" / "0.png"): "is missing"}
  assert stream.notes.later == gone
  assert stream.unreadable == whole.unreadable | gone
  for file, reason in gone.items():
    assert (
      caplog.text.count(f"{file} could be read when the data were opened, but not any more: ") == 1
    )
    assert f"it {reason}. The next image is read instead" in caplog.text
  # The next in the order of paths, whatever the order of the batch.
  place = np.array([0, 2, 2, 4, 4, 5])
  for step, (pixels, labels) in enumerate(found):
    order = place[image_sets.batch_indices(0, step, 6, 6)]
    np.testing.assert_array_equal(pixels[:, 0], whole.pixels[order])
    np.testing.assert_array_equal(labels[:, 0], whole.labels[order])
  tested = [batch for batch, _ in image_sets.padded_batches(stream, 6)]
  np.testing.assert_array_equal(tested[0][0], whole.pixels[place])


def test_a_set_in_memory_has_another_image_for_one_that_went_since_the_check(tmp_path):
  root = classes(tmp_path / "train", 3)
  source = SetSource(folders.FOLDER, "train", str(tmp_path))
  before = image_sets.load(source)
  spoil(root)
  after = image_sets.load(source)
  np.testing.assert_array_equal(after.pixels, before.pixels[[0, 2, 2, 4, 4, 5]])
  assert sorted(after.unreadable.values()) == ["is empty", "is missing"]
  # Parts of the set know of all its files.
  assert after.take(np.arange(2)).unreadable == after.unreadable
  for file in root.rglob("*.png"):
    file.unlink()
  with pytest.raises(ValueError, match="none of 6 images can be read any longer"):
    image_sets.load(source)


def test_a_union_knows_the_unreadable_files_of_its_folders(tmp_path):
  root = classes(tmp_path / "pets" / "train", 3)
  (root / "cat" / "0.png").write_bytes(b"")
  name = f"union(digits,folder:{tmp_path / 'pets'})"
  images = image_sets.load(SetSource(name, "train"), image_size=4)
  assert images.unreadable == {str(root / "cat" / "0.png"): "is empty"}


def test_reasons_say_plainly_why_a_file_cannot_be_read(tmp_path, monkeypatch):
  whole = {}
  for ending in (".jpg", ".png", ".webp", ".bmp", ".gif"):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    file = saved(tmp_path / f"whole{ending}", Image.fromarray(noise))
    whole[ending] = file.read_bytes()

  def reason(file, content=None):
    if content is not None:
      file.write_bytes(content)
    with pytest.raises(checked_files.UnreadableFileError) as error:
      folders._read_file(file)
    assert str(error.value) == f"{file} cannot be read: {error.value.reason}"
    return error.value.reason

  for ending, content in whole.items():
    for part in (content[:20], content[: len(content) // 2]):
      assert reason(tmp_path / f"cut{ending}", part).startswith("is truncated")
  assert reason(tmp_path / "a.png", b"") == "is empty"
  assert reason(tmp_path / "a.png", b"some text") == "is no image of a known format"
  assert reason(tmp_path / "none.png") == "is missing"
  (tmp_path / "folder.png").mkdir()
  assert reason(tmp_path / "folder.png") == "is a folder"
  wide = saved(tmp_path / "wide.tiff", Image.fromarray(np.full((2, 2), -1, np.int32)))
  assert reason(wide).startswith("has pixels of int32 must be in [0, 255]")
  monkeypatch.setattr(features, "MOST_PIXELS", 100)
  assert reason(tmp_path / "whole.png") == "has more than 100 pixels"
  for error, said in (
    (PermissionError(13, "Permission denied"), "may not be read (permission denied)"),
    (OSError(5, "Input/output error"), "cannot be opened: Input/output error"),
  ):

    def refuse(file, error=error):
      raise error

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert reason(tmp_path / "whole.png") == said


def test_pictures_are_turned_only_where_that_is_asked():
  exif = Image.Exif()
  exif[0x0112] = 6
  buffer = io.BytesIO()
  picture().save(buffer, "PNG", exif=exif)
  assert features.decode_picture(buffer.getvalue(), 3).shape == (4, 6, 3)
  assert features.decode_picture(buffer.getvalue(), 3, upright=True).shape == (6, 4, 3)


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>
</rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("note", ["exif", "xmp", None])
def test_a_jpeg_is_turned_by_either_note_of_its_camera(note):
  exif = Image.Exif()
  exif[0x0112] = 6
  buffer = io.BytesIO()
  picture().save(buffer, "JPEG", **({note: {"exif": exif, "xmp": XMP}[note]} if note else {}))
  upright = features.decode_picture(buffer.getvalue(), 3, upright=True)
  assert upright.shape == ((6, 4, 3) if note else (4, 6, 3))
  assert features.decode_picture(buffer.getvalue(), 3).shape == (4, 6, 3)


def test_a_split_and_a_folder_whose_files_are_all_damaged_are_named(tmp_path):
  classes(tmp_path / "train", 1)
  for split in ("val", "test"):
    (tmp_path / split / "cat").mkdir(parents=True)
    (tmp_path / split / "cat" / "0.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="data split 'val' of .* must hold at least one .* is empty"):
    folders.open_folder(str(tmp_path), "val")
  with pytest.raises(ValueError, match="test has no readable image$"):
    folders.open_folder(str(tmp_path / "test"), "train")


def test_a_folder_that_cannot_be_opened_is_left_out_and_named(tmp_path, monkeypatch, caplog):
  classes(tmp_path, 1, names=("cat", "dog"))
  closed, scan = tmp_path / "dog" / "closed", os.scandir
  saved(closed / "0.png")

  def scandir(path):
    if Path(path) == closed:
      raise PermissionError(13, "Permission denied", str(path))
    return scan(path)

  monkeypatch.setattr(os, "scandir", scandir)
  found = folders.list_files(tmp_path, (".png",)).entries
  assert sorted(entry.label for entry in found) == ["cat", "dog"]
  assert f"{closed}: left out a folder that cannot be opened: Permission denied" in caplog.text


def opened(folder, split="train", in_use=None):
  """Opens a split afresh."""
  folders._list_images.cache_clear()
  return folders.open_folder(str(folder), split, in_use=in_use)


TABLE = '\ufeff path ,\tlabel , split\r\n a.png , cat ,train\r\n\t"b.png","dog",train,,\r\n'


def test_blanks_marks_and_line_ends_of_a_table_change_nothing(tmp_path):
  saved(tmp_path / "a.png")
  saved(tmp_path / "b.png")
  (tmp_path / "t.csv").write_bytes(TABLE.encode())
  images = opened(tmp_path / "t.csv")
  assert images.class_names == ("cat", "dog")
  assert [file.name for file in images._files] == ["a.png", "b.png"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('path,label\n"a.png,cat\nb.png,dog\n', "line 2: must close a quoted field with a quote"),
    ("path,label\na.png,cat,dog\n", "line 2: must have 2 fields; got 'a.png,cat,dog'"),
    ("path,label\na.png\n", "line 2: must have 2 fields; got 'a.png'"),
    ("path,label,split,split\na.png,x,y,z\n", "must have the column split once"),
    ("path,label\npictures\\a.png,cat\n", r"by / and not by a backslash; got 'pictures"),
    ("path,label\na.png,c\0\n", "line 2: must be text, without NUL"),
    ("path,label\na.png,\xff\n", "must be UTF-8 text"),
  ],
)
def test_a_table_that_breaks_a_rule_is_named(tmp_path, text, message):
  saved(tmp_path / "a.png")
  (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=message):
    opened(tmp_path / "t.csv")


def test_a_path_in_a_table_may_begin_at_home_or_have_a_backslash_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  saved(tmp_path / "home" / "a.png")
  saved(tmp_path / "b\\c.png")
  saved(tmp_path / "~d.png")
  rows = "path,label,split\n~/a.png,x,train\nb\\c.png,y,train\n~d.png,z,train\n"
  (tmp_path / "t.csv").write_text(rows)
  assert opened(tmp_path / "t.csv").class_names == ("x", "y", "z")


def test_whole_numbers_are_classes_in_their_order(tmp_path):
  names = [str(number) for number in range(11)]
  classes(tmp_path / "train", 1, names=names)
  assert opened(tmp_path).class_names == tuple(names)
  rows = [f"train/{name}/0.png,{name},train\n" for name in names]
  (tmp_path / "t.csv").write_text("".join(["path,label,split\n", *rows]))
  assert opened(tmp_path / "t.csv").class_names == tuple(names)
  assert folders.in_class_order(["10", "9", "a"]) == ("10", "9", "a")


def test_classes_and_files_are_those_of_the_splits_in_use(tmp_path, caplog):
  classes(tmp_path / "train", 1)
  classes(tmp_path / "test", 1, names=("cat", "fox"))
  classes(tmp_path / "extra", 4, names=("emu",))
  (tmp_path / "extra" / "emu" / "cut.png").write_bytes(b"")
  with caplog.at_level(logging.WARNING):
    train = opened(tmp_path, "train", ["train", "test"])
    test = folders.open_folder(str(tmp_path), "test", in_use=["train", "test"])
  assert train.class_names == test.class_names == ("cat", "dog", "fox")
  assert "split 'train' has no image of class fox" in caplog.text
  assert "cut.png" not in caplog.text
  opened(tmp_path, "extra")
  assert "cut.png" in caplog.text


@pytest.mark.parametrize(
  ("names", "asked"),
  [
    (("Train", "TEST"), "test"),
    (("training", "testing"), "test"),
    (("train", "Validation"), "val"),
    (("train", "val"), "validation"),
    (("train", "held_out"), "held_out"),
  ],
)
def test_folders_of_splits_are_known_by_many_names(tmp_path, names, asked):
  for name in names:
    classes(tmp_path / name, 2)
  train, other = (opened(tmp_path, split, ["train", asked]) for split in ("train", asked))
  assert train.class_names == other.class_names == ("cat", "dog")
  assert {file.relative_to(tmp_path).parts[0] for file in train._files} == {names[0]}
  assert {file.relative_to(tmp_path).parts[0] for file in other._files} == {names[1]}


def test_a_class_may_have_the_name_of_a_split(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    assert opened(classes(tmp_path / "a", 6, names=("bus", "car", "train"))).class_names == (
      "bus",
      "car",
      "train",
    )
  assert "a: read as folders of classes" in caplog.text
  assert "a: read as classes, and not as splits: train" in caplog.text


def test_how_a_folder_is_read_does_not_depend_on_the_split_that_is_opened(tmp_path):
  classes(tmp_path / "train", 2)
  classes(tmp_path / "held_out", 2)
  saved(tmp_path / "unlabelled" / "0.png")
  for split in ("train", "held_out"):
    for in_use in (None, ["train"], ["train", "held_out"]):
      assert opened(tmp_path, split, in_use).class_names == ("cat", "dog")
  with pytest.raises(ValueError, match="must be one of held_out, train; got 'test'"):
    opened(tmp_path, "test", ["train", "test"])


def test_folders_that_may_not_be_classes_are_named(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    classes(tmp_path / "zip" / "animals", 6)
    opened(tmp_path / "zip")
    opened(classes(tmp_path / "one" / "train", 4, names=("cat",)).parent)
  assert "read as classes: animals, in which there are only folders: " in caplog.text
  assert f"give {tmp_path / 'zip' / 'animals'} in its place" in caplog.text
  assert "one/train: all files are of one class, cat" in caplog.text
  saved(tmp_path / "flat" / "train" / "0.png")
  saved(tmp_path / "flat" / "test" / "0.png")
  with pytest.raises(ValueError, match="of which train has folders of classes; got test, train"):
    opened(tmp_path / "flat")


def test_links_to_folders_are_followed_each_once(tmp_path):
  root = classes(tmp_path / "set" / "train", 2)
  saved(tmp_path / "elsewhere" / "far.png")
  for name in ("more", "again"):
    (root / "cat" / name).symlink_to(tmp_path / "elsewhere")
  (root / "cat" / "loop").symlink_to(root / "cat")
  (root / "cat" / "up").symlink_to(tmp_path / "set")
  images = opened(tmp_path / "set")
  assert [file.name for file in images._files] == ["0.png", "1.png", "far.png", "0.png", "1.png"]


def test_images_outside_classes_and_in_hidden_folders_are_counted(tmp_path, caplog):
  root = classes(tmp_path / "set" / "train", 2).parent
  saved(root / "test" / "0.png")
  saved(root / "test" / "1.png")
  saved(root / "train" / "cat" / ".thumbnails" / "0.png")
  saved(root / "train" / ".cache" / "0.png")
  for name in (".DS_Store", "README.txt"):
    (root / "train" / name).touch()
  with (
    caplog.at_level(logging.WARNING),
    pytest.raises(ValueError, match="got 'test': test/ has 2 images outside folders of classes"),
  ):
    opened(root, "test")
  assert "set/test: left out 2 files outside folders of classes" in caplog.text
  assert (
    "train: left out 0 files outside folders of classes, 2 that are hidden or of other endings, "
    "and 1 in hidden folders"
  ) in caplog.text
  assert "left out hidden files and other endings: 1 of hidden" in caplog.text
  saved(tmp_path / "flat" / "0.png")
  with pytest.raises(ValueError, match="no readable image; it has 1 images outside folders of"):
    opened(tmp_path / "flat")


@pytest.mark.parametrize(
  ("top", "dtype", "shown"),
  [
    (1, np.uint8, "of uint8 must reach more than a sixteenth .* values from 0 to 1 in"),
    (16, np.uint8, "of uint8 .* values from 0 to 16 in"),
    (4095, np.uint16, "of uint16 must reach the upper half .* values from 0 to 4095 in"),
  ],
)
def test_pictures_that_would_be_almost_black_are_refused(tmp_path, top, dtype, shown):
  for i in range(2):
    pixels = np.zeros((4, 4), dtype)
    pixels[0, i] = top
    saved(tmp_path / "train" / "cat" / f"{i}.png", Image.fromarray(pixels))
  with pytest.raises(ValueError, match=f"pictures of {tmp_path} {shown} 2 images.*too dark"):
    opened(tmp_path)


def test_the_first_images_of_a_split_are_some_of_each_class(tmp_path):
  root = classes(tmp_path / "train", 3, names=("cat", "dog", "emu"))
  (root / "cat" / "2.png").write_bytes(b"")
  part = folders.first_of("train", 4)
  for in_use in ([part], None):
    images = opened(tmp_path, part, in_use)
    assert [example["label"] for example in images] == [0, 0, 1, 2]
  assert folders.count_classes(str(tmp_path), ["train"]) == 3


def test_files_of_a_large_set_are_decoded_once(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(folders, "_MANY", 4)
  root = classes(tmp_path / "set", 3)
  (root / "cat" / "2.png").write_bytes(b"")
  decoded, decode = [], folders._decode
  monkeypatch.setattr(folders, "_decode", lambda data: decoded.append(len(data)) or decode(data))

  def count():
    """Opens the folder; returns the number of files that are decoded, and of images."""
    decoded.clear()
    listed = folders._list_images
    listed.cache_clear()
    images = sum(map(len, listed(root, 0, None).parts.values()))
    return len(decoded), images

  # The one that cannot be read is tried again.
  assert [count(), count()] == [(6, 5), (1, 5)]
  saved(root / "dog" / "0.png", picture((9, 9)))
  assert [count(), count()] == [(2, 5), (1, 5)]
  (entry,) = (tmp_path / "cache").rglob("*.safetensors")
  entry.write_bytes(entry.read_bytes()[:-3])
  assert [count(), count()] == [(6, 5), (1, 5)]


def test_a_folder_that_is_gone_ends_the_reading_soon(tmp_path, caplog, monkeypatch):
  root = classes(tmp_path / "train", 4)
  images = folders.open_folder(str(tmp_path), "train")
  monkeypatch.setattr(folders, "_MOST_REPLACED", 3)
  for file in root.rglob("*.png"):
    file.unlink()
  caplog.clear()
  message = "none of 3 images can be read any longer: is the folder still there?"
  with pytest.raises(ValueError, match=re.escape(message)):
    folders.read_or_replace(images, 0, FaultNotes({}))
  assert caplog.text.count("but not any more") == 3


def test_a_lack_of_memory_is_no_fault_of_a_file(tmp_path, monkeypatch):
  classes(tmp_path / "train", 1)
  images = folders.open_folder(str(tmp_path), "train")

  def fail(*_, **__):
    raise MemoryError

  monkeypatch.setattr(folders, "_decode", fail)
  with pytest.raises(MemoryError):
    images[0]
  folders._list_images.cache_clear()
  with pytest.raises(MemoryError):
    folders.open_folder(str(tmp_path), "train")


def test_the_size_of_a_folder_is_found_without_a_word(tmp_path, caplog):
  root = classes(tmp_path / "train", 2)
  source = SetSource(folders.FOLDER, "train", str(tmp_path))
  image_sets.open_images(source)
  (root / "cat" / "0.png").unlink()
  caplog.clear()
  assert image_sets.decoded_bytes(source)
  assert "not any more" not in caplog.text
