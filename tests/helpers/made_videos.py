"""Small real video files whose frames show their number, and damaged ones."""

import struct
from fractions import Fraction

import av
import numpy as np

STEP = 8  # of brightness from frame to frame, well above what the codec loses
_TICK = Fraction(1, 1000)  # seconds, in which an encoder is given times
_PIXELS = {"libx264": "yuv444p", "mjpeg": "yuvj420p", "png": "rgb24"}
_NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def brightness(frame):
  """Returns the brightness of a frame that `write` was called for: 16, 24, 32, ..."""
  return 16 + STEP * frame


def write(
  path,
  frames,
  *,
  size=(32, 48),
  rate=10,
  codec="libx264",
  audio=False,
  options=None,
  times=None,
  encoder=None,
  pixels=None,
  paint=None,
):
  """Writes a video whose frame `i` is filled with `brightness(i)`, or is `paint(i)`.

  Args:
    path, frames, size, rate, codec: of the video.
    audio: adds a silent sound track.
    options, encoder: of the container and of the codec.
    times: when each frame is shown, in seconds; None for a constant rate.
    pixels: their format; None for one that suits the codec.
    paint: an array `[H, W, 3]` from the number of a frame.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w", container_options=options or {}) as container:
    if audio:
      sound = container.add_stream("aac", rate=8000)
    stream = container.add_stream(codec, rate=rate, options=encoder or {})
    stream.height, stream.width = size
    stream.pix_fmt = pixels or _PIXELS.get(codec, "yuv420p")
    stream.gop_size = 5
    # AVI and MPEG files only have places for frames.
    tick = Fraction(1, rate) if path.suffix in (".avi", ".mpg") else _TICK
    if times is not None:
      stream.codec_context.time_base = tick
    for i in range(frames):
      image = np.full((*size, 3), brightness(i), np.uint8) if paint is None else paint(i)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      if times is not None:
        frame.pts, frame.time_base = round(times[i] / tick), tick
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if audio:
      _write_silence(container, sound)
  return path


def write_sound(path):
  """Writes a file without any video stream."""
  return write_tracks(path, ["sound"])


def write_tracks(path, tracks):
  """Writes a file with tracks: `sound`, a `cover` picture of brightness 200, or a `film`.

  A film has 6 frames of the brightness of `write`; each further film is 100 brighter.
  """
  with av.open(str(path), "w") as container:
    streams = [_add_track(container, track) for track in tracks]
    films = 0
    for track, stream in zip(tracks, streams, strict=True):
      if track == "sound":
        _write_silence(container, stream)
        continue
      levels = [200] if track == "cover" else [brightness(i) + 100 * films for i in range(6)]
      films += track == "film"
      for level in levels:
        image = np.full((32, 48, 3), level, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
      container.mux(stream.encode())
  return path


def _add_track(container, track):
  if track == "sound":
    return container.add_stream("aac", rate=8000)
  stream = container.add_stream("png" if track == "cover" else "libx264", rate=10)
  stream.height, stream.width, stream.pix_fmt = 32, 48, "rgb24" if track == "cover" else "yuv444p"
  if track == "cover":
    stream.disposition = av.stream.Disposition.attached_pic
  return stream


def _write_silence(container, sound):
  silence = av.AudioFrame.from_ndarray(
    np.zeros((1, 4000), np.float32), format="fltp", layout="mono"
  )
  silence.sample_rate = 8000
  container.mux(sound.encode(silence))
  container.mux(sound.encode())


def shown(pixels):
  """Returns the frame numbers `[...]` that a `[..., H, W, 3]` array shows.

  Also returns how far any of its pixels is from their brightness.
  """
  mean = pixels.mean(axis=(-3, -2, -1))
  frames = np.round((mean - brightness(0)) / STEP).astype(int)
  return frames, np.abs(pixels - brightness(frames)[..., None, None, None]).max()


def copy_packets(source, target, first=0, *, options=None, keep=lambda packet: True):
  """Copies the packets of a video of 10 frames per second without decoding them.

  Frame `first` is then at time 0.
  """
  with (
    av.open(str(source)) as whole,
    av.open(str(target), "w", container_options=options or {}) as part,
  ):
    stream = whole.streams.video[0]
    copy = part.add_stream_from_template(stream)
    shift = round(first / 10 / stream.time_base)
    for packet in list(whole.demux(stream)):
      if packet.size and keep(packet):
        packet.stream = copy
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        part.mux(packet)
  return target


def set_edits(path, edits):
  """Gives an .mp4 file of 10 frames per second another edit list.

  It has pairs of a duration and a first frame; None as first frame shows nothing.
  """
  with av.open(str(path)) as container:
    ticks = 1 / (10 * container.streams.video[0].time_base)
  entries = [
    (frames * 100, -1 if first is None else int(first * ticks), 1, 0) for frames, first in edits
  ]
  body = struct.pack(">II", 0, len(entries)) + b"".join(
    struct.pack(">IiHH", *entry) for entry in entries
  )
  path.write_bytes(_replaced(path.read_bytes(), b"edts", _box(b"elst", body)))
  return path


def set_display_matrix(path, matrix):
  """Gives an .mp4 file another display matrix `[2, 2]` in the header of its track."""
  data = bytearray(path.read_bytes())
  place = data.index(b"tkhd") + 44
  (a, b), (c, d) = np.multiply(matrix, 1 << 16).astype(int).tolist()
  data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
  path.write_bytes(data)
  return path


def boxes(data):
  """Returns the boxes of an .mp4 file, damaged or not, or of a box: pairs of name and whole box."""
  found = []
  while data:
    length = max(int.from_bytes(data[:4], "big"), 8)
    found.append((data[4:8], data[:length]))
    data = data[length:]
  return found


def _replaced(data, name, body):
  """Returns the data of boxes, where each box of this name, at any depth, has another body."""
  parts = []
  for found, box in boxes(data):
    if found == name:
      box = _box(name, body)
    elif found in _NESTED:
      box = _box(found, _replaced(box[8:], name, body))
    parts.append(box)
  return b"".join(parts)


def _box(name, body):
  return struct.pack(">I4s", 8 + len(body), name) + body


def write_packets(path, codec, packets, size):
  """Writes a file of ready packets: tuples of data, time in milliseconds, and key frame or not."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=10)
    stream.height, stream.width = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    for data, time, key in packets:
      packet = av.Packet(data)
      packet.time_base, packet.pts, packet.dts = _TICK, time, time
      packet.stream, packet.is_keyframe = stream, key
      container.mux(packet)
  return path


def write_fields(path, frames):
  """Writes H.264 whose frames are two fields with a packet each, as some cameras do.

  It has 32 x 32 pixels and is uncompressed.
  """
  parameters = _unit(
    0x67, [(8, 77), (8, 0), (8, 30), 0, 0, 2, 1, (1, 0), 1, 0, (4, 0b0010), (1, 0)]
  )
  parameters += _unit(0x68, [0, 0, (2, 0), 0, 0, 0, (3, 0), 0, 0, 0, (3, 0)])
  packets = []
  for i in range(frames):
    luma = round(16 + brightness(i) * 219 / 255)
    macroblock = [25, None, *[(8, luma)] * 256, *[(8, 128)] * 128]
    top = [0, 2, 0, (4, 0), (1, 1), (1, 0), i % 2, (2, 0), 0, *macroblock, *macroblock]
    bottom = [0, 2, 0, (4, 0), (1, 1), (1, 1), (1, 0), 0, *macroblock, *macroblock]
    packets += [
      (parameters + _unit(0x65, top), 100 * i, True),
      (_unit(0x61, bottom), 100 * i + 50, False),
    ]
  return write_packets(path, "libx264", packets, (32, 32))


def _unit(head, fields):
  """Makes a unit of H.264.

  It has numbers of so many bits, Exp-Golomb codes of those without, None up to the next whole byte.
  """
  bits = ""
  for field in fields:
    if field is None:
      bits += "0" * (-len(bits) % 8)
    elif isinstance(field, tuple):
      bits += format(field[1], f"0{field[0]}b")
    else:
      code = format(field + 1, "b")
      bits += "0" * (len(code) - 1) + code
  bits += "1"
  bits += "0" * (-len(bits) % 8)
  data = int(bits, 2).to_bytes(len(bits) // 8, "big")
  return b"\0\0\0\1" + bytes([head]) + data
