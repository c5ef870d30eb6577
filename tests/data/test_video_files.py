import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.data import video_files
from gating_jax.data.video_files import read_clips, read_features, segment_starts
from tests.helpers import made_videos

SOME = st.integers(1, 70)


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


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")])
def test_the_frames_decoded_are_those_asked_for(tmp_path, name, codec):
  path = made_videos.write(tmp_path / name, 26, codec=codec)
  clips, middles = read_clips(path, 4, 8, (16, 24))
  assert (clips.shape, clips.dtype) == ((4, 8, 16, 24, 3), np.uint8)
  frames, error = made_videos.shown(clips)
  np.testing.assert_array_equal(frames, np.array([[0], [6], [12], [18]]) + np.arange(8))
  assert error <= 3
  np.testing.assert_allclose(middles, np.array([4, 10, 16, 22]) / 10)


@pytest.mark.parametrize(("frames", "expected"), [
    (1, [[0, 0, 0, 0]] * 3),
    (3, [[0, 1, 2, 2]] * 3),
    (5, [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]),
])
def test_segments_of_a_short_video_overlap_and_repeat_its_last_frame(tmp_path, frames, expected):
  clips, _ = read_clips(made_videos.write(tmp_path / "a.mp4", frames), 3, 4, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == expected


@pytest.mark.parametrize(("size", "to"), [((33, 47), (16, 16)), ((33, 47), (33, 47)), ((16, 16), (31, 17))])
def test_odd_sizes_are_read(tmp_path, size, to):
  clips, _ = read_clips(made_videos.write(tmp_path / "a.mp4", 6, size=size), 2, 2, to)
  assert clips.shape == (2, 2, *to, 3)
  frames, error = made_videos.shown(clips)
  assert frames.tolist() == [[0, 1], [4, 5]]
  assert error <= 3


def test_frames_are_resized_bilinearly_and_keep_their_colours(tmp_path):
  import av

  image = np.zeros((16, 32, 3), np.uint8)
  image[:, :16, 0] = image[:, 16:, 2] = 200
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    stream = container.add_stream("libx264rgb", rate=10, options={"qp": "0"})
    stream.height, stream.width, stream.pix_fmt = 16, 32, "rgb24"
    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())
  clips, _ = read_clips(tmp_path / "a.mp4", 1, 1, (8, 7))
  row = clips[0, 0, 4].astype(int)
  np.testing.assert_allclose(row[0], [200, 0, 0], atol=4)
  np.testing.assert_allclose(row[-1], [0, 0, 200], atol=4)
  np.testing.assert_allclose(row[3], [100, 0, 100], atol=8)  # the middle column lies half on either side


def test_a_sound_track_is_passed_over(tmp_path):
  clips, _ = read_clips(made_videos.write(tmp_path / "a.mp4", 10, audio=True), 2, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [8, 9]]


def test_files_without_a_picture_are_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no video stream"):
    read_clips(made_videos.write_sound(tmp_path / "a.mp4"), 2, 2, (8, 8))


@pytest.mark.parametrize("kept", [0.2, 0.6])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_truncated_files_are_refused(tmp_path, name, codec, kept):
  path = made_videos.write(tmp_path / name, 26, codec=codec)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(kept * len(whole))])
  with pytest.raises((ValueError, OSError)):
    read_clips(path, 2, 2, (8, 8))


def test_a_file_that_ends_before_the_frames_that_it_announces_is_refused(tmp_path):
  path = made_videos.write(tmp_path / "a.mp4", 26, options={"movflags": "faststart"})  # the table of frames comes first
  whole = path.read_bytes()
  path.write_bytes(whole[: whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2])
  with pytest.raises(ValueError, match=r"only \d+ of 26 frames can be decoded"):
    read_clips(path, 2, 2, (8, 8))


def test_a_video_whose_frames_are_overwritten_is_refused(tmp_path):
  path = made_videos.write(tmp_path / "a.mp4", 26)
  whole = path.read_bytes()
  start, end = whole.index(b"mdat") + 100, whole.index(b"moov") - 4
  path.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
  with pytest.raises(ValueError, match=r"only \d+ of 26 frames can be decoded"):
    read_clips(path, 2, 2, (8, 8))


def overwrite_frame(path, frame):
  """Fills a frame of an .avi file with zeros."""
  whole = path.read_bytes()
  chunk = whole.index(b"movi")
  for _ in range(frame + 1):
    chunk = whole.index(b"00dc", chunk + 4)
  start, size = chunk + 8, int.from_bytes(whole[chunk + 4 : chunk + 8], "little")
  path.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
  return path


def test_a_video_whose_chosen_frames_are_all_damaged_is_refused(tmp_path):
  class Latest:
    def random(self, count):
      return np.full(count, 0.999)

  path = made_videos.write(tmp_path / "a.avi", 26, codec="mjpeg")
  assert made_videos.shown(read_clips(path, 1, 1, (8, 8), Latest())[0])[0] == 25
  with pytest.raises(ValueError, match="only 25 of 26 frames can be decoded"):
    read_clips(overwrite_frame(path, 25), 1, 1, (8, 8), Latest())


def test_one_damaged_packet_of_many_does_not_lose_the_video(tmp_path):
  path = overwrite_frame(made_videos.write(tmp_path / "a.avi", 26, codec="mjpeg"), 1)
  frames, _ = made_videos.shown(read_clips(path, 2, 2, (8, 8))[0])
  assert frames.tolist() == [[0, 2], [25, 25]]


def test_features_are_read_as_float32(tmp_path):
  features = np.arange(12, dtype=np.float64).reshape(3, 2, 2)
  np.save(tmp_path / "a.npy", features)
  np.savez(tmp_path / "b.npz", anything=features.astype(np.int16))
  for name in ("a.npy", "b.npz"):
    read = read_features(tmp_path / name)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, features)


@pytest.mark.parametrize(("array", "message"), [
    (np.array([[1.0, np.nan]]), "holds NaN or infinite numbers"),
    (np.array([[1.0, -np.inf]]), "holds NaN or infinite numbers"),
    (np.array([[1e300]]), "holds NaN or infinite numbers"),
    (np.zeros(4), r"must hold real numbers \[T, ...\]; got float64 \(4,\)"),
    (np.zeros((0, 4)), r"got float64 \(0, 4\)"),
    (np.array([["a"]]), r"got <U1 \(1, 1\)"),
    (np.zeros((1, 1), complex), "got complex128"),
    (np.array([[{}]], object), "allow_pickle=False"),
])
def test_what_is_no_feature_array_is_refused(tmp_path, array, message):
  np.save(tmp_path / "a.npy", array)
  with pytest.raises(ValueError, match=message):
    read_features(tmp_path / "a.npy")


def test_an_archive_of_two_arrays_is_refused(tmp_path):
  np.savez(tmp_path / "a.npz", x=np.zeros((1, 1)), y=np.zeros((1, 1)))
  with pytest.raises(ValueError, match=r"must hold one array; got \['x', 'y'\]"):
    read_features(tmp_path / "a.npz")


def test_a_missing_decoder_is_named_with_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(ValueError, match=r"reading videos needs PyAV: pip install 'gating-jax\[video\]'"):
    video_files.require_av()
