"""Runs a function in several connected processes, as a launcher does, without its start-up time: they are forked."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState


Work = Callable[[int], Any]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _child(rank: int, num_processes: int, port: int, work: Work, results: Connection, may_leave: Event | None) -> None:
    os.environ.update(environment(rank, num_processes, port))
    for state in (AcceleratorState, GradientState, PartialState):  # those of the test process are of one process
        state._reset_state() if state is not AcceleratorState else AcceleratorState._reset_state(True)
    try:
        results.send_bytes(pickle.dumps(work(rank)))
    except BaseException as error:  # noqa: BLE001 - told to the test
        traceback.print_exc()
        results.send_bytes(pickle.dumps(error))
    results.close()
    if may_leave is not None:
        may_leave.wait(600)
    sys.stdout.flush()
    os._exit(0)


def start_ranks(
    num_processes: int, work: Work, *, may_leave: Event | None = None
) -> list[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """
    Starts them; each sends its result, or its error: as bytes, for tensors of a process go when it ends.

    With `may_leave` they end once it is set, without it as soon as they are done.
    """
    fork, port = multiprocessing.get_context("fork"), free_port()
    started = []
    for rank in range(num_processes):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(rank, num_processes, port, work, sender, may_leave))
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def run_ranks(num_processes: int, work: Work, *, timeout: float = 60) -> list[Any]:
    """Results of all ranks, in order; errors come back as values."""
    # A process that is done with little work would take its end of a connection with it that another still makes.
    may_leave = multiprocessing.get_context("fork").Event()
    started = start_ranks(num_processes, work, may_leave=may_leave)
    try:
        results = [
            pickle.loads(receiver.recv_bytes()) if receiver.poll(timeout) else TimeoutError(rank)
            for rank, (_, receiver) in enumerate(started)
        ]
    finally:
        may_leave.set()
        for process, _ in started:
            process.join(5)
            process.kill()
    return results


def results_of(num_processes: int, work: Work) -> list[Any]:
    """Results of all ranks, none of which may fail."""
    found = run_ranks(num_processes, work)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found
