import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.models.columns import ChainColumn, ResNetColumn, column, column_macs, output_shapes
from gating_jax.models.vggs import POOL, VGG

CHAIN, SHAPE, CLASSES, BEFORE, N = (2, POOL, 3), (4, 4, 1), 2, 2, 5


def net(**settings):
  return ChainColumn(classes=CLASSES, chain=CHAIN, **settings)


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def before(columns=BEFORE):
  """Makes outputs of so many older columns, in the first places, and zeros."""
  filled = (np.arange(BEFORE) < columns)[:, None, None, None, None]
  shapes = output_shapes(net(), SHAPE)
  return tuple(
    jnp.abs(random(BEFORE, N, *shape, seed=i)) * filled for i, shape in enumerate(shapes)
  )


@functools.cache
def variables():
  shapes = jax.eval_shape(
    lambda x, b: net().init(jax.random.key(0), x, b), random(N, *SHAPE), before()
  )
  flat = flax.traverse_util.flatten_dict(shapes)
  return flax.traverse_util.unflatten_dict(
    {
      path: jnp.abs(random(*leaf.shape, seed=i))
      if path[-1] == "var"
      else random(*leaf.shape, seed=i)
      for i, (path, leaf) in enumerate(flat.items())
    }
  )


@functools.cache
def run(columns):
  return jax.jit(net().apply)(variables(), random(N, *SHAPE), before(columns))


def test_a_column_is_the_equation_of_its_docstring():
  params, stats = variables()["params"], variables()["batch_stats"]
  logits, (h1, h2) = run(2)
  conv = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )

  def adapted(name, older):
    p = params[name]
    stacked = jnp.concatenate([a * h for a, h in zip(p["alpha"], older, strict=True)], -1)
    return jnp.maximum(stacked @ p["kernel"].reshape(-1, p["kernel"].shape[-1]), 0)

  layer, stat = params["layer2"]["conv"], stats["layer2"]["conv"]["norm"]
  w, u = jnp.split(layer["conv"]["kernel"], 2, axis=2)
  y = conv(h1, w) + conv(adapted("adapter2", before()[0]), u)
  y = (y - stat["mean"]) / jnp.sqrt(stat["var"] + 1e-5) * layer["norm"]["scale"] + layer["norm"][
    "bias"
  ]
  np.testing.assert_allclose(h2, jnp.maximum(y, 0), rtol=1e-4, atol=1e-5)
  w, u = jnp.split(params["classifier"]["kernel"], 2)
  pooled = before()[1].mean((2, 3))
  expected = (
    h2.mean((1, 2)) @ w + adapted("classifier_adapter", pooled) @ u + params["classifier"]["bias"]
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_first_column_is_a_plain_chain():
  plain = flax.traverse_util.flatten_dict(variables())
  plain["params", "layer2", "conv", "conv", "kernel"] = plain[
    "params", "layer2", "conv", "conv", "kernel"
  ][:, :, :2]
  plain["params", "classifier", "kernel"] = plain["params", "classifier", "kernel"][:3]
  plain = flax.traverse_util.unflatten_dict(
    {p: x for p, x in plain.items() if "adapter" not in p[1]}
  )
  expected, _ = jax.jit(VGG(CLASSES, CHAIN).apply)(plain, random(N, *SHAPE))
  np.testing.assert_allclose(run(0)[0], expected, rtol=1e-5, atol=1e-6)
  assert np.abs(run(1)[0] - expected).max() > 0.1
  assert np.abs(run(1)[0] - run(2)[0]).max() > 0.1


def test_output_shapes_are_those_of_the_outputs():
  assert output_shapes(net(), SHAPE) == ((2, 2, 2), (2, 2, 3))
  assert [h.shape[1:] for h in run(2)[1]] == [(2, 2, 2), (2, 2, 3)]
  assert output_shapes(net(width=2.0), (5, 7, 3)) == ((2, 3, 4), (2, 3, 6))


def test_macs_by_hand():
  alone = 16 * 9 * 1 * 2  # the first layer, on 4 x 4 pixels; the second is on 2 x 2
  assert column_macs(net(), SHAPE, 0) == (alone + 4 * 9 * 2 * 3, 3 * 2)
  assert column_macs(net(), SHAPE, 1) == (alone + 4 * (9 * 4 * 3 + 1 * 2 * 2), 1 * 3 * 3 + 6 * 2)
  assert column_macs(net(), SHAPE, 2) == (alone + 4 * (9 * 4 * 3 + 2 * 2 * 2), 2 * 3 * 3 + 6 * 2)


def test_alphas_start_where_they_are_told():
  alphas = net(alpha=0.25).init(jax.random.key(0), random(N, *SHAPE), before())["params"][
    "adapter2"
  ]["alpha"]
  assert alphas.tolist() == [0.25, 0.25]


def test_names_are_those_of_chains_and_residual_nets():
  assert isinstance(column("vgg8", 2), ChainColumn)
  assert isinstance(column("resnet18", 2), ResNetColumn)
  message = (
    "^model name of columns must be one of resnet101, .*, vgg8; got 'resnet19'. Did you mean "
    "'resnet18'"
  )
  with pytest.raises(ValueError, match=message):
    column("resnet19", 2)


@pytest.mark.parametrize(("classes", "last"), [(2, (("classifier",),)), (None, ())])
def test_gated_chains_name_what_reads_their_channels(classes, last):
  model = VGG(classes, CHAIN, gating="channel")
  (_, records), _ = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x),
    jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32),
  )
  assert [r.writers for r in records] == [
    (("layer1", "conv", "conv"),),
    (("layer2", "conv", "conv"),),
  ]
  assert [r.readers for r in records] == [(("layer2", "conv", "conv"),), last]
