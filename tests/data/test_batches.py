import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.data.images import cover
from gating_jax.data.tfds import Images


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
  for (pixels, labels), valid in cover(numbered(count), batch_size):
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
  assert [v for _, v in cover(numbered(count), batch_size)] == valid


def test_the_last_batch_is_filled_with_its_own_first_image():
  *_, ((pixels, labels), valid) = cover(numbered(7), 4)
  assert valid == 3
  assert pixels.ravel().tolist() == [4, 5, 6, 4]
  assert labels.tolist() == [8, 10, 12, 8]
