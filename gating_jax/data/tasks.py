"""Sequences of tasks made from one set of labelled images, each task with its own classes.

Labels are indices into the order of classes: with C classes a task, those of task t are t C, ..., t
C + C - 1.

Axes: M images, T tasks, C classes of a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gating_jax.data.tfds import Images


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
  validation: float = 0.1,
  seed: int = 0,
) -> tuple[Task, ...]:
  """Splits a set into tasks of `classes_per_task` classes each.

  Args:
    train, test: images of the same classes.
    classes_per_task: C.
    count: number of tasks; 0 for as many as there are.
    order_seed: of the order in which classes come; None for their own.
    validation: fraction of each class's training images that are held out, in (0, 1).
    seed: of that choice.
  Returns:
    The tasks, in order.
  Raises:
    ValueError: naming the argument; also a class with fewer than two training images, or none in
      the test set.
  """
  classes = len(train.class_names)
  if not (1 <= classes_per_task <= classes and classes % classes_per_task == 0):
    raise ValueError(f"classes_per_task must divide the {classes} classes; got {classes_per_task}")
  tasks = classes // classes_per_task
  if not 0 <= count <= tasks:
    raise ValueError(
      f"count must be at most {tasks}, the tasks of {classes_per_task} classes, or 0; got {count}"
    )
  if not 0 < validation < 1:
    raise ValueError(f"validation must be a fraction in (0, 1); got {validation}")
  order = (
    np.arange(classes)
    if order_seed is None
    else np.random.default_rng(order_seed).permutation(classes)
  )
  train, test = _reordered(train, order), _reordered(test, order)
  # Two training images of a class: one to train on and one to hold out.
  for name, images, least in (("train", train, 2), ("test", test, 1)):
    counts = np.bincount(images.labels, minlength=classes)
    if counts.min() < least:
      raise ValueError(
        f"{name} must hold at least {least} images of every class; got {counts.min()} of class "
        f"{images.class_names[counts.argmin()]!r}"
      )
  return tuple(
    _task(train, test, t * classes_per_task, classes_per_task, validation, seed)
    for t in range(count or tasks)
  )


def join(images: Sequence[Images]) -> Images:
  """Joins the images of several sets of the same classes, one set after the other."""
  return Images(
    np.concatenate([i.pixels for i in images]),
    np.concatenate([i.labels for i in images]),
    images[0].class_names,
  )


def interleave(sets: Sequence[np.ndarray]) -> np.ndarray:
  """Interleaves T sets: the first of each, then the second of each, and so on.

  T of `[N, ...]` to `[N T, ...]`.

  >>> interleave([np.array([0, 1, 2]), np.array([10, 11, 12])])
  array([ 0, 10,  1, 11,  2, 12])
  """
  return np.stack(sets, axis=1).reshape(-1, *sets[0].shape[1:])


def _task(
  train: Images, test: Images, first: int, classes: int, validation: float, seed: int
) -> Task:
  of_task = lambda images: np.flatnonzero(
    (images.labels >= first) & (images.labels < first + classes)
  )
  index = of_task(train)
  # Seeded by the task's first class, so that a task's choice does not depend on the tasks before.
  random, held = np.random.default_rng((seed, first)), []
  # Class by class, so that each keeps its fraction and at least one image on either side.
  for c in range(first, first + classes):
    own = np.flatnonzero(train.labels == c)
    held.append(random.permutation(own)[: np.clip(round(validation * len(own)), 1, len(own) - 1)])
  held = np.sort(np.concatenate(held))
  return Task(_at(train, np.setdiff1d(index, held)), _at(train, held), _at(test, of_task(test)))


# Relabels the classes by their place in the order.
def _reordered(images: Images, order: np.ndarray) -> Images:
  # argsort inverts a permutation.
  place = np.argsort(order).astype(np.int32)
  return Images(images.pixels, place[images.labels], tuple(images.class_names[c] for c in order))


def _at(images: Images, index: np.ndarray) -> Images:
  return Images(images.pixels[index], images.labels[index], images.class_names)
