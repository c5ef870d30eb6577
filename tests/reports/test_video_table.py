import pytest

from gating_jax.reports import video_table

RESULT = {
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
ROWS = [
  ("test accuracy", "91.25 %  (640 videos)"),
  ("MACs per video, heavy net on all segments", "192,096,256"),
  ("MACs per video, this net", "24,579,072  (12.8 %, light net and gate included)"),
  ("segments chosen", "25.0 %  (10 to 90 % of videos: 20.0 % to 30.0 %)"),
]


def test_rows_are_what_is_known():
  assert video_table.rows(RESULT) == ROWS
  score = {"mean_average_precision": 0.5, "classes_left_out": ["run", "sit"]}
  assert video_table.rows({k: v for k, v in RESULT.items() if k != "accuracy"} | score) == [
    ("test mean average precision", "50.00 %  (640 videos)"),
    *ROWS[1:],
    ("classes without a test video", "run, sit"),
  ]


@pytest.mark.parametrize(
  ("more", "row"),
  [
    ({"unreadable": 3}, ("videos that could not be read", "3")),
    ({"missing": 2}, ("videos without a file", "2")),
    (
      {"precision": 0.5, "relevant_share": 0.3, "recall": 0.8},
      ("segments that matter, chosen", "80.0 %"),
    ),
    (
      {"videos_per_second": 50.0, "all_segments_videos_per_second": 10.0},
      ("videos per second", "50.0  (heavy net on all segments: 10.0)"),
    ),
  ],
)
def test_what_some_runs_know_comes_last(more, row):
  assert video_table.rows(RESULT | more)[-1] == row


def test_the_values_stand_below_each_other():
  lines = video_table.render(RESULT).splitlines()
  assert [line[:43].rstrip() for line in lines] == [name for name, _ in ROWS]
  assert [line[43:] for line in lines] == [value for _, value in ROWS]
