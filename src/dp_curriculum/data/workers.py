"""Processes that decode images and discard all other output. A file that harms its decoder makes its row add zero."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dp_curriculum.data.decoding import PixelFormat, format_fields
from dp_curriculum.data.images import ImageReference
from dp_curriculum.runtime.cores import share_of_cores


_START = "from dp_curriculum.data.decoding import serve; serve()"
_ROWS, _BYTES = 256, 2**23  # of one request


@dataclass(frozen=True)
class Decoded:
    """
    Some rows, decoded.

    Shapes:
        pixels: `uint8` of shape `(B, C, H, W)`; zero where a row cannot be read.
        readable: `bool` of shape `(B,)`.
        facts: one per row: format, mode, size and reason, if they were asked for; for the owner of the images alone.
    """

    pixels: np.ndarray
    readable: np.ndarray
    facts: list[Any]


class _Died(Exception):
    """The worker ended in the middle of a request."""


class Worker:
    """One decoding process. It is deaf to Ctrl-C, holds no descriptor of ours, and ends when this process does."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )

    def decode(self, rows: Sequence[ImageReference], pixel_format: PixelFormat, *, describe: bool) -> Decoded:
        """
        Decodes a few rows.

        Raises:
            _Died: If a row ended the process; which one is not known.
        """
        try:
            self._send(rows, pixel_format, describe)
            return self._receive(len(rows), pixel_format, describe)
        except (OSError, EOFError):
            self.close()
            raise _Died from None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        with contextlib.suppress(OSError):  # a request that was half sent
            self._process.communicate()

    def _send(self, rows: Sequence[ImageReference], pixel_format: PixelFormat, describe: bool) -> None:
        items = [_item(row) for row in rows]
        request = {"pixel_format": format_fields(pixel_format), "items": items, "describe": describe}
        pipe = self._process.stdin
        assert pipe is not None
        parts = [json.dumps(request).encode() + b"\n", *(row for row in rows if isinstance(row, bytes))]
        pipe.write(b"".join(parts))
        pipe.flush()

    def _receive(self, count: int, pixel_format: PixelFormat, describe: bool) -> Decoded:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        facts = json.loads(line)
        readable = np.array([row["reason"] is None if describe else bool(row) for row in facts], dtype=bool)
        shape = (pixel_format.num_channels, pixel_format.resolution, pixel_format.resolution)
        pixels = np.zeros((count, *shape), dtype=np.uint8)
        size = int(readable.sum()) * int(np.prod(shape))
        data = pipe.read(size)
        if len(data) < size:
            raise EOFError
        pixels[readable] = np.frombuffer(data, dtype=np.uint8).reshape(-1, *shape)
        return Decoded(pixels, readable, facts if describe else [])


def _item(row: ImageReference) -> int | str | None:
    """Form in which a request names a row: bytes that follow, or a path that holds wherever the worker was started."""
    if isinstance(row, bytes):
        return len(row)
    return None if row is None else os.path.abspath(row)


class DecoderPool:
    """
    Pool of as many workers as there are cores for them, each started when it is first needed.

    Args:
        num_workers (`int`): Most workers at once.
    """

    def __init__(self, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._num_workers = num_workers
        self._free: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._free.put(None)  # one that has not been started

    def map(
        self, chunks: Iterable[Sequence[ImageReference]], pixel_format: PixelFormat, *, describe: bool = False
    ) -> Iterator[Decoded]:
        """Decodes chunks of rows; results come in their order. No more than two chunks per worker are in memory."""
        waiting: deque[Future[Decoded]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._decode, chunk, pixel_format, describe))
            if len(waiting) > 2 * self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Ends the workers that are free."""
        while not self._free.empty():
            worker = self._free.get()
            if worker is not None:
                worker.close()

    def _decode(self, rows: Sequence[ImageReference], pixel_format: PixelFormat, describe: bool) -> Decoded:
        worker = self._free.get() or Worker()
        alive: Worker | None = worker
        try:
            return worker.decode(rows, pixel_format, describe=describe)
        except _Died:
            alive = None
        finally:
            self._free.put(alive)
        if len(rows) == 1:
            return _unreadable(pixel_format, describe)
        # One of them ended the worker: each gets a separate request, and the others are read.
        return _joined([self._decode([row], pixel_format, describe) for row in rows])


def _unreadable(pixel_format: PixelFormat, describe: bool) -> Decoded:
    side = pixel_format.resolution
    pixels = np.zeros((1, pixel_format.num_channels, side, side), dtype=np.uint8)
    reason = {"reason": "the decoder ended, or took too long"}
    return Decoded(pixels, np.zeros(1, dtype=bool), [reason] if describe else [])


def _joined(parts: Sequence[Decoded]) -> Decoded:
    pixels, readable = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "readable"))
    return Decoded(pixels, readable, [fact for part in parts for fact in part.facts])


def decoder_pool() -> DecoderPool:
    """The pool of this process: its workers wait for the next dataset. A forked process has its own pool."""
    return _pool_of(os.getpid(), share_of_cores())


@functools.lru_cache(maxsize=1)
def _pool_of(process: int, num_workers: int) -> DecoderPool:
    pool = DecoderPool(num_workers)
    atexit.register(pool.close)
    return pool


def chunked(rows: Iterable[ImageReference]) -> Iterator[list[ImageReference]]:
    """Rows in requests of a size that a worker answers in a moment."""
    chunk: list[ImageReference] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if len(chunk) == _ROWS or size >= _BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
