"""Freed memory is kept, where that can be said to the allocator; the user's own settings win."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from dp_curriculum.runtime import allocator
from dp_curriculum.runtime.allocator import keep_freed_memory


_COUNT = """
import resource, sys
from dp_curriculum.runtime.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory({})
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytes(bytearray(2**26))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_memory_that_was_freed_comes_back_without_new_pages() -> None:
    """Of 64 MiB, which glibc gives back to the kernel each time if nobody says otherwise."""
    counts = {
        mode: int(subprocess.run([sys.executable, "-c", _COUNT, mode], capture_output=True, check=True).stdout)
        for mode in ("kept", "given back")
    }
    assert counts["kept"] < 0.1 * counts["given back"]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: 1 / 0)
    assert not keep_freed_memory({name: "1"})


@pytest.mark.parametrize("error", [OSError("no C library"), AttributeError("no mallopt")])
def test_another_system_is_left_as_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Any) -> Any:
        raise error

    monkeypatch.setattr(allocator.ctypes, "CDLL", fails)
    assert not keep_freed_memory({})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory({})
