import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.continual import replay_memory
from gating_jax.continual.method import Batch, Problem
from gating_jax.training import devices

SHAPE = (1, 2, 1)


def offered(labels, first=0):
  """Makes images filled with their own number, so that each can be recognised."""
  labels = np.asarray(labels, np.int32)
  number = np.arange(first, first + len(labels), dtype=np.uint8)
  return np.broadcast_to(number[:, None, None, None], (len(labels), *SHAPE)), labels


def numbers(memory):
  """Returns the numbers of the images that a memory holds."""
  return np.asarray(memory.pixels)[
    np.asarray(memory.labels) != replay_memory.EMPTY, 0, 0, 0
  ].tolist()


def counts(memory):
  labels = np.asarray(memory.labels)
  return np.bincount(labels[labels != replay_memory.EMPTY]).tolist()


def filled(labels, slots):
  return replay_memory.keep_first(replay_memory.empty(slots, SHAPE), *offered(labels))


def test_every_class_has_the_same_share_to_within_one_and_shapes_stay():
  memory = replay_memory.empty(11, SHAPE)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), memory)
  seen = []
  for task in range(4):
    new = offered(np.repeat([2 * task, 2 * task + 1], 15), first=30 * task)
    memory = replay_memory.add_task(memory, *new, jax.random.key(task))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), memory) == shapes
    assert [n // 15 for n in numbers(memory)] == memory.labels.tolist()
    assert len(set(numbers(memory))) == 11
    seen.append(sorted(counts(memory)))
  assert seen == [[5, 6], [2, 3, 3, 3], [1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]]


def test_all_images_are_kept_where_there_are_fewer_than_slots_and_the_rest_is_empty():
  memory = replay_memory.add_task(
    replay_memory.empty(9, SHAPE), *offered([3, 3, 5]), jax.random.key(0)
  )
  assert sorted(numbers(memory)) == [0, 1, 2]
  assert sorted(memory.labels[:3].tolist()) == [3, 3, 5]
  assert memory.labels[3:].tolist() == [replay_memory.EMPTY] * 6
  memory = replay_memory.add_task(memory, *offered([6] * 4, first=10), jax.random.key(0))
  assert sorted(numbers(memory)) == [0, 1, 2, 10, 11, 12, 13]


def test_a_class_short_of_images_leaves_its_slots_to_others():
  memory = replay_memory.add_task(
    replay_memory.empty(8, SHAPE), *offered([0] * 9 + [1] * 2 + [2] * 9), jax.random.key(0)
  )
  assert counts(memory) == [3, 2, 3]


def test_fewer_slots_than_classes():
  memory = replay_memory.add_task(
    replay_memory.empty(2, SHAPE), *offered([0, 0, 1, 1, 2, 2]), jax.random.key(0)
  )
  assert sorted(memory.labels.tolist()) == [0, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_even_choice_levels_what_there_is(labels, count):
  labels = np.array(labels)
  places = replay_memory.even_choice(labels, count)
  assert len(set(places)) == len(places) == min(count, len(labels))
  got, there = np.bincount(labels[places], minlength=5), np.bincount(labels, minlength=5)
  assert all(got[c] == there[c] or got[c] >= got.max() - 1 for c in range(5))
  for c in range(5):
    assert places[labels[places] == c].tolist() == np.flatnonzero(labels == c)[: got[c]].tolist()


def test_every_image_of_a_class_is_as_likely_to_be_kept_and_to_stay():
  kept = np.zeros(10)
  for seed in range(120):
    memory = replay_memory.add_task(
      replay_memory.empty(6, SHAPE), *offered([0] * 5 + [1] * 5), jax.random.key(seed)
    )
    memory = replay_memory.add_task(
      memory, *offered([2] * 9, first=50), jax.random.key(1000 + seed)
    )
    assert counts(memory) == [2, 2, 2]
    kept[[n for n in numbers(memory) if n < 10]] += 1
  np.testing.assert_allclose(kept / 120, 2 / 5, atol=4 * np.sqrt(0.4 * 0.6 / 120))


def test_the_choice_is_a_function_of_the_key():
  kept = lambda seed: numbers(
    replay_memory.add_task(replay_memory.empty(5, SHAPE), *offered([0] * 30), jax.random.key(seed))
  )
  assert kept(3) == kept(3) != kept(4)


def test_what_is_kept_with_an_image_stays_with_it():
  memory = replay_memory.empty(
    5, SHAPE, {"twice": jnp.zeros((5, 2)), "number": jnp.zeros(5, jnp.int32)}
  )
  for task in range(3):
    pixels, labels = offered([task] * 7, first=20 * task)
    number = pixels[:, 0, 0, 0].astype(np.int64)
    memory = replay_memory.add_task(
      memory,
      pixels,
      labels,
      jax.random.key(task),
      {"twice": np.stack([2.0 * number, -number], 1), "number": number},
    )
  number = np.array(numbers(memory))
  assert len(number) == 5
  np.testing.assert_array_equal(memory.extra["number"], number)
  np.testing.assert_array_equal(memory.extra["twice"], np.stack([2 * number, -number], 1))
  assert memory.extra["twice"].dtype == jnp.float32


def test_the_first_of_each_class_stay_in_their_order():
  memory = filled([1, 0, 1, 0, 1, 0], 6)
  assert numbers(memory) == [0, 1, 2, 3, 4, 5]
  memory = replay_memory.keep_first(memory, *offered([2, 2, 2], first=10))
  assert numbers(memory) == [0, 1, 2, 3, 10, 11]
  memory = replay_memory.keep_first(memory, *offered([3, 3, 3], first=20))
  assert numbers(memory) == [0, 1, 2, 3, 10, 20]


def test_draw_is_uniform_over_filled_slots():
  entries, any_filled = replay_memory.draw_entries(filled([0, 1, 1, 2], 9), jax.random.key(0), 4000)
  assert bool(any_filled)
  np.testing.assert_allclose(np.bincount(entries.pixels[:, 0, 0, 0]) / 4000, 1 / 4, atol=0.03)
  np.testing.assert_array_equal(entries.labels, np.array([0, 1, 1, 2])[entries.pixels[:, 0, 0, 0]])


def test_draw_from_an_empty_memory_says_so():
  entries, any_filled = replay_memory.draw_entries(
    replay_memory.empty(3, SHAPE), jax.random.key(0), 4
  )
  assert not bool(any_filled)
  assert entries.labels.tolist() == [replay_memory.EMPTY] * 4


@pytest.mark.parametrize("count", [2, 4])
def test_a_draw_does_not_depend_on_the_number_of_devices(count):
  memory, key = filled([0] * 20, 30), jax.random.key(5)
  over_devices = devices.map_over_devices(
    lambda memory, _: replay_memory.draw_entries(memory, key, 12, axis_name=devices.AXIS)[0].pixels,
    args=(devices.REPLICATED, devices.BATCH),
    results=devices.BATCH,
    devices=jax.devices()[:count],
  )
  alone = replay_memory.draw_entries(memory, key, 12)[0].pixels
  assert len(np.unique(alone)) > 3
  np.testing.assert_array_equal(over_devices(memory, np.zeros(count)), alone)


def test_a_draw_must_divide_over_the_devices():
  draw = functools.partial(
    replay_memory.draw_entries, filled([0], 2), jax.random.key(0), 3, axis_name="d"
  )
  with pytest.raises(ValueError, match="must be a multiple of the 2 devices; got 3"):
    jax.vmap(lambda _: draw(), axis_name="d")(jnp.zeros(2))


def test_replayed_images_are_augmented_and_the_batch_replaces_an_empty_memory():
  problem = Problem(1, 2, SHAPE, lambda pixels: pixels / 10, augment=lambda key, pixels: pixels + 1)
  x = jnp.stack([jnp.full(SHAPE, value) for value in (0.5, 0.25)])
  batch = Batch(x, jnp.array([1, 0]), None, 0.0)
  key = jax.random.key(0)
  got, labels, _, any_filled = replay_memory.draw_inputs(
    replay_memory.empty(4, SHAPE), key=key, batch=batch, problem=problem, count=3
  )
  np.testing.assert_array_equal(got[:, 0, 0, 0], [0.5, 0.5, 0.25])
  assert (labels.tolist(), bool(any_filled)) == ([1, 1, 0], False)
  got, labels, extra, any_filled = replay_memory.draw_inputs(
    replay_memory.ReplayMemory(
      jnp.full((1, *SHAPE), 40, jnp.uint8), jnp.array([0]), jnp.array([7.0])
    ),
    key=key,
    batch=batch,
    problem=problem,
    count=3,
  )
  np.testing.assert_allclose(got, np.full((3, *SHAPE), 4.1), rtol=1e-6)
  assert (labels.tolist(), extra.tolist(), bool(any_filled)) == ([0, 0, 0], [7.0] * 3, True)


@pytest.mark.parametrize("name", ["images", "batch_size"])
def test_settings_are_checked(name):
  with pytest.raises(ValueError, match=f"{name} must be >= 1; got 0"):
    replay_memory.ReplaySettings(**({"images": 5, "batch_size": 5} | {name: 0}))


def test_a_memory_has_a_slot():
  with pytest.raises(ValueError, match="must be >= 1; got 0"):
    replay_memory.empty(0, SHAPE)
