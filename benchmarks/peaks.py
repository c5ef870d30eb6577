"""Peak performance of accelerators by their makers' data sheets, without sparsity; not measured."""

from typing import NamedTuple

import jax


class Peaks(NamedTuple):
  """Peaks of a device.

  Attributes:
    bfloat16: multiply-accumulates per second of the matrix units.
    float32: the same at JAX's default precision, which is TF32 on GPUs and bfloat16 on TPUs.
    memory: bytes per second.
  """

  bfloat16: float
  float32: float
  memory: float

  def seconds(self, dtype, macs, moved):
    """Returns the roofline: the longer of the times for computing and for moving bytes, at peak."""
    return max(macs / getattr(self, dtype), moved / self.memory)


# The first key that the device's kind contains; MACs are half of the FLOP/s of data sheets.
_BY_KIND = {
  "H200": Peaks(494.5e12, 247e12, 4.8e12),
  "H100 PCIe": Peaks(378e12, 189e12, 2.0e12),
  "H100": Peaks(494.5e12, 247e12, 3.35e12),
  "A100": Peaks(156e12, 78e12, 2.04e12),
  "TPU v6": Peaks(459e12, 459e12, 1.64e12),
  "TPU v5 lite": Peaks(98.5e12, 98.5e12, 0.82e12),
  "TPU v5": Peaks(229.5e12, 229.5e12, 2.77e12),
  "TPU v4": Peaks(137.5e12, 137.5e12, 1.2e12),
}
# Its roofline is shown where the device's is unknown.
REFERENCE = "H100"


def peaks(kind=None):
  """Returns `(name, Peaks)` of a kind of device, by default this machine's.

  It is `(None, None)` if the kind is not in the table.
  """
  kind = kind or jax.devices()[0].device_kind
  return next(((name, found) for name, found in _BY_KIND.items() if name in kind), (None, None))
