"""Checks of a page in a real browser: messages, missing pictures, elements that stick out."""

import html
import json
import re
import shutil
import subprocess

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The page is in a frame as narrow as a phone, since a window cannot be that narrow; the script
# examines the frame from outside, with all sections unfolded. Contrast is that of WCAG 2, of every
# text with the background behind it.
_PROBE = """<!DOCTYPE html>
<iframe src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const rgba = text => text.match(/[0-9.]+/g).map(Number);
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, width = {width};
  const style = e => frame.contentWindow.getComputedStyle(e);
  const ground = e => {{
    for (; e; e = e.parentElement) {{
      const [r, g, b, a = 1] = rgba(style(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }}
    return [255, 255, 255];
  }};
  const contrast = e => {{
    const both = [luminance(rgba(style(e).color)), luminance(ground(e))];
    const [low, high] = both.sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }};
  const shut = [...page.querySelectorAll("details")].filter(e => !e.open).length;
  const height = page.documentElement.scrollHeight;
  page.querySelectorAll("details").forEach(e => e.open = true);
  const all = [...page.body.querySelectorAll("*")];
  const inFlow = all.filter(e => !e.parentElement.closest(".scroll") && !e.closest(".tip"));
  const out = inFlow.filter(e => e.getBoundingClientRect().right > width + 0.5);
  const isText = n => n.nodeType == 3 && n.textContent.trim();
  const texts = all.filter(e => [...e.childNodes].some(isText));
  document.body.dataset.found = JSON.stringify({{
    images: page.images.length,
    widths: [...page.images].map(i => Math.round(i.getBoundingClientRect().width)),
    broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    nameless: [...page.images].filter(i => !i.alt.trim()).length,
    wide: out.map(e => e.tagName.toLowerCase()),
    scrolls: page.documentElement.scrollWidth > width,
    faint: texts.filter(e => contrast(e) < 4.5).map(e => e.textContent.trim().slice(0, 40)),
    headings: [...page.querySelectorAll("h2")].map(h => h.textContent),
    numbers: [...page.querySelectorAll(".value")].map(e => e.textContent),
    dark: luminance(ground(page.body)) < 0.2,
    shut, height,
  }});
}};
</script>"""


def look_at(page, width=390, *, dark=False):
  """Returns the browser's findings on a page as a dict, with its console `messages`.

  The page is a file, shown in a frame of `width` CSS pixels.
  """
  probe = page.with_name("probe.html")
  probe.write_text(_PROBE.format(name=page.name, width=width))
  done = _run(
    page,
    "--dump-dom",
    *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    probe.as_uri(),
  )
  found = re.search(r'data-found="([^"]*)"', done.stdout)
  assert found, done.stderr
  return {
    **json.loads(html.unescape(found[1])),
    "messages": re.findall(r":CONSOLE[:(].*", done.stderr),
  }


def printed(page):
  """Returns the page as the bytes of a PDF file, as the browser prints it."""
  file = page.with_name("printed.pdf")
  _run(page, f"--print-to-pdf={file}", "--no-pdf-header-footer", page.as_uri())
  return file.read_bytes()


def _run(page, *options):
  profile = page.with_name("profile")
  return subprocess.run(
    [
      BROWSER,
      "--headless=new",
      "--no-sandbox",
      "--disable-gpu",
      "--allow-file-access-from-files",
      "--no-first-run",
      "--enable-logging=stderr",
      f"--user-data-dir={profile}",
      "--virtual-time-budget=20000",
      *options,
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
