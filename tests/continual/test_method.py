"""What methods keep looks like a dict to JAX and to checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.method import LearnerState, TaskTable, Variables
from gating_jax.continual.methods.task_gates import RehearsedTaskMemory, TaskMemory
from gating_jax.training import devices
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import tiny


def old_memory(rehearsed):
  """Makes a memory of task gates as a dict, as it was kept before it had a type."""
  memory = {
    "own": {
      "params": {"net": {"gate": jnp.ones((2, 3))}, "head": {"kernel": jnp.full((2, 4), 2.0)}},
      "batch_stats": {"norm": {"mean": jnp.full((2, 5), 3.0)}},
    },
    "frozen": {"conv": {"kernel": jnp.array([True, False])}},
    "relevant": jnp.array([[True, False], [False, False]]),
    "available": jnp.array([True, True]),
  }
  if rehearsed:
    memory["rehearsal"] = {"episodes": {"pixels": jnp.zeros((2, 4), jnp.uint8)}}
  return memory


def new_memory(rehearsed):
  """Makes the same memory of its type."""
  old = old_memory(rehearsed)
  kind = RehearsedTaskMemory if rehearsed else TaskMemory
  return kind(**{**old, "own": Variables(**old["own"])})


def learner(memory):
  zero = jnp.zeros((), jnp.int32)
  return LearnerState(zero, zero, {"w": jnp.ones(2)}, {}, (), memory, TaskTable(*[zero] * 5))


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_checkpoint_of_a_dict_is_restored_into_its_type(rehearsed, tmp_path):
  old, new = learner(old_memory(rehearsed)), learner(new_memory(rehearsed))
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  try:
    checkpoints.save(1, devices.replicate(old))
    checkpoints.wait()
    like = jax.tree.map(jnp.zeros_like, new)
    step, restored = checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()
  assert step == 1
  assert jax.tree.structure(restored) == jax.tree.structure(new)
  assert tiny.bit_equal(jax.device_get(restored), jax.device_get(new))


def test_a_checkpoint_with_an_empty_dict_for_a_memory_is_restored_into_none(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  try:
    checkpoints.save(1, devices.replicate(learner({})))
    checkpoints.wait()
    step, restored = checkpoints.restore(learner(()), devices.replicated_sharding())
  finally:
    checkpoints.close()
  assert step == 1
  assert restored.memory == ()


def test_leaves_have_the_paths_and_the_order_of_a_dict():
  for rehearsed in (False, True):
    old, new = (
      [(jax.tree_util.keystr(path, simple=True), leaf) for path, leaf in leaves]
      for leaves in map(jax.tree.leaves_with_path, (old_memory(rehearsed), new_memory(rehearsed)))
    )
    assert [path for path, _ in new] == [path for path, _ in old]
    for (_, a), (_, b) in zip(new, old, strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_memory_is_mapped_and_replaced_like_any_tree():
  memory = jax.tree.map(lambda x: x[:1], new_memory(False))
  assert isinstance(memory, TaskMemory)
  assert isinstance(memory.own, Variables)
  assert memory.own.params["net"]["gate"].shape == (1, 3)
  changed = memory.replace(available=jnp.zeros(1, bool))
  assert not changed.available.any()
  assert changed.frozen is memory.frozen
