import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gating_jax import batch_shaping_loss, beta, value_and_grad_over_devices
from gating_jax.data import augment
from gating_jax.ops import collectives
from gating_jax.training import devices
from gating_jax.training.devices import BATCH, REPLICATED
from tests.helpers import tiny

backends = pytest.mark.parametrize("backend", devices.BACKENDS)
STEPS = 3


def keep_gradient():
  """Passes gradients on; its state is the last one."""
  return optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params=None: (grads, grads),
  )


OPTIMISER = optax.chain(keep_gradient(), optax.sgd(0.1, momentum=0.9, nesterov=True))


def train(backend, count):
  """Returns `(state, metrics)` after each of three steps on `count` devices.

  The net is the gated tiny one, with both gate losses.
  """
  used = jax.devices()[:count]
  run = devices.map_over_devices(
    tiny.train_step(OPTIMISER, axis_name=devices.AXIS),
    args=(REPLICATED, BATCH, BATCH),
    results=(REPLICATED, REPLICATED),
    backend=backend,
    devices=used,
  )
  reached = [(devices.replicate(tiny.state(OPTIMISER), used), None)]
  for i in range(STEPS):
    reached.append(run(reached[-1][0], *tiny.images(32, seed=i)))
  assert all(leaf.sharding.device_set == set(used) for leaf in jax.tree.leaves(reached[-1][0]))
  return reached


trained = functools.cache(train)


def gradient(run):
  return run[1][0].opt_state[0]


@pytest.mark.thin(2)
@backends
def test_gradients_on_eight_devices_equal_those_on_one(backend):
  eight, one = trained(backend, 8), trained(backend, 1)
  metrics = eight[1][1]
  assert 0 < metrics["gate_rate/stage1_block1/conv1"] < 1
  assert metrics["batch_shaping"] * metrics["batch_shaping_coefficient"] > 0
  assert metrics["l0"] * metrics["l0_coefficient"] > 0
  assert tiny.relative_gap(gradient(eight), gradient(one)) < 1e-6


@pytest.mark.thin(2)
@backends
def test_gradients_differ_when_the_gathers_backward_forgets_other_devices(backend, monkeypatch):
  @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
  def gather(x, axis_name):
    return lax.all_gather(x, axis_name, axis=0, tiled=True)

  def local_slice(axis_name, n, cotangent):
    return (lax.dynamic_slice_in_dim(cotangent, lax.axis_index(axis_name) * n, n),)

  gather.defvjp(lambda x, axis_name: (gather(x, axis_name), x.shape[0]), local_slice)
  monkeypatch.setattr(collectives, "gather_batch", gather)
  forgetful, one = train(backend, 8), trained(backend, 1)
  # The forward pass is right.
  np.testing.assert_allclose(forgetful[1][1]["loss"], one[1][1]["loss"], rtol=1e-6)
  assert tiny.relative_gap(gradient(forgetful), gradient(one)) > 1e-3


@pytest.mark.thin(2)
@backends
def test_parameters_after_three_steps_on_eight_devices_equal_those_on_one(backend):
  eight, one = trained(backend, 8), trained(backend, 1)
  for part in ("params", "batch_stats"):
    start, ours, theirs = (getattr(run, part) for run in (one[0][0], eight[-1][0], one[-1][0]))
    assert tiny.relative_gap(start, theirs) > 1e-2, part
    assert tiny.relative_gap(ours, theirs) < 1e-5, part
  ours, theirs = eight[-1][1], one[-1][1]
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


@backends
def test_one_mapped_device_equals_the_step_that_is_not_mapped(backend):
  plain, metrics = jax.jit(tiny.train_step(OPTIMISER))(tiny.state(OPTIMISER), *tiny.images(32))
  assert metrics["gradient_norm"] > 0.1
  assert tiny.relative_gap(gradient(trained(backend, 1)), plain.opt_state[0]) < 1e-6


@backends
def test_images_are_cropped_and_flipped_alike_on_eight_devices_and_on_one(backend):
  crop = lambda key, pixels: augment.crop_and_flip(
    key, pixels, pad=2, flip=True, axis_name=devices.AXIS
  )
  key, pixels = jax.random.key(1), tiny.images(32)[0]
  eight, one = (
    devices.map_over_devices(
      crop, args=(REPLICATED, BATCH), results=BATCH, backend=backend, devices=used
    )(devices.replicate(key, used), pixels)
    for used in (jax.devices(), jax.devices()[:1])
  )
  assert len(eight.sharding.device_set) == 8
  assert np.mean(np.asarray(one) != pixels) > 0.5
  np.testing.assert_array_equal(eight, one)


@backends
def test_results_have_no_device_axis_and_keep_the_examples_in_order(backend):
  def fn(offset, x):
    total = offset + lax.pmean(jnp.sum(x), devices.AXIS)
    return total, {"twice": 2 * x, "device": x * 0 + lax.axis_index(devices.AXIS)}

  run = devices.map_over_devices(
    fn, args=(REPLICATED, BATCH), results=(REPLICATED, BATCH), backend=backend
  )
  x = np.arange(16.0, dtype=np.float32)
  total, out = run(devices.replicate(jnp.float32(1)), x)
  assert total.shape == ()
  assert float(total) == 1 + 120 / 8
  np.testing.assert_array_equal(out["twice"], 2 * x)
  np.testing.assert_array_equal(out["device"], np.repeat(np.arange(8), 2))


@backends
@pytest.mark.parametrize("kind", [BATCH, REPLICATED])
def test_a_single_result_needs_no_tuple(backend, kind):
  fn = lambda x: x + 1 if kind == BATCH else lax.psum(jnp.sum(x), devices.AXIS)
  out = devices.map_over_devices(fn, args=(BATCH,), results=kind, backend=backend)(
    np.arange(8.0, dtype=np.float32)
  )
  np.testing.assert_array_equal(out, np.arange(1.0, 9.0) if kind == BATCH else 28.0)


@backends
def test_gradients_inside_are_local(backend):
  fn = lambda w, x: jax.grad(lambda w: jnp.sum(w * x))(w)[None]
  run = devices.map_over_devices(fn, args=(REPLICATED, BATCH), results=BATCH, backend=backend)
  x = np.arange(8.0, dtype=np.float32)
  np.testing.assert_array_equal(run(devices.replicate(jnp.float32(2)), x), x)


@backends
def test_donated_arguments_are_given_up(backend):
  run = devices.map_over_devices(
    lambda s, x: s + lax.psum(jnp.sum(x), devices.AXIS),
    args=(REPLICATED, BATCH),
    results=REPLICATED,
    backend=backend,
    donate=(0,),
  )
  given = devices.replicate(jnp.zeros(4))
  result = run(given, np.ones(8, np.float32))
  np.testing.assert_array_equal(result, np.full(4, 8.0))
  assert given.is_deleted()


@backends
def test_a_batch_that_does_not_divide_is_refused(backend):
  run = devices.map_over_devices(lambda x: x, args=(BATCH,), results=BATCH, backend=backend)
  with pytest.raises(ValueError, match=r"multiple of the 8 devices.*got 12 examples"):
    run(np.zeros((12, 2), np.float32))


def test_an_unknown_backend_or_kind_is_refused():
  with pytest.raises(
    ValueError, match="backend must be one of pmap, shard_map; got 'pmpa'. Did you mean 'pmap'"
  ):
    devices.map_over_devices(lambda x: x, args=(BATCH,), results=BATCH, backend="pmpa")
  with pytest.raises(ValueError, match="got 'bath'. Did you mean 'batch'"):
    devices.map_over_devices(lambda x: x, args=("bath",), results=BATCH)
  with pytest.raises(ValueError, match="got 'replicate'. Did you mean 'replicated'"):
    devices.map_over_devices(lambda x: x, args=(BATCH,), results=(BATCH, "replicate"))


def test_replicate_puts_a_copy_on_every_device():
  tree = devices.replicate({"a": np.arange(3)})
  assert tree["a"].sharding.device_set == set(jax.devices())
  assert [shard.data.tolist() for shard in tree["a"].addressable_shards] == [[0, 1, 2]] * 8


def test_processes_place_their_own_copies_also_of_numbers_that_are_not(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  # As of two processes: not by device_put, which would compare their arrays.
  monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("arrays are compared"))
  tree = devices.replicate({"a": np.array([np.nan, 1.0], np.float32), "b": 3})
  assert tree["a"].sharding.is_fully_replicated
  assert len(tree["a"].addressable_shards) == 8
  for shard in tree["a"].addressable_shards:
    np.testing.assert_array_equal(shard.data, [np.nan, 1.0])
  assert tree["b"].addressable_data(7) == 3


def spread(fn, way, axes=devices.AXIS):
  """Runs `fn(replicated, batch)` on eight devices, in one of JAX's ways.

  Its result is the same on all devices.
  """
  if way in ("pmap", "vmap"):
    mapped = (jax.pmap if way == "pmap" else jax.vmap)(fn, axis_name=axes, in_axes=(None, 0))
    mapped = mapped if way == "pmap" else jax.jit(mapped)
    return lambda params, batch: jax.tree.map(
      lambda x: x[0], mapped(params, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))
    )
  shape = 8 if isinstance(axes, str) else (2, 4)
  return jax.jit(
    jax.shard_map(
      fn,
      mesh=Mesh(np.array(jax.devices()).reshape(shape), axes),
      in_specs=(PartitionSpec(), PartitionSpec(axes)),
      out_specs=PartitionSpec(),
      check_vma=way == "shard_map, check_vma=True",
    )
  )


WAYS = ("pmap", "vmap", "shard_map, check_vma=False", "shard_map, check_vma=True")
ways = pytest.mark.parametrize("way", WAYS)


def fit(params, batch, axis_name=None, already_averaged=False):
  """A loss with a part of this device's examples and one of the whole batch."""
  logits = batch["x"] @ params["w"] + params["b"]
  shaping = jnp.sum(batch_shaping_loss(logits, beta(0.6, 0.4), axis_name=axis_name))
  total = jnp.mean(jnp.square(logits - batch["y"])) + 10 * shaping
  return collectives.mean_over_devices(total, axis_name) if already_averaged else total


def fit_problem():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {"w": normal(4, 3), "b": normal(3)}, {
    "x": normal(16, 4) + np.linspace(-1, 1, 16)[:, None],
    "y": normal(16, 3),
  }


@functools.cache
def right_gradient():
  return jax.jit(jax.value_and_grad(fit))(*fit_problem())


def assert_alike(found, right):
  np.testing.assert_allclose(found[0], right[0], rtol=1e-6)
  assert tiny.relative_gap(found[1], right[1]) < 1e-6


@ways
@pytest.mark.parametrize("already_averaged", [False, True])
def test_the_gradient_over_devices_is_that_of_one_device_in_every_mode(way, already_averaged):
  local = functools.partial(fit, axis_name=devices.AXIS, already_averaged=already_averaged)
  found = spread(value_and_grad_over_devices(local, axis_name=devices.AXIS), way)(*fit_problem())
  assert_alike(found, right_gradient())


def test_by_hand_the_gradient_of_one_mode_is_wrong_in_the_other():
  """The reason for the helper; if this fails, JAX has changed its convention."""
  local = jax.value_and_grad(functools.partial(fit, axis_name=devices.AXIS))
  by_hand = lambda params, batch: lax.pmean(local(params, batch), devices.AXIS)
  right = right_gradient()
  assert_alike(spread(by_hand, "shard_map, check_vma=False")(*fit_problem()), right)
  value, gradient = spread(by_hand, "shard_map, check_vma=True")(*fit_problem())
  assert_alike((value, jax.tree.map(lambda g: g / 8, gradient)), right)


@pytest.mark.parametrize("way", WAYS[2:])
def test_the_gradient_is_right_where_parameters_are_typed_as_varying(way):
  differentiate = value_and_grad_over_devices(
    functools.partial(fit, axis_name=devices.AXIS), axis_name=devices.AXIS
  )
  vary = lambda params: jax.tree.map(lambda w: w + 0 * lax.axis_index(devices.AXIS), params)
  found = spread(lambda params, batch: differentiate(vary(params), batch), way)(*fit_problem())
  assert_alike(found, right_gradient())


@pytest.mark.parametrize("way", WAYS[2:])
def test_the_batch_may_be_spread_over_two_axes(way):
  axes = ("hosts", "devices")
  found = spread(
    value_and_grad_over_devices(functools.partial(fit, axis_name=axes), axis_name=axes), way, axes
  )(*fit_problem())
  assert_alike(found, right_gradient())


@pytest.mark.thin(3)
@pytest.mark.parametrize("way", ["one device", *WAYS[2:]])
def test_aux_is_each_devices_own_and_several_arguments_have_gradients(way):
  axis_name = None if way == "one device" else devices.AXIS

  def loss(w, batch, b, *, axis_name):
    return fit({"w": w, "b": b}, batch, axis_name), jnp.sum(batch["x"])

  def both(params, batch):
    differentiate = value_and_grad_over_devices(
      loss, axis_name=axis_name, argnums=(0, 2), has_aux=True
    )
    (value, aux), (w, b) = differentiate(params["w"], batch, params["b"], axis_name=axis_name)
    return (value, {"w": w, "b": b}), aux if axis_name is None else lax.psum(aux, axis_name)

  params, batch = fit_problem()
  found, aux = (both if axis_name is None else spread(both, way))(params, batch)
  assert_alike(found, right_gradient())
  np.testing.assert_allclose(aux, batch["x"].sum(), rtol=1e-6)


@pytest.mark.parametrize("way", [pytest.param(WAYS[2], marks=pytest.mark.slow), WAYS[3]])
def test_a_training_step_is_that_of_one_device_under_shard_map_in_both_modes(way):
  step = tiny.train_step(OPTIMISER, axis_name=devices.AXIS)
  state, metrics = spread(lambda state, batch: step(state, *batch), way)(
    tiny.state(OPTIMISER), tiny.images(32)
  )
  one = trained("pmap", 1)[1]
  assert tiny.relative_gap(state.opt_state[0], one[0].opt_state[0]) < 1e-6
  np.testing.assert_allclose(metrics["gradient_norm"], one[1]["gradient_norm"], rtol=1e-6)


def test_positions_of_arguments_may_be_numbers_of_numpy():
  differentiate = value_and_grad_over_devices(
    lambda x, w: w * x, axis_name="batch", argnums=np.int64(1)
  )
  over_devices = jax.vmap(differentiate, (0, None), axis_name="batch")
  value, gradient = over_devices(jnp.array([3.0, 5.0]), 2.0)
  np.testing.assert_array_equal(value, 8)
  np.testing.assert_array_equal(gradient, 4)


@pytest.mark.parametrize(("argnums", "got"), [(0, "0"), ((1, -2), "1")])
def test_a_gradient_needs_arguments_by_position(argnums, got):
  differentiate = value_and_grad_over_devices(
    lambda *_, **__: 0.0, axis_name="batch", argnums=argnums
  )
  by_position = () if argnums == 0 else (1.0,)
  with pytest.raises(ValueError, match=rf"^argnums must be .* there are [01]; got {got}$"):
    differentiate(*by_position, w=1.0)


@pytest.mark.parametrize("argnums", [0.0, None, "w", (0, "w")])
def test_positions_of_arguments_are_whole_numbers(argnums):
  with pytest.raises(TypeError, match="^argnums must be a whole number, the position of an arg"):
    value_and_grad_over_devices(lambda w: w, axis_name="batch", argnums=argnums)
