"""Rows and sections of the parts of a score."""

import numpy as np

from gating_jax.analysis import scores
from gating_jax.reports import page, score_parts, tables

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
ENTRY = {
  "images": 1000,
  "accuracy": 0.5,
  "accuracy_low": 0.45,
  "accuracy_high": 0.55,
  "recognised": 0.75,
  "macs": 1234.0,
  "mac_ratio": 0.25,
}
MEANS = {"mean_set_accuracy": 0.5, "mean_set_macs": 1234.0}
UNGATED = {"sets": {"a": ENTRY, "b": ENTRY}, **MEANS}
GATED = {
  "sets": {"a": {**ENTRY, "mean_open": 0.2}, "b": {**ENTRY, "mean_open": 0.3}},
  **MEANS,
  "set_overlap": [[1.0, 0.125], [0.125, 1.0]],
  "mean_set_overlap": 0.125,
  "source_information": 0.4,
}


def test_a_score_has_its_interval_and_base_line_next_to_it():
  assert score_parts.score_rows(RESULT, "accuracy") == [
    ("95 % interval", "48.8 % to 68.1 %"),
    ("majority rate", "50.5 %"),
    ("classes without test examples", "cow"),
  ]
  assert score_parts.class_rows(RESULT) == [("class cat", "75.0 %"), ("class dog", "25.0 %")]
  rows = [*score_parts.score_rows(RESULT, "accuracy"), *score_parts.class_rows(RESULT)]
  assert all(tables.meaning(name) for name, _ in rows)
  assert score_parts.score_rows({"accuracy": 0.5}, "accuracy") == score_parts.class_rows({}) == []


def test_of_many_classes_the_worst_are_listed():
  of_class = {f"c{k}": k / 100 for k in reversed(range(50))}
  rows = score_parts.class_rows({"class_accuracy": of_class})
  assert rows[0] == ("class c0", "0.0 %")
  assert rows[-1] == ("classes above these", "40 more")
  assert len(rows) == 11


def test_confusions_are_a_picture_or_a_table():
  (section,) = score_parts.confusion_section(RESULT, NAMES, "video")
  (picture,) = section.parts
  assert "Test videos of each true class" in picture.caption
  axes = score_parts.draw_confusion(np.asarray(RESULT["confusion"]), NAMES).axes[0]
  assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
  assert sorted(text.get_text() for text in axes.texts) == ["25", "25", "75", "75"]
  many = scores.MOST_CLASSES + 1
  (section,) = score_parts.confusion_section({"confusions": [["a", "b", 7]]}, ["x"] * many, "image")
  assert isinstance(section.parts[0], page.Table)
  assert score_parts.confusion_section({}, NAMES, "image") == []


def test_each_set_has_a_row_with_score_cost_and_gates():
  rows = dict(score_parts.set_rows(GATED))
  assert rows["set a"] == "50.00 %  (1,000 images), 1,234 MACs (25.0 %), 20.0 % of gates open"
  assert rows["mean over sets"] == "50.00 %, 1,234 MACs"
  assert rows["gates that two sets share"] == "12.5 %"
  assert rows["information on the set"] == "0.400 bits per gate"
  # Every row has its definition on the page.
  assert all(tables.meaning(name) for name in rows)
  assert list(dict(score_parts.set_rows(UNGATED))) == ["set a", "set b", "mean over sets"]


def test_the_page_has_a_table_of_sets_and_one_of_the_gates_they_share():
  (section,) = score_parts.sets_section(GATED)
  of_sets, overlaps = section.parts
  assert of_sets.rows[1] == ["b", "50.00", "45.0 % to 55.0 %", "75.0", "1,234", "25.0", "30.0"]
  assert overlaps.rows == [["a", "100.0", "12.5"], ["b", "12.5", "100.0"]]
  (section,) = score_parts.sets_section(UNGATED)
  (table,) = section.parts
  assert len(table.header) == len(table.rows[0]) == len(table.terms) == 6
  assert "among all," in dict(table.terms)["accuracy (%)"]


def test_with_a_head_a_set_only_its_own_classes_compete_and_none_is_recognised():
  entry = {key: value for key, value in ENTRY.items() if key != "recognised"}
  (section,) = score_parts.sets_section({"sets": {"a": entry}, **MEANS})
  (table,) = section.parts
  assert table.header == ["set", "accuracy (%)", "95 % interval", "MACs", "of ungated (%)"]
  assert table.rows == [["a", "50.00", "45.0 % to 55.0 %", "1,234", "25.0"]]
  assert "among those of the set," in dict(table.terms)["accuracy (%)"]


def test_a_result_without_sets_has_no_rows_and_no_section():
  assert score_parts.set_rows({}) == []
  assert score_parts.sets_section({}) == []


def test_classes_are_named_in_a_picture_while_they_are_few():
  count = score_parts._NAMED + 1
  axes = score_parts.draw_confusion(np.eye(count, dtype=int), ["x"] * count).axes[0]
  assert len(axes.texts) == 0
  assert "x" not in [label.get_text() for label in axes.get_xticklabels()]
  np.testing.assert_array_equal(axes.images[0].get_array(), 100 * np.eye(count))
