"""Pages of runs, to compare."""

import re


def lasting(folder):
  """The page of a run without what differs each time it is written: directories, dates, measured times."""
  html = (
    (folder / "report.html")
    .read_text()
    .replace(str(folder), "RUN")
    .replace(f"<p>{folder.name}, ", "<p>RUN, ")
  )
  html = html.partition("About this run")[0]
  return re.sub(r"[\d.]+ ms|[\d.]+ +\(heavy net on all segments: [\d.]+\)", "", html)
