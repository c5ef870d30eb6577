"""Table of a long-video run's result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gating_jax.reports import tables


def render(result: Mapping[str, Any]) -> str:
  """Returns lines of name and value, from the result of `video.evaluate.test`."""
  return tables.lines(rows(result))


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the same as pairs of name and value."""
  percent = lambda name: f"{100 * result[name]:.1f} %"
  rows = [
    _score(result),
    ("MACs per video, heavy net on all segments", f"{result['all_segments_macs']:,.0f}"),
    (
      "MACs per video, this net",
      f"{result['macs']:,.0f}  ({percent('mac_ratio')}, light net and gate included)",
    ),
    (
      "segments chosen",
      f"{percent('share')}  (10 to 90 % of videos: {percent('share_p10')} "
      f"to {percent('share_p90')})",
    ),
  ]
  # Only made videos know which of their segments the label depends on.
  if "precision" in result:
    rows.append(
      (
        "chosen segments that matter",
        f"{percent('precision')}  (by chance {percent('relevant_share')})",
      )
    )
    rows.append(("segments that matter, chosen", percent("recall")))
  if result["unreadable"]:
    rows.append(("videos that could not be read", f"{result['unreadable']}"))
  if result["missing"]:
    rows.append(("videos without a file", f"{result['missing']}"))
  if result.get("classes_left_out"):
    rows.append(("classes without a test video", ", ".join(result["classes_left_out"])))
  if "videos_per_second" in result:
    rows.append(
      (
        "videos per second",
        f"{result['videos_per_second']:.1f}  (heavy net on all segments: "
        f"{result['all_segments_videos_per_second']:.1f})",
      )
    )
  return rows


def headline(result: Mapping[str, Any]) -> str:
  """Summarises the result in one line."""
  name, value = _score(result)
  return (
    f"{name} {value}  {100 * result['share']:.1f} % of "
    f"segments  {100 * result['mac_ratio']:.1f} % of MACs"
  )


def _score(result: Mapping[str, Any]) -> tuple[str, str]:
  # Videos with a single label have an accuracy; with several labels, a mean average precision.
  name = "accuracy" if "accuracy" in result else "mean_average_precision"
  return (
    f"test {name.replace('_', ' ')}",
    f"{100 * result[name]:.2f} %  ({result['videos']:,} videos)",
  )
