"""Tasks made from a set of labelled images, and examples held out of training.

Labels of a task are indices into the order of classes: with C classes a task, those of task t are
t C, ..., t C + C - 1.

Axes: M images in a split, T tasks, C classes of a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from gating_jax.data.image_sets import Images


@dataclasses.dataclass(frozen=True)
class Task:
  """Images of one task."""

  train: Images
  validation: Images
  test: Images


def make_tasks(
  train: Images,
  test: Images,
  *,
  classes_per_task: int,
  count: int = 0,
  order_seed: int | None = None,
  classes: Sequence[Sequence[int]] | None = None,
  validation: float = 0.1,
  seed: int = 0,
) -> tuple[Task, ...]:
  """Splits a set into tasks of `classes_per_task` classes each, or of the classes that are listed.

  Listed tasks may have different numbers of classes. With C the largest of these, labels of task t
  are still t C, t C + 1, ...: some numbers below the next task's first are of no class, and have
  an empty name. Classes that no task lists are left out.

  Args:
    train, test: images of the same classes.
    classes_per_task: C; ignored where `classes` are given.
    count: number of tasks; 0 for as many as there are.
    order_seed: of the order in which classes come; None for their own.
    classes: the classes of each task, in the order of learning; None for all classes in turn.
    validation: fraction of each class's training images that are held out, in (0, 1).
    seed: of that choice.
  Returns:
    The tasks, in order.
  Raises:
    ValueError: naming the argument; also a class with fewer than two training images, or none in
      the test set.
  """
  known = len(train.class_names)
  if not 0 < validation < 1:
    raise ValueError(f"validation must be a fraction in (0, 1); got {validation}")
  if classes is not None:
    _check_listed(classes, known, count=count, order_seed=order_seed)
    width = max(len(group) for group in classes)
    # The number of the class at each place; -1 where there is none.
    order = np.full(len(classes) * width, -1)
    for task, group in enumerate(classes):
      order[task * width : task * width + len(group)] = group
    groups = [range(t * width, t * width + len(group)) for t, group in enumerate(classes)]
  else:
    width = classes_per_task
    if not (1 <= width <= known and known % width == 0):
      raise ValueError(f"classes_per_task must divide the {known} classes; got {width}")
    tasks = known // width
    if not 0 <= count <= tasks:
      raise ValueError(
        f"count must be at most {tasks}, the tasks of {width} classes, or 0; got {count}"
      )
    order = np.arange(known)
    if order_seed is not None:
      order = np.random.default_rng(order_seed).permutation(known)
    groups = [range(t * width, (t + 1) * width) for t in range(count or tasks)]
  train, test = _reordered(train, order), _reordered(test, order)
  # Two training images of a class: one to train on and one to hold out.
  for name, images, least in (("train", train, 2), ("test", test, 1)):
    found = np.bincount(images.labels[images.labels >= 0], minlength=len(order))
    # Places without a class need no images.
    counts = np.where(order >= 0, found, np.iinfo(np.int64).max)
    if counts.min() < least:
      raise ValueError(
        f"{name} must hold at least {least} images of every class; got {counts.min()} of class "
        f"{images.class_names[counts.argmin()]!r}"
      )
  sequence = []
  for of_task in groups:
    # Seeded by the task's first class, so that a task's choice does not depend on tasks before it.
    rng = np.random.default_rng((seed, of_task[0]))
    sequence.append(_make_task(train, test, of_task, validation=validation, rng=rng))
  return tuple(sequence)


def hold_out(
  labels: np.ndarray,
  fraction: float,
  rng: np.random.Generator,
  *,
  classes: Iterable[int] | None = None,
) -> np.ndarray:
  """Chooses the examples that are held out of training: a fraction of each class.

  Args:
    labels: `[M]` classes; or `[M, classes]` of 0 and 1, of which a fraction of all is taken.
    fraction: in (0, 1).
    rng: draws them.
    classes: those to take examples of; None for all.
  Returns:
    Their indices, ascending. A class of two examples or more keeps one on either side.

  >>> hold_out(np.array([0, 1, 0, 1, 1]), 0.5, np.random.default_rng(0)).size
  3
  """
  groups = []
  if labels.ndim == 2:
    groups.append(np.arange(len(labels)))
  else:
    # Class by class, so that each keeps its fraction and at least one example on either side.
    for c in np.unique(labels) if classes is None else classes:
      groups.append(np.flatnonzero(labels == c))
  held = []
  for own in groups:
    count = np.clip(round(fraction * len(own)), 1, len(own) - 1)
    held.append(rng.permutation(own)[:count])
  return np.sort(np.concatenate(held))


def _check_listed(
  classes: Sequence[Sequence[int]], known: int, *, count: int, order_seed: int | None
) -> None:
  """Raises a ValueError for listed tasks that are no disjoint groups of known classes."""
  if count or order_seed is not None:
    raise ValueError(
      f"count must be 0 and order_seed None if classes are listed; got {count} and {order_seed}"
    )
  listed = []
  for group in classes:
    if not len(group):
      raise ValueError(f"classes must list one class or more for each task; got {classes}")
    listed += group
  if not listed:
    raise ValueError("classes must list one task or more; got none")
  if len(set(listed)) < len(listed):
    raise ValueError(f"classes must list each class once; got {classes}")
  if not set(listed) <= set(range(known)):
    raise ValueError(f"classes must be numbers from 0 to {known - 1}; got {classes}")


def _make_task(
  train: Images, test: Images, classes: range, *, validation: float, rng: np.random.Generator
) -> Task:
  """Makes the task of these classes; the generator chooses the images that are held out."""
  held = hold_out(train.labels, validation, rng, classes=classes)
  of_train = np.flatnonzero(np.isin(train.labels, classes))
  of_test = np.flatnonzero(np.isin(test.labels, classes))
  return Task(
    train=train.take(np.setdiff1d(of_train, held)),
    validation=train.take(held),
    test=test.take(of_test),
  )


def _reordered(images: Images, order: np.ndarray) -> Images:
  """Relabels the classes by their place in the order; -1 for classes that it lacks.

  Args:
    images: to relabel.
    order: the class at each place; -1 where there is none, which has an empty name.
  """
  place = np.full(len(images.class_names), -1, np.int32)
  taken = np.flatnonzero(order >= 0)
  place[order[taken]] = taken
  names = tuple(images.class_names[c] if c >= 0 else "" for c in order)
  return dataclasses.replace(images, labels=place[images.labels], class_names=names)
