import csv
import json

import numpy as np
import pytest

from gating_jax.analysis import outcomes
from gating_jax.reports import tables

LAYERS = (("stage1_block1/conv1", 2), ("stage2", 1))
DIAGNOSIS = outcomes.Diagnosis(
  open_rates=np.array([1.0, 0.5, 0.0]),
  disagreement=np.array([0.0, 0.25, 0.5]),
  input_information=np.array([0.0, 0.5, 0.0]),
  class_information=np.array([0.0, 0.125, 0.0]),
  outcomes=np.array([0, 3, 2]),
  floor=0.01,
)


def test_a_row_for_each_layer():
  head, first, second = tables.render_gate_table(outcomes.by_layer(DIAGNOSIS, LAYERS)).splitlines()
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
  tables.write_gate_csv(tmp_path / "gates.csv", DIAGNOSIS, LAYERS)
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


def test_rows_of_scenes():
  result = {
    "mean_iou": 0.7123,
    "accuracy": 0.9,
    "cross_entropy": 0.1,
    "images": 1200,
    "params": 1000,
    "gate_params": 0,
    "ungated_macs": 5000,
    "macs": 5000,
    "mac_ratio": 1.0,
    "head_macs": 2000,
    "iou/background": 0.9,
    "iou/a name that is much too long": 0.5246,
  }
  lines = dict(tables.scene_rows(result))
  assert lines["mean IoU"] == "71.23 %  (2 classes, 1,200 scenes)"
  assert lines["MACs of the head, always run"] == "2,000"
  assert lines["IoU of a name that is much…"] == "52.5 %"


VIDEO = {
  "videos": 640,
  "accuracy": 0.9125,
  "all_segments_macs": 192096256.0,
  "macs": 24579072.0,
  "mac_ratio": 0.128,
  "share": 0.25,
  "share_p10": 0.2,
  "share_p90": 0.3,
  "unreadable": 0,
  "missing": 0,
}
VIDEO_ROWS = [
  ("test accuracy", "91.25 %  (640 videos)"),
  ("MACs per video, heavy net on all segments", "192,096,256"),
  ("MACs per video, this net", "24,579,072  (12.8 %, light net and gate included)"),
  ("segments chosen", "25.0 %  (10 to 90 % of videos: 20.0 % to 30.0 %)"),
]


def test_rows_of_videos_are_what_is_known():
  assert tables.video_rows(VIDEO) == VIDEO_ROWS
  score = {"mean_average_precision": 0.5, "classes_left_out": ["run", "sit"]}
  assert tables.video_rows({k: v for k, v in VIDEO.items() if k != "accuracy"} | score) == [
    ("test mean average precision", "50.00 %  (640 videos)"),
    *VIDEO_ROWS[1:],
    ("classes without a test video", "run, sit"),
  ]


SPLITS = {
  "training": {"accuracy": 0.94, "share": 0.5, "share_std": 0.25},
  "validation": {"accuracy": 0.6, "share": 0.5, "share_std": 0.3},
  "test": {"accuracy": 0.59, "share": 0.634, "share_std": 0.4},
}


def test_splits_are_compared_side_by_side_where_videos_are_held_out():
  rows = dict(tables.video_rows(VIDEO | {"splits": SPLITS}))
  names = "training / validation / test"
  assert rows[f"score: {names}"] == "94.0 % / 60.0 % / 59.0 %"
  shares = "50.0 % (± 25.0) / 50.0 % (± 30.0) / 63.4 % (± 40.0)"
  assert rows[f"fraction of segments: {names}"] == shares
  for name in (f"score: {names}", f"fraction of segments: {names}"):
    assert tables.meaning(name)


@pytest.mark.parametrize(
  ("more", "row"),
  [
    ({"unreadable": 3}, ("videos that could not be read", "3")),
    (
      {"unreadable": 2, "unreadable_names": ["a", "b"]},
      ("videos that could not be read", "2  (a, b)"),
    ),
    (
      {"training_unreadable": 7, "training_unreadable_names": ["a", "b", "c", "d", "e"]},
      ("training videos that could not be read", "7  (a, b, c, d, e and 2 more)"),
    ),
    (
      {"copies": 1, "copies_names": ["a"]},
      ("test videos that are copies of training videos", "1  (a)"),
    ),
    ({"missing": 2}, ("videos without a file", "2")),
    (
      {"precision": 0.5, "relevant_share": 0.3, "recall": 0.8},
      ("segments that matter, chosen", "80.0 %"),
    ),
    (
      {"videos_per_second": 50.0, "all_segments_videos_per_second": 10.0},
      ("videos per second", "50.0  (heavy net on all segments: 10.0)"),
    ),
    (
      {
        "videos_per_second": 50.0,
        "all_segments_videos_per_second": 10.0,
        "timed_videos": 8,
        "timed_share": 0.5,
      },
      (
        "videos per second",
        "50.0  (heavy net on all segments: 10.0; 8 videos, 50.0 % of their segments chosen)",
      ),
    ),
  ],
)
def test_what_some_runs_know_comes_last(more, row):
  assert tables.video_rows(VIDEO | more)[-1] == row


def test_the_values_of_videos_stand_below_each_other():
  lines = tables.render_video(VIDEO).splitlines()
  assert [line[:43].rstrip() for line in lines] == [name for name, _ in VIDEO_ROWS]
  assert [line[43:] for line in lines] == [value for _, value in VIDEO_ROWS]


REASON = "there is only one task"
AWARE = {
  "accuracies": [[0.9, None], [0.9, 1.0]],
  "average_accuracy": 0.95,
  "forgetting": 0.0,
  "backward_transfer": -1e-9,
  # A measure of older results, with its reason: neither is shown.
  "forward_transfer": None,
  "reasons": {"forward_transfer": "a head is untrained before its task"},
}
AGNOSTIC = {
  "accuracies": [[0.8, 0.0], [0.5556, 0.7]],
  "average_accuracy": 0.627775,
  "forgetting": 0.24445,
  "backward_transfer": -0.24445,
  "reasons": {},
}
TASKS = {
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
TASK_TABLE = """\
accuracy (%)                             task-aware               task-agnostic
task                        when learnt  at the end  when learnt     at the end
0, 1                              90.00       90.00        80.00          55.56
2, 3                             100.00      100.00        70.00          70.00
average accuracy                              95.00                       62.78
forgetting (points)                            0.00                       24.45
backward transfer (points)                     0.00                      -24.45

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
  return {name: value for name, value in TASKS.items() if name not in names}


def test_the_whole_table_of_tasks():
  assert tables.render_tasks(TASKS) == TASK_TABLE
  assert tables.render_tasks(json.loads(json.dumps(TASKS))) == TASK_TABLE


def test_what_is_missing_is_left_out():
  small = without(
    "task_agnostic",
    "task_agnostic_macs",
    "task_classifier_accuracy",
    "free_units",
    "mean_gate_overlap",
    "dense_macs_reduced",
  )
  table = tables.render_tasks(small)
  assert "agnostic" not in table
  assert "classifier" not in table
  assert "units" not in table
  assert "22,755,600\n" in table
  assert table.splitlines()[2].split() == ["0,", "1", "90.00", "90.00"]


def test_a_reason_of_both_settings_is_given_once():
  unknown = {"forgetting": None, "reasons": {"forgetting": REASON}}
  both = TASKS | {"task_aware": AWARE | unknown, "task_agnostic": AGNOSTIC | unknown}
  assert tables.render_tasks(both).count(REASON) == 1
  other = TASKS | {
    "task_agnostic": AGNOSTIC | {"forgetting": None, "reasons": {"forgetting": "another one"}}
  }
  assert "\nforgetting n/a: another one\n" in tables.render_tasks(other)


def test_names_of_tasks_cannot_break_the_table():
  names = ["\x1b[31mred\n" + "a" * 300, "\u202edesrever"]
  table = tables.render_tasks(TASKS | {"task_names": names, "free_units": {"b\nc": [1, 2]}})
  assert len(table.splitlines()) == len(TASK_TABLE.splitlines()) - 1
  assert "\x1b" not in table
  assert "\u202e" not in table
  assert "free units, b?c" in table


def test_what_was_not_tested_is_said():
  aware = AWARE | {"accuracies": [[None, None], [0.9, 1.0]], "forgetting": None}
  lines = tables.render_tasks(
    without("task_agnostic") | {"task_aware": aware, "mean_gate_overlap": None}
  ).splitlines()
  assert [line.split()[-2:] for line in lines[2:4]] == [["n/a", "90.00"], ["100.00", "100.00"]]
  assert not any("two tasks share" in line for line in lines)


def test_a_table_for_each_setting_and_why_a_measure_is_missing():
  unknown = AWARE | {"backward_transfer": None, "reasons": {"backward_transfer": REASON}}
  tasks = TASKS | {"task_aware": unknown}
  (aware, rows), (agnostic, others) = tables.task_tables(tasks)
  assert aware == ["task-aware accuracy (%)", "when learnt", "at the end"]
  assert rows[:3] == [
    ["0, 1", "90.00", "90.00"],
    ["2, 3", "100.00", "100.00"],
    ["average accuracy", "", "95.00"],
  ]
  assert rows[-1] == ["backward transfer (points)", "", "n/a"]
  assert agnostic[0] == "task-agnostic accuracy (%)"
  assert others[0] == ["0, 1", "80.00", "55.56"]
  assert tables.task_reasons(tasks) == [f"backward transfer n/a: {REASON}"]
  assert tables.task_reasons(TASKS) == []
  assert [len(tables.task_tables(without(name))) for name in ("task_agnostic", "task_aware")] == [
    1,
    1,
  ]


ALL_OF_IMAGES = dict(
  accuracy=0.5,
  mean_iou=0.5,
  images=3,
  params=3,
  gate_params=1,
  ungated_macs=10,
  macs=5.0,
  mac_ratio=0.5,
  budget=0.5,
  gates=4,
  macs_p10=1.0,
  macs_p90=2.0,
  macs_std=0.1,
  macs_of_quarter1=1.0,
  macs_of_quarter4=2.0,
  always_open=1,
  always_closed=1,
  random_dropout=1,
  conditional=1,
  mean_open=0.5,
  class_information=0.1,
  class_information_floor=0.0,
  head_macs=1,
)

ALL_OF_VIDEOS = dict(
  accuracy=0.5,
  videos=3,
  all_segments_macs=10,
  macs=5.0,
  mac_ratio=0.5,
  share=0.5,
  share_p10=0.1,
  share_p90=0.9,
  precision=0.5,
  recall=0.5,
  relevant_share=0.1,
  unreadable=1,
  training_unreadable=1,
  validation_unreadable=1,
  copies=1,
  validation_copies=1,
  missing=1,
  classes_left_out=["a"],
  videos_per_second=1.0,
  all_segments_videos_per_second=2.0,
)

ALL_OF_TASKS = dict(
  task_classifier_accuracy=0.5,
  dense_macs=10,
  dense_macs_reduced=5,
  task_aware_macs=5.0,
  task_agnostic_macs=9.0,
  params=3,
  memory_mb=1.0,
  mean_gate_overlap=0.5,
  free_units={"conv": (1, 2)},
)


def test_every_row_of_every_result_is_defined():
  rows = [
    *tables.classification_rows(ALL_OF_IMAGES),
    *tables.scene_rows(ALL_OF_IMAGES | {"iou/a": 0.5}),
    *tables.video_rows(ALL_OF_VIDEOS),
    *tables.video_rows(
      {"mean_average_precision": 0.5} | {k: v for k, v in ALL_OF_VIDEOS.items() if k != "accuracy"}
    ),
    *tables.task_rows(ALL_OF_TASKS),
  ]
  assert [name for name, _ in rows if not tables.meaning(name)] == []


def test_every_measure_of_tasks_is_defined():
  accuracies = {
    "accuracies": [[0.5]],
    "average_accuracy": 0.5,
    "forgetting": None,
    "backward_transfer": None,
    "reasons": {},
  }
  ((_, rows),) = tables.task_tables({"task_names": ["one"], "task_aware": accuracies})
  assert {name for name, *_ in rows} == {"one", *tables.TASK_MEANINGS}
