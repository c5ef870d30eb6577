import dataclasses

import jax
import numpy as np
import pytest

from gating_jax.continual import task_inference

SETTINGS = task_inference.TaskClassifierSettings(
  hidden=8, steps=300, batch_size=16, learning_rate=1e-2
)


def examples(counts, seed=0):
  """Makes images of task t, whose feature t of stream t is raised."""
  rng = np.random.default_rng(seed)
  tasks = np.repeat(np.arange(len(counts)), counts)
  features = rng.normal(0, 0.3, (len(tasks), len(counts), 4)).astype(np.float32)
  features[np.arange(len(tasks)), tasks, tasks] += 2
  order = rng.permutation(len(tasks))
  return features[order], tasks[order]


def fresh_params(tasks):
  return task_inference.init_feature_classifier(
    jax.random.key(0), tasks=tasks, features=4, hidden=SETTINGS.hidden
  )


def train(params, features, tasks):
  return task_inference.train_feature_classifier(
    params, features, tasks, key=jax.random.key(1), settings=SETTINGS
  )


def accuracy(params, features, tasks):
  return np.mean(np.argmax(task_inference.task_scores(params, features), -1) == tasks)


def test_it_learns_rare_tasks_as_well_as_frequent_ones():
  params = fresh_params(4)
  trained = train(params, *examples([200, 4, 4]))
  features, tasks = examples([50, 50, 50], seed=1)
  assert accuracy(params, features, tasks) < 0.7
  assert accuracy(trained, features, tasks) > 0.9


def test_it_widens_with_its_weights_kept():
  """Parts of future tasks keep their initial values, and do not change the scores of seen tasks."""
  params = fresh_params(4)
  features, tasks = examples([20, 20])
  trained = train(params, features, tasks)
  for name, part in (
    ("hidden", lambda p: p["hidden"]["kernel"][2:]),
    ("out", lambda p: p["out"]["kernel"][:, 2:]),
  ):
    np.testing.assert_array_equal(part(trained), part(params), err_msg=name)
  assert not np.array_equal(trained["hidden"]["kernel"][:2], params["hidden"]["kernel"][:2])
  wide = np.concatenate([features, np.zeros_like(features)], axis=1)
  np.testing.assert_allclose(
    task_inference.task_scores(trained, wide)[:, :2],
    task_inference.task_scores(trained, features),
    rtol=1e-5,
  )


def test_one_task_needs_no_training():
  params = fresh_params(2)
  assert train(params, *examples([5])) is params


def test_macs_by_hand():
  assert task_inference.feature_classifier_macs(3, 10, 64) == 3 * 10 * 64 + 64 * 3


def test_a_task_without_an_image_is_an_error():
  features, tasks = examples([5, 5, 5])
  with pytest.raises(ValueError, match=r"every task needs an image to rehearse; got \[5, 0, 5\]"):
    train(fresh_params(3), features[tasks != 1], tasks[tasks != 1])


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("hidden", 0), ("learning_rate", 0.0)])
def test_settings_are_checked(field, value):
  with pytest.raises(ValueError, match=f"{field} must be >"):
    dataclasses.replace(SETTINGS, **{field: value})
