"""A trained gated network against the ungated one, also in PyTorch and in onnxruntime.

    python benchmarks/trained.py --gated=RUN --ungated=RUN [--batch=1,64] [--repeats=20]
        [--data_dir=DIR]

Prints accuracy, MACs and milliseconds. The runs are directories of `--mode=train`. Every program is
timed on the same test images, in turns in one process, on as many threads as there are cores. A row
has medians, tenth percentiles, and the speed-up over XLA's ungated network.

PyTorch and onnxruntime (`pip install torch onnx onnxruntime`) are skipped where they are not
installed; both get the ungated network with its BatchNorm folded, as ours is. With
`OMP_WAIT_POLICY=PASSIVE` PyTorch is slower at one image and faster at 64. Each program's accuracy
is its own, over the whole test set.
"""

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax import runner
from gating_jax.images.build import build
from gating_jax.images.classification import Classification
from gating_jax.inference import costs
from gating_jax.inference.analysing import observe
from gating_jax.inference.conditional import compile_conditional, make_program
from gating_jax.inference.folded import Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.strategies import why_not
from gating_jax.timing import race
from gating_jax.training import rundir, settings

try:
  import torch
except ImportError:
  torch = None
try:
  import onnx  # noqa: F401  # PyTorch's export needs it
  import onnxruntime
except ImportError:
  onnxruntime = None

BATCHES_TIMED = 8
CALIBRATION = 256
THREADS = len(os.sched_getaffinity(0))


def main():
  """Prints the tables of accuracy and times."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gated", type=Path, required=True)
  parser.add_argument("--ungated", type=Path, required=True)
  parser.add_argument("--batch", default="1,64")
  parser.add_argument("--repeats", type=int, default=20, help=f"of each of {BATCHES_TIMED} batches")
  parser.add_argument("--data_dir", help="TFDS folder, where it is not that of the runs")
  args = parser.parse_args()
  (gated, experiment), (ungated, other) = (
    load(path, args.data_dir) for path in (args.gated, args.ungated)
  )
  for name, value in experiment.config.data.items():
    if value != other.config.data[name]:
      sys.exit(
        f"both runs must have the same data.{name}; got {value!r} and {other.config.data[name]!r}"
      )
  images, labels = read(experiment, experiment.test, np.arange(len(experiment.test)))
  train = experiment.open_train()
  calibration, _ = read(experiment, train, np.linspace(0, len(train) - 1, CALIBRATION).astype(int))
  spent = {"gated": macs(gated, images), "ungated": macs(ungated, images)}
  print("| N | net | program | accuracy | MACs | ms | ms, tenth percentile | times faster |")
  print("|---" * 8 + "|")
  for size in map(int, args.batch.split(",")):
    contenders = programs(gated, ungated, size, calibration)
    starts = np.linspace(0, len(images) - size, BATCHES_TIMED).astype(int)
    times = {name: [] for name in contenders}
    for start in starts:
      found = race(
        {name: bind(images[start : start + size]) for name, bind in contenders.items()},
        args.repeats,
        settle=True,
      )
      for name, seconds in found.items():
        times[name] += seconds
    baseline = np.median(times["ungated", "XLA"])
    for (net, name), bind in contenders.items():
      median, quiet = (np.percentile(times[net, name], q) for q in (50, 10))
      print(
        f"| {size} | {net} | {name} | {accuracy(bind, images, labels, size):.2%} "
        f"| {spent[net]:,.0f} "
        f"| {1e3 * median:.3f} | {1e3 * quiet:.3f} | {baseline / median:.2f} |",
        flush=True,
      )


def load(path, data_dir):
  """Returns the folded network of a run's newest checkpoint, and its experiment."""
  run_dir = rundir.RunDir(path)
  config = settings.config_of(path).unlock()
  if data_dir is not None:
    config.data.data_dir = data_dir
  experiment = build(config)
  programme = Classification(experiment)
  _, state = runner.newest(programme, run_dir)
  return fold(experiment.model, programme.variables(state)), experiment


def read(experiment, source, index):
  """Returns network inputs and labels."""
  pixels, labels = source.read(index)
  return np.asarray(experiment.normalise(pixels), np.float32), np.asarray(labels)


def programs(gated, ungated, size, calibration):
  """Returns, by `(net, program)`, functions that bind `[size, H, W, D]` images.

  Each gives a function without arguments that returns the images' logits.
  """
  run, shape = make_program(), calibration.shape[1:]
  make = functools.partial(compile_conditional, input_shape=shape, batch_size=size)
  auto = make(gated, calibration=calibration)
  ours = {
    ("ungated", "XLA"): functools.partial(run, ungated),
    ("gated", "masked"): functools.partial(run, gated),
    ("gated", f"auto ({', '.join(sorted(set(auto.strategies)))})"): auto,
  }
  if size == 1:
    ours["gated", "switch"] = make(gated, strategy="switch")
  if not why_not("native"):
    ours |= {
      (name, "native"): make(net, strategy="native")
      for name, net in (("gated", gated), ("ungated", ungated))
    }

  def bind(made, x):
    """Returns a function without arguments that runs a network on these images."""
    x = jnp.asarray(x)
    return lambda: made(x)[0]

  found = {key: functools.partial(bind, made) for key, made in ours.items()}
  return found if torch is None else found | elsewhere(ungated, shape)


def elsewhere(net, shape):
  """Returns the ungated network in PyTorch, with channels first and last, and in onnxruntime."""
  torch.set_num_threads(THREADS)
  before, after = torch.contiguous_format, torch.channels_last
  nets = {
    layout: jax.tree.map(functools.partial(to_torch, layout=layout), net)
    for layout in (before, after)
  }
  found = {
    ("ungated", f"PyTorch, {name}"): functools.partial(in_torch, nets[layout], layout)
    for name, layout in (("NCHW", before), ("NHWC", after))
  }
  if onnxruntime is None:
    return found
  with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
    torch.onnx.export(
      Module(nets[before]),
      (torch.zeros(1, shape[2], *shape[:2]),),
      file.name,
      input_names=["x"],
      dynamic_axes={"x": {0: "n"}},
      dynamo=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Otherwise its threads keep spinning and slow down the next program.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])

  def in_onnxruntime(x):
    """Binds images to the network in onnxruntime."""
    x = channels_first(x)
    return lambda: session.run(None, {"x": x})[0]

  return found | {("ungated", "onnxruntime"): in_onnxruntime}


def in_torch(net, layout, x):
  """Binds images to a network in PyTorch."""
  x = torch.from_numpy(channels_first(x)).to(memory_format=layout)
  return torch.inference_mode()(lambda: forward(net, x).numpy())


def channels_first(x):
  """Moves the channels of `[N, H, W, D]` to the front."""
  return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def to_torch(array, layout):
  """Converts an array to a tensor; kernels get PyTorch's order of axes."""
  if array.ndim != 4:
    return torch.from_numpy(np.array(array))
  return torch.from_numpy(np.ascontiguousarray(np.transpose(array, (3, 2, 0, 1)))).to(
    memory_format=layout
  )


def forward(net, x):
  """Runs a folded network of such arrays, without gates, on `[N, D, H, W]`."""
  for part in net.parts:
    if isinstance(part, Layer):
      x = torch.relu(conv(part.conv, x))
      x = x if part.pool is None else torch.nn.functional.max_pool2d(x, *part.pool)
      continue
    y = x
    for i, each in enumerate(part.convs):
      y = conv(each, torch.relu(y) if i else y)
    if part.project is not None:
      x = conv(part.project, x)
    elif part.pad != (1, 0, 0):
      stride, before, after = part.pad
      x = torch.nn.functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, after))
    x = torch.relu(y + x)
  kernel, bias = net.classifier
  return x.mean((2, 3)) @ kernel + bias


def conv(conv, x):
  """Applies a convolution of a folded network to `[N, D, H, W]`."""
  assert conv.dilation == 1
  return torch.nn.functional.conv2d(
    x, conv.kernel, conv.bias, conv.stride, [n // 2 for n in conv.kernel.shape[2:]]
  )


class Module(torch.nn.Module if torch else object):
  """`forward` of a network."""

  def __init__(self, net):
    super().__init__()
    self.net = net

  def forward(self, x):
    """Runs the network on `[N, D, H, W]`."""
    return forward(self.net, x)


def accuracy(bind, images, labels, size):
  """Returns the accuracy over all images; the last batch overlaps the one before, to be full."""
  right = np.zeros(len(images), bool)
  for start in [*range(0, len(images) - size, size), len(images) - size]:
    at = slice(start, start + size)
    right[at] = np.argmax(bind(images[at])(), axis=1) == labels[at]
  return right.mean()


def macs(net, images):
  """Returns the mean executed MACs per image."""
  return np.concatenate(
    [
      np.broadcast_to(costs.macs(net, x.shape[1:], [z > 0 for z in logits]), len(x))
      for x, _, logits in observe(net, images)
    ]
  ).mean()


if __name__ == "__main__":
  main()
