import numpy as np
import pytest

from gating_jax.data.video_tables import VideoTable, read_table
from tests.helpers.made_tables import refused, write


def test_a_table_and_its_splits_agree_on_the_classes(tmp_path):
  write(tmp_path, {
      "all.csv": "video,label\na/1.mp4,tea\n2,coffee\n3,tea\n\n4,juice\n",
      "train.txt": "3\n\n a/1.mp4 \n", "test.txt": "4"})
  whole = read_table(tmp_path / "all.csv")
  assert (whole.names, whole.labels.tolist()) == (("a/1.mp4", "2", "3", "4"), [2, 0, 2, 1])
  train, test = (read_table(tmp_path / "all.csv", tmp_path / f"{split}.txt") for split in ("train", "test"))
  assert (train.names, train.labels.tolist(), train.labels.dtype) == (("3", "a/1.mp4"), [2, 2], np.int32)
  assert (test.names, test.labels.tolist()) == (("4",), [1])
  assert whole.class_names == train.class_names == test.class_names == ("coffee", "juice", "tea")
  assert (train.multi_label, train.units, len(train)) == (False, None, 2)


def test_several_labels_anywhere_in_the_table_make_it_multi_label(tmp_path):
  write(tmp_path, {"all.csv": '\ufeffvideo,note,label\n1,x,b; a\n2,"x,y",b\n3,,\n', "split": "2\n3\n"})
  table = read_table(tmp_path / "all.csv", tmp_path / "split")
  assert (table.multi_label, table.class_names) == (True, ("a", "b"))
  assert (table.labels.tolist(), table.labels.dtype) == ([[0, 1], [0, 0]], np.float32)


@pytest.mark.parametrize(("table", "split", "message"), [
    ("name,label\n1,a\n", "", "all.csv, line 1: must have the columns video,label; got 'name,label'"),
    ("", "", "all.csv, line 1: must have the columns video,label; got ''"),
    ("video,label\n1,a\n2\n", "", "all.csv, line 3: must have 2 fields; got '2'"),
    ("video,label\n1,a\n2,\n", "", "all.csv, line 3: must give the video a label; got ''"),
    ("video,label\n,a\n", "", "all.csv, line 2: must name a video; got ''"),
    ("video,label\n1,a\n1,b\n", "", "all.csv, line 3: must name each video once; got '1'"),
    ("video,label\n", "", "all.csv: must hold at least one video with a label; it has none"),
    ('video,label\n"1,a\n', "", "must be CSV"),
    ("video,label\n1,a\n", "1\n2\n", "split.txt, line 2: must name a video of"),
    ("video,label\n1,a\n", "1\n\n1\n", "split.txt, line 3: must name each video once; got '1'"),
    ("video,label\n1,a\n", "\n", "split.txt: must name at least one video; it is empty"),
])
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
  table = VideoTable(("a", "b", "c"), np.array([0, 1, 0], np.int32), ("x", "y"), ((), ((0.0, 1.0, 0),), ()), ("u",),
                     np.array([1.0, 2.0, 3.0]))
  part = table.take([1, 2])
  assert (part.names, part.labels.tolist(), part.units) == (("b", "c"), [1, 0], (((0.0, 1.0, 0),), ()))
  assert (part.seconds.tolist(), part.class_names, part.unit_names) == ([2, 3], ("x", "y"), ("u",))
