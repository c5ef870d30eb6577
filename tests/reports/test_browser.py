"""Pages opened in a real browser: everything is loaded, nothing is said on the console, nothing is too wide."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from gating_jax.reports import image_rows, page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")]
AUDIT = """<script>onload = () => { document.title = [
  [...document.images].filter(i => !i.naturalWidth).length, document.images.length,
  Math.max(0, document.documentElement.scrollWidth - innerWidth)].join(" ") }</script>"""


def opened(html, folder):
  """`(broken images, images, pixels too wide, what was said on the console)`."""
  path = folder / "page.html"
  path.write_text(html)
  done = subprocess.run(
      [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
       "--window-size=500,900", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
      capture_output=True, text=True, timeout=120, check=True)
  title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
  numbers = [int(word) for word in title.split()] if re.fullmatch(r"\d+ \d+ \d+", title) else [None] * 3
  return *numbers, re.findall(r"CONSOLE.*", done.stderr)


def whole_page():
  rows = lambda file: image_rows.draw(file, [np.zeros((8, 4, 4, 3), np.uint8)], ["a row"])
  return page.render("A run " + "of_a_long_name" * 20, [
      page.Section("Listing", "x" * 300, [page.Listing("y" * 400)]),
      page.Section("Table", parts=[page.Table([f"column {i}" for i in range(30)], [["1"] * 30])]),
      page.Section("Pictures", parts=[page.drawn(rows, "Images."), page.drawn(rows, "Images.")])], "z" * 300)


def audited(html):
  """The page with a script of ours, which its policy would not let run."""
  return re.sub(r"<meta http-equiv.*?>", "", html).replace("</body>", AUDIT + "</body>")


def test_the_page_says_nothing_and_runs_no_script(tmp_path):
  assert opened(whole_page(), tmp_path)[3] == []


def test_every_picture_is_there_and_nothing_is_wider_than_the_window(tmp_path):
  assert opened(audited(whole_page()), tmp_path) == (0, 2, 0, [])


def test_the_audit_sees_what_is_wrong(tmp_path):
  broken = whole_page().replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
  wide = broken.replace("<nav>", '<div style="width: 3000px">wide</div><nav>')
  failing = audited(wide).replace("<nav>", "<script>nothing.at.all</script><nav>")
  bad, images, too_wide, said = opened(failing, tmp_path)
  assert (bad, images) == (1, 2)
  assert too_wide > 2000
  assert "nothing is not defined" in said[0]


def test_scripts_in_a_page_do_not_run(tmp_path):
  *_, said = opened(whole_page().replace("<nav>", "<script>nothing.at.all</script><nav>"), tmp_path)
  assert len(said) == 1
  assert "Content Security Policy" in said[0]
