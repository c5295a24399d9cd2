"""The threads that a process computes on: all of its cores, or fewer where a trial finds fewer to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dp_curriculum.runtime.cores import processes_here, share_of_cores, threads_of_user, usable_cores


_ROUNDS = 5
_GAIN = 0.9  # of the time of fewer threads: twice the threads for less gain would only take cores from others


@dataclass(frozen=True)
class Threads:
    """
    Bound on the threads that a process computes on.

    Args:
        most (`int`): At most this many.
        reason (`str`): Who asked for this number. If empty, a trial may find fewer threads to be faster.
    """

    most: int
    reason: str = ""

    @property
    def can_be_fewer(self) -> bool:
        """True if a trial may choose fewer threads."""
        return not self.reason and self.most > 1

    def settle(self, compute: Callable[[], object]) -> None:
        """
        Tries all threads, half of them, and so on down to one, in turn. Keeps the largest number that pays.

        Args:
            compute (`Callable`): A pass over random inputs, so that its time depends on no image.
        """
        if not self.can_be_fewer:
            return
        counts = [self.most]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)
        compute()  # what is made at first use
        seconds = dict.fromkeys(counts, 0.0)
        for _ in range(_ROUNDS):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                compute()
                seconds[count] += time.perf_counter() - start
        best = 1
        for count in reversed(counts):
            if seconds[count] < _GAIN * seconds[best]:
                best = count
        torch.set_num_threads(best)

    def describe(self) -> str:
        """One line with the current number of threads, and the reason for it."""
        count = torch.get_num_threads()
        words = f"computing on {count} thread{'' if count == 1 else 's'}"
        if self.reason:
            return f"{words}, {self.reason}"
        if processes_here() > usable_cores():
            return f"{words} for each of {processes_here()} processes, which share fewer cores ({usable_cores()})"
        return words if count == self.most else f"{words} of {self.most}: more are slower here"


@contextmanager
def computing_threads(device: torch.device, cpu_threads: int | None = None) -> Iterator[Threads]:
    """
    Sets the threads of this process for as long as the context lasts.

    Args:
        device (`torch.device`): Device of the networks. Fewer threads are only tried on the CPU.
        cpu_threads (`int`, *optional*): Number of threads. If unset, what the user's `OMP_NUM_THREADS` asks for, or
            else the cores of this process.
    """
    before = torch.get_num_threads()
    try:
        yield use_threads(device, cpu_threads)
    finally:
        torch.set_num_threads(before)


def use_threads(device: torch.device, cpu_threads: int | None = None) -> Threads:
    """Sets the threads of this process, as [`computing_threads`], from now on."""
    threads = _threads(device, cpu_threads)
    torch.set_num_threads(threads.most)
    return threads


def _threads(device: torch.device, cpu_threads: int | None) -> Threads:
    if cpu_threads is not None:
        if cpu_threads < 1:
            raise ValueError(f"Expected --cpu_threads={cpu_threads} to be positive.")
        return Threads(cpu_threads, "as --cpu_threads says")
    asked = threads_of_user()
    if asked is not None:
        return Threads(asked, "as OMP_NUM_THREADS says")
    return Threads(share_of_cores(), "" if device.type == "cpu" else f"beside {device.type}")
