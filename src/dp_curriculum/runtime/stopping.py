"""Ctrl-C. The first asks a run to stop, and says so at once; the second interrupts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

import torch
from accelerate.utils import gather_object

from dp_curriculum.runtime.progress import duration


Value = TypeVar("Value")

# torchrun, and accelerate with several processes, pass a Ctrl-C on. Before torch 2.6 the terminal sent it as well.
_IS_LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
_SAME_CTRL_C_SECONDS = 3.0
# torchrun ends its processes when they take longer than this to stop.
_SHUTDOWN_VARIABLE, _SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

NOTHING_SPENT = "stopped before anything was spent; there is nothing to save. The same command starts it again."
NOT_SAVED = "stopped without saving. What was charged stays charged; --resume_from_checkpoint latest resumes the run."


class _CutShort(Exception):
    """Ends work that a stop request leaves undone."""


@dataclass
class StopRequest:
    """
    Set by the first Ctrl-C or SIGTERM: the step under way is finished, then training ends normally.

    Args:
        requested (`bool`): Whether this process was asked to stop.
        nothing_spent (`bool`): Whether there is nothing to save yet. A request then ends the run at once.
        work (`str`): What is finished before saving; empty while saving is under way.
        work_seconds (`float`, *optional*): What that takes at most, by a trial on random images. It must not depend
            on the private images.
        saving_seconds (`float`, *optional*): What saving takes, as the rehearsal did.
    """

    requested: bool = field(default=False)
    nothing_spent: bool = False
    work: str = "the step"
    work_seconds: float | None = None
    saving_seconds: float | None = None
    _is_cut: bool = field(default=False, repr=False)
    _is_said: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def agreed(self) -> bool:
        """Returns whether any process was asked to stop; all processes ask together, and all get the same answer."""
        if torch.distributed.is_initialized():
            self.requested = max(gather_object([self.requested]))
        return self.requested

    @contextmanager
    def finishing(self, work: str, seconds: float | None) -> Iterator[None]:
        """Names what a request would let finish, and how long that takes by a trial."""
        before = self.work, self.work_seconds
        self.work, self.work_seconds = work, seconds
        try:
            yield
        finally:
            self.work, self.work_seconds = before

    def unless_stopped(self, compute: Callable[[], Value]) -> Value | None:
        """Computes what a stop request cuts short: `None` then, and where one was made before."""
        try:
            self._is_cut = True
            if self.requested:
                return None
            value = compute()
            self._is_cut = False
            return value
        except _CutShort:
            return None
        finally:
            self._is_cut = False

    def words(self, environment: Mapping[str, str] = os.environ) -> str:
        """The line said when the request is made: what happens now, how long it takes, and how to end it at once."""
        if self.nothing_spent:
            return "Stopping: nothing has been spent by this start."
        first = "Saving" if self._is_cut or not self.work else f"Finishing {self.work}, then saving"
        seconds = self._seconds()
        return f"{first}{'' if seconds is None else f': about {duration(seconds)}'}. {_how_to_interrupt(environment)}"

    def _seconds(self) -> float | None:
        if self.saving_seconds is None:
            return None
        work = 0.0 if self._is_cut or not self.work else self.work_seconds
        return None if work is None else max(1.0, work + self.saving_seconds)

    def announce(self) -> None:
        """Says [`~StopRequest.words`], once, whichever thread comes first."""
        if self._is_said.acquire(blocking=False) and os.environ.get("RANK", "0") == "0":
            _say(f"\n{self.words()}\n")


def _how_to_interrupt(environment: Mapping[str, str]) -> str:
    again = "Press Ctrl-C again to stop without saving."
    if "TORCHELASTIC_RUN_ID" in environment:
        limit = environment.get(_SHUTDOWN_VARIABLE, f"{_SHUTDOWN_SECONDS:.0f}")
        return f"{again} The launcher waits {limit} seconds for it ({_SHUTDOWN_VARIABLE})."
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return f"`accelerate launch` ends before that; `kill {os.getpid()}` stops without saving."
    return again


def _say(text: str) -> None:
    """Writes from a signal handler: a buffered stream may be in use already. A notebook has its own stream."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is sys.__stderr__ and sys.stderr is not None:
            os.write(sys.stderr.fileno(), text.encode("utf-8", "backslashreplace"))
        else:
            sys.stderr.write(text)
            sys.stderr.flush()


@contextmanager
def stop_on_signal(stop: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a [`StopRequest`]; the second interrupts at once."""
    stop, first = stop or StopRequest(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stop.requested:
            stop.requested, first = True, time.monotonic()
            stop.announce()
            if stop.nothing_spent:
                raise KeyboardInterrupt(NOTHING_SPENT)
            if stop._is_cut:
                raise _CutShort
        elif not (_IS_LAUNCHED and time.monotonic() - first < _SAME_CTRL_C_SECONDS):
            raise KeyboardInterrupt(NOT_SAVED)

    previous = {signum: signal.signal(signum, handle) for signum in _SIGNALS}
    try:
        with _heard_during_long_calls(stop):
            yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _heard_during_long_calls(stop: StopRequest) -> Iterator[None]:
    """
    Announces a signal while the main thread computes.

    A handler in Python waits until a call into torch returns, which may take many seconds. The byte that the
    interpreter writes when a signal arrives is read by a thread.
    """
    if os.name != "posix":
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    if before == -1:
        _WAKENED.add(os.getpid())
    else:  # an event loop, as in a notebook, has its own
        signal.set_wakeup_fd(before)

    def listen() -> None:
        while byte := reading.recv(1):
            if byte == b"\0":
                return
            if byte[0] in _SIGNALS:
                stop.announce()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        if before == -1:
            signal.set_wakeup_fd(-1)
        _WAKENED.clear()
        with contextlib.suppress(BlockingIOError):  # full of signals, and the thread is about to read them
            writing.send(b"\0")
        listener.join(1.0)
        reading.close()
        writing.close()


_WAKENED: set[int] = set()


def _forget_in_child() -> None:
    """A forked process would write its signals to the pipe of its parent."""
    if _WAKENED:
        _WAKENED.clear()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
