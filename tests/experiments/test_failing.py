from types import SimpleNamespace

import ml_collections
import pytest

from gating_jax.experiments import failing
from gating_jax.training.loop import NonFiniteError

CONFIG = ml_collections.ConfigDict({"experiment": "classification", "seed": 3})


def run(path, error, report, progress=True):
  """A run that saves something, or not, and fails."""
  def train(run_dir):
    if progress:
      (run_dir.path / "checkpoints" / "1").mkdir(parents=True)
    raise error

  failing.run_mode(path, CONFIG, "train", train=train, report=report, render=str)


def test_the_report_is_written_with_the_reason_and_the_error_goes_on(tmp_path):
  said = []
  with pytest.raises(ValueError, match="layer 1 is full"):
    run(tmp_path / "run", ValueError("layer 1 is full;\nmore"), lambda run_dir, notice: said.append(notice))
  assert said == ["This run failed and is not finished: layer 1 is full;"]


@pytest.mark.parametrize("error", [NonFiniteError("loss is nan"), RuntimeError("out of memory")])
def test_a_run_without_a_checkpoint_leaves_a_page_that_says_why(tmp_path, error):
  def report(run_dir, notice):
    raise ValueError("no checkpoint in checkpoints yet")

  with pytest.raises(type(error), match=str(error)):
    run(tmp_path / "run", error, report, progress=False)
  page = (tmp_path / "run" / "report.html").read_text()
  first = page.index(f"This run failed and is not finished: {error}")
  assert first < page.index("<h1>") or first < page.index("No checkpoint could be tested: no checkpoint in checkpoints")
  assert "<td>seed</td>" in page.replace("<th>seed</th>", "<td>seed</td>")


def test_a_setting_that_is_wrong_before_the_first_step_leaves_no_page(tmp_path):
  with pytest.raises(ValueError, match="model.init_from"):
    run(tmp_path / "run", ValueError("model.init_from must name a run"), SimpleNamespace, progress=False)
  assert not (tmp_path / "run" / "report.html").exists()


def test_what_keeps_the_page_from_being_written_does_not_hide_the_error(tmp_path, monkeypatch):
  def full(*_):
    raise OSError("no space left on device")

  monkeypatch.setattr(failing.page, "write", full)
  monkeypatch.setattr(failing.logging, "warning", lambda *_: None)
  with pytest.raises(OSError, match="a checkpoint cannot be written"):
    run(tmp_path / "run", OSError("a checkpoint cannot be written"), full)


def test_a_run_that_is_stopped_by_hand_has_not_failed(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "run", KeyboardInterrupt(), SimpleNamespace)
  assert not (tmp_path / "run" / "report.html").exists()
