"""What TensorBoard would read of a run directory."""

import struct

from gating_jax.training.journal import TENSORBOARD_DIR


def events(folder):
  """`(tag, value, step)` of every scalar point, in the order of files and points, and `(step,)` of every purge."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  found = []
  for file in sorted((folder / TENSORBOARD_DIR).iterdir(), key=lambda f: f.stat().st_mtime_ns):
    data, at = file.read_bytes(), 0
    while at < len(data):  # TFRecord: length, its checksum, bytes, their checksum
      (length,) = struct.unpack_from("<Q", data, at)
      event = Event.FromString(data[at + 12 : at + 12 + length])
      at += 16 + length
      found += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
      if event.session_log.status == SessionLog.SessionStatus.Value("START"):
        found.append((event.step,))
  return found
