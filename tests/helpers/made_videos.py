"""Small real video files whose frames tell their number, and damaged ones."""

import av
import numpy as np

STEP = 8  # of brightness from frame to frame, well above what the codec loses


def brightness(frame):
  """How bright a frame is on which `write` was called: 16, 24, 32, ..."""
  return 16 + STEP * frame


def write(path, frames, *, size=(32, 48), rate=10, codec="libx264", audio=False, options=None):
  """A video whose frame `i` is all of `brightness(i)`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w", container_options=options or {}) as container:
    if audio:
      sound = container.add_stream("aac", rate=8000)
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = size
    stream.pix_fmt = {"libx264": "yuv444p", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    stream.gop_size = 5
    for i in range(frames):
      image = np.full((*size, 3), brightness(i), np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())
    if audio:
      _write_silence(container, sound)
  return path


def write_sound(path):
  """A file without any video stream."""
  with av.open(str(path), "w") as container:
    sound = container.add_stream("aac", rate=8000)
    _write_silence(container, sound)
  return path


def _write_silence(container, sound):
  silence = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
  silence.sample_rate = 8000
  container.mux(sound.encode(silence))
  container.mux(sound.encode())


def shown(pixels):
  """Which frames `[...]` a `[..., H, W, 3]` array holds, and how far any of its pixels is from their brightness."""
  mean = pixels.mean(axis=(-3, -2, -1))
  frames = np.round((mean - brightness(0)) / STEP).astype(int)
  return frames, np.abs(pixels - brightness(frames)[..., None, None, None]).max()
