"""Rows and tables of the sets of a union."""

from gating_jax.reports import sets, tables

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


def test_each_set_has_a_row_with_score_cost_and_gates():
  rows = dict(sets.set_rows(GATED))
  assert rows["set a"] == "50.00 %  (1,000 images), 1,234 MACs (25.0 %), 20.0 % of gates open"
  assert rows["mean over sets"] == "50.00 %, 1,234 MACs"
  assert rows["gates that two sets share"] == "12.5 %"
  assert rows["information on the set"] == "0.400 bits per gate"
  # Every row has its definition on the page.
  assert all(tables.meaning(name) for name in rows)
  assert list(dict(sets.set_rows(UNGATED))) == ["set a", "set b", "mean over sets"]


def test_the_page_has_a_table_of_sets_and_one_of_the_gates_they_share():
  (section,) = sets.sets_section(GATED)
  of_sets, overlaps = section.parts
  assert of_sets.rows[1] == ["b", "50.00", "45.0 % to 55.0 %", "75.0", "1,234", "25.0", "30.0"]
  assert overlaps.rows == [["a", "100.0", "12.5"], ["b", "12.5", "100.0"]]
  (section,) = sets.sets_section(UNGATED)
  (table,) = section.parts
  assert len(table.header) == len(table.rows[0]) == len(table.terms) == 6
  assert "among all," in dict(table.terms)["accuracy (%)"]


def test_with_a_head_a_set_only_its_own_classes_compete_and_none_is_recognised():
  entry = {key: value for key, value in ENTRY.items() if key != "recognised"}
  (section,) = sets.sets_section({"sets": {"a": entry}, **MEANS})
  (table,) = section.parts
  assert table.header == ["set", "accuracy (%)", "95 % interval", "MACs", "of ungated (%)"]
  assert table.rows == [["a", "50.00", "45.0 % to 55.0 %", "1,234", "25.0"]]
  assert "among those of the set," in dict(table.terms)["accuracy (%)"]


def test_a_result_without_sets_has_no_rows_and_no_section():
  assert sets.set_rows({}) == []
  assert sets.sets_section({}) == []
