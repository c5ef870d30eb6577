"""Mapping of functions over devices; all other files are written for one device and an axis name.

A value is either `REPLICATED`, the same on every device, or `BATCH`, with its axis 0 spread over
them. For the caller both look as on one device: there is no leading device axis.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gating_jax.checks import one_of, shown
from gating_jax.names import former_positional
from gating_jax.ops import arguments
from gating_jax.ops.collectives import mean_over_devices

if TYPE_CHECKING:
  # jaxlib has no types, so that checkers take `jax.Device` for a variable.
  Device = Any
else:
  Device = jax.Device

# The name of the device axis, for collectives.
AXIS = "batch"
# The two kinds of values.
REPLICATED = "replicated"
BATCH = "batch"
BACKENDS = ("pmap", "shard_map")


def map_over_devices(
  fn: Callable,
  *,
  args: Sequence[str],
  results: Any,
  backend: str = "pmap",
  devices: Sequence[Device] | None = None,
  donate: Sequence[int] = (),
) -> Callable:
  """Runs `fn` on every device, with `AXIS` as the name of the device axis for its collectives.

  Inside, gradients are local with either backend, and
  `value_and_grad_over_devices(loss, axis_name=AXIS)` averages them.

  Args:
    fn: a pure function of arrays.
    args: `REPLICATED` or `BATCH` for each argument; every array of a `BATCH` argument has the
      examples of this process on axis 0, a multiple of its number of devices.
    results: the same for the result, or a tuple of them. Results marked `REPLICATED` must be equal
      on all devices.
    backend: `pmap` or `shard_map`.
    devices: all of the job's by default.
    donate: positions of arguments whose buffers the result may reuse.
  Returns:
    a compiled function. Pass it the result of `replicate`, or its own results, to avoid copies.
  Raises:
    ValueError: an unknown backend or kind; a batch that does not divide over the devices.

  >>> mean_over_job = map_over_devices(
  ...   lambda scale, x: jax.lax.pmean(scale * x.mean(), AXIS),
  ...   args=(REPLICATED, BATCH),
  ...   results=REPLICATED,
  ... )
  >>> float(mean_over_job(2.0, np.arange(8.0)))
  7.0
  """
  one_of("backend", backend, BACKENDS)
  for kind in (*args, *jax.tree.leaves(results)):
    one_of("args and results", kind, (REPLICATED, BATCH))
  mesh = device_mesh(devices)
  local = len(mesh.local_devices)
  if backend == "pmap":
    axes = {REPLICATED: None, BATCH: 0}
    mapped = jax.pmap(
      fn,
      axis_name=AXIS,
      in_axes=tuple(axes[kind] for kind in args),
      out_axes=jax.tree.map(axes.get, results),
      devices=None if devices is None else list(devices),
      donate_argnums=tuple(donate),
    )
    # pmap wants a leading device axis; the caller sees none.
    place = functools.partial(_split_batch, local)
    finish = _join_batch
  else:
    specs = {REPLICATED: PartitionSpec(), BATCH: PartitionSpec(AXIS)}
    # With check_vma, JAX would sum gradients over devices; without it they are local, as under
    # pmap.
    mapped = jax.jit(
      jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs[kind] for kind in args),
        out_specs=jax.tree.map(specs.get, results),
        check_vma=False,
      ),
      donate_argnums=tuple(donate),
    )
    place = functools.partial(_global_batch, NamedSharding(mesh, specs[BATCH]), local)
    # Batches come back without a device axis.
    finish = _unchanged

  def on_batches(change, values, kinds):
    """Applies `change` to every array of the values of kind `BATCH`."""
    changed = []
    for value, kind in zip(values, kinds, strict=True):
      changed.append(jax.tree.map(change, value) if kind == BATCH else value)
    return tuple(changed)

  def run(*values):
    """Places batches `[B, ...]` on the devices, runs `fn` and joins its results."""
    out = mapped(*on_batches(place, values, args))
    if isinstance(results, tuple):
      return on_batches(finish, out, results)
    (out,) = on_batches(finish, (out,), (results,))
    return out

  # For tests that count compilations.
  run.compiled = mapped
  return run


@former_positional("axis_name")
def value_and_grad_over_devices(
  loss: Callable,
  *,
  axis_name: Hashable | None,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
) -> Callable:
  """Differentiates the mean over devices of `loss`, inside `pmap`, or `shard_map` in either mode.

      L = mean_d loss_d,   gradient = mean_d of each device's own gradient of loss_d

  The same code gives the gradient of the whole batch everywhere. Written by hand, it depends on the
  mode: under pmap and `check_vma=False` a device's gradient is its own and has to be averaged;
  under shard_map's default, `check_vma=True`, JAX has summed it over devices already, and averaging
  it leaves a step D times as long.

  Args:
    loss: a function whose first or only result is a scalar: the mean over this device's examples.
      Terms of the whole batch, such as `batch_shaping_loss(..., axis_name=axis_name)`, may be part
      of it.
    axis_name: the mapped axis, or axes, over which the batch is spread; None for one device.
    argnums: as in `jax.value_and_grad`; these arguments are given by position, and must be the same
      on all devices.
    has_aux: whether `loss` returns `(scalar, aux)`.
  Returns:
    a function of `loss`'s arguments. As `jax.value_and_grad`, it returns `(value, gradient)`, the
    same on all devices, or `((value, aux), gradient)`, in which `aux` is each device's own.
  Raises:
    TypeError: a loss that is no function, or `argnums` of another kind.
    ValueError: when called, fewer arguments by position than `argnums` says.

  >>> local = lambda w, x: jnp.mean((w - x) ** 2)
  >>> over_devices = jax.vmap(
  ...   value_and_grad_over_devices(local, axis_name="batch"), (None, 0), axis_name="batch"
  ... )
  >>> # One example on each of two devices.
  >>> value, gradient = over_devices(1.0, jnp.array([[3.0], [5.0]]))
  >>> print(value, gradient)
  [10. 10.] [-6. -6.]
  """
  arguments.function("loss", loss)
  positions = _checked_positions(argnums)
  wanted = positions if isinstance(argnums, Sequence) else positions[0]
  if axis_name is None:
    return jax.value_and_grad(loss, wanted, has_aux)

  def on_this_device(*args, **kwargs):
    """Returns the loss, a scalar, of this device's own examples."""
    out = loss(*args, **kwargs)
    # A loss that is averaged already would give each device a part of the gradient only.
    return (_own_copy(out[0], axis_name), out[1]) if has_aux else _own_copy(out, axis_name)

  differentiate = jax.value_and_grad(on_this_device, wanted, has_aux)

  def over_devices(*args, **kwargs):
    """Returns value and gradient, each the mean over devices."""
    args = list(args)
    # Copied on each device, so that JAX does not sum the gradient (check_vma=True).
    for position in positions:
      if not -len(args) <= position < len(args):
        raise ValueError(
          "argnums must be positions of arguments that are not given by keyword, of which there "
          f"are {len(args)}; got {position}"
        )
      args[position] = _own_copy(args[position], axis_name)
    value, gradient = differentiate(*args, **kwargs)
    # Both equations above: means over devices.
    if has_aux:
      value, aux = value
      value, gradient = mean_over_devices((value, gradient), axis_name)
      return (value, aux), gradient
    return mean_over_devices((value, gradient), axis_name)

  return over_devices


def _checked_positions(argnums: int | Sequence[int]) -> tuple[int, ...]:
  """Returns the positions of arguments; raises a TypeError unless they are whole numbers."""
  several = argnums if isinstance(argnums, Sequence) else (argnums,)
  try:
    # Accepts the integers of NumPy as well, and no float.
    return tuple(operator.index(position) for position in several)
  except TypeError:
    rule = "a whole number, the position of an argument, or several"
    raise TypeError(f"argnums must be {rule}; got {shown(argnums)}") from None


def _own_copy(tree: Any, axis_name: Hashable) -> Any:
  """Returns the same values, marked as differing between devices: JAX then sums no gradient."""
  # The index of a device is never negative, which the compiler does not know.
  never = lax.axis_index(axis_name) < 0
  return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def device_mesh(devices: Sequence[Device] | None = None) -> Mesh:
  """Returns the mesh of devices on one axis, `AXIS`.

  Args:
    devices: all of the job's by default.

  >>> device_mesh().shape[AXIS] == jax.device_count()
  True
  """
  return Mesh(
    np.array(jax.devices() if devices is None else list(devices)),
    (AXIS,),
    axis_types=(AxisType.Auto,),
  )


def replicated_sharding(devices: Sequence[Device] | None = None) -> NamedSharding:
  """Returns the sharding of `replicate`: a full copy on every device."""
  return NamedSharding(device_mesh(devices), PartitionSpec())


def replicate(tree: Any, devices: Sequence[Device] | None = None) -> Any:
  """Copies a tree of arrays, the same in every process, to every device, once.

  Args:
    tree: arrays of any shapes.
    devices: all of the job's by default.
  Returns:
    the tree with global arrays, each with a full copy on every device.

  >>> replicate({"weights": np.ones(3)})["weights"].sharding.is_fully_replicated
  True
  """
  sharding = replicated_sharding(devices)
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def place(x):
    """Copies an array to the devices of this process."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  # device_put would compare the arrays of the processes, and NaN differs from NaN.
  return jax.tree.map(place, tree)


def _check_divisible(x, local: int) -> None:
  if x.shape[0] % local:
    raise ValueError(
      f"batch must be a multiple of the {local} devices of this process; got {x.shape[0]} examples"
    )


def _split_batch(local: int, x):
  _check_divisible(x, local)
  return x.reshape(local, x.shape[0] // local, *x.shape[1:])


def _join_batch(x):
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unchanged(x):
  return x


def _global_batch(sharding: NamedSharding, local: int, x):
  _check_divisible(x, local)
  return jax.make_array_from_process_local_data(sharding, np.asarray(x))
