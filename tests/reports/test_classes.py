import numpy as np

from gating_jax.analysis import scores
from gating_jax.reports import classes, page, tables

NAMES = ("cat", "dog", "cow")
RESULT = {
  "accuracy": 0.588,
  "accuracy_low": 0.488,
  "accuracy_high": 0.681,
  "majority_rate": 0.505,
  "class_accuracy": {"cat": 0.75, "dog": 0.25},
  "classes_without_test": ["cow"],
  "classes_without_training": [],
  "confusion": [[3, 1, 0], [3, 1, 0], [0, 0, 0]],
}


def test_a_score_has_its_interval_and_base_line_next_to_it():
  assert classes.score_rows(RESULT, "accuracy") == [
    ("95 % interval", "48.8 % to 68.1 %"),
    ("majority rate", "50.5 %"),
    ("classes without test examples", "cow"),
  ]
  assert classes.class_rows(RESULT) == [("class cat", "75.0 %"), ("class dog", "25.0 %")]
  rows = [*classes.score_rows(RESULT, "accuracy"), *classes.class_rows(RESULT)]
  assert all(tables.meaning(name) for name, _ in rows)
  assert classes.score_rows({"accuracy": 0.5}, "accuracy") == classes.class_rows({}) == []


def test_of_many_classes_the_worst_are_listed():
  of_class = {f"c{k}": k / 100 for k in reversed(range(50))}
  rows = classes.class_rows({"class_accuracy": of_class})
  assert rows[0] == ("class c0", "0.0 %")
  assert rows[-1] == ("classes above these", "40 more")
  assert len(rows) == 11


def test_confusions_are_a_picture_or_a_table():
  (section,) = classes.confusion_section(RESULT, NAMES, "video")
  (picture,) = section.parts
  assert "Test videos of each true class" in picture.caption
  axes = classes.draw_confusion(np.asarray(RESULT["confusion"]), NAMES).axes[0]
  assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
  assert sorted(text.get_text() for text in axes.texts) == ["25", "25", "75", "75"]
  many = scores.MOST_CLASSES + 1
  (section,) = classes.confusion_section({"confusions": [["a", "b", 7]]}, ["x"] * many, "image")
  assert isinstance(section.parts[0], page.Table)
  assert classes.confusion_section({}, NAMES, "image") == []


def test_classes_are_named_in_a_picture_while_they_are_few():
  count = classes._NAMED + 1
  axes = classes.draw_confusion(np.eye(count, dtype=int), ["x"] * count).axes[0]
  assert len(axes.texts) == 0
  assert "x" not in [label.get_text() for label in axes.get_xticklabels()]
  np.testing.assert_array_equal(axes.images[0].get_array(), 100 * np.eye(count))
