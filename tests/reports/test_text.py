import pytest

from gating_jax.reports import text as report_text


@pytest.mark.parametrize(
  ("name", "letters", "expected"),
  [
    ("plain", 5, "plain"),
    ("plain", 4, "pla…"),
    ("plain", 0, "…"),
    ("a\tb\x1b\udcff", 9, "a?b??"),
    (7, 3, "7"),
    ("日本\u3000語 l\u2019été\u00a0", 20, "日本 語 l\u2019été "),
    ("می\u200cخواهم", 9, "می\u200cخواهم"),
    ("a\u202eb\u2028", 9, "a?b?"),
  ],
)
def test_names_are_cut_and_lose_what_does_not_print(name, letters, expected):
  assert report_text.plain(name, letters) == expected
