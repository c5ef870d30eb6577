"""Videos in files, decoded with PyAV.

A video is read as a player shows it: by presentation time, each frame until the next one, so
segments are spread over time whatever the frame rate does; without the frames that an edit list
hides; upright, as the display matrix says. Frames keep their stored colours: alpha is ignored,
fields stay woven and HDR is not tone mapped.

A file that cannot be read raises; `data/videos.py` turns that into weight 0.

Axes: T segments, F frames each, H and W pixels, N frames of a video.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gating_jax.checks import few, printable
from gating_jax.data.array_cache import ArrayCache
from gating_jax.data.checked_files import find_faults
from gating_jax.data.video_tables import VideoTable
from gating_jax.data.videos import (
  VIDEO_SUFFIXES,
  Batch,
  Segments,
  VideoSet,
  find_file,
  timed_starts,
)
from gating_jax.terminal import warn

# Formats of self-contained files: no playlists, no texts or patterns that name other files.
_CONTAINERS = (
  "asf,avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegvideo,mpegts,ogg,m4v,h264,hevc"
)
# FFmpeg's names of these formats.
_MP4, _MATROSKA, _AVI = (
  "mov,mp4,m4a,3gp,3g2,mj2",
  "matroska,webm",
  "avi",
)
# Pixels of a frame, at most those of cinema: a damaged header may announce any number.
_LIMITS = {"max_pixels": str(8192 * 4320)}
# Boxes of .mp4 files that lead to the boxes below.
_BOXES = (
  b"moov",
  b"trak",
  b"mdia",
  b"minf",
  b"stbl",
  b"moof",
  b"traf",
)
# Boxes with a number of samples, and the bytes before it.
_COUNTS = {
  b"stsz": 8,
  b"trun": 4,
}
# Samples per byte: more than any audio codec has.
_DENSEST = 64
# Seconds between packets that are no pause but another clock, as in FFmpeg's own tools.
_SPLICE = 10.0
# Seconds, to which Matroska rounds times.
_ROUNDING = 1e-3
# Bytes of a film's resized frames, beyond which a cache keeps clips instead.
_LARGEST = 2**28
# Fraction of what a file announces; if less can be decoded, the file is damaged.
_WHOLE = 0.9


class VideoFolder(VideoSet):
  """Set of videos in a folder of files, decoded with PyAV.

  The input is `clips` `[T, F, H, W, 3]` uint8. Videos are read as a player shows them: by
  presentation time, upright, without what edit lists hide.

  Args:
    table: table whose names are files in `folder`, with or without their suffix.
    folder: of the videos.
    segments: T, spread uniformly over the time of the video; they overlap where it is short.
    frames: F, successive frames of a segment.
    size: `(H, W)` that frames are brought to, bilinearly.
    seed: of the order and of the jitter.
    jitter: whether segments start at random in training, each in its own part of the video.
    workers: number of processes that decode; 0 for threads of this process.
    cache: keeps resized frames, so that a film is decoded once; None to decode it each time. The
      clips are the same.
  Raises:
    ValueError: PyAV is missing, a name would leave the folder, or none of the files is there.
  """

  def __init__(
    self,
    table: VideoTable,
    folder: str | Path,
    *,
    segments: int,
    size: tuple[int, int],
    frames: int = 8,
    seed: int = 0,
    jitter: bool = False,
    workers: int = 0,
    cache: ArrayCache | None = None,
  ):
    if frames < 1 or min(size) < 1:
      raise ValueError(f"frames and size must be at least 1; got {frames} and {size}")
    require_av()
    self._frames, self._size, self._cache = frames, (size[0], size[1]), cache

    def find(name):
      """Returns the video's file, or None if it is missing."""
      return find_file(folder, name, ("", *VIDEO_SUFFIXES))

    super().__init__(table, find, segments=segments, seed=seed, jitter=jitter, workers=workers)

  def count_frames(self, most: int = 16) -> list[int]:
    """Counts the frames of the first videos that can be opened, without decoding them.

    Args:
      most: number of videos, at most.
    """
    counts = []
    for path in self._files[:most]:
      try:
        counts.append(len(_open_film(path).times))
      # It is named, with the reason, when it is read.
      except Exception:
        continue
    return counts

  def check_files(self) -> None:
    """Opens every file without decoding it; names and counts those that cannot be opened.

    They are then known in `unreadable`. A fault that only decoding shows is named when it does.
    """
    found = find_faults(
      self._files,
      _open_film,
      "checking the videos",
      describe=lambda error: str(error) or type(error).__name__,
    )
    faults = {}
    for name, fault in zip(self.names, found, strict=True):
      if fault is not None:
        faults[name] = fault
    self.unreadable.update(faults)
    if faults:
      named = [printable(f"{name} ({fault})") for name, fault in faults.items()]
      warn("%d of %d videos cannot be read and are skipped: %s", len(faults), len(self), few(named))

  def _inputs(self) -> Batch:
    """Returns zeros in place of the clips of a video."""
    return {"clips": np.zeros((self._segments, self._frames, *self._size, 3), np.uint8)}

  def _load(self, index: int, rng: np.random.Generator | None) -> Segments:
    """Decodes the clips of a video's segments."""
    read = read_clips if self._cache is None else functools.partial(read_cached, self._cache)
    clips, middles = read(
      self._files[index], self._segments, length=self._frames, size=self._size, rng=rng
    )
    return Segments({"clips": clips}, np.ones(self._segments, bool), middles)


def require_av() -> None:
  """Raises unless PyAV is installed, in a version that lists the frames of a file's index.

  Raises:
    ValueError: with the command that installs PyAV.
  """
  try:
    from av import index  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"reading videos needs PyAV: pip install 'gating-jax[video]' ({error})"
    ) from error


def read_clips(
  path: Path,
  segments: int,
  length: int,
  size: tuple[int, int],
  rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a video's segments, each frame upright and resized bilinearly.

  A segment is the frame that a player shows at its start and those that follow; the last frame is
  repeated where the video is short. Time 0 is that of the file in .mp4, .mov, .mkv and .webm, and
  the first frame elsewhere. Cover pictures are no videos. Of several video streams the one that
  FFmpeg finds best is read, as players do.

  Args:
    path: a file with a video stream; other streams are ignored.
    segments, length, rng: as in `timed_starts`.
    size: `(H, W)`.
  Returns:
    `[T, F, H, W, 3]` uint8 RGB, and `[T]` the segments' middles in seconds (NaN without a frame
    rate).
  Raises:
    ValueError: no video stream, no frame of it or of the segments, or fewer than 9/10 of what the
      file announces.
    Exception: any other error of PyAV for a damaged file, or one that refers to others, OSError and
      MemoryError among them.
  """
  film = _open_film(path)
  starts = _choose_starts(film, segments, length=length, rng=rng)
  shown = _decode_segments(path, film, starts, length=length, size=size)
  if _is_by_fields(film, shown):
    # Two packets, one per field, make a frame: only every second time is that of a frame.
    film = _of_frames(film)
    starts = _choose_starts(film, segments, length=length, rng=rng)
    shown = _decode_segments(path, film, starts, length=length, size=size)
  _check_decoded(film, shown)
  return _cut_clips(film, shown, starts, length=length)


def read_cached(
  cache: ArrayCache,
  path: Path,
  segments: int,
  length: int,
  size: tuple[int, int],
  rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what `read_clips` does, from frames that are decoded and resized once.

  All frames of a short film are kept, so that random segments are cut from them. Of a film of more
  than `_LARGEST` bytes the segments at fixed places are kept, and others are decoded each time.

  Args:
    cache: keeps the frames.
    path, segments, length, size, rng: as in `read_clips`.
  """
  of_film = cache.key(path, kind="film", size=size)
  of_clips = cache.key(path, kind="clips", size=size, segments=segments, length=length)
  found = cache.get(of_film)
  # Random segments are new ones each time.
  if found is None and rng is None and (kept := cache.get(of_clips)) is not None:
    return kept["clips"], kept["middles"]
  if found is None:
    film = _open_film(path)
    if len(film.times) * size[0] * size[1] * 3 > _LARGEST:
      clips, middles = read_clips(path, segments, length=length, size=size, rng=rng)
      if rng is None:
        cache.put(of_clips, {"clips": clips, "middles": middles})
      return clips, middles
    found = _decode_film(path, film, size)
    cache.put(of_film, found)
  film, shown, by_fields = _unpack_film(found)
  starts = _choose_starts(film, segments, length=length, rng=rng)
  if by_fields:
    # As in `read_clips`, which draws once before it knows that two packets make a frame.
    starts = _choose_starts(film, segments, length=length, rng=rng)
  # As in `_decode_segments`: frames before the first segment are no answer.
  if shown.times[-1] < film.times[starts.min()]:
    shown = shown._replace(pixels={})
  _check_decoded(film, shown)
  return _cut_clips(film, shown, starts, length=length)


def _open_film(path: Path) -> _Film:
  """Lists the frames of the film in a file."""
  # Before FFmpeg opens the file, since it would make room for all announced samples.
  _check_counts(path)
  with _open(path) as container:
    return _list_frames(container, _video_stream(container))


def _of_frames(film: _Film) -> _Film:
  """Returns a film of frames that are listed as two fields each."""
  return film._replace(times=film.times[::2], announced=film.announced // 2)


def _decode_film(path: Path, film: _Film, size: tuple[int, int]) -> dict[str, np.ndarray]:
  """Decodes all frames of a film, and packs it. Raises a ValueError as `read_clips` does."""
  shown = _decode_all(path, film, size)
  by_fields = _is_by_fields(film, shown)
  if by_fields:
    film = _of_frames(film)
    shown = _decode_all(path, film, size)
  _check_decoded(film, shown)
  return _pack_film(film, shown, by_fields)


def _decode_all(path: Path, film: _Film, size: tuple[int, int]) -> _Shown:
  """Decodes segments of which one begins with each frame and ends with the last."""
  starts = np.arange(len(film.times))
  return _decode_segments(path, film, starts, length=len(starts), size=size)


def _pack_film(film: _Film, shown: _Shown, by_fields: bool) -> dict[str, np.ndarray]:
  """Returns a decoded film as arrays."""
  numbers = np.array(sorted(shown.pixels))
  return {
    "times": film.times,
    "clock": np.array([film.end, film.zero, film.tick, shown.times[-1]], np.float64),
    "counts": np.array([film.announced, shown.intact, by_fields], np.int64),
    "firsts": np.array([shown.firsts[start] for start in range(len(film.times))]),
    "numbers": numbers,
    "pixels": np.stack([shown.pixels[number] for number in numbers.tolist()]),
  }


def _unpack_film(arrays: dict[str, np.ndarray]) -> tuple[_Film, _Shown, bool]:
  """Returns the arguments that `_pack_film` has packed."""
  end, zero, tick, last = arrays["clock"].tolist()
  announced, intact, by_fields = arrays["counts"].tolist()
  film = _Film(
    times=arrays["times"], end=end, zero=zero, tick=tick, counted=False, announced=announced
  )
  shown = _Shown(
    pixels=dict(zip(arrays["numbers"].tolist(), arrays["pixels"], strict=True)),
    firsts=dict(enumerate(arrays["firsts"].tolist())),
    times=[last],
    intact=intact,
    interlaced=False,
  )
  return film, shown, bool(by_fields)


def _check_decoded(film: _Film, shown: _Shown) -> None:
  """Raises a ValueError where too few frames of a film could be decoded, or none of a segment."""
  if shown.intact < _WHOLE * film.announced or not shown.pixels:
    raise ValueError(f"only {shown.intact} of {film.announced} frames can be decoded")


def _cut_clips(
  film: _Film, shown: _Shown, starts: np.ndarray, *, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns clips `[T, F, H, W, 3]` that begin at `[T]` starts, and their middles, in seconds."""
  firsts = np.array([shown.firsts[start] for start in starts])
  # [T, F] numbers of frames.
  frames = firsts[:, None] + np.arange(length)
  # Where the video is short, the last frame is repeated. Overlapping segments share frames.
  wanted, place = np.unique(frames.clip(max=max(shown.pixels)), return_inverse=True)
  clips = np.stack([shown.pixels[frame] for frame in wanted])[place.reshape(frames.shape)]
  # Each frame is shown until the next one; a segment's middle lies between its two ends.
  ends = np.append(film.times[1:], film.end)
  stops = ends[(starts + length - 1).clip(max=len(ends) - 1)]
  middles = (film.times[starts].clip(min=film.zero) + stops) / 2 - film.zero
  return clips, middles * film.tick


class _Packet(NamedTuple):
  """Packet without its data; times in ticks."""

  pts: int | None
  dts: int | None
  duration: int
  is_keyframe: bool
  is_discard: bool


class _Film(NamedTuple):
  """Frames that a player shows, as the packets of the file list them.

  Attributes:
    times: `[N]`, ascending: when each is first shown, in ticks.
    end: tick at which the last one is no longer shown.
    zero: tick at which the video begins.
    tick: seconds; NaN without a frame rate.
    counted: whether decoded frames are identified by their number, since they carry no times.
    announced: how many frames the file should hold.
  """

  times: np.ndarray
  end: float
  zero: float
  tick: float
  counted: bool
  announced: int


class _Box(NamedTuple):
  """Part of an .mp4 file.

  Attributes:
    kind: four letters.
    start, end: the bytes of its content.
  """

  kind: bytes
  start: int
  end: int


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[_Box]:
  """Yields the boxes that follow each other between two places of a file."""
  while start + 8 <= end:
    file.seek(start)
    head = file.read(16)
    length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], 8
    # A length of 1 means that 8 bytes with the real one follow; 0 means to the end.
    if length == 1:
      length, body = int.from_bytes(head[8:16], "big"), 16
    if length == 0:
      length = end - start
    # Not a box: FFmpeg will report the damage.
    if length < body:
      return
    yield _Box(kind, start + body, min(start + length, end))
    start += length


def _check_counts(path: Path) -> None:
  """Raises a ValueError where an .mp4 file announces more samples than it can hold.

  FFmpeg would allocate memory for all of them.
  """
  size = os.path.getsize(path)
  regions = [(0, size)]
  with open(path, "rb") as file:
    while regions:
      for box in _boxes(file, *regions.pop()):
        if box.kind in _BOXES:
          regions.append((box.start, box.end))
        elif box.kind in _COUNTS:
          file.seek(box.start + _COUNTS[box.kind])
          samples = int.from_bytes(file.read(4), "big")
          if samples > _DENSEST * size:
            raise ValueError(f"announces {samples} samples in a file of {size} bytes")


def _open(path: Path):
  """Opens this file and no other.

  The name is not read as an address of FFmpeg's, and nothing in the file makes it open another.
  """
  import av
  from av.error import ArgumentError

  file = f"file:{os.path.abspath(path)}"
  allowed = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
  try:
    return av.open(file, options=_LIMITS, container_options=allowed)
  # A title, say, in another encoding; no metadata is used.
  except UnicodeDecodeError:
    return av.open(file, options=_LIMITS, container_options=allowed, metadata_errors="replace")
  # FFmpeg's error for a format that is not in the list.
  except ArgumentError as error:
    raise ValueError(
      f"must have a self-contained container format, one of {_CONTAINERS}"
    ) from error


def _video_stream(container):
  """Returns the stream that players choose; never a cover picture or a track of thumbnails."""
  from av.stream import Disposition

  pictures = Disposition.attached_pic | Disposition.timed_thumbnails
  streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
  if not streams:
    raise ValueError("holds no video stream")
  # FFmpeg's choice may be a cover picture.
  best = container.streams.best("video")
  stream = best if best in streams else streams[0]
  if stream.codec_context is None:
    raise ValueError("holds a video stream with a codec unknown to PyAV")
  stream.codec_context.options = _LIMITS
  return stream


def _list_frames(container, stream) -> _Film:
  """Lists the frames that a player shows, without decoding them."""
  listed = len(stream.index_entries)
  packets, reached = [], 0.0
  for packet in container.demux():
    if packet.pts is not None and packet.time_base:
      reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if packet.stream is stream and packet.size:
      packets.append(
        _Packet(
          pts=packet.pts,
          dts=packet.dts,
          duration=packet.duration or 0,
          is_keyframe=packet.is_keyframe,
          is_discard=packet.is_discard,
        )
      )
  shown = _shown(packets)
  if not shown:
    raise ValueError("holds no frame")
  # The index of .mp4 and .avi files names all frames; other files are checked by their duration.
  if container.format.name not in (_MP4, _AVI) or listed < len(packets):
    _check_length(container, reached)
  film = _times_of(container, stream, shown)
  # Frames in the index without a packet: the file was cut off.
  lost = len(_shown([entry for entry in stream.index_entries if entry.size])) - len(shown)
  return film._replace(announced=len(film.times) + max(lost, 0))


def _shown(entries: Sequence) -> list:
  """Returns the packets or index entries whose frames are shown.

  These are the ones from the first key frame on, without those that edits hide.
  """
  # Without any key frame, all of them.
  first = next((i for i, entry in enumerate(entries) if entry.is_keyframe), 0)
  return [entry for entry in entries[first:] if not entry.is_discard]


def _check_length(container, reached: float) -> None:
  """Raises a ValueError where a file ends long before the duration in its header."""
  from av.format import Flags

  # Formats without reliable times have a duration that FFmpeg estimates.
  guessed = container.format.flags & (Flags.ts_discont | Flags.no_timestamps).value
  if guessed or not container.duration:
    return
  announced = container.duration * 1e-6
  if reached < _WHOLE * announced:
    raise ValueError(f"ends after {reached:.2f} s of the {announced:.2f} s that it announces")


def _times_of(container, stream, packets: Sequence[_Packet]) -> _Film:
  """Determines when the frames of these packets are shown; `announced` is left at 0."""
  # AVI has no presentation times; its frames follow each other as the decoding times do.
  by_decoding = container.format.name == _AVI
  timed = []
  for packet in packets:
    stamp = packet.dts if by_decoding else packet.pts
    if stamp is not None:
      timed.append((stamp, packet.duration))
  # Second fields may have no time of their own; where more packets have none, only their order is
  # known.
  mostly_untimed = 2 * len(timed) < len(packets) or not stream.time_base
  if mostly_untimed or _clock_jumps(container, stream, packets):
    # The average is the demuxer's, which is 25 for every raw stream; the guess uses the codec's.
    rate = float(stream.guessed_rate or stream.average_rate or np.nan)
    times = np.arange(len(packets), dtype=float)
    return _Film(times, end=len(times), zero=0, tick=1 / rate, counted=True, announced=0)
  # By time alone: of equal times the order of the packets stays.
  timed.sort(key=lambda stamp_and_duration: stamp_and_duration[0])
  times = np.array([stamp for stamp, _ in timed], float)
  # Frames of .mp4 files that end before time 0 are hidden.
  if container.format.name == _MP4:
    times = times[max(np.searchsorted(times, 0, side="right") - 1, 0) :]
  _, length = timed[-1]
  if not length and len(times) > 1:
    length = times[-1] - times[-2]
  zero = 0 if container.format.name in (_MP4, _MATROSKA) else times[0]
  return _Film(
    times,
    end=times[-1] + length,
    zero=zero,
    tick=float(stream.time_base),
    counted=by_decoding,
    announced=0,
  )


def _clock_jumps(container, stream, packets: Sequence[_Packet]) -> bool:
  """Returns whether the packets' times are not of one clock.

  So it is in a raw stream, or in pieces of films one after the other.
  """
  from av.format import Flags

  if container.format.flags & Flags.no_timestamps.value:
    return True
  if not container.format.flags & Flags.ts_discont.value:
    return False
  ticks = np.diff([packet.dts for packet in packets if packet.dts is not None])
  steps = ticks * float(stream.time_base)
  return bool(((steps < 0) | (steps > _SPLICE)).any())


class _Shown(NamedTuple):
  """Decoded frames of segments.

  Attributes:
    pixels: `[H, W, 3]` by the number of the frame; none where decoding ends before the segments
      begin.
    firsts: the number of a segment's first frame, by start.
    times: in ticks, of all frames.
    intact: how many frames were decoded without a fault.
    interlaced: whether the last frame consists of two fields.
  """

  pixels: dict[int, np.ndarray]
  firsts: dict[int, int]
  times: list[float]
  intact: int
  interlaced: bool


def _choose_starts(
  film: _Film, segments: int, *, length: int, rng: np.random.Generator | None
) -> np.ndarray:
  """Returns `[T]` starts of segments, each an index of `film.times`."""
  # A time is off by up to a tick if ticks are short; with ticks as long as a frame it is exact up
  # to floating point.
  rounding = min(1.0, _ROUNDING / film.tick) if film.tick > 0 else _ROUNDING
  return timed_starts(film.times, film.end, segments, length=length, rng=rng, rounding=rounding)


def _decode_segments(
  path: Path, film: _Film, starts: np.ndarray, *, length: int, size: tuple[int, int]
) -> _Shown:
  """Decodes the whole film and keeps the frames of segments that begin at the starts."""
  from av.video.reformatter import VideoReformatter

  # Starts of segments that have not come yet.
  waiting = collections.deque(np.unique(starts))
  # One reformatter for all frames is six times as fast as each frame's own.
  resize = VideoReformatter().reformat
  pixels, firsts, times, intact = {}, {}, [], 0
  until, previous = 0, None
  with _open(path) as container:
    for number, (time, frame) in enumerate(_timed_frames(container, film)):
      # A frame is shown until the next one comes; only then are the segments known that begin with
      # it.
      while waiting and film.times[waiting[0]] < time:
        firsts[waiting[0]] = max(number - 1, 0)
        until = firsts[waiting.popleft()] + length
      if previous is not None and number - 1 < until:
        pixels[number - 1] = _upright(resize, previous, size)
      if frame is not None:
        times.append(time)
        intact += not frame.is_corrupt
        previous = frame
  # Frames decoded before the first segment are no answer.
  if not times or times[-1] < film.times[starts.min()]:
    pixels = {}
  interlaced = previous is not None and previous.interlaced_frame
  return _Shown(pixels, firsts, times, intact=intact, interlaced=interlaced)


def _is_by_fields(film: _Film, shown: _Shown) -> bool:
  """Returns whether two packets make a frame, one for each field, as in films of some cameras."""
  firsts = film.times[::2]
  whole = len(np.intersect1d(shown.times, firsts)) >= _WHOLE * len(firsts)
  return shown.interlaced and whole and len(shown.times) < _WHOLE * len(film.times)


def _timed_frames(container, film: _Film) -> Iterator[tuple[float, Any]]:
  """Yields decoded frames in the order in which they are shown, with the tick of each.

  The last item is None, at infinity.
  """
  number, latest = 0, film.times[0]
  for frame in _decode(container):
    if film.counted:
      latest = film.times[min(number, len(film.times) - 1)]
    elif frame.pts is not None and frame.pts < film.times[0]:
      continue
    elif frame.pts is not None:
      # A damaged time must not lead back.
      latest = max(latest, frame.pts)
    number += 1
    yield latest, frame
  yield np.inf, None


def _decode(container) -> Iterator[Any]:
  """Yields frames in order of display; damaged packets are skipped."""
  from av.error import FFmpegError

  for packet in container.demux(_video_stream(container)):
    try:
      yield from packet.decode()
    # Each decoder has its own error for what it cannot decode.
    except FFmpegError:
      continue


def _upright(resize: Callable, frame, size: tuple[int, int]) -> np.ndarray:
  """Resizes a frame and turns it as its display matrix says: by quarter turns, mirrored or not."""
  height, width = size
  matrix = _display_matrix(frame)
  transposed = abs(matrix[0, 1]) + abs(matrix[1, 0]) > abs(matrix[0, 0]) + abs(matrix[1, 1])
  if transposed:
    height, width = width, height
  # Resized before it is turned, to the sides that the stored frame needs.
  pixels = resize(frame, width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
  if transposed:
    pixels, matrix = pixels.swapaxes(0, 1), matrix[::-1]
  step_down = -1 if matrix[1, 1] < 0 else 1
  step_right = -1 if matrix[0, 0] < 0 else 1
  return pixels[::step_down, ::step_right]


def _display_matrix(frame) -> np.ndarray:
  """Returns the `[2, 2]` matrix that takes (x, y) of the stored picture to the shown one.

  It multiplies from the left; y points down.
  """
  from av.sidedata.sidedata import Type

  try:
    stored = frame.side_data.get(Type.DISPLAYMATRIX)
  # PyAV 18 raises where a frame has other side data that it has no name for.
  except ValueError:
    turn = np.deg2rad(-frame.rotation)
    return np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
  if stored is None:
    return np.eye(2)
  return np.frombuffer(stored, np.int32).reshape(3, 3)[:2, :2].astype(float)
