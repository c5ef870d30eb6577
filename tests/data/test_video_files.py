import io
import sys

import av
import ml_collections
import numpy as np
import pytest
from PIL import Image

from gating_jax.data import video_files
from gating_jax.data.video_files import VideoFolder, read_clips
from gating_jax.data.video_tables import VideoTable
from gating_jax.video import sets
from tests.helpers import made_videos

NO_REORDERING = {"bf": "0", "sc_threshold": "0"}  # a key frame every five frames only
REORDERING = {"bf": "2", "b-adapt": "0", "sc_threshold": "0"}
# A frame each half second for 6 seconds, then twelve a second for another.
VARIABLE = np.concatenate([np.arange(12) / 2, 6 + np.arange(13) / 12])


@pytest.mark.parametrize(
  ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")]
)
def test_the_frames_decoded_are_those_asked_for(tmp_path, name, codec):
  path = made_videos.write(tmp_path / name, 26, codec=codec)
  clips, middles = read_clips(path, 4, 8, (16, 24))
  assert (clips.shape, clips.dtype) == ((4, 8, 16, 24, 3), np.uint8)
  frames, error = made_videos.shown(clips)
  np.testing.assert_array_equal(frames, np.array([[0], [6], [12], [18]]) + np.arange(8))
  assert error <= 3
  np.testing.assert_allclose(middles, np.array([4, 10, 16, 22]) / 10)


@pytest.mark.parametrize(
  ("frames", "expected"),
  [
    (1, [[0, 0, 0, 0]] * 3),
    (3, [[0, 1, 2, 2]] * 3),
    (5, [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]),
  ],
)
def test_segments_of_a_short_video_overlap_and_repeat_its_last_frame(tmp_path, frames, expected):
  clips, _ = read_clips(made_videos.write(tmp_path / "a.mp4", frames), 3, 4, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == expected


@pytest.mark.parametrize(
  ("size", "to"), [((33, 47), (16, 16)), ((33, 47), (33, 47)), ((16, 16), (31, 17))]
)
def test_odd_sizes_are_read(tmp_path, size, to):
  clips, _ = read_clips(made_videos.write(tmp_path / "a.mp4", 6, size=size), 2, 2, to)
  assert clips.shape == (2, 2, *to, 3)
  frames, error = made_videos.shown(clips)
  assert frames.tolist() == [[0, 1], [4, 5]]
  assert error <= 3


def test_frames_are_resized_bilinearly_and_keep_their_colours(tmp_path):
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
  # The middle column lies half on either side.
  np.testing.assert_allclose(row[3], [100, 0, 100], atol=8)


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
  # The table of frames comes first.
  path = made_videos.write(tmp_path / "a.mp4", 26, options={"movflags": "faststart"})
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


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("a.mp4", dict(encoder=NO_REORDERING)),
    ("a.mkv", dict(encoder=REORDERING)),
    ("a.mov", dict(encoder=REORDERING, audio=True)),
    ("a.webm", dict(codec="libvpx-vp9", encoder={"deadline": "realtime"})),
    ("a.avi", dict(codec="mpeg4", rate=12)),
  ],
)
def test_segments_of_a_variable_rate_are_spread_over_time(tmp_path, name, settings):
  path = made_videos.write(tmp_path / name, 25, times=VARIABLE, **{"rate": 30, **settings})
  clips, middles = read_clips(path, 4, 2, (8, 8))
  # At 0, 2.31, 4.61 and 6.92 s.
  assert made_videos.shown(clips)[0].tolist() == [
    [0, 1],
    [4, 5],
    [9, 10],
    [23, 24],
  ]
  np.testing.assert_allclose(middles, [0.5, 2.5, 5, 7], atol=0.06)


@pytest.mark.parametrize(
  ("name", "codec", "first"),
  [("a.mp4", "libx264", 2), ("a.mkv", "libx264", 2), ("a.mpg", "mpeg2video", 0)],
)
def test_times_count_from_the_files_own_zero_or_from_the_first_frame(tmp_path, name, codec, first):
  path = made_videos.write(tmp_path / name, 6, rate=25, codec=codec, times=2 + np.arange(6) / 25)
  clips, middles = read_clips(path, 2, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [4, 5]]
  np.testing.assert_allclose(middles, first + np.array([0.04, 0.2]), atol=0.01)


@pytest.mark.parametrize(
  ("name", "codec"),
  [
    ("a.mp4", "libx264"),
    ("a.mkv", "libx264"),
    ("a.webm", "libvpx-vp9"),
    ("a.avi", "libx264"),
    ("a.mpg", "mpeg2video"),
  ],
)
def test_a_video_of_one_frame_shows_it_everywhere(tmp_path, name, codec):
  clips, middles = read_clips(
    made_videos.write(tmp_path / name, 1, rate=25, codec=codec), 3, 2, (8, 8)
  )
  assert made_videos.shown(clips)[0].tolist() == [[0, 0]] * 3
  np.testing.assert_allclose(middles, 0.02, atol=0.021)


@pytest.mark.parametrize("encoder", [NO_REORDERING, REORDERING])
@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov+delay_moov"}])
@pytest.mark.parametrize("first", [3, 7])
def test_a_film_cut_without_encoding_it_again_begins_where_it_was_cut(
  tmp_path, encoder, options, first
):
  whole = made_videos.write(tmp_path / "whole.mp4", 26, encoder=encoder)
  with av.open(str(whole)) as container:
    key = max(
      packet.pts
      for packet in container.demux(video=0)
      if packet.is_keyframe and packet.pts * packet.time_base <= first / 10
    )
  path = made_videos.copy_packets(
    whole, tmp_path / "a.mp4", first, options=options, keep=lambda packet: packet.pts >= key
  )
  clips, middles = read_clips(path, 2, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[first, first + 1], [24, 25]]
  np.testing.assert_allclose(middles, [0.1, (25 - first) / 10])


@pytest.mark.parametrize(
  ("edits", "expected", "middles"),
  [
    ([(5, 3)], [[3, 4], [4, 5], [6, 7]], [0.1, 0.2, 0.4]),  # the beginning and the end are hidden
    ([(3, 0), (4, 7)], [[0, 1], [2, 7], [9, 10]], [0.1, 0.3, 0.6]),  # the middle is
    ([(3, 2), (3, 2)], [[2, 3], [4, 2], [3, 4]], [0.1, 0.3, 0.5]),  # a part is shown twice
    ([(3, 7), (3, 2)], [[7, 8], [9, 2], [3, 4]], [0.1, 0.3, 0.5]),  # parts are swapped
    ([(5, None), (4, 3)], [[3, 4], [4, 5], [5, 6]], [0.6, 0.7, 0.8]),  # nothing is shown at first
  ],
)
def test_an_edit_list_says_what_is_shown_and_when(tmp_path, edits, expected, middles):
  path = made_videos.set_edits(
    made_videos.write(tmp_path / "a.mp4", 12, encoder=NO_REORDERING), edits
  )
  clips, times = read_clips(path, 3, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == expected
  np.testing.assert_allclose(times, middles)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi"])
def test_a_film_without_its_first_key_frame_begins_with_the_next(tmp_path, name):
  whole = made_videos.write(
    tmp_path / "whole.mkv", 20, codec="libvpx-vp9", encoder={"deadline": "realtime"}
  )
  path = made_videos.copy_packets(whole, tmp_path / name, keep=lambda packet: packet.pts > 0)
  assert made_videos.shown(read_clips(path, 2, 2, (8, 8))[0])[0].tolist() == [[5, 6], [18, 19]]


@pytest.mark.parametrize(
  ("codec", "name", "rate"), [("libx264", "a.ts", 10), ("mpeg2video", "a.mpg", 25)]
)
def test_films_one_behind_the_other_are_read_in_order_though_the_clock_starts_again(
  tmp_path, codec, name, rate
):
  path = made_videos.write(tmp_path / name, 10, codec=codec, rate=rate, encoder=NO_REORDERING)
  path.write_bytes(2 * path.read_bytes())
  clips, middles = read_clips(path, 4, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [6, 7], [2, 3], [8, 9]]
  np.testing.assert_allclose(middles, np.array([1, 7, 13, 19]) / rate)


def test_a_stream_without_any_times_is_read_at_its_frame_rate(tmp_path):
  path = made_videos.write(tmp_path / "a.m1v", 20, codec="mpeg1video", rate=25, encoder={"bf": "2"})
  clips, middles = read_clips(path, 2, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [18, 19]]
  np.testing.assert_allclose(middles, [0.04, 0.76])


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_frames_of_two_fields_in_a_packet_each_are_one_frame(tmp_path, name):
  clips, middles = read_clips(made_videos.write_fields(tmp_path / name, 12), 3, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [5, 6], [10, 11]]
  np.testing.assert_allclose(middles, [0.1, 0.6, 1.1], atol=0.03)


QUARTERS = np.array([[40, 90], [140, 190]])


def corners(image):
  """Returns the brightness of an image in the centres of its quarters."""
  height, width = image.shape[:2]
  return image[np.ix_([height // 4, 3 * height // 4], [width // 4, 3 * width // 4])].mean(axis=-1)


@pytest.mark.parametrize(
  ("matrix", "upright"),
  [
    ([[1, 0], [0, 1]], QUARTERS),
    ([[0, 1], [-1, 0]], np.rot90(QUARTERS, -1)),  # a quarter clockwise
    ([[-1, 0], [0, -1]], np.rot90(QUARTERS, 2)),
    ([[0, -1], [1, 0]], np.rot90(QUARTERS)),
    ([[-1, 0], [0, 1]], QUARTERS[:, ::-1]),  # mirrored
    ([[1, 0], [0, -1]], QUARTERS[::-1]),
    ([[0, 1], [1, 0]], QUARTERS.T),
    ([[0, -1], [-1, 0]], QUARTERS[::-1, ::-1].T),
    ([[0, 0], [0, 0]], QUARTERS),  # says nothing
    ([[2, 0.1], [-0.1, 2]], QUARTERS),  # nearly upright, larger
  ],
)
def test_a_display_matrix_turns_and_mirrors_the_picture(tmp_path, matrix, upright):
  picture = np.repeat(np.kron(QUARTERS, np.ones((16, 32)))[..., None], 3, axis=2).astype(np.uint8)
  path = made_videos.write(
    tmp_path / "a.mp4", 2, size=(32, 64), paint=lambda _: picture, encoder={"qp": "4"}
  )
  for size in ((16, 16), (24, 40)):
    clips, _ = read_clips(made_videos.set_display_matrix(path, matrix), 1, 1, size)
    assert clips.shape == (1, 1, *size, 3)
    np.testing.assert_allclose(corners(clips[0, 0]), upright, atol=4)


@pytest.mark.parametrize(
  ("orientation", "upright"),
  [(1, QUARTERS), (3, np.rot90(QUARTERS, 2)), (6, np.rot90(QUARTERS, -1)), (8, np.rot90(QUARTERS))],
)
def test_pictures_turned_by_a_tag_of_their_own_are_shown_upright(tmp_path, orientation, upright):
  picture = np.repeat(np.kron(QUARTERS, np.ones((16, 32)))[..., None], 3, axis=2).astype(np.uint8)
  tags, jpeg = Image.Exif(), io.BytesIO()
  tags[0x0112] = orientation
  Image.fromarray(picture).save(jpeg, "jpeg", exif=tags, quality=95)
  path = made_videos.write_packets(
    tmp_path / "a.mov", "mjpeg", [(jpeg.getvalue(), 0, True)], (32, 64)
  )
  np.testing.assert_allclose(corners(read_clips(path, 1, 1, (16, 16))[0][0, 0]), upright, atol=5)


@pytest.mark.parametrize(
  "tracks", [["cover", "film"], ["film", "cover"], ["film", "film"], ["sound", "film"]]
)
def test_the_film_is_read_among_other_tracks(tmp_path, tracks):
  clips, _ = read_clips(made_videos.write_tracks(tmp_path / "a.mp4", tracks), 2, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [4, 5]]


def test_a_cover_picture_is_no_video(tmp_path):
  with pytest.raises(ValueError, match="holds no video stream"):
    read_clips(made_videos.write_tracks(tmp_path / "a.mp4", ["sound", "cover"]), 2, 2, (8, 8))


@pytest.mark.parametrize(
  ("codec", "pixels"),
  [
    ("libx264", "yuv420p10le"),
    ("ffv1", "gray16le"),
    ("ffv1", "gray"),
    ("ffv1", "bgra"),
    ("ffv1", "yuva444p10le"),
    ("libx264rgb", "rgb24"),
    ("libvpx-vp9", "yuva420p"),
  ],
)
def test_any_format_of_pixels_is_read(tmp_path, codec, pixels):
  path = made_videos.write(tmp_path / "a.mkv", 6, codec=codec, pixels=pixels)
  frames, error = made_videos.shown(read_clips(path, 2, 2, (8, 8))[0])
  assert frames.tolist() == [[0, 1], [4, 5]]
  assert error <= 4


@pytest.mark.parametrize(
  ("name", "codec", "rate"), [("a.h264", "libx264", 10), ("a.m2v", "mpeg2video", 30)]
)
def test_raw_streams_have_the_rate_that_their_codec_says(tmp_path, name, codec, rate):
  path = made_videos.write(tmp_path / name, 20, codec=codec, rate=rate)
  clips, middles = read_clips(path, 3, 2, (8, 8))
  assert made_videos.shown(clips)[0].tolist() == [[0, 1], [9, 10], [18, 19]]
  np.testing.assert_allclose(middles, np.array([1, 10, 19]) / rate)


def test_interlaced_frames_are_read_woven(tmp_path):
  path = made_videos.write(
    tmp_path / "a.mkv", 6, encoder={"x264-params": "interlaced=1"}, pixels="yuv420p"
  )
  assert made_videos.shown(read_clips(path, 2, 2, (8, 8))[0])[0].tolist() == [[0, 1], [4, 5]]


def test_the_resolution_may_change_within_a_film(tmp_path):
  packets = []
  for size, first in (((32, 48), 0), ((80, 64), 6)):
    whole = made_videos.write(tmp_path / "part.avi", 12, size=size, codec="mjpeg")
    with av.open(str(whole)) as container:
      data = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    packets += [(data[i], 100 * i, True) for i in range(first, first + 6)]
  path = made_videos.write_packets(tmp_path / "a.mkv", "mjpeg", packets, (32, 48))
  assert made_videos.shown(read_clips(path, 3, 2, (8, 8))[0])[0].tolist() == [
    [0, 1],
    [5, 6],
    [10, 11],
  ]


def test_a_title_in_another_encoding_does_not_matter(tmp_path):
  path = made_videos.write(tmp_path / "a.mp4", 6)
  path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xe9\xff\xfe\x80"))
  assert made_videos.shown(read_clips(path, 2, 2, (8, 8))[0])[0].tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize(
  ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.flv", "libx264")]
)
def test_a_film_that_ends_before_the_time_it_announces_is_refused(tmp_path, name, codec):
  path = made_videos.write(tmp_path / name, 26, codec=codec)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(0.7 * len(whole))])
  with pytest.raises(ValueError, match=r"ends after [\d.]+ s of the 2\.\d\d s that it announces"):
    read_clips(path, 2, 2, (8, 8))


def test_a_count_of_samples_that_no_file_of_its_size_can_hold_is_refused(tmp_path):
  path = made_videos.write(tmp_path / "a.mp4", 6, options={"movflags": "frag_keyframe+empty_moov"})
  data = bytearray(path.read_bytes())
  place = data.index(b"trun") + 8
  data[place : place + 4] = (1 << 26).to_bytes(4, "big")
  path.write_bytes(data)
  with pytest.raises(
    ValueError, match=rf"announces 67108864 samples in a file of {len(data)} bytes"
  ):
    read_clips(path, 2, 2, (8, 8))


def test_what_is_no_box_ends_the_search_for_them():
  box = (12).to_bytes(4, "big") + b"free" + bytes(4)
  data = box + (4).to_bytes(4, "big") + b"junk" + box
  found = list(video_files._boxes(io.BytesIO(data), 0, len(data)))
  assert found == [(b"free", 8, 12)]


def test_kept_frames_before_the_first_segment_are_no_answer():
  film = video_files._Film(
    times=np.arange(10), end=10, zero=0, tick=0.1, counted=False, announced=10
  )
  frame = np.zeros((2, 2, 3), np.uint8)

  class Cache:
    """Holds a film whose frames up to a time could be decoded."""

    def __init__(self, last):
      shown = video_files._Shown(
        pixels={0: frame},
        firsts=dict.fromkeys(range(10), 0),
        times=[last],
        intact=10,
        interlaced=False,
      )
      self.film = video_files._pack_film(film, shown, by_fields=False)

    def key(self, path, *, kind, **settings):
      return kind

    def get(self, key):
      return self.film

  clips, _ = video_files.read_cached(Cache(9), "a.mp4", 1, length=1, size=(2, 2))
  np.testing.assert_array_equal(clips, frame[None, None])
  with pytest.raises(ValueError, match="^only 10 of 10 frames can be decoded"):
    video_files.read_cached(Cache(3), "a.mp4", 1, length=1, size=(2, 2))


def test_frames_too_large_for_any_cinema_are_not_decoded(tmp_path, monkeypatch):
  path = made_videos.write(tmp_path / "a.mp4", 6)
  monkeypatch.setattr(video_files, "_LIMITS", {"max_pixels": str(32 * 48 - 1)})
  with pytest.raises(ValueError, match="only 0 of 6 frames can be decoded"):
    read_clips(path, 2, 2, (8, 8))


def test_a_missing_decoder_is_named_with_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(
    ValueError, match=r"reading videos needs PyAV: pip install 'gating-jax\[video\]'"
  ):
    video_files.require_av()


def test_frames_are_counted_without_decoding_and_short_films_are_said(tmp_path, monkeypatch):
  for name, frames in (("a.mp4", 6), ("b.mp4", 10), ("c.mp4", 14)):
    made_videos.write(tmp_path / name, frames)
  (tmp_path / "d.mp4").write_bytes(b"no video")
  labels = np.zeros(4, np.int32)
  table = VideoTable(("a", "b", "c", "d"), labels, ("x",))
  monkeypatch.setattr(video_files, "_decode_segments", None)
  films = VideoFolder(table, tmp_path, segments=4, frames=4, size=(8, 8))
  assert films.count_frames() == [6, 10, 14]
  assert films.count_frames(most=2) == [6, 10]
  data = ml_collections.ConfigDict({"segments": 4, "frames": 4})
  assert sets.advise_segments(films, data).endswith(
    "shorter than data.segments x data.frames = 16: segments overlap; data.segments=2 fits them"
  )
  data.segments = 2
  assert sets.advise_segments(films, data) is None
