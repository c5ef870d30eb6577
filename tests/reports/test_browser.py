import numpy as np
import pytest
import report_data
from browser import BROWSER, look_at

from gating_jax.reports import image_report, image_rows, page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["gated", "ungated", "scenes"])
def test_a_report_loads_and_fits(tmp_path, kind, width):
  run = report_data.run(kind)
  image_report.write(tmp_path / "report.html", run)
  found = look_at(tmp_path / "report.html", width)
  assert found["images"] == {"gated": 12, "ungated": 3, "scenes": 11}[kind]
  assert (found["messages"], found["broken"], found["wide"], found["scrolls"]) == ([], [], [], False)
  assert found["headings"][0] == "Result"
  assert found["headings"] == [section.title for section in image_report.sections(run)]


@pytest.mark.parametrize(("body", "what"), [
    ('<img alt="gone" src="missing.png">', "broken"),
    ('<img alt="gone" src="data:image/png;base64,AAAA">', "broken"),
    ('<script>throw new Error("x")</script>', "messages"),
    ('<script>console.log("x")</script>', "messages"),
    ('<p style="width: 400px">wide</p>', "wide"),
])
def test_what_is_wrong_is_seen(tmp_path, body, what):
  (tmp_path / "page.html").write_text(f"<!DOCTYPE html><body>{body}</body>")
  found = look_at(tmp_path / "page.html")
  assert found[what]
  (tmp_path / "page.html").write_text("<!DOCTYPE html><body>fine</body>")
  assert not look_at(tmp_path / "page.html")[what]


def test_all_kinds_of_parts_load_and_fit(tmp_path):
  rows = lambda file: image_rows.draw(file, [np.zeros((8, 4, 4, 3), np.uint8)], ["a row"])
  page.write(tmp_path / "page.html", "A run " + "of_a_long_name" * 20, [
      page.Section("Listing", "x" * 300, [page.Listing("y" * 400)]),
      page.Section("Table", parts=[page.Table([f"column {i}" for i in range(30)], [["1"] * 30])]),
      page.Section("Pictures", parts=[page.drawn(rows, "Images."), page.drawn(rows, "Images.", 500)])], "z" * 300)
  found = look_at(tmp_path / "page.html")
  assert found["images"] == 2
  assert (found["messages"], found["broken"], found["wide"], found["scrolls"]) == ([], [], [], False)


def test_scripts_in_a_page_do_not_run(tmp_path):
  html = page.render("A run", [page.Section("One")]).replace("<nav>", "<script>nothing.at.all</script><nav>")
  (tmp_path / "page.html").write_text(html)
  (said,) = look_at(tmp_path / "page.html")["messages"]
  assert "Content Security Policy" in said
