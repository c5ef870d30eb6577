import numpy as np
import pytest

from gating_jax.data.image_sets import Images, join
from gating_jax.data.tasks import hold_out, make_tasks


def images(per_class=20, classes=6, seed=0):
  """Makes images whose pixels hold the image's number and class."""
  labels = (
    np.random.default_rng(seed)
    .permutation(np.repeat(np.arange(classes), per_class))
    .astype(np.int32)
  )
  pixels = np.stack([np.arange(len(labels)), labels], axis=-1).astype(np.uint8)[:, None, None, :]
  return Images(pixels, labels, tuple("abcdef"[:classes]))


def test_every_image_is_in_exactly_one_task_and_split():
  train, test = images(), images(per_class=5, seed=1)
  tasks = make_tasks(train, test, classes_per_task=2, validation=0.2)
  assert [len(t.train) for t in tasks] == [32] * 3
  assert [len(t.validation) for t in tasks] == [8] * 3
  number = lambda sets: np.sort(np.concatenate([s.pixels[:, 0, 0, 0] for s in sets]))
  np.testing.assert_array_equal(
    number([s for t in tasks for s in (t.train, t.validation)]), np.arange(120)
  )
  np.testing.assert_array_equal(number([t.test for t in tasks]), np.arange(30))


def test_labels_are_places_in_the_order_and_go_with_their_images():
  train, test = images(), images(per_class=5, seed=1)
  for order_seed in (None, 3):
    tasks = make_tasks(train, test, classes_per_task=3, order_seed=order_seed)
    for t, task in enumerate(tasks):
      for part in (task.train, task.validation, task.test):
        assert set(part.labels) == {3 * t, 3 * t + 1, 3 * t + 2}
        names = np.array(part.class_names)[part.labels]
        np.testing.assert_array_equal(names, np.array(train.class_names)[part.pixels[:, 0, 0, 1]])
  assert make_tasks(train, test, classes_per_task=3)[0].train.class_names == tuple("abcdef")
  assert make_tasks(train, test, classes_per_task=3, order_seed=3)[0].train.class_names != tuple(
    "abcdef"
  )


def test_held_out_images_are_stratified_and_a_choice_of_the_seed():
  train, test = images(), images(per_class=5)
  first, same, other = (
    make_tasks(train, test, classes_per_task=2, validation=0.25, seed=s) for s in (0, 0, 1)
  )
  for task in first:
    assert len(set(np.bincount(task.validation.labels)[-2:])) == 1
  held = lambda tasks: np.concatenate([t.validation.pixels[:, 0, 0, 0] for t in tasks])
  np.testing.assert_array_equal(held(first), held(same))
  assert not np.array_equal(held(first), held(other))


def test_of_several_labels_each_a_fraction_of_all_images_is_held_out():
  labels = np.eye(10, 3, dtype=np.int32)
  held, same, other = (hold_out(labels, 0.3, np.random.default_rng(seed)) for seed in (0, 0, 1))
  assert len(set(held)) == len(held) == 3
  assert set(held) <= set(range(10))
  np.testing.assert_array_equal(held, np.sort(held))
  np.testing.assert_array_equal(held, same)
  assert not np.array_equal(held, other)


def test_fewer_tasks_and_joined_ones():
  tasks = make_tasks(images(), images(), classes_per_task=2, count=2)
  assert len(tasks) == 2
  both = join(tuple(t.test for t in tasks))
  assert len(both) == 80
  assert set(both.labels) == {0, 1, 2, 3}


def test_one_class_a_task():
  tasks = make_tasks(images(), images(), classes_per_task=1)
  assert [set(t.train.labels) for t in tasks] == [{c} for c in range(6)]


def test_tasks_may_be_listed_in_any_order_with_different_numbers_of_classes():
  train, test = images(), images(per_class=5, seed=1)
  first, second = make_tasks(train, test, classes_per_task=2, classes=((4, 1), (0, 5, 2)))
  assert first.train.class_names == ("e", "b", "", "a", "f", "c")
  assert set(first.train.labels) == set(first.test.labels) == {0, 1}
  assert set(second.train.labels) == set(second.validation.labels) == {3, 4, 5}
  for task in (first, second):
    for part in (task.train, task.validation, task.test):
      names = np.array(part.class_names)[part.labels]
      np.testing.assert_array_equal(names, np.array(train.class_names)[part.pixels[:, 0, 0, 1]])
  # As many classes in each, in their own order: the same as without a list.
  listed = make_tasks(train, test, classes_per_task=3, classes=((0, 1), (2, 3), (4, 5)))
  for one, other in zip(listed, make_tasks(train, test, classes_per_task=2), strict=True):
    np.testing.assert_array_equal(one.train.pixels, other.train.pixels)
    np.testing.assert_array_equal(one.train.labels, other.train.labels)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(classes=()), "classes must list one task or more; got none"),
    (dict(classes=((0,), ())), "classes must list one class or more for each task"),
    (dict(classes=((0, 1), (1, 2))), "classes must list each class once"),
    (dict(classes=((0, 6),)), "classes must be numbers from 0 to 5"),
    (dict(classes=((0, 1),), count=1), "count must be 0 and order_seed None if classes are listed"),
    (dict(classes=((0, 1),), order_seed=0), "count must be 0 and order_seed None if classes"),
    (dict(classes_per_task=4), "classes_per_task must divide the 6 classes; got 4"),
    (dict(classes_per_task=0), "classes_per_task must divide the 6 classes; got 0"),
    (dict(count=4), "count must be at most 3, the tasks of 2 classes, or 0; got 4"),
    (dict(validation=0.0), r"validation must be a fraction in \(0, 1\); got 0.0"),
    (
      dict(train=images(per_class=1)),
      "train must hold at least 2 images of every class; got 1 of class 'a'",
    ),
  ],
)
def test_what_cannot_be_split_is_refused(change, message):
  settings = dict(train=images(), test=images(), classes_per_task=2) | change
  with pytest.raises(ValueError, match=message):
    make_tasks(**settings)
