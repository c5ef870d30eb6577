import numpy as np
import pytest

from gating_jax.data import images
from gating_jax.data.videos import VideoArrays


def videos(label):
  arrays = {
    "light": np.arange(30.0).reshape(5, 2, 3),
    "label": label,
    "weight": np.ones(5, np.float32),
  }
  return VideoArrays(arrays, class_names=("a", "b"), names=tuple("vwxyz"))


def test_batches_hold_the_rows_asked_for_of_every_array():
  batch = videos(np.arange(5)).read(np.array([3, 0, 3]))
  np.testing.assert_array_equal(batch["light"], np.arange(30.0).reshape(5, 2, 3)[[3, 0, 3]])
  np.testing.assert_array_equal(batch["label"], [3, 0, 3])
  assert batch.keys() == {"light", "label", "weight"}


def test_it_knows_its_size_and_shapes():
  split = videos(np.arange(5))
  assert len(split) == 5
  assert split.shapes == {"light": (2, 3), "label": (), "weight": ()}


@pytest.mark.parametrize(("shape", "several"), [((5,), False), ((5, 2), True)])
def test_labels_of_two_axes_are_of_several_classes(shape, several):
  assert videos(np.zeros(shape)).multi_label == several


def test_it_is_covered_by_batches_once():
  seen = [batch["label"][:count].tolist() for batch, count in images.cover(videos(np.arange(5)), 2)]
  assert seen == [[0, 1], [2, 3], [4]]
