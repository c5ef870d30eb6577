import json

import pytest

from gating_jax.reports import task_table

REASON = "a head is untrained before its task, so there is nothing to test"
AWARE = {
  "accuracies": [[0.9, None], [0.9, 1.0]],
  "average_accuracy": 0.95,
  "forgetting": 0.0,
  "backward_transfer": -1e-9,
  "forward_transfer": None,
  "reasons": {"forward_transfer": REASON},
}
AGNOSTIC = {
  "accuracies": [[0.8, 0.0], [0.5556, 0.7]],
  "average_accuracy": 0.627775,
  "forgetting": 0.24445,
  "backward_transfer": -0.24445,
  "forward_transfer": 0.012,
  "reasons": {},
}
RESULT = {
  "task_names": ["0, 1", "2, 3"],
  "task_aware": AWARE,
  "task_agnostic": AGNOSTIC,
  "task_classifier_accuracy": 0.75,
  "dense_macs": 22755600,
  "dense_macs_reduced": 926100,
  "task_aware_macs": 2275560.4,
  "task_agnostic_macs": 11377800.0,
  "params": 1234567,
  "memory_mb": 1568.0,
  "mean_gate_overlap": 0.4567,
  "free_units": {"conv1": [12, 100], "conv2": [0, 1000]},
}
TABLE = f"""\
accuracy (%)                              task-aware                task-agnostic
task                        when learned  at the end  when learned     at the end
0, 1                               90.00       90.00         80.00          55.56
2, 3                              100.00      100.00         70.00          70.00
average accuracy                               95.00                        62.78
forgetting (points)                             0.00                        24.45
backward transfer (points)                      0.00                       -24.45
forward transfer (points)                        n/a                         1.20
forward transfer n/a: {REASON}

accuracy of the task classifier  75.00 %
MACs per image, dense net        22,755,600  (926,100 if all inputs of a convolution count as one)
MACs per image, task-aware       2,275,560  (10.0 % of dense)
MACs per image, task-agnostic    11,377,800  (50.0 % of dense)
parameters                       1,234,567
memory beyond the parameters     1,568.00 MB
units that two tasks share       45.7 %
free units, conv1                12 of 100  (12.0 %)
free units, conv2                0 of 1,000  (0.0 %)"""


def without(*names):
  return {name: value for name, value in RESULT.items() if name not in names}


def test_the_whole_table():
  assert task_table.render(RESULT) == TABLE
  assert task_table.render(json.loads(json.dumps(RESULT))) == TABLE


def test_what_is_missing_is_left_out():
  small = without(
    "task_agnostic",
    "task_agnostic_macs",
    "task_classifier_accuracy",
    "free_units",
    "mean_gate_overlap",
    "dense_macs_reduced",
  )
  table = task_table.render(small)
  assert "agnostic" not in table
  assert "classifier" not in table
  assert "units" not in table
  assert "22,755,600\n" in table
  assert table.splitlines()[2].split() == ["0,", "1", "90.00", "90.00"]


def test_a_reason_of_both_settings_is_given_once():
  both = RESULT | {
    "task_agnostic": AGNOSTIC | {"forward_transfer": None, "reasons": {"forward_transfer": REASON}}
  }
  assert task_table.render(both).count(REASON) == 1
  other = RESULT | {
    "task_agnostic": AGNOSTIC | {"forgetting": None, "reasons": {"forgetting": "another one"}}
  }
  assert "\nforgetting n/a: another one\n" in task_table.render(other)


def test_names_cannot_break_the_table():
  names = ["\x1b[31mred\n" + "a" * 300, "\u202edesrever"]
  table = task_table.render(RESULT | {"task_names": names, "free_units": {"b\nc": [1, 2]}})
  assert len(table.splitlines()) == len(TABLE.splitlines()) - 1
  assert "\x1b" not in table
  assert "\u202e" not in table
  assert "free units, b?c" in table


def test_what_was_not_tested_is_said():
  aware = AWARE | {"accuracies": [[None, None], [0.9, 1.0]], "forgetting": None}
  lines = task_table.render(
    without("task_agnostic") | {"task_aware": aware, "mean_gate_overlap": None}
  ).splitlines()
  assert [line.split()[-2:] for line in lines[2:4]] == [["n/a", "90.00"], ["100.00", "100.00"]]
  assert not any("two tasks share" in line for line in lines)


@pytest.mark.parametrize(
  ("result", "expected"),
  [
    (
      RESULT,
      "task-aware accuracy 95.00 %  forgetting 0.00  task-agnostic accuracy 62.78 %  forgetting "
      "24.45  10.0 % of MACs",
    ),
    (
      without("task_agnostic") | {"task_aware": AWARE | {"forgetting": None}},
      "task-aware accuracy 95.00 %  forgetting n/a  10.0 % of MACs",
    ),
  ],
)
def test_headline(result, expected):
  assert task_table.headline(result) == expected


def test_a_table_for_each_setting_and_why_a_measure_is_missing():
  (aware, rows), (agnostic, others) = task_table.tables(RESULT)
  assert aware == ["task-aware accuracy (%)", "when learned", "at the end"]
  assert rows[:3] == [
    ["0, 1", "90.00", "90.00"],
    ["2, 3", "100.00", "100.00"],
    ["average accuracy", "", "95.00"],
  ]
  assert rows[-1] == ["forward transfer (points)", "", "n/a"]
  assert agnostic[0] == "task-agnostic accuracy (%)"
  assert others[0] == ["0, 1", "80.00", "55.56"]
  assert task_table.reasons(RESULT) == [f"forward transfer n/a: {REASON}"]
  assert [len(task_table.tables(without(name))) for name in ("task_agnostic", "task_aware")] == [
    1,
    1,
  ]
