"""Native CPU kernel against XLA and onnxruntime: gated residual branches of two 3x3 convolutions.

    python benchmarks/native.py [--cases=1x16x32,8x64x16] [--shares=1,0.5,0.25] [--depth=3]
        [--quantile=0.5]

A case is examples x channels x pixels of a side, and x2 where the first branch halves the side, as
at the beginning of a network's stage. Every program is a stack of `--depth` branches with their
shortcuts, so that the host's cost of a call counts once. Every example has its own mask, with
exactly the given fraction of the hidden channels open; this is also the fraction of the MACs.

`dense` and `masked` are XLA's, without gates and with the hidden channels multiplied by them; a
speed-up is over the faster of the two. `ort` is onnxruntime, if it is installed
(`pip install onnxruntime onnx`): without gates, in its own layout, on as many threads as there are
cores. Times are quantiles over repeats of all contenders in turns in one process: 0.5 is the
median; use a low quantile on a machine that others use too.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.ops import native_kernels
from gating_jax.timing import race

try:
  import onnx
  import onnxruntime
except ImportError:
  onnxruntime = None

CASES = (
  "1x16x32,1x32x16,1x64x8,1x64x32,1x128x16,1x256x8,8x64x16,8x128x8,8x256x8,64x16x32,"
  "1x512x8,8x512x8,1x64x32x2,8x128x16x2"
)


def main():
  """Prints the lines of each case."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", default=CASES)
  parser.add_argument("--shares", default="1,0.5,0.25")
  parser.add_argument("--depth", type=int, default=3)
  parser.add_argument("--repeats", type=int, default=50)
  parser.add_argument("--quantile", type=float, default=0.5)
  args = parser.parse_args()
  if not native_kernels.available():
    sys.exit(f"no native kernel: {native_kernels.why_not()}")
  shares = [float(share) for share in args.shares.split(",")]
  print(
    f"{len(os.sched_getaffinity(0))} cores, jax {jax.__version__}, float32, {args.depth} "
    f"branches, microseconds of a branch, quantile {args.quantile} of {args.repeats} interleaved "
    "repeats"
  )
  print(
    f"{'case':>12}{'dense':>9}{'masked':>9}{'ort':>9}"
    + "".join(f"{f'at {share:g}':>9}{'':>7}" for share in shares)
    + f"{'native/ort':>12}"
  )
  for case in args.cases.split(","):
    compare(args, case, shares)


def compare(args, case, shares):
  """Prints a line."""
  examples, channels, pixels, *stride = map(int, case.split("x"))
  strides = [*(stride or [1]), *[1] * (args.depth - 1)]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(examples, pixels, pixels, channels)), jnp.float32)
  layers = [
    [
      (rng.normal(size=(3, 3, channels, channels)) / (9 * channels) ** 0.5).astype(np.float32),
      rng.normal(size=channels).astype(np.float32),
    ]
    for _ in range(2 * args.depth)
  ]
  order = np.argsort(rng.random((examples, channels)))
  gates = {share: jnp.asarray(order < round(share * channels), jnp.float32) for share in shares}
  dense, masked, sparse = (
    jax.jit(stack(layers, strides, branch)) for branch in (in_xla, in_xla_masked, native_branch)
  )
  np.testing.assert_allclose(
    masked(x, gates[shares[-1]]), sparse(x, gates[shares[-1]]), rtol=1e-3, atol=1e-3
  )
  runs = {
    "dense": lambda: dense(x, gates[shares[0]]),
    "masked": lambda: masked(x, gates[shares[0]]),
  }
  runs |= {share: lambda gates=gates[share]: sparse(x, gates) for share in shares}
  if onnxruntime:
    runs["ort"] = onnx_run(np.asarray(x), layers, strides)
    np.testing.assert_allclose(
      runs["ort"]().transpose(0, 2, 3, 1), dense(x, gates[shares[0]]), rtol=1e-3, atol=1e-3
    )
  times = {
    name: np.quantile(values, args.quantile) / args.depth * 1e6
    for name, values in race(runs, args.repeats, settle=True).items()
  }
  best = min(times["dense"], times["masked"])
  ort = times.get("ort", np.nan)
  print(
    f"{case:>12}{times['dense']:>9.0f}{times['masked']:>9.0f}{ort:>9.0f}"
    + "".join(f"{times[share]:>9.0f}{best / times[share]:>6.2f}x" for share in shares)
    + f"{times[shares[0]] / ort:>12.2f}",
    flush=True,
  )


def stack(layers, strides, branch):
  """Returns `(x, gates) -> y` of consecutive branches; a shortcut takes every stride-th pixel."""

  def run(x, gates):
    """Runs the branches one after the other."""
    for (kernel1, bias1), (kernel2, bias2), stride in zip(
      layers[::2], layers[1::2], strides, strict=True
    ):
      x = branch(x, kernel1, bias1, kernel2, bias2, gates, x[:, ::stride, ::stride], stride)
    return x

  return run


def native_branch(*arguments):
  """Runs a branch by the native kernels."""
  x, kernel1, bias1, kernel2, bias2, gates, shortcut, stride = arguments
  # Weights are constants of the program, so they are packed once, when it is compiled.
  kernels = [native_kernels.packed(kernel1), native_kernels.packed(kernel2)]
  return native_kernels.gated_chain(
    x, kernels, [bias1, bias2], [None, gates, None], shortcut, strides=(stride, 1)
  )


def in_xla_masked(x, kernel1, bias1, kernel2, bias2, gates, shortcut, stride):
  """Runs a branch in XLA, its hidden channels times the gates."""
  hidden = jax.nn.relu(conv(x, kernel1, stride) + bias1) * gates[:, None, None, :]
  return jax.nn.relu(conv(hidden, kernel2) + bias2 + shortcut)


def in_xla(x, kernel1, bias1, kernel2, bias2, gates, shortcut, stride):
  """Runs a branch in XLA without gates."""
  return jax.nn.relu(
    conv(jax.nn.relu(conv(x, kernel1, stride) + bias1), kernel2) + bias2 + shortcut
  )


def conv(x, kernel, stride=1):
  """Convolves `[N, H, W, C]` with a 3 x 3 kernel."""
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def onnx_run(x, layers, strides):
  """Returns `() -> y` of the stack in onnxruntime, with channels first, its own layout."""
  h = onnx.helper
  nodes, weights = [], []
  for i, (kernel, bias) in enumerate(layers):
    stride = strides[i // 2]
    weights += [
      onnx.numpy_helper.from_array(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)), f"k{i}"),
      onnx.numpy_helper.from_array(bias, f"b{i}"),
    ]
    nodes.append(
      h.make_node(
        "Conv",
        [f"x{i}", f"k{i}", f"b{i}"],
        [f"c{i}"],
        kernel_shape=[3, 3],
        pads=[1] * 4,
        strides=[1 if i % 2 else stride] * 2,
      )
    )
    if i % 2:
      shortcut = f"x{i - 1}"
      if stride > 1:
        nodes.append(
          h.make_node("MaxPool", [shortcut], [f"p{i}"], kernel_shape=[1, 1], strides=[stride] * 2)
        )
        shortcut = f"p{i}"
      nodes.append(h.make_node("Add", [f"c{i}", shortcut], [f"s{i}"]))
    nodes.append(h.make_node("Relu", [f"{'s' if i % 2 else 'c'}{i}"], [f"x{i + 1}"]))
  x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
  first = h.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, x.shape)
  last = h.make_tensor_value_info(f"x{len(layers)}", onnx.TensorProto.FLOAT, None)
  graph = h.make_graph(nodes, "stack", [first], [last], weights)
  model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  # Otherwise its threads keep spinning and slow down the next contender.
  options.add_session_config_entry("session.force_spinning_stop", "1")
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )
  return lambda: session.run(None, {"x0": x})[0]


if __name__ == "__main__":
  main()
