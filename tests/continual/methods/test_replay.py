"""Properties of every method with a replay memory."""

import jax
import numpy as np
import pytest

from gating_jax.continual import replay_memory
from gating_jax.continual.methods.icarl import Headed, icarl
from gating_jax.continual.methods.lwf import fine_tuning
from gating_jax.continual.methods.replay import agem, derpp, er
from tests.helpers import toy
from tests.helpers.tiny import relative_gap

REPLAY = replay_memory.ReplaySettings(images=9, batch_size=8)
METHODS = {
  "er": lambda net: er(net, REPLAY),
  "derpp": lambda net: derpp(net, REPLAY, alpha=0.5, beta=0.5),
  "agem": lambda net: agem(net, REPLAY),
  "icarl": lambda net: icarl(net, REPLAY),
}
every = pytest.mark.parametrize("name", METHODS)


def network(name, axis_name=None):
  model = Headed(toy.Dense(None), toy.TASKS * toy.CLASSES) if name == "icarl" else None
  return toy.network(axis_name, model=model)


def episodes(name, learner):
  return learner.memory.exemplars if name == "icarl" else learner.memory


@every
def test_memory_holds_its_share_of_every_class_and_no_shape_changes(name):
  method = METHODS[name](network(name))
  learner = toy.start(method)
  shapes = lambda: jax.tree.map(lambda x: (x.shape, x.dtype), learner)
  first, shares = shapes(), []
  for task in range(toy.TASKS):
    learner = toy.end_task(method, learner, toy.images(task))
    assert shapes() == first
    labels = np.asarray(episodes(name, learner).labels)
    assert len(labels) == REPLAY.images
    shares.append(np.bincount(labels, minlength=6).tolist())
  assert shares == [[5, 4, 0, 0, 0, 0], [3, 2, 2, 2, 0, 0], [2, 2, 2, 1, 1, 1]]


@pytest.mark.slow
@every
def test_two_devices_as_one(name):
  alone, spread = METHODS[name](network(name)), METHODS[name](toy.at_device_axis(network(name)))
  learner = toy.end_task(alone, toy.start(alone), toy.images(0))
  # No longer the teacher's.
  learner = learner.replace(params=jax.tree.map(lambda x: 1.5 * x, learner.params))
  data, index = toy.images(1), np.arange(0, 40, 5)
  after = [
    toy.step(method, count)(learner, data.pixels[index], data.labels[index])[0]
    for method, count in ((alone, 1), (spread, 2))
  ]
  assert relative_gap(learner.params, after[0].params) > 1e-3
  assert relative_gap(after[1].params, after[0].params) < 1e-6


@pytest.fixture(scope="module")
def fine_tuned():
  method = fine_tuning(toy.network())
  return toy.accuracies(method, toy.learn(method))


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["er", "derpp", "icarl"])
def test_replay_remembers_what_fine_tuning_forgets(name, fine_tuned):
  method = METHODS[name](network(name))
  aware, agnostic = toy.accuracies(method, toy.learn(method))
  assert min(aware) > 0.85
  assert np.mean(agnostic) > 0.8
  assert max(fine_tuned[1][:2]) < 0.2
  assert fine_tuned[1][2] > 0.9
