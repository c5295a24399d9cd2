"""One training of a benchmark: a process of its own on one thread, which goes on where it was stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train(folder: Path, preset: Path | None, options: Mapping[str, Any]) -> None:
    """Trains a preset, or the defaults, with other options into `folder`; what it says is added to a log beside it."""
    flags = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    config = [] if preset is None else ["--config", str(preset)]
    command = ["train", *config, "--output_dir", str(folder), *flags]
    with folder.with_suffix(".log").open("ab") as log:
        subprocess.run(
            [sys.executable, "-m", "dp_curriculum.cli", *command, "--resume_from_checkpoint", "latest"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
