"""The only file that maps a function over devices. Everything else is written for one device and an axis name.

A value is either `REPLICATED`, the same on every device, or `BATCH`, its axis 0 spread over them. Both look, to the
caller, as they would on one device: no leading device axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gating_jax.checks import one_of

AXIS = "batch"
REPLICATED = "replicated"
BATCH = "batch"
BACKENDS = ("pmap", "shard_map")


def map_over_devices(
    fn: Callable,
    *,
    args: Sequence[str],
    results: Any,
    backend: str = "pmap",
    devices: Sequence[jax.Device] | None = None,
    donate: Sequence[int] = (),
) -> Callable:
  """Runs `fn` on every device, with `AXIS` as the name of the device axis for its collectives.

  Inside, gradients are local: average them with `lax.pmean(grads, AXIS)`, as under pmap, with either backend.

  Args:
    fn: a pure function of arrays.
    args: `REPLICATED` or `BATCH` for each argument; every array of a `BATCH` argument has the examples of this process
      on axis 0, a multiple of its number of devices.
    results: the same for the result, or a tuple of them. What is marked `REPLICATED` must be equal on all devices.
    backend: `pmap` or `shard_map`.
    devices: all of the job's by default.
    donate: positions of arguments whose buffers the result may reuse.
  Returns:
    a compiled function. Pass it what `replicate` returned, or its own results, to avoid copies.
  Raises:
    ValueError: an unknown backend or kind; a batch that does not divide over the devices.
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
    place = functools.partial(_split_batch, local)
    finish = _join_batch
  else:
    specs = {REPLICATED: PartitionSpec(), BATCH: PartitionSpec(AXIS)}
    # check_vma would sum gradients over devices by itself; without it they are local, as under pmap.
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
    finish = lambda x: x

  def run(*values):
    placed = [jax.tree.map(place, v) if kind == BATCH else v for v, kind in zip(values, args, strict=True)]
    out = mapped(*placed)
    if isinstance(results, tuple):
      return tuple(jax.tree.map(finish, o) if kind == BATCH else o for o, kind in zip(out, results, strict=True))
    return jax.tree.map(finish, out) if results == BATCH else out

  run.compiled = mapped  # for tests that count compilations
  return run


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """All devices of the job on one axis."""
  return Mesh(np.array(jax.devices() if devices is None else list(devices)), (AXIS,), axis_types=(AxisType.Auto,))


def replicated_sharding(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
  """Where `replicate` puts things."""
  return NamedSharding(device_mesh(devices), PartitionSpec())


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
  """Copies a tree of arrays, the same in every process, to every device, once."""
  sharding = replicated_sharding(devices)
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  # device_put would compare the processes' arrays, in which NaN differs from NaN.
  place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(lambda x: place(np.asarray(x)), tree)


def _check_divisible(x, local: int) -> None:
  if x.shape[0] % local:
    raise ValueError(f"batch must be a multiple of the {local} devices of this process; got {x.shape[0]} examples")


def _split_batch(local: int, x):
  _check_divisible(x, local)
  return x.reshape(local, x.shape[0] // local, *x.shape[1:])


def _join_batch(x):
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _global_batch(sharding: NamedSharding, local: int, x):
  _check_divisible(x, local)
  return jax.make_array_from_process_local_data(sharding, np.asarray(x))
