import json

from gating_jax.reports import curves

LINES = [
  {"step": 1, "split": "train", "loss": 2.0, "accuracy": 0.5},
  {"step": 2, "split": "train", "loss": 1.0, "accuracy": 0.75, "share": 0.5},
  {"step": 2, "split": "test", "accuracy": 0.25},
]


def write(folder, lines):
  folder.mkdir()
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def drawn(axes):
  return {line.get_label(): [list(map(float, xy)) for xy in line.get_data()] for line in axes.lines}


def test_curves_have_the_numbers_of_the_journal():
  losses, fractions = curves.draw_curves(LINES).axes
  assert list(drawn(losses).values()) == [[[1, 2], [2, 1]]]
  assert drawn(fractions) == {
    "accuracy, training": [[1, 2], [0.5, 0.75]],
    "segments chosen, training": [[2], [0.5]],
    "accuracy, test": [[2], [0.25]],
  }


def test_every_phase_that_has_begun_has_a_curve(tmp_path):
  folders = {
    "pretraining": write(tmp_path / "pretrain", LINES[:1]),
    "training": write(tmp_path / "train", LINES),
    "none": write(tmp_path / "none", []),
    "missing": tmp_path / "missing",
  }
  section = curves.make_section(folders)
  assert [part.caption for part in section.parts] == [
    "Learning curves of the phase pretraining.",
    "Learning curves of the phase training.",
  ]
  assert section.parts[0].terms
  assert not section.parts[1].terms
  assert curves.make_section({"none": folders["none"]}).text == "No step has been noted yet."
