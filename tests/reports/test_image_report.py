import numpy as np
import pytest

from gating_jax.ops.priors import beta
from gating_jax.reports import image_report, page
from gating_jax.training import diagnosis
from gating_jax.training.evaluation import GateBehaviour

M, LAYERS = 200, [("first", 2), ("second", 3)]


def behaviour(rates, classes=3, correct=True):
  """Gates that open for the first so many of the images."""
  places = np.arange(M)
  logits = np.asarray([rate * M - 0.5 for rate in rates]) - places[:, None]
  labels = places % classes
  found = diagnosis.diagnose(diagnosis.tally(logits > 0, diagnosis.open_probs(logits, 0.0), labels, classes))
  class_rates = np.stack([(logits[labels == k] > 0).mean(axis=0) for k in range(classes)])
  return GateBehaviour(found, logits, class_rates, np.argsort(-logits, axis=0, kind="stable")[:8], 50.0 + places % 7,
                       np.sin(places) + 1, places % 2 == 0 if correct else None)


def sections(seen, class_names=("a", "b", "c"), history=()):
  asked = []

  def read(places):
    asked.append(list(places))
    return np.zeros((len(places), 4, 4, 1), np.uint8), np.asarray(places) % 3

  result = {"ungated_macs": 100, "layers": diagnosis.by_layer(seen.diagnosis, LAYERS)}
  made = list(image_report.gate_sections(seen, result, prior=beta(0.6, 0.4), layers=LAYERS, read=read,
                                         class_names=class_names, history=history))
  return {section.title: section for section in made}, asked


def test_selective_gates_are_shown_with_the_images_that_open_them():
  made, asked = sections(behaviour((0.5, 0.04, 0.0, 0.08, 1.0)))
  assert asked[:2] == [list(range(8)), list(range(8))]  # of two gates: one is always closed, two open more often
  assert len(made["The most selective gates"].parts) == 1
  hardest = np.argsort(-(np.sin(np.arange(M)) + 1))[:8]
  assert asked[-1] == list(hardest)


def test_where_no_gate_is_selective_it_says_so():
  made, asked = sections(behaviour((0.5, 0.3, 0.0, 0.2, 1.0)))
  assert not made["The most selective gates"].parts
  assert "No gate opens for under 10 %" in made["The most selective gates"].text
  assert len(asked) == 2  # the easiest and the hardest


@pytest.mark.parametrize(("tests", "pictures"), [(0, 1), (1, 1), (2, 2)])
def test_a_history_is_drawn_where_there_is_one(tests, pictures):
  history = [{"accuracy": 0.1 * i, "mac_ratio": 0.5} for i in range(tests)]
  made, _ = sections(behaviour((0.5, 0.3, 0.0, 0.2, 1.0)), history=history)
  assert len(made["Accuracy and cost"].parts) == pictures


def test_images_without_a_class_have_no_part_about_classes():
  made, _ = sections(behaviour((0.5, 0.04, 0.0, 0.08, 1.0), classes=1, correct=False), class_names=None)
  assert "Gates and classes" not in made
  assert {"Accuracy and cost", "What gates do", "Easy and hard images"} <= made.keys()


def test_a_class_named_like_a_script_is_text():
  made, _ = sections(behaviour((0.5, 0.04, 0.0, 0.08, 1.0)), class_names=("<script>alert(1)</script>", "b", "c"))
  html = page.render("A run", list(made.values()))
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
  assert "<script" not in html
