"""The contents of a run directory as TensorBoard reads them."""

import struct

from gating_jax.training.journal import TENSORBOARD_DIR


def events(folder):
  """Returns `(tag, value, step)` of every scalar point, and `(step,)` of every purge.

  They are in the order of files and points.
  """
  from tensorboardX.proto.event_pb2 import SessionLog

  found = []
  for event in _events(folder):
    found += [
      (value.tag, value.simple_value, event.step)
      for value in event.summary.value
      if value.WhichOneof("value") == "simple_value"
    ]
    if event.session_log.status == SessionLog.SessionStatus.Value("START"):
      found.append((event.step,))
  return found


def summaries(folder):
  """Returns `(step, value)` of every point, also of histograms and images, in the same order."""
  return [(event.step, value) for event in _events(folder) for value in event.summary.value]


def _events(folder):
  from tensorboardX.proto.event_pb2 import Event

  for file in sorted((folder / TENSORBOARD_DIR).iterdir(), key=lambda f: f.stat().st_mtime_ns):
    data, at = file.read_bytes(), 0
    while at < len(data):  # TFRecord: length, its checksum, bytes, their checksum
      (length,) = struct.unpack_from("<Q", data, at)
      yield Event.FromString(data[at + 12 : at + 12 + length])
      at += 16 + length
