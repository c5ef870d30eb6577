"""A programme that does what a test gives it, in place of a real experiment."""

from types import SimpleNamespace

from gating_jax import runner
from gating_jax.training.checkpoints import Checkpoint


class StandIn(runner.Programme):
  """Trains, tests and reports by the functions given; its newest checkpoint holds the run's path.

  `train(run_dir)`, `test(path)` and `report(run_dir, notice)`.
  """

  title = "a network"

  def __init__(self, config, train=None, test=None, report=None):
    self.experiment = SimpleNamespace(config=config)
    self._train, self._test, self._report = train, test, report

  def fresh(self):
    return None

  def restore(self, run_dir):
    return Checkpoint(1, run_dir.path)

  def train(self, run_dir):
    return self._train(run_dir)

  def test(self, step, state):
    self._test(state)
    return {}

  def report(self, run_dir, step, state, *, notice):
    self._report(run_dir, notice)
    return {}

  def render(self, result):
    return str(result)

  def main_numbers(self, result):
    return []

  def next_modes(self):
    return []
