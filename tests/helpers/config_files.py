"""The config files that describe an experiment."""

from tests.helpers import ROOT

NOT_RUN = ("__init__", "common", "video_common", "continual_common", "segmentation_common")
FILES = sorted(f.stem for f in (ROOT / "configs").glob("*.py") if f.stem not in NOT_RUN)
