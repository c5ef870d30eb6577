"""Optimisers with weight decay on all parameters but those of gate networks."""

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
  """Returns SGD with Nesterov momentum.

  `weight_decay` is added to the gradient, and is 0 for gate parameters. Gate parameters learn
  `gate_multiplier` times as fast. Means over gates give each gate a small gradient; a larger
  penalty on open gates moves them sooner as well, but then it outweighs the task's loss.

  Args:
    learning_rate: from step to number.
    momentum: in [0, 1); without Nesterov's correction where it is 0.
    weight_decay: >= 0.
    gate_multiplier: > 0, factor of the gate parameters' updates.
  Raises:
    ValueError: an argument is out of its range.

  Reference: Bejnordi et al., 2020 (independent re-implementations agree on the gate parameters'
  exemption).
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
    # After the learning rate: the factor scales the update, not the momentum.
    optax.masked(
      optax.scale(gate_multiplier), lambda params: jax.tree.map(operator.not_, decayed(params))
    ),
  )


def decayed(params: Any) -> Any:
  """Returns a tree with True for each parameter that decays."""
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: not is_gate_path(path) for path in flat})


def adam(learning_rate: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
  """Returns Adam with decoupled weight decay, which is 0 for gate parameters.

  Args:
    learning_rate: from step to number.
    weight_decay: >= 0.
  Raises:
    ValueError: `weight_decay` is negative.

  Reference: Kingma and Ba, 2015; Loshchilov and Hutter, 2019.
  """
  if not weight_decay >= 0:
    raise ValueError(f"weight_decay must be >= 0; got {weight_decay}")
  # adamw decays the parameters themselves, apart from the scaled gradient.
  return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)


def frozen(
  optimiser: optax.GradientTransformation, is_frozen: Callable[[Sequence[str]], bool]
) -> optax.GradientTransformation:
  """Returns `optimiser` with the parameters frozen whose path `is_frozen`, without weight decay.

  Args:
    optimiser: trains all other parameters.
    is_frozen: from a parameter's path to whether it stays as it is.
  """

  def labels(params):
    """Returns the tree of `params` with a label for each: `still` or `trained`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
      {path: "still" if is_frozen(path) else "trained" for path in flat}
    )

  # Zero updates, not zero gradients: weight decay would move a parameter without a gradient.
  return optax.multi_transform({"trained": optimiser, "still": optax.set_to_zero()}, labels)
