import base64
import io
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from gating_jax.reports import page

WICKED = "<script>alert('x')</script>\"&"


def tiny_picture(caption):
  figure = Figure(figsize=(2, 1), dpi=50)
  figure.subplots().plot([0, 1], [1, 0])
  file = io.BytesIO()
  figure.savefig(file)
  return page.EmbeddedPicture(file.getvalue(), caption)


def test_the_page_holds_its_parts_in_their_order():
  html = page.render_page(
    "A run",
    [
      page.Section("One", "a text", [page.Table(("name", "value"), [("accuracy", "0.9")])]),
      page.Section("Two", parts=[tiny_picture("a line")]),
    ],
    subtitle="of today",
  )
  places = [
    html.index(text)
    for text in (
      "A run</h1>",
      "of today",
      "One</h2>",
      "a text",
      ">accuracy<",
      ">0.9<",
      "Two</h2>",
      "data:image/png",
      "a line</figcaption>",
    )
  ]
  assert places == sorted(places)
  assert html.count("<details>") == 2


def test_a_picture_is_the_figure_it_was_made_of():
  picture = tiny_picture("a line")
  kind, _, data = picture.source.partition(",")
  assert kind == "data:image/png;base64"
  assert Image.open(io.BytesIO(base64.b64decode(data))).size == (100, 50)


def test_every_text_is_escaped():
  picture = page.EmbeddedPicture(b"", WICKED)
  parts = [page.Table((WICKED,), [(WICKED,)]), picture]
  html = page.render_page(WICKED, [page.Section(WICKED, WICKED, parts)], subtitle=WICKED)
  assert "<script" not in html
  # title twice, subtitle, link, heading, text, header, cell, caption, alt
  assert html.count("&lt;script&gt;") == 10
  assert 'alt="&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34;&amp;"' in html


def test_nothing_is_fetched():
  html = page.render_page("A run", [page.Section("One", parts=[tiny_picture("a line")])])
  loaded = re.findall(r'(?:src|href)="([^"]*)"', html)
  assert len(loaded) == 2
  assert all(address.startswith(("data:", "#")) for address in loaded)
  assert "url(" not in html
  assert "@import" not in html


def test_the_page_is_replaced_whole(tmp_path, monkeypatch):
  path = tmp_path / "report.html"
  page.write_page(path, "first", [])
  monkeypatch.setattr(page, "render_page", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    page.write_page(path, "second", [])
  assert "first</h1>" in path.read_text()
  assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_numbers_and_a_picture_open_the_page():
  number = page.Number("Accuracy", "96 %", "ungated: 98 %", "Of test images.", "measure it")
  picture = tiny_picture("what gates did")
  html = page.render_page(
    "A run", [page.Section("One")], opening=page.Opening([number], picture, "a text", "it failed")
  )
  places = [
    html.index(text)
    for text in (
      "it failed</p>",
      "A run</h1>",
      "Accuracy</p>",
      "96 %</p>",
      "ungated: 98 %</p>",
      "Of test images.</p>",
      "measure it<",
      "a text</p>",
      "what gates did<",
      "One</h2>",
    )
  ]
  assert places == sorted(places)


def test_a_place_is_filled_again_and_nothing_else_changes(tmp_path):
  file = tmp_path / "page.html"
  number = lambda value: page.Number("Time", value, "ungated: 2 ms", "Of a call.", place="time")
  section = lambda text: page.Section("Times", text, place="times")
  write = lambda *found: page.write_page(
    file,
    "A run",
    [section(found[1]), page.Section("Last")],
    opening=page.Opening([number(found[0])]),
  )
  write("3 ms", "new")
  wanted = file.read_text()
  write("none", WICKED)
  assert page.fill_page(file, [number("3 ms"), section("new")])
  assert file.read_text() == wanted
  assert page.fill_page(file, [number("3 ms"), section("new")])
  assert file.read_text() == wanted


def test_a_page_without_the_places_is_left_as_it_is(tmp_path):
  file = tmp_path / "page.html"
  parts = [page.Number("Time", "1 ms", "", "", place="time")]
  assert not page.fill_page(file, parts)
  for text in ("", "<!--place time-->", page.render_page("<!--place time--><!--place time-->", [])):
    file.write_text(text)
    assert not page.fill_page(file, parts)
    assert file.read_text() == text


def test_texts_of_a_saved_figure_are_drawn_as_they_are(tmp_path):
  figure = Figure()
  axes = figure.subplots()
  axes.set_xticks([0, 1], ["$x$", r"$\frac{$"])
  axes.set(title="$x$", ylabel="切")
  axes.plot([0, 1], label="$x$")
  texts = [*axes.get_xticklabels()[:1], axes.title, *axes.legend().get_texts()]
  as_formulas = [text.get_window_extent().width for text in texts]
  page.save_figure(figure, tmp_path / "names.png")
  for text, formula in zip(texts, as_formulas, strict=True):
    assert text.get_text() == "$x$"
    assert text.get_window_extent().width > 2 * formula
  with Image.open(tmp_path / "names.png") as picture:
    assert picture.format == "PNG"
