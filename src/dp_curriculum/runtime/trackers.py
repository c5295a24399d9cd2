"""Trackers. accelerate silently skips one that is not installed, so it is refused here."""

from __future__ import annotations

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType


NO_TRACKER, ALL_TRACKERS = "none", "all"
TRACKER_PROJECT = "dp_curriculum"  # name of the project in the tracker
_PACKAGES = {"comet_ml": "comet-ml"}  # where it is not the name of the tracker


def check_tracker(name: str) -> None:
    """
    Refuses a tracker that would log nothing.

    Args:
        name (`str`): As `--report_to` has it: `none`, `all` that are installed, or one that accelerate knows.

    Raises:
        ValueError: If accelerate does not know it, or it is not installed; the message says what to install.
    """
    own = set(LoggerType.list())
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    available = {str(tracker) for tracker in get_available_trackers()} | {one for one in known if one not in own}
    if name == NO_TRACKER or name in available or (name == ALL_TRACKERS and available):
        return
    if name == ALL_TRACKERS:
        raise ValueError(f"Expected --report_to=all to find a tracker: install one of {', '.join(known)}.")
    if name not in known:
        raise ValueError(f"Expected --report_to={name} to be none, all, {', '.join(known)}.")
    raise ValueError(
        f"Expected --report_to={name} to be installed: pip install {_PACKAGES.get(name, name)}, or name another one."
    )
