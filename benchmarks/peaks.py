"""What accelerators can do at most, by their makers' data sheets, without sparsity; not measured."""

from typing import NamedTuple

import jax


class Peaks(NamedTuple):
  """Multiply-accumulates a second of matrix units in bfloat16, and in float32 at JAX's default precision, which is TF32
  on GPUs and bfloat16 on TPUs; bytes a second from memory."""

  bfloat16: float
  float32: float
  memory: float

  def seconds(self, dtype, macs, moved):
    """The roofline: the longer of computing so much and of moving so many bytes, each at its peak."""
    return max(macs / getattr(self, dtype), moved / self.memory)


_BY_KIND = {  # the first that the device's kind contains; half of the FLOP/s of data sheets
  "H200": Peaks(494.5e12, 247e12, 4.8e12),
  "H100 PCIe": Peaks(378e12, 189e12, 2.0e12),
  "H100": Peaks(494.5e12, 247e12, 3.35e12),
  "A100": Peaks(156e12, 78e12, 2.04e12),
  "TPU v6": Peaks(459e12, 459e12, 1.64e12),
  "TPU v5 lite": Peaks(98.5e12, 98.5e12, 0.82e12),
  "TPU v5": Peaks(229.5e12, 229.5e12, 2.77e12),
  "TPU v4": Peaks(137.5e12, 137.5e12, 1.2e12),
}
REFERENCE = "H100"  # whose roofline is shown where the device's is not known


def peaks(kind=None):
  """`(name, Peaks)` of a kind of device, by default this machine's; `(None, None)` if it is not in the table."""
  kind = kind or jax.devices()[0].device_kind
  return next(((name, found) for name, found in _BY_KIND.items() if name in kind), (None, None))
