"""The scan of bytes lies beside the audits."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "audit"))
