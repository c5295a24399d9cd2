"""Scripts of the repository, as modules for tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parents[1]


def load_script(place: str) -> ModuleType:
    """The script at a place in the repository, such as `"benchmarks/ctrl_c.py"`, run anew."""
    path = ROOT / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where its dataclasses look up names
    spec.loader.exec_module(module)
    return module
