"""The processes of one run: what a launch may ask for, that all of them agree, and what happens where one is lost."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import MultiProcessAdapter
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from dp_curriculum.runtime.cores import LOCAL_SIZES


Value = TypeVar("Value")

# Longer than the main process ever works alone while the others wait; the death of one is noticed by the heartbeat.
COLLECTIVE_TIMEOUT = timedelta(hours=6)
HEARTBEAT_SECONDS = 3.0
LOST_AFTER_SECONDS = 40.0
STORAGE_ERROR = 5

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}

# Variables by which launchers inform a process about itself and the others: the names of torchrun and of three kinds
# of MPI, as accelerate reads them.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


class ProcessLostError(ConnectionError):
    """Another process of the run ended, or its machine cannot be reached."""


class _MainLog(MultiProcessAdapter):
    """accelerate's log of the main process, whose lines do not begin with its number."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return logging.LoggerAdapter.process(self, msg, kwargs)


def get_logger(name: str) -> MultiProcessAdapter:
    """A logger to which the main process alone writes."""
    return _MainLog(logging.getLogger(name), {})


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """
    Refuses what a launch may ask for and DP-SGD cannot keep its promise under. Call it before processes connect.

    Raises:
        ValueError: If the launch sets fp16 or fp8, gradient accumulation, or a plugin that shards the model, or if it
            says too little of the processes that it starts; see [`check_ranks`].
    """
    check_ranks(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"Expected mixed_precision={precision} of the accelerate configuration to be no or bf16: the loss scaling "
            "of fp16 breaks the clipping bound; launch with --mixed_precision no."
        )
    for name, plugin in _PLUGINS.items():
        if environment.get(name, "false").lower() in ("true", "1", "yes"):
            raise ValueError(
                f"Expected the accelerate configuration to be without {plugin}: it shards or steps the model itself, "
                "and gradients of single images would be lost; launch with --multi_gpu."
            )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise ValueError(
            f"Expected gradient_accumulation_steps={steps} of the accelerate configuration to be 1: a noisy step is "
            "one draw, which --max_physical_batch_size splits to fit into memory."
        )


def check_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """
    Refuses a process whose environment says that it is one of several, but too little to find the others.

    Raises:
        ValueError: If a rank or a number of processes is no integer, or accelerate would take the process for the only
            one; it names the variable.
    """
    for names, least in ((_RANKS + _LOCAL_RANKS, -1), (_SIZES + LOCAL_SIZES, 1)):
        for name in names:
            if name in environment and not _is_at_least(environment[name], least):
                raise ValueError(
                    f"Expected the variable {name}={environment[name]!r} to be an integer of at least {least}: unset "
                    "it, or start with accelerate launch or torchrun, which set it."
                )
    told = {name: int(environment[name]) for name in (*_RANKS, *_SIZES) if name in environment}
    is_one_of_several = any(value > (1 if name in _SIZES else 0) for name, value in told.items())
    if not is_one_of_several or int(environment.get("LOCAL_RANK", -1)) >= 0:
        return
    has_rank = any(value >= 0 for name, value in told.items() if name in _RANKS)
    if not (environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes") and has_rank):
        missing = "LOCAL_RANK" if has_rank else "RANK and LOCAL_RANK"
        raise ValueError(
            f"Expected the variable {missing} to be set beside {', '.join(f'{n}={v}' for n, v in told.items())}: "
            "accelerate takes this process for the only one; start with accelerate launch or torchrun, which set all."
        )


def _is_at_least(value: str, least: int) -> bool:
    try:
        return int(value) >= least
    except ValueError:
        return False


def ignored_requests(mixed_precision: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each thing that the launch asks for and a run does not do."""
    lines = []
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", mixed_precision):
        lines.append(
            f"accelerate asks for mixed_precision={asked}, the configuration for --mixed_precision={mixed_precision}: "
            "the configuration counts."
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        lines.append(f"accelerate asks for dynamo_backend={backend}: nothing is compiled in this run.")
    return lines


def describe_processes(accelerator: Accelerator) -> str:
    """Describes in words how many processes a run uses."""
    count, device = accelerator.num_processes, accelerator.device.type
    if count == 1:
        return f"1 process on {device}"
    return f"{count} processes on {device} ({torch.distributed.get_backend()})"


def check_connected(num_processes: int, environment: Mapping[str, str] = os.environ) -> None:
    """
    Refuses to be one of several processes that know nothing of each other, as torchrun without a GPU starts them.

    Raises:
        ValueError: If this process has a rank in a group that accelerate has not joined.
    """
    asked = max(int(environment.get(name, 1)) for name in _SIZES)
    if asked > num_processes:
        raise ValueError(
            f"Expected this process to be one of {asked}, but it is alone: accelerate has not connected them; on a "
            "machine without GPUs set ACCELERATE_USE_CPU=true."
        )


def missing_processes(num_processes: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """
    A warning where the launch asked for more processes than run, else `None`.

    `accelerate launch --cpu --num_processes 2` starts one process. It sets the address of a group, though, which one
    process has no use for, and not the rank that each process of a group has.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if num_processes > 1 or not by_accelerate or "LOCAL_RANK" in environment:
        return None
    return (
        f"{num_processes} process runs where the launch asked for several processes: on a machine without GPUs start "
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
    )


def process_state() -> PartialState:
    """
    This process among those of the launch; on a CPU, `PartialState()` alone overlooks the others.

    Raises:
        ValueError: If the launch says too little of them; see [`check_ranks`].
    """
    check_ranks()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=COLLECTIVE_TIMEOUT)


def jointly(accelerator: Accelerator | PartialState, compute: Callable[[], Value]) -> Value:
    """
    Computes on each process; where it fails on one, it fails on all, so that none waits for one that has left.

    Raises:
        Exception: The process' own error, or else the first one of the others, named by its process.
    """
    if accelerator.num_processes == 1:
        return compute()
    result: list[Value] = []
    own: Exception | None = None
    try:
        result.append(compute())
    except Exception as error:  # noqa: BLE001 - raised below, after the others have been informed
        own = error
    errors = gather_object([None if own is None else (type(own), str(own))])
    if own is not None:
        raise own
    for index, failed in enumerate(errors):
        if failed is not None:
            kind, message = failed
            # Only kinds that are made of a message alone can be made again.
            raise (kind if kind in (ValueError, OSError, RuntimeError) else ValueError)(f"process {index}: {message}")
    return result[0]


def from_main(accelerator: Accelerator | PartialState, compute: Callable[[], Value]) -> Value:
    """Returns on all processes what the main process computes, or raises its error."""
    main = accelerator.is_main_process
    value = jointly(accelerator, lambda: compute() if main else None)
    if accelerator.num_processes == 1:
        return value  # type: ignore[return-value]
    values: list[Any] = [value]
    return broadcast_object_list(values, from_process=0)[0]


def check_agreement(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """
    Refuses processes that were started with different configurations, data or versions.

    Args:
        accelerator (`Accelerator`): Connects the processes.
        facts (`Mapping`): What has to be equal, by the name that a message gives it.

    Raises:
        ValueError: On all processes, naming the first difference.
    """
    if accelerator.num_processes == 1:
        return
    gathered = gather_object([dict(facts)])
    for index, theirs in enumerate(gathered):
        for name, value in gathered[0].items():
            if theirs.get(name) != value:
                shown = "" if name == "data" else f": {theirs.get(name)} on process {index}, {value} on process 0"
                raise ValueError(
                    f"Expected {name} to be the same on all processes{shown}; start all of them in the same way."
                )


@contextmanager
def all_alive(accelerator: Accelerator) -> Iterator[None]:
    """
    Ends this process, with one line, soon after another one of the run is lost.

    A process that dies closes its connections: the operation under way fails, which becomes a [`ProcessLostError`].
    One that vanishes with its machine, or dies under a backend that waits, is missed by its heartbeat in the store of
    the process group; nothing can be raised in a thread that waits then, so this process exits.
    """
    if accelerator.num_processes == 1:
        yield
        return
    heartbeat: _Heartbeat | None = None
    try:
        heartbeat = _Heartbeat(accelerator.process_index, accelerator.num_processes)
        heartbeat.start()
        yield
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise ProcessLostError(_lost_line("another process")) from error
    finally:
        if heartbeat is not None:
            heartbeat.stop()


def _is_of_connection(error: RuntimeError) -> bool:
    signs = ("gloo", "Connection", "Broken pipe", "NCCL", "Timed out", "Socket")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)


def _lost_line(who: str) -> str:
    return (
        f"{who} of this run was lost, so this one ends: what is charged stays charged; start all processes again with "
        "--resume_from_checkpoint latest."
    )


class _Heartbeat:
    """A thread that reports to the store that its process lives, and checks whether the others do."""

    def __init__(self, rank: int, num_processes: int) -> None:
        self._rank, self._num_processes = rank, num_processes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # A separate connection: that of the process group may be waiting for a lost process.
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=LOST_AFTER_SECONDS),
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        counts, silent = [0] * self._num_processes, [0.0] * self._num_processes
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                self._store.add(_beat(self._rank), 1)
                for rank in range(self._num_processes):
                    count = self._store.add(_beat(rank), 0)
                    silent[rank] = 0.0 if count != counts[rank] else silent[rank] + HEARTBEAT_SECONDS
                    counts[rank] = count
            except RuntimeError:  # the store went down with its process
                self._leave("the main process")
                return
            lost = [rank for rank, seconds in enumerate(silent) if seconds > LOST_AFTER_SECONDS]
            if lost:
                self._leave(f"process {lost[0]}")
                return

    def _leave(self, who: str) -> None:
        # The main thread may be about to report the same, or to end normally.
        if not self._stopped.wait(2 * HEARTBEAT_SECONDS):
            sys.stderr.write(f"dp-curriculum: error: {_lost_line(who)}\n")
            sys.stderr.flush()
            os._exit(STORAGE_ERROR)


def _beat(rank: int) -> str:
    return f"dp_curriculum/alive/{rank}"
