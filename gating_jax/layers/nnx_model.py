"""Linen model of a Flax NNX model, with layers that can be seen from outside.

A call makes a copy of the NNX model with values from the variables, and runs its own code. Where
that calls an `nnx.Conv`, `nnx.Linear` or `nnx.BatchNorm`, the Linen layer of the same settings and
the same parameters runs in its place, which computes the same, bit for bit. To whatever intercepts
Linen's layers the model is therefore one of Linen.

Axes: those of the model.
Reference: Flax's `nnx.bridge.ToLinen`, which hides the layers.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import Scope, tracers
from flax.nnx.nn import dtypes
from flax.nnx.variablelib import variable_name_from_type
from jax import lax

from gating_jax.layers.gated_model import mode_of

# A place in an NNX model, such as ("blocks", 0, "conv").
_Place = tuple[Any, ...]
# The stream of Linen's keys from which the model's random numbers come in training.
_STREAM = "dropout"
# Linen's name of the number of channels that a layer makes, and NNX's.
_RENAMED = {"features": "out_features"}
# Types of a layer's variables, by name.
_VARIABLES = {
  "kernel": nnx.Param,
  "bias": nnx.Param,
  "scale": nnx.Param,
  "mean": nnx.BatchStat,
  "var": nnx.BatchStat,
}
# Settings with which an NNX layer computes what Linen's does.
_USUAL = {
  "promote_dtype": dtypes.promote_dtype,
  "preferred_element_type": None,
  "conv_general_dilated": lax.conv_general_dilated,
  "dot_general": lax.dot_general,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """An NNX model as it was given: its structure and its values.

  It is compared by identity, so that a Linen module with it can be hashed.
  """

  graph: Any
  state: Any


class FromNNX(nn.Module):
  """A Linen model that runs an NNX model; see `from_nnx`."""

  source: Source

  def __call__(self, x: Any, train: bool = False, **kwargs: Any) -> Any:
    """Applies the model to x; `kwargs` are further arguments of it."""
    scope = self.scope
    assert scope is not None  # Linen itself refuses a module without variables
    # A private copy: the model that was given keeps its values and its mode.
    model = nnx.merge(self.source.graph, self.source.state, copy=True)
    model.train() if train else model.eval()
    held = _Held(scope)
    streams, found, layers = [], [], {}
    nodes: list[tuple[_Place, Any]] = list(nnx.iter_graph(model))
    for place, node in nodes:
      if isinstance(node, nnx.RngStream):
        streams.append(node)
      elif type(node) in _LAYERS:
        found.append((place, node))
      elif isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState):
        held.fill(place, node)
    for place, layer in found:
      # Others run by their own code.
      if _is_usual(layer) and held.has_own(place, layer):
        layers[id(layer)] = _make_linen_layer(layer, _scope_of(scope, place))
        # nnx's own assignment would take the class for an attribute.
        object.__setattr__(layer, "__class__", _ROUTED[type(layer)])
    has_keys = train and self.has_rng(_STREAM)
    if has_keys:
      _reseed(streams, self.make_rng(_STREAM))
    before = [stream.count.get_value() for stream in streams]
    token = _routes.set(_Routes(layers, tracers.current_trace()))
    try:
      y = model(x, **{**mode_of(model, train), **kwargs})
    finally:
      _routes.reset(token)
    drawn = [s.count.get_value() is not b for s, b in zip(streams, before, strict=True)]
    if train and any(drawn) and not has_keys:
      raise ValueError(
        f"rngs must have a key {_STREAM!r} for the random numbers of the model in training"
      )
    held.write_back()
    return y


class _Held:
  """The variables of a model's copy, which stand for those of a Linen scope."""

  def __init__(self, scope: Scope):
    self._scope = scope
    # Each variable with Linen's, and the value that it had before the call.
    self._pairs: list[tuple[nnx.Variable, str, _Place, Any]] = []
    # The place whose value a variable has, the first of several, by the variable's identity.
    self._places: dict[int, _Place] = {}

  def fill(self, place: _Place, variable: nnx.Variable) -> None:
    """Gives a variable the value of the scope; on `init` the scope takes the variable's."""
    collection = variable_name_from_type(type(variable), allow_register=True)
    owner = _scope_of(self._scope, place[:-1])
    own = variable.get_value()
    value = owner.variable(collection, str(place[-1]), lambda: own).value
    variable.set_value(value)
    self._pairs.append((variable, collection, place, variable.get_value()))
    self._places[id(variable)] = place

  def has_own(self, place: _Place, layer: nnx.Module) -> bool:
    """Returns whether a layer's variables have the usual types and its own place.

    Linen's layer would not find others, such as a kernel that two layers share, and make new ones.
    """
    for name, kind in _VARIABLES.items():
      variable = getattr(layer, name, None)
      if variable is None:
        continue
      if type(variable) is not kind or self._places.get(id(variable)) != (*place, name):
        return False
    return True

  def write_back(self) -> None:
    """Puts values that the model has changed into the scope."""
    for variable, collection, place, before in self._pairs:
      value = variable.get_value()
      if value is before:
        continue
      # Linen, too, drops what is sown where nobody asks for it.
      if collection != "intermediates" or self._scope.is_mutable_collection(collection):
        owner = _scope_of(self._scope, place[:-1])
        owner.put_variable(collection, str(place[-1]), value)


def _scope_of(scope: Scope, place: _Place) -> Scope:
  """Returns the scope of a place in a model."""
  for name in place:
    scope = scope.push(str(name), reuse=True)
  # A fresh one, since a scope gives a name once.
  return scope if place else scope.rewound()


def _reseed(streams: list[nnx.RngStream], key: jax.Array) -> None:
  """Gives each of a model's random streams its own key."""
  for i, stream in enumerate(streams):
    stream.key.set_value(jax.random.fold_in(key, i))


def _is_usual(layer: nnx.Module) -> bool:
  """Returns whether a layer computes by the usual functions, which Linen's layer has, too."""
  return all(getattr(layer, name, usual) is usual for name, usual in _USUAL.items())


def _make_linen_layer(layer: nnx.Module, scope: Scope) -> nn.Module:
  """Returns Linen's layer with the settings of NNX's, and with the parameters of the scope."""
  kind, settings = _LAYERS[type(layer)], {}
  # Functions are the usual ones, and each call says the mode.
  other = ("parent", "name", "use_running_average", *_USUAL)
  for field in dataclasses.fields(kind):
    name = _RENAMED.get(field.name, field.name)
    # NNX's layers keep no initialisers, which existing parameters do not need.
    if field.name not in other and hasattr(layer, name):
      settings[field.name] = getattr(layer, name)
  return kind(**settings, parent=scope)


@dataclasses.dataclass(frozen=True)
class _Routes:
  """Where calls of layers go while a model runs.

  Attributes:
    layers: Linen's layer, by the identity of NNX's.
    trace: state of JAX's tracing outside of the model.
  """

  layers: Mapping[int, nn.Module]
  trace: Any


# None while no model runs.
_routes: contextvars.ContextVar[_Routes | None] = contextvars.ContextVar("routes", default=None)


def _find_route(layer: nnx.Module) -> nn.Module | None:
  """Returns the layer that runs in place of one; None inside of JAX's or NNX's transformations.

  These call copies of layers, or the layers themselves while variables of Linen are out of reach.
  """
  routes = _routes.get()
  if routes is None or routes.trace != tracers.current_trace():
    return None
  return routes.layers.get(id(layer))


class _RoutedConv(nnx.Conv):
  """A convolution that Linen computes."""

  def __call__(self, inputs: Any, *others: Any, **kwargs: Any) -> Any:
    """Convolves; further arguments are those of NNX alone."""
    linen = None if others or kwargs else _find_route(self)
    return super().__call__(inputs, *others, **kwargs) if linen is None else linen(inputs)


class _RoutedLinear(nnx.Linear):
  """A linear layer that Linen computes."""

  def __call__(self, inputs: Any, *others: Any, **kwargs: Any) -> Any:
    """Applies the layer; further arguments are those of NNX alone."""
    linen = None if others or kwargs else _find_route(self)
    return super().__call__(inputs, *others, **kwargs) if linen is None else linen(inputs)


class _RoutedBatchNorm(nnx.BatchNorm):
  """A BatchNorm that Linen computes."""

  def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    """Normalises, by the running averages where the call says so or else the layer."""
    linen = _find_route(self)
    if linen is None:
      return super().__call__(x, use_running_average, mask=mask)
    # The argument of the call comes first, as in NNX.
    mode = self.use_running_average if use_running_average is None else use_running_average
    return linen(x, use_running_average=mode, mask=mask)


_LAYERS: dict[type, type[nn.Module]] = {
  nnx.Conv: nn.Conv,
  nnx.Linear: nn.Dense,
  nnx.BatchNorm: nn.BatchNorm,
}
_ROUTED = {nnx.Conv: _RoutedConv, nnx.Linear: _RoutedLinear, nnx.BatchNorm: _RoutedBatchNorm}
