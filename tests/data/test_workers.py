"""The processes that decode: one that dies or hangs over a row costs that row alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from pictures import grey, png

from dp_curriculum.data import workers
from dp_curriculum.data.decoding import PixelFormat
from dp_curriculum.data.workers import DecoderPool, chunked, decoder_pool


FORMAT = PixelFormat(8, 1)
FAULTY = """
import os, time, dp_curriculum.data.decoding as decoding
real, decoding.MAX_CPU_SECONDS = decoding.decode, 0.2
def decode(data, pixel_format):
    if data == b"exits":
        os._exit(3)
    if data == b"crashes":
        os.abort()
    while data == b"hangs":
        pass
    if data == b"prints":
        os.write(1, b"seen"), os.write(2, b"seen"), print("seen")
    return real(data, pixel_format)
decoding.decode, decoding.describe = decode, lambda data: {}
decoding.serve()
"""


@pytest.fixture
def pool() -> DecoderPool:
    pool = DecoderPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("fault", [b"exits", b"crashes", b"hangs", b"prints"])
def test_a_row_that_ends_its_worker_is_the_only_one_lost(
    fault: bytes, pool: DecoderPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "_START", FAULTY)
    rows = [png(grey(1)), fault, png(grey(3))]
    (found,) = pool.map([rows], FORMAT)
    assert found.readable.tolist() == [True, False, True]
    assert found.pixels[:, 0, 0, 0].tolist() == [1, 0, 3]
    (told,) = pool.map([rows], FORMAT, describe=True)
    reasons = [fact["reason"] for fact in told.facts]
    ended = "the decoder ended, or took too long"
    assert reasons == [None, ended if fault != b"prints" else "cannot be read: UnidentifiedImageError", None]
    assert capfd.readouterr() == ("", "")


def test_its_owner_is_told_why_a_row_cannot_be_read(pool: DecoderPool, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(grey(1)))
    os.mkfifo(tmp_path / "pipe")
    rows = [tmp_path / "1.png", None, b"junk", tmp_path / "pipe", tmp_path, tmp_path / "2.png"]
    (found,) = pool.map([rows], FORMAT, describe=True)
    assert found.facts[0] == {"format": "PNG", "mode": "L", "width": 8, "height": 8, "reason": None}
    reasons = [fact["reason"] for fact in found.facts[1:]]
    assert reasons == [
        "no image",
        "cannot be read: UnidentifiedImageError",
        "not a regular file",
        "cannot be read: IsADirectoryError",
        "cannot be read: FileNotFoundError",
    ]


def test_a_name_that_is_no_unicode_is_opened(pool: DecoderPool, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(png(grey(9)))
    (found,) = pool.map([[path]], FORMAT)
    assert found.readable.tolist() == [True]


def test_workers_are_started_when_they_are_needed_and_used_again(pool: DecoderPool) -> None:
    started = []

    class Counted(workers.Worker):
        def __init__(self) -> None:
            started.append(1)
            super().__init__()

    original, workers.Worker = workers.Worker, Counted  # type: ignore[misc]
    try:
        for _ in range(3):
            assert [found.readable.all() for found in pool.map([[png(grey(1))]], FORMAT)] == [True]
        assert len(started) == 1
        list(pool.map([[png(grey(1))]] * 20, FORMAT))
        assert len(started) <= 2
    finally:
        workers.Worker = original  # type: ignore[misc]


def test_ctrl_c_of_the_terminal_does_not_reach_a_worker(pool: DecoderPool) -> None:
    list(pool.map([[png(grey(1))]], FORMAT))
    worker = next(free for free in pool._free.queue if free is not None)
    assert os.getpgid(worker._process.pid) != os.getpgid(0)


def test_requests_are_bounded_in_rows_and_bytes() -> None:
    assert [len(chunk) for chunk in chunked([b"x"] * 520)] == [256, 256, 8]
    large = bytes(2**23)
    assert [len(chunk) for chunk in chunked([b"x", large, b"x", large, None])] == [2, 2, 1]
    assert list(chunked([])) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_process(tmp_path: Path) -> None:
    import subprocess

    script = (
        "import os, sys, signal\n"
        "from dp_curriculum.data.decoding import PixelFormat\n"
        "from dp_curriculum.data.workers import decoder_pool\n"
        "pool = decoder_pool()\n"
        "list(pool.map([[b'x']], PixelFormat(8, 1)))\n"
        "worker = next(free for free in pool._free.queue if free is not None)\n"
        "print(worker._process.pid, flush=True)\n"
        "if sys.argv[1] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for how in ("end", "kill"):
        done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, timeout=60)
        assert done.returncode == (0 if how == "end" else -signal.SIGKILL) and not done.stderr
        deadline = time.monotonic() + 10
        while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{int(done.stdout)}").exists(), how


def test_there_are_as_many_workers_as_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "share_of_cores", lambda: 3)
    assert decoder_pool()._num_workers == 3
