"""Gates for any Flax Linen model, without changes to it.

A pair names two layers: the *writer* makes channels, and the *reader* takes them, perhaps after
normalisation, activation and pooling. A gate looks at the writer's input x and switches the
channels that the reader sees:

    g = gate(x) in {0, 1}^C,   reader(g * h(writer(x)))

A closed channel need neither be made by the writer nor be read by the reader. A dense layer that
reads a flattened map has each channel once for each pixel, and its gate switches all of them. There
`init` checks that the channels are in their places. Calls of layers are intercepted, so that the
model's own code runs unchanged.

Axes: N examples, C channels of a pair.
Reference: Bejnordi et al., 2020, section 3 (the gate); Flax's `nn.intercept_methods`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.core import tracers

from gating_jax.checks import few, is_tracer, near, shown
from gating_jax.layers.gate import (
  GATE_NAME,
  ChannelGate,
  GatedChannels,
  GateSettings,
  apply_gates,
  check_gate_settings,
  decisions,
)
from gating_jax.layers.mac_trace import kernel_shape
from gating_jax.ops import arguments
from gating_jax.ops.macs import ConvMacs, channel_macs, conv_macs, shared_among
from gating_jax.types import Apply, Array, GateRecord, Path, Records

if TYPE_CHECKING:
  from flax.linen.module import InterceptorContext

# Layers with a kernel, whose last axis is that of the channels.
LAYERS = (nn.Conv, nn.Dense)
# Names under which models take their mode, and whether True there means training.
_MODES = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "use_running_average": False,
}


class GatedModel(nn.Module):
  """A Flax Linen model with gates between pairs of its layers.

      gated = GatedModel(model, (("block1/conv1", "block1/conv2"),))
      variables = gated.init(key, x)
      y, records = gated.apply(variables, x)
      (y, records), new = gated.apply(
        variables, x, train=True, mutable=["batch_stats"], rngs={"gate": key}
      )

  Parameters have the names that they have in the model; those of a gate are in its writer, under
  `gate`. So `variables` hold those of the model, and trained ones can take their place. With all
  gates open the outputs are those of the model, bit for bit; without pairs it is the model.

  Gates have BatchNorm: training needs the collection `batch_stats`, also where the model has none.
  Transformations go around the gated model, as in `jax.checkpoint(gated.apply)` or
  `nn.remat(GatedModel, static_argnums=(2,))`, called as `(x, train)`: gates could
  not leave an `nn.remat`, `nn.scan` or the like inside of the model.

  Attributes:
    model: the model, called as `model(x)` or, where it has such an argument, `model(x,
      train=...)`; also `training`, `is_training`, `deterministic` and `use_running_average`.
    pairs: of writers and readers, each an `nn.Conv` or `nn.Dense` with a path such as
      `"block1/conv1"`. A layer is the writer of one pair at most, and the reader of one at most.
    gate: settings of the gates.
    axis_name: mapped device axis of the batch.

  Called with the model's own word for its mode, as in `gated.apply(variables, x, training=True)`,
  gates are in the same mode.

  Raises:
    TypeError, ValueError: pairs that are no pairs of paths of layers, or that do not fit: the
      layers are not called once each, the writer first; the reader's last axis is not the writer's
      channels, nor those of a flattened map, which `find_pairs` must propose, as `init` checks; the
      message names the pair; or modes that contradict each other, or are traced.

  >>> import jax
  >>> class Net(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(2, name="last")(nn.relu(nn.Dense(8, name="first")(x)))
  >>> gated = GatedModel(Net(), (("first", "last"),))
  >>> (y, records), _ = gated.init_with_output(jax.random.key(0), jnp.ones((5, 3)))
  >>> y.shape, records[0].gates.shape, records[0].macs_per_unit
  ((5, 2), (5, 8), 5)
  """

  if TYPE_CHECKING:
    apply: ClassVar[Apply[Any]]

  model: nn.Module
  pairs: tuple[tuple[str, str], ...]
  gate: GateSettings = GateSettings()
  axis_name: str | None = None

  def setup(self):
    """Gives the model's parameters the names that they have without gates."""
    nn.share_scope(self, self.model)

  def __call__(self, x: Any, train: bool = False, **kwargs: Any) -> tuple[Any, Records]:
    """Applies the model to x; `kwargs` are further arguments of it."""
    check_gate_settings("gate", self.gate)
    train = _read_mode(self.model, train, kwargs)
    gates = _Pass(check_pairs(self.pairs), self.gate, self.axis_name, train=train)
    gates.trace, gates.depth = tracers.current_trace(), len(self.path)
    with nn.intercept_methods(gates.intercept):
      y = self.model(x, **{**mode_of(self.model, train), **kwargs})
    records = gates.records()
    if gates.flattened and self.is_initializing():
      self._check_flattened(gates.flattened, x, {**kwargs, **mode_of(self.model, train=False)})
    return y, decisions(records, self.gate)

  def _check_flattened(
    self, pairs: Sequence[tuple[str, str]], x: Any, kwargs: Mapping[str, Any]
  ) -> None:
    """Raises a ValueError unless each reader finds its writer's channels once for each pixel.

    Shapes alone do not show it: a map may be flattened in another order, or joined with others.
    """
    # That module imports this one.
    from gating_jax.layers.pair_search import find_pairs

    found = find_pairs(self.model.unbind()[0], x, **kwargs)
    for writer, reader in pairs:
      if (writer, reader) not in found.pairs:
        others = few([other for first, other in found.pairs if first == writer], 5)
        reason = found.refused.get(writer, f"its channels are read by {others}")
        raise ValueError(
          f"pairs must be of layers with the same channels: {reader!r} does not read a map of "
          f"{writer!r}, flattened with the channels last, alone: of {writer}, find_pairs says that "
          f"{reason}"
        )


class Pairs(NamedTuple):
  """Pairs of layers, by either of the two.

  Attributes:
    readers: the reader of each writer.
    writers: the writer of each reader.
  """

  readers: Mapping[str, str]
  writers: Mapping[str, str]


def check_pairs(pairs: Sequence[tuple[str, str]]) -> Pairs:
  """Returns pairs by their layers.

  Raises:
    TypeError: no sequence of pairs of texts.
    ValueError: a layer writes, or reads, for two pairs; or for itself.
  """
  readers: dict[str, str] = {}
  writers: dict[str, str] = {}
  rule = 'pairs of paths, such as (("block1/conv1", "block1/conv2"),)'
  for pair in arguments.items("pairs", pairs, rule):
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
      raise TypeError(f"pairs must be {rule}; got {shown(pair)}")
    for path in pair:
      arguments.instance("each path of pairs", path, str, rule='a text, such as "block1/conv1"')
    writer, reader = pair
    if writer in readers or reader in writers or writer == reader:
      raise ValueError(
        "pairs must have every layer as a writer once at most, and as a reader once at most; got "
        f"{writer!r}, {reader!r}"
      )
    readers[writer], writers[reader] = reader, writer
  return Pairs(readers, writers)


def holds_channels(read: Sequence[int], made: Sequence[int]) -> bool:
  """Returns whether what a reader reads can hold, along its last axis, a writer's channels.

  Args:
    read: shape of what the reader reads.
    made: shape of what the writer makes, `[N, ..., C]`.

  >>> holds_channels((2, 4, 4, 6), made=(2, 8, 8, 6))
  True
  >>> holds_channels((2, 4 * 4 * 6), made=(2, 8, 8, 6))  # a flattened map
  True
  >>> holds_channels((2, 8, 8, 12), made=(2, 8, 8, 6))
  False
  """
  if read[-1] == made[-1]:
    return True
  return len(read) < len(made) and made[-1] > 0 and read[-1] % made[-1] == 0


def mode_of(model: nn.Module, train: bool) -> dict[str, bool]:
  """Returns the argument by which a model knows whether it is trained; none where it has none."""
  names = inspect.signature(type(model).__call__).parameters
  for name, means_training in _MODES.items():
    if name in names:
      return {name: train == means_training}
  return {}


def _read_mode(model: nn.Module, train: bool, given: Mapping[str, Any]) -> bool:
  """Returns whether gates are trained.

  Args:
    model: the model.
    train: as the gated model was called.
    given: further arguments of the model, among them perhaps its own word for the mode.
  Raises:
    TypeError: one of them is traced.
    ValueError: they contradict each other.
  """
  modes = {"train": True} if _as_bool("train", train) else {}
  own, names = mode_of(model, train), inspect.signature(type(model).__call__).parameters
  for name, means_training in _MODES.items():
    # A second word in the model's signature is a setting, such as dropout without training.
    if name in names and name not in own:
      continue
    # None stands for a mode that the model has elsewhere.
    if given.get(name) is not None:
      modes[name] = _as_bool(name, given[name]) == means_training
  if len({*modes.values()}) > 1:
    said = ", ".join(f"{name}={given.get(name, True)}" for name in modes)
    raise ValueError(f"arguments must say one mode, training or evaluation; got {said}")
  return any(modes.values())


def _as_bool(name: str, mode: Any) -> bool:
  """Returns a mode as a bool; raises a TypeError if JAX traces it."""
  if is_tracer(mode):
    raise TypeError(
      f"{name} must be True or False while JAX traces the model; got {shown(mode)}. In nn.remat "
      "give it by its place, and name that: nn.remat(GatedModel, static_argnums=(2,))"
    )
  return bool(mode)


class _Cost(NamedTuple):
  """The size of a layer that was called.

  Attributes:
    path: of the layer, in the parameter tree.
    inputs: its input channels; those of its writer where they are flattened with pixels.
    made: shape of what it makes.
    macs: its MACs per example.
    is_grouped: whether an output channel reads a part of the input channels only.
  """

  path: Path
  inputs: int
  made: tuple[int, ...]
  macs: int
  is_grouped: bool

  @property
  def outputs(self) -> int:
    """Returns the number of its output channels."""
    return self.made[-1]

  @property
  def as_writer(self) -> ConvMacs:
    """Returns the costs of its output channels."""
    # An output channel of a grouped layer reads its own group, whatever is open.
    inputs = None if self.is_grouped else self.inputs
    return shared_among(self.macs, inputs=inputs, outputs=self.outputs)

  @property
  def as_reader(self) -> ConvMacs:
    """Returns the costs of its input channels, where all of its output channels are made."""
    return shared_among(self.macs, inputs=self.inputs)


class _Pass:
  """A forward pass of a gated model: computes gates at writers and switches at readers.

  Attributes:
    trace: state of JAX's tracing outside of the model.
    depth: length of the gated model's own path.
  """

  trace: Any
  depth: int

  def __init__(self, pairs: Pairs, settings: GateSettings, axis_name: str | None, train: bool):
    self._pairs, self._settings = pairs, settings
    self._axis_name, self._train = axis_name, train
    # All layers that were called, in their order.
    self._seen: list[str] = []
    self._costs: dict[str, _Cost] = {}
    self._records: dict[str, GateRecord] = {}
    # Pairs whose reader reads more channels than its writer makes.
    self.flattened: list[tuple[str, str]] = []

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
  ) -> Any:
    """Calls a module's method, with gates before it where it is a layer of a pair."""
    module = context.module
    if not isinstance(module, LAYERS) or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    layer = "/".join(module.path[self.depth :])
    if layer not in self._pairs.readers and layer not in self._pairs.writers:
      # A gate's own layers are no layers of the model.
      if GATE_NAME not in module.path:
        self._seen.append(layer)
      return next_fun(*args, **kwargs)
    self._check_call(layer)
    x, *others = args or (kwargs.pop("inputs"),)
    # A layer between two pairs reads the first one's channels, and its gate sees them switched.
    inputs = jnp.shape(x)[-1]
    if layer in self._pairs.writers:
      x = self._switch(layer, x)
      inputs = self._costs[self._pairs.writers[layer]].outputs
    if layer in self._pairs.readers:
      group = GatedChannels(module.features, macs_per_channel=0)
      # Made while the layer runs, the gate is a part of it.
      gate = ChannelGate((group,), self._settings, self._axis_name, name=GATE_NAME)
      (self._records[layer],) = gate(x, self._train)
    y = next_fun(x, *others, **kwargs)
    # After the call the kernel exists.
    kernel = kernel_shape(module)
    self._costs[layer] = _Cost(
      path=module.path,
      inputs=inputs,
      made=y.shape,
      macs=conv_macs(kernel, y.shape),
      is_grouped=kernel[-2] != x.shape[-1],
    )
    return y

  def _check_call(self, layer: str) -> None:
    """Raises a ValueError if a layer of a pair is called again, or inside of a transformation."""
    if layer in self._seen:
      raise ValueError(
        f"pairs must name layers that are called once; {layer!r} is called more than once"
      )
    if tracers.current_trace() != self.trace:
      raise ValueError(
        f"pairs must name layers outside of Flax's transformations; {layer!r} is called inside one "
        "(nn.scan, nn.remat, nn.vmap, nn.jit), which gates cannot leave. Transform the gated model "
        "instead, or leave out the pair"
      )
    self._seen.append(layer)

  def _switch(self, reader: str, x: Array) -> Array:
    """Multiplies the input of a reader by the gates of its pair."""
    writer = self._pairs.writers[reader]
    record = self._records.get(writer)
    if record is None:
      raise ValueError(
        f"pairs must be (writer, reader); {reader!r} is called before {writer!r} of its pair"
      )
    examples, made = record.gates.shape[0], self._costs[writer].made
    if jnp.ndim(x) < 2 or x.shape[0] != examples or not holds_channels(x.shape, made):
      raise ValueError(
        f"pairs must be of layers with the same channels: {writer!r} makes {made[-1]} for each of "
        f"{examples} examples, {reader!r} reads an array of shape {jnp.shape(x)}"
      )
    if x.shape[-1] == made[-1]:
      return apply_gates(x, record.gates)
    self.flattened.append((writer, reader))
    # Of a flattened map, one axis for pixels and one for channels.
    maps = x.reshape((*x.shape[:-1], -1, made[-1]))
    return apply_gates(maps, record.gates).reshape(x.shape)

  def records(self) -> Records:
    """Returns the records of the pass, with their costs.

    A pair whose writer is the reader of another one follows it, as `macs_per_pair` asks.

    Raises:
      ValueError: a layer of a pair was not called.
    """
    for writer, reader in self._pairs.readers.items():
      for layer in (writer, reader):
        if layer not in self._costs:
          close = near(layer, self._seen)
          hint = f" Did you mean {close[0]!r}?" if close else ""
          raise ValueError(
            f"pairs must name Conv and Dense layers that the model calls, such as "
            f"{few(self._seen, 5) or 'none here'}; got {layer!r}.{hint}"
          )
    found = []
    for first in self._records:
      # The others are reached from the first writer of their chain.
      if first in self._pairs.writers:
        continue
      layer = first
      while layer in self._pairs.readers:
        found.append(self._with_costs(layer))
        layer = self._pairs.readers[layer]
    return tuple(found)

  def _with_costs(self, writer: str) -> GateRecord:
    """Returns the record of a pair with the MACs of its units, and its paths."""
    reader = self._pairs.readers[writer]
    made, read = self._costs[writer], self._costs[reader]
    follows = writer in self._pairs.writers
    cost = channel_macs(
      made.as_writer,
      # In a chain, the gates of the pair before switch the input.
      inputs=None if follows else made.inputs,
      # In a chain, the next pair has the costs of its writer. Else all output channels are made.
      read=None if reader in self._pairs.readers else read.as_reader,
    )
    cost = cost.of_gate(
      self._settings.channels_per_gate(made.outputs),
      self._settings.channels_per_gate(made.inputs) if cost.per_pair else 1,
    )
    return dataclasses.replace(
      self._records[writer],
      macs_per_unit=cost.alone,
      macs_per_pair=cost.per_pair,
      writers=(made.path,),
      readers=(read.path,),
    )
