"""Mutated video files, compared with the frames of a plain decoder; also runs as its own process.

    python -m tests.helpers.mutated_videos FOLDER FIRST LAST

reads the mutants of seeds FIRST to LAST - 1. It dies if a mutant makes a decoder crash or takes
more than 10 seconds.
"""

import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from gating_jax.data.video_files import read_clips
from tests.helpers import made_videos

MOST_SECONDS, MOST_MEMORY = 10, 1 << 30  # of one file; of all, beyond what the process has before
_FRAMES = 20
_STRICT = {
  "err_detect": "bitstream+buffer+explode"
  # For a decoder that stops at faults which others ignore.
}
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
_WHOLE = {
  "plain.mp4": dict(audio=True, encoder={"bf": "2", "b-adapt": "0"}),
  "first.mp4": dict(options={"movflags": "faststart"}),
  "fragments.mp4": dict(options=_FRAGMENTS),
  "mpeg4.mov": dict(codec="mpeg4"),
  "variable.mkv": dict(times=np.cumsum(np.arange(_FRAMES) % 4 + 1) / 10),
  "vp9.webm": dict(codec="libvpx-vp9", encoder={"deadline": "realtime"}),
  "mpeg4.avi": dict(codec="mpeg4"),
  "pictures.avi": dict(codec="mjpeg"),
  "mpeg2.mpg": dict(codec="mpeg2video", rate=25, encoder={"bf": "2"}),
  "flash.flv": dict(),
}


class Played(NamedTuple):
  """All N frames that a plain decoder shows.

  Attributes:
    times: `[N]` in seconds, NaN where unknown.
    pixels: `[N, 192]`, those of an 8 x 8 frame sorted by value, so that rotation changes nothing.
  """

  times: np.ndarray
  pixels: np.ndarray


class Whole(NamedTuple):
  """A video before it is mutated: its data, and its frames by the reader and by a plain decoder.

  `chosen` `[T, F]` holds the positions of the clips' frames among those that are played.
  """

  data: bytes
  clips: np.ndarray
  middles: np.ndarray
  played: Played
  chosen: np.ndarray


def write_whole(folder):
  """Returns the videos to mutate, by name: every container, and its possible contents."""
  for name, settings in _WHOLE.items():
    made_videos.write(folder / name, _FRAMES, **settings)
  made_videos.set_display_matrix(
    made_videos.write(folder / "turned.mp4", _FRAMES), [[0, 1], [-1, 0]]
  )
  edited = made_videos.write(
    folder / "edited.mp4", _FRAMES, encoder={"bf": "0", "sc_threshold": "0"}
  )
  made_videos.set_edits(edited, [(9, 3), (5, 14)])
  return {path.name: _whole(path) for path in sorted(folder.iterdir())}


def _whole(path):
  clips, middles = _read(path)
  played = _play(path)
  difference = np.abs(_by_value(clips)[:, :, None] - played.pixels).max(axis=-1)
  assert np.all(difference.min(axis=-1) <= 1)
  return Whole(path.read_bytes(), clips, middles, played, difference.argmin(axis=-1))


def _read(path):
  return read_clips(path, 3, 2, (8, 8))


def _play(path, strict=False):
  """Returns the frames of a plain decoder; None where it finds a fault.

  The strict decoder ignores no fault that it finds. It keeps all frames, so that each has its own
  memory: pixels that a fault leaves undefined differ from those of a decoder that reuses the memory
  of earlier frames.
  """
  try:
    with av.open(str(path), metadata_errors="replace") as container:
      container.streams.video[0].codec_context.options = _STRICT if strict else {}
      frames = container.decode(video=0)
      pixels, times = [], []
      for frame in list(frames) if strict else frames:
        assert not frame.is_corrupt
        pixels.append(frame.to_ndarray(width=8, height=8, format="rgb24", interpolation="BILINEAR"))
        times.append(frame.time)
      return Played(np.array(times, float), _by_value(np.array(pixels)))
  except Exception:  # of any kind that PyAV may raise
    return None


def _by_value(pixels):
  """Flattens `[..., H, W, 3]` to `[..., 3 H W]`, sorted."""
  return np.sort(pixels.reshape(*pixels.shape[:-3], -1).astype(int), axis=-1)


def mutate(data, random):
  """Changes one or two bytes, which a player may tolerate, or makes one or two changes of any kind.

  Those are bytes or bits flipped, the end cut off, boxes or blocks swapped, deleted, repeated or
  zeroed.
  """
  if random.integers(2):
    return _with_bytes_flipped(data, random, of_headers=random.integers(2) == 0, most=2)
  for _ in range(random.integers(1, 3)):
    first, last = sorted(random.integers(len(data) + 1, size=2))
    kind = random.integers(7)
    if kind < 2:
      data = _with_bytes_flipped(data, random, of_headers=kind == 1, most=19)
    elif kind == 2:
      data = data[:last]
    elif kind == 3:
      data = _with_parts_swapped(data, random)
    elif kind == 4:
      data = data[:first] + data[last:]
    elif kind == 5:
      data = data[:last] + data[first:last] + data[last:]
    else:
      data = data[:first] + bytes(last - first) + data[last:]
  return data


def _with_bytes_flipped(data, random, of_headers, most):
  data = bytearray(data)
  width = min(1500, len(data)) if of_headers else len(data)
  start = random.choice([0, len(data) - width])  # headers stand at the beginning or at the end
  for place in start + random.integers(width, size=random.integers(1, most + 1)) if width else ():
    data[place] = random.choice(
      [0, 127, 255, data[place] ^ 1 << random.integers(8), random.integers(256)]
    )
  return bytes(data)


def _with_parts_swapped(data, random):
  parts = [box for _, box in made_videos.boxes(data) if box] if data[4:8] == b"ftyp" else []
  if len(parts) < 2:
    edges = np.sort(random.integers(len(data) + 1, size=4))
    parts = [data[start:stop] for start, stop in zip([0, *edges], [*edges, len(data)], strict=True)]
  one, other = random.choice(len(parts), 2, replace=False)
  parts[one], parts[other] = parts[other], parts[one]
  return b"".join(parts)


def check(seed, whole, folder):
  """Reads a mutant; raises unless it is read correctly or refused in one line.

  A mutant must be read if a plain decoder shows all its frames, intact and at their times; the
  frames read must be the same.
  """
  random = np.random.default_rng(seed)
  name = random.choice(list(whole))
  which = f"seed {seed}, {name}"
  path = folder / f"mutant{Path(name).suffix}"
  path.write_bytes(mutate(whole[name].data, random))
  began, refusal = time.monotonic(), None
  try:
    clips, middles = _read(path)
  except Exception as error:
    refusal = str(error)
  assert time.monotonic() - began < MOST_SECONDS, which
  played = _shown_whole(path, whole[name].played)
  if refusal is not None:
    assert len(refusal.splitlines()) == 1, f"{which}: {refusal}"
    assert played is None, (
      f"{which}: all frames are shown by a plain decoder, and refused: {refusal}"
    )
    return f"refused: {refusal}"
  assert (clips.shape, clips.dtype) == (whole[name].clips.shape, np.uint8), which
  assert np.all(np.diff(middles) >= 0) or np.isnan(middles).all(), f"{which}: {middles}"
  if played is None:
    return "read"
  np.testing.assert_allclose(
    _by_value(clips), played.pixels[whole[name].chosen], atol=1, err_msg=which
  )
  np.testing.assert_allclose(middles, whole[name].middles, atol=0.06, err_msg=which)
  return "read as it is played"


def _shown_whole(path, expected):
  """Returns a plain decoder's frames if they are as many as before, intact and at their times."""
  played, strictly = _play(path), _play(path, strict=True)
  if played is None or strictly is None or played.times.shape != expected.times.shape:
    return None
  same_pixels = np.array_equal(played.pixels, strictly.pixels)
  return (
    played if same_pixels and np.allclose(played.times, expected.times, rtol=0, atol=1e-3) else None
  )


def main(folder, first, last):
  signal.alarm(30)
  whole = write_whole(folder / "whole")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(first, last):
    print(seed, end=" ", flush=True)
    signal.alarm(MOST_SECONDS)
    print(check(seed, whole, folder), flush=True)
  grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
  assert grown < MOST_MEMORY, f"{grown} bytes"


if __name__ == "__main__":
  main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
