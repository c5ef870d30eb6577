"""Pages of runs, to compare."""

import re


def lasting(folder):
  """Returns the page of a run without parts that always differ: directories, dates, times."""
  html = (
    (folder / "report.html")
    .read_text()
    .replace(str(folder), "RUN")
    .replace(f"<p>{folder.name}, ", "<p>RUN, ")
  )
  html = html.partition("About this run")[0]
  return re.sub(r"[\d.]+ ms|[\d.]+ +\(heavy net on all segments: [\d.]+\)", "", html)
