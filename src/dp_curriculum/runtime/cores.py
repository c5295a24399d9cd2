"""The cores that a process may use, and the number of threads that its user asked for.

This file imports neither torch nor NumPy, because OpenMP reads `OMP_WAIT_POLICY` once, when they load it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from collections.abc import Mapping as Environment
from pathlib import Path


LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}  # the second is heard by GNU's OpenMP alone
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # one of them is set by accelerate, and by torchrun
_THREADS, _LAUNCH_OPTION = "OMP_NUM_THREADS", "--num_cpu_threads_per_process"


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """
    Lets threads that wait for each other fall asleep after microseconds, unless the user has said how they wait.

    By default they spin for milliseconds, in each of the thousand small operations of a step. Beside other work, a
    spinning thread takes the core from the thread that it waits for. A few microseconds of spinning cost little, and
    most threads then need not be woken: benchmarks/cpu_threads.py.
    """
    if not any(name in environment for name in _WAITING):
        environment.update(_WAITING)


def share_of_cores(environment: Environment[str, str] = os.environ) -> int:
    """Cores for one of the processes that a launcher started on this machine; at least 1."""
    return max(1, usable_cores() // processes_here(environment))


def processes_here(environment: Environment[str, str] = os.environ) -> int:
    """Processes of this launch on this machine."""
    sizes = (environment.get(name, "") for name in LOCAL_SIZES)
    return next((int(size) for size in sizes if size.isdigit() and int(size) > 0), 1)


def usable_cores(system: Path = Path("/")) -> int:
    """Cores that this process may run on, and that its container may keep busy; a part of a core counts as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(system))]))


def _quotas(system: Path) -> Iterator[float]:
    """Bounds on the cores that control groups of Linux may keep busy: of the group of this process, and around it."""
    root = system / "sys" / "fs" / "cgroup"
    for line in _text(system / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = (line + "::").split(":", 2)
        if controllers not in ("", "cpu") and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers
        group = mount / path.strip(":/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            version_2 = _text(folder / "cpu.max").split()
            version_1 = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            for pair in (version_2, version_1):  # "max" and -1 bound nothing
                if len(pair) == 2 and all(number.isdigit() for number in pair) and int(pair[1]) > 0:
                    yield int(pair[0]) / int(pair[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def threads_of_user(environment: Environment[str, str] = os.environ, system: Path = Path("/")) -> int | None:
    """
    The threads that the user's own `OMP_NUM_THREADS` asks for; `None` where there is none.

    `accelerate launch` and `torchrun` set it themselves, mostly to 1. It is the user's if the launcher, which is the
    parent of this process, was started with it. Where that cannot be seen, 1 is taken for the launcher's.
    """
    asked = environment.get(_THREADS, "").split(",")[0].strip()  # a list is for nested regions
    if not asked.isdigit() or int(asked) < 1:
        return None
    threads = int(asked)
    if not any(name in environment for name in _LAUNCHERS):
        return threads
    launcher = system / "proc" / str(os.getppid())
    variables, arguments = (_text(launcher / name).split("\0") for name in ("environ", "cmdline"))
    if not any(variables):
        return threads if threads > 1 else None
    is_told = any(name.startswith(f"{_THREADS}=") for name in variables)
    return threads if is_told or any(name.startswith(_LAUNCH_OPTION) for name in arguments) else None
