import numpy as np
import pytest

from gating_jax.data.video_tables import (
  VideoTable,
  read_breakfast,
  read_charades,
  read_folders,
  read_multithumos,
  read_table,
)
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
    (
      "video,label\ncafe\u0301,a\n",
      "caf\u00e9\n",
      r"which writes it as 'cafe\u0301', not as 'caf\xe9'; got",
    ),
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


BREAKFAST = {
  "P03/cam01/P03_cereals.avi": "",
  "P03/stereo/P03_tea_ch0.avi": "",
  "P03/stereo/P03_tea_ch1.avi": "",
  "P46/webcam02/P46_tea.avi": "",
  "P47/cam01/P47_coffee.avi": "",
  "P03/cam01/P03_cereals.txt": "",
  "readme.avi": "",
}
SEGMENTED = {
  "coarse/cereals/P03_cam01_P03_cereals.txt": "1-30 SIL  \n31-150 take_bowl\n",
  "coarse/tea/P03_stereo01_P03_tea.txt": "1-15 pour_milk\n",
  "coarse/coffee/P47_cam01_P47_coffee.txt": "1-45 SIL\n",
}


def test_folders_of_classes_need_no_table(tmp_path):
  files = ("train/tea/a.MP4", "train/tea/deep/b.avi", "train/fight/c.webm", "test/tea/d.mp4")
  write(tmp_path, dict.fromkeys((*files, "train/tea/notes.txt", "train/tea/.hidden.mp4"), ""))
  train, test = read_folders(tmp_path, "train"), read_folders(tmp_path, "test")
  assert train.names == ("train/fight/c.webm", "train/tea/a.MP4", "train/tea/deep/b.avi")
  assert (train.labels.tolist(), train.class_names) == ([0, 1, 1], ("fight", "tea"))
  assert (test.names, test.labels.tolist()) == (("test/tea/d.mp4",), [1])
  assert test.class_names == train.class_names
  with pytest.raises(ValueError, match="of split 'val' .* has those of test, train"):
    read_folders(tmp_path, "val")
  with pytest.raises(ValueError, match="no .*missing exists"):
    read_folders(tmp_path / "missing", "train")


def test_folders_of_classes_are_split_by_hash(tmp_path):
  write(tmp_path, {f"fight/{i}.npy": "" for i in range(100)})
  train, test = read_folders(tmp_path, "train"), read_folders(tmp_path, "test")
  assert not set(train.names) & set(test.names)
  assert len(train) + len(test) == 100
  assert 8 < len(test) < 35


def test_breakfast_is_split_by_persons(tmp_path):
  write(tmp_path, BREAKFAST)
  train, test = read_breakfast(tmp_path, "train"), read_breakfast(tmp_path, "test")
  assert train.names == ("P03/cam01/P03_cereals", "P03/stereo/P03_tea_ch0", "P46/webcam02/P46_tea")
  assert test.names == ("P47/cam01/P47_coffee",)
  assert train.class_names == test.class_names == ("cereals", "coffee", "tea")
  assert (train.labels.tolist(), test.labels.tolist(), train.multi_label) == ([0, 2, 2], [1], False)
  assert read_breakfast(tmp_path, "test", test_persons=range(3, 16)).names == train.names[:2]


def test_breakfast_features_are_named_by_person_camera_and_activity(tmp_path):
  write(
    tmp_path,
    {"P03_cam01_P03_cereals.npy": "", "deeper/P47_stereo01_P47_tea.npz": "", "mapping.npy": ""},
  )
  assert read_breakfast(tmp_path, "train").names == ("P03_cam01_P03_cereals",)
  test = read_breakfast(tmp_path, "test")
  assert (test.names, test.labels.tolist()) == (("deeper/P47_stereo01_P47_tea",), [1])


def test_breakfast_units_are_in_seconds_at_15_frames_a_second(tmp_path):
  write(tmp_path, BREAKFAST | SEGMENTED)
  train = read_breakfast(tmp_path, "train", segmentation=tmp_path / "coarse")
  assert train.unit_names == ("SIL", "pour_milk", "take_bowl")
  assert train.units == (((0.0, 2.0, 0), (2.0, 10.0, 2)), ((0.0, 1.0, 1),), ())
  np.testing.assert_array_equal(train.seconds, [10, 1, np.nan])
  test = read_breakfast(tmp_path, "test", segmentation=tmp_path / "coarse")
  assert (test.units, test.unit_names) == ((((0.0, 3.0, 0),),), train.unit_names)


def test_breakfast_segmentations_may_lie_beside_the_videos(tmp_path):
  write(tmp_path, {"P03/cam01/P03_cereals.avi": "", "P03/cam01/P03_cereals.txt": "1-30 SIL\n"})
  assert read_breakfast(tmp_path, "train", segmentation=tmp_path).units == (((0.0, 2.0, 0),),)


@pytest.mark.parametrize("frames", ["30-1", "0-30"])
def test_frames_of_breakfast_are_from_1_to_one_not_before(tmp_path, frames):
  write(
    tmp_path,
    {"P03/cam01/P03_cereals.avi": "", "P03/cam01/P03_cereals.txt": f"7-7 SIL\n{frames} SIL\n"},
  )
  with refused(
    "P03_cereals.txt, line 2: must hold frames counted from 1, the last not before the first; "
    f"got '{frames} SIL'"
  ):
    read_breakfast(tmp_path, "train", segmentation=tmp_path)


def test_names_in_published_tables_may_have_any_character(tmp_path):
  unit = "take\u2028bowl\x85"
  write(
    tmp_path, {"P03/cam01/P03_cereals.avi": "", "P03/cam01/P03_cereals.txt": f"1-30\t{unit}\r\n"}
  )
  assert read_breakfast(tmp_path, "train", segmentation=tmp_path).unit_names == (unit,)
  write(
    tmp_path,
    CHARADES
    | {"Charades_v1_classes.txt": "\ufeffc000\tHolding\u2028some\fclothes\nc001 b\nc002 c\n"},
  )
  assert read_charades(tmp_path, "train").class_names == ("Holding\u2028some\fclothes", "b", "c")
  write(
    tmp_path,
    THUMOS
    | {
      "class_list.txt": "1\tBase\x1cball\n",
      "annotations/Base\x1cball.txt": "video_test_1\x85 1 2\n",
    },
  )
  assert read_multithumos(tmp_path, "test").names == ("video_test_1\x85",)


def test_what_is_wrong_with_breakfast_is_named(tmp_path):
  write(
    tmp_path,
    {"P03/cam01/P03_cereals.avi": "", "s/P03_cam01_P03_cereals.txt": "1-30 SIL\n31 take_bowl\n"},
  )
  with refused(
    "P03_cam01_P03_cereals.txt, line 2: must be frames and a unit action, such as '1-30 SIL'; "
    "got '31 take_bowl'"
  ):
    read_breakfast(tmp_path, "train", segmentation=tmp_path / "s")
  with refused(
    "must hold Breakfast videos of the test split, such as P03/cam01/P03_cereals.avi; it has none "
    "(1 of"
  ):
    read_breakfast(tmp_path, "test")
  with refused("segmentation must hold files such as cereals/P03_cam01_P03_cereals.txt"):
    read_breakfast(tmp_path, "train", segmentation=tmp_path / "P03")
  with refused("split must be one of test, train; got 'validation'"):
    read_breakfast(tmp_path, "validation")


CHARADES = {
  "Charades_v1_classes.txt": "c000 Holding some clothes\nc001 Putting clothes, somewhere\nc002 "
  "Taking\n",
  "Charades_v1_train.csv": "id,subject,script,actions,length\n"
  '46GP8,HR43,"He said, ""so""",c002 11.90 21.20;c000 0.00 12.60,24.83\n'
  "N11GT,0KZ7,line,,18.33\nXXXXX,0KZ7,line,c001 0.00 3.00;c001 4.00 5.00,\n",
  "Charades_v1_test.csv": "id,actions,length\nYYYYY,c001 1 2,5.5\n",
}


def test_charades_is_multi_label_with_an_interval_for_each_action(tmp_path):
  write(tmp_path, CHARADES)
  train = read_charades(tmp_path, "train")
  assert train.names == ("46GP8", "N11GT", "XXXXX")
  assert (train.labels.tolist(), train.labels.dtype) == (
    [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
    np.float32,
  )
  assert (
    train.class_names
    == ("Holding some clothes", "Putting clothes, somewhere", "Taking")
    == train.unit_names
  )
  assert train.units == (((11.9, 21.2, 2), (0.0, 12.6, 0)), (), ((0.0, 3.0, 1), (4.0, 5.0, 1)))
  np.testing.assert_array_equal(train.seconds, [24.83, 18.33, np.nan])
  assert read_charades(tmp_path, "test").names == ("YYYYY",)


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    (
      "Charades_v1_classes.txt",
      "c000 a\nNo class\n",
      "line 2: must be a new class such as 'c000 Holding some clothes'; got 'No class'",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c009 1 2,3\n",
      "line 2: must name classes of Charades_v1_classes.txt; got 'c009 1 2'",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 2;c001 1,3\n",
      "line 2: must hold a name, a start and an end in seconds; got 'c001 1'",
    ),
    ("Charades_v1_train.csv", "id,actions,length\n1,c000 1 nan,3\n", "got 'c000 1 nan'"),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 2;c001 5.0 2.0,9\n",
      "Charades_v1_train.csv, line 2: must "
      "hold an interval that starts at 0 s or later and ends after its start; got 'c001 5.0 2.0'",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 3 3,9\n",
      "ends after its start; got 'c000 3 3'",
    ),
    ("Charades_v1_train.csv", "id,actions,length\n1,c000 -1 3,9\n", "starts at 0 s or later"),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 1e999,9\n",
      "ends after its start; got 'c000 1 1e999'",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 1_000,9\n",
      "must hold a name, a start and an end",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 2,1.2.3\n",
      "line 2: must give the video's length in seconds or leave it empty; got '1.2.3'",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,c000 1 2,0\n",
      "must give the video's length in seconds",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions\n1,c000 1 2\n",
      "line 1: must have the columns id,actions,length",
    ),
    (
      "Charades_v1_train.csv",
      "id,actions,length\n1,,3\n1,,3\n",
      "line 3: must name each video once; got '1'",
    ),
    ("Charades_v1_train.csv", "id,actions,length\n", "must hold at least one video"),
  ],
)
def test_what_is_wrong_with_charades_is_named(tmp_path, file, text, message):
  write(tmp_path, CHARADES | {file: text})
  with refused(message):
    read_charades(tmp_path, "train")


THUMOS = {
  "class_list.txt": "1 BaseballPitch\n2 Run\n",
  "annotations/BaseballPitch.txt": "video_validation_0000266 72.80 76.40\nvideo_test_0000002\t1 "
  "2\n",
  "annotations/Run.txt": "video_validation_0000266 1.00 2.00\nvideo_validation_0000100 3.5 4.0\n",
}


def test_multithumos_gathers_each_videos_classes(tmp_path):
  write(tmp_path, THUMOS)
  train, test = read_multithumos(tmp_path, "train"), read_multithumos(tmp_path, "test")
  assert train.names == ("video_validation_0000100", "video_validation_0000266")
  assert train.labels.tolist() == [[0, 1], [1, 1]]
  assert train.units == (((3.5, 4.0, 1),), ((72.8, 76.4, 0), (1.0, 2.0, 1)))
  assert train.class_names == test.class_names == train.unit_names == ("BaseballPitch", "Run")
  assert (test.names, test.labels.tolist(), test.seconds) == (
    ("video_test_0000002",),
    [[1, 0]],
    None,
  )


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    (
      "class_list.txt",
      "1 BaseballPitch\n3 Run\n",
      "line 2: must be the number 2 and a new class; got '3 Run'",
    ),
    (
      "class_list.txt",
      "1 Run\n2 Run\n",
      "line 2: must be the number 2 and a new class; got '2 Run'",
    ),
    ("class_list.txt", "1 ../secret\n", "must be the number 1 and a new class; got '1 ../secret'"),
    (
      "annotations/Run.txt",
      "video_validation_1 1.0\n",
      "Run.txt, line 1: must hold a name, a start and an end in seconds; got 'video_validation_1 "
      "1.0'",
    ),
    (
      "annotations/Run.txt",
      "video_validation_1 2.0 1.0\n",
      "Run.txt, line 1: must hold an interval that starts at 0 s "
      "or later and ends after its start; got 'video_validation_1 2.0 1.0'",
    ),
    (
      "annotations/Run.txt",
      "another_1 1.0 2.0\n",
      "Run.txt, line 1: must name a video of video_validation_ or video_test_; got 'another_1 1.0 "
      "2.0'",
    ),
  ],
)
def test_what_is_wrong_with_multithumos_is_named(tmp_path, file, text, message):
  write(tmp_path, THUMOS | {file: text})
  with refused(message):
    read_multithumos(tmp_path, "train")


def test_a_split_without_a_video_is_named(tmp_path):
  write(tmp_path, {"class_list.txt": "1 Run\n", "annotations/Run.txt": "video_test_0000002 1 2\n"})
  with refused("must hold at least one video of the train split; it has none"):
    read_multithumos(tmp_path, "train")


def test_a_class_without_its_file_is_named(tmp_path):
  write(tmp_path, THUMOS)
  (tmp_path / "annotations" / "Run.txt").unlink()
  with pytest.raises(FileNotFoundError, match="Run.txt"):
    read_multithumos(tmp_path, "train")


def test_folders_of_videos_have_the_classes_of_the_splits_in_use_in_order(tmp_path):
  files = ("Train/10/a.mp4", "Train/9/b.mp4", "TEST/9/c.mp4", "extra/8/d.mp4", "other/x.mp4")
  write(tmp_path, dict.fromkeys(files, ""))
  train = read_folders(tmp_path, "train", ["train", "test"])
  assert (train.names, train.class_names) == (("Train/10/a.mp4", "Train/9/b.mp4"), ("9", "10"))
  assert read_folders(tmp_path, "test").class_names == ("8", "9", "10")
  with pytest.raises(ValueError, match="of split 'other' .*; 1 lie outside folders of classes"):
    read_folders(tmp_path, "other")
