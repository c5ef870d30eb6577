import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.layers.context import Glance, context_of, grid_means

RANDOM = np.random.default_rng(0)
MAPS = RANDOM.normal(size=(3, 4, 6, 5)).astype(np.float32)
CLIPS = RANDOM.normal(size=(3, 2, 4, 6, 5)).astype(np.float32)


def test_the_parts_of_a_map_are_its_means_and_deviations():
  np.testing.assert_allclose(context_of(MAPS, ("pooled",)), MAPS.mean((1, 2)), atol=1e-6)
  moments = context_of(MAPS, ("moments",))
  deviation = np.sqrt(MAPS.var((1, 2)) + 1e-4)
  np.testing.assert_allclose(
    moments, np.concatenate([MAPS.mean((1, 2)), deviation], 1), rtol=1e-4, atol=1e-6
  )
  quarters = MAPS.reshape(3, 2, 2, 2, 3, 5).mean((2, 4)).reshape(3, -1)
  np.testing.assert_allclose(context_of(MAPS, ("grid",)), quarters, atol=1e-6)
  both = context_of(MAPS, ("grid", "pooled"))
  np.testing.assert_allclose(both, np.concatenate([quarters, MAPS.mean((1, 2))], 1), atol=1e-6)


def test_a_clip_has_the_quarters_of_its_mean_frame():
  np.testing.assert_allclose(
    context_of(CLIPS, ("grid",)), context_of(CLIPS.mean(1), ("grid",)), atol=1e-6
  )


def test_shared_parts_are_taken_as_they_are():
  glance = np.ones((3, 8), np.float32)
  found = context_of(jnp.asarray(MAPS), ("pooled", "glance"), {"glance": glance})
  np.testing.assert_array_equal(found[:, 5:], glance)


@pytest.mark.parametrize(
  ("x", "part", "message"),
  [
    (MAPS, "glance", "gate context 'glance' must be computed by the network that has the gates"),
    (MAPS[:, 0, 0], "grid", r"gate context 'grid' needs maps \[N, ..., H, W, D\]; got shape"),
    (MAPS[:, 0, 0], "moments", r"gate context 'moments' needs maps"),
  ],
)
def test_a_part_that_cannot_be_read_is_named(x, part, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    context_of(jnp.asarray(x), (part,))


def glance(x):
  return Glance().init_with_output(jax.random.key(0), x, train=True)


@pytest.mark.parametrize("shape", [(3, 16, 16, 3), (3, 7, 9, 1), (3, 1, 40, 2), (3, 2, 11, 11, 3)])
def test_a_glance_sees_images_and_clips_of_any_size(shape):
  seen, variables = glance(jnp.asarray(RANDOM.normal(size=shape), jnp.float32))
  assert (seen.shape, seen.dtype) == ((3, 8), jnp.float32)
  assert np.isfinite(seen).all()
  assert variables["params"]["conv"]["kernel"].shape == (3, 3, shape[-1], 8)


def test_a_glance_needs_images_or_clips():
  with pytest.raises(ValueError, match=r"^a glance needs images or clips; got shape \(3, 5\)"):
    glance(jnp.zeros((3, 5)))


def test_a_glance_is_the_equation_computed_by_hand():
  # Eight pixels a side are their own thumbnail.
  x = RANDOM.normal(size=(2, 8, 8, 3)).astype(np.float32)
  variables = Glance().init(jax.random.key(0), jnp.asarray(x))
  kernel = np.asarray(variables["params"]["conv"]["kernel"])
  centred = x - x.mean((1, 2), keepdims=True)
  deviation = np.sqrt(np.mean(centred**2, (1, 2, 3), keepdims=True) + 1e-4)
  padded = np.pad(centred / (deviation + 0.1), ((0, 0), (1, 1), (1, 1), (0, 0)))
  places = []
  for i in range(0, 8, 2):
    for j in range(0, 8, 2):
      places.append(np.einsum("nabd,abdc->nc", padded[:, i : i + 3, j : j + 3], kernel))
  # Fresh statistics of BatchNorm are a mean of 0 and a variance of 1.
  expected = np.maximum(np.stack(places), 0).mean(0) / np.sqrt(1 + 1e-5)
  np.testing.assert_allclose(
    Glance().apply(variables, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-6
  )


def test_a_glance_does_not_see_brightness_or_contrast():
  x = jnp.asarray(RANDOM.normal(size=(4, 8, 8, 3)), jnp.float32)
  variables = Glance().init(jax.random.key(0), x)
  seen = Glance().apply(variables, x)
  np.testing.assert_allclose(Glance().apply(variables, 5 + x), seen, rtol=1e-3, atol=1e-5)
  # Up to the number that is added to the deviation.
  strong, stronger = (Glance().apply(variables, factor * x) for factor in (50.0, 500.0))
  np.testing.assert_allclose(stronger, strong, rtol=1e-2)
  flat = Glance().apply(variables, jnp.ones((2, 8, 8, 3)))
  np.testing.assert_allclose(flat, np.broadcast_to(flat[:1], flat.shape))
  slope = jax.grad(lambda x: jnp.sum(Glance().apply(variables, x)))(jnp.ones((2, 8, 8, 3)))
  assert np.isfinite(slope).all()


def test_a_thumbnail_of_sixteen_pixels_is_made_of_means_of_four():
  x = RANDOM.normal(size=(2, 16, 16, 3)).astype(np.float32)
  np.testing.assert_allclose(
    grid_means(jnp.asarray(x), 8), x.reshape(2, 8, 2, 8, 2, 3).mean((2, 4)), atol=1e-6
  )
