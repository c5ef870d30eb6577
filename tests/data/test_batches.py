import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.data.batches import batch_indices, indices, padded_batches
from gating_jax.data.image_sets import Images

SMALL = st.integers(1, 60)


def epoch_of(seed, epoch, batch_size, examples):
  per_epoch = examples // batch_size
  return [
    batch_indices(seed, epoch * per_epoch + i, batch_size, examples) for i in range(per_epoch)
  ]


@given(examples=SMALL, batch_size=SMALL, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_repeats_no_image(examples, batch_size, seed, epoch):
  batch_size = min(batch_size, examples)
  seen = np.concatenate(epoch_of(seed, epoch, batch_size, examples))
  assert seen.dtype == np.int32
  assert len(seen) == examples // batch_size * batch_size
  assert len(np.unique(seen)) == len(seen)
  assert seen.min() >= 0
  assert seen.max() < examples


def test_an_epoch_whose_size_the_batch_divides_is_a_permutation():
  assert sorted(np.concatenate(epoch_of(0, 0, 8, 48))) == list(range(48))


def test_epochs_and_seeds_are_ordered_differently():
  orders = {
    tuple(np.concatenate(epoch_of(seed, epoch, 8, 48))) for seed in range(3) for epoch in range(3)
  }
  assert len(orders) == 9
  assert tuple(range(48)) not in orders


def test_every_image_is_left_out_of_some_epoch_only():
  seen = [set(np.concatenate(epoch_of(0, epoch, 8, 45))) for epoch in range(40)]
  assert all(len(images) == 40 for images in seen)
  assert set.union(*seen) == set(range(45))


def test_a_step_depends_on_seed_and_step_alone():
  forward = [batch_indices(3, step, 7, 40) for step in range(20)]
  for step in (19, 0, 11, 5):
    np.testing.assert_array_equal(batch_indices(3, step, 7, 40), forward[step])


def test_a_batch_cannot_be_changed_by_who_receives_it():
  first = batch_indices(0, 0, 4, 8).copy()
  with pytest.raises(ValueError, match="read-only"):
    batch_indices(0, 0, 4, 8)[0] = -1
  np.testing.assert_array_equal(batch_indices(0, 0, 4, 8), first)


@pytest.mark.parametrize("start", [0, 4, 9])
def test_columns_of_a_call_are_successive_steps(start):
  together = indices(1, start, 3, 6, 20)
  assert together.shape == (6, 3)
  for i in range(3):
    np.testing.assert_array_equal(together[:, i], batch_indices(1, start + i, 6, 20))


def test_processes_split_each_batch_in_order():
  parts = [indices(1, 5, 2, 6, 20, process=(i, 3)) for i in range(3)]
  assert [part.shape for part in parts] == [(2, 2)] * 3
  np.testing.assert_array_equal(np.concatenate(parts), indices(1, 5, 2, 6, 20))


@pytest.mark.parametrize("batch_size", [0, -1, 41])
def test_a_batch_larger_than_the_set_or_empty_is_refused(batch_size):
  with pytest.raises(ValueError, match=rf"batch_size must be in \[1, 40\], .*; got {batch_size}"):
    batch_indices(0, 0, batch_size, 40)


def test_a_batch_as_large_as_the_set_is_taken():
  assert sorted(batch_indices(0, 2, 40, 40)) == list(range(40))


def numbered(count):
  """Makes images of one pixel, their number, with twice that as labels."""
  return Images(
    np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1),
    2 * np.arange(count, dtype=np.int32),
    ("a",),
  )


@given(count=st.integers(1, 200), batch_size=st.integers(1, 250))
def test_every_image_stands_in_one_batch(count, batch_size):
  seen = []
  for (pixels, labels), valid in padded_batches(numbered(count), batch_size):
    assert pixels.shape == (batch_size, 1, 1, 1)
    assert labels.shape == (batch_size,)
    assert 1 <= valid <= batch_size
    np.testing.assert_array_equal(labels, 2 * pixels.ravel().astype(np.int32))
    seen.extend(pixels[:valid].ravel())
  assert seen == list(range(count))


@pytest.mark.parametrize(
  ("count", "batch_size", "valid"),
  [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2]), (5, 1, [1] * 5), (0, 4, [])],
)
def test_the_last_batch_tells_how_much_of_it_is_valid(count, batch_size, valid):
  assert [v for _, v in padded_batches(numbered(count), batch_size)] == valid


def test_the_last_batch_is_filled_with_its_own_first_image():
  *_, ((pixels, labels), valid) = padded_batches(numbered(7), 4)
  assert valid == 3
  assert pixels.ravel().tolist() == [4, 5, 6, 4]
  assert labels.tolist() == [8, 10, 12, 8]
