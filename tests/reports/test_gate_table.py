import csv

import numpy as np

from gating_jax.analysis import outcomes
from gating_jax.reports import gate_table

LAYERS = (("stage1_block1/conv1", 2), ("stage2", 1))
FOUND = outcomes.Diagnosis(
  open_rates=np.array([1.0, 0.5, 0.0]),
  disagreement=np.array([0.0, 0.25, 0.5]),
  input_information=np.array([0.0, 0.5, 0.0]),
  class_information=np.array([0.0, 0.125, 0.0]),
  outcomes=np.array([0, 3, 2]),
  floor=0.01,
)


def test_a_row_for_each_layer():
  head, first, second = gate_table.render(outcomes.by_layer(FOUND, LAYERS)).splitlines()
  assert len(head) == len(first) == len(second)
  assert first.split() == [
    "stage1_block1/conv1",
    "2",
    "75.0",
    "%",
    "1",
    "0",
    "0",
    "1",
    "12.5",
    "%",
    "0.250",
    "0.062",
  ]
  assert second.split() == [
    "stage2",
    "1",
    "0.0",
    "%",
    "0",
    "0",
    "1",
    "0",
    "50.0",
    "%",
    "0.000",
    "0.000",
  ]
  for name in ("always open", "always closed", "random dropout", "conditional", "draws differ"):
    assert name in head


def test_a_line_for_each_gate(tmp_path):
  gate_table.write(tmp_path / "gates.csv", FOUND, LAYERS)
  with (tmp_path / "gates.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [(row["layer"], row["gate"], row["outcome"]) for row in rows] == [
    ("stage1_block1/conv1", "0", "always_open"),
    ("stage1_block1/conv1", "1", "conditional"),
    ("stage2", "0", "random_dropout"),
  ]
  assert [
    float(rows[1][name])
    for name in ("open_rate", "disagreement", "input_information", "class_information")
  ] == [0.5, 0.25, 0.5, 0.125]
