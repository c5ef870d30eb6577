"""Small folded networks, one for each kind of gates, and the strategies that run them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gating_jax.inference.analysing import NetCounter, observe
from gating_jax.inference.folded import Block, Conv, FoldedNet, Glance, Group, Head, Layer

SHAPE = (5, 4, 3)
FEATURES = 6


def normal(rng, *shape, scale=1.0):
  """Makes weights that keep the size of their input, times `scale`."""
  values = rng.normal(0, 1 / np.sqrt(max(1, np.prod(shape[:-1]))), shape)
  return jnp.asarray(scale * values, jnp.float32)


def conv(rng, inputs, outputs, window=3, stride=1):
  return Conv(normal(rng, window, window, inputs, outputs), normal(rng, outputs, scale=0.3), stride)


def head(rng, inputs, *groups):
  """Makes gates of which any number may be open for an image."""
  total = sum(group.gates for group in groups)
  return Head(
    normal(rng, inputs, 8, scale=3),
    normal(rng, 8),
    normal(rng, 8, total, scale=3),
    normal(rng, total),
    groups,
  )


def basic(rng, group, stride=1):
  return Block(
    (conv(rng, FEATURES, group.width, stride=stride), conv(rng, group.width, FEATURES)),
    head(rng, FEATURES, group),
    pad=(stride, 0, 0),
  )


def gated_output(rng, group, stride=1):
  """Makes a block with gates of its output, which the next block reads in both branches."""
  block = basic(rng, group, stride)
  return dataclasses.replace(
    block,
    head=head(rng, FEATURES, group, Group(FEATURES)),
    output_gate=True,
    project=conv(rng, FEATURES, FEATURES, 1, stride),
  )


def weighted(part, shift=0.5):
  """Gives the open units of a part weights, as after a shift of the threshold."""
  return dataclasses.replace(part, head=dataclasses.replace(part.head, shift=jnp.float32(shift)))


def glancing(rng, part):
  """Lets the gates of a part read a glance at the image, before the features."""
  hidden = jnp.concatenate([normal(rng, 8, part.head.hidden.shape[1]), part.head.hidden])
  head = dataclasses.replace(part.head, hidden=hidden, context=("glance", "pooled"))
  return dataclasses.replace(part, head=head)


def net(kind, seed=0):
  """Makes a small network of one kind of gates; 34 channels make three capacities of `switch`."""
  rng = np.random.default_rng(seed)
  stem = Layer(conv(rng, 3, FEATURES))
  parts = {
    "channels": lambda: [stem, basic(rng, Group(34)), basic(rng, Group(20), stride=2)],
    "always": lambda: [stem, basic(rng, Group(30, always=4)), basic(rng, Group(3, 5, always=2))],
    "blocks": lambda: [stem, basic(rng, Group(3, 8)), basic(rng, Group(4, 2), stride=2)],
    "layers": lambda: [
      stem,
      *(
        dataclasses.replace(
          basic(rng, Group(5)), head=head(rng, FEATURES, Group(1)), layer_gate=True
        )
        for _ in range(3)
      ),
    ],
    # The first part, whose input may be below 0, and one whose shortcut may.
    "first layers": lambda: [
      Block((conv(rng, 3, 5), conv(rng, 5, 3)), head(rng, 3, Group(1)), layer_gate=True),
      Block(
        (conv(rng, 3, 5), conv(rng, 5, FEATURES)),
        head(rng, 3, Group(1)),
        conv(rng, 3, FEATURES, 1),
        layer_gate=True,
      ),
    ],
    # As `prune` leaves a block whose units never open, and `fold` one whose gate is always closed.
    "dead branches": lambda: [
      stem,
      Block((conv(rng, FEATURES, 0), conv(rng, 0, FEATURES))),
      Block(()),
      basic(rng, Group(34)),
    ],
    "bottleneck": lambda: [
      stem,
      Block(
        (conv(rng, FEATURES, 34, 1), conv(rng, 34, 18, stride=2), conv(rng, 18, 9, 1)),
        head(rng, FEATURES, Group(34), Group(9, 2)),
        conv(rng, FEATURES, 9, 1, 2),
      ),
    ],
    "outputs": lambda: [
      stem,
      gated_output(rng, Group(34)),
      gated_output(rng, Group(20), stride=2),
      gated_output(rng, Group(3, 8)),
    ],
    "chain": lambda: [
      Layer(conv(rng, 3, 34), head(rng, 3, Group(34)), (2, 2, 0)),
      Layer(conv(rng, 34, 20), head(rng, 34, Group(10, 2))),
      Layer(conv(rng, 20, FEATURES)),
    ],
    "weighted channels": lambda: [
      stem,
      weighted(glancing(rng, basic(rng, Group(34)))),
      weighted(glancing(rng, basic(rng, Group(20), stride=2)), -0.5),
    ],
    "weighted blocks": lambda: [
      stem,
      weighted(basic(rng, Group(3, 8))),
      weighted(basic(rng, Group(4, 2), stride=2)),
    ],
    "weighted always": lambda: [stem, weighted(basic(rng, Group(4, 5, always=2)))],
    "weighted layers": lambda: [
      stem,
      *(
        weighted(
          dataclasses.replace(
            basic(rng, Group(5)), head=head(rng, FEATURES, Group(1)), layer_gate=True
          )
        )
        for _ in range(3)
      ),
    ],
    "weighted bottleneck": lambda: [
      stem,
      weighted(
        Block(
          (conv(rng, FEATURES, 34, 1), conv(rng, 34, 18, stride=2), conv(rng, 18, 9, 1)),
          head(rng, FEATURES, Group(34), Group(9, 2)),
          conv(rng, FEATURES, 9, 1, 2),
        )
      ),
    ],
    "weighted outputs": lambda: [
      stem,
      weighted(gated_output(rng, Group(34))),
      weighted(gated_output(rng, Group(3, 8))),
    ],
    "weighted chain": lambda: [
      weighted(Layer(conv(rng, 3, 34), head(rng, 3, Group(34)), (2, 2, 0))),
      weighted(Layer(conv(rng, 34, 20), head(rng, 34, Group(10, 2)))),
      Layer(conv(rng, 20, FEATURES)),
    ],
  }[kind]()
  outputs = (
    parts[-1].conv.bias.size if isinstance(parts[-1], Layer) else parts[-1].convs[-1].bias.size
  )
  classifier = (normal(rng, outputs, 4), normal(rng, 4))
  reads = any(part.head is not None and "glance" in part.head.context for part in parts)
  glance = Glance(conv(rng, 3, 8, stride=2)) if reads else None
  return FoldedNet(tuple(parts), classifier, glance=glance)


KINDS = {
  "channels": ("switch", "cluster", "native"),
  "always": ("switch", "block_dispatch", "cluster", "native"),
  "blocks": ("switch", "block_dispatch", "cluster", "native", "pallas"),
  "layers": ("layer_dispatch", "native"),
  "first layers": ("layer_dispatch", "native"),
  "dead branches": ("switch", "cluster", "native"),
  "bottleneck": ("switch", "cluster", "native"),
  "outputs": ("switch", "block_dispatch", "cluster", "native", "pallas"),
  "chain": ("switch", "native"),
  "weighted channels": ("switch", "cluster", "native"),
  "weighted always": ("switch", "block_dispatch", "cluster", "native"),
  "weighted blocks": ("switch", "block_dispatch", "cluster", "native", "pallas"),
  "weighted layers": ("layer_dispatch", "native"),
  "weighted bottleneck": ("switch", "cluster", "native"),
  "weighted outputs": ("switch", "block_dispatch", "cluster", "native", "pallas"),
  "weighted chain": ("switch", "native"),
}


def images(count, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(0, 1, (count, *SHAPE)) + rng.normal(0, 2, (count, 1, 1, 3))).astype(np.float32)


def count_gates(net, images):
  """Returns the `GroupStatistics` of every group on images."""
  counter = NetCounter(net)
  for x, _, logits in observe(net, images):
    counter.add(logits, len(x))
  return counter.result()


def forced(net, biases):
  """Returns the net with `biases`, one array per head, added to its gates' logits."""
  parts, left = [], list(biases)
  for part in net.parts:
    if part.head is not None:
      head = dataclasses.replace(
        part.head, logits_bias=part.head.logits_bias + jnp.float32(left.pop(0))
      )
      part = dataclasses.replace(part, head=head)
    parts.append(part)
  return dataclasses.replace(net, parts=tuple(parts))


def heads_of(net):
  return [part.head for part in net.parts if part.head is not None]
