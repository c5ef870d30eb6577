"""What a real browser makes of a page: messages in its console, pictures that did not load, elements that stick out."""

import html
import json
import re
import shutil
import subprocess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The page lies in a frame as wide as a phone, which a window cannot be, and this looks at it from outside.
_PROBE = """<!DOCTYPE html><iframe src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, width = {width};
  const out = [...page.body.querySelectorAll("*")].filter(
    e => !e.parentElement.closest(".scroll") && e.getBoundingClientRect().right > width + 0.5);
  document.body.dataset.found = JSON.stringify({{
    images: page.images.length,
    widths: [...page.images].map(i => Math.round(i.getBoundingClientRect().width)),
    broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    wide: out.map(e => e.tagName.toLowerCase()),
    scrolls: page.documentElement.scrollWidth > width,
    headings: [...page.querySelectorAll("h2")].map(h => h.textContent),
  }});
}};
</script>"""


def look_at(page, width=390):
  """What the browser says of a page, given its file, in a frame of `width` CSS pixels: a dict, its `messages` too."""
  probe = page.with_name("probe.html")
  probe.write_text(_PROBE.format(name=page.name, width=width))
  profile = page.with_name("profile")
  done = subprocess.run(
      [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--no-first-run",
       "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom",
       probe.as_uri()], capture_output=True, text=True, timeout=120)
  found = re.search(r'data-found="([^"]*)"', done.stdout)
  assert found, done.stderr
  return {**json.loads(html.unescape(found[1])), "messages": re.findall(r":CONSOLE[:(].*", done.stderr)}
