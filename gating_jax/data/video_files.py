"""Segments of one video: which frames they are, decoded with PyAV, or rows of an array of features.

Axes: T segments, F frames each, H and W pixels. What cannot be read raises; `data/videos.py` turns that into weight 0.

Reference: Hussein et al., 2020 (segments of 8 frames, spread uniformly over the video).
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg")
FEATURE_SUFFIXES = (".npy", ".npz")
# Of files that hold all that they show: no playlist, no text that names other files, no pattern of file names.
_CONTAINERS = "asf,avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegvideo,mpegts,ogg"
_PROBED = 16  # readable files that settle the shape of features
_WHOLE = 0.9  # of the frames that a file says it holds: fewer decoded, and it is damaged


def segment_starts(frames: int, segments: int, length: int, rng: np.random.Generator | None = None) -> np.ndarray:
  """First frames of segments spread uniformly over a video; they overlap where it is short.

      start_i = floor(i (frames - length) / (segments - 1)),   or, with a generator, a random frame of the i-th of
      `segments` equal parts of all possible starts

  A single segment lies in the middle; a video shorter than `length` has all of them at 0.

  Args:
    frames: of the video, at least 1.
    segments: T.
    length: F, frames of a segment.
    rng: draws the starts; None for the fixed ones.
  Returns:
    `[T]` integers.

  >>> segment_starts(30, 4, 8).tolist()
  [0, 7, 14, 22]
  """
  last = max(frames - length, 0)
  if rng is not None:
    return np.floor((np.arange(segments) + rng.random(segments)) * ((last + 1) / segments)).astype(int).clip(max=last)
  return np.arange(segments) * last // (segments - 1) if segments > 1 else np.array([last // 2])


def require_av() -> None:
  """Raises, with what to do, unless PyAV is installed."""
  try:
    import av  # noqa: F401
  except ImportError as error:
    raise ValueError(f"reading videos needs PyAV: pip install 'gating-jax[video]' ({error})") from error


def read_clips(
    path: Path, segments: int, length: int, size: tuple[int, int], rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a video's segments, each frame resized bilinearly; the last frame is repeated where the video is short.

  Args:
    path: of a file with a video stream; other streams are passed over.
    segments, length, rng: as in `segment_starts`.
    size: `(H, W)`.
  Returns:
    `[T, F, H, W, 3]` uint8 RGB, and `[T]` the segments' middles in seconds (NaN without a frame rate).
  Raises:
    ValueError: no video stream, no frame of it or of the segments, or fewer than 9/10 of what the file announces.
    Exception: whatever else a damaged file, or one that refers to others, makes PyAV raise, OSError and MemoryError
      among them.
  """
  from av.video.reformatter import VideoReformatter

  with _open(path) as container:
    stream = _video_stream(container)
    rate = float(stream.average_rate or np.nan)
    count = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    promised = max(count, stream.frames)
  if not count:
    raise ValueError("holds no frame")
  starts = segment_starts(count, segments, length, rng)
  frames = starts[:, None] + np.arange(length)
  wanted, place = np.unique(frames, return_inverse=True)
  pixels = np.zeros((len(wanted), *size, 3), np.uint8)
  resize = VideoReformatter().reformat  # one for all frames: six times as quick as a frame's own
  decoded = filled = 0
  with _open(path) as container:
    for frame in _decode(container):
      if filled < len(wanted) and wanted[filled] == decoded:
        pixels[filled] = resize(frame, size[1], size[0], "rgb24", interpolation="BILINEAR").to_ndarray()
        filled += 1
      decoded += 1
  if decoded < _WHOLE * promised or not filled:
    raise ValueError(f"only {decoded} of {promised} frames can be decoded")
  pixels[filled:] = pixels[filled - 1]
  return pixels[place.reshape(frames.shape)], (starts + length / 2) / rate


def read_features(path: Path) -> np.ndarray:
  """Reads `[T, ...]` numbers as finite float32 from a `.npy` file, or a `.npz` file of one array; nothing is unpickled.

  Raises:
    ValueError: no such array.
    OSError: a file that cannot be read.
  """
  with open(path, "rb") as file:
    features = np.load(file, allow_pickle=False)
    if isinstance(features, np.lib.npyio.NpzFile):
      if len(features.files) != 1:
        raise ValueError(f"must hold one array; got {sorted(features.files)}")
      features = features[features.files[0]]
  if features.dtype.kind not in "fiu" or features.ndim < 2 or not features.size:
    raise ValueError(f"must hold real numbers [T, ...]; got {features.dtype} {features.shape}")
  with np.errstate(over="ignore"):
    features = features.astype(np.float32)
  if not np.isfinite(features).all():
    raise ValueError("holds NaN or infinite numbers")
  return features


def _open(path: Path):
  """That file and no other: a name is no address of FFmpeg's, and what the file says makes it open nothing."""
  import av

  try:
    return av.open(f"file:{os.path.abspath(path)}", container_options={
        "protocol_whitelist": "file", "format_whitelist": _CONTAINERS})
  except av.error.ArgumentError as error:  # what FFmpeg says of a format that is not in the list
    raise ValueError(f"must be of a container that holds all it shows, one of {_CONTAINERS}") from error


def _video_stream(container):
  stream = container.streams.best("video")
  if stream is None:
    raise ValueError("holds no video stream")
  return stream


def _decode(container):
  """Frames in order of display; damaged packets are passed over."""
  import av

  for packet in container.demux(_video_stream(container)):
    try:
      yield from packet.decode()
    except av.error.InvalidDataError:
      continue


def common_shape(files: Sequence[Path]) -> tuple[int, ...]:
  """The shape `[...]` that most of the first readable files have."""
  shapes, why = [], ""
  for file in files:
    try:
      shapes.append(read_features(file).shape[1:])
    except Exception as error:  # whatever a damaged file makes its reader raise
      why = why or f"{file}: {error}"
    if len(shapes) == _PROBED:
      break
  if not shapes:
    raise ValueError(f"the folder must hold features that can be read; {why}")
  return collections.Counter(shapes).most_common(1)[0][0]
