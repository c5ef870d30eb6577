import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from absl import logging
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.data.image_sets import batch_indices, padded_batches
from gating_jax.data.video_features import FeatureFolder
from gating_jax.data.video_files import VideoFolder
from gating_jax.data.video_tables import VideoTable
from gating_jax.data.videos import VideoArrays, segment_starts, timed_starts
from tests.helpers import made_videos

SOME = st.integers(1, 70)
NAMES = tuple(f"v{i}" for i in range(7))
CLIPS = dict(segments=3, frames=2, size=(8, 8))


def table(names=NAMES, **columns):
  return VideoTable(names, np.arange(len(names), dtype=np.int32) % 3, ("a", "b", "c"), **columns)


@pytest.fixture
def warnings(monkeypatch):
  """The logged warnings."""
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
  return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Makes videos `i` of 10 + i frames."""
  folder = tmp_path_factory.mktemp("videos")
  for i, name in enumerate(NAMES):
    made_videos.write(folder / f"{name}.mp4", 10 + i)
  return folder


@pytest.fixture
def features(tmp_path):
  """Makes videos `i` of 3 + i segments.

  Segment `t` is filled with `10 i + t`, and with ten times that for the heavy net.
  """
  for i, name in enumerate(NAMES):
    rows = 10 * i + np.arange(3 + i)[:, None]
    for kind, array in (
      ("light", rows * np.ones(2)),
      ("heavy", 10 * rows[..., None] * np.ones((4, 3))),
    ):
      (tmp_path / kind).mkdir(exist_ok=True)
      np.save(tmp_path / kind / f"{name}.npy", array)
  return tmp_path


def open_features(features, given=None, **settings):
  return FeatureFolder(
    given or table(), features / "light", features / "heavy", **{"segments": 5, **settings}
  )


def same(one, other):
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key])
    assert one[key].dtype == other[key].dtype


def test_a_folder_of_videos_says_what_it_holds(folder):
  videos = VideoFolder(table(), folder, **CLIPS)
  assert (len(videos), videos.names, videos.class_names, videos.multi_label) == (
    7,
    NAMES,
    ("a", "b", "c"),
    False,
  )
  assert videos.shapes == {"clips": (3, 2, 8, 8, 3), "valid": (3,), "label": (), "weight": ()}
  batch = videos.read([4, 0])
  assert {key: array.shape[1:] for key, array in batch.items()} == videos.shapes
  assert made_videos.shown(batch["clips"])[0].tolist() == [
    [[0, 1], [6, 7], [12, 13]],
    [[0, 1], [4, 5], [8, 9]],
  ]
  assert (batch["label"].tolist(), batch["label"].dtype) == ([1, 0], np.int32)
  assert (batch["weight"].tolist(), batch["weight"].dtype) == ([1, 1], np.float32)
  assert batch["valid"].all()


def test_names_may_have_folders_and_suffixes(tmp_path):
  made_videos.write(tmp_path / "P03" / "cam01" / "P03_cereals.avi", 4, codec="mpeg4")
  made_videos.write(tmp_path / "b.mkv", 6)
  videos = VideoFolder(table(("P03/cam01/P03_cereals", "b.mkv")), tmp_path, **CLIPS)
  assert made_videos.shown(videos.read([0, 1])["clips"])[0][:, -1, -1].tolist() == [3, 5]


def test_several_labels_are_given_as_zeros_and_ones(folder):
  labels = np.array([[1, 0, 1]] * 7, np.float32)
  videos = VideoFolder(VideoTable(NAMES, labels, ("a", "b", "c")), folder, **CLIPS)
  assert videos.multi_label
  assert videos.shapes["label"] == (3,)
  np.testing.assert_array_equal(videos.read([2, 5])["label"], labels[:2])


def test_units_are_those_at_the_middle_of_a_segment_the_shortest_of_several(folder):
  # Video 6: 16 frames at 10 a second.
  units = [()] * 6 + [((0.0, 1.6, 4), (0.5, 1.0, 2), (0.75, 5.0, 7))]
  videos = VideoFolder(
    table(units=tuple(units), unit_names=("u",) * 8), folder, segments=5, frames=2, size=(8, 8)
  )
  batch = videos.read([6, 0])  # segments start at frames 0, 3, 7, 10 and 14
  assert batch["units"].tolist() == [[4, 4, 2, 4, 4], [-1] * 5]
  assert batch["units"].dtype == np.int32


def test_units_of_a_variable_frame_rate_are_those_of_the_times_shown(tmp_path):
  # Six frames in 3 s, then nine in 0.75 s.
  times = np.concatenate([np.arange(6) / 2, 3 + np.arange(9) / 12])
  made_videos.write(tmp_path / "v0.mkv", 15, times=times, rate=30)
  units = ((0.0, 1.2, 0), (1.2, 2.4, 1), (2.4, 9.0, 2))
  given = table(("v0",), units=(units,), unit_names=("u",) * 3)
  batch = VideoFolder(given, tmp_path, segments=4, frames=1, size=(8, 8)).read([0])
  assert made_videos.shown(batch["clips"])[0][0, :, 0].tolist() == [0, 2, 4, 14]
  assert batch["units"].tolist() == [[0, 1, 1, 2]]  # at 0.25, 1.25, 2.25 and 3.71 s


def test_missing_files_are_named_counted_and_left_out(folder, warnings):
  names = (*NAMES[:3], *(f"gone{i}" for i in range(10)), *NAMES[3:])
  videos = VideoFolder(table(names), folder, **CLIPS)
  said = "gone0, gone1, gone2, gone3, gone4, gone5, gone6, gone7 and 2 more"
  assert warnings == [f"10 of 17 videos have no file and are skipped: {said}"]
  assert videos.missing == tuple(f"gone{i}" for i in range(10))
  assert videos.names == NAMES
  assert videos.read(range(7))["label"].tolist() == [0, 1, 2, 1, 2, 0, 1]


def test_a_folder_without_any_of_the_videos_is_refused(tmp_path):
  with pytest.raises(ValueError, match="found none of v0, v1, v2, v3, v4, v5, v6"):
    VideoFolder(table(), tmp_path, **CLIPS)


@pytest.mark.parametrize("name", ["../v0", "a/../../v0", "/etc/passwd", "", ".", "v\0"])
def test_names_that_leave_the_folder_are_refused(folder, name):
  for opened in (
    lambda: VideoFolder(table((name,)), folder, **CLIPS),
    lambda: FeatureFolder(table((name,)), folder, segments=2),
  ):
    with pytest.raises(ValueError, match="names of videos must stay inside their folder; got"):
      opened()


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    (dict(segments=0), "segments must be at least 1; got 0"),
    (dict(frames=0), r"frames and size must be at least 1; got 0 and \(8, 8\)"),
    (dict(size=(0, 4)), r"frames and size must be at least 1; got 2 and \(0, 4\)"),
  ],
)
def test_bad_settings_are_named(folder, setting, message):
  with pytest.raises(ValueError, match=message):
    VideoFolder(table(), folder, **{**CLIPS, **setting})


def damage(folder):
  """Damages all videos of the folder but 0, 2 and 6."""
  whole = (folder / "v1.mp4").read_bytes()
  (folder / "v1.mp4").write_bytes(whole[: len(whole) // 2])
  (folder / "v3.mp4").write_bytes(np.random.default_rng(0).bytes(2000))
  (folder / "v4.mp4").write_bytes(b"")
  made_videos.write_sound(folder / "v5.mp4")


def test_damaged_videos_can_be_counted_before_any_is_decoded(tmp_path, warnings):
  for name in NAMES:
    made_videos.write(tmp_path / f"{name}.mp4", 6)
  damage(tmp_path)
  videos = VideoFolder(table(), tmp_path, **CLIPS)
  videos.check_files()
  assert set(videos.unreadable) == {"v1", "v3", "v4", "v5"}
  (line,) = warnings
  assert line.startswith("4 of 7 videos cannot be read and are skipped: v1 (")
  assert "v5 (holds no video stream)" in line
  # They are not named again.
  assert videos.read(range(7))["weight"].tolist() == [1, 0, 1, 0, 0, 0, 1]
  assert len(warnings) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_videos_count_for_nothing_and_are_named_once(tmp_path, warnings, capfd, workers):
  for name in NAMES:
    made_videos.write(tmp_path / f"{name}.mp4", 6)
  whole = VideoFolder(table(), tmp_path, **CLIPS).read(range(7))
  damage(tmp_path)
  videos = VideoFolder(table(), tmp_path, **CLIPS, workers=workers)
  assert warnings == []
  for batch in videos.map(videos.read, [range(7)] * 2):
    assert batch["weight"].tolist() == [1, 0, 1, 0, 0, 0, 1]
    for i in (0, 2, 6):
      np.testing.assert_array_equal(batch["clips"][i], whole["clips"][i])
    assert not batch["clips"][[1, 3, 4, 5]].any()
    assert batch["valid"].all()
    np.testing.assert_array_equal(batch["label"], whole["label"])
  assert set(videos.unreadable) == {"v1", "v3", "v4", "v5"}
  assert videos.unreadable["v5"] == "holds no video stream"
  assert len(warnings) == 4
  assert sorted(line.split()[1] for line in warnings) == ["v1", "v3", "v4", "v5"]
  assert "cannot be read" not in capfd.readouterr().err  # of a worker


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_readable_videos_take_the_places_of_damaged_ones_in_training(tmp_path, warnings, workers):
  for i, name in enumerate(NAMES):
    made_videos.write(tmp_path / f"{name}.mp4", 6 + i)
  # Videos 0, 2 and 6 stay whole; their last frames tell them apart.
  damage(tmp_path)
  whole = VideoFolder(table(), tmp_path, **CLIPS).read([0, 2, 6])
  warnings.clear()
  videos = VideoFolder(table(), tmp_path, **CLIPS, workers=workers)
  read = list(videos.batches(7, 0, 1, 3))
  for step, batch in enumerate(read):
    assert batch["weight"].tolist() == [[1]] * 7
    places = []
    for clips, label in zip(batch["clips"][:, 0], batch["label"][:, 0], strict=True):
      (place,) = np.flatnonzero([np.array_equal(clips, other) for other in whole["clips"]])
      assert label == whole["label"][place]
      places.append((0, 2, 6)[place])
    # What can be read keeps its place.
    for place, wanted in zip(places, batch_indices(0, step, 7, 7), strict=True):
      assert place == wanted or wanted in (1, 3, 4, 5)
  assert len(warnings) == 4
  # Others take the places after a restart as well.
  again = VideoFolder(table(), tmp_path, **CLIPS)
  same(next(again.batches(7, 2, 1, 3)), read[2])


def test_training_on_files_none_of_which_can_be_read_is_refused_with_the_first_five(
  tmp_path, warnings
):
  for name in NAMES:
    (tmp_path / f"{name}.npy").write_bytes(b"nothing")
  np.save(tmp_path / "v6.npy", np.ones((3, 2)))
  videos = FeatureFolder(table(), tmp_path, segments=2)
  (tmp_path / "v6.npy").write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"none of 7 videos can be read: v0 \(.*v4 \(.* and 2 more$"):
    next(videos.batches(4, 0, 1, 1))
  assert videos.name_unreadable() == ["v0", "v1", "v2", "v3", "v4"]
  assert len(videos.unreadable) == len(warnings) == 7


def test_files_that_are_all_damaged_after_the_first_batch_stop_the_training(tmp_path, warnings):
  for name in NAMES:
    np.save(tmp_path / f"{name}.npy", np.ones((3, 2)))
  videos = FeatureFolder(table(), tmp_path, segments=2)
  videos.check_readable()
  for name in NAMES:
    (tmp_path / f"{name}.npy").write_bytes(b"nothing")
  with pytest.raises(ValueError, match=r"^none of 7 videos can be read: v3 \("):
    videos._read_for_training(3, (0, 0, 0))
  assert len(warnings) == 7


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_are_the_same_after_a_restart_and_follow_the_resident_order(folder, workers):
  videos = VideoFolder(table(), folder, **CLIPS, seed=5, jitter=True)
  whole = list(videos.batches(4, 0, 1, 7))
  assert len(whole) == 7
  for step, batch in enumerate(whole):
    index = batch_indices(5, step, 4, 7)
    np.testing.assert_array_equal(batch["label"][:, 0], index % 3)
    assert batch["clips"].shape == (4, 1, 3, 2, 8, 8, 3)
  again = VideoFolder(table(), folder, **CLIPS, seed=5, jitter=True, workers=workers)
  for batch, expected in zip(again.batches(4, 3, 1, 7), whole[3:], strict=True):
    same(batch, expected)
  assert list(again.batches(4, 7, 1, 7)) == []


def test_fixed_segments_in_training_are_those_of_evaluation(folder):
  videos = VideoFolder(table(), folder, **CLIPS, seed=5)
  batch = next(videos.batches(4, 2, 1, 3))
  same(
    {key: array[:, 0] for key, array in batch.items()},
    videos.read(batch_indices(5, 2, 4, 7)),
  )


def test_jitter_moves_segments_within_their_parts_and_differs_by_step_and_place(folder):
  same_video = VideoFolder(
    table(("v6",) * 4), folder, segments=3, frames=2, size=(8, 8), seed=5, jitter=True
  )
  starts = np.concatenate(
    [made_videos.shown(batch["clips"])[0][:, 0, :, 0] for batch in same_video.batches(4, 0, 1, 20)]
  )
  edges = np.array([0, 5, 10, 15])  # of the 15 starts that a video of 16 frames has
  assert np.all((starts >= edges[:-1]) & (starts < edges[1:]))
  assert [set(column) for column in starts.T] == [
    set(range(5)),
    set(range(5, 10)),
    set(range(10, 15)),
  ]
  assert made_videos.shown(same_video.read([0])["clips"])[0][0, :, 0].tolist() == [0, 7, 14]


@pytest.mark.parametrize("k", [2, 3])
def test_several_steps_a_call_and_several_processes_hold_the_same_examples(features, k):
  videos = open_features(features, seed=1, jitter=True)
  single = list(videos.batches(6, 0, 1, 6))
  expected = [
    {key: np.concatenate([b[key] for b in single[i : i + k]], axis=1) for key in single[0]}
    for i in range(0, 6, k)
  ]
  for got, whole in zip(videos.batches(6, 0, k, 6), expected, strict=True):
    same(got, whole)
  parts = [list(videos.batches(6, 0, k, 6, process=(i, 2))) for i in range(2)]
  for first, second, whole in zip(*parts, expected, strict=True):
    assert first["label"].shape == (3, k)
    same({key: np.concatenate([first[key], second[key]]) for key in first}, whole)


def test_a_batch_larger_than_the_set_is_refused(features):
  with pytest.raises(ValueError, match=r"batch_size must be in \[1, 7\]"):
    next(open_features(features).batches(8, 0, 1, 1))


def test_features_are_spread_over_longer_videos_and_repeated_over_shorter_ones(features):
  videos = open_features(features)
  assert videos.shapes == {
    "light": (5, 2),
    "heavy": (5, 4, 3),
    "valid": (5,),
    "label": (),
    "weight": (),
  }
  batch = videos.read([0, 2, 6])
  rows = np.array([[0, 1, 2, 0, 1], [20, 21, 22, 23, 24], [60, 62, 64, 66, 68]])
  np.testing.assert_array_equal(batch["light"], rows[..., None] * np.ones(2))
  np.testing.assert_array_equal(batch["heavy"], 10 * rows[..., None, None] * np.ones((4, 3)))
  np.testing.assert_array_equal(batch["valid"], np.array([[1, 1, 1, 0, 0], [1] * 5, [1] * 5], bool))
  assert {key: array.dtype for key, array in batch.items()} == {
    "light": np.float32,
    "heavy": np.float32,
    "valid": bool,
    "label": np.int32,
    "weight": np.float32,
  }


def test_jitter_draws_the_same_rows_of_both_features_and_leaves_shorter_videos_alone(features):
  videos = open_features(features, jitter=True)
  seen = set()
  for batch in videos.batches(7, 0, 1, 12):
    light, heavy = batch["light"][:, 0, :, 0], batch["heavy"][:, 0, :, 0, 0]
    np.testing.assert_array_equal(heavy, 10 * light)
    np.testing.assert_array_equal(light[light[:, 0] < 10], [[0, 1, 2, 0, 1]])
    seen |= {tuple(row) for row in light[light[:, 0] >= 60]}
  assert len(seen) > 4


def test_one_folder_of_features_serves_both_nets(features):
  batch = FeatureFolder(table(), features / "light", segments=4).read([1])
  np.testing.assert_array_equal(batch["light"], batch["heavy"])
  assert batch["light"][0, :, 0].tolist() == [10, 11, 12, 13]


def test_units_of_features_follow_from_the_length_of_the_video(features):
  units = (((0.0, 4.0, 1),), *[((2.0, 9.0, 3),)] * 6)
  seconds = np.array([6.0, np.nan, *[10.0] * 5])
  videos = open_features(features, table(units=units, unit_names=("u",) * 4, seconds=seconds))
  batch = videos.read([0, 1, 2])  # middles: 1, 3, 5, and these again; unknown; 1, 3, 5, 7, 9
  assert batch["units"].tolist() == [[1, 1, -1, 1, 1], [-1] * 5, [-1, 3, 3, 3, -1]]
  without = open_features(features, table(units=units, unit_names=("u",) * 4))
  assert (without.read([0])["units"] == -1).all()


def test_features_that_cannot_be_used_count_for_nothing_with_the_reason(features, warnings):
  np.save(features / "heavy" / "v1.npy", np.ones((9, 4, 3)))
  np.save(features / "light" / "v2.npy", np.ones((5, 3)))
  np.save(features / "light" / "v3.npy", np.full((6, 2), np.nan))
  np.save(features / "light" / "v4.npy", np.array([["x"]], object))
  (features / "light" / "v5.npy").write_bytes((features / "light" / "v5.npy").read_bytes()[:-5])
  (features / "light" / "v6.npy").rename(features / "light" / "v6.npz")
  (features / "light" / "v6.npz").write_bytes(b"PK\x03\x04 no archive")
  videos = open_features(features)
  batch = videos.read(range(7))
  assert batch["weight"].tolist() == [1, 0, 0, 0, 0, 0, 0]
  for key in ("light", "heavy"):
    assert not batch[key][1:].any()
  assert batch["valid"][1:].all()
  assert (
    videos.unreadable["v1"] == "light and heavy must have the same number of segments; got 4 and 9"
  )
  assert (
    videos.unreadable["v2"]
    == "light features of a segment must be (2,), like most of them; got (3,)"
  )
  assert videos.unreadable["v3"] == "holds NaN or infinite numbers"
  assert videos.unreadable["v4"] == "must hold real numbers [T, ...]; got object (1, 1)"
  assert set(videos.unreadable) == set(NAMES[1:])
  assert len(warnings) == 6


def test_a_thread_without_stderr_reads_on_after_a_file_that_cannot_be_read(features, monkeypatch):
  (features / "light" / "v3.npy").write_bytes(b"nothing")
  stream = io.StringIO()
  stream.close()
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setattr(logging.get_absl_logger(), "handlers", [logging.get_absl_handler()])
  with ThreadPoolExecutor(1) as thread:
    videos = thread.submit(open_features, features).result()
    read = thread.submit(lambda: list(videos.batches(7, 0, 1, 2))).result()
  assert [(batch["label"].shape[0], batch["weight"].sum()) for batch in read] == [(7, 7)] * 2
  assert set(videos.unreadable) == {"v3"}


def test_a_video_with_only_one_of_its_features_is_missing(features, warnings):
  (features / "heavy" / "v3.npy").unlink()
  assert open_features(features).missing == ("v3",)
  assert warnings == ["1 of 7 videos have no file and are skipped: v3"]


def test_features_are_found_under_the_name_of_the_video(features):
  videos = FeatureFolder(table(("v1.mp4", "v2.AVI")), features / "light", segments=2)
  assert videos.read([0, 1])["light"][:, 0, 0].tolist() == [10, 20]


@pytest.mark.parametrize("suffix", [".MP4", ".wmv", ".ts", ".flv", ".3gp", ".ogg", ".MKV"])
def test_a_name_without_suffix_finds_a_file_of_any_known_suffix(tmp_path, suffix):
  (tmp_path / f"v0{suffix}").write_bytes(b"film")
  assert VideoFolder(table(("v0",)), tmp_path, **CLIPS).paths == [tmp_path / f"v0{suffix}"]


def test_a_folder_whose_features_cannot_be_read_is_refused(tmp_path):
  (tmp_path / "v0.npy").write_bytes(b"nothing")
  with pytest.raises(ValueError, match="the folder must hold readable features; .*v0.npy"):
    FeatureFolder(table(("v0",)), tmp_path, segments=2)


def arrays_of(label):
  arrays = {
    "light": np.arange(30.0).reshape(5, 2, 3),
    "label": label,
    "weight": np.ones(5, np.float32),
  }
  return VideoArrays(arrays, class_names=("a", "b"), names=tuple("vwxyz"))


def test_batches_hold_the_rows_asked_for_of_every_array():
  batch = arrays_of(np.arange(5)).read(np.array([3, 0, 3]))
  np.testing.assert_array_equal(batch["light"], np.arange(30.0).reshape(5, 2, 3)[[3, 0, 3]])
  np.testing.assert_array_equal(batch["label"], [3, 0, 3])
  assert batch.keys() == {"light", "label", "weight"}


def test_it_knows_its_size_and_shapes():
  split = arrays_of(np.arange(5))
  assert len(split) == 5
  assert split.shapes == {"light": (2, 3), "label": (), "weight": ()}


@pytest.mark.parametrize(("shape", "several"), [((5,), False), ((5, 2), True)])
def test_labels_of_two_axes_are_of_several_classes(shape, several):
  assert arrays_of(np.zeros(shape)).multi_label == several


def test_it_is_covered_by_batches_once():
  seen = [
    batch["label"][:count].tolist() for batch, count in padded_batches(arrays_of(np.arange(5)), 2)
  ]
  assert seen == [[0, 1], [2, 3], [4]]


@given(frames=SOME, segments=SOME, length=st.integers(1, 12))
def test_segments_are_spread_over_the_whole_video(frames, segments, length):
  starts = segment_starts(frames, segments, length)
  last = max(frames - length, 0)
  assert starts.shape == (segments,)
  if segments == 1:
    assert starts[0] == last // 2
    return
  assert (starts[0], starts[-1]) == (0, last)
  assert np.all(np.abs(starts - np.linspace(0, last, segments)) < 1)
  assert np.ptp(np.diff(starts)) <= 1


@given(frames=SOME, segments=SOME, length=st.integers(1, 12), seed=st.integers(0, 100))
def test_random_segments_stay_in_their_parts_of_the_video(frames, segments, length, seed):
  starts = segment_starts(frames, segments, length, np.random.default_rng(seed))
  possible = max(frames - length, 0) + 1
  edges = np.arange(segments + 1) * possible / segments
  assert np.all(starts >= np.floor(edges[:-1]))
  assert np.all(starts < np.maximum(edges[1:], 1))
  assert np.all(starts < possible)


def test_random_segments_reach_every_start():
  rng = np.random.default_rng(0)
  seen = np.stack([segment_starts(13, 2, 4, rng) for _ in range(200)])
  assert [set(column) for column in seen.T] == [{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}]


@given(
  frames=SOME,
  segments=SOME,
  length=st.integers(1, 12),
  rate=st.sampled_from([10, 24, 25, 29.97, 30, 60]),
  seed=st.none() | st.integers(0, 100),
)
def test_at_a_constant_rate_segments_in_time_are_those_in_frames(
  frames, segments, length, rate, seed
):
  draw = lambda: None if seed is None else np.random.default_rng(seed)
  expected = segment_starts(frames, segments, length, draw())
  seconds = np.arange(frames) / rate
  np.testing.assert_array_equal(
    timed_starts(seconds, frames / rate, segments, length, draw(), rounding=1e-9), expected
  )
  # Times in milliseconds, as Matroska rounds them, tell starts apart that are further from a frame.
  if seed is None and 2 * (segments - 1) < 1000 / rate:
    times = np.round(1000 * seconds)
    np.testing.assert_array_equal(
      timed_starts(times, times[-1] + 33, segments, length, rounding=1), expected
    )


@given(
  gaps=st.lists(st.floats(0.01, 5), min_size=1, max_size=30),
  segments=SOME,
  length=st.integers(1, 12),
  seed=st.none() | st.integers(0, 100),
)
def test_segments_begin_with_the_frames_shown_at_equal_steps_of_time(gaps, segments, length, seed):
  times, end = 3 + np.append(0, np.cumsum(gaps[:-1])), 3 + sum(gaps)
  starts = timed_starts(
    times, end, segments, length, None if seed is None else np.random.default_rng(seed)
  )
  last = max(len(times) - length, 0)
  assert starts.shape == (segments,)
  assert np.all((starts >= 0) & (starts <= last))
  stops = np.append(times[1:], end)
  if seed is None:
    wanted = (
      np.linspace(times[0], times[last], segments)
      if segments > 1
      else [(times[0] + times[last]) / 2]
    )
    low = high = np.array(wanted)
  else:
    edges = np.linspace(times[0], stops[last], segments + 1)
    low, high = edges[:-1], edges[1:]
  assert np.all(times[starts] <= high + 1e-9)
  assert np.all((stops[starts] >= low - 1e-9) | (starts == last))
