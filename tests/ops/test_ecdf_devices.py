import functools
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gating_jax.ops import collectives
from gating_jax.ops.ecdf import EXCHANGES, cdf_matching_loss, empirical_cdf
from gating_jax.ops.priors import empirical
from gating_jax.ops.ranking import sort_with_vjp
from tests.helpers import ROOT, environment
from tests.helpers.spread_loss import (
  AXIS,
  TWO_AXES,
  by_pmap,
  by_shard_map,
  fixed_prior,
  learned_beta,
  learned_relaxed_bernoulli,
  on_one_device,
  problem,
  reference_samples,
  target_rate,
  weighted,
)

DEVICES = 8
SPREADABLE = [weighted, learned_beta, learned_relaxed_bernoulli, reference_samples]
WAYS = {
  "pmap": lambda *args: jax.tree.map(same_on_all, by_pmap(*args)),
  "shard_map": by_shard_map,
  "shard_map with check_vma": functools.partial(by_shard_map, check_vma=True),
  "two axes": functools.partial(by_shard_map, axes=TWO_AXES),
  "two axes in the other order with check_vma": functools.partial(
    by_shard_map, axes=TWO_AXES, order=TWO_AXES[::-1], check_vma=True
  ),
}
pmap_and_check_vma = pytest.mark.parametrize("way", ["pmap", "shard_map with check_vma"])
exchanges = pytest.mark.parametrize("exchange", EXCHANGES)


def same_on_all(results):
  """Returns the devices' common result."""
  np.testing.assert_array_equal(results, np.broadcast_to(results[:1], results.shape))
  return results[0]


def relative_distance(a, b):
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_equal(result, right, tolerance=1e-6):
  """Returns value and gradients, including zeros for parameters that the term does not use."""
  np.testing.assert_allclose(result[0], right[0], rtol=tolerance)
  for name, gradient in right[1].items():
    gap = np.linalg.norm(result[1][name] - gradient)
    assert gap <= tolerance * np.linalg.norm(gradient), name


def expected(term, gates=10, fit=1.0, shaping=10.0):
  return on_one_device(*problem(gates), term, fit=fit, shaping=shaping)


def test_there_are_eight_devices():
  assert jax.device_count() == DEVICES


@pytest.mark.parametrize("term", [fixed_prior, *SPREADABLE, target_rate])
def test_both_terms_shape_the_gradient_of_the_problem(term):
  both, fit, shaping = (
    expected(term, **scales)[1] for scales in ({}, {"shaping": 0.0}, {"fit": 0.0})
  )
  assert relative_distance(fit["w"], both["w"]) > 0.1
  assert relative_distance(shaping["w"], both["w"]) > 0.1
  assert relative_distance(fit["w"] + shaping["w"], both["w"]) < 1e-6


@pytest.mark.parametrize(
  ("term", "names"),
  [
    (learned_beta, ["a", "b"]),
    (learned_relaxed_bernoulli, ["mean", "temperature"]),
    (reference_samples, ["reference"]),
  ],
)
def test_learned_priors_and_reference_samples_have_gradients(term, names):
  for name in names:
    assert np.linalg.norm(expected(term)[1][name]) > 0.1


@pytest.mark.parametrize("way", WAYS)
@exchanges
def test_eight_devices_and_one_give_the_same_value_and_gradient(way, exchange):
  assert_equal(WAYS[way](*problem(), fixed_prior, exchange), expected(fixed_prior))


@pytest.mark.thin(3)
@pytest.mark.parametrize("term", SPREADABLE)
@pmap_and_check_vma
@exchanges
def test_weights_and_what_the_prior_is_made_of_may_be_spread_too(term, way, exchange):
  assert_equal(WAYS[way](*problem(), term, exchange), expected(term))


@pmap_and_check_vma
def test_the_rate_of_the_whole_batch_is_the_same_on_eight_devices(way):
  assert_equal(WAYS[way](*problem(), target_rate, None), expected(target_rate))


@pytest.mark.thin(2)
@pytest.mark.parametrize("gates", [1, 8])
@pmap_and_check_vma
def test_devices_may_share_any_number_of_gates(gates, way):
  assert_equal(WAYS[way](*problem(gates), fixed_prior, "all_to_all"), expected(fixed_prior, gates))


@pytest.mark.thin(2)
@pmap_and_check_vma
@exchanges
def test_padded_rows_are_left_out_however_they_are_spread(way, exchange):
  params, batch = problem()
  # Of the second device's two, none.
  kept = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], bool)
  alone = on_one_device(params, {name: a[kept] for name, a in batch.items()}, fixed_prior)
  padded = {
    name: np.where(kept.reshape(-1, *[1] * (a.ndim - 1)), a, 1000) for name, a in batch.items()
  }
  padded |= {"fit": np.float32(kept / kept.mean()), "weights": np.float32(kept)}
  assert relative_distance(expected(fixed_prior)[1]["w"], alone[1]["w"]) > 0.01
  assert_equal(WAYS[way](params, padded, weighted, exchange), alone)


@pytest.mark.thin(2)
@pmap_and_check_vma
@exchanges
def test_ties_between_devices_are_ties(way, exchange):
  params, batch = problem()
  params["w"], batch["x"] = np.round(params["w"]), np.round(batch["x"])
  first_device, others = np.split(batch["x"] @ params["w"], [2])
  assert any(set(a) & set(b) for a, b in zip(first_device.T, others.T, strict=True))
  assert_equal(
    WAYS[way](params, batch, fixed_prior, exchange), on_one_device(params, batch, fixed_prior)
  )


@pytest.mark.thin(2)
@pytest.mark.parametrize("term", [fixed_prior, weighted])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_jit_spreads_a_sharded_batch_by_itself(term, axis_type):
  params, batch = problem()
  mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(axis_type,))
  spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
  assert_equal(
    on_one_device(jax.device_put(params, whole), jax.device_put(batch, spread), term),
    expected(term),
  )


def test_ranks_and_references_may_have_explicit_shardings():
  x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Explicit,))
  functions = [sort_with_vjp, empirical_cdf, lambda x: cdf_matching_loss(x, empirical(x + 1))]
  with jax.set_mesh(mesh):
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXIS)))
    results = [jax.jit(f)(spread) for f in functions]
  for f, result in zip(functions, results, strict=True):
    np.testing.assert_allclose(result, jax.jit(f)(x), rtol=1e-6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", ["pmap", "shard_map"])
@exchanges
def test_the_comparison_detects_a_backward_pass_without_the_sum(way, exchange, monkeypatch):
  monkeypatch.setattr(collectives, "gather_batch", lambda x, axis_name: _gather_without_sum(x))
  value, gradient = WAYS[way](*problem(), fixed_prior, exchange)
  np.testing.assert_allclose(value, expected(fixed_prior)[0], rtol=1e-6)
  assert relative_distance(gradient["w"], expected(fixed_prior)[1]["w"]) > 0.1


@jax.custom_vjp
def _gather_without_sum(x):
  return lax.all_gather(x, AXIS, axis=0, tiled=True)


def _gather_without_sum_fwd(x):
  return _gather_without_sum(x), x.shape[0]


def _gather_without_sum_bwd(n, cotangent):
  return (lax.dynamic_slice_in_dim(cotangent, lax.axis_index(AXIS) * n, n),)


_gather_without_sum.defvjp(_gather_without_sum_fwd, _gather_without_sum_bwd)


@pytest.mark.slow
def test_two_processes_and_one_give_the_same_value_and_gradient(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  script = ROOT / "tests" / "helpers" / "two_processes.py"
  files = [tmp_path / f"{i}.npz" for i in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, script, str(port), str(i), file],
      env=environment(devices=2),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i, file in enumerate(files)
  ]
  try:
    for process in processes:
      output, _ = process.communicate(timeout=200)
      assert process.returncode == 0, output
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()
  for file in files:
    results = np.load(file)
    names = sorted({name.rsplit("/", 1)[0] for name in results})
    assert len(names) == 2 * 3
    for name in names:
      gradient = {parameter: results[f"{name}/{parameter}"] for parameter in problem()[0]}
      assert_equal((results[f"{name}/value"], gradient), expected(fixed_prior))
