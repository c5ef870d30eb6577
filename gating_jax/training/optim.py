"""Optimisers, with weight decay on everything but gate networks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import traverse_util

from gating_jax.layers.gate import is_gate_path


def sgd(
  learning_rate: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  gate_multiplier: float = 1.0,
) -> optax.GradientTransformation:
  """SGD with Nesterov momentum; `weight_decay` is added to the gradient, and is 0 for gate parameters.

  Gate parameters learn `gate_multiplier` times as fast. Means over gates give each a small gradient; a higher price on
  open gates moves them sooner as well, but then it outweighs the task's loss.

  Reference: Bejnordi et al., 2020 (independent re-implementations agree on the gate parameters' exemption).
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum must be in [0, 1); got {momentum}")
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay must be >= 0; got {weight_decay}")
  if not gate_multiplier > 0:
    raise ValueError(f"gate_multiplier must be > 0; got {gate_multiplier}")
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=decayed),
    optax.sgd(learning_rate, momentum=momentum, nesterov=momentum > 0),
    optax.masked(
      optax.scale(gate_multiplier), lambda params: jax.tree.map(operator.not_, decayed(params))
    ),
  )


def decayed(params: Any) -> Any:
  """True for each parameter that decays."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: not is_gate_path(path) for path in flat})


def adam(learning_rate: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
  """Adam; `weight_decay` is apart from the gradient and 0 for gate parameters.

  Reference: Kingma and Ba, 2015; Loshchilov and Hutter, 2019.
  """
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay must be >= 0; got {weight_decay}")
  return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)


def frozen(
  optimiser: optax.GradientTransformation, is_frozen: Callable[[Sequence[str]], bool]
) -> optax.GradientTransformation:
  """`optimiser`, except that parameters whose path `is_frozen` stay as they are, weight decay or not."""

  def labels(params):
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
      {path: "still" if is_frozen(path) else "trained" for path in flat}
    )

  return optax.multi_transform({"trained": optimiser, "still": optax.set_to_zero()}, labels)
