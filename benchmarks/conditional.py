"""Time that skipping saves against the fraction of open MACs: a row for each case and fraction.

A ratio is the baseline's median over the program's. All programs are timed in turns; each turn
begins with a call that is not timed, since it finds the caches as the previous program left them.
The baseline is the faster of the network that computes everything and multiplies by its gates, and
of the network without gates. `narrow` is a block of the open channels alone, without gates: the
best that the same convolutions allow. `auto` is compiled for images that open half of the MACs, and
also run with everything open. The number of open gates is set exactly: for a whole network by the
biases of their logits, for a single example by a number in its channels, which the gate network
reads.

    python benchmarks/conditional.py [--case=NAME ...] [--repeats=60]
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.inference import costs, exits, folded
from gating_jax.inference.conditional import compile_conditional, make_program, ungated
from gating_jax.inference.folded import Block, Conv, FoldedNet, Group, Head, Layer
from gating_jax.inference.folding import fold
from gating_jax.inference.strategies import why_not
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import resnet
from gating_jax.timing import race

SHARES = (1.0, 0.5, 0.25)
# Units of the gate networks, and examples that can have gates of their own.
HIDDEN = 16
# Largest fraction of the dense time with everything open.
AT_MOST = 1.05
RNG = np.random.default_rng(0)


def normal(*shape):
  """Draws an array whose scale keeps a layer's variance."""
  return jnp.asarray(RNG.normal(0, (2 / max(1, np.prod(shape[:-1]))) ** 0.5, shape), jnp.float32)


def conv(inputs, outputs):
  """Draws a 3 x 3 convolution."""
  return Conv(normal(3, 3, inputs, outputs), 0.1 * normal(outputs))


def open_sets(count, share, sets):
  """Returns `[sets, count]` with this fraction of ones in each row, or in each of few columns."""
  if count * share < 1:
    return open_sets(sets, share, count).T
  opened = round(share * count)
  return np.stack([np.isin(np.arange(count), RNG.permutation(count)[:opened]) for _ in range(sets)])


def same_for_all(head, share):
  """Returns the gate network with this fraction of each group's gates open for every input."""
  logits = (
    np.concatenate([open_sets(group.gates, share, 1)[0] for group in head.groups]) * 20.0 - 10.0
  )
  return dataclasses.replace(
    head, logits=jnp.zeros_like(head.logits), logits_bias=jnp.asarray(logits, jnp.float32)
  )


def by_example(channels, group, opened):
  """Returns a gate network that opens row i of `opened` for images of set i.

  Its i-th hidden unit is on for these images; see `images`.
  """
  hidden = jnp.eye(channels, HIDDEN)
  return Head(
    hidden,
    jnp.full(HIDDEN, -5.0),
    jnp.asarray(opened * 20.0 - 10.0, jnp.float32),
    jnp.zeros(group.gates),
    (group,),
  )


def images(batch, size, channels):
  """Draws images; the i-th channel of set i stands out, which opens its gates."""
  x = RNG.normal(0, 1, (batch, size, size, channels)).astype(np.float32)
  for i in range(batch):
    x[i, :, :, i % HIDDEN] += 10
  return x


def block(share, *, batch, size, channels, per_gate=1):
  """Returns one gated block, and images."""
  group = Group(channels // per_gate, per_gate)
  opened = open_sets(group.gates, share, min(batch, HIDDEN))
  head = by_example(channels, group, np.resize(opened, (HIDDEN, group.gates)))
  net = FoldedNet(
    (Block((conv(channels, channels), conv(channels, channels)), head),), pooled=False
  )
  return net, images(batch, size, channels)


def narrow(share, channels):
  """Returns the block with this fraction of the hidden channels, without gates."""
  hidden = round(share * channels)
  return FoldedNet((Block((conv(channels, hidden), conv(hidden, channels))),), pooled=False)


def whole(share, *, width, batch=1):
  """Returns a whole gated ResNet20, and images."""
  model = resnet("resnet20", 10, gating="channel", width=width, gate=GateSettings(hidden=HIDDEN))
  net = fold(model, model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
  parts = [
    part if part.head is None else dataclasses.replace(part, head=same_for_all(part.head, share))
    for part in net.parts
  ]
  return dataclasses.replace(net, parts=tuple(parts)), RNG.normal(0, 1, (batch, 32, 32, 3)).astype(
    np.float32
  )


def layers(share, *, batch, size, channels):
  """Returns four blocks with a gate each.

  A single example opens a fraction of the blocks; of a batch, each block is open for a fraction.
  """
  group, parts = Group(1), []
  for i in range(4):
    if batch == 1:
      opened = np.full((HIDDEN, 1), i < round(4 * share))
    else:
      opened = np.resize(open_sets(batch, share, 1), HIDDEN)[:, None]
    parts.append(
      Block(
        (conv(channels, channels), conv(channels, channels)),
        Head(
          jnp.zeros((channels, HIDDEN)),
          jnp.ones(HIDDEN),
          jnp.zeros((HIDDEN, 1)),
          jnp.full(1, 10.0 if opened[0, 0] else -10.0),
          (group,),
        )
        if batch == 1
        else by_example(channels, group, opened),
        layer_gate=True,
      )
    )
  return FoldedNet(tuple(parts[: 4 if batch == 1 else 1]), pooled=False), images(
    batch, size, channels
  )


def leaving(share, *, batch, size, channels):
  """Returns eight blocks, and an exit after the first at which enough images leave for `share`."""
  blocks = [Block((conv(channels, channels), conv(channels, channels))) for _ in range(8)]
  stages = (
    FoldedNet((blocks[0],), pooled=False),
    FoldedNet(tuple(blocks[1:]), (normal(channels, 10), normal(10))),
  )
  net = folded.ExitNet(
    stages, (FoldedNet((Layer(conv(channels, 16)),), (normal(16, 10), normal(10))),), 0.5
  )
  x = images(batch, size, channels)
  stay = np.sort(np.asarray(exits.run_exits(net, jnp.asarray(x))[1][:, 0]))
  goes_on = round(batch * (share * 8 - 1) / 7)
  between = (
    stay[0] - 1 if goes_on == batch else stay[batch - goes_on - 1 : batch - goes_on + 1].mean()
  )
  return dataclasses.replace(net, threshold=float(1 / (1 + np.exp(-between)))), x


@dataclasses.dataclass(frozen=True)
class Case:
  """A case to measure.

  Attributes:
    make: returns a network and images, given a fraction.
    limits: least ratios at 50 % and 25 %.
    channels: of a block, which is also timed with its open channels alone.
  """

  make: object
  strategy: str
  limits: tuple[float, float]
  channels: int | None = None


def _cases():
  found = {}
  for channels, size in ((64, 32), (64, 16), (128, 16), (256, 8)):
    make = functools.partial(block, batch=1, size=size, channels=channels)
    found[f"block N=1 C={channels} {size}x{size}"] = Case(make, "switch", (1.55, 2.3), channels)
  found["resnet20 width 4 N=1"] = Case(functools.partial(whole, width=4), "switch", (1.7, 2.8))
  for batch, channels, size, per_gate in (
    (8, 128, 16, 32),
    (8, 128, 16, 64),
    (16, 128, 16, 64),
    (64, 128, 16, 64),
    (8, 256, 8, 128),
    (64, 256, 8, 128),
    (16, 256, 16, 128),
  ):
    make = functools.partial(block, batch=batch, size=size, channels=channels, per_gate=per_gate)
    found[f"{per_gate} a gate N={batch} C={channels} {size}x{size}"] = Case(
      make, "block_dispatch", (1.6, 2.6)
    )
  for batch, channels, size in ((8, 64, 32), (8, 128, 16), (8, 256, 8), (64, 64, 16)):
    make = functools.partial(block, batch=batch, size=size, channels=channels)
    found[f"native N={batch} C={channels} {size}x{size}"] = Case(make, "native", (1.55, 3.0))
  found["native resnet20 N=1"] = Case(functools.partial(whole, width=1), "native", (1.35, 1.6))
  for channels, size in ((64, 32), (128, 16)):
    make = functools.partial(layers, batch=1, size=size, channels=channels)
    found[f"layers N=1 C={channels} {size}x{size}"] = Case(make, "layer_dispatch", (1.75, 3.4))
    make = functools.partial(layers, batch=16, size=size, channels=channels)
    found[f"compaction N=16 C={channels} {size}x{size}"] = Case(make, "layer_dispatch", (1.75, 3.4))
    make = functools.partial(leaving, batch=64, size=size, channels=channels)
    found[f"early exit N=64 C={channels} {size}x{size}"] = Case(
      make, exits.EXIT_DISPATCH, (1.75, 3.4)
    )
  return found


CASES = _cases()


def best_dense(times):
  """Returns the shorter time of the programs that compute everything."""
  return min(times["masked"], times["ungated"])


def measure(case, share, repeats):
  """Returns a row's numbers: fraction of MACs, and each program's milliseconds.

  The times are medians and tenth percentiles.
  """
  net, x = case.make(share)
  usual, calibration = case.make(0.5)
  # The threshold is part of the program, so the same network must get images that all stay.
  if share == 1 and isinstance(net, folded.ExitNet):
    stay = exits.run_exits(usual, jnp.asarray(calibration))[1][:, 0]
    net, x = usual, np.repeat(calibration[[int(jnp.argmax(stay))]], len(x), axis=0)
  x, shape, dense_run = jnp.asarray(x), x.shape[1:], make_program()
  if isinstance(net, folded.ExitNet):
    run, dense = exits.make_program(), exits.without_exits(net)
    spent = costs.exit_macs(net, shape, run(net, x)[1])
    compiled = exits.compile_exits
  else:
    run, dense = dense_run, ungated(net)
    spent = costs.macs(net, shape, [np.asarray(z) > 0 for z in run(net, x)[1]])
    compiled = compile_conditional
  make = functools.partial(compiled, net, input_shape=shape, batch_size=len(x))
  programs = {case.strategy: make(strategy=case.strategy)}
  macs = float(np.mean(spent)) / costs.macs(dense, shape)
  if share == 1:
    programs["auto"] = compiled(
      usual, input_shape=shape, batch_size=len(x), calibration=calibration
    )
    programs["auto"].load(net)
  expected = run(net, x)[0]
  for name, made in programs.items():
    error = float(jnp.abs(made(x)[0] - expected).max() / jnp.abs(expected).max())
    if not error < 1e-4:
      raise SystemExit(f"{name} is wrong: relative error {error}")
  contenders = {
    "masked": lambda: run(net, x),
    "ungated": lambda: dense_run(dense, x),
    **{name: functools.partial(made, x) for name, made in programs.items()},
  }
  if case.channels:
    contenders["narrow"] = functools.partial(dense_run, narrow(share, case.channels), x)
  times = race(contenders, repeats, settle=True)
  return macs, *(
    {name: 1e3 * float(np.percentile(found, q)) for name, found in times.items()} for q in (50, 10)
  )


def main():
  """Prints the rows of the chosen cases."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--case", action="append", default=[], help="part of a case's name; all cases without it"
  )
  parser.add_argument("--repeats", type=int, default=60)
  args = parser.parse_args()
  print(
    "| case | MACs | masked ms | ungated ms | narrow ms | program | its ms | ratio | at least "
    "| ratio of 10th percentiles |"
  )
  print("|---" * 10 + "|")
  for name, case in CASES.items():
    if args.case and not any(part in name for part in args.case):
      continue
    if reason := why_not(case.strategy):
      print(f"| {name} | skipped: {reason} |", flush=True)
      continue
    for share in SHARES:
      macs, times, quiet = measure(case, share, args.repeats)
      for program_name in ("auto", case.strategy) if share == 1 else (case.strategy,):
        limit = {
          1.0: 1 / AT_MOST if program_name == "auto" else None,
          0.5: case.limits[0],
          0.25: case.limits[1],
        }[share]
        spent, alone = times[program_name], f"{times['narrow']:.3f}" if case.channels else ""
        print(
          f"| {name} | {macs:.1%} | {times['masked']:.3f} | {times['ungated']:.3f} "
          f"| {alone} | {program_name} | {spent:.3f} "
          f"| {best_dense(times) / spent:.2f} | {f'{limit:.2f}' if limit else ''} "
          f"| {best_dense(quiet) / quiet[program_name]:.2f} |",
          flush=True,
        )


if __name__ == "__main__":
  main()
