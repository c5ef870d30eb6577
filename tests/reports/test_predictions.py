import csv

import numpy as np
import pytest

from gating_jax.reports import predictions
from gating_jax.reports.predictions import Predictions

COLUMNS = {"video": ["a", "b,\n", "c\udcff"], "class": ["x", "y", "x"]}
FOUND = Predictions(COLUMNS, np.array([True, False, True]), {"class": "the true one"})


def read(folder):
  with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
    return list(csv.reader(file))


def test_every_example_has_a_row_with_its_name_as_it_is(tmp_path):
  predictions.write_csv(tmp_path, FOUND)
  assert read(tmp_path) == [
    ["video", "class", "right"],
    ["a", "x", "yes"],
    ["b,\n", "y", "no"],
    ["c\\udcff", "x", "yes"],
  ]


def test_examples_of_several_labels_are_neither_right_nor_wrong(tmp_path):
  predictions.write_csv(tmp_path, Predictions(COLUMNS, None, {}))
  assert read(tmp_path)[0] == ["video", "class"]
  section = predictions.make_section(Predictions(COLUMNS, None, {}), "video")
  assert section.text == "All 3 test videos are in predictions.csv."


def test_a_page_shows_wrong_predictions_first_and_at_most_fifty():
  section = predictions.make_section(FOUND, "video")
  (table,) = section.parts
  assert [row[1:] for row in table.rows] == [["y", "no"], ["x", "yes"], ["x", "yes"]]
  assert table.rows[0][0].startswith("b,")
  assert "\n" not in table.rows[0][0]
  assert "1 predictions are wrong" in section.text
  many = Predictions({"image": list(map(str, range(60)))}, np.ones(60, bool), {})
  section = predictions.make_section(many, "image")
  assert len(section.parts[0].rows) == 50
  assert section.text.startswith("The first 50 of 60 test images; all are in predictions.csv.")


def test_columns_of_other_lengths_are_refused():
  with pytest.raises(ValueError, match="columns and right must have one length; got .*'right': 2"):
    Predictions(COLUMNS, np.ones(2, bool), {})


def test_images_are_numbered_and_their_classes_named():
  labels, predicted, classes = np.array([1, 0]), np.array([1, 1]), ("cat", "dog")
  more = {"loss": ["0.1", "2.0"]}
  found = predictions.of_classes("image", labels, predicted, classes, more=more)
  assert found.header() == ["image", "class", "prediction", "loss", "right"]
  assert found.rows() == [["0", "dog", "dog", "0.1", "yes"], ["1", "cat", "dog", "2.0", "no"]]
  assert found.terms["image"] == "its number in the test set, from 0"
  names = ("dog/a.png", "cat/b.png")
  found = predictions.of_classes("image", labels, predicted, classes, names=names, more=more)
  assert [row[0] for row in found.rows()] == [*names]
  assert found.terms["image"] == "its file"
