import numpy as np
import pytest

from gating_jax.data.video_tables import VideoTable, read_table
from tests.helpers.made_tables import refused, write


def test_a_table_and_its_splits_agree_on_the_classes(tmp_path):
  write(
    tmp_path,
    {
      "all.csv": "video,label\na/1.mp4,tea\n2,coffee\n3,tea\n\n4,juice\n",
      "train.txt": "3\n\n a/1.mp4 \n",
      "test.txt": "4",
    },
  )
  whole = read_table(tmp_path / "all.csv")
  assert (whole.names, whole.labels.tolist()) == (("a/1.mp4", "2", "3", "4"), [2, 0, 2, 1])
  train, test = (
    read_table(tmp_path / "all.csv", tmp_path / f"{split}.txt") for split in ("train", "test")
  )
  assert (train.names, train.labels.tolist(), train.labels.dtype) == (
    ("3", "a/1.mp4"),
    [2, 2],
    np.int32,
  )
  assert (test.names, test.labels.tolist()) == (("4",), [1])
  assert whole.class_names == train.class_names == test.class_names == ("coffee", "juice", "tea")
  assert (train.multi_label, train.units, len(train)) == (False, None, 2)


def test_several_labels_anywhere_in_the_table_make_it_multi_label(tmp_path):
  write(
    tmp_path, {"all.csv": '\ufeffvideo,note,label\n1,x,b; a\n2,"x,y",b\n3,,\n', "split": "2\n3\n"}
  )
  table = read_table(tmp_path / "all.csv", tmp_path / "split")
  assert (table.multi_label, table.class_names) == (True, ("a", "b"))
  assert (table.labels.tolist(), table.labels.dtype) == ([[0, 1], [0, 0]], np.float32)


@pytest.mark.parametrize(
  "character", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1e", "\u00a0", "\ufeff"]
)
def test_no_character_but_line_feed_and_carriage_return_ends_a_line(tmp_path, character):
  names = f"a{character}b", f"a{character}"
  write(
    tmp_path,
    {
      "all.csv": f"video,label\n{names[0]},x{character}\n{names[1]},y\n",
      "split.txt": "\n".join(names),
    },
  )
  table = read_table(tmp_path / "all.csv", tmp_path / "split.txt")
  assert (table.names, table.class_names) == (names, (f"x{character}", "y"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_of_every_system_are_read_alike(tmp_path, end, mark):
  (tmp_path / "all.csv").write_bytes(
    end.join([f"{mark}video,label", "a,x", "", "b,y", ""]).encode()
  )
  (tmp_path / "split.txt").write_bytes(end.join([f"{mark}b", "", "a"]).encode())
  table = read_table(tmp_path / "all.csv", tmp_path / "split.txt")
  assert (table.names, table.labels.tolist(), table.class_names) == (("b", "a"), [1, 0], ("x", "y"))


@pytest.mark.parametrize(
  "text",
  [
    "video, label\na, x\nb, y\n",
    " video ,\tlabel\t\n a\t,x\nb ,  y  \n",
    "label, video\nx, a\ny, b\n",
    "video,label,\na,x,\nb,y,\n",
    "video,label\na,x,,\nb,y\n,,\n  ,\n",
    '"video", "label"\n"a", "x"\n"b", "y"\n',
    '"video" ,\t"label"\t\n \t"a"\t , "x" \n\t"b" ,"y"',
    "video,label,note\na,x\nb,y,z\n",
  ],
)
def test_blanks_quotes_and_empty_fields_change_nothing(tmp_path, text):
  write(tmp_path, {"all.csv": text})
  table = read_table(tmp_path / "all.csv")
  assert (table.names, table.labels.tolist(), table.class_names) == (("a", "b"), [0, 1], ("x", "y"))


def test_a_quoted_name_may_have_commas_and_quotes(tmp_path):
  write(
    tmp_path,
    {"all.csv": 'video,label\n"a, ""b""", x\nc 12", "y, z"\n"",\n', "split.txt": 'a, "b"\nc 12"\n'},
  )
  table = read_table(tmp_path / "all.csv", tmp_path / "split.txt")
  assert (table.names, table.class_names) == (('a, "b"', 'c 12"'), ("x", "y, z"))


@pytest.mark.parametrize(
  ("table", "split", "message"),
  [
    ("video,label\na,x,y\n", "", "all.csv, line 2: must have 2 fields; got 'a,x,y'"),
    (
      "video,label,label\na,x,y\n",
      "",
      "line 1: must have the columns video,label; got 'video,label,label'",
    ),
    ("video;label\na;x\n", "", "line 1: must have the columns video,label; got 'video;label'"),
    (
      'video,label\n"a" b,x\n',
      "",
      "line 2: must close a quoted field with a quote, followed by a comma or the end of the line; "
      "got '\"a\" b,x\\n'",
    ),
    ('video,label,note\na,x,"two\nlines"\nb\n', "", "line 4: must have 3 fields; got 'b'"),
    ("video,label\na,x\nb\0,x\n", "", "line 3: must be text, without NUL; got 'b\\x00,x'"),
    ("video,label\n1,a\n", "1\0\n", "split.txt, line 1: must be text, without NUL; got '1\\x00'"),
    ("video,label\n1,a\n", "1,\n", "split.txt, line 1: must name a video of"),
    (
      "name,label\n1,a\n",
      "",
      "all.csv, line 1: must have the columns video,label; got 'name,label'",
    ),
    ("", "", "all.csv, line 1: must have the columns video,label; got ''"),
    ("video,label\n1,a\n2\n", "", "all.csv, line 3: must have 2 fields; got '2'"),
    ("video,label\n1,a\n2,\n", "", "all.csv, line 3: must give the video a label; got ''"),
    ("video,label\n,a\n", "", "all.csv, line 2: must name a video; got ''"),
    ("video,label\n1,a\n1,b\n", "", "all.csv, line 3: must name each video once; got '1'"),
    ("video,label\n", "", "all.csv: must hold at least one video with a label; it has none"),
    ('video,label\n"1,a\n2,b\n', "", "line 2: must close a quoted field with a quote"),
    ("video,label\n1,a\n", "1\n2\n", "split.txt, line 2: must name a video of"),
    ("video,label\n1,a\n", "1\n\n1\n", "split.txt, line 3: must name each video once; got '1'"),
    ("video,label\n1,a\n", "\n", "split.txt: must name at least one video; it is empty"),
  ],
)
def test_what_is_wrong_with_a_table_is_named_with_file_and_line(tmp_path, table, split, message):
  write(tmp_path, {"all.csv": table, "split.txt": split})
  with refused(message):
    read_table(tmp_path / "all.csv", tmp_path / "split.txt")


@pytest.mark.parametrize("binary", ["all.csv", "split.txt"])
def test_files_that_are_no_text_are_named(tmp_path, binary):
  write(tmp_path, {"all.csv": "video,label\n1,a\n", "split.txt": "1\n"})
  (tmp_path / binary).write_bytes(b"\xff\xfe\x00video")
  with refused(f"{tmp_path / binary}: must be UTF-8 text"):
    read_table(tmp_path / "all.csv", tmp_path / "split.txt")


def test_a_part_of_a_table_keeps_its_columns_together():
  table = VideoTable(
    ("a", "b", "c"),
    np.array([0, 1, 0], np.int32),
    ("x", "y"),
    ((), ((0.0, 1.0, 0),), ()),
    ("u",),
    np.array([1.0, 2.0, 3.0]),
  )
  part = table.take([1, 2])
  assert (part.names, part.labels.tolist(), part.units) == (
    ("b", "c"),
    [1, 0],
    (((0.0, 1.0, 0),), ()),
  )
  assert (part.seconds.tolist(), part.class_names, part.unit_names) == ([2, 3], ("x", "y"), ("u",))
